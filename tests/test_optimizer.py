"""optimizer.py: Muon and AdamW against PyTorch's own, parameter groups, rates, Noam's schedule, and clipping."""

from dataclasses import replace

import pytest
import torch
from conftest import settings_for

from configurator import UserError
from model import GPT, GPTConfig, init_weights
from optimizer import clip, freeze, learning_rate, make_optimizers, orthogonalized, set_rates

SETTINGS = settings_for("text", optimizer="muon", learning_rate=3e-3, muon_lr=0.02, weight_decay=0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_gpt():
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, n_hidden=96, vocab_size=11, tied=False, bias=True))
    init_weights(model, seeded())
    return model


@pytest.mark.parametrize("shape", [(5, 48, 48), (5, 32, 96), (5, 96, 32)])
def test_orthogonalized_matrices_keep_their_singular_vectors_and_have_values_near_1(shape):
    matrices = torch.randn(shape, generator=seeded())
    matrices[0] *= 1e-3  # the norm of a matrix does not matter
    found = torch.stack(orthogonalized([*matrices])).float()
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ found @ vh.mT  # (5, r, r), diagonal: the new singular values
    new = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(new)).abs().max() < 0.06
    assert 0.6 < new[values > 0.2 * values[:, :1]].min() and new.max() < 1.3


def test_steps_equal_those_of_torchs_muon_and_adamw():
    ours, theirs = make_gpt(), make_gpt()
    optimizers = make_optimizers(ours, SETTINGS)
    matrices = {name: p for name, p in theirs.named_parameters() if "blocks" in name and p.dim() == 2}
    tables = {name: p for name, p in theirs.named_parameters() if name not in matrices and p.dim() == 2}
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    muon = torch.optim.Muon(matrices.values(), lr=0.02, weight_decay=0.1, momentum=0.95)
    rest = [dict(params=[*tables.values()], weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(rest, lr=3e-3, betas=(SETTINGS.beta1, SETTINGS.beta2))
    assert set_rates(optimizers, SETTINGS.warmup_iters + 1, SETTINGS) == 3e-3  # the peak
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters())):
            a.grad = torch.randn(a.shape, generator=seeded(100 * step + i))
            b.grad = a.grad.clone()
        for each in (*optimizers.values(), muon, adamw):
            each.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        moved, expected = a - start[name], b - start[name]
        assert torch.linalg.norm(moved - expected) < (0.02 if name in matrices else 1e-5) * torch.linalg.norm(expected)


def groups_of(model, settings):
    """{(optimizer's name, scale, weight decay): names of the parameters}."""
    names = {p: name for name, p in model.named_parameters()}
    return {(kind, group["scale"], group["weight_decay"]): {names[p] for p in group["params"]}
            for kind, optimizer in make_optimizers(model, settings).items() for group in optimizer.param_groups}


def test_parameters_are_grouped_by_rate_decay_and_optimizer():
    model, scale = make_gpt(), SETTINGS.muon_lr / SETTINGS.learning_rate
    groups = groups_of(model, SETTINGS)
    assert groups.keys() == {("muon", scale, 0.1), ("optimizer", 1, 0.1), ("optimizer", 1, 0.0)}
    assert groups["optimizer", 1, 0.1] == {"wte.weight", "wpe.weight", "head.weight"}
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert groups_of(model, replace(SETTINGS, optimizer="adamw")).keys() == {("optimizer", 1, 0.1), ("optimizer", 1, 0)}


def test_parts_have_rates_of_their_own_and_rate_0_freezes():
    model, scale = make_gpt(), SETTINGS.muon_lr / SETTINGS.learning_rate
    rates = {"wte": 0.0, "transformer": 0.5}
    freeze(model, rates)
    groups = groups_of(model, replace(SETTINGS, rates=rates))
    assert groups.keys() == {("muon", 0.5 * scale, 0.1), ("optimizer", 1, 0.1), ("optimizer", 0.5, 0.0)}
    assert groups["optimizer", 1, 0.1] == {"wpe.weight", "head.weight"} and not model.wte.weight.requires_grad
    with pytest.raises(UserError, match="rates.vision = 1.0: the model has no such part, only wte, wpe, transformer,"):
        freeze(model, {"vision": 1.0})
    freeze(model, dict.fromkeys(("wte", "wpe", "transformer", "head"), 0.0))
    with pytest.raises(UserError, match="nothing is left to train"):
        make_optimizers(model, SETTINGS)


def test_noams_schedule_is_the_papers_and_peaks_at_the_end_of_the_warm_up():
    peak = 512**-0.5 * 4000**-0.5  # of the paper's base model
    s = replace(SETTINGS, optimizer="adamw", muon_lr=0.02, lr_schedule="noam", learning_rate=peak, warmup_iters=4000,
                min_lr=3e-4)
    for update in (1, 2000, 4000, 4001, 100_000):
        paper = 512**-0.5 * min(update**-0.5, update * 4000**-1.5)
        assert learning_rate(update, s) == pytest.approx(paper)
    assert learning_rate(4, replace(s, warmup_iters=0)) == peak / 2
    for name, value in (("min_lr", 1e-5), ("lr_decay_iters", 9)):
        with pytest.raises(UserError, match=f"{name} = {value}: --lr_schedule=noam falls without end; leave it out"):
            replace(s, **{name: value})


def test_a_gradient_is_clipped_to_its_norm():
    model = torch.nn.Linear(3, 4)
    model.weight.grad = torch.ones(4, 3)  # the bias has no gradient
    for most, left in ((0.0, 12**0.5), (100.0, 12**0.5), (1.0, 1.0)):
        assert clip(model, most).item() == pytest.approx(12**0.5)
        assert model.weight.grad.norm().item() == pytest.approx(left)
