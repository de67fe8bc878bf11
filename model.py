"""Transformers from a few blocks: norms, attention, MLPs, the block, the trunk; GPT and generation.

    python train.py config/shakespeare_char.py      trains a GPT (on a laptop's CPU too)
    python sample.py --out_dir=out                  samples it

What has weights is a module; what varies from call to call (mask, rotation, cache, memory) is an argument.
So one block serves a GPT, a bidirectional encoder, an encoder-decoder, a vision transformer and a Gemma:
they differ in the parts they name (NORMS, MLPS), in a few numbers, and in what they do around the trunk.

Axes: B batch, T query positions, S key positions, C channels (n_embd), H query heads, K key-value heads,
D head_dim, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import decode
from configurator import UserError, check_ranges, check_shape
from dropout import CausalAttention, Dropout, drop

MAX_BIGRAM_VOCABULARY = 512


@dataclass(frozen=True)
class TransformerConfig:
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_kv_head: int = 0  # key-value heads; 0: n_head. Fewer is grouped-query attention (1: multi-query)
    head_dim: int = 0  # 0: n_embd // n_head
    n_hidden: int = 0  # width inside the MLP; 0: 4 * n_embd
    norm: str = "layernorm"  # a key of NORMS
    norm_eps: float = 1e-5
    mlp: str = "gelu"  # a key of MLPS
    bias: bool = False  # in the linear layers and LayerNorms
    dropout: float = 0.0
    cross: bool = False  # a cross-attention sub-layer in every block

    def __post_init__(self):
        check_ranges(self, n_layer=1, n_head=1, n_embd=1, n_kv_head=0, head_dim=0, n_hidden=0, dropout=0.0)
        check_shape(self.n_head if self.head_dim else self.n_embd, self.n_head, self.n_kv_head, self.dropout)
        for field, table in (("norm", NORMS), ("mlp", MLPS)):
            if getattr(self, field) not in table:
                raise UserError(f"{field} = {getattr(self, field)!r}: must be one of {', '.join(table)}")


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    vocab_size: int = 65
    block_size: int = 64  # most positions the model can look at
    positions: str = "learned"  # or rotary
    tied: bool = True  # the embedding matrix is also the output head
    bigrams: bool = False  # an embedding of each pair of neighbours too: vocab_size^2 rows

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, vocab_size=1, block_size=1)
        if self.positions not in ("learned", "rotary"):
            raise UserError(f"positions = {self.positions!r}: must be learned or rotary")
        if self.positions == "rotary" and (head_dim := self.head_dim or self.n_embd // self.n_head) % 2:
            raise UserError(f"head_dim = {head_dim}: rotary positions turn pairs, so it must be even")
        if self.bigrams and self.vocab_size > MAX_BIGRAM_VOCABULARY:
            raise UserError(f"bigrams = True: a vocabulary of {self.vocab_size:,} has {self.vocab_size**2:,} pairs, and"
                            f" from more than {MAX_BIGRAM_VOCABULARY} tokens on they are too many")


# ----------------------------------------------------------------------------------------------------------------------
# Parts

class LayerNorm(nn.LayerNorm):
    def __init__(self, config):
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32 (Zhang and Sennrich 2019; the gain's form is Gemma's)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_embd))
        self.eps = config.norm_eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).type_as(x)


class MLP(nn.Module):
    """down(gelu(up(x))), with the tanh form of GELU that GPT-2, SigLIP and Gemma share."""

    def __init__(self, config):
        super().__init__()
        n_hidden = config.n_hidden or 4 * config.n_embd
        self.up_proj = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.down_proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.down_proj(self.activate(self.up_proj(x))))

    def activate(self, up):
        return F.gelu(up, approximate="tanh")


class GatedMLP(MLP):
    """down(gelu(gate(x)) * up(x)): GEGLU (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.n_embd, self.up_proj.out_features, bias=config.bias)

    def forward(self, x):
        return self.dropout(self.down_proj(self.activate(self.up_proj(x), self.gate_proj(x))))

    def activate(self, up, gate):
        return F.gelu(gate, approximate="tanh") * up


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2, in a third of the passes over memory that its parts would take backward."""

    @staticmethod
    def forward(ctx, x):
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        positive, = ctx.saved_tensors
        return (grad * positive).mul_(2)


class SquaredReLUMLP(MLP):
    """down(relu(up(x))^2) (So et al. 2021)."""

    def activate(self, up):
        return SquaredReLU.apply(up) if up.requires_grad else F.relu(up).square_()


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
MLPS = {"gelu": MLP, "geglu": GatedMLP, "relu2": SquaredReLUMLP}


def rotary(positions, head_dim, theta=10000.0):
    """(cos, sin) for rotary positions (Su et al. 2021), in the half-split layout; float32.

    positions: (..., T) integers; returns two tensors of (..., T, D).
    """
    rates = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)  # (D/2,)
    angles = positions[..., None].float() * rates  # (..., T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., T, D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns each pair (x[i], x[i + D/2]) by its position's angle. x: (B, H, T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def causal_mask(q_pos, kv_pos, prefix=0):
    """Boolean mask, True = may look: no later position, save inside a prefix that all of it may see.

    q_pos: (T,), kv_pos: (S,) positions; prefix: its length, or a (B, 1, 1, 1) tensor of lengths per row.
    Returns (T, S), or (B, 1, T, S) for a prefix per row.
    """
    return (kv_pos <= q_pos[:, None]) | (kv_pos < prefix)


def continuing_mask(start, end, device):
    """The `mask` of Attention for the tokens from `start` to `end`, each of which sees all up to itself."""
    if end == start + 1:
        return None  # one token sees all there is
    if start == 0:
        return "causal"
    pos = torch.arange(end, device=device)
    return causal_mask(pos[start:], pos)


def attend(q, k, v, mask, dropout=0.0):
    """softmax(q k^T / sqrt(D)) v by the fastest kernel there is. q: (B, H, T, D), k, v: (B, K, S, D); mask as below."""
    causal, gqa = isinstance(mask, str) and mask == "causal", q.size(1) != k.size(1)
    how = dict(attn_mask=None if causal else mask, is_causal=causal, dropout_p=dropout, enable_gqa=gqa)
    if q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, **how)
    if causal and q.dtype == torch.bfloat16 and q.shape == k.shape and q.size(2) <= 512:
        future = torch.full(2 * q.shape[2:3], -torch.inf, dtype=q.dtype).triu_(1)
        scores = torch.baddbmm(future, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.size(3) ** -0.5)
        weights = drop(scores.softmax(-1), dropout) if dropout else scores.softmax(-1)
        return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)  # two to four times as fast as the fused kernel
    if causal and dropout and q.shape == k.shape:
        return CausalAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), dropout).view(q.shape)
    if q.size(2) * q.size(3) >= 2**14:
        return F.scaled_dot_product_attention(q, k, v, **how)
    with torch.autocast("cpu", enabled=False):  # of short rows the backward pass in bfloat16 is up to six times slower
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **how).type_as(q)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017); with memory, cross-attention.

    mask: None (all see all), "causal" (which keeps the fused kernel's fast path), or a boolean tensor of two or
    more dimensions that broadcasts to (B, H, T, S), True = may look.
    rope: (cos, sin) that broadcast to (B, H, T, D). cache, start: a KVCache and the first of the T slots to write; then
    S counts the slots filled so far.
    memory: (B, S, C), where keys and values come from instead of x.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_dim = config.head_dim or config.n_embd // config.n_head
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=config.bias)
        self.k_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=config.bias)
        self.v_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=config.bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, mask=None, rope=None, cache=None, start=0, memory=None):
        source = x if memory is None else memory
        q = self.q_proj(x).unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(source).unflatten(-1, (self.n_kv_head, self.head_dim)).transpose(1, 2)  # (B, K, S, D)
        v = self.v_proj(source).unflatten(-1, (self.n_kv_head, self.head_dim)).transpose(1, 2)  # (B, K, S, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, start)
        y = attend(q, k, v, mask, self.dropout.p if self.training else 0.0)
        return self.dropout(self.o_proj(y.transpose(1, 2).flatten(2)))  # (B, H, T, D) -> (B, T, C)


class KVCache:
    """The keys and values of one layer for up to `size` positions, in buffers that never move.

    Keys are stored rotated, and once per key-value head.
    """

    def __init__(self, attention, batch_size, size):
        weight = attention.k_proj.weight
        shape = (batch_size, attention.n_kv_head, size, attention.head_dim)
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # (B, K, S, D)
        self.v = torch.zeros_like(self.k)

    def update(self, k, v, start):
        """Writes k, v: (B, K, T, D) into the slots from `start` on, and returns all that are filled, (B, K, S, D)."""
        end = start + k.size(2)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


class Block(nn.Module):
    """Pre-norm residual block: x + attention, [x + cross-attention to memory,] x + MLP.

    Raises ValueError when memory is passed to a block built without cross-attention, or is missing in one with it.
    """

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
        if (memory is None) != (self.cross_attn is None):
            raise ValueError("memory and cross=True belong together: this block has one of them")
        x = x + self.attn(self.ln_1(x), mask, rope, cache, start)
        if memory is not None:
            x = x + self.cross_attn(self.ln_x(x), memory_mask, memory=memory)
        return x + self.mlp(self.ln_2(x))


def blocks(model):
    """All blocks of a model, of all its trunks."""
    return [module for module in model.modules() if isinstance(module, Block)]


class Transformer(nn.Module):
    """The trunk of every model: the blocks and the final norm. (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config)

    def forward(self, x, caches=None, **per_call):
        if caches and caches.decoder and caches.decoder.takes(x, per_call.get("mask")):
            return caches.decoder(x, **per_call)
        return self.run(x, caches, **per_call)

    def run(self, x, caches=None, **per_call):
        """`forward`, block by block in any case."""
        for i, block in enumerate(self.blocks):
            x = block(x, cache=caches[i] if caches else None, **per_call)
        return self.ln_f(x)

    def make_caches(self, batch_size, size):
        """Caches of the weights' dtype and device, to be filled from position 0 on."""
        caches = Caches(KVCache(block.attn, batch_size, size) for block in self.blocks)
        if Decoder.fits(self):
            plain = Decoder(self, caches)
            candidates = filter(None, (decode.compiled(self, caches, plain), plain))
            caches.decoder = next((decoder for decoder in candidates if agrees(decoder, self, caches)), None)
        return caches


@torch.no_grad()
def agrees(decoder, trunk, caches):
    """Whether two steps of the decoder give the trunk's numbers, as they don't once somebody has changed a block."""
    (B, _, size, D), dtype, device = caches[0].k.shape, caches[0].k.dtype, caches[0].k.device
    T, generator = min(2, size), torch.Generator().manual_seed(0)
    x = torch.randn(B, T, trunk.config.n_embd, generator=generator).to(device, dtype)
    angles = torch.randn(T, (D + 1) // 2, generator=generator).repeat(1, 2)[:, :D].to(device)
    cos, sin = angles.cos(), angles.sin()
    expected = trunk.run(x, caches, mask=continuing_mask(0, T, device), rope=(cos, sin)).float()
    found = [decoder(x[:, t:t + 1], rope=(cos[t:t + 1], sin[t:t + 1]), start=t).float() for t in range(T)]
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    return (torch.cat(found, dim=1) - expected).norm() <= tolerance * expected.norm()


class Caches(list):
    """One KVCache per layer; with them the decoder of short steps, or None, and of a GPT that needs these (cos, sin) of
    all positions and the last token of each row, (B, 1).
    """

    decoder = rope = last = None


class Decoder:
    """A trunk written out for one new token per row: the same numbers from the same weights and caches, sooner.

    In so small a step, calling modules and looking up their parts takes longer than computing. So all is looked up
    before, and no module is called. It is used where `agrees` finds that the numbers are the same.
    """

    @classmethod
    def fits(cls, trunk):
        """Whether the trunk has nothing that this class does not know, such as cross-attention or LoRA."""
        kinds = {Transformer, nn.ModuleList, nn.Linear, Dropout, Block, Attention, *NORMS.values(), *MLPS.values()}
        return not trunk.training and all(type(m) in kinds for m in trunk.modules()) and not trunk.blocks[0].cross_attn

    def __init__(self, trunk, caches):
        self.ln_f, self.layers = trunk.ln_f.forward, []
        for block, cache in zip(trunk.blocks, caches):
            a, mlp = block.attn, block.mlp
            ups = [mlp.up_proj, mlp.gate_proj] if isinstance(mlp, GatedMLP) else [mlp.up_proj]
            qkv, o, ups, down = ([(linear.weight, linear.bias) for linear in group]
                                 for group in ([a.q_proj, a.k_proj, a.v_proj], [a.o_proj], ups, [mlp.down_proj]))
            self.layers.append((block.ln_1.forward, *qkv, cache, *o, block.ln_2.forward, ups, mlp.activate, *down))
        self.head_dim, self.gqa = a.head_dim, a.n_kv_head != a.n_head

    def takes(self, x, mask):
        return x.size(1) == 1

    def __call__(self, x, mask=None, rope=None, start=0):
        """(B, 1, C) -> (B, 1, C) as the trunk itself; arguments as Attention's."""
        x, shape = x[:, 0], (len(x), -1, 1, self.head_dim)
        for ln_1, q_proj, k_proj, v_proj, cache, o_proj, ln_2, ups, activate, down_proj in self.layers:
            y = ln_1(x)  # (B, C)
            q = F.linear(y, *q_proj).view(shape)  # (B, H, 1, D)
            k = F.linear(y, *k_proj).view(shape)  # (B, K, 1, D)
            v = F.linear(y, *v_proj).view(shape)  # (B, K, 1, D)
            if rope is not None:
                q, k = rotate(q, *rope), rotate(k, *rope)
            k, v = cache.update(k, v, start)  # (B, K, S, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.gqa)
            x = x + F.linear(y.flatten(1), *o_proj)
            y = ln_2(x)
            x = x + F.linear(activate(*[F.linear(y, *up) for up in ups]), *down_proj)
        return self.ln_f(x)[:, None]


def init_weights(model, n_layer, generator=None, std=0.02, zero=False):
    """GPT-2's initialisation, drawn on the CPU, so that a seed gives the same weights on every device.

    | parameter                                        | rule                          |
    |--------------------------------------------------|-------------------------------|
    | embeddings                                       | normal, std 0.02              |
    | linear and convolution weights                   | normal, std                   |
    | o_proj and down_proj weights (into the residual) | normal, std / sqrt(2 n_layer) |
    | biases                                           | 0                             |
    | LayerNorm, RMSNorm                               | gain 1                        |

    std: GPT-2's 0.02 fits widths around 1000; 1 / sqrt(width) keeps the signals of narrower models alive.
    zero: what leads into the residual starts at 0, so that every block starts by adding nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            scale = 0.02 if isinstance(module, nn.Embedding) else std
            if name.endswith(("o_proj", "down_proj")):
                scale *= 0 if zero else (2 * n_layer) ** -0.5
            drawn = torch.empty(module.weight.shape, device="cpu").normal_(0.0, scale, generator=generator)
            with torch.no_grad():
                module.weight.copy_(drawn)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.zeros_(module.weight)


# ----------------------------------------------------------------------------------------------------------------------
# GPT

class GPT(nn.Module):
    """Decoder-only language model, with learned positions or rotary ones.

    The parameters are uninitialised until `init_weights` or a checkpoint fills them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.bigrams = nn.Embedding(config.vocab_size**2, config.n_embd) if config.bigrams else None
        self.dropout = Dropout(config.dropout)
        self.transformer = Transformer(config)
        self.head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, tokens, targets=None, caches=None, start=0):
        """Logits (B, T, V) in float32; given targets (B, T), their mean cross-entropy in nats instead.

        A target of -100 is not scored. caches, start: as in `hidden`.
        """
        logits = self.logits(self.hidden(tokens, caches, start))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def hidden(self, tokens, caches=None, start=0):
        """The trunk's output (B, T, C) for tokens (B, T).

        caches, start: those of `make_caches`, which hold the `start` tokens before these; these are written to them.
        Raises ValueError for more tokens than block_size.
        """
        end = start + tokens.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size = {self.config.block_size}")
        x, rope = self.wte(tokens), None  # (B, T, C)
        if self.bigrams:
            x = x + self.bigrams(self.pairs(tokens, caches, start))
        if self.wpe:
            x = x + self.wpe.weight[start:end]
        else:
            rope = caches.rope if caches else self.rope(end, tokens.device)
            rope = [turn[start:end] for turn in rope]  # (T, D) each
        mask = continuing_mask(start, end, tokens.device)
        return self.transformer(self.dropout(x), caches, mask=mask, rope=rope, start=start)

    def pairs(self, tokens, caches, start):
        """Numbers of each token with the one before it, (B, T); before the first of all stands token 0."""
        before = caches.last if caches and start else torch.zeros_like(tokens[:, :1])
        if caches:
            caches.last = tokens[:, -1:]
        return torch.cat((before, tokens[:, :-1]), dim=1) * self.config.vocab_size + tokens

    def logits(self, x):
        return F.linear(x, (self.head or self.wte).weight).float()  # (B, T, C) -> (B, T, V)

    def rope(self, size, device):
        return rotary(torch.arange(size, device=device), self.transformer.blocks[0].attn.head_dim)

    def make_caches(self, batch_size, size=None):
        size = size or self.config.block_size
        caches = self.transformer.make_caches(batch_size, size)
        caches.rope = None if self.wpe else self.rope(size, caches[0].k.device)
        return caches


def count_parameters(model):
    """All parameters, those of positions included."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model, block_size):
    """FLOPs of one training token, forward and backward: 6 per weight in a matrix product, 12 L H D T of attention.

    Source: Chowdhery et al. 2022 (PaLM), appendix B. What is looked up, not multiplied, is not counted: positions,
    pairs, and the embeddings where the head is another matrix.
    """
    config, names = model.config, ["wpe", "bigrams"] + ["wte"] * (getattr(model, "head", None) is not None)
    looked_up = [part for name in names if (part := getattr(model, name, None)) is not None]
    n = count_parameters(model) - sum(part.weight.numel() for part in looked_up)
    width = config.n_head * (config.head_dim or config.n_embd // config.n_head)
    return 6 * n + 12 * config.n_layer * width * block_size


# ----------------------------------------------------------------------------------------------------------------------
# Generation

def pick_tokens(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token per row, from softmax(logits / temperature); temperature 0 takes the likeliest.

    logits: (B, V). top_k: only the k likeliest (0: all). top_p: of these, only the fewest likeliest whose
    probabilities reach p together (Holtzman et al. 2019). Returns (B,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    order = None
    if 0 < top_k < logits.size(-1) or top_p < 1:
        logits, order = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # likeliest first
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the token that crosses top_p stays
    # With e ~ Exp(1), argmax(p / e) is a draw from p: no normalising, no waiting for the device.
    choice = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)  # (B, 1)
    return (choice if order is None else order.gather(-1, choice)).squeeze(-1)


@torch.inference_mode()
def generate(model, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Yields max_new_tokens times the next token of every row, (B,), continuing tokens: (B, T).

    Of a prompt longer than block_size the last block_size tokens count. Learned positions end at block_size:
    whenever the window is full, its last half is encoded anew from position 0 and generation goes on from there.
    So each token sees at least the block_size / 2 tokens before it, and the cost per token stays flat.
    """
    block_size = model.config.block_size
    caches, start = model.make_caches(tokens.size(0)), 0
    window = [tokens[:, -block_size:]]  # in pieces; the caches hold all of it but the last one, `start` tokens
    for _ in range(max_new_tokens):
        x = model.hidden(window[-1], caches, start)[:, -1]  # (B, C)
        next_tokens = pick_tokens(model.logits(x), temperature, top_k, top_p, generator)  # (B,)
        yield next_tokens
        start += window[-1].size(1)
        window.append(next_tokens[:, None])
        if start == block_size:
            window, start = [torch.cat(window, dim=1)[:, -max(1, block_size // 2):]], 0
