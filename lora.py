"""LoRA (Hu et al. 2021) for any module: train a low-rank update of each linear layer, and freeze the layer itself.

    add_lora(model, rank=8)      before training
    merge_lora(model)            after training: adds the updates to the weights; the layers are ordinary again
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError


class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank * B A x, where W and b belong to the layer that it replaces.

    A and B are float32 even if W has 16 bits, because rounding to 16 bits would lose small updates.
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
        """An nn.Linear that computes the same. Adds the update to the weight in place."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        self.weight += self.scale * self.lora_b @ self.lora_a
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def add_lora(model, rank, generator=None, alpha=0.0, targets=""):
    """Freezes a model's `decoder`, else its `encoder`, else all of it, and adds matrices A and B to its linear layers.

    B starts at zero, so the outputs are the same at first. A is drawn on the CPU, with variance 1 / in_features.
    alpha: 0 means 2 * rank. targets: the layers' names, such as "q_proj,v_proj"; "": every linear layer, and so a
    head of its own too. Embeddings, and a head that is the token embedding, stay as they are.
    Raises UserError for a rank below 1, and if the model has no linear layers or none of a name in targets.
    """
    if rank < 1:
        raise UserError(f"lora_rank = {rank}: must be at least 1")
    part = getattr(model, "decoder", getattr(model, "encoder", model))  # an encoder's head may be new
    found = layers(part, nn.Linear)
    if not found:
        raise UserError(f"lora_rank = {rank}: {type(model).__name__} has no linear layers; use lora_rank = 0")
    known = list(dict.fromkeys(name for _, name, _ in found))
    wanted = [name.strip() for name in targets.split(",")] if targets else known
    for name in wanted:
        if name not in known:
            raise UserError(f"lora_targets = {targets!r}: no linear layer of the model has the name {name!r}, only"
                            f" {', '.join(known)}")
    part.requires_grad_(False)
    for parent, name, linear in found:
        if name in wanted:
            setattr(parent, name, LoRALinear(linear, rank, alpha or 2 * rank, generator))


def merge_lora(model):
    """Turns every LoRALinear back into an nn.Linear with the same outputs. The weights stay frozen."""
    for parent, name, layer in layers(model, LoRALinear):
        setattr(parent, name, layer.merged())


def layers(model, kind):
    """[(parent, name, layer)] of each layer in the model whose type is exactly `kind`."""
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
            if type(child) is kind]
