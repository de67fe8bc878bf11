"""Models of images and text, built from model.py's blocks and vit.py: SigLIP, Gemma and PaliGemma.

    python sample.py --init_from=google/paligemma-3b-pt-224 --image=photo.jpg --prompt="caption en"
    python sample.py --init_from=FOLDER --image=photo.jpg --prompt="detect cat" --device=cpu --dtype=bfloat16

PaliGemma (Beyer et al. 2024) reads a sequence of vectors: N for the image, then one for each token of the text.

    image x N | <bos> prefix \\n | answer <eos>

Every row starts with its image. So it needs no placeholder tokens, and padding, if any, comes after it.

Axes: B batch, T query positions, S key positions, C channels (n_embd), N image patches, V vocabulary,
A predicted positions, H and W height and width in pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import check_choices, check_ranges
from model import GPT, GPTConfig, Transformer, TransformerConfig, causal_mask, predict
from vit import ViT, ViTConfig, set_parts

# ----------------------------------------------------------------------------------------------------------------------
# Configurations

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


# ----------------------------------------------------------------------------------------------------------------------
# Models

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
