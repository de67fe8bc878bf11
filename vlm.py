"""Images and text: a SigLIP vision transformer, a Gemma decoder, and PaliGemma, which joins them; on model.py's blocks.

    python sample.py --init_from=google/paligemma-3b-pt-224 --image=photo.jpg --prompt="caption en"
    python sample.py --init_from=FOLDER --image=photo.jpg --prompt="detect cat" --device=cpu --dtype=bfloat16

PaliGemma (Beyer et al. 2024) reads a row of vectors, N of the image and one for each token of the text:

    image x N | <bos> prefix \\n | answer <eos>

The image comes first in every row, so it needs no placeholder tokens, and only what comes after it may need padding.

Axes: B batch, T query positions, S key positions, C channels (n_embd), N image tokens (patches), V vocabulary,
A places where something is predicted, H and W height and width in pixels.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import check_choices, check_ranges
from model import GPT, GPTConfig, Transformer, TransformerConfig, causal_mask, init_weights, predict, rotate

# ----------------------------------------------------------------------------------------------------------------------
# Configurations

@dataclass(frozen=True)
class ViTConfig(TransformerConfig):
    norm_eps: float = 1e-6
    bias: bool = True
    image_size: int = 224  # pixels, of both sides
    patch_size: int = 14  # pixels, of both sides

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, patch_size=1, image_size=self.patch_size)

    @property
    def n_patches(self):
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig(GPTConfig):
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    mlp: str = "geglu"
    positions: str = "rotary"
    vocab_size: int = 257216
    block_size: int = 8192  # most positions the model was made for


@dataclass(frozen=True)
class PaliGemmaConfig:
    vision: ViTConfig = ViTConfig()
    text: GemmaConfig = GemmaConfig()
    dropout: float = 0.0  # of both

    def __post_init__(self):
        set_parts(self, vision=ViTConfig, text=GemmaConfig)
        assert self.text.positions == "rotary" and not self.text.bigrams, "a PaliGemma has rotary positions alone"

    @property
    def block_size(self):
        """Most positions, those of the image included."""
        return self.text.block_size


@dataclass(frozen=True)
class TextEncoderConfig(TransformerConfig):
    bias: bool = True
    vocab_size: int = 32000
    block_size: int = 64  # most positions

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, vocab_size=1, block_size=1)


@dataclass(frozen=True)
class SigLIPConfig:
    vision: ViTConfig = ViTConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    loss: str = "sigmoid"  # or softmax: CLIP's
    dropout: float = 0.0  # of both

    def __post_init__(self):
        set_parts(self, vision=ViTConfig, text=TextEncoderConfig)
        check_choices(self, loss=("sigmoid", "softmax"))


def set_parts(config, **parts):
    """Makes each part an instance of its class, from a dict as config.json holds it, with the whole's dropout."""
    for name, cls in parts.items():
        part = getattr(config, name)
        if isinstance(part, dict):
            part = cls(**part)
        object.__setattr__(config, name, replace(part, dropout=config.dropout))


# ----------------------------------------------------------------------------------------------------------------------
# Models

class ViT(nn.Module):
    """SigLIP's vision transformer (Zhai et al. 2023): a vector for each patch, without class token or pooling head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(3, config.n_embd, config.patch_size, stride=config.patch_size)
        self.wpe = nn.Embedding(config.n_patches, config.n_embd)
        self.transformer = Transformer(config)

    def forward(self, images):
        """images: (B, 3, image_size, image_size) in [-1, 1] -> (B, N, C), patches from left to right, then down."""
        x = self.patches(images.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)  # (B, N, C)
        return self.transformer(x + self.wpe.weight)


class Gemma(GPT):
    """Gemma's decoder (Gemma Team 2024): a GPT of other parts (GemmaConfig), whose embeddings are scaled."""

    def embed(self, tokens):
        """(B, T) -> (B, T, C), scaled by sqrt(C), a factor that Gemma rounds to the weights' precision."""
        x = self.wte(tokens)
        return x * torch.tensor(self.config.n_embd ** 0.5, dtype=x.dtype, device=x.device)


class PaliGemma(nn.Module):
    """A ViT, a linear projection of its patches, and a Gemma that reads them before the text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.projector = nn.Linear(config.vision.n_embd, config.text.n_embd)
        self.decoder = Gemma(config.text)

    def forward(self, images, tokens, targets=None, places=None, prefix=None):
        """images: (B, 3, H, W), tokens: (B, T), prefix: as in `hidden`; targets, places and the result as in `predict`.

        Training takes tokens padded on the right, where nothing that is predicted can see.
        """
        x = self.hidden(tokens, image=self.encode(images), prefix=prefix)
        return predict(self.logits, x, targets, places)

    def encode(self, images):
        """(B, 3, H, W) -> (B, N, C): the vectors the decoder reads as the image."""
        return self.projector(self.vision(images))

    def hidden(self, tokens, caches=None, start=0, image=None, prefix=None, padding=None):
        """The trunk's output (B, T, C) for tokens (B, T), which follow the image (B, N, C).

        caches: those of `make_caches`. start: how many tokens of the text they hold, after the image, which is read at
        start 0 only; or the places of these tokens in the text as a tensor (T,).
        prefix: (B,), how many of the row's tokens see each other in both directions, padding included; the tokens
        after them see only backwards. None: all of these tokens, or with a tensor as start none.
        padding: (B,), how many tokens at the left of each row's text stand for nothing; None: no row has any.
        """
        N, x, mask = self.config.vision.n_patches, self.decoder.embed(tokens), None
        if isinstance(start, int):
            if start == 0:
                x = torch.cat((image, x), dim=1)  # (B, N + T, C)
            first = N + start if start else 0
            keys = torch.arange(first + x.size(1), device=x.device)
            slots = keys[first:]  # without a prefix all see all, as there is nothing after these
        else:
            first = slots = N + start
            keys = torch.arange(caches.size, device=x.device)
            mask = causal_mask(slots, keys)
        if prefix is not None:
            mask = causal_mask(slots, keys, N + prefix[:, None, None, None])  # (B, 1, N + T, S)
        assert len(keys) <= self.config.block_size
        positions = slots + 1  # as in training; in 16 bits the rounding of a rotation depends on where counting starts
        if padding is not None:
            padding = padding[:, None, None]  # (B, 1, 1)
            text = ~((keys >= N) & (keys < N + padding))[:, None]  # (B, 1, 1, S)
            mask = text if mask is None else mask & text
            positions = torch.where(slots < N, positions, positions - padding).clamp(min=0)  # (B, 1, N + T)
        x, rope = self.decoder.wpe(x, positions)
        x = self.decoder.transformer(x, caches, mask=mask, rope=rope, start=first)
        return x[:, -tokens.size(1):]

    def logits(self, x):
        return self.decoder.logits(x)  # (..., C) -> (..., V)

    def make_caches(self, batch_size, size):
        """size: most tokens of the text; the image has N more."""
        return self.decoder.make_caches(batch_size, self.config.vision.n_patches + size)


class TextEncoder(nn.Module):
    """A bidirectional encoder with learned positions, for texts padded on the left."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer = Transformer(config)

    def forward(self, tokens, padding):
        """tokens: (B, T), the first padding: (B,) of which are no text -> the mean of the other outputs (B, C)."""
        pos = torch.arange(tokens.size(1), device=tokens.device) - padding[:, None]
        text = pos >= 0  # (B, T)
        x = self.transformer(self.wte(tokens) + self.wpe(pos.clamp(min=0)), mask=text[:, None, None])
        return (x * text[..., None]).sum(1) / text.sum(1, keepdim=True)  # (B, T, C) -> (B, C)


class SigLIP(nn.Module):
    """A vision transformer and a text encoder whose vectors agree where image and text do (Zhai et al. 2023).

    The image's vector is the mean of its patches'; the published models pool with a learned query instead.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.text = TextEncoder(config.text)
        self.head = nn.Linear(config.vision.n_embd, config.text.n_embd)
        scale = 10.0 if config.loss == "sigmoid" else 1 / 0.07  # the temperature's inverse, as the papers start it
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images, tokens, padding, across_ranks=True):
        """The nats of each pair, (B,): images (B, 3, H, W), tokens (B, T), padding (B,).

        across_ranks: each image is scored against the texts of all ranks.
        """
        images, texts = self.encode_images(images), self.text(tokens, padding)
        if self.config.loss == "softmax":
            return softmax_nats(images, texts, self.log_scale, across_ranks) + 0 * self.bias  # it needs no bias
        return sigmoid_nats(images, texts, self.log_scale, self.bias, across_ranks=across_ranks)

    def encode_images(self, images):
        return self.head(self.vision(images).mean(1))  # (B, 3, H, W) -> (B, C)


@torch.no_grad()
def init_parts(model, generator=None):
    """Each part of a PaliGemma or a SigLIP as `init_weights` has it, for its own depth and widths.

    The ViT's positions start as sines and cosines of the patch's place, so that it can tell places from the first step.
    """
    for part in model.children():
        init_weights(part, generator, std=model.config.vision.n_embd**-0.5)
    model.vision.wpe.weight.copy_(sincos_2d(model.config.vision))


def sincos_2d(config):
    """A vector for each patch of a ViT, (N, C), of frequencies from 1 to 1/100 in x and in y (Beyer et al. 2022)."""
    side, n = config.image_size // config.patch_size, -(-config.n_embd // 4)
    rates = 100 ** -(torch.arange(n) / n)
    y, x = (place.flatten()[:, None] * rates for place in torch.meshgrid(*2 * [torch.arange(side)], indexing="ij"))
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)[:, :config.n_embd]


# ----------------------------------------------------------------------------------------------------------------------
# Where a PaliGemma looks

@torch.inference_mode()
def image_attention(model, image, prompt, answer):
    """Where the decoder looked for each of the answer's A tokens: (A, N), shares of its attention, on the CPU.

    They are the mean over layers and heads of the weights with which the position that wrote the token, the one before
    it, saw the image; the rest up to 1 went to the text. image: (1, 3, H, W); prompt, answer: ids.
    The decoder runs once more, on the whole row: fused attention, by which tokens are generated, keeps no weights.
    """
    N, looks = model.config.vision.n_patches, []
    first = N + len(prompt) - 1

    def look(attention, inputs):
        x, mask, rope, *_ = inputs
        looks.append(attention_weights(attention, x, mask, rope, first)[0, :, :, :N].mean(0))  # (A, N)

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.decoder.transformer.blocks]
    try:
        tokens = torch.tensor([[*prompt, *answer[:-1]]], device=image.device)
        prefix = torch.tensor([len(prompt)], device=image.device)
        model.hidden(tokens, image=model.encode(image), prefix=prefix)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(looks).mean(0).cpu()


def attention_weights(attention, x, mask, rope, first=0):
    """softmax(q k^T / sqrt(D)) of an `Attention`, in float32: (B, H, T - first, T) for the queries from `first` on.

    x: (B, T, C); mask: a boolean tensor that ends in (T, T); rope: as the `Attention` takes it.
    """
    q = attention.q_proj(x[:, first:]).unflatten(-1, (attention.n_head, attention.head_dim)).transpose(1, 2)
    k, _ = attention.keys_values(x)  # (B, K, T, D)
    q, k = rotate(q, *(table[..., first:, :] for table in rope)), rotate(k, *rope)
    k = k.repeat_interleave(attention.n_head // attention.n_kv_head, dim=1)  # (B, H, T, D)
    scores = q.float() @ k.float().transpose(-1, -2) / attention.head_dim ** 0.5
    return scores.masked_fill(~mask[..., first:, :], -torch.inf).softmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Contrastive losses

def all_gather(x, across_ranks):
    """(all ranks' rows, which is the first of x); ranks must have equally many. Gradients return to each row."""
    if not across_ranks or not dist.is_initialized() or dist.get_world_size() == 1:
        return x, 0
    from torch.distributed.nn import functional as with_gradients
    return torch.cat(with_gradients.all_gather(x.contiguous())), dist.get_rank() * len(x)


def agreement(images, texts, log_scale):
    """The scaled products of each image with each text, (images, texts): in float32 even where 16 bits are automatic.

    In bfloat16, steps of 0.4 % would be all that a loss can show.
    """
    with torch.autocast(images.device.type, enabled=False):
        return images.float() @ texts.float().T * log_scale.exp()


def sigmoid_nats(images, texts, log_scale, bias, block=1024, across_ranks=True):
    """SigLIP's loss (Zhai et al. 2023, algorithm 1) of each image, (B,): each pair with a text is right or wrong.

    images, texts: (B, C), row i of one belongs to row i of the other; any length. log_scale, bias: scalar parameters,
    log(10) and -10 at the start. Of the score matrix a rank holds its B images against `block` texts at a
    time, in the backward pass too.
    """
    images = F.normalize(images, dim=-1)
    texts, first = all_gather(F.normalize(texts, dim=-1), across_ranks)
    nats = 0.0
    for start in range(0, len(texts), block):
        nats = nats + checkpoint(pair_nats, images, texts[start:start + block], first - start, log_scale, bias,
                                 use_reentrant=False)
    return nats


def pair_nats(images, texts, first, log_scale, bias):
    """Each image's sum over these texts, (B,); image i belongs to text first + i, if that is among them."""
    scores = agreement(images, texts, log_scale) + bias  # (B, block)
    rows, columns = (torch.arange(len(x), device=x.device) for x in (images, texts))
    right = columns == first + rows[:, None]  # (B, block)
    return -F.logsigmoid(torch.where(right, scores, -scores)).sum(1)


def softmax_nats(images, texts, log_scale, across_ranks=True):
    """CLIP's loss (Radford et al. 2021, figure 3) of each pair, (B,): each image picks its text, each text its image.

    Arguments as in `sigmoid_nats`; log_scale starts at log(1 / 0.07), and counts for at most log(100).
    """
    log_scale = log_scale.clamp(max=math.log(100))
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    (all_images, first), (all_texts, _) = all_gather(images, across_ranks), all_gather(texts, across_ranks)
    right = first + torch.arange(len(images), device=images.device)
    image_nats = F.cross_entropy(agreement(images, all_texts, log_scale), right, reduction="none")
    text_nats = F.cross_entropy(agreement(texts, all_images, log_scale), right, reduction="none")
    return (image_nats + text_nats) / 2
