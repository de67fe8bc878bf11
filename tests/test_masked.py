"""The masked task: what is hidden, and what is made of it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configurator import UserError
from encoder import EncoderConfig, MaskedLM, SentenceConfig, SentenceEncoder
from machine.distributed import World
from model import init_weights
from tasks.encoding import marks_of
from tasks.masked import MaskedTask
from tasks.settings import Filling
from tokenizer import CharTokenizer

LETTERS = CharTokenizer("abcdefghij ")


@pytest.fixture
def task():
    found = MaskedTask(SimpleNamespace(task="masked", mask_rate=0.15, seed=1), {"tokenizer": LETTERS})
    found.block_size = 41
    return found


def new(cls=MaskedLM, config=EncoderConfig, **more):
    model = cls(config(n_layer=2, n_head=2, n_embd=32, vocab_size=marks_of(LETTERS).size, block_size=41, **more))
    init_weights(model, torch.Generator().manual_seed(0), std=0.3)
    return model.eval()


def framed(task, rows):
    return torch.tensor([task.framed(ids) for ids in rows.tolist()])


@pytest.mark.parametrize("length, count", [(1, 1), (3, 1), (10, 2), (40, 6), (63, 9)])
def test_each_row_hides_just_its_share(task, length, count):
    task.block_size, letters = 64, torch.randint(10, (50, length), generator=torch.Generator().manual_seed(0))
    tokens = framed(task, letters)
    hidden = task.hide(tokens, task.chosen(length), torch.Generator().manual_seed(3))
    assert hidden["places"].shape == (50, count) == (50, max(1, round(0.15 * length)))
    assert all(len(set(row)) == count for row in hidden["places"].tolist())
    assert hidden["places"].min() >= 1 and hidden["places"].max() <= length  # [CLS] at 0 is never chosen
    assert torch.equal(tokens.gather(1, hidden["places"]), hidden["targets"])
    changed = (hidden["tokens"] != tokens).nonzero().tolist()
    chosen = {(row, place) for row, places in enumerate(hidden["places"].tolist()) for place in places}
    assert {tuple(each) for each in changed} <= chosen


def test_of_the_chosen_tokens_80_percent_are_masked_and_10_percent_random(task):
    tokens = framed(task, torch.zeros(4000, 40, dtype=torch.long))  # all "a"
    hidden = task.hide(tokens, 6, torch.Generator().manual_seed(5))
    seen, n = hidden["tokens"].gather(1, hidden["places"]), 24000
    spread = 4 * math.sqrt(0.25 / n)
    assert abs((seen == marks_of(LETTERS).mask).double().mean() - 0.8) < spread
    kept = 0.1 + 0.1 / LETTERS.vocab_size  # a random token may be the right one
    assert abs((seen == 0).double().mean() - kept) < spread
    assert (seen < LETTERS.vocab_size).logical_or(seen == marks_of(LETTERS).mask).all()
    places = torch.bincount(hidden["places"].flatten(), minlength=41)[1:] / n
    assert abs(places - 1 / 40).max() < 0.005  # every place is as likely


def test_all_draws_come_from_the_generator(task):
    tokens = framed(task, torch.randint(10, (8, 40)))
    one, same, other = (task.hide(tokens, 6, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["places"], other["places"])


def test_the_loss_counts_the_hidden_tokens_alone(task):
    model, tokens = new(), framed(task, torch.randint(10, (3, 40)))
    hidden = task.hide(tokens, 6, torch.Generator().manual_seed(1))
    logits = model(hidden["tokens"])  # (B, S, V)
    right = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(model(**hidden), -right.gather(1, hidden["places"]))


def test_an_evaluation_is_deterministic_and_counts_every_window(task):
    ids = np.random.default_rng(0).integers(0, 10, 1000).astype(np.uint16)
    task.dataset = SimpleNamespace(splits={"train": ids[:10], "val": ids}, tokens=lambda split, size: ids)
    task.window, world, model, seen = 40, World(0, 1, torch.device("cpu")), new(), []
    first, again = (task.evaluate(model, "val", world, torch.float32) for _ in range(2))
    assert first == again
    model.register_forward_pre_hook(lambda _, __, named: seen.append(named["places"].numel()), with_kwargs=True)
    task.evaluate(model, "val", world, torch.float32)
    assert sum(seen) == 24 * 6 + round(0.15 * 39)  # the last window is shorter
    details = task.details(model, "val", world, torch.float32, None, first)
    likeliest = np.bincount(ids[:10], minlength=10).argmax()
    assert details["accuracy, most frequent token"] == (ids == likeliest).mean()


def test_blanks_are_filled_with_the_likeliest_tokens(task):
    model = new()
    ids = task.framed(LETTERS.encode("ab").tolist()) + [marks_of(LETTERS).mask] + LETTERS.encode(" d").tolist()
    shares = model(torch.tensor([ids]))[0, 3, :LETTERS.vocab_size].softmax(-1)
    found = "".join(piece for _, piece in task.sample(model, [{"text": "ab[MASK] d"}], Filling(top=3))).split("\n")
    best = shares.topk(3).indices.tolist()
    assert found[0] == f"ab{LETTERS.decode(best[:1])} d"
    assert [line.split()[1].replace("\u00b7", " ") for line in found[2:]] == [LETTERS.decode([i]) for i in best]
    np.testing.assert_allclose([float(line.split()[0]) for line in found[2:]], shares[best].tolist(), atol=1e-3)


def test_texts_are_ranked_by_the_cosine_of_their_mean_outputs(task, tmp_path):
    model, texts = new(), ["abc", "jjj jjj", "abd"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    sampling = Filling(rank=f"FILE:{tmp_path / 'texts.txt'}", top=0)
    found = "".join(piece for _, piece in task.sample(model, [{"text": "abc"}], sampling)).split("\n")
    means = [model.encoder(torch.tensor([task.framed(LETTERS.encode(text).tolist())])).mean(1)[0] for text in texts]
    cosines = {text: torch.cosine_similarity(means[0], mean, dim=0).item() for text, mean in zip(texts, means)}
    assert [line[8:] for line in found] == sorted(texts, key=cosines.get, reverse=True)
    np.testing.assert_allclose([float(line[:6]) for line in found], sorted(cosines.values(), reverse=True), atol=1e-3)


def test_a_bad_prompt_is_refused_in_one_line(task, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for text, sampling, model, words in (
            ("", Filling(), new(), "prompt is empty"), ("abc", Filling(), new(), "has no"),
            ("a" * 41 + "[MASK]", Filling(), new(), "42 tokens"),
            ("a", Filling(rank=f"FILE:{tmp_path / 'empty.txt'}"), new(), "has no text"),
            ("a[MASK]", Filling(), new(SentenceEncoder, SentenceConfig), "has no head")):
        with pytest.raises(UserError, match=words):
            list(task.sample(model, [{"text": text}], sampling))


def test_training_starts_from_any_encoder(task):
    start = new(SentenceEncoder, SentenceConfig)
    model = task.adopt(start, torch.Generator().manual_seed(0))
    assert type(model) is MaskedLM
    assert all(torch.equal(value, start.encoder.state_dict()[name]) for name, value in
               model.encoder.state_dict().items())
    assert task.adopt(model, None) is model
    task.source = "out"
    with pytest.raises(UserError, match="init_from = out: is of the class Linear"):
        task.adopt(torch.nn.Linear(2, 2), None)
