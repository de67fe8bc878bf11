"""The translation task on a made-up language: batches, losses, translations in order, steps, maps, measures, errors."""

import dataclasses
import functools
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import curve_of, run_of, sampled, settings_for
from test_train import resume

import evaluate
import sample
import train
from configurator import UserError
from machine.distributed import World
from run import checkpoint
from run.pictures import draw_map
from sources import pairs
from tasks.loading import load
from tasks.settings import Translating
from tasks.translation import TranslationTask, length_batches, nearest

ROOT = Path(train.__file__).parent
ALONE = World(0, 1, torch.device("cpu"))
NOUNS = "king queen fool ghost lord lady storm sword night day crown grave".split()
VERBS = "loves hates fears sees hears takes gives breaks keeps".split()
SIZES = {"black": "nero", "old": "vecchio", "red": "rosso", "mad": "pazzo"}


def make_pairs(count=900, seed=0):
    """Sentences, and their translations: each word is written backwards, and an adjective follows its noun."""
    generator, rows = np.random.default_rng(seed), []
    for _ in range(count):
        parts, translated = [], []
        for _ in range(generator.integers(1, 3)):
            adjective, noun, verb = (str(generator.choice(words)) for words in ([*SIZES], NOUNS, VERBS))
            parts += ["the", adjective, noun, verb]
            translated += ["il", noun[::-1], SIZES[adjective], verb[::-1]]
        rows.append({"source": " ".join(parts) + " .", "target": " ".join(translated) + " ."})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a prepared data set with two vocabularies of words."""
    folder = tmp_path_factory.mktemp("pairs") / "ready"
    how = pairs.How(languages="en,xx", tokenizer="word:1", shared=False, val_fraction=0.05)
    pairs.prepare(make_pairs(), folder, how, "made up")
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    return dict(dataset=str(folder), n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=600, max_iters=150,
                warmup_iters=10, learning_rate=1e-2, min_lr=1e-3, optimizer="muon", eval_interval=75, log_interval=25,
                device="cpu", dtype="float32")


run = functools.partial(run_of, "translation")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    out_dir = tmp_path_factory.mktemp("runs") / "translation"
    run(out_dir, tiny)
    return out_dir


@pytest.fixture(scope="module")
def opened(trained, folder):
    """(task, model) of the finished run, with its data set."""
    task, model, _ = load(trained)
    task.open(folder, ALONE)
    task.fit(model)
    return task, model


def test_the_smoothed_loss_is_pytorchs_and_padding_weighs_nothing(opened):
    task, model = opened
    rows = task.rows["train"][:20]  # of unequal lengths
    arguments, weights = task.batch(rows, None)
    assert weights.sum() == task.weight(rows) and 0 < (weights == 0).sum()
    loss, shown = task.loss(model, arguments, weights)
    smoothed = plain = 0
    for row in rows:  # one sentence at a time, without padding
        source, target = task.dataset.ids("train", row)
        source, tokens, wanted = (torch.tensor([[*map(int, ids)]]) for ids in (
            [*source, task.source_tokenizer.eos], [task.tokenizer.bos, *target], [*target, task.tokenizer.eos]))
        logits = model(source, torch.tensor([source.size(1)]), tokens)
        smoothed += F.cross_entropy(logits[0], wanted[0], reduction="sum", label_smoothing=task.settings.smoothing)
        plain += F.cross_entropy(logits[0], wanted[0], reduction="sum")
    assert loss.item() == pytest.approx(smoothed.item(), rel=1e-5)
    assert shown["plain_loss"].item() == pytest.approx(plain.item(), rel=1e-5)


def test_evaluation_is_the_mean_over_all_target_tokens(opened, trained):
    task, model = opened
    total = count = 0
    for row in range(len(task.lengths["val"])):
        arguments, weights = task.gather("val", [row])
        total, count = total + model(**arguments).sum().item(), count + weights.sum().item()
    found = task.evaluate(model, "val", ALONE, torch.float32)["loss"]
    assert found == pytest.approx(total / count, abs=1e-5)
    assert found == pytest.approx(checkpoint.read_config(trained / "best")["val_loss"], abs=1e-6)
    assert task.evaluate(model, "val", ALONE, torch.float32, limit=20)["loss"] != found


def test_a_resumed_run_equals_an_undisturbed_one_and_pieces_do_not_change_the_loss(tiny, tmp_path):
    changes = dict(max_iters=12, eval_interval=6, log_interval=3)
    drawn = {**tiny, "dropout": 0.1, "micro_batch_size": 250}
    whole = run(tmp_path / "whole", drawn, **changes)
    run(tmp_path / "parts", drawn, **{**changes, "max_iters": 6, "lr_decay_iters": 12})
    resume(tmp_path / "parts", "--max_iters=12")
    assert curve_of(tmp_path / "parts") == whole
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    for a, b in zip(run(tmp_path / "a", tiny, **changes), run(tmp_path / "b", tiny, micro_batch_size=200, **changes)):
        assert a == pytest.approx(b, abs=1e-3, rel=1e-3)  # with AMX, Muon rounds to bfloat16


def test_pieces_share_the_rows_as_micro_batch_size_shares_the_tokens(opened):
    task = TranslationTask(dataclasses.replace(settings_for("translation", batch_size=1000, micro_batch_size=250)))
    assert [task.piece(range(n)) for n in (1, 4, 5, 33)] == [1, 1, 2, 9]


@pytest.mark.slow
def test_two_workers_compute_the_same_and_one_resumes(tiny, tmp_path):
    changes = dict(dropout=0.1, micro_batch_size=200, max_iters=12, eval_interval=6, log_interval=3, optimizer="adamw")
    whole = run(tmp_path / "one", tiny, **changes)
    arguments = [f"--{name}={value}" for name, value in {**tiny, **changes, "max_iters": 6}.items()]
    for shard in (False, True):
        out = tmp_path / f"two{shard}"
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                        str(ROOT / "train.py"), "--task=translation", *arguments, f"--out_dir={out}",
                        "--lr_decay_iters=12", *["--shard"] * shard], check=True, capture_output=True, timeout=300)
        if not shard:
            resume(out, "--max_iters=12")
        for a, b in zip(whole, curve_of(out)):
            assert a == pytest.approx(b, abs=2e-4, rel=1e-3)


def test_a_text_is_translated_line_by_line_in_order(opened, trained, capsys, tmp_path, monkeypatch):
    task, model = opened
    rows = task.dataset.rows["val"]
    right = [task.write(model, row["source"]) == row["target"] for row in rows]
    assert np.mean(right) > 0.8  # it has learned the language
    lines = [rows[0]["source"], "", *(row["source"] for row in rows[:0:-1]), "  ", rows[1]["source"]]
    alone = [task.write(model, line or " ") for line in lines]
    assert alone[1] == alone[-2] == "" and len(set(alone)) > 5
    monkeypatch.setattr("tasks.translation.CHUNK", 7)
    (tmp_path / "in.txt").write_text("\r\n".join(lines) + "\r\n")
    assert sampled(trained, capsys, f"--prompt=FILE:{tmp_path / 'in.txt'}") == "\n".join(alone) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert task.write(model, "\n".join(lines)) == "\n".join(alone)


def test_a_beam_shows_its_best_with_scores(opened, trained, capsys):
    task, model = opened
    text = task.dataset.rows["val"][0]["source"]
    found = sampled(trained, capsys, f"--prompt={text}", "--beam=4", "--n_best=3").rstrip("\n").split("\n")
    scores, texts = zip(*(line.split("\t") for line in found))
    assert len(found) == len(set(texts)) == 3 and sorted(map(float, scores), reverse=True) == [*map(float, scores)]
    assert task.write(model, text, beam=4) == texts[0]


def test_steps_show_the_tokens_and_their_probabilities(opened, trained, capsys):
    task, model = opened
    text = task.dataset.rows["val"][0]["source"]
    *steps, last = sampled(trained, capsys, f"--prompt={text}", "--show_steps").rstrip("\n").split("\n")
    tokens = [line.split()[1] for line in steps]
    assert tokens[-1] == "<eos>" and last == task.write(model, text)
    source, target = (torch.tensor([ids]) for ids in (task.tokens_of([text], 16)[0], task.translate(
        model, task.tokens_of([text], 16), Translating())[0][0].ids))
    tokens = F.pad(target, (1, 0), value=task.tokenizer.bos)
    p = model(source, torch.tensor([source.size(1)]), tokens).softmax(-1).max(-1).values[0]
    assert [float(line.split()[2]) for line in steps] == pytest.approx(p.tolist(), abs=6e-4)


def test_the_map_shows_where_each_token_looks(opened, trained, capsys, tmp_path, monkeypatch):
    from PIL import Image
    task, drawn = opened[0], []

    def spied(weights, rows, columns):
        drawn.append((weights, rows, columns))
        return draw_map(weights, rows, columns)

    monkeypatch.setattr("inside.picture.draw_map", spied)
    text = task.dataset.rows["val"][0]["source"]
    for name, more in (("all", ()), ("one", ("--attention_layer=1", "--attention_head=2")),
                       ("cut", ("--max_new_tokens=2",))):
        said = sampled(trained, capsys, f"--prompt={text}", f"--attention={tmp_path / name}.png", *more)
        assert f"wrote {tmp_path / name}.png" in said and Image.open(tmp_path / f"{name}.png").width > 100
    (mean, rows, columns), (one, *_), (_, cut, _) = drawn
    assert cut == rows[:2]  # no <eos>, for the model had more to say
    assert rows[-1] == columns[-1] == "<eos>" and len(columns) == len(text.split()) + 1 and not torch.equal(mean, one)
    torch.testing.assert_close(mean.square().sum(1), torch.ones(len(rows)))  # the shades are roots of weights
    assert mean.shape == (len(rows), len(columns))


def test_weights_are_drawn_in_their_cells():
    picture = draw_map(torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]), ["a", "b"], ["x", "y", "zz"], cell=20)
    left, top = picture.width - 3 * 20 - 5, picture.height - 2 * 20 - 5
    shades = [[sum(picture.getpixel((left + 20 * x + 9, top + 20 * y + 9))) for x in range(3)] for y in range(2)]
    (white, middle, dark), other = shades
    assert white == 3 * 255 and white > middle > dark and other == [dark, white, white]
    marked = draw_map(torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]), ["a", "b"], ["x", "y", "zz"], 20, [(1, 2)])
    red = [(x, y) for x in range(3) for y in range(2)
           if marked.getpixel((left + 20 * x + 20, top + 20 * y + 9)) == (255, 0, 0)]  # the right edge of a cell
    assert (2, 1) in red and not {(0, 0), (1, 0), (2, 0), (0, 1)} & set(red)


def test_evaluate_scores_the_translations_beside_the_floors(opened, trained, capsys):
    from sacrebleu.metrics import BLEU, CHRF
    task, model = opened
    evaluate.main(settings_for("translation", "evaluating", out_dir=str(trained), device="cpu", test=True, beam=2))
    found = json.loads((trained / "evaluation.json").read_text())
    for start, name, part in (("", "", "val"), ("test ", "_test", "test")):
        rows = [json.loads(line) for line in (trained / f"translations{name}.jsonl").read_text().splitlines()]
        assert [row["source"] for row in rows] == [row["source"] for row in task.dataset.rows[part]]
        written, wanted = ([row[key] for row in rows] for key in ("translation", "target"))
        assert found[f"{start}bleu"] == pytest.approx(BLEU().corpus_score(written, [wanted]).score)
        assert found[f"{start}chrf"] == pytest.approx(CHRF().corpus_score(written, [wanted]).score)
        assert found[f"{start}exact"] == np.mean([a == b for a, b in zip(written, wanted)])
        assert found[f"{start}bleu"] > found[f"{start}bleu, nearest sentence"] > found[f"{start}bleu, source copied"]
    assert "case:mixed" in found["signature"] and found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_the_nearest_sentence_is_the_one_of_tf_idf():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    train_texts, queries = ([row["source"] for row in make_pairs(n, seed)] for n, seed in ((200, 1), (50, 2)))
    tf_idf = text.TfidfVectorizer(token_pattern=r"\w+").fit(train_texts)
    scores = (tf_idf.transform(queries) @ tf_idf.transform(train_texts).T).toarray()
    found = nearest(train_texts, queries)
    assert scores[np.arange(50), found] == pytest.approx(scores.max(1))
    assert len(nearest(train_texts, ["unheard of", ""])) == 2


def test_batches_of_like_length_hold_every_row_once():
    lengths = np.random.default_rng(0).integers(1, 90, 500)
    batches = length_batches(lengths, 300)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert max(len(rows) * lengths[rows].max() for rows in batches) <= 300 and len(batches) < 1.2 * lengths.sum() / 300
    assert [rows.tolist() for rows in length_batches(np.array([500]), 300)] == [[0]]
    assert not length_batches(np.array([]), 300)


def test_pairs_longer_than_the_model_are_left_out_and_counted(opened, folder):
    task, model = opened
    config = dataclasses.replace(model.config, block_size=8)
    short = TranslationTask(settings_for("translation", batch_size=600))
    short.open(folder, ALONE)
    short.fit(type(model)(config))
    left = int((np.asarray(task.dataset.lengths["train"]).max(1) > 7).sum())
    assert 0 < left and f", {left:,} others are longer than block_size;" in short.summary(model)
    assert max(short.lengths["train"][short.pick(step)].max() for step in range(5)) <= 8


def test_the_command_that_a_run_suggests_works(opened, trained, capsys):
    _, script, out, prompt = shlex.split(opened[0].command(trained))
    assert script == "sample.py" and out == f"--out_dir={trained}"
    assert sampled(trained, capsys, prompt).strip()
    assert opened[0].show(opened[1]).count("\n") > opened[0].show(opened[1], short=True).count("\n") > 1


@pytest.mark.parametrize("arguments, message", [
    (["--prompt=the king " + "loves " * 20], "the sentence 'the king .*has 22 tokens, and the model reads at most 15"),
    (["--beam=999", "--prompt=the king"], "beam = 999: is wider than the vocabulary of"),
    (["--beam=2", "--n_best=3"], "n_best = 3: is above beam = 2; add --beam=3"),
    (["--n_best=3"], "n_best = 3: is for --beam above 1"), (["--length_penalty=1"], "length_penalty = 1.0: is for"),
    (["--beam=2", "--temperature=1"], "temperature = 1.0: a beam search draws nothing"),
    (["--top_k=3"], "top_k = 3: temperature = 0"), (["--attention=map.txt"], "attention = map.txt: must end in .png"),
    (["--attention_head=1"], "attention_head = 1: is for --attention"),
    (["--attention=map.png", "--attention_head=9", "--prompt=the king"], "attention_head = 9: the decoder has 2"),
    (["--attention=map.png", "--prompt= "], "attention: needs a --prompt of one sentence"),
    ([], "this model translates: add --prompt with a sentence"),
    (["--show_steps", "--prompt=the\nking"], "show_steps: needs a --prompt of one sentence"),
])
def test_wrong_sampling_is_one_line(arguments, message, trained, capsys):
    with pytest.raises(UserError, match=message):
        sampled(trained, capsys, *arguments)


def test_unknown_words_are_named(trained, capsys):
    sample.main(settings_for("translation", "sampling", out_dir=str(trained), prompt="the purple king sings ."))
    assert "words that the model does not know, 2: purple, sings" in capsys.readouterr().err


@pytest.mark.parametrize("changes, message", [
    (dict(batch_size=15), "batch_size = 15: counts tokens here, and the longest pair has 20"),
    (dict(block_size=3), "block_size = 3: no pair of the train split is that short"),
    (dict(smoothing=1.0), "smoothing = 1.0: must be below 1"), (dict(sample_tokens=9), "sample_tokens = 9"),
])
def test_wrong_training_is_one_line(changes, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, tiny, **changes)


def test_a_model_with_another_vocabulary_is_refused(trained, tiny, tmp_path):
    how = pairs.How(languages="en,xx", tokenizer="word:1", shared=True, val_fraction=0.05)
    pairs.prepare(make_pairs(300), tmp_path / "other", how, "made up")
    with pytest.raises(UserError, match="was made with other tokenizers than the model's"):
        run(tmp_path / "out", tiny, dataset=str(tmp_path / "other"), init_from=str(trained))
