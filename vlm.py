"""Models of images and text, built from model.py's blocks: a classifier of images, SigLIP, Gemma and PaliGemma.

    python sample.py --init_from=google/paligemma-3b-pt-224 --image=photo.jpg --prompt="caption en"
    python sample.py --init_from=FOLDER --image=photo.jpg --prompt="detect cat" --device=cpu --dtype=bfloat16

PaliGemma (Beyer et al. 2024) reads a sequence of vectors: N for the image, then one for each token of the text.

    image x N | <bos> prefix \\n | answer <eos>

Every row starts with its image. So it needs no placeholder tokens, and padding, if any, comes after it.

Axes: B batch, T query positions, S key positions, C channels (n_embd), N image patches, V vocabulary,
A predicted positions, H and W height and width in pixels.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError, check_choices, check_ranges
from model import GPT, GPTConfig, Transformer, TransformerConfig, causal_mask, init_weights, predict
from positions import rotate

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
class GemmaConfig(GPTConfig):
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    mlp: str = "geglu"
    positions: str = "rotary"
    vocab_size: int = 257216
    block_size: int = 8192  # context length: the most positions, in PaliGemma including the image


@dataclass(frozen=True)
class PaliGemmaConfig:
    vision: ViTConfig = ViTConfig()
    text: GemmaConfig = GemmaConfig()
    dropout: float = 0.0  # in both parts

    def __post_init__(self):
        set_parts(self, vision=ViTConfig, text=GemmaConfig)
        assert self.text.positions == "rotary" and not self.text.bigrams, "PaliGemma has rotary positions only"

    @property
    def block_size(self):
        """The longest sequence, in positions: image patches and text tokens together."""
        return self.text.block_size


@dataclass(frozen=True)
class TextEncoderConfig(TransformerConfig):
    bias: bool = True
    vocab_size: int = 32000
    block_size: int = 64  # the most tokens of a text

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, vocab_size=1, block_size=1)


@dataclass(frozen=True)
class SigLIPConfig:
    vision: ViTConfig = ViTConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    loss: str = "sigmoid"  # softmax: CLIP's loss
    dropout: float = 0.0  # in both parts

    def __post_init__(self):
        set_parts(self, vision=ViTConfig, text=TextEncoderConfig)
        check_choices(self, loss=("sigmoid", "softmax"))


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
        plain = not config.stem
        self.patches = (nn.Conv2d(3, config.n_embd, config.patch_size, stride=config.patch_size) if plain else
                        ConvStem(config))
        self.cls = nn.Embedding(1, config.n_embd) if config.cls else None
        self.wpe = nn.Embedding(config.n_patches + config.cls, config.n_embd)
        self.transformer = Transformer(config)

    def forward(self, images):
        """images: (B, 3, image_size, image_size) in [-1, 1]. Returns (B, N, C), the patches row by row from the top.

        With a class token (B, 1 + N, C): its vector comes first.
        """
        x = self.patches(images.to(self.wpe.weight.dtype)).flatten(2).transpose(1, 2)  # (B, N, C)
        if self.cls is not None:
            x = torch.cat((self.cls.weight.expand(len(x), 1, -1), x), dim=1)
        return self.transformer(x + self.wpe.weight)


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


class Gemma(GPT):
    """Gemma (Gemma Team 2024): a GPT with the parts of GemmaConfig and with scaled embeddings."""

    def embed(self, tokens):
        """Embeddings of tokens (B, T), times sqrt(C): (B, T, C). As in Gemma, sqrt(C) is rounded to their dtype."""
        x = self.wte(tokens)
        return x * torch.full((), self.config.n_embd ** 0.5, dtype=x.dtype, device=x.device)


class PaliGemma(nn.Module):
    """A ViT, a linear projection of its outputs, and a Gemma that reads them before the text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.projector = nn.Linear(config.vision.n_embd, config.text.n_embd)
        self.decoder = Gemma(config.text)

    def forward(self, images, tokens, targets=None, places=None, prefix=None):
        """Returns the logits or the losses of the text: for targets, places and the result see model.py's `predict`.

        images: (B, 3, H, W). tokens: (B, T), padded on the right. prefix: see `hidden`.
        """
        x = self.hidden(tokens, image=self.encode(images), prefix=prefix)
        return predict(self.logits, x, targets, places)

    def encode(self, images):
        """images: (B, 3, H, W). Returns the vectors that the decoder reads for each image, (B, N, C)."""
        return self.projector(self.vision(images))

    def hidden(self, tokens, caches=None, start=0, image=None, prefix=None, padding=None):
        """Returns the decoder trunk's output (B, T, C) for tokens (B, T) of the text, which follows the image.

        caches: from `make_caches`; None: nothing is kept. They hold the image and the text before `start`.
        start: an int, the number of text tokens in the caches; or a tensor (T,), the positions of `tokens` in the text.
        image: (B, N, C), from `encode`. It is needed if start is the int 0; otherwise it is in the caches already.
        prefix: (B,), how many tokens at the start of each text, padding included, attend in both directions; the image
        always does, and later tokens attend backwards only. None: all of `tokens`, or none if start is a tensor.
        padding: (B,), the number of padding tokens at the left of each text; None: no padding.
        """
        N, mask = self.config.vision.n_patches, None
        x = self.decoder.embed(tokens)  # (B, T, C)
        if isinstance(start, int):
            if start == 0:
                x = torch.cat((image, x), dim=1)  # (B, N + T, C)
            first = N + start if start else 0
            keys = torch.arange(first + x.size(1), device=x.device)
            slots = keys[first:]
        else:
            first = slots = N + start
            keys = torch.arange(caches.size, device=x.device)
            mask = causal_mask(slots, keys)
        if prefix is not None:
            mask = causal_mask(slots, keys, N + prefix[:, None, None, None])  # (B, 1, N + T, S)
        assert len(keys) <= self.config.block_size
        positions = slots + 1  # as the published model was trained; counting from 0 rounds differently in 16 bits
        if padding is not None:
            padding = padding[:, None, None]  # (B, 1, 1)
            real = ~((keys >= N) & (keys < N + padding))[:, None]  # (B, 1, 1, S)
            mask = real if mask is None else mask & real
            positions = torch.where(slots < N, positions, positions - padding).clamp(min=0)  # (B, 1, N + T)
        x, rope = self.decoder.wpe(x, positions)
        x = self.decoder.transformer(x, caches, mask=mask, rope=rope, start=first)
        return x[:, -tokens.size(1):]

    def logits(self, x):
        return self.decoder.logits(x)  # (..., C) -> (..., V)

    def make_caches(self, batch_size, size):
        """Empty caches for the image and `size` tokens of text, at most the model's block_size positions."""
        return self.decoder.make_caches(batch_size, min(self.config.vision.n_patches + size, self.config.block_size))


class TextEncoder(nn.Module):
    """A bidirectional encoder with learned positions, for texts padded on the left."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer = Transformer(config)

    def forward(self, tokens, padding):
        """The mean output over each text, (B, C). tokens: (B, T), with padding (B,) tokens of padding at the left."""
        pos = torch.arange(tokens.size(1), device=tokens.device) - padding[:, None]
        real = pos >= 0  # (B, T)
        x = self.transformer(self.wte(tokens) + self.wpe(pos.clamp(min=0)), mask=real[:, None, None])
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)  # (B, T, C) -> (B, C)


class SigLIP(nn.Module):
    """A ViT and a text encoder, trained to give matching images and texts similar vectors (Zhai et al. 2023).

    An image's vector is the mean over its patches. The published models pool with a learned query instead.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.text = TextEncoder(config.text)
        self.head = nn.Linear(config.vision.n_embd, config.text.n_embd)
        scale = 10.0 if config.loss == "sigmoid" else 1 / 0.07  # the initial 1 / temperature, from the papers
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images, tokens, padding, across_ranks=True):
        """The loss of each pair, (B,), in nats. images: (B, 3, H, W). tokens (B, T), padding (B,): see `TextEncoder`.

        across_ranks: also compare with the images and texts of the other ranks.
        """
        images, texts = self.encode_images(images), self.text(tokens, padding)
        if self.config.loss == "softmax":
            return softmax_nats(images, texts, self.log_scale, across_ranks) + 0 * self.bias  # DDP needs its gradient
        return sigmoid_nats(images, texts, self.log_scale, self.bias, across_ranks=across_ranks)

    def encode_images(self, images):
        return self.head(self.vision(images).mean(1))  # (B, 3, H, W) -> (B, C)


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


# ----------------------------------------------------------------------------------------------------------------------
# What a PaliGemma attends to

@torch.inference_mode()
def image_attention(model, image, prompt, answer):
    """The decoder's attention to the N patches for each of the answer's A tokens: (A, N), on the CPU.

    image: (1, 3, H, W). prompt, answer: token ids. The weights are those of the position that predicts the token, which
    is the one before it, averaged over layers and heads. A row sums to less than 1: the rest is attention to the text.
    This takes another pass over the whole sequence: the fused attention of generation does not return its weights.
    """
    N, looks = model.config.vision.n_patches, []
    first = N + len(prompt) - 1  # predicts the answer's first token

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


@torch.inference_mode()
def rollout(model, image):
    """How much of each patch reaches the head of an `ImageClassifier`, as far as attention tells: (N,), on the CPU.

    Attention rollout (Abnar and Zuidema 2020): the weights' mean over heads, half and half with the identity for the
    residual stream, multiplied from block to block. Sums to 1, less the class token's own share. image: (1, 3, H, W).
    """
    looks, vision = [], model.vision

    def look(attention, inputs):
        looks.append(attention_weights(attention, inputs[0], None, None)[0].mean(0).cpu())  # (T, T)

    hooks = [block.attn.register_forward_pre_hook(look) for block in vision.transformer.blocks]
    try:
        vision(image)
    finally:
        for hook in hooks:
            hook.remove()
    own = flow = torch.eye(len(looks[0]))
    for weights in looks:
        flow = (weights + own) / 2 @ flow
    return (flow[0] if vision.config.cls else flow.mean(0))[-vision.config.n_patches:]


def attention_weights(attention, x, mask, rope, first=0):
    """softmax(q k^T / sqrt(D)) of an `Attention`, in float32: (B, H, T - first, T) for the queries from `first` on.

    x: (B, T, C); mask: a boolean tensor that ends in (T, T), or None; rope: see `Attention`.
    """
    q = attention.q_proj(x[:, first:]).unflatten(-1, (attention.n_head, attention.head_dim))
    q = attention.q_norm(q).transpose(1, 2)  # (B, H, T - first, D)
    k, _ = attention.keys_values(x)  # (B, K, T, D)
    if rope is not None:
        q, k = rotate(q, *(table[..., first:, :] for table in rope)), rotate(k, *rope)
    k = k.repeat_interleave(attention.n_head // attention.n_kv_head, dim=1)  # (B, H, T, D)
    scores = q.float() @ k.float().transpose(-1, -2) / attention.head_dim ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask[..., first:, :], -torch.inf)).softmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Contrastive losses

def all_gather(x, across_ranks):
    """(rows of all ranks, index of x's first); (x, 0) if not across_ranks. Differentiable. Ranks need equal len(x)."""
    if not across_ranks or not dist.is_initialized() or dist.get_world_size() == 1:
        return x, 0
    from torch.distributed.nn import functional as with_gradients
    return torch.cat(with_gradients.all_gather(x.contiguous())), dist.get_rank() * len(x)


def agreement(images, texts, log_scale):
    """Returns exp(log_scale) * images @ texts^T, (n images, n texts), in float32 even under autocast.

    images, texts: normalised vectors, (n, C). In bfloat16, losses could only differ in steps of 0.4 %.
    """
    with torch.autocast(images.device.type, enabled=False):
        return images.float() @ texts.float().T * log_scale.exp()


def sigmoid_nats(images, texts, log_scale, bias, block=1024, across_ranks=True):
    """SigLIP's loss (Zhai et al. 2023, algorithm 1) of each image, (B,), in nats: is each text its own, yes or no?

    An image's loss is the sum over all texts, of the other ranks too if across_ranks.
    images, texts: (B, C), not normalised; image i belongs to text i. log_scale, bias: scalar parameters, which start at
    log(10) and -10. Only the scores of `block` texts are in memory at a time, in the backward pass too.
    """
    images = F.normalize(images, dim=-1)
    texts, first = all_gather(F.normalize(texts, dim=-1), across_ranks)
    nats = 0.0
    for start in range(0, len(texts), block):
        nats = nats + checkpoint(pair_nats, images, texts[start:start + block], first - start, log_scale, bias,
                                 use_reentrant=False)
    return nats


def pair_nats(images, texts, first, log_scale, bias):
    """Returns each image's loss, (B,), summed over a block of texts. images, texts: normalised, (n, C).

    Image i belongs to texts[first + i]. If that index is negative or too large, its text is in another block.
    """
    scores = agreement(images, texts, log_scale) + bias  # (B, block)
    rows, columns = (torch.arange(len(x), device=x.device) for x in (images, texts))
    right = columns == first + rows[:, None]  # (B, block)
    return -F.logsigmoid(torch.where(right, scores, -scores)).sum(1)


def softmax_nats(images, texts, log_scale, across_ranks=True):
    """CLIP's loss (Radford et al. 2021, figure 3) of each pair, (B,), in nats.

    It is the mean of two cross-entropies: the image picks its text among all texts, and the text picks its image.
    Arguments as in `sigmoid_nats`, but log_scale starts at log(1 / 0.07) and is clamped to log(100).
    """
    log_scale = log_scale.clamp(max=math.log(100))
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    (all_images, first), (all_texts, _) = all_gather(images, across_ranks), all_gather(texts, across_ranks)
    right = first + torch.arange(len(images), device=images.device)
    image_nats = F.cross_entropy(agreement(images, all_texts, log_scale), right, reduction="none")
    text_nats = F.cross_entropy(agreement(texts, all_images, log_scale), right, reduction="none")
    return (image_nats + text_nats) / 2
