"""Attention by the fastest kernel there is, and dropout and squared ReLU that are quick on a CPU too.

What `attend`, `Dropout` and `squared_relu` compute is one formula each; the rest is about which kernel computes it
soonest. On a GPU that is PyTorch's own. In training on a CPU it depends, and each case is a function of its own.

Axes: B batch, T query positions, S key positions, H query heads, K key-value heads, D head_dim, N batch x heads.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

SHORT = 512  # query positions up to which two products are faster than the fused kernel in bfloat16, on a CPU
LONG = 2**14  # T x D from which the fused kernel's backward pass in bfloat16 is fast on a CPU
TILE = 2**18  # scores held at a time by attention with dropout: one megabyte, which fits into a CPU's caches
ROWS = 128  # query positions of a tile, which see no key after the last of them


def attend(q, k, v, mask, dropout=0.0):
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D), with a share `dropout` of the softmax's weights dropped.

    q: (B, H, T, D); k, v: (B, K, S, D), where each key-value head serves H / K query heads.
    mask: None (all see all), "causal", or a boolean tensor that broadcasts to (B, H, T, S), True = may look.
    """
    if q.device.type != "cpu" or not q.requires_grad:
        return fused(q, k, v, mask, dropout)
    causal = isinstance(mask, str) and q.shape == k.shape
    if causal and q.dtype == torch.bfloat16 and q.size(2) <= SHORT:
        return by_products(q, k, v, dropout)
    if causal and dropout:
        return TiledAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), dropout).view(q.shape)
    if q.size(2) * q.size(3) >= LONG:
        return fused(q, k, v, mask, dropout)
    with torch.autocast("cpu", enabled=False):  # the backward pass of short rows is up to six times slower in bfloat16
        return fused(q.float(), k.float(), v.float(), mask, dropout).type_as(q)


def fused(q, k, v, mask, dropout):
    """PyTorch's own choice of a kernel."""
    causal = isinstance(mask, str)
    return F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal,
                                          enable_gqa=q.size(1) != k.size(1))


def by_products(q, k, v, dropout):
    """Causal attention by two batched products: in bfloat16 on a CPU two to four times as fast as the fused kernel."""
    future = torch.full((q.size(2), q.size(2)), -torch.inf, dtype=q.dtype).triu_(1)  # (T, T)
    scores = torch.baddbmm(future, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.size(3) ** -0.5)  # (N, T, T)
    weights = scores.softmax(-1)
    if dropout:
        weights = drop(weights, dropout)
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)


class TiledAttention(torch.autograd.Function):
    """Causal attention with dropout, tile by tile, computed in float32: (N, T, D) -> (N, T, D).

    With dropout PyTorch's attention leaves its fused kernel on a CPU. Here a tile of scores fits into the caches and is
    computed again in the backward pass, which is that of FlashAttention (Dao et al. 2022, algorithm 4): no T x T matrix
    of floats is kept.
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
        dq, dk, dv = (torch.zeros(q.shape) for _ in range(3))  # float32, for they are summed up
        for heads, rows, seen, weights in tiles(q, k):
            g = grad[heads, rows].float()
            keep = kept[heads, rows, seen].float().div_(1 - ctx.p)
            inner = (g * out[heads, rows]).sum(-1, keepdim=True)  # weights times their gradients, summed over keys
            d_weights = torch.bmm(g, v[heads, seen].float().mT).mul_(keep)
            d_scores = d_weights.sub_(inner).mul_(weights).mul_(q.size(-1) ** -0.5)
            dv[heads, seen] += torch.bmm(weights.mul_(keep).mT, g)
            dq[heads, rows] = torch.bmm(d_scores, k[heads, seen].float())
            dk[heads, seen] += torch.bmm(d_scores.mT, q[heads, rows].float())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def tiles(q, k):
    """Yields slices of N, of the query and of the key positions, and the causal attention weights there, in float32."""
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
    """Dropout (Srivastava et al. 2014)."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return drop(x, self.p) if x.device.type == "cpu" else super().forward(x)


def drop(x, p):
    """x, on a CPU, with a share p of its elements set to 0 and the others divided by 1 - p."""
    return x * draw_kept(x.shape, p).to(x.dtype).mul_(1 / (1 - p))


def draw_kept(shape, p):
    """A boolean tensor, False with probability p to 16 bits, from PyTorch's global generator.

    PyTorch draws a CPU's random numbers one by one, in one thread: here each word of 64 bits decides four times.
    """
    n = math.prod(shape)
    words = torch.empty(-(-n // 4), dtype=torch.int64).random_(-2**63, None)
    threshold = min(round(p * 2**16) - 2**15, 2**15 - 1)
    return words.view(torch.int16)[:n].view(shape) >= threshold


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


def squared_relu(x):
    return SquaredReLU.apply(x) if x.requires_grad else F.relu(x).square_()
