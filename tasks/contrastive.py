"""The contrastive task: images and captions, each told from all others, by a SigLIP.

    python train.py config/siglip_shapes.py
    python sample.py --out_dir=out/siglip_shapes --image=photo.jpg --prompt="a red star|a blue circle"

Axes: B batch, T tokens of a caption.
"""

import shlex
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
from vlm import SigLIP, SigLIPConfig, TextEncoderConfig, init_parts


class Captions(NamedTuple):
    """Texts alone as token ids, each padded on the left to the longest, so that eos is the last of every row."""
    images: np.ndarray  # (n,) index of the row's image
    ids: np.ndarray  # (n, T): padding, caption, eos
    padding: np.ndarray  # (n,) tokens of padding


class ContrastiveTask(WithImages):
    whole = True
    models = {"siglip": (SigLIP, SigLIPConfig)}
    TEXT = ("n_layer", "n_head", "n_embd", "block_size")
    rows_are = "the captions of the training split, counted by image,"

    def encode(self, rows):
        """The `Captions` of the rows of kind "caption": the first of each image, so that all images are distinct."""
        chosen = {row["image"]: row["answer"] for row in reversed(rows) if row["kind"] == "caption"}
        if not chosen:
            raise UserError("the data set has no rows of kind \"caption\", which contrastive training reads: prepare"
                            " some")
        images = np.array(sorted(chosen))
        ids, padding = pad_left([with_eos(self.tokenizer, chosen[image]) for image in images])
        return Captions(images, ids.numpy(), padding.numpy())

    def build(self, generator):
        s = self.settings
        text = TextEncoderConfig(**{name: getattr(s, name) for name in self.TEXT}, vocab_size=self.tokenizer.vocab_size)
        model = SigLIP(SigLIPConfig(self.vision_config(), text, s.pair_loss, s.dropout))
        init_parts(model, generator)
        return model

    def fit(self, model):
        super().fit(model)
        longest, most = max(data.ids.shape[1] for data in self.data.values()), model.config.text.block_size
        if longest > most:
            raise UserError(f"block_size = {most}: the longest caption of {self.dataset.folder} has {longest} tokens")
        highest = max(data.ids.max() for data in self.data.values())
        if highest >= model.config.text.vocab_size:
            raise UserError(f"{self.dataset.folder} has the token {highest}, and the model only"
                            f" {model.config.text.vocab_size}: prepare it with the model's tokenizer")

    def shape(self, model):
        return {**super().shape(model), "pair_loss": model.config.loss}

    def batch(self, rows, generator):
        return self.gather(self.data["train"], rows), torch.ones(len(rows), device=self.world.device)

    def gather(self, data, rows):
        """{images, tokens (B, T), padding (B,)} of these captions."""
        device = self.world.device
        return {"images": read_images(self.dataset.images, data.images[rows], device),
                "tokens": to_device(data.ids[rows], device), "padding": to_device(data.padding[rows], device)}

    def evaluate(self, model, split, world, dtype, limit=0):
        """The loss in batches of batch_size; every rank scores all of them."""
        return {"loss": self.score(model, split, dtype, limit)[0]}

    @torch.no_grad()
    def score(self, model, split, dtype, limit=0):
        """(the loss, each image's agreement with each text, (n, n), the captions of both)."""
        data, device, losses, images, texts = self.data[split], self.world.device, [], [], []
        most = max(1, limit // (self.n_patches + data.ids.shape[1])) if limit else 0  # rows
        batches = fixed_rows(len(data.images), self.settings.batch_size, most)
        for rows in watched(batches, "evaluating"):
            batch = self.gather(data, rows)
            with autocast(device, dtype):
                losses.append(model(**batch, across_ranks=False).sum().item())
                images.append(F.normalize(model.encode_images(batch["images"]).float(), dim=-1))
                texts.append(F.normalize(model.text(batch["tokens"], batch["padding"]).float(), dim=-1))
        scored = np.concatenate(batches)
        agreement = (torch.cat(images) @ torch.cat(texts).T).cpu()
        return sum(losses) / len(scored), agreement, data.ids[scored]

    def details(self, model, split, world, dtype, settings, found):
        """retrieval: the share of images (texts) whose best of all texts (images) is their own, or says the same.

        zero-shot: the same among the captions that several images share, taken as the names of classes.
        """
        _, scores, ids = self.score(model, split, dtype)
        _, same, counts = np.unique(ids, axis=0, return_inverse=True, return_counts=True)
        same = torch.from_numpy(same.reshape(-1))
        shared = torch.from_numpy(counts > 1)[same]
        result = {"retrieval image to text": (same[scores.argmax(1)] == same).float().mean().item(),
                  "retrieval text to image": (same[scores.argmax(0)] == same).float().mean().item()}
        if shared.any():
            picked = same[scores[shared].masked_fill(~shared, -2).argmax(1)]
            result |= {"zero-shot": (picked == same[shared]).float().mean().item(),
                       "zero-shot classes": int((counts > 1).sum())}
        return result

    @torch.inference_mode()
    def sample(self, model, requests, sampling):
        """For each image the captions of the prompt, separated by |, with the probability of each among them."""
        device = next(model.parameters()).device
        for row, request in enumerate(requests):
            captions = [caption.strip() for caption in request["text"].split("|") if caption.strip()]
            if not request.get("image") or not captions:
                raise UserError("the model compares an image with captions: add --image=FILE and"
                                " --prompt=\"a red star|a blue circle\"")
            tokens, padding = pad_left([with_eos(self.tokenizer, caption) for caption in captions])
            if tokens.size(1) > model.config.text.block_size:
                raise UserError(f"prompt = {request['text']!r}: a caption may have {model.config.text.block_size}"
                                " tokens; shorten it")
            picture = pictures.pixels(pictures.read_image(request["image"]), model.config.vision.image_size)
            image = F.normalize(model.encode_images(picture[None].to(device)), dim=-1)  # (1, C)
            texts = F.normalize(model.text(tokens.to(device), padding.to(device)), dim=-1)  # (captions, C)
            shares = (image @ texts.T * model.log_scale.exp()).float().softmax(-1)[0].tolist()
            ranked = sorted(zip(shares, captions), reverse=True)
            yield row, f"{request['image']}\n" + "\n".join(f"{share:8.1%}  {text}" for share, text in ranked)

    def show(self, model, short=False):
        """The measures; "" for short, as an evaluation has its own."""
        if short:
            return ""
        found = self.evaluate(model, "val", self.world, torch.float32)
        found |= self.details(model, "val", self.world, torch.float32, None, found)
        return "\n".join(f"{name:28} {value:.4f}" for name, value in found.items())

    def command(self, out_dir):
        captions = [row["answer"] for row in self.dataset.rows["val"] if row["kind"] == "caption"]
        prompt = "|".join(list(dict.fromkeys(captions))[:2])
        return f"{super().command(out_dir)} --image=FILE {shlex.quote(f'--prompt={prompt}')}"

    def cost(self, model):
        text, n_tokens = model.text, self.data["train"].ids.shape[1]
        per_caption = n_tokens * (flops_per_token(text, n_tokens) - 6 * text.wte.weight.numel())
        per_image = self.n_patches * flops_per_token(model.vision, self.n_patches)
        batch = self.settings.batch_size
        return batch * (self.n_patches + n_tokens), batch * (per_image + per_caption)
