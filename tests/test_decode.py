"""decode.c computes what the trunk does, and PyTorch takes the steps of edited blocks and wherever decode.c can't."""

import functools
import json
import os
import types

import pytest
import torch

import model as models
from beam import beam_search
from generate import generate, pick_tokens
from lora import add_lora
from machine import decode
from machine.digest import digests, source_tokens
from model import GPT, MLP, Block, GPTConfig, init_weights
from seq2seq import Seq2Seq, Seq2SeqConfig

C, T, B, S = 64, 24, 5, 19
SIZES = dict(n_layer=2, n_head=4, n_embd=C, block_size=T, vocab_size=11)
LENGTHS = torch.tensor([19, 1, 8, 17, 2])
needs_compiler = pytest.mark.skipif(not decode.library(), reason="there is no C compiler")
KINDS = [
    {}, dict(bias=True), dict(mlp="relu2", positions="rotary", tied=False, bigrams=True),
    dict(norm="rmsnorm", mlp="geglu", positions="rotary", n_kv_head=2, head_dim=32), dict(n_kv_head=1, n_hidden=80),
    dict(norm="plain_rmsnorm", mlp="swiglu", positions="rotary", n_kv_head=2, qkv_bias=True,
         rope_scaling={"factor": 4.0})]
TRANSLATORS = [
    {}, dict(block="post"), dict(block="post", final_norm=False, n_kv_head=2, head_dim=32, norm="rmsnorm"),
    dict(bias=False, norm="plain_rmsnorm", mlp="swiglu", positions="rotary", n_kv_head=1, qkv_bias=True)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_gpt(**changes):
    return stirred(GPT(GPTConfig(**dict(SIZES, **changes))))


def make_translator(lengths=None, **changes):
    """(model, the context of B sources). lengths: of the sources, which are padded to S; None: all have S tokens."""
    model = stirred(Seq2Seq(Seq2SeqConfig(**dict(SIZES, **changes))))
    source = torch.randint(11, (B, S), generator=seeded(2))
    with torch.no_grad():
        return model, model.encode(source, torch.full((B,), S) if lengths is None else lengths)


def stirred(model):
    init_weights(model.eval(), seeded(), std=0.3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded(1)))
    return model


@pytest.fixture
def steps_taken(monkeypatch):
    """The lengths T of the compiled steps, in order."""
    taken, real = [], decode.Steps.step

    def step(self, x, *rest):
        taken.append(x.size(1))
        return real(self, x, *rest)

    monkeypatch.setattr(decode.Steps, "step", step)
    return taken


@torch.inference_mode()
def stepped(model, tokens, **context):
    """The logits of all tokens, fed as a prompt of three tokens and then one by one."""
    caches = model.make_caches(len(tokens), tokens.size(1))
    cuts = [0, *range(3, tokens.size(1) + 1)]
    with decode.fast_steps(model):
        parts = [model.logits(model.hidden(tokens[:, a:b], caches, a, **context)) for a, b in zip(cuts, cuts[1:])]
    return torch.cat(parts, dim=1)


TOKENS = torch.randint(11, (B, T), generator=seeded())


@needs_compiler
@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_steps_give_the_uncached_logits(monkeypatch, changes, threads):
    """With QUILL_ACCEPT=1, it writes the digests of the blocks' present code to decode.json if the logits are equal."""
    model = make_gpt(**changes)
    check_steps(monkeypatch, model, model.transformer, threads)


@needs_compiler
@pytest.mark.parametrize("changes", TRANSLATORS)
@pytest.mark.parametrize("lengths, threads", [(None, 1), (LENGTHS, 1), (LENGTHS, 2)])
def test_compiled_steps_of_a_translator_give_the_uncached_logits(monkeypatch, changes, lengths, threads, steps_taken):
    """So does this one."""
    model, context = make_translator(lengths, **changes)
    check_steps(monkeypatch, model, model.decoder, threads, **context)
    assert steps_taken == [3, *[1] * (T - 3)]


def check_steps(monkeypatch, model, trunk, threads, **context):
    found = digests(trunk)
    if os.environ.get("QUILL_ACCEPT"):
        monkeypatch.setattr(decode, "KNOWN", found)
    monkeypatch.setattr(decode, "THREADS_FROM", 0 if threads > 1 else 2**60)
    assert decode.can_step(trunk), "you changed the blocks: run this test once with QUILL_ACCEPT=1"
    expected = model.logits(model.hidden(TOKENS, **context)).detach()
    torch.testing.assert_close(stepped(model, TOKENS, **context), expected, atol=1e-4, rtol=1e-4)
    if os.environ.get("QUILL_ACCEPT"):
        path = decode.SOURCE.with_suffix(".json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **found}, indent=1, sort_keys=True) + "\n")


@needs_compiler
@pytest.mark.parametrize("changes", [
    {}, dict(bias=True, mlp="relu2", positions="rotary", tied=False, bigrams=True),
    dict(norm="rmsnorm", mlp="geglu", positions="rotary", n_kv_head=2, head_dim=32)])
@pytest.mark.parametrize("prompt_tokens", [decode.PROMPT_TOKENS, 0])  # the prompt in one piece, or two tokens at a time
def test_compiled_bfloat16_steps_are_closer_to_float32_than_pytorchs(monkeypatch, changes, prompt_tokens, steps_taken):
    monkeypatch.setattr(decode, "PROMPT_TOKENS", prompt_tokens)
    monkeypatch.setattr(decode, "emulates_bfloat16", lambda: True)
    model = make_gpt(**changes).bfloat16()
    found = stepped(model, TOKENS)
    assert steps_taken
    plain, exact = model(TOKENS), model.float()(TOKENS)
    assert (found - exact).norm() < (plain - exact).norm() < 0.1 * exact.norm()


def scaled(by):
    """A forward for the MLP whose output is scaled."""
    def forward(self, x, real=MLP.forward):
        return by * real(self, x)
    return forward


def halved(q, k, v, *more, attend=models.attend):
    return attend(q / 2, k, v, *more)


class OtherBlock(Block):
    """A subclass that changes nothing, which decode.py does not check."""


def edit_class(model, monkeypatch):
    monkeypatch.setattr(MLP, "forward", scaled(1.01))


def edit_function(model, monkeypatch):
    monkeypatch.setattr(models, "attend", halved)


def edit_instance(model, monkeypatch):
    mlp = model.transformer.blocks[1].mlp
    mlp.forward = types.MethodType(scaled(1.5), mlp)


def hook(model, monkeypatch):
    model.transformer.blocks[1].mlp.register_forward_hook(lambda module, args, out: 1.5 * out)


def subclass(model, monkeypatch):
    model.transformer.blocks[1].__class__ = OtherBlock


def lora(model, monkeypatch):
    add_lora(model, 2, seeded())
    for p in model.parameters():
        p.data += 0.1


def without_source(model, monkeypatch):
    names = {"real": MLP.forward}
    exec("def forward(self, x):\n    return 1.5 * real(self, x)", names)
    monkeypatch.setattr(MLP, "forward", names["forward"])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("edit", [edit_class, edit_function, edit_instance, hook, subclass, lora, without_source])
def test_pytorch_takes_the_steps_of_an_edited_block(monkeypatch, capsys, steps_taken, edit, dtype):
    """So all logits are those of the edited block."""
    monkeypatch.setattr(decode, "emulates_bfloat16", lambda: True)
    decode.say.cache_clear()
    model = make_gpt().to(dtype)
    stepped(model, TOKENS)
    assert steps_taken  # compiled steps were taken before the edit
    steps_taken.clear()
    edit(model, monkeypatch)
    found = stepped(model, TOKENS)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(found, model(TOKENS), atol=tolerance, rtol=tolerance)
    assert not steps_taken
    if edit in (edit_class, edit_function, without_source):
        assert "so PyTorch takes the steps instead of decode.c" in capsys.readouterr().err


def test_digests_ignore_comments_and_docstrings(tmp_path, monkeypatch):
    source = 'import torch\n\nclass {name}(torch.nn.Module):\n    """{doc}"""\n\n    def forward(self, x):{comment}\n' \
             '        return x * {factor}  # here\n'
    variants = [dict(doc="One.", comment="", factor=2), dict(doc="Two.", comment="  # why\n\n", factor=2),
                dict(doc="One.", comment="", factor=3)]
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for number, values in enumerate(variants):
        (tmp_path / f"variant{number}.py").write_text(source.format(name="Part", **values))
        found += digests(__import__(f"variant{number}").Part()).values()
    assert found[0] == found[1] != found[2]


def with_strings(x, name):
    """A docstring, which is left out."""
    return f"{x} of {name!r:>{len(f'{x}')}}", """two
lines""", f"""{x}
    more""" + "plain"


def test_source_tokens_are_the_same_in_every_python():
    """From Python 3.12 on, tokenize splits an f-string into several tokens."""
    strings = ('f"{x} of {name!r:>{len(f\'{x}\')}}"', '"""two\nlines"""', 'f"""{x}\n    more""" + "plain"')
    assert source_tokens(with_strings.__code__) == (
        "def with_strings ( x , name ) : NEWLINE INDENT NEWLINE return " + " , ".join(strings) + " NEWLINE")


def test_fast_steps_are_removed_when_generation_ends():
    model = make_gpt()
    pick = functools.partial(pick_tokens, temperature=0)
    steps = generate(model, TOKENS[:, :3], 9, pick)
    next(steps)
    steps.close()  # an abandoned sample
    assert "forward" not in vars(model.transformer)
    assert len(list(generate(model, TOKENS[:, :3], 9, pick))) == 9 and "forward" not in vars(model.transformer)


@needs_compiler
def test_weights_that_moved_in_memory_are_found_again(steps_taken):
    model = make_gpt()
    for _ in range(2):
        torch.testing.assert_close(stepped(model, TOKENS), model(TOKENS), atol=1e-4, rtol=1e-4)
        for p in model.parameters():
            p.data = 1.5 * p.data
    assert steps_taken


def test_pytorch_takes_bfloat16_steps_where_the_cpu_has_bfloat16(monkeypatch, steps_taken):
    monkeypatch.setattr(decode, "emulates_bfloat16", lambda: False)
    stepped(make_gpt().bfloat16(), TOKENS)
    assert not steps_taken


@needs_compiler
def test_compiled_steps_choose_the_same_tokens(monkeypatch):
    model, texts = make_gpt(), []
    for can_step in (decode.can_step, lambda trunk: False):
        monkeypatch.setattr(decode, "can_step", can_step)
        pick = functools.partial(pick_tokens, temperature=0.8, generator=seeded())
        texts.append(torch.stack(list(generate(model, torch.zeros(3, 1, dtype=torch.long), 3 * T, pick))))
    assert torch.equal(*texts)


@needs_compiler
@pytest.mark.parametrize("changes", [{}, dict(block="post", final_norm=False, n_kv_head=2)])
def test_compiled_steps_find_the_same_beams(monkeypatch, steps_taken, changes):
    """Rows are reordered, and leave the batch with their caches and memory."""
    model, context = make_translator(LENGTHS, **changes, tied=False)
    start = torch.zeros(B, 1, dtype=torch.long)
    fast = beam_search(model, start, T, 3, 7, 1.0, **context)
    assert len(steps_taken) == max(h.length for row in fast for h in row) > min(row[-1].length for row in fast) + 3
    monkeypatch.setattr(decode, "can_step", lambda trunk: False)
    for row, expected in zip(fast, beam_search(model, start, T, 3, 7, 1.0, **context)):
        assert [h.ids for h in row] == [h.ids for h in expected]
        assert [h.nats for h in row] == pytest.approx([h.nats for h in expected], abs=1e-3)


@needs_compiler
def test_compiled_steps_read_the_memory_caches_and_mask_where_they_are_now(steps_taken):
    model, context = make_translator()
    others = [make_translator(LENGTHS[order])[1] for order in ([0, 1, 2, 3, 4], [4, 2, 3, 1, 0])]
    caches, memory = model.make_caches(B, 4), context["memory"]
    with torch.inference_mode(), decode.fast_steps(model):
        model.hidden(TOKENS[:, :3], caches, 0, **context)
        for other in others:
            memory[:] = [(k.clone(), v.clone()) for k, v in other["memory"]]  # the same list; the old tensors are freed
            for cache in caches:
                cache.k, cache.v = cache.k.clone(), cache.v.clone()
            found = model.hidden(TOKENS[:, 3:4], caches, 3, memory=memory, memory_mask=other["memory_mask"])
            steps = len(steps_taken)
            expected = type(model.decoder).forward(model.decoder, model.embed(TOKENS[:, 3:4], model.wte)
                                                   + model.wpe.table[3], caches, **other, start=3)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert len(steps_taken) == steps
    assert steps_taken == [3, 1, 1]


@needs_compiler
@pytest.mark.parametrize("change", ["transposed", "added mask", "mask per head", "not remembered", "other heads"])
def test_pytorch_takes_steps_with_a_memory_that_decode_c_does_not_know(steps_taken, change):
    model, context = make_translator(LENGTHS)
    memory, mask, tokens = context["memory"], context["memory_mask"], TOKENS[:, :1]
    if change == "transposed":
        memory = [tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in pair) for pair in memory]
    elif change == "added mask":
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -1e9)
    elif change == "mask per head":
        mask = mask.expand(-1, 4, -1, -1).clone()
    elif change == "not remembered":
        memory = torch.randn(B, S, C, generator=seeded())
    else:
        for block in model.decoder.blocks:
            block.cross_attn.n_head, block.cross_attn.n_kv_head, block.cross_attn.head_dim = 2, 2, 32
        memory = model.decoder.remember(torch.randn(B, S, C, generator=seeded()))
    with torch.inference_mode():
        expected = model.hidden(tokens, memory=memory, memory_mask=mask)
        with decode.fast_steps(model):
            found = model.hidden(tokens, model.make_caches(B, 2), 0, memory=memory, memory_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not steps_taken


@needs_compiler
def test_pytorch_takes_steps_with_a_mask():
    trunk = make_gpt().transformer
    x, mask = torch.randn(B, 2, C, generator=seeded()), torch.rand(B, 1, 1, 2, generator=seeded()) < 0.7
    mask[..., 1] = True
    with torch.inference_mode(), decode.fast_steps(trunk):
        caches = trunk.make_caches(B, 2)
        trunk(x[:, :1], caches)
        found = trunk(x[:, 1:], caches, mask=mask, start=1)
        first = torch.tensor([True, False]).expand_as(mask)
        expected = trunk(x, mask=torch.cat((first, mask), dim=2))[:, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_compiler
def test_steps_that_exceed_the_caches_are_an_error():
    model, tokens = make_gpt(), torch.zeros(2, 1, dtype=torch.long)
    caches = model.make_caches(2, 8)
    with torch.inference_mode(), decode.fast_steps(model):
        for wrong, start in ((tokens, 8), (tokens.expand(2, 9), 0), (tokens[:1], 0)):
            with pytest.raises(AssertionError, match="the caches have 2 rows of 8"):
                model.hidden(wrong, caches, start)


@pytest.mark.parametrize("compiler", ["", "no_such_compiler", "false"])
def test_without_a_working_compiler_pytorch_takes_the_steps(monkeypatch, tmp_path, compiler, steps_taken):
    monkeypatch.setenv("QUILL_COMPILER", compiler)
    monkeypatch.setattr("sys.pycache_prefix", str(tmp_path))
    monkeypatch.setattr(decode, "library", decode.library.__wrapped__)
    model = make_gpt()
    torch.testing.assert_close(stepped(model, TOKENS), model(TOKENS), atol=1e-4, rtol=1e-4)
    assert not steps_taken


@pytest.mark.parametrize("known", [False, True])  # whether a norm in decode.json is in place of HeadNorm
def test_pytorch_takes_the_steps_of_a_model_with_qk_norm(known, steps_taken):
    model = make_gpt(qk_norm=True, norm="plain_rmsnorm", mlp="swiglu", positions="rotary", n_kv_head=2)
    for norm in (part for part in model.modules() if known and type(part) is models.HeadNorm):
        norm.__class__ = models.PlainRMSNorm
    torch.testing.assert_close(stepped(model, TOKENS), model(TOKENS), atol=1e-4, rtol=1e-4)
    assert not steps_taken


@pytest.mark.parametrize("changes", [dict(n_embd=72), dict(n_embd=60), dict(n_head=8), dict(n_hidden=100)])
def test_pytorch_takes_steps_of_widths_that_are_not_multiples_of_16(changes, steps_taken):
    model = make_gpt(**changes)
    torch.testing.assert_close(stepped(model, TOKENS), model(TOKENS), atol=1e-4, rtol=1e-4)
    assert not steps_taken
