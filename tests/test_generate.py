"""generate.py: how tokens are picked, generation with caches against the model without them, and beam search."""

import functools
import itertools

import pytest
import torch

from beam import beam_search
from generate import generate, pick_tokens
from model import GPT, GPTConfig, init_weights
from seq2seq import Seq2Seq, Seq2SeqConfig
from vit import ViTConfig
from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig

FAST = dict(positions="rotary", mlp="relu2", tied=False, bigrams=True)
GREEDY = functools.partial(pick_tokens, temperature=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_gpt(**changes):
    model = GPT(GPTConfig(**{**dict(n_layer=2, n_head=4, n_embd=24, block_size=16, vocab_size=11), **changes})).eval()
    init_weights(model, seeded())
    for i, p in enumerate(model.parameters()):  # larger weights than at initialisation, so that every path matters
        torch.nn.init.normal_(p, std=0.5, generator=seeded(i))
    return model


def written(*args, **context):
    """The tokens of all steps of `generate`, (B, steps)."""
    return torch.stack(list(generate(*args, **context)), dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Picking a token

def test_greedy_takes_the_likeliest_and_top_k_1_does_too():
    logits = torch.randn(5, 11, generator=seeded())
    assert torch.equal(GREEDY(logits), logits.argmax(-1))
    assert torch.equal(pick_tokens(logits, temperature=3.0, top_k=1, generator=seeded()), logits.argmax(-1))


@pytest.mark.parametrize("temperature, top_k, top_p, expected", [
    (1.0, 0, 1.0, [0.4, 0.3, 0.2, 0.1]),
    (0.5, 0, 1.0, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    (1.0, 2, 1.0, [4 / 7, 3 / 7, 0, 0]),
    (1.0, 99, 1.0, [0.4, 0.3, 0.2, 0.1]),
    (1.0, 0, 0.65, [4 / 7, 3 / 7, 0, 0]),  # the token that crosses top_p stays
    (1.0, 0, 0.75, [4 / 9, 3 / 9, 2 / 9, 0]),
    (1.0, 3, 0.45, [4 / 7, 3 / 7, 0, 0]),  # after top_k, 4/9 is below 0.45
    (1.0, 0, 1e-9, [1, 0, 0, 0]),
])
def test_samples_follow_the_distribution(temperature, top_k, top_p, expected):
    shuffle = torch.tensor([2, 0, 3, 1])  # so that the ids are not in order of probability
    n, expected = 40_000, torch.tensor(expected, dtype=torch.float)[shuffle]
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[shuffle].expand(n, 4)
    found = pick_tokens(logits, temperature, top_k, top_p, seeded()).bincount(minlength=4) / n
    assert (found[expected == 0] == 0).all()
    torch.testing.assert_close(found, expected, atol=4 * 0.5 / n**0.5, rtol=0)  # four standard deviations


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-40, 1e-39, 1e-30, 1e-10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_temperature_near_zero_takes_the_likeliest(temperature, dtype):
    logits = 30 * torch.stack([torch.randperm(9, generator=seeded(i)) for i in range(5)]).to(dtype)
    for more in ({}, {"top_k": 5}, {"top_p": 0.9}):
        assert torch.equal(pick_tokens(logits, temperature, generator=seeded(), **more), logits.argmax(-1))


def test_the_seed_determines_a_sample():
    model, prompt = make_gpt(), torch.zeros(2, 1, dtype=torch.long)
    one, same, other = (written(model, prompt, 30, functools.partial(pick_tokens, generator=seeded(s)))
                        for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])  # each row of a batch is a sample of its own


# ----------------------------------------------------------------------------------------------------------------------
# The loop

def reference_generate(model, tokens, n):
    """Greedy generation without caches. Once the window exceeds block_size, it shrinks to its last half."""
    window = tokens[:, -model.config.block_size:]
    for _ in range(n):
        tokens = torch.cat((tokens, model(window)[:, -1].argmax(-1, keepdim=True)), dim=1)
        window = torch.cat((window, tokens[:, -1:]), dim=1)
        if window.size(1) > model.config.block_size:
            window = window[:, -max(1, model.config.block_size // 2):]
    return tokens[:, -n:]


@pytest.mark.parametrize("block_size", [16, 7, 1])
@pytest.mark.parametrize("prompt_length", [1, 5, 16, 40])
@pytest.mark.parametrize("changes", [{}, FAST])
def test_generation_continues_past_block_size(prompt_length, block_size, changes):
    model = make_gpt(block_size=block_size, **changes)
    prompt = torch.randint(11, (3, prompt_length), generator=seeded())
    assert torch.equal(written(model, prompt, 40, GREEDY), reference_generate(model, prompt, 40))


class WithoutCaches(torch.nn.Module):
    """A model without `make_caches`."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.logits = model, model.config, model.logits

    def hidden(self, tokens):
        return self.model.hidden(tokens)


def test_a_model_without_caches_writes_the_same():
    model, prompt = make_gpt(), torch.randint(11, (3, 5), generator=seeded())
    found = written(WithoutCaches(model), prompt, 30, GREEDY)
    assert torch.equal(found[:, :12], written(model, prompt, 12, GREEDY))
    text = torch.cat((prompt, found), dim=1)
    for t in range(16, 35):  # past block_size, it sees the last block_size tokens
        assert torch.equal(text[:, t], model(text[:, t - 16:t])[:, -1].argmax(-1))


def test_a_row_that_has_ended_repeats_eos_and_generation_stops_when_all_rows_have():
    model, prompt = make_gpt(), torch.randint(11, (3, 5), generator=seeded())
    free, found = (written(model, prompt, 40, functools.partial(pick_tokens, generator=seeded()), eos)
                   for eos in (None, 7))
    ends = [row.tolist().index(7) for row in free]
    assert found.size(1) == max(ends) + 1 < 40 and len(set(ends)) > 1
    for row, expected, end in zip(found.tolist(), free.tolist(), ends):
        assert row == expected[:end] + [7] * (max(ends) + 1 - end)


@pytest.mark.parametrize("wrap, count", [(lambda model: model, 40), (WithoutCaches, 11)],
                         ids=["with caches", "without caches"])
def test_a_pick_may_say_which_row_each_token_continues(wrap, count):
    """As in beam search. With caches the test goes past block_size, where the window shrinks to its last half."""
    model, window, steps = make_gpt(**FAST), torch.randint(11, (3, 5), generator=seeded()), []

    def pick(logits):
        rows = torch.randint(3, (3,), generator=seeded(len(steps)))
        steps.append((logits, rows))
        return logits[rows].argmax(-1), rows

    for tokens in generate(wrap(model), window, count, pick):
        logits, rows = steps[-1]
        torch.testing.assert_close(logits, model(window)[:, -1], atol=1e-4, rtol=1e-4)
        window = torch.cat((window[rows], tokens[:, None]), dim=1)
        if window.size(1) > 16:
            window = window[:, -8:]
    assert len(steps) == count


def test_reordering_rows_reorders_which_have_ended():
    model, eos, calls = make_gpt(), 7, []
    picks = [([7, 1, 2], [0, 1, 2]), ([3, 3, 3], [1, 0, 0]), ([4, 4, 4], [0, 1, 2])]

    def pick(logits):
        calls.append(logits)
        return tuple(torch.tensor(part) for part in picks[len(calls) - 1])

    found = written(model, torch.zeros(3, 1, dtype=torch.long), 3, pick, eos)
    assert found.tolist() == [[7, 3, 4], [1, 7, 7], [2, 7, 7]]


# ----------------------------------------------------------------------------------------------------------------------
# Beam search

EOS, BOS = 10, 1


def make_seq2seq(vocab_size=11):
    """(model, context for three sources of different lengths)."""
    model = Seq2Seq(Seq2SeqConfig(n_layer=2, n_head=4, n_embd=24, block_size=24, vocab_size=vocab_size, tied=False))
    init_weights(model.eval())
    for i, p in enumerate(model.parameters()):
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3, generator=seeded(100 + i))  # greedy texts of 3, 20 and 1 tokens
    source = torch.randint(3, vocab_size, (3, 7), generator=seeded())
    return model, model.encode(source, torch.tensor([7, 4, 2]))


def begin(rows=3):
    return torch.full((rows, 1), BOS)


def total_nats(model, prompt, texts, context):
    """The log-probabilities of texts, lists of ids, after a prompt (1, T), by one pass without caches."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    x = model.hidden(torch.cat((prompt.expand(len(ids), -1), ids), dim=1)[:, :-1], **context)
    logp = model.logits(x)[:, -longest:].log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return [row[:len(text)].sum().item() for row, text in zip(logp, texts)]


def row_of(context, i):
    """The context of row i alone."""
    return {"memory": [(k[i:i + 1], v[i:i + 1]) for k, v in context["memory"]],
            "memory_mask": context["memory_mask"][i:i + 1]}


def same(found, expected):
    """Whether two lists of hypotheses are the same, to rounding."""
    return [h.ids for h in found] == [h.ids for h in expected] and \
        [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-4)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_of_1_is_greedy_search(length_penalty):
    model, context = make_seq2seq()
    greedy, ends = written(model, begin(), 20, GREEDY, EOS, **context).tolist(), set()
    for row, [found] in zip(greedy, beam_search(model, begin(), 20, 1, EOS, length_penalty, **context)):
        expected = row[:row.index(EOS)] if EOS in row else row
        assert found.ids == expected
        ends.add(found.length)
    assert ends == {3, 20, 1}


def test_a_beam_as_wide_as_all_prefixes_is_exhaustive_search():
    """All texts of at most 4 tokens of a vocabulary of 4: those that end, and those that are cut off."""
    model, context = make_seq2seq(vocab_size=4)
    texts = [(*ids, 3) for n in range(4) for ids in itertools.product(range(3), repeat=n)]  # 3: the end token
    texts += itertools.product(range(3), repeat=4)
    for length_penalty in (0.0, 2.0):
        for i, found in enumerate(beam_search(model, begin(), 4, 4 * 3**3, 3, length_penalty, **context)):
            nats = total_nats(model, begin(1), texts, row_of(context, i))
            scores = [total / ((5 + len(ids)) / 6) ** length_penalty for total, ids in zip(nats, texts)]
            best = sorted(range(len(texts)), key=lambda n: -scores[n])[:10]
            assert [(*h.ids, 3)[:h.length] for h in found[:10]] == [texts[n] for n in best]
            assert [h.score for h in found[:10]] == pytest.approx([scores[n] for n in best], abs=1e-4)
            assert [h.nats for h in found[:10]] == pytest.approx([nats[n] for n in best], abs=1e-4)


@pytest.mark.parametrize("beam, length_penalty", [(2, 0.0), (4, 0.6), (16, 1.0)])
def test_rows_together_give_what_each_gives_alone(beam, length_penalty):
    model, context = make_seq2seq()
    together = beam_search(model, begin(), 20, beam, EOS, length_penalty, **context)
    for i, found in enumerate(together):
        assert same(found, beam_search(model, begin(1), 20, beam, EOS, length_penalty, **row_of(context, i))[0])
        assert len(found) == beam and len({tuple(h.ids) for h in found}) == beam
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        nats = total_nats(model, begin(1), [[*h.ids, EOS][:h.length] for h in found], row_of(context, i))
        assert [h.nats for h in found] == pytest.approx(nats, abs=1e-3)


def test_finished_rows_leave_the_batch_and_the_others_go_on():
    model, context = make_seq2seq()
    sizes, own = [], model.hidden

    def hidden(tokens, *args, **more):
        sizes.append(len(tokens))
        return own(tokens, *args, **more)

    model.hidden = hidden
    beam_search(model, begin(), 20, 4, EOS, **context)
    assert sizes[0] == 12 and sizes[-1] < 12 and sizes == sorted(sizes, reverse=True) and len(sizes) <= 20


def test_a_beam_search_may_continue_an_image():
    """The caches hold the image before the tokens: each hypothesis has the log-probability of a pass without caches."""
    model = PaliGemma(PaliGemmaConfig(
        ViTConfig(n_layer=1, n_head=2, n_embd=16, image_size=8, patch_size=4),
        GemmaConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=64))).eval()
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.5, generator=seeded(i))
    images = model.encode(torch.randn(2, 3, 8, 8, generator=seeded()))
    for i, found in enumerate(beam_search(model, begin(2), 6, 3, EOS, image=images)):
        texts = [[*h.ids, EOS][:h.length] for h in found]
        context = {"image": images[i:i + 1].expand(3, -1, -1), "prefix": torch.ones(3)}  # the texts are causal
        nats = total_nats(model, begin(1), texts, context)
        assert [h.nats for h in found] == pytest.approx(nats, abs=1e-3)


def test_a_length_penalty_favours_long_hypotheses():
    model, context = make_seq2seq()
    short, long = (sum(found[0].length for found in beam_search(model, begin(), 20, 4, EOS, penalty, **context))
                   for penalty in (0.0, 4.0))
    assert short < long


@pytest.mark.parametrize("changes", [{}, FAST])
def test_beam_search_continues_a_prompt_by_a_gpt_up_to_its_last_position(changes):
    model, prompt = make_gpt(**changes), torch.randint(11, (2, 5), generator=seeded())
    found = beam_search(model, prompt, 99, 3, 99, length_penalty=0.0)  # 99: no token ends a text
    for row, hypotheses in zip(prompt, found):
        assert {len(h.ids) for h in hypotheses} == {16 + 1 - 5}
        nats = total_nats(model, row[None], [h.ids for h in hypotheses], {})
        assert [h.nats for h in hypotheses] == pytest.approx(nats, abs=1e-3)
    greedy = written(model, prompt, 12, GREEDY).tolist()
    assert [h[0].ids for h in beam_search(model, prompt, 99, 1, 99)] == greedy
