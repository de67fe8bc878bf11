"""AdamW (Loshchilov and Hutter 2019) for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

Every parameter group has a "scale": its learning rate is that multiple of the scheduled one.
"""

import inspect
import math

import torch
import torch.distributed as dist

from configurator import UserError
from machine.device import has_amx
from model import all_blocks

CPU_BATCH = 2**19  # elements of matrices that a CPU updates together: they fit into its caches


def freeze(model, rates):
    """Freezes the parts whose rate is 0. rates: {name of a child of the model: multiple of the learning rate}.

    Call it before DDP, which waits for a gradient of all that is not frozen. Raises UserError for an unknown name.
    """
    parts = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    for name in rates.keys() - set(parts):
        raise UserError(f"rates.{name} = {rates[name]}: the model has no such part, only {', '.join(parts)}")
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and rates.get(name.partition(".")[0], 1.0) > 0)


def make_optimizers(model, settings, capturable=False):
    """{"optimizer": from OPTIMIZERS, "muon": Muon}, without one that has no parameters to train.

    If settings.optimizer is "muon", Muon trains the matrices of the blocks. Only parameters with two or more dimensions
    are decayed. settings.rates: see `freeze`, which must have run. capturable: keep the learning rates in tensors on
    the device, so that a CUDA graph of a step reads them. Raises UserError if there is nothing to train.
    """
    s, groups, matrices, trained = settings, {}, set(), set()  # groups: {(scale, decayed, by Muon): parameters}
    if s.optimizer == "muon":
        matrices = {p for block in all_blocks(model) for p in block.parameters() if p.dim() == 2}
    for name, p in model.named_parameters():
        part = name.partition(".")[0]
        scale = s.rates.get(part, 1.0)
        if p.requires_grad:
            trained.add(part)
            scale *= s.muon_lr / s.learning_rate if p in matrices else 1
            groups.setdefault((scale, p.dim() >= 2, p in matrices), []).append(p)
    for name in s.rates.keys() - trained:
        if s.rates[name]:
            raise UserError(f"rates.{name} = {s.rates[name]}: LoRA has frozen this part; leave this rate out")
    if not groups:
        raise UserError(f"rates = {s.rates}: nothing is left to train; give a part a rate above 0")
    if s.optimizer == "muon" and not any(muon for _, _, muon in groups):
        raise UserError("optimizer = 'muon': no block has a matrix to train; use --optimizer=adamw")
    found = {"optimizer": [], "muon": []}
    for (scale, decayed, muon), params in sorted(groups.items(), key=lambda item: item[0][1], reverse=True):
        group = {"params": params, "scale": scale, "weight_decay": s.weight_decay if decayed else 0.0}
        if capturable:
            group["lr"] = torch.zeros((), device=params[0].device)
        found["muon" if muon else "optimizer"].append(group)
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
    optimizers = {}
    if found["optimizer"]:
        optimizers["optimizer"] = OPTIMIZERS[s.optimizer](
            found["optimizer"], lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=fused, capturable=capturable)
    if found["muon"]:
        optimizers["muon"] = Muon(found["muon"])
    return optimizers


def learning_rate(update, settings):
    """The learning rate of an update, counted from 1: linear warm-up, then a cosine or linear decay to min_lr.

    "noam" (Vaswani et al. 2017, section 5.3) reaches learning_rate at warmup_iters, then falls with 1 / sqrt(update).
    """
    s, last = settings, settings.lr_decay_iters or settings.max_iters
    if s.lr_schedule == "noam":
        peak = max(1, s.warmup_iters)
        return s.learning_rate * min(update / peak, (peak / update) ** 0.5)
    if update <= s.warmup_iters:
        return s.learning_rate * update / (s.warmup_iters + 1)
    progress = min(1.0, (update - 1 - s.warmup_iters) / max(1, last - 1 - s.warmup_iters))
    left = 1 - progress if s.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return s.min_lr + left * (s.learning_rate - s.min_lr)


def set_rates(optimizers, update, settings):
    """Sets each group's "lr" to "scale" times the learning rate of the update, counted from 1. Returns that rate."""
    lr = learning_rate(update, settings)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr * group["scale"])
            else:
                group["lr"] = lr * group["scale"]
    return lr


def clip(model, most):
    """Scales the gradient down to the norm `most` if it is larger (0: no limit). Returns the norm before scaling."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if most:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # if the gradient is sharded


def without_dynamo(optimizer_class):
    """The optimizer class without the wrappers by which PyTorch keeps torch.compile out of its methods.

    No optimizer is compiled here, and the wrappers import torch._dynamo, which takes as long as importing torch.
    """
    names = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")
    bare = {name: inspect.unwrap(getattr(optimizer_class, name)) for name in names}
    step = torch.no_grad()(inspect.unwrap(optimizer_class.step))
    return type(optimizer_class.__name__, (optimizer_class,), {**bare, "step": step})


AdamW = without_dynamo(torch.optim.AdamW)

# The optimizer of all parameters; with muon, of all but the blocks' matrices. A group has its own "weight_decay", and
# gets its "lr" before an update. If `capturable`, that is a tensor, no step waits for the GPU, and states start at 0.
OPTIMIZERS = {"adamw": AdamW, "muon": AdamW}


@without_dynamo
class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), for matrices: torch.optim.Muon, but it updates matrices of the same shape together.

    All workers must have the same gradients, as with DDP. Each orthogonalizes its share of the matrices.
    """

    def __init__(self, groups, lr=0.02, weight_decay=0.1, momentum=0.95):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    def step(self, closure=None):
        for group in self.param_groups:
            for params in alike([p for p in group["params"] if p.grad is not None]):
                self.step_alike(params, group["lr"], group["weight_decay"], group["momentum"])

    def step_alike(self, params, lr, weight_decay, momentum):
        """Updates parameters that are matrices of the same shape, or of that shape transposed. lr may be a tensor."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = orthogonalized(torch._foreach_lerp(grads, buffers, momentum), -lr)
        torch._foreach_mul_(updates, [max(1, p.size(0) / p.size(1)) ** 0.5 for p in params])
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates)


def alike(matrices):
    """Yields lists of matrices of one shape, or of that shape transposed; on a CPU, as many as fit into its caches.

    In each list, those with more rows than columns come last.
    """
    shapes = {}
    for p in matrices:
        shapes.setdefault((*sorted(p.shape),), []).append(p)
    for found in shapes.values():
        found.sort(key=is_tall)
        count = max(1, CPU_BATCH // found[0].numel()) if found[0].device.type == "cpu" else len(found)
        yield from (found[i:i + count] for i in range(0, len(found), count))


def is_tall(matrix):
    return matrix.size(0) > matrix.size(1)


def orthogonalized(matrices, scale=1.0, steps=5):
    """Approximations of the nearest semi-orthogonal matrices, singular values between about 0.7 and 1.2, times scale.

    matrices: a list as `alike` yields them. The result is such a list too, in the dtype of the matrices. It is computed
    in float32 on a CPU without AMX, else in bfloat16. The Newton-Schulz iteration maps each singular value s to
    a s + b s^3 + c s^5. Jordan's coefficients trade exact convergence to 1 for fast growth of small values.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    fast = torch.bfloat16 if matrices[0].device.type != "cpu" or has_amx() else torch.float32
    wide = sum(not is_tall(matrix) for matrix in matrices)  # so many are wide or square, and come first
    x = torch.stack([*matrices[:wide], *(matrix.mT for matrix in matrices[wide:])]).to(fast)  # (N, rows, columns)
    several = dist.is_initialized() and dist.get_world_size() > 1
    share = slice(dist.get_rank(), None, dist.get_world_size()) if several else slice(None)
    y = x[share]
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(square, square, square, beta=b, alpha=c), y, beta=a)
    if several:
        x.zero_()[share] = y
        dist.all_reduce(x)
    x = (x if several else y).to(matrices[0].dtype) * scale
    return [*x[:wide], *x[wide:].mT.contiguous()]
