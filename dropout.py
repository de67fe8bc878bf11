"""Dropout (Srivastava et al. 2014) that is quick on a CPU too; on other devices it is PyTorch's.

PyTorch draws a CPU's random numbers one by one, in one thread: here each random word of 64 bits decides four times. And
with dropout PyTorch's attention leaves its fused kernel: here it goes through the scores block by block, small enough
for the caches, and computes them again in the backward pass, so that no T x T matrix of floats is kept.

Axes: N batch x heads, T positions, D head_dim.
"""

import math

import torch
import torch.nn as nn

BLOCK = 2**18  # scores held at a time, one megabyte
ROWS = 128  # query positions of a block; those see no keys after the last of them


def draw_kept(shape, p):
    """A boolean tensor, False with probability p to 16 bits, from PyTorch's global generator."""
    n = math.prod(shape)
    words = torch.empty(-(-n // 4), dtype=torch.int64).random_(-2**63, None)
    return words.view(torch.int16)[:n].view(shape) >= min(round(p * 2**16) - 2**15, 2**15 - 1)


def drop(x, p):
    """x, on a CPU, with a share p of its elements set to 0 and the others made larger by as much."""
    return x * draw_kept(x.shape, p).to(x.dtype).mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return drop(x, self.p) if x.device.type == "cpu" else super().forward(x)


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) with dropout, times v, each position seeing those up to itself. (N, T, D) -> (N, T, D).

    Computed in float32. The backward pass is that of FlashAttention (Dao et al. 2022, algorithm 4).
    """

    @staticmethod
    def forward(ctx, q, k, v, p):
        out, kept = torch.empty_like(q), torch.zeros(*q.shape[:2], q.size(1), dtype=torch.bool)
        with torch.autocast("cpu", enabled=False):
            for heads, rows, seen, weights in blocks(q, k):
                kept[heads, rows, seen] = keep = draw_kept(weights.shape, p)
                out[heads, rows] = torch.bmm(weights.mul_(keep.float()), v[heads, seen].float()).div_(1 - p)
        ctx.save_for_backward(q, k, v, out, kept)
        ctx.p = p
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, kept = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(q.shape) for _ in range(3))  # float32, for they are summed up
        for heads, rows, seen, weights in blocks(q, k):
            g = grad[heads, rows].float()
            keep = kept[heads, rows, seen].float().div_(1 - ctx.p)
            inner = (g * out[heads, rows]).sum(-1, keepdim=True)  # of the weights with their gradients
            d_scores = torch.bmm(g, v[heads, seen].float().mT).mul_(keep).sub_(inner).mul_(weights)
            d_scores.mul_(q.size(-1) ** -0.5)
            dv[heads, seen] += torch.bmm(weights.mul_(keep).mT, g)
            dq[heads, rows] = torch.bmm(d_scores, k[heads, seen].float())
            dk[heads, seen] += torch.bmm(d_scores.mT, q[heads, rows].float())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def blocks(q, k):
    """Yields slices of N, of the query and of the key positions, and the attention's weights there, in float32."""
    N, T, D = q.shape
    future = torch.full((T, T), -math.inf).triu_(1)
    count = max(1, BLOCK // (min(T, ROWS) * T))
    for first in range(0, N, count):
        heads = slice(first, first + count)
        for top in range(0, T, ROWS):
            rows, seen = slice(top, min(top + ROWS, T)), slice(0, min(top + ROWS, T))
            scores = torch.baddbmm(future[rows, seen], q[heads, rows].float(), k[heads, seen].float().mT,
                                   alpha=D ** -0.5)
            yield heads, rows, seen, scores.softmax(-1)
