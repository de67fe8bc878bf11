"""The tagging task on a made-up language: words and pieces, losses, measures, samples, other starts, errors."""

import dataclasses
import functools
import json
import runpy
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
import train
from configurator import UserError, say
from encoder import Tagger
from machine.distributed import World
from run import checkpoint
from run.cost import count_parameters
from sources import labelled
from tasks.loading import load
from tasks.tagging import UNKNOWN, in_brackets, label_scores

ROOT = Path(train.__file__).parent
ALONE = World(0, 1, torch.device("cpu"))
FORMS = {"go": "i go from {from} to {to}", "send": "send {what} to {to} now", "ask": "who is in {to} ?"}
NAMES = "alma berno cilda dorex elun fanto gorim hesta ilvo juras kesta lomir".split()


def make_rows(count=500, seed=0):
    """Sentences with names of one or two words; some have no tags, or no intent."""
    generator, rows = np.random.default_rng(seed), []
    for number in range(count):
        intent = str(generator.choice(list(FORMS)))
        words, tags = [], []
        for word in FORMS[intent].split():
            value = [word]
            if slot := word.strip("{}") * word.startswith("{"):
                value = [str(name) for name in generator.choice(NAMES, generator.integers(1, 3))]
            words += value
            tags += [f"{'I' if i else 'B'}-{slot}" if slot else "O" for i in range(len(value))]
        rows.append({"words": words, "tags": [] if number % 10 == 1 else tags,
                     "intent": "" if number % 10 == 2 else intent})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a prepared data set. Two rows of the test part have labels that training does not have."""
    folder = tmp_path_factory.mktemp("tags") / "ready"
    rows = [{**row, "split": ("train", "train", "val", "test")[number % 4]} for number, row in enumerate(make_rows())]
    rows += [{"words": ["berno", "sleeps"], "tags": tags, "intent": intent, "split": "test"}
             for tags, intent in ((["B-who", "O"], "go"), (["O", "O"], "sleep"))]
    labelled.prepare(rows, folder, "tags", labelled.How(tokenizer="bpe:290"), "made up")
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    return dict(dataset=str(folder), n_layer=1, n_head=2, n_embd=32, block_size=48, batch_size=16, max_iters=100,
                positions="rotary", warmup_iters=5, learning_rate=1e-2, min_lr=1e-3, eval_interval=50, log_interval=10,
                device="cpu", dtype="float32")


run = functools.partial(run_of, "tagging")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    out_dir = tmp_path_factory.mktemp("runs") / "tagging"
    run(out_dir, tiny)
    return out_dir


def open_task(out_dir, folder):
    """(task, model) of a finished run, with a data set."""
    task, model, _ = load(out_dir)
    task.open(folder, ALONE)
    task.fit(model)
    return task, model


@pytest.fixture(scope="module")
def opened(trained, folder):
    return open_task(trained, folder)


def test_tags_and_intents_have_a_mean_each_and_padding_weighs_nothing(opened):
    task, model = opened
    rows = np.arange(30)
    arguments, weights = task.batch(rows, None)
    loss, _ = task.loss(model, arguments, weights / task.weight(rows))
    nats = {"tags": [], "intents": []}
    for row in (task.dataset.rows["train"][i] for i in rows):  # one at a time, without padding; the places by decoding
        pieces = [task.tokenizer.encode(word if i == 0 else f" {word}") for i, word in enumerate(row["words"])]
        ids = torch.tensor([[task.marks.cls, *np.concatenate(pieces)]])
        starts = 1 + np.cumsum([0, *map(len, pieces)])[:-1]
        hidden = model.encoder(ids)[0]
        if row["tags"]:
            wanted = torch.tensor([model.config.tags.index(tag) for tag in row["tags"]])
            nats["tags"] += F.cross_entropy(model.tags(hidden[starts]), wanted, reduction="none").tolist()
        if row["intent"]:
            nats["intents"] += [F.cross_entropy(model.intents(hidden[0]),
                                                torch.tensor(model.config.intents.index(row["intent"]))).item()]
    assert max(map(len, pieces)) > 1 and 20 < len(nats["intents"]) < 30  # some words have several pieces
    assert loss.item() == pytest.approx(np.mean(nats["tags"]) + np.mean(nats["intents"]), rel=1e-4)


def test_without_any_label_of_a_kind_the_loss_is_a_number(opened):
    task, model = opened
    rows = np.array([i for i, row in enumerate(task.dataset.rows["train"]) if not row["intent"]][:4])
    arguments, weights = task.batch(rows, None)
    loss, _ = task.loss(model, arguments, weights / task.weight(rows))
    assert torch.isfinite(loss) and weights[1].sum() == 0 < weights[0].sum()


def test_padding_and_other_rows_change_no_label(opened):
    task, model = opened
    sentences = [row["words"] for row in task.dataset.rows["val"]]
    together = task.label(model, sentences)
    for words, one in list(zip(sentences, together))[::9]:
        alone, = task.label(model, [words])
        assert alone.tags == one.tags and alone.intent == one.intent
        assert alone.p_tags == pytest.approx(one.p_tags, abs=1e-5) and len(alone.tags) == len(words)


def test_only_the_table_of_positions_grows_with_the_length(opened):
    config = opened[1].config
    counts = {(positions, size): count_parameters(Tagger(dataclasses.replace(
        config, positions=positions, block_size=size))) for positions in ("learned", "rotary") for size in (8, 99)}
    assert counts["learned", 99] - counts["learned", 8] == 91 * config.n_embd
    assert counts["rotary", 99] == counts["rotary", 8] == counts["learned", 8] - 8 * config.n_embd


def test_a_share_of_the_words_in_spans_is_hidden_and_nothing_else(opened):
    task, _ = opened
    rows = np.arange(200)
    task.settings.hide_rate = 0.3
    seen, _ = task.batch(rows, torch.Generator().manual_seed(0))
    task.settings.hide_rate = 0.0
    plain, _ = task.batch(rows, None)
    changed = seen["tokens"] != plain["tokens"]
    in_span = (plain["tags"] >= 0) & (plain["tags"] != task.ids["tags"]["O"])
    in_span = torch.zeros_like(changed).scatter(1, plain["places"], in_span)
    assert (seen["tokens"][changed] == task.marks.mask).all() and not changed[~in_span].any()
    assert changed[in_span].float().mean() == pytest.approx(0.3, abs=0.05)


def test_it_learns_and_the_evaluation_counts_as_the_names_do(opened, trained, folder, capsys):
    from seqeval.metrics import f1_score
    task, model = opened
    evaluate.main(settings_for("tagging", "evaluating", out_dir=str(trained), device="cpu", test=True,
                               picture=str(trained / "intents.png")))
    assert (trained / "intents_test.png").stat().st_size
    result = json.loads((trained / "evaluation.json").read_text())
    said = "accuracy: the mean of the shares of words and of sentences with the right label\n"
    assert said in task.summary(model)
    for start, name, part in (("", "labels", "val"), ("test ", "labels_test", "test")):
        rows = [json.loads(line) for line in (trained / f"{name}.jsonl").read_text().splitlines()]
        assert [row["words"] for row in rows] == [row["words"] for row in task.dataset.rows[part]]
        tagged = [row for row in rows if row["tags"]]
        pairs = [pair for row in tagged for pair in zip(row["tags"], row["found_tags"], strict=True)]
        in_spans = [pair for pair in pairs if pair[0] != "O"]
        intents = [(row["intent"], row["found_intent"]) for row in rows if row["intent"]]
        for measure, found in (("tag_accuracy", pairs), ("non_o_accuracy", in_spans), ("intent_accuracy", intents)):
            assert result[start + measure] == pytest.approx(np.mean([a == b for a, b in found])), measure
        spans = f1_score([row["tags"] for row in tagged], [row["found_tags"] for row in tagged])
        assert result[f"{start}span_f1"] == pytest.approx(spans)
        assert result[f"{start}tag_accuracy, all O"] == pytest.approx(np.mean([a == "O" for a, _ in pairs]))
        seen = [row["intent"] for row in task.dataset.rows["train"] if row["intent"]]
        most = max(seen, key=seen.count)
        assert result[f"{start}intent_accuracy, most frequent"] == pytest.approx(
            np.mean([a == most for a, _ in intents]))
        assert spans > 0.9 > result[f"{start}span_f1, usual tags"]  # from and to take the same names
    assert result["intent_accuracy"] == 1 > result["test intent_accuracy"] and (trained / "intents.png").exists()
    assert result["test f1, who (1)"] == 0  # labels that training did not have are errors
    assert "| to | " in (trained / "labels.md").read_text()


def test_without_scikit_learn_the_models_own_measures_are_shown(opened, trained, monkeypatch, capsys):
    task, model = opened
    monkeypatch.setitem(sys.modules, "sklearn", None)
    say.cache_clear()  # so that it is said again
    settings = settings_for("tagging", "evaluating", out_dir=str(trained), device="cpu")
    found = task.details(model, "val", ALONE, torch.float32, settings, {})
    assert found["sentences_right"] > 0.5 and "tag_accuracy, usual tags" in found
    assert not any("bag" in name or "span" in name for name in found)
    said = capsys.readouterr().err
    assert "F1 of spans: left out; for more, pip install scikit-learn\n" in said and "bag of words: left out" in said


def test_scores_of_intents_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    right, found = np.random.default_rng(0).integers((5, 7), size=(40, 2)).T.astype(str).tolist()
    expected = metrics.classification_report(right, found, output_dict=True, zero_division=0)
    assert label_scores(right, found) == {name: expected[name] for name in sorted({*right, *found})}


def test_a_label_that_the_model_lacks_has_no_weight_but_counts(opened):
    task, model = opened
    arguments, weights = task.gather("test", [len(task.dataset.rows["test"]) - 2])
    assert arguments["tags"].tolist()[0][0] == UNKNOWN and weights[0].tolist() == [[0, 1]]
    scored = task.score(model, arguments, weights)
    assert scored["tag_accuracy"][1] == 2 and scored["tag_loss"][1] == 1 and scored["non_o_accuracy"] == (0, 1)


@pytest.mark.slow
def test_a_resumed_run_equals_an_undisturbed_one_and_pieces_do_not_change_the_loss(tiny, tmp_path):
    changes = dict(max_iters=12, eval_interval=6, log_interval=3, sample_tokens=0)
    drawn = {**tiny, "dropout": 0.1, "hide_rate": 0.1, "micro_batch_size": 6}
    whole = run(tmp_path / "whole", drawn, **changes)
    run(tmp_path / "parts", drawn, **{**changes, "max_iters": 6, "lr_decay_iters": 12})
    resume(tmp_path / "parts", "--max_iters=12")
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    for a, b in zip(run(tmp_path / "a", tiny, **changes), run(tmp_path / "b", tiny, micro_batch_size=5, **changes)):
        assert a == pytest.approx(b, abs=1e-3, rel=1e-3)  # with AMX, Muon rounds to bfloat16
    assert whole[-1]["step"] == 12


@pytest.mark.slow
def test_two_workers_compute_the_same_and_one_resumes(tiny, tmp_path):
    changes = dict(dropout=0.1, hide_rate=0.2, micro_batch_size=6, max_iters=12, eval_interval=6, log_interval=3,
                   sample_tokens=0)
    whole = run(tmp_path / "one", tiny, **changes)
    arguments = [f"--{name}={value}" for name, value in {**tiny, **changes, "max_iters": 6}.items()]
    for shard in (False, True):
        out = tmp_path / f"two{shard}"
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                        str(ROOT / "train.py"), "--task=tagging", *arguments, f"--out_dir={out}",
                        "--lr_decay_iters=12", *["--shard"] * shard], check=True, capture_output=True, timeout=300)
        if not shard:
            resume(out, "--max_iters=12")
        for a, b in zip(whole, curve_of(out)):
            assert a == pytest.approx(b, abs=2e-4, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Starting from another model

def weights(out_dir):
    return checkpoint.load(out_dir / "last").state


def test_other_labels_get_a_new_head_and_the_encoder_may_stay_frozen(trained, tiny, tmp_path, capsys):
    run(tmp_path / "frozen", tiny, init_from=str(trained), learn="intents", rates={"encoder": 0.0}, max_iters=2)
    assert "its encoder gets a new head" in capsys.readouterr().err
    before, after = weights(trained), weights(tmp_path / "frozen")
    assert not any(name.startswith("tags.") for name in after)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("encoder."), name


def test_lora_adapts_the_encoder_and_trains_the_head(trained, tiny, tmp_path, capsys):
    run(tmp_path / "lora", tiny, init_from=str(trained), lora_rank=2, max_iters=2)
    assert "new head" not in capsys.readouterr().err
    before, after = weights(trained), weights(tmp_path / "lora")
    assert all(("lora" in name) == name.startswith("encoder.") for name in after.keys() - before.keys())
    changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith("encoder.")}
    assert load(tmp_path / "lora")[0].write(load(tmp_path / "lora")[1], "i go from alma to juras")


# ----------------------------------------------------------------------------------------------------------------------
# Samples

def test_words_stand_beside_their_labels_line_by_line(opened, trained, capsys, tmp_path):
    task, model = opened
    text = "i go from alma dorex to juras"
    lines = sampled(trained, capsys, f"--prompt={text}").rstrip("\n").split("\n")
    one, = task.label(model, [text.split()])
    assert [line.split()[:2] for line in lines[:-1]] == [*map(list, zip(text.split(), one.tags))]
    assert lines[-1].startswith("intent: go ") and len({line.index(line.split()[1]) for line in lines[:-1]}) == 1
    (tmp_path / "in.txt").write_text(f"who is in hesta?\r\n\n{text}\n")
    found = sampled(trained, capsys, f"--prompt=FILE:{tmp_path / 'in.txt'}").split("\n")
    assert [line.split(" ")[0] for line in found[:5]] == ["who", "is", "in", "hesta", "?"]
    assert found[5].startswith("intent: ask ") and found[6:8] == ["", ""] and found[8:8 + len(lines)] == lines


def test_spans_are_shown_in_brackets():
    words, tags = "fly to salt lake city rome now".split(), "O O B-to I-to I-to B-to O".split()
    assert in_brackets(words, tags) == "fly to [salt lake city | to] [rome | to] now"
    assert in_brackets(["a", "dog"], ["DT", "NN"]) == "[a | DT] [dog | NN]"


def test_the_command_that_a_run_suggests_works(opened, trained, capsys):
    _, script, out, prompt = shlex.split(opened[0].command(trained))
    assert script == "sample.py" and "intent: " in sampled(trained, capsys, prompt)
    assert opened[0].show(opened[1]).count("->") == 10


@pytest.mark.parametrize("arguments, message", [
    (["--prompt=send alma to " + "juras " * 40], "the sentence 'send alma to .* tokens, and the model reads 47: split"),
    ([], "this model labels sentences: add --prompt"), (["--prompt= \n"], "this model labels sentences")])
def test_wrong_sampling_is_one_line(arguments, message, trained, capsys):
    with pytest.raises(UserError, match=message):
        sampled(trained, capsys, *arguments)


@pytest.mark.parametrize("changes, message", [
    (dict(hide_rate=1.0), "hide_rate = 1.0: must be below 1"), (dict(train_rows=9999), "train_rows = 9999: the data"),
    (dict(learn="intents", hide_rate=0.1), "hide_rate = 0.1: is for words with tags"),
    (dict(sample_tokens=9), "sample_tokens = 9"), (dict(batch_size=999), "batch_size = 999: must be from 1 to"),
])
def test_wrong_training_is_one_line(changes, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, tiny, **changes)


def test_data_and_models_of_other_kinds_are_refused(tiny, dataset, opened, trained, tmp_path):
    rows = [{**row, "tags": [], "split": split} for split in ("train", "val", "test") for row in make_rows(30)
            if row["intent"]]
    labelled.prepare(rows, tmp_path / "intents", "tags", labelled.How(tokenizer="byte"), "made up")
    others = [{**row, "intent": "other"} for row in rows]
    labelled.prepare(others, tmp_path / "others", "tags", labelled.How(tokenizer="byte"), "made up")
    gpt = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, max_iters=1, dataset=str(dataset), sample_tokens=0)
    train.main(settings_for("text", **gpt, out_dir=str(tmp_path / "gpt")), {})
    for changes, message in (
            (dict(dataset=str(dataset)), "is a data set of kind text, and this model needs one of kind tags"),
            (dict(dataset=str(tmp_path / "intents"), learn="tags"), "learn = tags: the data set .* has no tags"),
            (dict(init_from=str(tmp_path / "gpt")), "is of the class GPT, and --task=tagging starts from an encoder")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", tiny, **changes)
    with pytest.raises(UserError, match="has none of the labels that the model has learned, such as"):
        open_task(trained, tmp_path / "others")
    run(tmp_path / "words", tiny, learn="tags", max_iters=2)
    with pytest.raises(UserError, match="picture = a.png: shows intents, and this model labels words only"):
        evaluate.main(settings_for("tagging", "evaluating", out_dir=str(tmp_path / "words"), picture="a.png"))


# ----------------------------------------------------------------------------------------------------------------------
# Questions of air travellers

def test_flights_hold_out_templates_and_values_and_training_has_every_label():
    flights = runpy.run_path(str(ROOT / "data" / "flights" / "generate.py"))
    rows, values = flights["generate"](), {part: flights["values_of"](part) for part in ("train", "val", "test")}
    cities = {part: {" ".join(words).lower() for words in spans(rows, part, "city_name")} for part in values}
    allowed = {part: {city.lower() for city in found["city_name"]} for part, found in values.items()}
    assert all(cities[part] <= allowed[part] for part in values) and len(cities["train"]) == len(allowed["train"])
    assert allowed["val"] & allowed["test"] == allowed["train"]
    assert all(10 < len(cities[part] - cities["train"]) < 40 for part in ("val", "test"))  # new ones
    labels = {part: {label for row in rows if row["split"] == part for label in [*row["tags"], row["intent"]]}
              for part in values}
    assert labels["val"] | labels["test"] <= labels["train"] and len(labels["train"]) == 132 + 18
    assert sum(row["split"] == "train" for row in rows) == 5064  # and so for everyone
    for row in rows[::50]:
        tags = row["tags"]
        assert all(tag[0] != "I" or before[1:] == tag[1:] for before, tag in zip(["O", *tags], tags))


def spans(rows, part, name):
    """The words of each span of a part whose slot ends in `name`: lists."""
    found = []
    for word, tag in (pair for row in rows if row["split"] == part for pair in zip(row["words"], row["tags"])):
        if tag.endswith(name):
            found += [[]] * tag.startswith("B")
            found[-1] = [*found[-1], word]
    return found
