"""The image-text task: a PaliGemma, new or published, answers prompts about images.

    python train.py config/vlm_shapes.py
    python sample.py --out_dir=out/vlm_shapes --image=photo.jpg --prompt=caption --temperature=0

Axes: B batch, n rows of a split, T tokens of a row, A tokens of the longest answer, N image tokens, C channels.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from batches import ImageTextDataset, fixed_rows, padded, read_images, shuffled_rows, to_device
from configurator import UserError
from generate import generate, pick_tokens, picker
from inside import record
from inside.attention import image_attention
from machine.device import autocast
from machine.terminal import watched
from run import checkpoint, pictures
from run.cost import flops_per_token, size_in_words
from run.pictures import save_picture
from sources.images import CONTROLS
from tasks.labels import mean_nats
from tasks.loading import load
from tasks.task import Task
from tokenizer import Transcript, transcribe
from vit import ViTConfig, init_parts
from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig

SHOWN = 224  # pixels of the image in a record
VISION_SHAPE = ("n_layer", "n_head", "n_embd", "patch_size")  # the settings that shape the vision tower


class WithImages(Task):
    """What the tasks with images share: a data set of images with text, and a vision tower.

    A subclass has encode(rows), which turns the rows of a split into arrays, among them `images` (n,), the index of
    each row's image, and `ids` (n, T). Its TEXT_SHAPE names the settings that shape the part that reads text.
    """

    def open(self, folder, world):
        self.dataset, self.world = ImageTextDataset(folder), world
        self.open_tokenizer(folder)
        self.data = {split: self.encode(self.dataset.rows[split]) for split in ("train", "val")}

    def vision_config(self):
        patch, size = self.settings.vision.patch_size, self.dataset.image_size
        check_patch("vision.patch_size", patch, size)
        return ViTConfig(**dataclasses.asdict(self.settings.vision), image_size=size)

    def fit(self, model):
        self.n_patches = model.config.vision.n_patches
        check_size(model, self.dataset)

    def shape(self, model):
        text = {name: getattr(model.config.text, name) for name in self.TEXT_SHAPE}
        return text | {f"vision.{name}": getattr(model.config.vision, name) for name in VISION_SHAPE}

    def pick(self, step):
        return shuffled_rows(len(self.data["train"].images), self.settings.batch_size, self.settings.seed, step)

    def summary(self, model):
        n, s = len(self.data["train"].images), self.settings
        return (f"model: {size_in_words(model)}, {self.n_patches} image tokens; data:"
                f" {n:,} rows of {s.dataset}; {s.max_iters} updates = {s.batch_size * s.max_iters / n:.1f} epochs")


def image_of(request):
    """The PIL image of a request. Raises UserError if it has none."""
    if not request.get("image"):
        raise UserError("this model reads images: add --image=FILE")
    return pictures.read_image(request["image"])


def check_patch(name, patch, size):
    """Raises UserError if the setting `name`, the side of a patch, does not divide that of the images."""
    if size % patch:
        fitting = ", ".join(str(n) for n in range(2, size + 1) if size % n == 0)
        raise UserError(f"{name} = {patch}: does not divide the images' {size} pixels; {fitting} do")


def check_size(model, dataset):
    """Raises UserError if the model reads images of another size than the data set has."""
    size = model.config.vision.image_size
    if size != dataset.image_size:
        raise UserError(f"the images of {dataset.folder} have {dataset.image_size} pixels, but the model reads {size}:"
                        f" prepare them in that size, python prepare.py FOLDER --image_size={size} --name=NEW")


class Rows(NamedTuple):
    """Prompts and answers as token ids, each row padded on the right to the length of the longest."""
    images: np.ndarray  # (n,) index of the row's image
    ids: np.ndarray  # (n, T + 1): prompt, answer, eos, padding
    prefix: np.ndarray  # (n,) how many tokens the prompt has
    lengths: np.ndarray  # (n,) how many tokens prompt, answer and eos have together


class ImageTextTask(WithImages):
    models = {"paligemma": (PaliGemma, PaliGemmaConfig)}
    TEXT_SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "bias")
    rows_label = "the training rows"

    def encode(self, rows):
        """Returns the `Rows` of a split. rows: its dicts with image (an index), prompt and answer."""
        prompts = {prompt: encode_prompt(self.tokenizer, prompt) for prompt in {row["prompt"] for row in rows}}
        answers = {answer: with_eos(self.tokenizer, answer) for answer in {row["answer"] for row in rows}}
        prefix = np.array([len(prompts[row["prompt"]]) for row in rows])
        ids, lengths = padded([np.append(prompts[row["prompt"]], answers[row["answer"]]) for row in rows], 0)
        return Rows(np.array([row["image"] for row in rows]), ids, prefix, lengths)

    def build(self, generator):
        s = self.settings
        shape = {name: getattr(s, name) for name in self.TEXT_SHAPE}
        text = GemmaConfig(**shape, vocab_size=self.tokenizer.vocab_size)
        model = PaliGemma(PaliGemmaConfig(self.vision_config(), text, s.dropout))
        init_parts(model, generator)
        if s.init_vision:
            self.copy_part("init_vision", "vision", model.vision)
        if s.init_decoder:
            task, decoder = self.copy_part("init_decoder", "transformer", model.decoder.transformer)
            self.copy_embeddings(decoder.wte.weight, task.tokenizer, model.decoder.wte.weight)
        return model

    def copy_part(self, setting, name, ours):
        """Fills `ours` with the part `name` of the run that `setting` names. Returns that run's task and model."""
        run = getattr(self.settings, setting)
        if not checkpoint.is_run(run):
            raise UserError(f"{setting} = {run}: is not the folder of a run with a checkpoint; train one first")
        task, model, _ = load(run)
        theirs = getattr(model, name, torch.nn.Module())
        wanted, found = ({key: tuple(p.shape) for key, p in part.named_parameters()} for part in (ours, theirs))
        for key in wanted | found:
            if wanted.get(key) != found.get(key):
                raise UserError(f"{setting} = {run}: its {type(model).__name__} has another shape than this run's"
                                f" model: {name}.{key} is {found.get(key, 'absent')}, not {wanted.get(key, 'absent')}")
        ours.load_state_dict(theirs.state_dict())
        return task, model

    @torch.no_grad()
    def copy_embeddings(self, theirs, their_tokenizer, ours):
        """Copies rows of the embedding table `theirs`, (V, C), into `ours`, for tokens with equal text in both."""
        known = {their_tokenizer.decode([i]): i for i in range(their_tokenizer.vocab_size)}
        for i in range(self.tokenizer.vocab_size):
            text = self.tokenizer.decode([i])
            if text in known:
                ours[i] = theirs[known[text]]

    def fit(self, model):
        super().fit(model)
        needed = self.n_patches + max(data.ids.shape[1] for data in self.data.values())
        if needed > model.config.block_size:
            raise UserError(f"block_size = {model.config.block_size}: {self.n_patches} image tokens and rows of up to"
                            f" {needed - self.n_patches} tokens need at least {needed}")

    def weight(self, rows):
        data = self.data["train"]
        return int((data.lengths[rows] - data.prefix[rows]).sum())

    def batch(self, rows, generator):
        return self.gather(self.data["train"], rows)

    def gather(self, data, rows):
        """(the model's arguments, the targets' weights) for some rows of `data`.

        Arguments: images (B, 3, H, W); tokens (B, T), of prompt and answer; targets (B, A), the answer and its eos;
        places (B, A), the index in `tokens` of the token before each target, at which it is predicted; prefix (B,), the
        number of tokens in the prompt. Weights (B, A): 1 for a target, 0 for padding. T and A fit the longest of these
        rows, or on a GPU, where one shape is faster than many, the longest of the split.
        """
        device, prefix = self.world.device, data.prefix[rows]
        among = slice(None) if device.type == "cuda" else rows
        T, A = data.lengths[among].max() - 1, (data.lengths - data.prefix)[among].max()
        places = prefix[:, None] - 1 + np.arange(A)  # (B, A): the target of a place is the token after it
        weights = places < data.lengths[rows, None] - 1
        places = np.minimum(places, T - 1)
        targets = np.take_along_axis(data.ids[rows], places + 1, axis=1)
        arrays = {"tokens": data.ids[rows, :T], "targets": targets, "places": places, "prefix": prefix}
        arguments = {name: to_device(array, device) for name, array in arrays.items()}
        arguments["images"] = read_images(self.dataset.images, data.images[rows], device)
        return arguments, to_device(weights, device).float()

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats of the tokens of all answers}."""
        data = self.data[split]
        most_rows = max(1, limit // data.ids.shape[1]) if limit else 0
        batches = fixed_rows(len(data.images), self.settings.batch_size, most_rows)
        return mean_nats(model, world, dtype, batches, functools.partial(self.gather, data))

    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: "rows", their number; "exact" and "exact (image blanked)", the shares of exact answers.

        Each kind of rows (the data set names a kind for each row) adds its own shares, "exact KIND" and so on, and
        "box IoU KIND", the mean of `box_iou` over its rows whose right answer has boxes.
        """
        rows = self.dataset.rows[split]
        with autocast(world.device, dtype):
            seen, blind = (self.answers(model, rows, blank) for blank in (False, True))
        result = {"rows": len(rows)}
        for kind in (*sorted({row["kind"] for row in rows}), ""):
            chosen = [i for i, row in enumerate(rows) if kind in ("", row["kind"])]
            label = f" {kind}" if kind else ""
            result[f"exact{label}"] = exact_share(seen, rows, chosen)
            result[f"exact{label} (image blanked)"] = exact_share(blind, rows, chosen)
            boxed = [i for i in chosen if pictures.parse_boxes(rows[i]["answer"], 1, 1)]
            if kind and boxed:
                overlaps = [pictures.box_iou(seen[i], rows[i]["answer"]) for i in boxed]
                result[f"box IoU{label}"] = sum(overlaps) / len(overlaps)
        return result

    def answers(self, model, rows, blank=False, batch_size=64):
        """The model's greedy answers to rows of the data set, a list of texts. blank: show it grey images instead."""
        longest = max(len(with_eos(self.tokenizer, row["answer"])) for row in rows)
        pick, found = functools.partial(pick_tokens, temperature=0), []
        for start in watched(range(0, len(rows), batch_size), "answering"):
            batch = rows[start:start + batch_size]
            images = read_images(self.dataset.images, [row["image"] for row in batch], self.world.device)
            prompts = [encode_prompt(self.tokenizer, row["prompt"]) for row in batch]
            texts = [Transcript(self.tokenizer) for _ in batch]
            with torch.inference_mode():
                image = model.encode(torch.zeros_like(images) if blank else images)
            for _ in transcribe(self.steps(model, image, prompts, longest, pick), texts):  # it fills the texts
                pass
            found += [str(text).strip() for text in texts]
        return found

    def steps(self, model, image, prompts, count, pick):
        """The tokens (B,) that `generate` yields, at most `count` times. Raises UserError for too long a prompt.

        image: (B, N, C), from model.encode. prompts: B arrays of ids, of any lengths. pick: see `generate`.
        """
        tokens, padding = (x.to(image.device) for x in pad_left(prompts))
        N, T, most = image.size(1), tokens.size(1), model.config.block_size
        if N + T >= most:
            raise UserError(f"{N} image tokens and a prompt of {T} leave no room for an answer in the model's {most}"
                            " positions: shorten the prompt")
        return generate(model, tokens, min(count, most - N - T), pick, self.tokenizer.eos, image=image,
                        padding=padding if padding.any() else None)

    def sample(self, model, requests, sampling):
        """Yields (index of a request, next piece of its answer). All requests are one batch. If there are several,
        the first piece of each is its image's path with a colon, such as "photo.jpg: ".

        sampling.draw and sampling.attention, if set, name files to write after the answer to a single request. draw:
        the image with the answer's boxes, if it has any. attention: heat maps of where on the image each token of the
        answer looks. Each of the two that is set then yields (0, newline) and (0, text that says what was written).
        Raises UserError if a request has no image, or if its image or prompt can't be used.
        """
        device, paths = next(model.parameters()).device, list(dict.fromkeys(r.get("image") for r in requests))
        found = [image_of({"image": path}) for path in paths]
        images = torch.stack([pictures.pixels(picture, model.config.vision.image_size) for picture in found]).to(device)
        prompts = [encode_prompt(self.tokenizer, r["text"].rstrip("\r\n")) for r in requests]  # files end in newlines
        with torch.inference_mode():
            image = model.encode(images)[[paths.index(r["image"]) for r in requests]]  # (B, N, C)
        texts = [Transcript(self.tokenizer, sampling.stop) for _ in requests]
        steps = self.steps(model, image, prompts, sampling.max_new_tokens, picker(sampling, device))
        if len(requests) > 1:
            yield from ((row, f"{request['image']}: ") for row, request in enumerate(requests))
        yield from transcribe(steps, texts)
        if sampling.draw:
            yield 0, "\n"  # before draw_boxes, whose error then has a line of its own
            yield 0, draw_boxes(found[0], str(texts[0]), sampling.draw)
        if sampling.attention:
            ids = texts[0].ids or [self.tokenizer.eos]  # an empty answer shows its eos
            weights = image_attention(model, images, prompts[0], ids)
            tokens = [self.tokenizer.decode([i]) for i in ids]
            names = [f"{token.strip() or repr(token)}  {row.sum():.0%}" for token, row in zip(tokens, weights)]
            yield 0, "\n"
            yield 0, save_picture(pictures.draw_attention(found[0], weights, requests[0]["text"], names),
                                  sampling.attention)

    def inside(self, model, request, sampling):
        """The record of an image, a prompt and the answer. Its attention "image" is that of each token to the patches.

        The model reads a prompt in both directions, so only what comes after it was predicted.
        """
        picture, prompt = image_of(request), encode_prompt(self.tokenizer, request["text"].rstrip("\r\n"))
        device, N = next(model.parameters()).device, model.config.vision.n_patches
        image = pictures.pixels(picture, model.config.vision.image_size)[None].to(device)
        with torch.inference_mode():
            image = model.encode(image)  # (1, N, C)
        steps = self.steps(model, image, [prompt], sampling.max_new_tokens, picker(sampling, device))
        ids = [*prompt.tolist(), *record.written_ids(self.tokenizer, steps, sampling.stop)]
        with record.notes_of(record.trunk_of(model), len(ids), before=N) as notes:
            prefix = torch.tensor([len(prompt)], device=device)
            model.hidden(torch.tensor([ids], device=device), image=image, prefix=prefix)
        tokens, written, parts = record.next_tokens(self, notes, model.logits, ids, len(prompt), first=len(prompt))
        side, own = math.isqrt(N), torch.stack(notes.own)
        return record.make("image-text", self, model, tokens, written, **parts, image=pictures.data_url(picture, SHOWN),
                           embedding=record.embedding(model.decoder.wte, ids, record.namer(self.tokenizer)),
                           attention=[record.packed("image", own[..., :N], tokens, grid=[side, side]),
                                      record.packed("self", own[..., N:], tokens, tokens)])

    def show(self, model, short=False):
        """Ten prompts of the validation split with the model's answers, as text. short: three of them."""
        rows, count = self.dataset.rows["val"], 3 if short else 10
        rows = [rows[i] for i in range(0, len(rows), max(1, len(rows) // count))][:count]
        return "\n".join(f"{row['prompt']} {answer}" + f"  (right: {row['answer']})" * (answer != row["answer"].strip())
                         for row, answer in zip(rows, self.answers(model, rows)))

    def command(self, out_dir):
        prompt = self.dataset.rows["val"][0]["prompt"]
        return super().command(out_dir, "--image=FILE", f"--prompt={prompt}", "--temperature=0")

    def cost(self, model):
        """(tokens, FLOPs) of an update with all parameters trained; frozen ones are not deducted."""
        data, vision, decoder = self.data["train"], model.vision, model.decoder
        n = self.n_patches + data.lengths.mean()  # tokens of a row without padding
        unscored = self.n_patches + data.prefix.mean()  # no logits are computed for the image and the prompt
        per_row = n * flops_per_token(decoder, n) - 6 * unscored * decoder.wte.weight.numel()
        per_row += self.n_patches * flops_per_token(vision, self.n_patches)
        return round(self.settings.batch_size * n), self.settings.batch_size * per_row


def encode_prompt(tokenizer, prompt):
    """The ids of "<bos>", the prompt and a newline. Raises UserError for a prompt with control tokens of its own.

    The newline is tokenized together with the prompt, as in the published code; the paper tokenizes it separately. In
    Gemma's vocabulary only runs of newlines contain one, so the ids differ only for prompts that end in a newline.
    """
    check_controls(prompt)
    return tokenizer.encode_controls(f"<bos>{prompt}\n")


def with_eos(tokenizer, text):
    """The ids of the text and eos. Raises UserError for a text with control tokens, or a tokenizer without eos."""
    if tokenizer.eos is None:
        raise UserError(f"a {tokenizer.kind} tokenizer has no token to end an answer with: prepare the images again")
    check_controls(text)
    return np.append(tokenizer.encode_controls(text), tokenizer.eos)


def check_controls(text):
    """Raises UserError for a text with a control token, such as <eos>: the model would take it for the real one."""
    if found := [name for name in CONTROLS if name in text]:
        raise UserError(f"{text!r}: leave out {found[0]}: control tokens are added where they belong")


def pad_left(prompts):
    """(tokens (B, T), padding (B,)) of B arrays of ids. padding: how many zeros come before a row's ids."""
    T = max(map(len, prompts))
    padding = torch.tensor([T - len(ids) for ids in prompts])
    tokens = torch.zeros(len(prompts), T, dtype=torch.long)
    for row, ids in zip(tokens, prompts):
        row[T - len(ids):] = torch.as_tensor(ids)
    return tokens, padding


def exact_share(answers, rows, chosen):
    """The share of exactly right answers among the rows with the indices `chosen`. answers: a text for each row."""
    return sum(answers[i] == rows[i]["answer"].strip() for i in chosen) / len(chosen)


def draw_boxes(picture, answer, path):
    """If the answer has boxes, writes the picture with them to `path`. Returns text: the boxes in pixels, or a note."""
    boxes = pictures.parse_boxes(answer, *picture.size)
    if not boxes:
        return f"there is no box in the answer, so {path} was not written"
    lines = [f"{box.label}: left {box.left:.0f}, top {box.top:.0f}, right {box.right:.0f}, bottom {box.bottom:.0f}"
             for box in boxes]
    return "\n".join([*lines, save_picture(pictures.draw_boxes(picture, boxes), path)])
