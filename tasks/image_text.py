"""The image-text task: answers to prompts about images, by a PaliGemma, new or published.

    python train.py config/vlm_shapes.py
    python sample.py --out_dir=out/vlm_shapes --image=photo.jpg --prompt=caption --temperature=0

Axes: B batch, T tokens of a row, A tokens of the longest answer, N image tokens.
"""

import dataclasses
import functools
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from batches import ImageTextDataset, fixed_rows, read_images, shuffled_rows, to_device
from configurator import UserError
from generate import generate, pick_tokens, picker
from lora import merge_lora
from machine.device import autocast
from machine.terminal import watched
from published import paligemma
from run import checkpoint, pictures
from run.cost import count_parameters, flops_per_token
from sources.images import CONTROLS
from tasks.task import Task, load
from tokenizer import Transcript, transcribe
from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig, ViTConfig, image_attention, init_parts

TOWER = ("n_layer", "n_head", "n_embd", "patch_size")  # settings of the vision tower's shape


class WithImages(Task):
    """What the tasks with images share: a data set of images with text, and a vision tower.

    encode(rows) makes arrays of a split's rows, with `images`, the number of each row's image, and `ids`, (n, T). TEXT
    names the settings that shape what reads the text.
    """

    def open(self, folder, world):
        self.dataset, self.world = ImageTextDataset(folder), world
        self.open_tokenizer(folder)
        self.data = {split: self.encode(self.dataset.rows[split]) for split in ("train", "val")}

    def vision_config(self):
        patch, size = self.settings.vision.patch_size, self.dataset.image_size
        if size % patch:
            fitting = ", ".join(str(n) for n in range(2, size + 1) if size % n == 0)
            raise UserError(f"vision.patch_size = {patch}: does not divide the images' {size} pixels; {fitting} do")
        return ViTConfig(**dataclasses.asdict(self.settings.vision), image_size=size)

    def fit(self, model):
        self.n_patches, size = model.config.vision.n_patches, model.config.vision.image_size
        if size != self.dataset.image_size:
            raise UserError(f"the images of {self.dataset.folder} have {self.dataset.image_size} pixels, and the model"
                            f" sees {size}: prepare them for it, python prepare.py FOLDER --image_size={size}"
                            " --name=NEW")

    def shape(self, model):
        text = {name: getattr(model.config.text, name) for name in self.TEXT}
        return text | {f"vision.{name}": getattr(model.config.vision, name) for name in TOWER}

    def pick(self, step):
        return shuffled_rows(len(self.data["train"].images), self.settings.batch_size, self.settings.seed, step)

    def summary(self, model):
        n, s = len(self.data["train"].images), self.settings
        return (f"model: {count_parameters(model) / 1e6:.2f}M parameters, {self.n_patches} image tokens; data:"
                f" {n:,} rows of {s.dataset}; {s.max_iters} updates = {s.batch_size * s.max_iters / n:.1f} epochs")


class Rows(NamedTuple):
    """Questions and answers as token ids, each row padded on the right to the longest."""
    images: np.ndarray  # (n,) index of the row's image
    ids: np.ndarray  # (n, T + 1): prompt, answer, eos, padding
    prefix: np.ndarray  # (n,) tokens of the prompt
    lengths: np.ndarray  # (n,) tokens of prompt, answer and eos


class ImageTextTask(WithImages):
    models = {"paligemma": (PaliGemma, PaliGemmaConfig)}
    TEXT = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "bias")
    rows_are = "the rows of the training split"

    def encode(self, rows):
        """The `Rows` of a split, or of some of its rows."""
        prompts = {prompt: encode_prompt(self.tokenizer, prompt) for prompt in {row["prompt"] for row in rows}}
        answers = {answer: with_eos(self.tokenizer, answer) for answer in {row["answer"] for row in rows}}
        prefix = np.array([len(prompts[row["prompt"]]) for row in rows])
        lengths = prefix + np.array([len(answers[row["answer"]]) for row in rows])
        ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, :prefix[i]] = prompts[row["prompt"]]
            ids[i, prefix[i]:lengths[i]] = answers[row["answer"]]
        return Rows(np.array([row["image"] for row in rows]), ids, prefix, lengths)

    def build(self, generator):
        s = self.settings
        text = GemmaConfig(**{name: getattr(s, name) for name in self.TEXT}, vocab_size=self.tokenizer.vocab_size)
        model = PaliGemma(PaliGemmaConfig(self.vision_config(), text, s.dropout))
        init_parts(model, generator)
        if s.init_vision:
            self.copy_part("init_vision", "vision", model.vision)
        if s.init_decoder:
            task, decoder = self.copy_part("init_decoder", "transformer", model.decoder.transformer)
            self.copy_embeddings(decoder.wte.weight, task.tokenizer, model.decoder.wte.weight)
        return model

    def copy_part(self, setting, name, ours):
        """Fills our part of the model with the part `name` of that run's which the setting names; returns its task and
        model. Raises UserError unless both have the same parameters."""
        run = getattr(self.settings, setting)
        if not checkpoint.is_run(run):
            raise UserError(f"{setting} = {run}: is not the folder of a run that has saved")
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
    def copy_embeddings(self, theirs, its_tokenizer, ours):
        """Tokens that stand for the same text in both vocabularies start with the same vector."""
        known = {its_tokenizer.decode([i]): i for i in range(its_tokenizer.vocab_size)}
        for i in range(self.tokenizer.vocab_size):
            if (j := known.get(self.tokenizer.decode([i]))) is not None:
                ours[i] = theirs[j]

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
        """The arguments {images, tokens (B, T), targets (B, A), places (B, A), prefix (B,)} of these rows, and the
        targets' weights (B, A): 1 where a token of an answer or its eos is, 0 where the answer is shorter.

        T and A fit the longest of these rows; on a GPU, where one shape is faster than many, the longest of all.
        """
        device, prefix = self.world.device, data.prefix[rows]
        among = slice(None) if device.type == "cuda" else rows
        T, A = data.lengths[among].max() - 1, (data.lengths - data.prefix)[among].max()
        places = prefix[:, None] - 1 + np.arange(A)  # (B, A): what comes at the next place is predicted here
        weights = places < data.lengths[rows, None] - 1
        places = np.minimum(places, T - 1)
        targets = np.take_along_axis(data.ids[rows], places + 1, axis=1)
        arguments = {"images": read_images(self.dataset.images, data.images[rows], device)}
        for name, array in (("tokens", data.ids[rows, :T]), ("targets", targets), ("places", places),
                            ("prefix", prefix)):
            arguments[name] = to_device(array, device)
        return arguments, to_device(weights, device).float()

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """The mean nats of the tokens of all answers."""
        data, total, count = self.data[split], 0.0, 0
        most = max(1, limit // data.ids.shape[1]) if limit else 0  # rows
        for rows, counts in world.share(fixed_rows(len(data.images), self.settings.batch_size, most)):
            arguments, weights = self.gather(data, rows)
            with autocast(world.device, dtype):
                total += (model(**arguments) * weights).sum().item() * counts
            count += int(weights.sum()) * counts
        total, count = world.sum(total, count)
        return {"loss": total / count}

    def details(self, model, split, world, dtype, settings, found):
        """Exact matches for each kind of question, with the image and without it; overlap of boxes."""
        rows = self.dataset.rows[split]
        with autocast(world.device, dtype):
            seen, blind = (self.answers(model, rows, blank) for blank in (False, True))
        result = {"rows": len(rows)}
        for kind in (*sorted({row["kind"] for row in rows}), ""):
            chosen = [i for i, row in enumerate(rows) if kind in ("", row["kind"])]
            label = f" {kind}" if kind else ""
            result[f"exact{label}"] = exact(seen, rows, chosen)
            result[f"exact{label} (image blanked)"] = exact(blind, rows, chosen)
            boxed = [i for i in chosen if pictures.parse_boxes(rows[i]["answer"], 1, 1)] if kind else []
            if boxed:
                overlaps = [pictures.box_iou(seen[i], rows[i]["answer"]) for i in boxed]
                result[f"box IoU{label}"] = sum(overlaps) / len(overlaps)
        return result

    def answers(self, model, rows, blank=False, batch_size=64):
        """The model's greedy answers to rows of the data set, as texts. blank: grey instead of every image."""
        longest = max(len(with_eos(self.tokenizer, row["answer"])) for row in rows)
        pick, found = functools.partial(pick_tokens, temperature=0), []
        for start in watched(range(0, len(rows), batch_size), "answering"):
            batch = rows[start:start + batch_size]
            images = read_images(self.dataset.images, [row["image"] for row in batch], self.world.device)
            prompts = [encode_prompt(self.tokenizer, row["prompt"]) for row in batch]
            texts = [Transcript(self.tokenizer) for _ in batch]
            with torch.inference_mode():
                image = model.encode(images * (not blank))
            for _ in transcribe(self.steps(model, image, prompts, longest, pick), texts):
                pass
            found += [str(text).strip() for text in texts]
        return found

    def steps(self, model, image, prompts, count, pick):
        """The steps of `generate` after each prompt, at most `count`. image: (B, N, C); prompts: B lists of ids."""
        tokens, padding = (x.to(image.device) for x in pad_left(prompts))
        N, T, most = image.size(1), tokens.size(1), model.config.block_size
        if N + T >= most:
            raise UserError(f"{N} image tokens and a prompt of {T} leave no room for an answer in the model's {most}"
                            " positions: shorten the prompt")
        return generate(model, tokens, min(count, most - N - T), pick, self.tokenizer.eos, image=image,
                        padding=padding if padding.any() else None)

    def sample(self, model, requests, sampling):
        """Each answer; with `draw` or `attention`, pictures of it. The requests are one batch, and each picture is read
        once."""
        if not all(request.get("image") for request in requests):
            raise UserError("the model is asked about an image: add --image=FILE")
        device, paths = next(model.parameters()).device, list(dict.fromkeys(r["image"] for r in requests))
        found = [pictures.read_image(path) for path in paths]
        images = torch.stack([pictures.pixels(picture, model.config.vision.image_size) for picture in found]).to(device)
        prompts = [encode_prompt(self.tokenizer, r["text"].rstrip("\r\n")) for r in requests]  # which end in a newline
        with torch.inference_mode():
            image = model.encode(images)[[paths.index(r["image"]) for r in requests]]  # (B, N, C)
        texts = [Transcript(self.tokenizer, sampling.stop) for _ in requests]
        steps = self.steps(model, image, prompts, sampling.max_new_tokens, picker(sampling, device))
        if len(requests) > 1:
            yield from ((row, f"{request['image']}: ") for row, request in enumerate(requests))
        yield from transcribe(steps, texts)
        if sampling.draw:
            yield 0, "\n"  # apart, for an error that may come
            yield 0, draw_boxes(found[0], str(texts[0]), sampling.draw)
        if sampling.attention:
            ids = texts[0].ids or [self.tokenizer.eos]  # an empty answer has its end
            weights = image_attention(model, images, prompts[0], ids)
            names = [self.tokenizer.decode([i]) for i in ids]
            yield 0, "\n"
            yield 0, save_picture(pictures.draw_attention(found[0], weights, requests[0]["text"], names),
                                  sampling.attention)

    def show(self, model, short=False):
        """Answers to ten questions of the validation split. short: to three."""
        rows, count = self.dataset.rows["val"], 3 if short else 10
        rows = [rows[i] for i in range(0, len(rows), max(1, len(rows) // count))][:count]
        return "\n".join(f"{row['prompt']} {answer}" + f"  (right: {row['answer']})" * (answer != row["answer"].strip())
                         for row, answer in zip(rows, self.answers(model, rows)))

    def command(self, out_dir):
        prompt = self.dataset.rows["val"][0]["prompt"]
        return f"{super().command(out_dir)} --image=FILE {shlex.quote(f'--prompt={prompt}')} --temperature=0"

    def finish(self):
        """Writes the run's best model in the published layout, for transformers to load, if the settings say where."""
        if folder := self.settings.publish:
            task, model, _ = load(self.settings.out_dir)
            merge_lora(model)
            paligemma.save(model, task.tokenizer, folder)
            print(f"published in {folder}")

    def cost(self, model):
        """Of full training: what freezing saves is not deducted. Logits are computed of the answers alone."""
        data, vision, decoder = self.data["train"], model.vision, model.decoder
        n = self.n_patches + data.lengths.mean()  # tokens of a row that stand for something
        unscored = self.n_patches + data.prefix.mean()
        per_row = n * flops_per_token(decoder, n) - 6 * unscored * decoder.wte.weight.numel()
        per_row += self.n_patches * flops_per_token(vision, self.n_patches)
        return round(self.settings.batch_size * n), self.settings.batch_size * per_row


# ----------------------------------------------------------------------------------------------------------------------

def encode_prompt(tokenizer, prompt):
    """The ids of "<bos>", the prompt and a newline.

    The newline is tokenized together with the prompt, as published code does it, where the paper wants it apart. In
    Gemma's vocabulary no word contains a newline, but a run of them is one token: the ids differ only for a prompt
    that itself ends in a newline. Raises UserError for a prompt that has control tokens of its own.
    """
    check_controls(prompt)
    return tokenizer.encode_controls(f"<bos>{prompt}\n")


def with_eos(tokenizer, text):
    if tokenizer.eos is None:
        raise UserError(f"a tokenizer of kind {tokenizer.kind} has no token that ends an answer, which images need")
    check_controls(text)
    return np.append(tokenizer.encode_controls(text), tokenizer.eos)


def check_controls(text):
    """Raises UserError for tokens that are put around the texts of an image: text with them would be read otherwise."""
    if found := [name for name in CONTROLS if name in text]:
        raise UserError(f"{text!r}: leave out {found[0]}: what stands around a text, and the image, come by themselves")


def pad_left(prompts):
    """Prompts of different lengths as one batch: tokens (B, T), and how many of each row are padding (B,)."""
    T = max(map(len, prompts))
    padding = torch.tensor([T - len(ids) for ids in prompts])
    tokens = torch.zeros(len(prompts), T, dtype=torch.long)
    for row, ids in zip(tokens, prompts):
        row[T - len(ids):] = torch.as_tensor(ids)
    return tokens, padding


def exact(answers, rows, chosen):
    """The share of the chosen rows whose answer is right."""
    return sum(answers[i] == rows[i]["answer"].strip() for i in chosen) / len(chosen)


def draw_boxes(picture, answer, path):
    """Draws the answer's boxes on the picture into the file `path`; returns them in words."""
    boxes = pictures.parse_boxes(answer, *picture.size)
    if not boxes:
        return f"there is no box in the answer, so {path} was not written"
    lines = [f"{box.label}: left {box.left:.0f}, top {box.top:.0f}, right {box.right:.0f}, bottom {box.bottom:.0f}"
             for box in boxes]
    return "\n".join([*lines, save_picture(pictures.draw_boxes(picture, boxes), path)])


def save_picture(picture, path):
    """Returns what there is to say of it."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError, OverflowError) as error:  # of the disk; without a number: of the format
        size = "" if getattr(error, "errno", None) else f"; a .png holds its {picture.width} x {picture.height} pixels"
        raise UserError(f"{path} can't be written: {checkpoint.reason(error)}{size}") from None
    return f"wrote {path}"
