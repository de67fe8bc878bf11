"""Positions that need no training: sinusoidal ones are added to the embeddings, rotary ones turn queries and keys.

Learned positions are in model.py, with POSITIONS, the table of all three. Each class takes the embedded tokens
x (B, T, C) and their positions, and returns (x, rope): see model.POSITIONS.

Axes: B batch, T positions, C channels, H heads, D head_dim.
"""

import math

import torch
import torch.nn as nn


class Sinusoidal(nn.Module):
    """x plus, at position p, sin(p r) in the even channels and cos(p r) in the odd ones (Vaswani et al. 2017).

    Channels 2 i and 2 i + 1 have the rate r = 10000^(-2 i / C), computed as exp(-2 i ln(10000) / C).
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        rates = torch.exp(torch.arange(0, C, 2, device="cpu").float() * (-math.log(10000.0) / C))  # (C / 2,)
        angles = torch.arange(config.block_size, device="cpu").float()[:, None] * rates  # (block_size, C / 2)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :C]  # (block_size, C), alternating
        self.register_buffer("table", table, persistent=False)

    def forward(self, x, positions):
        return x + self.table[positions].to(x.dtype), None


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): each pair of channels of a query or key turns by position times rate.

    Then a query's product with a key depends on how far apart they are, not on where. The rates fall from 1 to about
    1 / theta, so the wavelengths, in positions, grow from 2 pi to about 2 pi theta. Returns x as it is, and (cos, sin).
    """

    def __init__(self, config):
        super().__init__()
        D = config.head_dim or config.n_embd // config.n_head
        rates = config.rope_theta ** (-torch.arange(0, D, 2, device="cpu").float() / D)  # (D/2,)
        if config.rope_scaling:
            rates = slower(rates, **config.rope_scaling)
        places = torch.arange(config.block_size + 1, device="cpu").float()  # one extra: PaliGemma counts from 1
        angles = (places[:, None] * rates).repeat(1, 2)  # (block_size + 1, D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x, positions):
        return x, (self.cos[positions], self.sin[positions])  # cos and sin: (T, D) or (B, 1, T, D)


def slower(rates, factor, low=math.inf, high=math.inf, context=1):
    """Rates (D/2,) for a context `factor` times as long as the `context` positions that a model was first trained on.

    A rate with at most `low` turns in that context is divided by `factor`, one with at least `high` turns stays as it
    is, and between them the change is gradual (Llama 3.1). Without low and high all are divided (Chen et al. 2023).
    """
    if low == math.inf:
        return rates / factor
    turns = context * rates / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * rates + (1 - kept) * rates / factor


def rotate(x, cos, sin):
    """Returns x (B, H, T, D) with each pair (x[i], x[i + D/2]) rotated by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
