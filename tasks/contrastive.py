"""The contrastive task: a SigLIP learns which caption belongs to which image.

    python train.py config/siglip_shapes.py
    python sample.py --out_dir=out/siglip_shapes --image=photo.jpg --prompt="a red star|a blue circle"

Axes: B batch, n rows of a split, T tokens of a caption, C channels.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from batches import fixed_rows, read_images, to_device
from configurator import UserError
from machine.device import autocast
from machine.terminal import watched
from run import pictures
from run.cost import flops_per_token
from tasks.image_text import WithImages, pad_left, with_eos
from vit import init_parts
from vlm import SigLIP, SigLIPConfig, TextEncoderConfig

EVAL_ROWS = 64  # rows per batch of an evaluation; the loss depends on it: among more captions, finding one is harder


class Captions(NamedTuple):
    """Captions as token ids, each padded on the left to the length of the longest, so that every row ends in eos."""
    images: np.ndarray  # (n,) index of the row's image
    ids: np.ndarray  # (n, T): padding, caption, eos
    padding: np.ndarray  # (n,) how many of the T tokens are padding


class ContrastiveTask(WithImages):
    whole = True
    models = {"siglip": (SigLIP, SigLIPConfig)}
    TEXT_SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
    rows_label = "the captioned training images"

    def encode(self, rows):
        """The `Captions` of a split: the first one of each image, so that no image occurs twice in a batch."""
        chosen = {row["image"]: row["answer"] for row in reversed(rows) if row["kind"] == "caption"}
        if not chosen:
            raise UserError(f"{self.dataset.folder} has no rows of kind \"caption\", which contrastive training needs:"
                            " add some to its source, and prepare it again")
        images = np.array(sorted(chosen))
        ids, padding = pad_left([with_eos(self.tokenizer, chosen[image]) for image in images])
        return Captions(images, ids.numpy(), padding.numpy())

    def build(self, generator):
        s = self.settings
        shape = {name: getattr(s, name) for name in self.TEXT_SHAPE}
        text = TextEncoderConfig(**shape, vocab_size=self.tokenizer.vocab_size)
        model = SigLIP(SigLIPConfig(self.vision_config(), text, s.pair_loss, s.dropout))
        init_parts(model, generator)
        return model

    def fit(self, model):
        super().fit(model)
        longest, most = max(data.ids.shape[1] for data in self.data.values()), model.config.text.block_size
        if longest > most:
            raise UserError(f"block_size = {most}: the longest caption of {self.dataset.folder} needs {longest}")

    def shape(self, model):
        return {**super().shape(model), "pair_loss": model.config.loss}

    def batch(self, rows, generator):
        return self.gather(self.data["train"], rows), torch.ones(len(rows), device=self.world.device)

    def gather(self, data, rows):
        """The model's arguments for rows of some `Captions`: images (B, 3, H, W), tokens (B, T), padding (B,)."""
        device = self.world.device
        return {"images": read_images(self.dataset.images, data.images[rows], device),
                "tokens": to_device(data.ids[rows], device), "padding": to_device(data.padding[rows], device)}

    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats of a pair in batches of EVAL_ROWS}. Every rank scores the whole split."""
        return {"loss": self.score(model, split, dtype, limit)[0]}

    @torch.no_grad()
    def score(self, model, split, dtype, limit=0):
        """(mean nats, cosine of each image and each caption (n, n), ids of the captions (n, T)), for n rows."""
        data, device = self.data[split], self.world.device
        losses, images, texts = [], [], []
        most_rows = max(1, limit // (self.n_patches + data.ids.shape[1])) if limit else 0
        batches = fixed_rows(len(data.images), EVAL_ROWS, most_rows)
        for rows in watched(batches, "evaluating"):
            batch = self.gather(data, rows)
            with autocast(device, dtype):
                losses.append(model(**batch, across_ranks=False).sum().item())
                images.append(F.normalize(model.encode_images(batch["images"]).float(), dim=-1))
                texts.append(F.normalize(model.text(batch["tokens"], batch["padding"]).float(), dim=-1))
        scored = np.concatenate(batches)
        cosines = (torch.cat(images) @ torch.cat(texts).T).cpu()
        return sum(losses) / len(scored), cosines, data.ids[scored]

    def details(self, model, split, world, dtype, settings, found):
        """{name: share}: retrieval and zero-shot accuracy, and the number of zero-shot classes. Does not read `found`.

        Rows with equal captions are one class, and any row of the class is right.
        Retrieval: the share of images whose nearest caption is right, and of captions whose nearest image is right.
        Zero-shot: as image to text, with only the images and captions of classes of two or more images.
        """
        _, cosines, ids = self.score(model, split, dtype)
        _, labels, counts = np.unique(ids, axis=0, return_inverse=True, return_counts=True)
        labels = torch.from_numpy(labels.reshape(-1))  # (n,) the class of each row
        shared = torch.from_numpy(counts > 1)[labels]
        result = {"retrieval image to text": (labels[cosines.argmax(1)] == labels).float().mean().item(),
                  "retrieval text to image": (labels[cosines.argmax(0)] == labels).float().mean().item()}
        if shared.any():
            nearest = cosines[shared].masked_fill(~shared, -2).argmax(1)  # -2: less than any cosine
            result |= {"zero-shot": (labels[nearest] == labels[shared]).float().mean().item(),
                       "zero-shot classes": int((counts > 1).sum())}
        return result

    @torch.inference_mode()
    def sample(self, model, requests, sampling):
        """Yields (index of a request, text): the captions in its prompt (a|b|c) with probabilities, likeliest first."""
        device = next(model.parameters()).device
        for row, request in enumerate(requests):
            captions = [caption.strip() for caption in request["text"].split("|") if caption.strip()]
            if not request.get("image") or not captions:
                raise UserError("this model compares an image with captions: add --image=FILE and"
                                " --prompt=\"a red star|a blue circle\"")
            tokens, padding = pad_left([with_eos(self.tokenizer, caption) for caption in captions])
            if tokens.size(1) > model.config.text.block_size:
                raise UserError(f"prompt = {request['text']!r}: one caption has {tokens.size(1)} tokens, and the model"
                                f" takes at most {model.config.text.block_size}; shorten it")
            picture = pictures.pixels(pictures.read_image(request["image"]), model.config.vision.image_size)
            image = F.normalize(model.encode_images(picture[None].to(device)), dim=-1)  # (1, C)
            texts = F.normalize(model.text(tokens.to(device), padding.to(device)), dim=-1)  # (captions, C)
            shares = (image @ texts.T * model.log_scale.exp()).float().softmax(-1)[0].tolist()
            ranked = sorted(zip(shares, captions), reverse=True)
            yield row, f"{request['image']}\n" + "\n".join(f"{share:8.1%}  {text}" for share, text in ranked)

    def show(self, model, short=False):
        if short:  # the line of the log has the loss
            return ""
        found = self.evaluate(model, "val", self.world, torch.float32)
        found |= self.details(model, "val", self.world, torch.float32, None, found)
        return "\n".join(f"{name:28} {value:.4f}" for name, value in found.items())

    def command(self, out_dir):
        captions = dict.fromkeys(row["answer"] for row in self.dataset.rows["val"] if row["kind"] == "caption")
        prompt = "|".join(list(captions)[:2])
        return super().command(out_dir, "--image=FILE", f"--prompt={prompt}")

    def cost(self, model):
        text, n_tokens = model.text, self.data["train"].ids.shape[1]
        per_caption = n_tokens * (flops_per_token(text, n_tokens) - 6 * text.wte.weight.numel())  # wte is a lookup
        per_image = self.n_patches * flops_per_token(model.vision, self.n_patches)
        batch = self.settings.batch_size
        return batch * (self.n_patches + n_tokens), batch * (per_image + per_caption)
