"""LoRA (Hu et al. 2021): of each linear layer only a sum of `rank` outer products is trained; the rest stays as it is.

    add_lora(model, rank=8)      before training
    merge_lora(model)            after it: ordinary layers again, under their ordinary names

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
        drawn = torch.empty(rank, self.in_features, device="cpu")
        drawn.normal_(0.0, self.in_features ** -0.5, generator=generator)
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


def add_lora(model, rank, generator=None, alpha=0):
    """Freezes a model's `decoder`, or all of a model without one; each linear layer there gets two matrices to train.

    B starts at zero, so the model computes what it did; A is drawn with variance 1 / in, on the CPU. alpha: 0 stands
    for 2 * rank. Raises UserError for a rank below 1, and for a model without linear layers.
    """
    if rank < 1:
        raise UserError(f"lora_rank = {rank}: must be at least 1")
    part = getattr(model, "decoder", model)
    part.requires_grad_(False)
    if not replace(part, nn.Linear, lambda linear: LoRALinear(linear, rank, alpha or 2 * rank, generator)):
        raise UserError(f"lora_rank = {rank}: the model {type(model).__name__} has no linear layer for it")


def merge_lora(model):
    """Undoes `add_lora` and keeps what was learned. The weights stay frozen."""
    replace(model, LoRALinear, LoRALinear.merged)


def replace(model, kind, make):
    """Puts make(layer) in the place of each layer of exactly this kind; returns how many there were."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if type(child) is kind]
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return len(found)
