from dataclasses import replace

import pytest
import torch

from model import GPT, GPTConfig, init_weights
from optimizer import make_optimizer, orthogonalized
from train import Settings

SETTINGS = Settings(optimizer="muon", learning_rate=3e-3, muon_lr=0.02, weight_decay=0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_gpt():
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, n_hidden=96, vocab_size=11, tied=False, bias=True))
    init_weights(model, 3, seeded())
    return model


@pytest.mark.parametrize("shape", [(5, 48, 48), (5, 32, 96), (5, 96, 32)])
def test_orthogonalized_matrices_keep_their_singular_vectors_and_have_values_near_1(shape):
    matrices = torch.randn(shape, generator=seeded())
    matrices[0] *= 1e-3  # the length does not count
    found = orthogonalized(matrices).float()
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ found @ vh.mT  # (5, r, r): the new values on its diagonal, and nothing else
    new = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(new)).abs().max() < 0.06
    assert 0.6 < new[values > 0.2 * values[:, :1]].min() and new.max() < 1.3


def test_steps_equal_those_of_torchs_muon_and_adamw():
    ours, theirs = make_gpt(), make_gpt()
    optimizer = make_optimizer(ours, SETTINGS)
    matrices = {name: p for name, p in theirs.named_parameters() if "blocks" in name and p.dim() == 2}
    tables = {name: p for name, p in theirs.named_parameters() if name not in matrices and p.dim() == 2}
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    muon = torch.optim.Muon(matrices.values(), lr=0.02, weight_decay=0.1, momentum=0.95)
    rest = [dict(params=[*tables.values()], weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(rest, lr=3e-3, betas=(SETTINGS.beta1, SETTINGS.beta2))
    for group in optimizer.param_groups:
        group["lr"] *= group["scale"]
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters())):
            a.grad = torch.randn(a.shape, generator=seeded(100 * step + i))
            b.grad = a.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        moved, expected = a - start[name], b - start[name]
        assert torch.linalg.norm(moved - expected) < (0.02 if name in matrices else 1e-5) * torch.linalg.norm(expected)


def test_a_group_is_one_rate_one_decay_and_one_optimizer():
    model = make_gpt()
    names = {p: name for name, p in model.named_parameters()}
    groups = {(group["scale"], group["weight_decay"], group.get("muon", False)): {names[p] for p in group["params"]}
              for group in make_optimizer(model, SETTINGS).param_groups}
    assert groups.keys() == {(SETTINGS.muon_lr / SETTINGS.learning_rate, 0.1, True), (1, 0.1, False), (1, 0.0, False)}
    assert groups[1, 0.1, False] == {"wte.weight", "wpe.weight", "head.weight"}
    assert sum(map(len, groups.values())) == len(names)
    plain = make_optimizer(model, replace(SETTINGS, optimizer="adamw"))
    assert len(plain.param_groups) == 2 and not any("muon" in group for group in plain.param_groups)
