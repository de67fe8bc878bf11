"""The parts of a transformer (norms, MLPs, positions, attention, KV cache, block, trunk), and a GPT made of them.

    python train.py config/shakespeare_char.py      trains a GPT, also on a laptop's CPU; generate.py samples from it

Weights belong to modules; whatever changes from call to call (mask, rotation, cache, memory) is an argument. So one
block serves a GPT, a bidirectional encoder, an encoder-decoder, a vision transformer and a Gemma. They differ in their
config, which picks the parts (NORMS, MLPS, POSITIONS) and the sizes, and in the code around the trunk.

Axes: B batch, T query positions, S key positions, C channels (n_embd), H query heads, K key-value heads,
D head_dim, V vocabulary, A predicted positions.
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, check_choices, check_ranges, check_shape
from machine.attention import Dropout, attend, squared_relu, wide_linear
from positions import Rotary, Sinusoidal, rotate


@dataclass(frozen=True)
class TransformerConfig:
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_kv_head: int = 0  # key-value heads; 0: n_head; fewer: grouped-query attention; 1: multi-query attention
    head_dim: int = 0  # 0: n_embd // n_head
    n_hidden: int = 0  # width inside the MLP; 0: 4 * n_embd
    norm: str = "layernorm"  # a key of NORMS
    norm_eps: float = 1e-5
    mlp: str = "gelu"  # a key of MLPS
    block: str = "pre"  # a key of BLOCKS: where the norms are
    final_norm: bool = True  # a norm after the last block
    bias: bool = False  # biases in the linear layers and LayerNorms
    qkv_bias: bool = False  # biases in q_proj, k_proj and v_proj, even if bias = False
    qk_norm: bool = False  # a norm of each head's queries, and one of its keys
    dropout: float = 0.0
    cross: bool = False  # every block has a cross-attention layer, which reads the memory

    def __post_init__(self):
        check_ranges(self, n_layer=1, n_head=1, n_embd=1, n_kv_head=0, head_dim=0, n_hidden=0, dropout=0.0)
        check_shape(self.n_head if self.head_dim else self.n_embd, self.n_head, self.n_kv_head, self.dropout)
        check_choices(self, norm=NORMS, mlp=MLPS, block=BLOCKS)


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    vocab_size: int = 65
    block_size: int = 64  # context length: the most tokens that the model reads at once
    context: int = 0  # the context that a published model had before we kept fewer positions; 0: block_size
    positions: str = "learned"  # a key of POSITIONS
    rope_theta: float = 10000.0  # base of the wavelengths of rotary positions
    rope_scaling: dict = field(default_factory=dict)  # stretches them: see positions.py; {}: as they are
    tied: bool = True  # the embedding matrix is also the output head
    bigrams: bool = False  # add an embedding of each (previous token, token) pair; the table has vocab_size^2 rows

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, vocab_size=1, block_size=1)
        check_choices(self, positions=POSITIONS)
        head_dim = self.head_dim or self.n_embd // self.n_head
        if self.positions == "rotary" and head_dim % 2:
            raise UserError(f"head_dim = {head_dim}: rotary positions rotate pairs of channels, so it must be even")
        if self.bigrams and self.vocab_size > 512:
            raise UserError(f"bigrams = True: vocab_size = {self.vocab_size:,} is above 512; set bigrams = False")


class LayerNorm(nn.LayerNorm):
    def __init__(self, config):
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32 (Zhang and Sennrich 2019; the gain 1 + weight is Gemma's)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_embd))
        self.eps = config.norm_eps

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).type_as(x)


class PlainRMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, as in Llama: the same function, but the weight itself is the gain."""

    def __init__(self, config):
        super().__init__(config.n_embd, eps=config.norm_eps)


class HeadNorm(nn.RMSNorm):
    """The same for each head's queries or keys (..., D), in float32: QK-norm (Henry et al. 2020)."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


class MLP(nn.Module):
    """down(gelu(up(x))), with the tanh approximation of GELU, as in GPT-2, SigLIP and Gemma."""

    def __init__(self, config):
        super().__init__()
        n_hidden = config.n_hidden or 4 * config.n_embd
        self.up_proj = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.down_proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.down_proj(self.inner(x)))  # (B, T, C) -> (B, T, n_hidden) -> (B, T, C)

    def inner(self, x):
        return F.gelu(self.up_proj(x), approximate="tanh")


class GatedMLP(MLP):
    """down(gelu(gate(x)) * up(x)): GEGLU (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.n_embd, self.up_proj.out_features, bias=config.bias)

    def inner(self, x):
        return F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)


class SwiGLUMLP(GatedMLP):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), as in Llama."""

    def inner(self, x):
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class SquaredReLUMLP(MLP):
    """down(relu(up(x))^2) (So et al. 2021)."""

    def inner(self, x):
        return squared_relu(self.up_proj(x))


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "plain_rmsnorm": PlainRMSNorm}
MLPS = {"gelu": MLP, "geglu": GatedMLP, "swiglu": SwiGLUMLP, "relu2": SquaredReLUMLP}


# ----------------------------------------------------------------------------------------------------------------------
# Positions. Each class takes embedded tokens (B, T, C) and their positions, a slice or integers (T,) or (B, 1, T), and
# returns (x, rope): x is the tokens plus any position embedding, rope the (cos, sin) for Attention or None.

class Learned(nn.Embedding):
    def __init__(self, config):
        super().__init__(config.block_size, config.n_embd)

    def forward(self, x, positions):
        return x + self.weight[positions], None


POSITIONS = {"learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary}


def causal_mask(q_pos, kv_pos, prefix=0):
    """Boolean mask, True = may attend: each query sees the keys up to its own position, and the whole prefix.

    q_pos: (T,), kv_pos: (S,), positions of queries and keys. prefix: its length, or (B, 1, 1, 1), one length per row.
    Returns (T, S), or (B, 1, T, S) if the prefix differs per row.
    """
    return (kv_pos <= q_pos[:, None]) | (kv_pos < prefix)


# ----------------------------------------------------------------------------------------------------------------------
# Attention and blocks

class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017); with memory, cross-attention.

    mask: None (every query sees every key), "causal" (faster than the same mask as a tensor), or a boolean tensor of
    two or more dimensions that broadcasts to (B, H, T, S), True = may attend. rope: (cos, sin) that broadcast to
    (B, H, T, D). cache, start: see `KVCache.update`. memory: (B, S, C), the source of keys and values instead of x, or
    the result of `keys_values(memory)`.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_dim = config.head_dim or config.n_embd // config.n_head
        bias = config.bias or config.qkv_bias
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = HeadNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def forward(self, x, mask=None, rope=None, cache=None, start=0, memory=None):
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.n_head, self.head_dim))).transpose(1, 2)  # (B, H, T, D)
        k, v = memory if isinstance(memory, tuple) else self.keys_values(x if memory is None else memory)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, start)
        y = attend(q, k, v, mask, self.dropout.p if self.training else 0.0)
        return self.dropout(self.o_proj(y.transpose(1, 2).flatten(2)))  # (B, H, T, D) -> (B, T, C)

    def keys_values(self, source):
        """Keys and values of source (B, S, C), each (B, K, S, D). For a memory, compute them once and reuse them."""
        k = self.k_norm(self.k_proj(source).unflatten(-1, (self.n_kv_head, self.head_dim))).transpose(1, 2)
        v = self.v_proj(source).unflatten(-1, (self.n_kv_head, self.head_dim)).transpose(1, 2)
        return k, v


class KVCache:
    """Rotated keys and values of one layer, for up to `size` positions, in buffers at fixed addresses."""

    def __init__(self, attention, batch_size, size):
        weight = attention.k_proj.weight
        shape = (batch_size, attention.n_kv_head, size, attention.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))

    def update(self, k, v, start):
        """Stores k and v, each (B, K, T, D); returns the keys and values to attend to, each (B, K, S, D).

        start: an int, the first of T consecutive slots; then S is the number of slots filled so far. Or a tensor of T
        slots, which can change between replays of a CUDA graph; then S is `size`, and the mask must hide empty slots.
        """
        if isinstance(start, int):
            end = start + k.size(2)
            self.k[:, :, start:end] = k
            self.v[:, :, start:end] = v
            return self.k[:, :, :end], self.v[:, :, :end]
        self.k.index_copy_(2, start, k.to(self.k.dtype))
        self.v.index_copy_(2, start, v.to(self.v.dtype))
        return self.k, self.v


class Caches(list):
    """One KVCache per layer, and `last` (B, 1): the newest token of each row, which a GPT with bigrams needs."""

    def __init__(self, layers):
        super().__init__(layers)
        rows, _, self.size, _ = layers[0].k.shape
        self.last = torch.zeros(rows, 1, dtype=torch.long, device=layers[0].k.device)

    def reorder(self, rows, end=None):
        """Copies row rows[i], up to slot `end`, into row i, for every i at once. For beam search. rows: (B,)."""
        self.last.copy_(self.last[rows])
        for part in (buffer[:, :, :end] for layer in self for buffer in (layer.k, layer.v)):
            part.copy_(part.index_select(0, rows))  # faster than part[rows] on a CPU


class Block(nn.Module):
    """Pre-norm residual block: x + attention, [x + cross-attention to memory,] x + MLP."""

    def __init__(self, config):
        super().__init__()
        Norm = NORMS[config.norm]
        self.ln_1 = Norm(config)
        self.attn = Attention(config)
        self.ln_x = Norm(config) if config.cross else None
        self.cross_attn = Attention(config) if config.cross else None
        self.ln_2 = Norm(config)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x, mask=None, rope=None, cache=None, start=0, memory=None, memory_mask=None):
        assert (memory is None) == (self.cross_attn is None), "memory and cross=True belong together"
        x = x + self.attn(self.ln_1(x), mask, rope, cache, start)
        if memory is not None:
            x = x + self.cross_attn(self.ln_x(x), memory_mask, memory=memory)
        return x + self.mlp(self.ln_2(x))


class PostNormBlock(Block):
    """Post-norm block: norm(x + attention), [norm(x + cross-attention),] norm(x + MLP), as in Vaswani et al. 2017."""

    def forward(self, x, mask=None, rope=None, cache=None, start=0, memory=None, memory_mask=None):
        assert (memory is None) == (self.cross_attn is None), "memory and cross=True belong together"
        x = self.ln_1(x + self.attn(x, mask, rope, cache, start))
        if memory is not None:
            x = self.ln_x(x + self.cross_attn(x, memory_mask, memory=memory))
        return self.ln_2(x + self.mlp(x))


BLOCKS = {"pre": Block, "post": PostNormBlock}


class Transformer(nn.Module):
    """The trunk of every model: the blocks and, unless final_norm = False, a norm. (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config) if config.final_norm else nn.Identity()

    def forward(self, x, caches=None, memory=None, **per_call):
        """memory: (B, S, C), or the result of `remember(memory)`. per_call: further arguments of `Block.forward`."""
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            source = memory[i] if isinstance(memory, list) else memory
            x = block(x, cache=cache, memory=source, **per_call)
        return self.ln_f(x)

    def remember(self, memory):
        """Each block's cross-attention keys and values for a memory (B, S, C), so that they are computed only once."""
        return [tuple(part.contiguous() for part in block.cross_attn.keys_values(memory)) for block in self.blocks]

    def make_caches(self, batch_size, size):
        """Empty caches for `size` positions, with the dtype and device of the weights."""
        return Caches([KVCache(block.attn, batch_size, size) for block in self.blocks])


def all_blocks(model):
    """All blocks of a model, which may have several trunks."""
    return [module for module in model.modules() if isinstance(module, Block)]


@torch.no_grad()
def init_weights(model, generator=None, std=0.02, zero=False):
    """Initialises a model in place, like GPT-2. It draws on the CPU, so a seed gives the same weights on every device.

    | embeddings                                       | normal, std 0.02                            |
    | linear and convolution weights                   | normal, std                                 |
    | o_proj and down_proj weights (into the residual) | normal, std / sqrt(2 blocks); 0 if `zero`   |
    | biases, gains of the norms                       | 0, 1 (reset_parameters)                     |

    std: 0.02 suits a width of about 1000. For narrower models use 1 / sqrt(width), or activations become tiny.
    """
    n_layer = len(all_blocks(model))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            scale = 0.02 if isinstance(module, nn.Embedding) else std
            if name.endswith(("o_proj", "down_proj")):
                scale *= 0 if zero else (2 * n_layer) ** -0.5
            drawn = torch.empty(module.weight.shape, device="cpu").normal_(0.0, scale, generator=generator)
            module.weight.copy_(drawn)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


# ----------------------------------------------------------------------------------------------------------------------
# GPT

def predict(head, x, targets=None, places=None, smoothing=False):
    """Float32 logits of x: (B, T, V); or, given targets (B, T), the cross-entropy of each, in nats and in their shape.

    x: (B, T, C). places: (B, A), the positions to predict at, None for all; then A replaces T in logits and targets.
    Only these positions go through the head: with a large vocabulary, logits take most of the memory. With smoothing,
    returns (cross-entropies, the mean over the vocabulary of -log p for each): a smoothed loss is a mean of the two.
    """
    if places is not None:
        x = x.gather(1, places[..., None].expand(-1, -1, x.size(-1)))  # (B, T, C) -> (B, A, C)
    logits = head(x)
    if targets is None:
        return logits
    logp = logits.log_softmax(-1)
    nats = F.nll_loss(logp.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (nats, -logp.mean(-1)) if smoothing else nats


class GPT(nn.Module):
    """Decoder-only language model: embeddings, positions, trunk, output head. `init_weights` sets its weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = POSITIONS[config.positions](config)
        self.bigrams = nn.Embedding(config.vocab_size**2, config.n_embd) if config.bigrams else None
        self.dropout = Dropout(config.dropout)
        self.transformer = Transformer(config)
        self.head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, tokens, targets=None, places=None):
        """tokens: (B, T). For targets, places and the returned tensor see `predict`."""
        return predict(self.logits, self.hidden(tokens), targets, places)

    def hidden(self, tokens, caches=None, start=0):
        """The trunk's output (B, T, C) for tokens (B, T), with causal attention.

        caches: from `make_caches`; they hold the tokens before `start` and get these too. start: an int, the first
        token's position (ValueError beyond block_size), or an unchecked tensor (T,) of them: see `KVCache.update`.
        """
        x = self.embed(tokens)  # (B, T, C)
        if self.bigrams is not None:
            x = x + self.bigrams(self.pairs(tokens, caches, start))
        positions, mask = self.positions_and_mask(tokens, caches, start)
        x, rope = self.wpe(x, positions)
        return self.transformer(self.dropout(x), caches, mask=mask, rope=rope, start=start)

    def embed(self, tokens):
        return self.wte(tokens)  # (B, T) -> (B, T, C)

    def positions_and_mask(self, tokens, caches, start):
        """(positions, mask) of tokens (B, T): for self.wpe, and for causal attention. Arguments: see `hidden`."""
        if not isinstance(start, int):
            return start, causal_mask(start, torch.arange(caches.size, device=tokens.device))
        end = start + tokens.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens exceed block_size = {self.config.block_size}")
        if tokens.size(1) == 1:  # the newest token sees every key, so it needs no mask
            return slice(start, end), None
        if start == 0:
            return slice(start, end), "causal"
        keys = torch.arange(end, device=tokens.device)
        return slice(start, end), causal_mask(keys[start:], keys)

    def pairs(self, tokens, caches, start):
        """Indices (B, T) into the bigram table: previous token (0 at the start) * V + token. Sets caches.last."""
        before = torch.zeros_like(tokens[:, :1])
        if caches:
            first = start if isinstance(start, int) else start[:1]
            before = caches.last * (first > 0)
            caches.last.copy_(tokens[:, -1:])
        return torch.cat((before, tokens[:, :-1]), dim=1) * self.config.vocab_size + tokens

    def logits(self, x):
        """Float32 logits, (..., C) -> (..., V)."""
        return wide_linear(x, self.wte if self.head is None else self.head).float()

    def make_caches(self, batch_size, size=None):
        return self.transformer.make_caches(batch_size, size or self.config.block_size)
