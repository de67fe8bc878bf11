"""The vision transformer (Dosovitskiy et al. 2021), built from model.py's blocks, and two models that it is part of.

    python train.py config/fashion_mnist.py              a classifier of images, also on a laptop's CPU
    python train.py config/fashion_mnist_masked.py       a model that draws hidden patches, and needs no classes

vlm.py joins it to models of text.

Axes: B batch, N image patches, A hidden ones, P pixel values of a patch (3 * patch_size^2), C channels (n_embd), H and
W height and width in pixels.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, check_ranges
from model import Transformer, TransformerConfig, init_weights

# ----------------------------------------------------------------------------------------------------------------------
# Configurations

@dataclass(frozen=True)
class ViTConfig(TransformerConfig):
    norm_eps: float = 1e-6
    bias: bool = True
    image_size: int = 224  # side of the square image, in pixels
    patch_size: int = 14  # side of a square patch, in pixels
    stem: bool = False  # embed the patches by a `ConvStem`, instead of one linear layer
    cls: bool = False  # a class token before the patches

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, patch_size=1, image_size=self.patch_size)
        if self.stem and (self.patch_size == 1 or self.patch_size & self.patch_size - 1):
            raise UserError(f"stem = True, patch_size = {self.patch_size}: a convolutional stem halves the image's"
                            " sides; use a patch_size of 2, 4, 8, 16 or 32")

    @property
    def n_patches(self):
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ImageClassifierConfig:
    vision: ViTConfig = ViTConfig()
    labels: tuple = ()  # the names of the classes
    dropout: float = 0.0

    def __post_init__(self):
        set_parts(self, vision=ViTConfig)
        object.__setattr__(self, "labels", tuple(self.labels))  # JSON makes a list of it
        if len(self.labels) < 2:
            raise UserError(f"labels = {list(self.labels)}: a classifier needs at least two")


@dataclass(frozen=True)
class MaskedPatchesConfig:
    vision: ViTConfig = ViTConfig()
    normalise: bool = True  # what it predicts: pixels less their patch's mean, divided by their standard deviation
    dropout: float = 0.0

    def __post_init__(self):
        set_parts(self, vision=ViTConfig)


def set_parts(config, **parts):
    """Changes a frozen config in place: its field NAME becomes an instance of CLASS, with the dropout of `config`.

    parts: NAME=CLASS. The field may be an instance already, or a dict of its fields, as in config.json.
    """
    for name, cls in parts.items():
        part = getattr(config, name)
        if isinstance(part, dict):
            part = cls(**part)
        object.__setattr__(config, name, replace(part, dropout=config.dropout))


# ----------------------------------------------------------------------------------------------------------------------
# Models

class ViT(nn.Module):
    """The vision transformer of Dosovitskiy et al. 2021, without a head; by default SigLIP's, without a class token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patches = patch_embedding(config)
        self.cls = nn.Embedding(1, config.n_embd) if config.cls else None
        self.wpe = nn.Embedding(config.n_patches + config.cls, config.n_embd)
        self.transformer = Transformer(config)

    def forward(self, images):
        """images: (B, 3, image_size, image_size) in [-1, 1]. Returns (B, N, C), the patches row by row from the top.

        With a class token (B, 1 + N, C): its vector comes first.
        """
        return self.read(self.embed(images))

    def embed(self, images):
        """The patches' vectors, (B, N, C), before positions are added. images: see `forward`."""
        return self.patches(images.to(self.wpe.weight.dtype)).flatten(2).transpose(1, 2)

    def read(self, x):
        """The trunk's output for the patches' vectors (B, N, C): see `forward`."""
        if self.cls is not None:
            x = torch.cat((self.cls.weight.expand(len(x), 1, -1), x), dim=1)
        return self.transformer(x + self.wpe.weight)


def patch_embedding(config):
    """The module that embeds the patches of images: (B, 3, H, W) -> (B, C, ., .). config: a ViTConfig."""
    if config.stem:
        return ConvStem(config)
    return nn.Conv2d(3, config.n_embd, config.patch_size, stride=config.patch_size)


class ConvStem(nn.Sequential):
    """Embeds patches by convolutions of 3 x 3 that halve the sides (Xiao et al. 2021): (B, 3, H, W) -> (B, C, ., .).

    A patch of P pixels also sees P - 1 pixels above it and on its left. The norms are of one image, not of the paper's
    whole batch, so that no row depends on another.
    """

    def __init__(self, config):
        halvings, layers, before = config.patch_size.bit_length() - 1, [], 3
        for i in range(halvings):
            width = max(1, config.n_embd >> halvings - 1 - i)  # it doubles up to C
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(1, width), nn.ReLU()]
            before = width
        super().__init__(*layers, nn.Conv2d(before, config.n_embd, 1))


class ImageClassifier(nn.Module):
    """A ViT, and a linear layer on its class token or, if it has none, on the mean over its patches."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.head = nn.Linear(config.vision.n_embd, len(config.labels))

    def forward(self, images, targets=None):
        """The logits of the classes, (B, number of labels), in float32; or, given targets (B,), the nats of each."""
        x = self.vision(images)
        logits = self.head(x[:, 0] if self.config.vision.cls else x.mean(1)).float()
        return logits if targets is None else F.cross_entropy(logits, targets, reduction="none")


class MaskedPatches(nn.Module):
    """A ViT that predicts hidden patches of an image from the visible ones, as SimMIM does (Xie et al. 2022).

    One learned vector stands in for the embedding of each hidden patch; a linear layer makes pixels of what comes out.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.mask = nn.Embedding(1, config.vision.n_embd)
        self.head = nn.Linear(config.vision.n_embd, 3 * config.vision.patch_size**2)

    def forward(self, images, places, targets=None):
        """The hidden patches in float32, (B, A, P); or, given targets of that shape, the mean squared error of each.

        images: (B, 3, H, W). places: (B, A), which patches are hidden: their pixels have no effect.
        """
        vision, N = self.vision, self.config.vision.n_patches
        hidden = torch.zeros(len(images), N, dtype=torch.bool, device=images.device).scatter(1, places, True)
        x = vision.embed(blanked(images, hidden, self.config.vision.patch_size))  # (B, N, C)
        x = vision.read(torch.where(hidden[..., None], self.mask.weight, x))[:, -N:]  # without a class token
        found = self.head(x.gather(1, places[..., None].expand(-1, -1, x.size(-1)))).float()  # (B, A, P)
        return found if targets is None else (found - targets).square().mean(-1)


def blanked(images, hidden, patch_size):
    """Images (B, 3, H, W) with grey in place of hidden patches. hidden: bool (B, N).

    The neighbours' embeddings would else show them, where a `ConvStem` makes these.
    """
    side = images.size(-1) // patch_size
    pixels = hidden.view(-1, 1, side, side).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return images.masked_fill(pixels, 0)


def patches_of(images, patch_size):
    """The patches of images (B, 3, H, W), row by row from the top: (B, N, P). `images_of` is the inverse."""
    return F.unfold(images, patch_size, stride=patch_size).mT


def images_of(patches, patch_size):
    """Square images, (B, 3, H, W), of patches (B, N, P)."""
    side = math.isqrt(patches.size(1)) * patch_size
    return F.fold(patches.mT, side, patch_size, stride=patch_size)


def mean_and_spread(patches):
    """(mean, standard deviation) of each patch's pixels, (..., 1) each, as MAE has them. patches: (..., P)."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def init_parts(model, generator=None):
    """Initialises a model with a ViT in place: each part by `init_weights`, with std 1 / sqrt(the ViT's width).

    The patches' position embeddings start as sines and cosines, so that the ViT tells them apart from the first step.
    """
    for part in model.children():
        init_weights(part, generator, std=model.config.vision.n_embd**-0.5)
    model.vision.wpe.weight[-model.config.vision.n_patches:] = sincos_2d(model.config.vision)


def sincos_2d(config):
    """Position embeddings of a ViT's patches, (N, C): sin and cos of x and y, rates 1 to 1/100 (Beyer et al. 2022)."""
    side = config.image_size // config.patch_size
    n = -(-config.n_embd // 4)  # rounded up
    rates = 100 ** -(torch.arange(n) / n)
    angles = torch.arange(side)[:, None] * rates  # (side, n)
    x, y = angles.repeat(side, 1), angles.repeat_interleave(side, dim=0)  # (N, n)
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)[:, :config.n_embd]
