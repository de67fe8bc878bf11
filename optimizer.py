"""AdamW, and Muon for the matrices of the blocks.

Every parameter's group has a "scale", its multiple of the learning rate that train.py sets at each update.
"""

import inspect

import torch

from device import has_amx
from model import blocks


def make_optimizer(model, settings):
    """AdamW (Loshchilov and Hutter 2019) for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Only what has two or more dimensions is decayed. Each part of the model has its own multiple of the learning rate,
    its group's "scale"; 0 freezes the part.
    """
    groups, matrices = {}, set()
    if settings.optimizer == "muon":
        matrices = {p for block in blocks(model) for p in block.parameters() if p.dim() == 2}
    for name, p in model.named_parameters():
        scale = getattr(settings.rates, name.split(".")[0], 1.0)
        p.requires_grad_(p.requires_grad and scale > 0)
        if p.requires_grad:
            scale *= settings.muon_lr / settings.learning_rate if p in matrices else 1
            groups.setdefault((scale, p.dim() >= 2, p in matrices), []).append(p)
    groups = [{"params": params, "scale": scale, "weight_decay": settings.weight_decay if decayed else 0.0}
              | ({"muon": True} if muon else {})
              for (scale, decayed, muon), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)]
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
    kind = Muon if matrices else AdamW
    return kind(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=fused)


def without_dynamo(optimizer_class):
    """The class without PyTorch's wrappers that tell torch.compile to leave its methods alone.

    Our optimizers are never compiled, and the wrappers import torch._dynamo, which takes as long as torch itself.
    """
    names = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")
    bare = {name: inspect.unwrap(getattr(optimizer_class, name)) for name in names}
    step = torch.no_grad()(inspect.unwrap(optimizer_class.step))
    return type(optimizer_class.__name__, (optimizer_class,), {**bare, "step": step})


AdamW = without_dynamo(torch.optim.AdamW)


CPU_BATCH = 2**19  # numbers that a CPU's caches hold


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the groups with muon=True, AdamW for the others.

    The step is that of torch.optim.Muon, with matrices of one shape in batches. A step spends the gradients.
    """

    @torch.no_grad()
    def step(self):
        if getattr(self, "found_inf", None) is None or not self.found_inf:  # else float16's scaler skips the step
            for group in self.param_groups:
                if group.get("muon"):
                    for params in alike([p for p in group["params"] if p.grad is not None]):
                        self.step_alike(params, group["lr"], group["weight_decay"])
        super().step()  # of what has a gradient still

    def step_alike(self, params, lr, weight_decay, momentum=0.95):
        """A step of matrices of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
            self.state[p]["step"] += 1
        grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = orthogonalized(torch._foreach_lerp(grads, buffers, momentum))
        rows, columns = params[0].shape
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, [*updates], alpha=-lr * max(1, rows / columns) ** 0.5)
        for p in params:
            p.grad = None


def alike(matrices):
    """Yields lists of matrices of one shape; on a CPU no more than its caches hold."""
    shapes = {}
    for p in matrices:
        shapes.setdefault(p.shape, []).append(p)
    for shape, found in shapes.items():
        count = max(1, CPU_BATCH // shape.numel()) if found[0].device.type == "cpu" else len(found)
        yield from (found[i:i + count] for i in range(0, len(found), count))


def orthogonalized(matrices, steps=5):
    """The nearest semi-orthogonal matrices, roughly: singular values end between about 0.7 and 1.2.

    matrices: (N, rows, columns), or a list of N. Newton and Schulz's iteration takes each singular value s to
    a s + b s^3 + c s^5; Jordan's coefficients make small ones grow fast rather than end at 1. In bfloat16 where the
    device is quick at it. Returns (N, rows, columns).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    fast = torch.bfloat16 if matrices[0].device.type != "cpu" or has_amx() else torch.float32
    x = torch.stack([matrix.to(fast) for matrix in matrices])
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
