"""The classification task on made-up texts: losses, measures, floors, answers, a start from other models, errors."""

import functools
import json
import shlex
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import WORDS, make_text, run_of, sampled, settings_for
from test_train import resume

import evaluate
import sample
import train
from configurator import UserError, say
from machine.distributed import World
from run import checkpoint
from sources import labelled, texts
from tasks.classification import ClassificationTask, bag_of
from tasks.labels import averages, described, f1
from tasks.loading import load

ALONE = World(0, 1, torch.device("cpu"))
GROUPS = {"people": ("king", "queen", "fool"), "weather": ("storm", "night", "day"), "things": ("sword", "grave")}
COMMON = [word for word in WORDS if not any(word in group for group in GROUPS.values())]


def make_rows(count=240, several=False, seed=0):
    """Texts of 2 to 12 words, each with a word for each of its labels. With `several`, a text has none to three."""
    generator, rows = np.random.default_rng(seed), []
    for _ in range(count):
        names = [name for name in GROUPS if generator.random() < 0.5] if several else [generator.choice([*GROUPS])]
        words = [generator.choice(GROUPS[name]) for name in names]
        words += [*generator.choice(COMMON, generator.integers(2, 9))]
        generator.shuffle(words)
        rows.append({"text": " ".join(words), "labels": [*map(str, names)]})
    return rows


def prepared(folder, rows, tokenizer="word:1"):
    how = labelled.How(tokenizer=tokenizer, val_fraction=0.15)
    labelled.prepare(rows, folder, "labels", how, "made up")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{several: the folder of a prepared data set}."""
    folder = tmp_path_factory.mktemp("labels")
    return {several: prepared(folder / str(several), make_rows(several=several)) for several in (False, True)}


@pytest.fixture(scope="module")
def tiny(folders):
    return dict(dataset=str(folders[False]), n_layer=1, n_head=2, n_embd=16, block_size=12, batch_size=16, max_iters=60,
                warmup_iters=5, learning_rate=2e-2, min_lr=1e-3, optimizer="muon", eval_interval=30,
                log_interval=10, device="cpu", dtype="float32")


run = functools.partial(run_of, "classification")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, folders):
    """{several: the folder of a finished run}."""
    folder = tmp_path_factory.mktemp("runs")
    for several, data in folders.items():
        run(folder / str(several), tiny, dataset=str(data), max_iters=120 if several else 60)
    return {several: folder / str(several) for several in folders}


def opened(folder, data):
    task, model, _ = load(folder)
    task.open(data, ALONE)
    task.fit(model)
    return task, model


@pytest.mark.parametrize("several", [False, True])
def test_an_evaluation_is_the_mean_over_all_texts(runs, folders, several):
    task, model = opened(runs[several], folders[several])
    nats, right = [], []
    for row, text in zip(task.dataset.rows["val"], task.texts["val"]):
        logits = model(torch.tensor([text]), torch.tensor([len(text)]))[0].double()
        has = torch.tensor([name in row["labels"] for name in model.config.labels])
        p = logits.sigmoid() if several else logits.softmax(0)
        nats.append(-(torch.where(has, p, 1 - p).log().mean() if several else p[has].log().sum()).item())
        chosen = p > 0.5 if several else p == p.max()
        right.append(chosen.equal(has))
    found = task.evaluate(model, "val", ALONE, torch.float32)
    assert found == pytest.approx({"loss": np.mean(nats), "accuracy": np.mean(right)}, abs=1e-5)
    assert found["accuracy"] > 0.85 and found["loss"] == pytest.approx(
        checkpoint.read_config(runs[several] / "best")["val_loss"], abs=1e-6)
    assert task.evaluate(model, "val", ALONE, torch.float32, limit=40)["loss"] != found["loss"]


@pytest.mark.slow
def test_a_resumed_run_equals_an_undisturbed_one_and_pieces_do_not_change_the_loss(tiny, tmp_path):
    changes = dict(max_iters=8, eval_interval=4, log_interval=2)
    drawn = {**tiny, "dropout": 0.1, "micro_batch_size": 5}
    whole = run(tmp_path / "whole", drawn, **changes)
    run(tmp_path / "parts", drawn, **{**changes, "max_iters": 4, "lr_decay_iters": 8})
    resume(tmp_path / "parts", "--max_iters=8")
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert len(whole) == 5
    for a, b in zip(run(tmp_path / "a", tiny, **changes), run(tmp_path / "b", tiny, micro_batch_size=5, **changes)):
        assert a == pytest.approx(b, abs=1e-3, rel=1e-3)  # with AMX, Muon rounds to bfloat16


def test_a_run_learns_from_train_rows_texts_alone(folders):
    task = ClassificationTask(settings_for("classification", train_rows=20, batch_size=10, block_size=4))
    task.open(folders[False], ALONE)
    task.fit(task.build(torch.Generator().manual_seed(0)))
    assert len({row for step in range(30) for row in task.pick(step)}) == 20
    full = sum(len(task.dataset.rows["train"][row]["text"].split()) >= 3 for row in task.rows)
    assert f"20 rows of shakespeare_char, {full} of which fill the model's 4 tokens" in task.summary(
        task.build(torch.Generator()))


def test_lines_are_answered_in_order_as_each_alone(runs, folders, capsys, tmp_path):
    task, model = opened(runs[False], folders[False])
    texts = [row["text"] for row in task.dataset.rows["val"]]
    lines = [texts[0], "", *texts[1:20]]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n")
    found = sampled(runs[False], capsys, f"--prompt=FILE:{tmp_path / 'in.txt'}", "--top=1")
    assert found == "\n".join(task.write(model, line, top=1) if line else "" for line in lines) + "\n"
    p = model(torch.tensor([task.texts["val"][0]]), torch.tensor([len(task.texts["val"][0])])).softmax(-1)[0]
    shown = sampled(runs[False], capsys, f"--prompt={texts[0]}", "--top=0").splitlines()[1].split(", ")
    names, shares = zip(*(each.split() for each in shown))
    assert [*map(float, shares)] == pytest.approx(sorted(p.tolist(), reverse=True), abs=6e-4)
    assert names[0] == model.config.labels[p.argmax()] and {*names} == {*GROUPS}


def test_labels_above_a_half_stand_before_the_others():
    shares = np.array([0.2, 0.9, 0.51, 0.1])
    assert described("abcd", shares, 3, True) == "b 0.900, c 0.510 | a 0.200"
    assert described("abcd", shares, 1, True) == "b 0.900, c 0.510"
    assert described("abcd", shares / 2, 0, True) == "none | b 0.450, c 0.255, a 0.100, d 0.050"


@pytest.mark.parametrize("several", [False, True])
def test_measures_are_scikit_learns(several):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    found, wanted = (generator.random((60, 5)) < 0.4 for _ in range(2))
    if not several:
        found, wanted = (np.eye(5, dtype=bool)[generator.integers(4, size=60)] for _ in range(2))
    with_others = np.pad(wanted, ((0, 0), (0, 1)))
    expected = metrics.f1_score(wanted, found, average=None, zero_division=np.nan)
    assert f1(found, with_others) == pytest.approx(expected, nan_ok=True) and np.isnan(expected).any() != several
    assert averages(found, with_others) == pytest.approx({
        "accuracy": metrics.accuracy_score(wanted, found), "macro_f1": np.nanmean(expected)})
    with_others[:, -1] = True  # each text also has a label that the model lacks
    assert averages(found, with_others)["accuracy"] == 0


@pytest.mark.parametrize("several", [False, True])
def test_evaluate_scores_the_labels_beside_the_floors(runs, folders, tmp_path, several):
    from PIL import Image
    pytest.importorskip("sklearn")
    task, model = opened(runs[several], folders[several])
    picture = "" if several else str(tmp_path / "confusion.png")
    evaluate.main(settings_for("classification", "evaluating", out_dir=str(runs[several]), device="cpu", test=True,
                               picture=picture))
    found = json.loads((runs[several] / "evaluation.json").read_text())
    for start, name, part in (("", "", "val"), ("test ", "_test", "test")):
        rows = [json.loads(line) for line in (runs[several] / f"predictions{name}.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows] == [row["text"] for row in task.dataset.rows[part]]
        right = np.mean([{*row["predicted"]} == {*row["labels"]} for row in rows])
        assert found[f"{start}accuracy"] == pytest.approx(right) and found[f"{start}texts"] == len(rows)
        floors = [found[f"{start}accuracy, {name}"] for name in ("most frequent", "bag of words", "bag of characters")]
        assert min(floors[1:]) > floors[0] + 0.2
        assert found[f"{start}macro_f1"] > 0.8 and found[f"{start}loss"] > 0
        assert several or found[f"{start}macro_f1"] == pytest.approx(
            np.mean([value for key, value in found.items() if key.startswith(f"{start}f1, ")]))
    if not several:
        assert Image.open(tmp_path / "confusion_test.png").size == Image.open(picture).size
        drawn = Image.open(picture)
        left, top = drawn.width - 7 - 3 * 30, drawn.height - 7 - 3 * 30  # of the first of three squares of 30 pixels
        shades = [[drawn.getpixel((left + 30 * x + 15, top + 30 * y + 15))[0] for x in range(3)] for y in range(3)]
        assert all(row[i] == min(row) < 100 for i, row in enumerate(shades))  # the right answers are the darkest


def test_without_scikit_learn_the_bags_are_left_out_in_a_line(runs, folders, monkeypatch, capsys):
    task, model = opened(runs[False], folders[False])
    monkeypatch.setitem(sys.modules, "sklearn", None)
    say.cache_clear()  # so that it is said again
    settings = settings_for("classification", "evaluating", out_dir=str(runs[False]), device="cpu")
    found = task.details(model, "val", ALONE, torch.float32, settings, {})
    assert found["macro_f1"] > 0.8 and "accuracy, most frequent" in found and not any("bag" in name for name in found)
    assert "bags of words and characters: left out; for more, pip install scikit-learn\n" in capsys.readouterr().err


def test_the_bags_learn_from_the_texts_that_the_model_learns_from(folders):
    pytest.importorskip("sklearn")
    task = ClassificationTask(settings_for("classification", train_rows=6, batch_size=3))
    task.open(folders[False], ALONE)
    task.fit(task.build(torch.Generator().manual_seed(0)))
    learned = [task.dataset.rows["train"][row]["text"] for row in task.rows]
    with mock.patch("tasks.classification.bag_of", wraps=bag_of) as spy:
        found = task.floors("val")
    assert [call.args[:2] for call in spy.mock_calls] == [("words", learned), ("characters", learned)]
    assert all(averages(floor, task.labels["val"])["accuracy"] < 0.9 for floor in found.values())


def test_a_label_that_the_model_lacks_is_an_error_and_weighs_nothing(runs, folders, tmp_path):
    task, model = opened(runs[False], folders[False])
    before = task.evaluate(model, "val", ALONE, torch.float32)
    rows = [json.loads(line) for line in (folders[False] / "val.jsonl").read_text().splitlines()]
    rows[0]["labels"] = ["unheard of"]
    task.dataset.rows["val"] = rows
    task.fit(model)
    found = task.evaluate(model, "val", ALONE, torch.float32)
    assert found["accuracy"] == pytest.approx(before["accuracy"] - 1 / len(rows), abs=1e-6)
    assert averages(task.labels["val"][:, :-1], task.labels["val"])["accuracy"] == pytest.approx(1 - 1 / len(rows))
    arguments, weights = task.gather("val", range(len(rows)))
    assert weights.tolist() == [0] + [1] * (len(rows) - 1)


def test_a_start_from_a_run_with_other_labels_keeps_its_encoder(runs, folders, tiny, tmp_path, capsys):
    """A frozen encoder stays as it is. The text is read with the tokenizer of the run that the model comes from."""
    run(tmp_path / "new", tiny, dataset=str(folders[True]), init_from=str(runs[False]), rates={"encoder": 0.0},
        max_iters=20, eval_interval=20, optimizer="adamw")
    assert "its encoder gets a new head" in capsys.readouterr().err
    (one, first), (other, second) = (load(folder)[:2] for folder in (runs[False], tmp_path / "new"))
    torch.testing.assert_close(first.encoder.state_dict(), second.encoder.state_dict(), atol=0, rtol=0)
    assert one.tokenizer.words == other.tokenizer.words and second.config.several


def test_the_command_that_a_run_suggests_works(runs, folders, capsys):
    for several in runs:
        task, model = opened(runs[several], folders[several])
        _, script, out, prompt = shlex.split(task.command(runs[several]))
        assert script == "sample.py" and sampled(runs[several], capsys, prompt).count("\n") == 2
        assert task.show(model).count("\n") > task.show(model, short=True).count("\n") > 1


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The folders of a text, and of a GPT that was trained on it."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "words.txt").write_text(make_text(600), encoding="utf-8")
    texts.prepare([folder / "words.txt"], folder / "text", "char")
    train.main(settings_for("text", dataset=str(folder / "text"), out_dir=str(folder / "gpt"), n_layer=1, n_embd=16,
                            max_iters=2, sample_tokens=0, device="cpu"), {})
    return folder


def test_wrong_use_is_one_line(runs, folders, tiny, others, tmp_path, capsys):
    with pytest.raises(UserError, match="is a data set of kind text, and this model needs one of kind labels"):
        run(tmp_path, tiny, dataset=str(others / "text"))
    with pytest.raises(UserError, match="is of the class GPT, and --task=classification starts from an encoder"):
        run(tmp_path, tiny, init_from=str(others / "gpt"))
    with pytest.raises(UserError, match="train_rows = 999: the data set .* has only"):
        run(tmp_path, tiny, train_rows=999)
    with pytest.raises(UserError, match="pool = 'first', n_embd = 18, but .* has 'mean', 16: leave it out"
                       " .if a recipe names it, --pool=mean --n_embd=16 undoes that; or .* --dataset=/"):
        run(tmp_path, tiny, init_from=str(runs[False]), pool="first", n_embd=18)
    with pytest.raises(UserError, match="this model classifies texts: add --prompt"):
        sampled(runs[False], capsys)
    evaluating = dict(out_dir=str(runs[True]), device="cpu")
    with pytest.raises(UserError, match="picture = x.png: shows which label was taken for which"):
        evaluate.main(settings_for("classification", "evaluating", **evaluating, picture="x.png"))
    with pytest.raises(UserError, match="have one label each, and the model names several: name another"):
        evaluate.main(settings_for("classification", "evaluating", **evaluating, dataset=str(folders[False])))
    shouted = prepared(tmp_path / "shouted", [{**row, "labels": [name.upper() for name in row["labels"]]}
                                             for row in make_rows()])
    with pytest.raises(UserError, match="has none of the model's labels, such as people: name another"):
        evaluate.main(settings_for("classification", "evaluating", out_dir=str(runs[False]), dataset=str(shouted)))


def test_texts_that_are_cut_and_unknown_words_are_named(runs, capsys):
    prompt = "the purple king\n" + "a king " * 20
    sample.main(settings_for("classification", "sampling", out_dir=str(runs[False]), prompt=prompt))
    shown, said = capsys.readouterr()
    assert shown.split("\n")[::2] == ["the purple king", "a king " * 14 + "a ...", ""]  # 100 characters at most
    assert "texts longer than the model's 11 tokens, which lose their end: 1 of 2" in said
    assert "words that the model does not know, 1: purple" in said
