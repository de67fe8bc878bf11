"""LoRA (Hu et al. 2021): of each linear layer only a sum of `rank` outer products is trained; the rest stays as it is.

    add_lora(model.decoder, rank=8, alpha=16)     before training
    merge_lora(model.decoder)                     after it: ordinary layers again, under their ordinary names

Any module will do, and nothing else in it needs to know.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError


class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank * B A x; W and b are those of the layer that it replaces.

    A and B are float32 beside 16-bit weights too, whose rounding would swallow small updates.
    """

    def __init__(self, linear, rank, alpha, generator=None):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        drawn = torch.empty(rank, self.in_features).normal_(0.0, self.in_features ** -0.5, generator=generator)
        self.lora_a = nn.Parameter(drawn.to(self.weight.device))  # (rank, in)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))  # (out, rank)

    def forward(self, x):
        low = F.linear(x, self.lora_a.to(x.dtype))  # (..., in) -> (..., rank)
        return super().forward(x) + self.scale * F.linear(low, self.lora_b.to(x.dtype))  # (..., out)

    @torch.no_grad()
    def merged(self):
        """One ordinary layer that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        self.weight += self.scale * self.lora_b @ self.lora_a
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def add_lora(module, rank, alpha, generator=None):
    """Freezes the module, and gives every linear layer inside it the two matrices that train instead.

    B starts at zero, so the module computes what it did; A is drawn with variance 1 / in, on the CPU.
    Raises UserError for a rank below 1.
    """
    if rank < 1:
        raise UserError(f"lora rank = {rank}: must be at least 1")
    module.requires_grad_(False)
    replace(module, nn.Linear, lambda linear: LoRALinear(linear, rank, alpha, generator))


def merge_lora(module):
    """Undoes `add_lora` and keeps what was learned. The weights stay frozen."""
    replace(module, LoRALinear, LoRALinear.merged)


def replace(module, kind, make):
    """Puts make(layer) in the place of each layer of exactly this kind."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is kind:
                setattr(parent, name, make(child))
