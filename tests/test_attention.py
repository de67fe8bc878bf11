"""machine/attention.py: every way to compute attention agrees with the formula, and dropout is right on average."""

import pytest
import torch
import torch.nn.functional as F

from machine import attention
from machine.attention import (
    Dropout,
    TiledAttention,
    attend,
    bias_of,
    draw_kept,
    grouped,
    one_query,
    padded_linear,
    tiles,
    wide_linear,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed)).requires_grad_()


@pytest.mark.parametrize("T", [1, 7, 130, 256])
def test_tiled_attention_and_its_gradients_equal_the_fused_kernel(T, monkeypatch):
    monkeypatch.setattr(attention, "TILE", 3 * 130 * 128)  # several tiles of heads, the last one smaller
    q, k, v, g = (randn(10, T, 16, seed=seed) for seed in range(4))
    found, expected = TiledAttention.apply(q, k, v, 0.0), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g))


def test_tiled_attention_with_dropout_and_its_gradients_equal_the_formula_with_the_same_mask():
    q, k, v, g = (randn(6, 150, 16, seed=seed) for seed in range(4))
    torch.manual_seed(0)
    found = TiledAttention.apply(q, k, v, 0.3)
    torch.manual_seed(0)
    kept = torch.zeros(6, 150, 150)
    for heads, rows, seen, weights in tiles(q.detach(), k.detach()):
        kept[heads, rows, seen] = draw_kept(weights.shape, 0.3).float()
    scores = (q @ k.mT / 4).masked_fill(~torch.ones(150, 150).tril().bool(), -torch.inf)
    expected = (scores.softmax(-1) * kept / 0.7) @ v
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g))


@pytest.mark.parametrize("kv_heads, mask, short", [(3, "causal", 512), (3, "causal", 8), (1, "causal", 512),
                                                   (3, None, 512)])
@pytest.mark.parametrize("long", [2**14, 16 * 8])  # the fused kernel computes in float32, or in bfloat16
def test_attention_in_bfloat16_is_close_to_float32(monkeypatch, kv_heads, mask, short, long):
    monkeypatch.setattr(attention, "SHORT", short)
    monkeypatch.setattr(attention, "LONG", long)
    q, k, v, grad = (randn(2, heads, 16, 8, seed=i).detach() for i, heads in enumerate([3, kv_heads, kv_heads, 3]))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, mask)
        y.backward(grad.to(dtype))
        assert y.dtype == dtype
        results.append([y.float(), *(x.grad.float() for x in inputs)])
    for exact, rounded in zip(*results):
        torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0.03)


def test_attention_dropout_in_bfloat16_removes_weights_and_scales_the_others():
    q, k = (randn(2, 3, 16, 16, seed=i).bfloat16() for i in range(2))
    v = torch.eye(16).repeat(2, 3, 1, 1).bfloat16()  # so the output is the weights
    whole, left = attend(q, k, v, "causal").float(), attend(q, k, v, "causal", dropout=0.25).float()
    kept = left > 0
    torch.testing.assert_close(left, whole / 0.75 * kept, atol=0.01, rtol=0.01)
    assert kept[whole > 0].float().mean().item() == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize("mask", [None, "causal", "padding", "per query"])
def test_attention_with_dropout_and_its_gradients_equal_the_formula_with_the_same_draws(mask):
    q, g = randn(2, 3, 7, 8), randn(2, 3, 7, 8, seed=3)
    k, v = (randn(2, 3, 7 if mask == "causal" else 5, 8, seed=seed) for seed in (1, 2))
    if mask in ("padding", "per query"):
        mask = torch.rand(2, 1, 1 if mask == "padding" else 7, 5, generator=seeded(4)) < 0.6
        mask[..., 0] = True
    torch.manual_seed(0)
    found = attend(q, k, v, mask, 0.3)
    torch.manual_seed(0)
    kept = draw_kept((6, 7, k.size(2)), 0.3).view(2, 3, 7, -1)
    allowed = torch.ones(7, k.size(2)).tril().bool() if mask == "causal" else mask
    scores = q @ k.mT / 8**0.5
    weights = (scores if mask is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1)
    expected = weights * kept / 0.7 @ v
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g))


def test_a_query_that_may_see_nothing_is_finite_in_training_with_dropout():
    q, k, v = (randn(1, 2, 3, 8, seed=seed) for seed in range(3))
    out = attend(q, k, v, torch.tensor([[True] * 3, [False] * 3, [True] * 3]), 0.1)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_attention_in_training_averages_to_that_in_evaluation(share):
    """Under autocast, where short sequences take a path of their own."""
    q, k, v = (randn(1, 2, 12, 8, seed=seed) for seed in range(3))
    with torch.no_grad():
        expected = attend(q, k, v, "causal")
    torch.manual_seed(0)
    many = [x.expand(4000, -1, -1, -1) for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(*many, "causal", share).float().mean(0, keepdim=True)
    torch.testing.assert_close(found, expected, atol=0.05 if share else 1e-2, rtol=0)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("shape", [("T", 9), (2, 1, "T", 9), (2, 1, 1, 9), (1, 9), (2, 6, "T", 9), (6, 1, 9)])
def test_grouped_queries_and_their_gradients_equal_repeated_keys_and_values(T, shape):
    q, g = randn(2, T, 6, 8).transpose(1, 2), randn(2, 6, T, 8, seed=3)
    k, v = (randn(2, 2, 9, 8, seed=seed) for seed in (1, 2))
    mask = torch.rand([T if n == "T" else n for n in shape], generator=seeded(4)) < 0.5
    mask[..., 4] = True
    expected = F.scaled_dot_product_attention(q, *(x.repeat_interleave(3, dim=1) for x in (k, v)), mask)
    for found in (grouped(q, k, v, mask, 0.0), attend(q, k, v, mask)):
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(y, (q, k, v), g, retain_graph=True) for y in (found, expected))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(1, 9), (1, 1, 9), (2, 1, 1, 9), (1, 1, 1, 9)])
@pytest.mark.parametrize("H", [2, 6])
def test_one_query_by_two_products_equals_the_fused_kernel(shape, H):
    """The path of a GPU's captured and compiled steps."""
    q, (k, v) = randn(2, 1, H, 8).transpose(1, 2), (randn(2, 2, 9, 8, seed=seed) for seed in (1, 2))
    mask = torch.rand(shape, generator=seeded(4)) < 0.5
    mask[..., 4] = True
    expected = F.scaled_dot_product_attention(q, *(x.repeat_interleave(H // 2, dim=1) for x in (k, v)), mask)
    compiled = torch.compile(one_query, fullgraph=True, backend="eager", dynamic=False)
    for found in (one_query(q, k, v, mask), one_query(q, k, v, bias_of(mask, q.dtype)), compiled(q, k, v, mask)):
        torch.testing.assert_close(found, expected)


def test_one_query_with_a_mask_takes_the_grouped_path(monkeypatch):
    """Not those without a mask, and on a CPU not several queries, for which it is no faster."""
    called, real = [], attention.grouped
    monkeypatch.setattr(attention, "grouped", lambda q, *rest: called.append(q.size(2)) or real(q, *rest))
    k, mask = randn(2, 2, 9, 8), torch.ones(9, dtype=torch.bool)[None]
    for T, seen in ((1, mask), (1, None), (9, "causal"), (3, mask)):
        attend(randn(2, 4, T, 8), k, k, seen)
    assert called == [1]


@pytest.mark.parametrize("V", [513, 576])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_padded_head_gives_the_logits_and_gradients_of_the_plain_one(V, dtype):
    """dtype: of autocast; None: off."""
    x, weight, g = randn(3, 5, 16), randn(V, 16, seed=1), randn(3, 5, V, seed=2)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        found, expected = padded_linear(x, weight), F.linear(x, weight)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    tolerances = dict(atol=1e-5, rtol=3e-5) if dtype is None else {}  # sums in another order, up to 513 terms
    torch.testing.assert_close(found, expected, **tolerances)
    gradients = (torch.autograd.grad(y.float(), (x, weight), g) for y in (found, expected))
    torch.testing.assert_close(*gradients, **tolerances)


class Twice(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_that_computes_something_else_is_called():
    for cls, factor in ((torch.nn.Linear, 1), (Twice, 2)):
        layer, x = cls(16, 513, bias=False), randn(5, 16)
        torch.testing.assert_close(wide_linear(x, layer), factor * F.linear(x, layer.weight))


def test_masks_follow_their_probability_and_the_seed():
    torch.manual_seed(0)
    one, two = draw_kept((1000, 401), 0.2), draw_kept((1000, 401), 0.2)
    torch.manual_seed(0)
    assert torch.equal(one, draw_kept((1000, 401), 0.2)) and not torch.equal(one, two)
    n = one.numel()
    for kept, share in ((one, 0.8), (one & two, 0.64), (one[:, :-1] & one[:, 1:], 0.64)):  # neighbours: independent
        assert abs(kept.float().mean().item() - share) < 4 * 0.5 / n**0.5
    assert draw_kept((5,), 0.0).all()


def test_dropout_scales_values_and_gradients_alike_and_is_off_in_evaluation():
    x, layer = randn(400, 100), Dropout(0.25)
    y = layer(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], kept / 0.75)
    assert torch.equal(layer.eval()(x), x)
