"""Images and text: a SigLIP vision transformer, a Gemma decoder, and PaliGemma, which joins them; on model.py's blocks.

    python sample.py --init_from=google/paligemma-3b-pt-224 --image=photo.jpg --prompt="caption en"
    python sample.py --init_from=FOLDER --image=photo.jpg --prompt="detect cat" --device=cpu --dtype=bfloat16

PaliGemma (Beyer et al. 2024) reads a row of vectors, N of the image and one for each token of the text:

    image x N | <bos> prefix \\n | answer <eos>

The image comes first in every row, so it needs no placeholder tokens, and only what comes after it may need padding.

Axes: B batch, T query positions, S key positions, C channels (n_embd), N image tokens (patches), V vocabulary,
H and W height and width in pixels.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError, check_ranges
from lora import add_lora, merge_lora
from model import (
    Transformer,
    TransformerConfig,
    causal_mask,
    continuing_mask,
    init_weights,
    pick_tokens,
    rotary,
    rotate,
)

# ----------------------------------------------------------------------------------------------------------------------
# Models

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
class GemmaConfig(TransformerConfig):
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    mlp: str = "geglu"
    vocab_size: int = 257216
    block_size: int = 8192  # most positions the model was made for
    rope_theta: float = 10000.0

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, vocab_size=1, block_size=1)
        if (head_dim := self.head_dim or self.n_embd // self.n_head) % 2:
            raise UserError(f"head_dim = {head_dim}: rotary positions turn pairs, so it must be even")


@dataclass(frozen=True)
class PaliGemmaConfig:
    vision: ViTConfig = ViTConfig()
    text: GemmaConfig = GemmaConfig()
    dropout: float = 0.0  # of both
    lora_rank: int = 0  # of the decoder's projections, see lora.py; 0: none

    def __post_init__(self):
        set_parts(self, vision=ViTConfig, text=GemmaConfig)

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
        if self.loss not in ("sigmoid", "softmax"):
            raise UserError(f"loss = {self.loss!r}: must be sigmoid or softmax")


def set_parts(config, **parts):
    """Makes each part an instance of its class, from a dict as config.json holds it, with the whole's dropout."""
    for name, cls in parts.items():
        part = getattr(config, name)
        part = cls(**part) if isinstance(part, dict) else part
        object.__setattr__(config, name, replace(part, dropout=config.dropout))


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


class Gemma(nn.Module):
    """Gemma's decoder (Gemma Team 2024): rotary positions; the embedding matrix is also the output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = Transformer(config)

    def forward(self, tokens, targets=None, caches=None, start=0):
        """As a language model of its own; arguments and result as GPT's."""
        return score(self.logits, self.hidden(tokens, caches, start), targets)

    def hidden(self, tokens, caches=None, start=0):
        """The trunk's output (B, T, C), every token seeing those up to itself; arguments as GPT's."""
        end = start + tokens.size(1)
        positions = torch.arange(start, end, device=tokens.device)
        return self.run(self.embed(tokens), continuing_mask(start, end, tokens.device), positions, caches, start)

    def embed(self, tokens):
        """(B, T) -> (B, T, C), scaled by sqrt(C), a factor that Gemma rounds to the weights' precision."""
        x = self.wte(tokens)
        return x * torch.tensor(self.config.n_embd ** 0.5, dtype=x.dtype, device=x.device)

    def run(self, x, mask, positions, caches=None, start=0):
        """The trunk on embedded vectors. positions: (T,), or (B, 1, T) where they differ from row to row."""
        head_dim = self.config.head_dim or self.config.n_embd // self.config.n_head
        rope = rotary(positions, head_dim, self.config.rope_theta)
        return self.transformer(x, caches, mask=mask, rope=rope, start=start)

    def logits(self, x):
        return F.linear(x, self.wte.weight).float()  # (..., C) -> (..., V)

    def make_caches(self, batch_size, size=None):
        return self.transformer.make_caches(batch_size, size or self.config.block_size)


class PaliGemma(nn.Module):
    """A ViT, a linear projection of its patches, and a Gemma that reads them before the text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.projector = nn.Linear(config.vision.n_embd, config.text.n_embd)
        self.decoder = Gemma(config.text)
        if config.lora_rank:
            self.add_lora(config.lora_rank)

    def add_lora(self, rank, generator=None):
        """Freezes the decoder; from now on small additions to its projections train (lora.py)."""
        self.config = replace(self.config, lora_rank=rank)
        add_lora(self.decoder, rank, alpha=2 * rank, generator=generator)

    def merge_lora(self):
        """Folds the additions into the projections."""
        self.config = replace(self.config, lora_rank=0)
        merge_lora(self.decoder)

    def forward(self, images, tokens, targets=None, prefix=None, padding=None):
        """Logits (B, T, V) in float32 of the text's tokens; given targets (B, T), their mean cross-entropy in nats.

        images: (B, 3, H, W), tokens: (B, T). A target of -100 is not scored. prefix, padding: as in `hidden`.
        Training takes tokens padded on the right, where nothing that is scored can see.
        """
        x = self.hidden(tokens, self.encode(images), prefix, padding)
        return score(self.decoder.logits, x, targets)

    def encode(self, images):
        """(B, 3, H, W) -> (B, N, C): the vectors the decoder reads as the image."""
        return self.projector(self.vision(images))

    def hidden(self, tokens, image=None, prefix=None, padding=None, caches=None, start=0):
        """The trunk's output (B, T, C) for tokens (B, T), which follow the image (B, N, C) if there is one.

        prefix: (B,), how many of the row's tokens see each other in both directions, padding included; the tokens
        after them see only backwards. None: all of these tokens.
        padding: (B,), how many tokens at the left of each row's text stand for nothing; None: no row has any.
        caches, start: those of `make_caches`, and the first of the N + T or T slots of what is passed here.
        """
        N = self.config.vision.n_patches
        x = self.decoder.embed(tokens)
        if image is not None:
            x = torch.cat((image, x), dim=1)  # (B, N + T, C)
        keys = torch.arange(start + x.size(1), device=x.device)
        slots, mask = keys[start:], None  # all see all, as there is nothing after these
        if prefix is not None:
            mask = causal_mask(slots, keys, N + prefix[:, None, None, None])  # (B, 1, N + T, S)
        positions = slots + 1  # as in training; in 16 bits the rounding of a rotation depends on where counting starts
        if padding is not None:
            padding = padding[:, None, None]  # (B, 1, 1)
            text = ~((keys >= N) & (keys < N + padding))[:, None]  # (B, 1, 1, S)
            mask = text if mask is None else mask & text
            positions = torch.where(slots < N, positions, positions - padding)  # (B, 1, N + T)
        return self.decoder.run(x, mask, positions, caches, start)[:, -tokens.size(1):]

    def make_caches(self, batch_size, size):
        return self.decoder.make_caches(batch_size, size)


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
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # of the temperature's inverse
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images, tokens, padding, across_ranks=True):
        """The loss of these pairs: images (B, 3, H, W), tokens (B, T), padding (B,).

        across_ranks: each image is scored against the texts of all ranks.
        """
        images, texts = self.encode_images(images), self.text(tokens, padding)
        if self.config.loss == "softmax":
            return softmax_loss(images, texts, self.log_scale, across_ranks) + 0 * self.bias  # it needs no bias
        return sigmoid_loss(images, texts, self.log_scale, self.bias, across_ranks=across_ranks)

    def encode_images(self, images):
        return self.head(self.vision(images).mean(1))  # (B, 3, H, W) -> (B, C)


def score(head, x, targets):
    """Logits head(x), (B, T, V), or given targets (B, T) their mean cross-entropy in nats.

    Where a target is -100 nothing is scored, and no logits are computed: of a quarter of a million kinds of tokens
    those of prompts and padding would be most of the memory.
    """
    if targets is None:
        return head(x)
    scored = targets != -100
    return F.cross_entropy(head(x[scored]), targets[scored])


@torch.no_grad()
def init_parts(model, generator=None):
    """Each part of a PaliGemma or a SigLIP as `init_weights` has it, for its own depth and widths.

    The ViT's positions start as sines and cosines of the patch's place, so that it can tell places from the first step.
    """
    for part in model.children():
        n_layer = part.config.n_layer if hasattr(part, "config") else 1
        init_weights(part, n_layer, generator, std=model.config.vision.n_embd**-0.5)
    model.vision.wpe.weight.copy_(sincos_2d(model.config.vision))


def sincos_2d(config):
    """A vector for each patch of a ViT, (N, C), of frequencies from 1 to 1/100 in x and in y (Beyer et al. 2022)."""
    side, n = config.image_size // config.patch_size, -(-config.n_embd // 4)
    rates = 100 ** -(torch.arange(n) / n)
    y, x = (place.flatten()[:, None] * rates for place in torch.meshgrid(*2 * [torch.arange(side)], indexing="ij"))
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)[:, :config.n_embd]


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and generation

LOCATIONS = [f"<loc{i:04}>" for i in range(1024)]  # of box corners, in 1024ths of the image's height or width
SEGMENTS = [f"<seg{i:03}>" for i in range(128)]  # codes of a mask inside its box


def encode_prompt(tokenizer, prompt):
    """The ids of "<bos>", the prompt and a newline.

    The newline is tokenized together with the prompt, as published code does it, where the paper wants it apart. In
    Gemma's vocabulary no word contains a newline, but a run of them is one token: the ids differ only for a prompt
    that itself ends in a newline. Raises UserError for a prompt that has image tokens of its own.
    """
    if "<image>" in prompt:
        raise UserError(f"prompt = {prompt!r}: leave out <image>, the image is put before the text anyway")
    return tokenizer.encode(f"<bos>{prompt}\n")


def pad_left(prompts):
    """Prompts of different lengths as one batch: tokens (B, T), and how many of each row are padding (B,)."""
    T = max(map(len, prompts))
    padding = torch.tensor([T - len(ids) for ids in prompts])
    tokens = torch.zeros(len(prompts), T, dtype=torch.long)
    for row, ids in zip(tokens, prompts):
        row[T - len(ids):] = torch.as_tensor(ids)
    return tokens, padding


@torch.inference_mode()
def generate(model, images, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, generator=None):
    """Yields the next token of every row, (B,), up to max_new_tokens times, or until every row has yielded eos.

    images: (M, 3, H, W), each encoded once, for the next B / M of the prompts; prompts: B lists of ids, of any lengths.
    A row that has ended goes on with eos. How to pick a token: as in `pick_tokens`.
    Raises UserError if all this is longer than block_size.
    """
    tokens, padding = (x.to(images.device) for x in pad_left(prompts))
    B, T, N = *tokens.shape, model.config.vision.n_patches
    size = N + T + max_new_tokens
    if size > model.config.block_size:
        raise UserError(f"{N} image tokens, a prompt of {T} and max_new_tokens = {max_new_tokens} are more than the"
                        f" model's {model.config.block_size} positions: lower --max_new_tokens")
    padding = padding if padding.any() else None
    caches, start = model.make_caches(B, size), 0
    image = model.encode(images).repeat_interleave(B // len(images), dim=0)  # (B, N, C)
    ended = torch.zeros(B, dtype=torch.bool, device=images.device)
    for _ in range(max_new_tokens):
        x = model.hidden(tokens, image, None, padding, caches, start)[:, -1]  # (B, C)
        next_tokens = pick_tokens(model.decoder.logits(x), temperature, top_k, top_p, generator)  # (B,)
        if eos is not None:
            next_tokens = next_tokens.masked_fill(ended, eos)
            ended = next_tokens == eos
        yield next_tokens
        if eos is not None and ended.all():
            return
        start = start + tokens.size(1) + (0 if image is None else N)
        tokens, image = next_tokens[:, None], None


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
        model.hidden(tokens, model.encode(image), prefix=torch.tensor([len(prompt)], device=image.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(looks).mean(0).cpu()


def attention_weights(attention, x, mask, rope, first=0):
    """softmax(q k^T / sqrt(D)) of an `Attention`, in float32: (B, H, T - first, T) for the queries from `first` on.

    x: (B, T, C); mask: a boolean tensor that ends in (T, T); rope: as the `Attention` takes it.
    """
    q = attention.q_proj(x[:, first:]).unflatten(-1, (attention.n_head, attention.head_dim)).transpose(1, 2)
    k = attention.k_proj(x).unflatten(-1, (attention.n_kv_head, attention.head_dim)).transpose(1, 2)  # (B, K, T, D)
    q, k = rotate(q, *(table[..., first:, :] for table in rope)), rotate(k, *rope)
    k = k.repeat_interleave(attention.n_head // attention.n_kv_head, dim=1)  # (B, H, T, D)
    scores = q.float() @ k.float().transpose(-1, -2) / attention.head_dim ** 0.5
    return scores.masked_fill(~mask[..., first:, :], -torch.inf).softmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Images and boxes

def read_image(path):
    """The picture at `path`, upright and in RGB. Raises UserError if there is none."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images need Pillow: pip install pillow") from None
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image = {path}: can't be read: {error}") from None


def to_rgb(image):
    """A PIL image of any mode in RGB: turned as its EXIF says, its transparency on white, 16 bits scaled to 8."""
    import numpy as np
    from PIL import Image, ImageOps
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow would cut all above 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixels(image, size):
    """A PIL image as (3, size, size) in [-1, 1], float32; resized without regard to its proportions, as SigLIP does."""
    import numpy as np
    from PIL import Image
    image = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # (H, W, 3) -> (3, H, W)


class Box(NamedTuple):
    """Pixels from the left and top edges; not rounded."""
    left: float
    top: float
    right: float
    bottom: float
    label: str


def parse_boxes(answer, width, height):
    """The boxes in an answer such as "<loc0256><loc0128><loc0768><loc0512> cat ; <loc...> dog", in pixels.

    An object's four locations are top, left, bottom, right. Segment tokens are skipped, and so is what is no box.
    """
    boxes = []
    for part in answer.split(";"):
        match = re.fullmatch(r"\s*" + 4 * r"<loc(\d{4})>" + r"(?:<seg\d{3}>)*([^<>]*)", part)
        if match and max(map(int, match.groups()[:4])) < 1024:
            top, left, bottom, right = (int(number) / 1024 for number in match.groups()[:4])
            boxes.append(Box(left * width, top * height, right * width, bottom * height, match[5].strip()))
    return boxes


def box_text(box, width, height):
    """The inverse of `parse_boxes`, for one box: its four location tokens and the label."""
    corners = (box.top / height, box.left / width, box.bottom / height, box.right / width)
    return "".join(LOCATIONS[min(1023, max(0, round(1024 * corner)))] for corner in corners) + f" {box.label}"


def draw_boxes(image, boxes):
    """A copy of a PIL image in RGB with the boxes and their labels on it."""
    from PIL import ImageDraw
    image = to_rgb(image)
    draw, line = ImageDraw.Draw(image), max(2, min(image.size) // 150)
    colors = ("red", "blue", "green", "darkorange", "purple", "teal")
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        color = colors[labels.index(box.label) % len(colors)]
        left, top, right, bottom = *map(min, box[:2], box[2:4]), *map(max, box[:2], box[2:4])
        draw.rectangle((left, top, right, bottom), outline=color, width=line)
        font_size = max(10, min(image.size) // 25)
        where = (left + line, top + line)
        draw.rectangle(draw.textbbox(where, box.label, font_size=font_size), fill=color)
        draw.text(where, box.label, fill="white", font_size=font_size)
    return image


def draw_attention(image, weights, prompt, tokens, panel=224, columns=5):
    """A picture of a PIL image and its prompt, followed by a heat map on the image for each token of the answer.

    weights: (A, N), of `image_attention`; each map is brightest at its own maximum. Beside a token stands the share of
    its attention that the image had. panel: width in pixels of one map.
    """
    from PIL import Image
    image = to_rgb(image).resize((panel, max(1, round(panel * image.height / image.width))))
    panels = [caption(image, prompt)]
    for row, token in zip(weights, tokens):
        panels.append(caption(heat_map(image, row), f"{token.strip() or repr(token)}  {row.sum():.0%}"))
    columns, (width, height) = min(columns, len(panels)), panels[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(panels) / columns) * height), "white")
    for i, picture in enumerate(panels):
        grid.paste(picture, (i % columns * width, i // columns * height))
    return grid


def heat_map(image, weights):
    """A PIL image in grey, and over it from red to yellow the weights (N,) of its patches, the largest opaque."""
    from PIL import Image, ImageOps
    side = math.isqrt(len(weights))
    heat = (weights / weights.max() * 255).round().byte().reshape(side, side)
    heat = Image.fromarray(heat.numpy()).resize(image.size)
    gray = ImageOps.grayscale(image).convert("RGB")
    return Image.composite(ImageOps.colorize(heat, "red", "yellow"), gray, heat)


def caption(image, text, margin=4, line=22):
    """A PIL image with a white margin and above it a line of text, all in pixels; text too long is cut off."""
    from PIL import Image, ImageDraw
    framed = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin + line), "white")
    framed.paste(image, (margin, margin + line))
    ImageDraw.Draw(framed).text((margin, margin), text, fill="black", font_size=14)
    return framed


# ----------------------------------------------------------------------------------------------------------------------
# Contrastive losses

class Gather(torch.autograd.Function):
    """(B, C) of each rank -> (W * B, C) on all, in the order of ranks; gradients return to the rank of their row."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x, across_ranks):
    """(everyone's rows, which of them is the first of x); ranks must have equally many."""
    if not across_ranks or not dist.is_initialized() or dist.get_world_size() == 1:
        return x, 0
    return Gather.apply(x), dist.get_rank() * len(x)


def sigmoid_loss(images, texts, log_scale, bias, block=1024, across_ranks=True):
    """SigLIP's loss (Zhai et al. 2023, algorithm 1): each pair of an image and a text is right or wrong by itself.

    images, texts: (B, C), row i of one belongs to row i of the other; any length. log_scale, bias: scalar parameters,
    in the paper log(10) and -10 at the start. Of the score matrix a rank holds its B images against `block` texts at a
    time, in the backward pass too. Under DDP the mean over ranks, and of the gradients, is that of one process.
    """
    images, (texts, first) = F.normalize(images, dim=-1), gather(F.normalize(texts, dim=-1), across_ranks)
    loss = 0.0
    for start in range(0, len(texts), block):
        loss = loss + checkpoint(pair_loss, images, texts[start:start + block], first - start, log_scale, bias,
                                 use_reentrant=False)
    return loss / len(images)


def pair_loss(images, texts, first, log_scale, bias):
    """The sum over all pairs; image i belongs to text first + i, if that is among these."""
    scores = images @ texts.T * log_scale.exp() + bias  # (B, block)
    rows, columns = (torch.arange(len(x), device=x.device) for x in (images, texts))
    right = columns == first + rows[:, None]  # (B, block)
    return -F.logsigmoid(torch.where(right, scores, -scores)).sum()


def softmax_loss(images, texts, log_scale, across_ranks=True):
    """CLIP's loss (Radford et al. 2021, figure 3): each image picks its text among all, each text its image.

    Arguments as in `sigmoid_loss`; log_scale starts at log(1 / 0.07).
    """
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    (all_images, first), (all_texts, _) = gather(images, across_ranks), gather(texts, across_ranks)
    right = first + torch.arange(len(images), device=images.device)
    image_loss = F.cross_entropy(images @ all_texts.T * log_scale.exp(), right)
    text_loss = F.cross_entropy(texts @ all_images.T * log_scale.exp(), right)
    return (image_loss + text_loss) / 2
