"""Attention, dropout, squared ReLU and the head of a large vocabulary, each by the fastest kernel for the device.

`attend`, `Dropout`, `squared_relu` and `wide_linear` compute one formula each. On a GPU, PyTorch's own kernels are the
fastest, given fitting shapes. For training on a CPU that depends on dtype and shape, so `attend` chooses among the
functions below it.

Axes: B batch, T query positions, S key positions, H query heads, K key-value heads, D head_dim, N batch x heads,
C channels, V vocabulary.
"""

import math
import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F

SHORT = 512  # up to this T, two batched products are faster than the fused kernel (bfloat16 on a CPU)
LONG = 2**14  # from this T x D on, the fused kernel's backward pass is fast (bfloat16 on a CPU)
TILE = 2**18  # scores in memory at a time, in attention with dropout: 1 MB of float32, which fits into the caches
ROWS = 128  # query positions per tile; a tile leaves out the keys after its last query. Shorter texts need no tiles
MULTIPLE = 64  # a GPU multiplies matrices fastest if their sizes are multiples of it
WIDE = 512  # up to this V, a head's product takes too little time to matter
MANY = 4096  # for fewer rows, as in sampling, padding the head's weights takes longer than it saves


def attend(q, k, v, mask, dropout=0.0):
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D), where each weight of v is dropped with probability `dropout`.

    q: (B, H, T, D); k, v: (B, K, S, D), where each key-value head serves H / K query heads.
    mask: None, "causal", or a boolean tensor that broadcasts to (B, H, T, S), True = may attend.
    """
    if q.device.type != "cpu" or not q.requires_grad:
        return fused(q, k, v, mask, dropout)
    causal = isinstance(mask, str) and q.shape == k.shape
    if causal and q.dtype == torch.bfloat16 and q.size(2) <= SHORT:
        return batched_products(q, k, v, mask, dropout)
    if causal and dropout and q.size(2) > ROWS:
        return TiledAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), dropout).view(q.shape)
    if dropout and q.size(1) == k.size(1):  # the fused kernel has no dropout on a CPU
        with torch.autocast("cpu", enabled=False):
            return batched_products(q.float(), k.float(), v.float(), mask, dropout).type_as(q)
    if q.size(2) * q.size(3) >= LONG:
        return fused(q, k, v, mask, dropout)
    with torch.autocast("cpu", enabled=False):  # for short sequences, a bfloat16 backward is up to 6x slower
        return fused(q.float(), k.float(), v.float(), mask, dropout).type_as(q)


def fused(q, k, v, mask, dropout):
    """`attend` by the kernel that PyTorch chooses; for one query on a GPU, by that or `one_query`."""
    causal = isinstance(mask, str)
    if causal:
        mask = None
    elif mask is not None and q.is_cuda:
        mask = bias_of(mask, q.dtype)
        if q.size(2) == 1 and not q.requires_grad and (mask.dim() == 2 or mask.size(-3) == 1) and not prefers_cudnn():
            return one_query(q, k, v, mask)
    if q.size(1) != k.size(1) and mask is not None and (q.size(2) == 1 or q.is_cuda):
        return grouped(q, k, v, mask, dropout)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=q.size(1) != k.size(1))


def prefers_cudnn():
    return not torch.compiler.is_compiling() and torch.backends.cuda.cudnn_sdp_enabled()


def one_query(q, k, v, mask):
    """`attend` for T = 1, by two products for all rows and heads. mask: boolean or from `bias_of`, no mask per head.

    On an H200, in bfloat16, with 6 heads of 64 and 256 positions, PyTorch's own masked kernel takes 15 us for 1 row and
    71 us for 256; the two products take 9 and 52 us; cuDNN takes 7 and 34 us, but 0.9 s to plan. Scores are rounded to
    the dtype of q, which a fused kernel does not do.
    """
    (B, H, _, D), (_, K, S, _) = q.shape, k.shape
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    if mask.dim() > 2:
        mask = mask.expand(B, K, 1, S).reshape(B * K, 1, S)
    scores = torch.baddbmm(mask, q.reshape(B * K, H // K, D), k.flatten(0, 1).mT, alpha=D ** -0.5)  # (B K, H / K, S)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(q.shape)


BIASES = []  # the last two of `bias_of`: (weak reference to the mask, its bias)


def bias_of(mask, dtype):
    """A mask as numbers to add to scores: 0, and -inf where it is False; in aligned rows, as the GPU's kernels want it.

    All layers of a pass share a mask, and those of cross-attention another, so the last two results are kept.
    """
    if torch.compiler.is_compiling():
        return mask
    for known, bias in BIASES:
        if known() is mask and bias.dtype == dtype:
            return bias
    S = mask.size(-1)
    aligned = torch.zeros(*mask.shape[:-1], -(-S // 8) * 8, dtype=dtype, device=mask.device)
    bias = aligned[..., :S].masked_fill_(~mask, -math.inf)
    BIASES[:] = [*BIASES[-1:], (weakref.ref(mask), bias)]
    return bias


def grouped(q, k, v, mask, dropout):
    """`attend` for K < H and a mask: the query heads that share a key-value head become rows of one head.

    With enable_gqa and a mask, PyTorch's fast kernels for CUDA stand aside, and its slow one computes all scores in
    memory. On a CPU, this is 1.2 to 2.6 times as fast for one query, and no faster for many.
    """
    (B, H, T, D), K = q.shape, k.size(1)
    if mask.dim() > 2 and mask.size(-3) > 1:  # a mask per head
        mask = mask.expand(B, H, T, -1).reshape(B, K, H // K * T, -1)
    elif T > 1 and mask.size(-2) > 1:  # a mask per query: a copy for each head of a group
        mask = mask.unsqueeze(-3).expand(*mask.shape[:-2], H // K, -1, -1).flatten(-3, -2)
    y = F.scaled_dot_product_attention(q.reshape(B, K, H // K * T, D), k, v, mask, dropout)
    return y.reshape(B, H, T, D)


def batched_products(q, k, v, mask, dropout):
    """Attention by two batched products. On a CPU: in bfloat16 2 to 4 times as fast as the fused kernel; with dropout,
    which that kernel lacks there, 1.3 to 1.5 times as fast as what PyTorch computes instead."""
    (B, H, T, D), S = q.shape, k.size(2)
    if mask is None:
        hidden = torch.zeros(1, 1, 1, dtype=q.dtype)
    elif isinstance(mask, str):
        hidden = torch.full((T, S), -torch.inf, dtype=q.dtype).triu_(1)
    else:  # a finite number, or a query that sees nothing would become NaN
        hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -1e30).expand(B, H, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(hidden, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=D ** -0.5)  # (N, T, S)
    weights = scores.softmax(-1)
    if dropout:
        weights = drop(weights, dropout)
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)


class TiledAttention(torch.autograd.Function):
    """Causal attention with dropout on a CPU, tile by tile, in float32: (N, T, D) -> (N, T, D).

    PyTorch's fused kernel has no dropout on a CPU. Here, a tile of scores fits into the CPU's caches. The backward pass
    computes the tiles again, as FlashAttention does (Dao et al. 2022, algorithm 4), so no T x T floats are stored.
    """

    @staticmethod
    def forward(ctx, q, k, v, p):
        out, kept = torch.empty_like(q), torch.zeros(*q.shape[:2], q.size(1), dtype=torch.bool)
        with torch.autocast("cpu", enabled=False):
            for heads, rows, seen, weights in tiles(q, k):
                keep = draw_kept(weights.shape, p)
                kept[heads, rows, seen] = keep
                weights.mul_(keep.float())
                out[heads, rows] = torch.bmm(weights, v[heads, seen].float()).div_(1 - p)
        ctx.save_for_backward(q, k, v, out, kept)
        ctx.p = p
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, kept = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(q.shape) for _ in range(3))  # float32, because they are sums
        for heads, rows, seen, weights in tiles(q, k):
            g = grad[heads, rows].float()
            keep = kept[heads, rows, seen].float().div_(1 - ctx.p)
            inner = (g * out[heads, rows]).sum(-1, keepdim=True)  # sum over the keys of weight times its gradient
            d_weights = torch.bmm(g, v[heads, seen].float().mT).mul_(keep)
            d_scores = d_weights.sub_(inner).mul_(weights).mul_(q.size(-1) ** -0.5)
            dv[heads, seen] += torch.bmm(weights.mul_(keep).mT, g)
            dq[heads, rows] = torch.bmm(d_scores, k[heads, seen].float())
            dk[heads, seen] += torch.bmm(d_scores.mT, q[heads, rows].float())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def tiles(q, k):
    """Yields tiles: slices of N, of query positions and of key positions, and the causal attention weights, float32."""
    N, T, D = q.shape
    future = torch.full((T, T), -math.inf).triu_(1)
    count = max(1, TILE // (min(T, ROWS) * T))
    for first in range(0, N, count):
        heads = slice(first, first + count)
        for top in range(0, T, ROWS):
            rows, seen = slice(top, min(top + ROWS, T)), slice(0, min(top + ROWS, T))
            scores = torch.baddbmm(future[rows, seen], q[heads, rows].float(), k[heads, seen].float().mT,
                                   alpha=D ** -0.5)
            yield heads, rows, seen, scores.softmax(-1)


# ----------------------------------------------------------------------------------------------------------------------

class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014), faster than nn.Dropout on a CPU."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return drop(x, self.p) if x.device.type == "cpu" else super().forward(x)


def drop(x, p):
    """A CPU tensor x, with each element set to 0 with probability p, or else divided by 1 - p."""
    return x * draw_kept(x.shape, p).to(x.dtype).mul_(1 / (1 - p))


def draw_kept(shape, p):
    """A boolean tensor, False with probability p (rounded to 16 bits), drawn from PyTorch's global generator.

    On a CPU, PyTorch draws random numbers one by one in one thread. So each 64-bit number serves four elements here.
    """
    n = math.prod(shape)
    words = torch.empty(-(-n // 4), dtype=torch.int64).random_(-2**63, None)
    threshold = min(round(p * 2**16) - 2**15, 2**15 - 1)
    return words.view(torch.int16)[:n].view(shape) >= threshold


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2. Its backward pass reads and writes a third as much memory as those of relu and square."""

    @staticmethod
    def forward(ctx, x):
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        positive, = ctx.saved_tensors
        return (grad * positive).mul_(2)


def squared_relu(x):
    return SquaredReLU.apply(x) if x.requires_grad else F.relu(x).square_()


# ----------------------------------------------------------------------------------------------------------------------

def wide_linear(x, layer):
    """x times the transposed weight (V, C) of a layer: (..., C) -> (..., V).

    layer: an nn.Linear without bias, an nn.Embedding that is also the head, or any other module, which is called.
    """
    if type(layer) not in (nn.Linear, nn.Embedding):  # such as LoRA's
        return layer(x)
    V, C = layer.weight.shape
    if x.device.type == "cuda" and V > WIDE and V % MULTIPLE and x.numel() >= MANY * C:
        return padded_linear(x, layer.weight)
    return F.linear(x, layer.weight)


def padded_linear(x, weight):
    """F.linear(x, weight), as a product with rows of zeros below the weight, whose outputs are cut off.

    GPT-2 has 50,257 tokens, an odd number. So the rows of its logits don't begin at multiples of 16 bytes, as the fast
    kernels need. On an H200 a compiled update of GPT-2 124M took 65.0 ms without the padding and 62.6 with it; one that
    was not compiled, 141 and 97. With a vocabulary that is really 50,304 the compiled one took 60.0.
    """
    padded = F.pad(weight, (0, 0, 0, -len(weight) % MULTIPLE))
    return F.linear(x, padded)[..., :len(weight)]
