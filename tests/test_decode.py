"""Compiled steps give the trunk's numbers, and give way where they don't or can't."""

import pytest
import torch

import decode
import model as models
from model import GPT, MLP, Decoder, GPTConfig, generate, init_weights

C, T, B = 64, 24, 5
needs_compiler = pytest.mark.skipif(not decode.library(), reason="there is no C compiler")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_gpt(**changes):
    model = GPT(GPTConfig(**dict(dict(n_layer=2, n_head=4, n_embd=C, block_size=T, vocab_size=11), **changes))).eval()
    init_weights(model, 2, seeded(), std=0.3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded(1)))
    return model


def stepped(model, tokens):
    """Logits of a prompt of three tokens and of each token after it, and the kind of decoder that made them."""
    with torch.inference_mode():
        caches = model.make_caches(len(tokens))
        cuts = [0, *range(3, tokens.size(1) + 1)]
        parts = [model(tokens[:, a:b], caches=caches, start=a) for a, b in zip(cuts, cuts[1:])]
        return torch.cat(parts, dim=1), type(caches.decoder)


@needs_compiler
@pytest.mark.parametrize("changes", [
    {}, dict(bias=True), dict(mlp="relu2", positions="rotary", tied=False, bigrams=True),
    dict(norm="rmsnorm", mlp="geglu", positions="rotary", n_kv_head=2, head_dim=32), dict(n_kv_head=1, n_hidden=80)])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_steps_give_the_uncached_logits(monkeypatch, changes, threads):
    monkeypatch.setattr(decode, "THREADS_FROM", 0 if threads > 1 else 2**60)
    model, tokens = make_gpt(**changes), torch.randint(11, (B, T), generator=seeded())
    found, kind = stepped(model, tokens)
    assert kind is decode.CompiledDecoder
    torch.testing.assert_close(found, model(tokens), atol=1e-4, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("changes", [
    {}, dict(bias=True, mlp="relu2", positions="rotary", tied=False, bigrams=True),
    dict(norm="rmsnorm", mlp="geglu", positions="rotary", n_kv_head=2, head_dim=32)])
@pytest.mark.parametrize("prompt_tokens", [decode.PROMPT_TOKENS, 0])  # in one piece, and in pieces of two
def test_compiled_steps_from_bfloat16_are_nearer_to_float32_than_pytorch_s_own(monkeypatch, changes, prompt_tokens):
    monkeypatch.setattr(decode, "PROMPT_TOKENS", prompt_tokens)
    monkeypatch.setattr(decode, "emulates_bfloat16", lambda: True)
    model, tokens = make_gpt(**changes).bfloat16(), torch.randint(11, (B, T), generator=seeded())
    found, kind = stepped(model, tokens)
    assert kind is decode.CompiledDecoder
    plain, exact = model(tokens), model.float()(tokens)
    assert (found - exact).norm() < (plain - exact).norm() < 0.1 * exact.norm()


def test_bfloat16_is_left_to_pytorch_where_the_cpu_has_it(monkeypatch):
    monkeypatch.setattr(decode, "emulates_bfloat16", lambda: False)
    assert stepped(make_gpt().bfloat16(), torch.randint(11, (B, T), generator=seeded()))[1] is Decoder


@needs_compiler
def test_compiled_steps_choose_the_same_tokens(monkeypatch):
    model, texts = make_gpt(), []
    for compiled in (decode.compiled, lambda *_: None):
        monkeypatch.setattr(decode, "compiled", compiled)
        steps = generate(model, torch.zeros(3, 1, dtype=torch.long), 3 * T, 0.8, generator=seeded())
        texts.append(torch.stack(list(steps)))
    assert torch.equal(*texts)


@needs_compiler
def test_a_step_with_a_mask_is_left_to_pytorch():
    trunk = make_gpt().transformer
    x, mask = torch.randn(B, 2, C, generator=seeded()), torch.rand(B, 1, 1, 2, generator=seeded()) < 0.7
    mask[..., 1] = True
    with torch.inference_mode():
        caches = trunk.make_caches(B, 2)
        trunk(x[:, :1], caches)
        found = trunk(x[:, 1:], caches, mask=mask, start=1)
        first = torch.tensor([True, False]).expand_as(mask)
        expected = trunk(x, mask=torch.cat((first, mask), dim=2))[:, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_compiler
def test_steps_past_the_caches_are_an_error():
    model, tokens = make_gpt(), torch.zeros(2, 1, dtype=torch.long)
    caches = model.make_caches(2, 8)
    for wrong, start in ((tokens, 8), (tokens.expand(2, 9), 0), (tokens[:1], 0)):
        with pytest.raises(ValueError, match="the caches have 2 rows of 8"):
            model(wrong, caches=caches, start=start)


def halved(q, k, v, *more, attend=models.attend):
    return attend(q / 2, k, v, *more)


@pytest.mark.parametrize("place, name, new, expected", [
    (MLP, "activate", lambda self, up: up.relu(), Decoder),  # which calls it
    (models, "attend", halved, type(None))])
def test_a_changed_block_is_noticed(monkeypatch, place, name, new, expected):
    monkeypatch.setattr(place, name, new)
    model, tokens = make_gpt(), torch.randint(11, (B, T), generator=seeded())
    found, kind = stepped(model, tokens)
    assert kind is expected
    torch.testing.assert_close(found, model(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compiler", ["", "no_such_compiler", "false"])
def test_without_a_working_compiler_pytorch_takes_the_steps(monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("QUILL_COMPILER", compiler)
    monkeypatch.setattr("sys.pycache_prefix", str(tmp_path))
    monkeypatch.setattr(decode, "library", decode.library.__wrapped__)
    model, tokens = make_gpt(), torch.randint(11, (B, T), generator=seeded())
    assert stepped(model, tokens)[1] is Decoder


@pytest.mark.parametrize("changes", [dict(n_embd=72), dict(n_embd=60), dict(n_head=8), dict(n_hidden=100)])
def test_widths_that_are_no_multiples_of_16_are_left_to_pytorch(changes):
    model, tokens = make_gpt(**changes), torch.randint(11, (B, T), generator=seeded())
    found, kind = stepped(model, tokens)
    assert kind is Decoder
    torch.testing.assert_close(found, model(tokens), atol=1e-4, rtol=1e-4)
