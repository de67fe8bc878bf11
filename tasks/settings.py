"""The settings that each task adds to those of every run, of every sample and of every evaluation; free of torch.

A setting that does nothing for the task, the model or the optimizer at hand is refused.
"""

import contextlib
import os
from dataclasses import dataclass
from typing import Literal

from configurator import UserError, check_idle, check_ranges, check_shape

# ----------------------------------------------------------------------------------------------------------------------
# Training: beside train.Settings, whose fields the checks may read too

def check_training(settings):
    """Raises UserError for settings of train.py that can't be right, or that do nothing beside the others."""
    check_ranges(settings, batch_size=1, micro_batch_size=0, max_iters=1, learning_rate=0.0, min_lr=0.0, muon_lr=0.0,
                 warmup_iters=0, lr_decay_iters=0, weight_decay=0.0, beta1=0.0, beta2=0.0, grad_clip=0.0,
                 eval_interval=1, eval_tokens=0, log_interval=1, max_minutes=0.0, save_minutes=0.0, max_grad_norm=0.0,
                 max_loss_rise=0.0, sample_tokens=0, lora_rank=0, seed=0, dropout=0.0)
    for name, rate in settings.rates.items():
        if not rate >= 0:
            raise UserError(f"rates.{name} = {rate}: must be at least 0")
    for name in ("beta1", "beta2", "dropout"):
        if getattr(settings, name) >= 1:
            raise UserError(f"{name} = {getattr(settings, name)}: must be below 1")
    if settings.shard and settings.dtype == "float16":
        raise UserError("shard = True: not with --dtype=float16")
    if settings.optimizer == "adamw":
        check_idle(settings, "is for --optimizer=muon", "muon_lr")
    elif settings.shard or not settings.learning_rate:
        raise UserError("optimizer = 'muon': not with --shard, for it needs whole matrices, nor with"
                        " --learning_rate=0")
    if settings.init_from == "scratch":
        check_idle(settings, "is for fine-tuning with --init_from", "lora_rank")
    if not settings.wandb:
        check_idle(settings, "is for --wandb", "wandb_project", "wandb_name")
    if settings.min_lr > settings.learning_rate:
        raise UserError(f"min_lr = {settings.min_lr}: is above learning_rate = {settings.learning_rate}; add"
                        f" --min_lr={settings.learning_rate / 10:.3g}")
    if settings.shard and not settings.resume and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError("shard = True: does nothing for one worker; leave it out, or start several with torchrun")


@dataclass(frozen=True)
class Text:
    # the model
    model: str = "gpt"  # gpt, gemma, or another name in MODELS of tasks/text.py
    n_layer: int = 2  # blocks
    n_head: int = 2  # attention heads
    n_kv_head: int = 0  # key-value heads, each of which serves several attention heads; 0: n_head
    n_embd: int = 64  # width
    block_size: int = 64  # tokens of context
    bias: bool = False  # in linear layers and LayerNorms
    mlp: Literal["", "gelu", "geglu", "relu2"] = ""  # GPT-2's, gated, or the square of ReLU; default: the model's own
    positions: Literal["", "learned", "rotary"] = ""  # default: the model's own
    tied: bool = True  # the embedding matrix is also the output head
    bigrams: bool = False  # an embedding of each pair of neighbours too; for small vocabularies
    zero_init: bool = False  # blocks start by adding nothing: what leads out of them is zero

    def __post_init__(self):
        check_sizes(self)
        if self.init_from != "scratch":
            check_idle(self, "is for a model that starts from scratch", "zero_init")


@dataclass(frozen=True)
class Vision:
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width
    patch_size: int = 8  # pixels of both sides of a patch


@dataclass(frozen=True)
class Contrastive:
    # the model: a vision tower and a text encoder
    n_layer: int = 2  # blocks of the text encoder
    n_head: int = 2  # its attention heads
    n_embd: int = 64  # its width
    block_size: int = 64  # tokens of the longest caption
    pair_loss: Literal["sigmoid", "softmax"] = "sigmoid"  # SigLIP's or CLIP's
    vision: Vision = Vision()  # the vision tower

    def __post_init__(self):
        check_sizes(self)
        check_length(self)
        if self.shard:
            raise UserError("shard = True: not for --task=contrastive, whose single numbers can't be divided")


@dataclass(frozen=True)
class ImageText:
    # the model: a vision tower and a decoder
    n_layer: int = 2  # blocks of the decoder
    n_head: int = 2  # its attention heads
    n_kv_head: int = 0  # its key-value heads, each of which serves several attention heads; 0: n_head
    n_embd: int = 64  # its width
    block_size: int = 64  # image tokens and text
    bias: bool = False  # in its linear layers
    init_vision: str = ""  # a contrastive run's folder, whose vision tower the model starts with
    init_decoder: str = ""  # a text run's folder (--model=gemma), whose blocks its decoder starts with
    publish: str = ""  # a folder to write the best model to at the end, in the published layout
    vision: Vision = Vision()  # the vision tower

    def __post_init__(self):
        check_sizes(self)
        if self.init_from != "scratch":
            check_idle(self, "is for a model that starts from scratch", "init_vision", "init_decoder")
        check_length(self)
        check_publish(self.publish)


def check_sizes(settings):
    """Raises UserError for sizes that no model can have."""
    check_ranges(settings, n_layer=1, n_head=1, n_embd=1, block_size=1)
    check_shape(settings.n_embd, settings.n_head, getattr(settings, "n_kv_head", 0), settings.dropout)


def check_length(settings):
    """Raises UserError for a length of the sample, where it has none."""
    if settings.sample_tokens:
        check_idle(settings, f"what --task={settings.task} shows has its own length; 0 shows nothing", "sample_tokens")


def check_publish(folder):
    """Raises UserError for a folder that holds anything but a published PaliGemma."""
    if not os.path.exists(folder) or os.path.isdir(folder) and not os.listdir(folder):
        return
    with contextlib.suppress(OSError), open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        if "paligemma" in file.read() and not os.path.exists(os.path.join(folder, "SHA256SUMS")):
            return
    raise UserError(f"publish = {folder}: holds something else than a published model; name a new folder")


# ----------------------------------------------------------------------------------------------------------------------
# Sampling: beside sample.Settings

def check_model(settings):
    """Raises UserError where the settings name two models, or a checkpoint that isn't there."""
    if not hasattr(settings, "checkpoint"):  # those of the end of a run, whose model is at hand
        return
    if getattr(settings, "init_from", ""):
        check_idle(settings, "is of a run, and --init_from names a model without one", "out_dir", "checkpoint")
    elif os.path.isfile(os.path.join(settings.out_dir, "SHA256SUMS")):
        check_idle(settings, "--out_dir is one checkpoint's folder", "checkpoint")
    elif settings.checkpoint == "last" and not any(os.path.isdir(os.path.join(settings.out_dir, f"last{suffix}"))
                                                   for suffix in ("", ".new", ".old")):
        raise UserError(f"checkpoint = 'last': there is none in {settings.out_dir}; leave it out")


@dataclass(frozen=True)
class Writing:
    # the text
    num_samples: int = 1  # how many answers to the prompt
    max_new_tokens: int = 500  # length of each sample; about an image at most what the model's positions leave
    temperature: float = 0.8  # below 1 is bolder, above 1 wilder; 0 always takes the likeliest token
    top_k: int = 200  # choose among the k likeliest tokens only; 0: all
    top_p: float = 1.0  # choose among the likeliest tokens that reach this probability together
    stop: str = ""  # end a sample before this text
    seed: int = 1337  # same seed, same samples

    def __post_init__(self):
        check_model(self)
        check_ranges(self, num_samples=1, max_new_tokens=1, temperature=0.0, top_k=0, top_p=0.0, seed=0)
        if self.num_samples > 100_000:  # the command holds all of them
            raise UserError(f"num_samples = {self.num_samples}: must be at most 100,000")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must lie above 0 and not above 1")
        if self.temperature == 0:
            check_idle(self, "temperature = 0 takes the likeliest token", "top_k", "top_p", "seed")


def image_files(named):
    """The files that --image names: the one of this name, or several, between commas."""
    return [named] if os.path.isfile(named) else named.split(",")


@dataclass(frozen=True)
class Answering(Writing):
    # the image
    image: str = ""  # a picture's file; several with commas, each of which gets the prompt
    draw: str = ""  # where to draw the boxes of the answer on the image: a .png or .jpg
    attention: str = ""  # where to draw, for each token of the answer, what of the image it came from: a .png or .jpg

    def __post_init__(self):
        super().__post_init__()
        for name in ("draw", "attention"):
            path = getattr(self, name)
            if path and not path.lower().endswith((".png", ".jpg", ".jpeg")):
                raise UserError(f"{name} = {path}: must end in .png or .jpg")
            if os.path.isdir(path):
                raise UserError(f"{name} = {path}: is a folder; name a file")
            many = len(image_files(self.image)) > 1 or self.num_samples > 1
            if path and (not self.image or many):
                raise UserError(f"{name} = {path}: needs one --image and --num_samples=1")


@dataclass(frozen=True)
class Matching:
    # the image
    image: str = ""  # a picture's file; several with commas, each of which is compared with the captions of --prompt

    def __post_init__(self):
        check_model(self)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluating: beside evaluate.Settings

@dataclass(frozen=True)
class Windows:
    # the estimate from windows at random places
    random_windows: int = 200  # batches of the estimate; 0: none
    batch_size: int = 64  # windows per batch
    seed: int = 1337  # of their places

    def __post_init__(self):
        check_model(self)
        check_ranges(self, random_windows=0, batch_size=1, seed=0)
        if not self.random_windows:
            check_idle(self, "is for --random_windows above 0", "batch_size", "seed")


@dataclass(frozen=True)
class Nothing:
    def __post_init__(self):
        check_model(self)
