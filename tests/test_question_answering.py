"""Question answering on made-up texts: windows, spans, measures, floors, samples, data sets, other starts, errors."""

import functools
import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, make_text, run_of, sampled, settings_for
from test_pairs import data, write  # noqa: F401, data is a fixture
from test_train import resume

import evaluate
import prepare
import sample
import train
from batches import LabelledDataset
from configurator import UserError, parse
from encoder import Answerer, AnswererConfig
from machine.distributed import World
from run import checkpoint
from sources import labelled, labelled_sets, questions, texts
from tasks.loading import load
from tasks.question_answering import (
    FLOORS,
    Found,
    QuestionAnsweringTask,
    Span,
    answer_in,
    best_of,
    best_threshold,
    normal,
    score,
    scored,
    scores_of,
    words_of_answer,
)

ROOT = Path(train.__file__).parent
ALONE = World(0, 1, torch.device("cpu"))
PEOPLE = ("Alma Tor", "Berno Tor", "Alma Ulk", "Berno Ulk")


def make_rows(count=800, seed=0):
    """Texts of 6 to 30 words with a name and a year: who asks for the one, when for the other, why for nothing."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        words = [*map(str, rng.choice(WORDS, rng.integers(6, 30)))]
        values = {"who": str(rng.choice(PEOPLE)), "when": str(rng.integers(1700, 1720)), "why": ""}
        for value in filter(None, values.values()):
            words.insert(int(rng.integers(len(words))), value)
        asked = str(rng.choice([*values]))
        text, value, part = " ".join(words) + ".", values[asked], ("train", "train", "val", "test")[number % 4]
        rows.append({"question": f"{asked} was it?", "context": text, "split": part,
                     "answers": {"text": [value] * bool(value), "answer_start": [text.index(value)] * bool(value)}})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a prepared data set."""
    folder = tmp_path_factory.mktemp("answers") / "ready"
    labelled.prepare(make_rows(), folder, "answers", labelled.How(tokenizer="word:1"), "made up")
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    """Settings of a run in which most texts are cut into windows."""
    return dict(dataset=str(folder), n_layer=1, n_head=2, n_embd=32, block_size=24, batch_size=16, max_iters=120,
                answer_words=3, positions="rotary", warmup_iters=5, learning_rate=1e-2, min_lr=1e-3, eval_interval=60,
                log_interval=10, device="cpu", dtype="float32")


run = functools.partial(run_of, "question-answering")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    out_dir = tmp_path_factory.mktemp("runs") / "answers"
    run(out_dir, tiny)
    return out_dir


@pytest.fixture(scope="module")
def opened(trained, folder):
    """(task, model) of a finished run."""
    task, model, _ = load(trained)
    task.open(folder, ALONE)
    task.fit(model)
    return task, model


# ----------------------------------------------------------------------------------------------------------------------
# Windows and spans

def by_hand(task, model, row):
    """(nats of each window, the answer, its place) of a row: one window at a time, one span after the other."""
    words, nats = [match.span() for match in questions.WORD.finditer(row["context"])], []
    best, least = (-np.inf, 0, 0), np.inf
    wanted = [(start, start + len(text)) for text, start in zip(*row["answers"].values())]
    for window in task.windows(row["question"], row["context"]):
        types = torch.tensor([window.types])
        logits = model.head(model.encoder(torch.tensor([window.ids]), None, types))[0]
        begins, ends = ([logits[place[side], side] for place in window.places] for side in range(2))
        own = [(0, 0), *words[window.start:window.start + len(window.places) - 1]]
        spans = [(i, j) for i in range(1, len(own)) for j in range(i, len(own)) if j - i < task.settings.answer_words]
        i, j = max(spans, key=lambda span: (begins[span[0]] + ends[span[1]]).item())
        best = max(best, ((begins[i] + ends[j]).item(), own[i][0], own[j][1]))
        least = min(least, (begins[0] + ends[0]).item())
        inside = [span for span in wanted if any(span[0] == s for s, _ in own[1:]) and
                  any(span[1] == e for _, e in own[1:])]
        right = [0, 0] if not inside else [[s for s, _ in own].index(inside[0][0], 1),
                                           [e for _, e in own].index(inside[0][1], 1)]
        nats.append(np.mean([F.cross_entropy(torch.stack(each)[None], torch.tensor([place])).item()
                             for each, place in zip((begins, ends), right)]))
    lead = least - best[0]
    return nats, row["context"][best[1]:best[2]] * (lead <= 0), best[1], lead


def test_an_evaluation_is_the_mean_over_all_windows_and_questions(opened, trained):
    task, model = opened
    rows = task.dataset.rows["val"]
    nats, found, places, leads = zip(*(by_hand(task, model, row) for row in rows))
    assert sum(map(len, nats)) > len(rows) * 1.2  # several windows
    exact, f1 = scores_of(found, rows).mean(0)
    measured = task.evaluate(model, "val", ALONE, torch.float32)
    assert measured == pytest.approx({"loss": np.mean(np.concatenate(nats)), "exact_match": exact, "f1": f1}, abs=1e-5)
    assert exact > 0.9 and measured["f1"] == pytest.approx(
        checkpoint.read_config(trained / "best")["val_f1"], abs=1e-6)
    answers = task.answer(model, [(row["question"], row["context"]) for row in rows])
    assert [one.start for one in answers] == [*places] and min(leads) < 0 < max(leads)
    assert [one.lead for one in answers] == pytest.approx(leads, abs=1e-4)
    assert task.evaluate(model, "val", ALONE, torch.float32, limit=300) != measured


def test_a_long_text_is_cut_into_windows_that_overlap(opened):
    task, model = opened
    text = make_text(100)
    cut = task.windows("who was it?", text)
    room = task.block_size - cut[0].types.count(0) - 1
    assert task.stride == 8 and [window.start for window in cut] == [(room - 8) * i for i in range(len(cut))]
    assert cut[-1].start + len(cut[-1].places) - 1 == 100 and max(len(window.ids) for window in cut) == task.block_size
    (own,) = task.windows("who was the KING?", "The king was.")
    assert own.types == [0] * 7 + [2, 2, 2, 1, 1]  # a third type for words of the question
    assert len(task.windows("who " * 100, text)[0].ids) == task.block_size  # the question loses its end
    long = "x" * 200
    assert [task.windows(long, long), task.answer(model, [(long, long)])]


def test_what_cannot_be_an_answer_is_never_one(opened):
    """The greatest logits are in the question, in padding, of spans that end before they begin, or are too long."""
    task, _ = opened
    logits = torch.full((1, 8, 2), -9.0)
    logits[0, 5, 0], logits[0, 2, 1], logits[0, 2, 0], logits[0, 6, 1] = 5.0, 5.0, 1.0, 3.0
    span, = task.spans(logits)
    shares = logits[0].double().softmax(0)
    wanted = 8.0, 4, 5, (shares[5, 0] * shares[6, 1]).item(), -18.0, shares[0].prod().item()  # words without [CLS]
    assert span == pytest.approx(wanted)
    logits[0, 2, 1] = -9.0
    assert task.spans(logits)[0][1:3] == (4, 5)
    logits[0, 5, 0] = -9.0  # from 2 to 6 are five words, and answer_words is 3
    assert task.spans(logits)[0].last - task.spans(logits)[0].first < 3


def test_windows_are_compared_as_in_run_qa(opened):
    """The best answer of any window, the least score of no answer of any; probabilities decide nothing."""
    task, _ = opened
    window = task.windows("who?", "the king")[0]
    one, other = Span(5.0, 1, 1, 0.1, 9.0, 0.8), Span(4.0, 0, 1, 0.9, 6.0, 0.05)
    found = best_of("the king", [(window, one), (window, other)])
    assert found == (4, 8, 0.1, 1.0, 0.05)
    assert [answer_in("the king", found, threshold) for threshold in (0.0, 0.9, 1.0, 2.0)] == ["", "", "king", "king"]


@pytest.mark.parametrize("count", [0, 7, 30, 61, 90])
def test_the_answer_in_a_long_text_is_that_in_the_short_one(count, opened):
    """Wherever it stands: words of other windows, before and after it, change nothing."""
    task, model = opened
    words, asked = make_text(90).split(), "who was it?"
    short = task.answer(model, [(asked, "the king sees Alma Ulk in the crown.")])[0]
    text = " ".join([*words[:count], "the king sees Alma Ulk in the crown.", *words[count:]])
    found, = task.answer(model, [(asked, text)])
    assert len(task.windows(asked, text)) > 5 and answer_in(text, found) == "Alma Ulk"
    assert found.start == text.index("Alma") and short.start == 14
    assert answer_in(text, task.answer(model, [("why was it?", text)])[0]) == ""


def test_padding_and_other_questions_change_nothing(opened):
    task, model = opened
    windows = np.arange(20)
    arguments, _ = task.gather("val", windows)
    assert len({*arguments["counts"].tolist()}) > 1
    nats = model(**arguments)
    for i in windows:
        alone, _ = task.gather("val", [i])
        torch.testing.assert_close(model(**alone)[0], nats[i])
    del arguments["targets"]
    assert model(**arguments)[arguments["places"][..., 0] == 0][:, 0].isinf().any()  # places of padding


@pytest.mark.slow
def test_a_resumed_run_equals_an_undisturbed_one_and_pieces_do_not_change_the_loss(tiny, tmp_path):
    changes = dict(max_iters=8, eval_interval=4, log_interval=2)
    drawn = {**tiny, "dropout": 0.1, "micro_batch_size": 5}
    run(tmp_path / "whole", drawn, **changes)
    run(tmp_path / "parts", drawn, **{**changes, "max_iters": 4, "lr_decay_iters": 8})
    resume(tmp_path / "parts", "--max_iters=8")
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    for a, b in zip(run(tmp_path / "a", tiny, **changes), run(tmp_path / "b", tiny, micro_batch_size=5, **changes)):
        assert a == pytest.approx(b, rel=1e-3)  # eight updates amplify rounding, which differs with the threads


# ----------------------------------------------------------------------------------------------------------------------
# Measures

CASES = [("The  Eiffel tower!", ["Eiffel Tower"], 1, 1), ("Paul Mertor", ["Mertor"], 0, 2 / 3), ("", ["a"], 1, 1),
         ("1840", ["1841", "in 1840"], 0, 2 / 3), ("", [], 1, 1), ("salt", [], 0, 0), ("", ["salt"], 0, 0),
         ("red red wool", ["red wool"], 0, 0.8), ("glass", ["wool", "Glass."], 1, 1)]


@pytest.mark.parametrize("found, right, exact, f1", CASES)
def test_exact_match_and_f1_are_squads(found, right, exact, f1):
    assert score(found, {"answers": {"text": right}}) == pytest.approx((exact, f1))


def test_measures_are_those_of_torchmetrics():
    text = pytest.importorskip("torchmetrics.text")
    rng, some = np.random.default_rng(0), ["The", "a", "cat", "Cat's", "old,", "dog", "an", "1,000", "ran"]
    pairs = [[" ".join(rng.choice(some, rng.integers(1, 5))) for _ in range(3)] for _ in range(300)]
    pairs = [pair for pair in pairs if all(map(normal, pair))]
    theirs = text.SQuAD()(
        [{"prediction_text": found, "id": str(i)} for i, (found, *_) in enumerate(pairs)],
        [{"answers": {"answer_start": [0, 0], "text": right}, "id": str(i)} for i, (_, *right) in enumerate(pairs)])
    ours = np.mean([score(found, {"answers": {"text": right}}) for found, *right in pairs], axis=0) * 100
    assert (theirs["exact_match"].item(), theirs["f1"].item()) == pytest.approx(tuple(ours), abs=1e-3)
    assert 5 < ours[0] < ours[1] < 95


def test_the_floors_guess_from_words_alone():
    question = "Who built the Kel Bridge?"
    text = "It is old. In 1700 Ada Tor built the Kel Bridge. The Kel Bridge is long."
    assert {name: guess(question, text) for name, guess in FLOORS.items()} == {
        "no answer": "", "first capital": "In", "likest sentence": "In 1700 Ada Tor built the Kel Bridge.",
        "new name in it": "1700 Ada Tor"}
    assert FLOORS["new name in it"]("when?", "nothing here.") == FLOORS["first capital"]("when?", "nothing") == ""


def test_evaluate_writes_the_answers_and_scores_beside_the_floors(trained, folder, opened):
    evaluate.main(settings_for("question-answering", "evaluating", out_dir=str(trained), device="cpu", dtype="float32",
                               test=True))
    found = json.loads((trained / "evaluation.json").read_text())
    for start, name, part in (("", "", "val"), ("test ", "_test", "test")):
        rows = [json.loads(line) for line in (trained / f"answers{name}.jsonl").read_text().splitlines()]
        assert [row["context"] for row in rows] == [
            row["context"] for row in LabelledDataset(folder, "answers").rows[part]]
        assert all(row["context"][row["start"]:].startswith(row["found"]) for row in rows)
        exact, f1 = scores_of([row["found"] for row in rows], rows).mean(0)
        assert (found[f"{start}exact_match"], found[f"{start}f1"]) == pytest.approx((exact, f1))
        without = np.mean([not row["answers"]["text"] for row in rows])
        assert found[f"{start}exact_match, no answer"] == pytest.approx(without) and 0.1 < without < 0.6
        parts = found[f"{start}exact_match, with an answer"], found[f"{start}exact_match, without one"]
        assert parts[0] * (1 - without) + parts[1] * without == pytest.approx(exact)
        task, model = opened
        answers = task.answer(model, [(row["question"], row["context"]) for row in rows])
        assert [one.lead for one in answers] == pytest.approx([row["lead"] for row in rows], abs=1e-3)
        texts = [answer_in(row["context"], Found(*one[:3], row["lead"], 0), found["best threshold"] + 1e-3)
                 for row, one in zip(rows, answers)]
        assert found[f"{start}f1, best threshold"] == pytest.approx(scores_of(texts, rows)[:, 1].mean())
    evaluate.main(settings_for("question-answering", "evaluating", out_dir=str(trained), device="cpu", dtype="float32",
                               no_answer_threshold=1e3))
    always = json.loads((trained / "evaluation.json").read_text())
    assert always["exact_match, without one"] == 0 and "test f1" not in always
    assert always["f1, best threshold"] == found["f1, best threshold"] >= found["f1"] > always["f1"]


def test_the_best_threshold_has_the_greatest_f1():
    rng = np.random.default_rng(0)
    for share in (0.0, *[0.5] * 20, 1.0):  # of the questions without an answer
        rows = [{"context": "one two three", "answers": {"text": ["one two"] * bool(rng.random() >= share)}}
                for _ in range(40)]
        found = [Found(0, int(rng.choice([3, 7, 13])), 0.5, float(rng.integers(-6, 6)), 0.5) for _ in rows]
        least = min(one.lead for one in found) - 1
        means = {t: scored(rows, found, t)[1][:, 1].mean() for t in np.arange(least, 7.0)}
        best = best_threshold(rows, found)
        assert best == min(t for t in means if means[t] == pytest.approx(max(means.values())))
    assert best == least  # no question has an answer, and none gets one


# ----------------------------------------------------------------------------------------------------------------------
# Samples and other starts

def test_an_answer_is_marked_in_its_sentence(trained, capsys, tmp_path):
    page = tmp_path / "page.txt"
    page.write_bytes(b"so the fool takes a sword.\r\nAlma Ulk keeps the crown here. the king\nsees a ghost.")
    found = sampled(trained, capsys, "--prompt=who was it?", f"--context=FILE:{page}")
    first, second = found.rstrip("\n").split("\n")
    assert first.startswith("Alma Ulk  (characters 28 to 36, probability ")
    assert second == "  [Alma Ulk] keeps the crown here."
    assert sampled(trained, capsys, "--prompt=why was it?", f"--context=FILE:{page}").startswith("no answer  (prob")
    for asked, threshold, answer in (("who", -1000, "no answer"), ("why", 1000, "")):
        found = sampled(trained, capsys, f"--prompt={asked} was it?", f"--context=FILE:{page}",
                        f"--no_answer_threshold={threshold}")
        assert found.startswith("no answer") == (answer == "no answer")
    (tmp_path / "in.txt").write_text("who was it?\n\nwhy was it?\n")
    both = sampled(trained, capsys, f"--prompt=FILE:{tmp_path / 'in.txt'}", f"--context=FILE:{page}").split("\n")
    assert both[:3] == ["who was it?", first, second] and both[3] == "why was it?" and both[4].startswith("no answer")


def test_the_record_has_the_distributions_of_the_first_and_the_last_word(opened):
    task, model = opened
    text = make_text(60) + "\nthe king sees the Alma Ulk in the crown. " + make_text(30, 1)
    sampling = settings_for("question-answering", "sampling", context=text)
    record = task.inside(model, {"text": "who was it?"}, sampling)
    windows = task.ask(model, [("who was it?", text)])[0]
    window, span = max(windows, key=lambda pair: pair[1].score)
    logits = model.head(model.encoder(torch.tensor([window.ids]), None, torch.tensor([window.types])))[0]
    for side, (each, word) in enumerate(zip(record["predictions"], ("Alma", "Ulk"))):
        shares = logits[[place[side] for place in window.places], side].softmax(0)
        assert each["at"] == (0, len(window.ids) - 1)[side] and each["top"][0] == [
            word, pytest.approx(shares.max().item(), abs=1e-3)] and record["labels"][each["at"]] == word
        assert record["lens"]["top"][side][-1] == each["top"][:3]
        assert sorted(p for _, p in each["top"]) == pytest.approx(shares.sort()[0][-20:].tolist(), abs=1e-3)
    assert [token.strip() for token, label in zip(record["tokens"], record["labels"]) if label == "answer"] \
        == ["Alma", "Ulk"]
    assert record["notes"][-1] == f"the text has {len(windows)} windows; this one has the likeliest answer"
    assert task.inside(model, {"text": "why was it?"}, sampling)["labels"].count("answer") == 0
    with pytest.raises(UserError, match="prompt: the page shows one question"):
        task.inside(model, {"text": "who?\nwhen?"}, sampling)


def test_attention_is_drawn_of_the_window_with_the_answer(trained, capsys, tmp_path):
    page = make_text(60) + " Alma Ulk " + make_text(30)
    arguments = [f"--context={page}", f"--attention={tmp_path / 'map.png'}"]
    found = sampled(trained, capsys, "--prompt=who was it?", *arguments)
    assert found.startswith("Alma Ulk") and str(tmp_path / "map.png") in found.split("\n")[2]
    assert (tmp_path / "map.png").stat().st_size > 1000
    with pytest.raises(UserError, match="attention: needs a --prompt of one question"):
        sampled(trained, capsys, "--prompt=who was it?\nwhy?", *arguments)


def test_the_command_that_a_run_suggests_works(trained, opened, capsys):
    task, model = opened
    _, script, out, *own = shlex.split(task.command(trained))
    assert script == "sample.py" and sampled(trained, capsys, *own)
    assert task.show(model).count("\n") > task.show(model, short=True).count("\n") > 1


def save_bert(transformers, folder):
    """Writes a tiny random BERT of 24 positions. Returns transformers' model."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", ".", "'", "##s", "al", "##ma", "who", "was", "it",
             *WORDS]
    shape = dict(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=32, max_position_embeddings=24)
    model = transformers.BertModel(transformers.BertConfig(**shape)).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return model


def test_a_published_bert_reads_what_transformers_reads(folder, tiny, tmp_path, capsys):
    """Ids, token types and windows are those of its tokenizer. Its encoder keeps its weights, and learns under a new
    head. What comes out is a BertForQuestionAnswering, which answers here as it did, and there with the same logits.
    """
    transformers = pytest.importorskip("transformers")
    theirs = save_bert(transformers, tmp_path / "bert")
    run(tmp_path / "new", tiny, init_from=str(tmp_path / "bert"), max_iters=2, eval_interval=2,
        rates={"encoder": 0.0}, n_layer=2, n_embd=16, n_hidden=32, norm="layernorm", mlp="gelu_erf", block="post",
        positions="learned", answer_words=30, publish=str(tmp_path / "out"))
    assert "its encoder gets a new head" in capsys.readouterr().err
    task, model, _ = load(tmp_path / "new")
    task.read_for(model)
    question, text = "who's it?", "Alma's sword was here."
    (window,) = task.windows(question, text)
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "bert" / "vocab.txt"))
    expected = tokenizer(question, text, return_tensors="pt")
    assert expected["input_ids"][0].tolist() == window.ids
    assert expected["token_type_ids"][0].tolist() == window.types
    with torch.no_grad():
        hidden = theirs(**expected).last_hidden_state
        ours = model.encoder(expected["input_ids"], None, expected["token_type_ids"])
    torch.testing.assert_close(ours, hidden, atol=1e-5, rtol=0)
    long = make_text(100)
    cut = tokenizer(question, long, truncation="only_second", max_length=24, stride=8, return_overflowing_tokens=True)
    windows = task.windows(question, long)
    assert cut["input_ids"] == [window.ids for window in windows]
    answerer = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reader(question, text).data == tokenizer(question, text).data
    with torch.no_grad():
        logits = answerer(**tokenizer.pad({"input_ids": cut["input_ids"], "token_type_ids": cut["token_type_ids"],
                                           "attention_mask": cut["attention_mask"]}, return_tensors="pt"))
    starts, ends = logits.start_logits, logits.end_logits
    places = [(starts[i, one] + ends[i, other], i, one, other) for i, window in enumerate(windows)
              for one, _ in window.places[1:] for _, other in window.places[1:] if other >= one]
    best, i, one, other = max(places, key=lambda place: place[0])
    found, = task.answer(model, [(question, long)])
    assert found.lead == pytest.approx(((starts[:, 0] + ends[:, 0]).min() - best).item(), abs=1e-5)
    assert tokenizer.decode(cut["input_ids"][i][one:other + 1]) == " ".join(long[found.start:found.end].split())
    arguments = [f"--prompt={question}", f"--context={long}", "--no_answer_threshold=1000"]
    before = sampled(tmp_path / "new", capsys, *arguments)
    sample.main(parse(sample.Settings, [f"--init_from={tmp_path / 'out'}", "--device=cpu", *arguments],
                      **sample.HOW)[0])
    after = capsys.readouterr().out
    assert after == before and before.startswith(long[found.start:found.end])


# ----------------------------------------------------------------------------------------------------------------------
# Data sets

def as_articles(rows, count):
    """The rows in SQuAD's own layout, in articles with `count` titles."""
    return [{"title": f"T{i % count}", "paragraphs": [{"context": row["context"], "qas": [{
        "id": str(i), "question": row["question"], "is_impossible": not row["answers"]["text"],
        "plausible_answers": [{"text": row["context"][:2], "answer_start": 0}] * (not row["answers"]["text"]),
        "answers": [{"text": text, "answer_start": start} for text, start in zip(*row["answers"].values())]}]}]}
        for i, row in enumerate(rows)]


def test_squads_own_layout_and_its_rows_give_the_same_data_set(data, tmp_path):  # noqa: F811
    rows = make_rows(60)
    (tmp_path / "a.json").write_text(json.dumps({"version": "v2.0", "data": as_articles(rows, 10)}))
    lines = [{**row, "title": f"T{i % 10}"} for i, row in enumerate(rows)]
    for row in lines:
        del row["split"]
        if not row["answers"]["text"]:
            row["answers"] = None
    write(tmp_path / "b.jsonl", *map(json.dumps, lines))
    for name in ("a.json", "b.jsonl"):
        prepare.main(prepare.Settings(tokenizer="byte", val_fraction=0.3), [str(tmp_path / name)])
    one, other = (LabelledDataset(data / name, "answers") for name in "ab")
    assert one.meta["sha256"] == other.meta["sha256"]
    pages = [{row["page"] for row in one.rows[split]} for split in ("train", "val", "test")]
    assert all(pages) and sum(map(len, pages)) == 10  # an article is in one part


def test_files_named_train_and_dev_keep_their_part(data, tmp_path):  # noqa: F811
    for name, rows in (("train-v2", make_rows(60)), ("dev-v2", make_rows(20, seed=1))):
        write(tmp_path / f"{name}.jsonl", *(json.dumps({**row, "split": None}) for row in rows))
    prepare.main(prepare.Settings(tokenizer="byte", name="mine", val_fraction=0.1), [
        str(tmp_path / f"{name}-v2.jsonl") for name in ("train", "dev")])
    assert LabelledDataset(data / "mine", "answers").meta["val_rows"] == 20


def test_squad_is_split_by_its_articles(data, monkeypatch):  # noqa: F811
    def fetched(url, path):
        is_train, found = "train" in url, make_rows(80, seed="train" in url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"data": as_articles(found, 40 if is_train else 4)}))

    monkeypatch.setattr(labelled_sets, "fetch_file", fetched)
    with pytest.raises(UserError, match="train-v2.0.json"):
        prepare.main(prepare.Settings(), ["squad"])
    monkeypatch.setattr(labelled_sets, "check", lambda paths, checksum: None)
    prepare.main(prepare.Settings(tokenizer="byte", name="small"), ["squad"])
    dataset = LabelledDataset(data / "small", "answers")
    pages = [{row["page"] for row in dataset.rows[split]} for split in ("train", "val")]
    assert all(pages) and not pages[0] & pages[1] and len(dataset.rows["test"]) == 80


def test_the_recipe_for_squad_runs_on_a_small_file_of_its_layout(data, tmp_path, capsys):  # noqa: F811
    save_bert(pytest.importorskip("transformers"), tmp_path / "bert")
    (tmp_path / "a.json").write_text(json.dumps({"version": "v2.0", "data": as_articles(make_rows(120), 20)}))
    prepare.main(prepare.Settings(tokenizer="byte", val_fraction=0.2), [str(tmp_path / "a.json")])
    changes = dict(dataset="a", init_from=tmp_path / "bert", out_dir=tmp_path / "out", publish=tmp_path / "squad",
                   block_size=24, stride=8, max_iters=2, warmup_iters=1, eval_interval=2, device="cpu")
    train.main(*parse(train.Settings, [str(ROOT / "config/answer_squad.py"), *(
        f"--{name}={value}" for name, value in changes.items())], **train.HOW))
    questions, windows = re.search(r"(\d+) questions of a, .* in (\d+) windows", capsys.readouterr().out).groups()
    assert int(questions) < int(windows)
    settings = checkpoint.read_config(tmp_path / "out/last")["settings"]
    assert (settings["stride"], settings["learning_rate"], settings["dropout"]) == (8, 3e-5, 0.1)
    evaluate.main(settings_for("question-answering", "evaluating", init_from=str(tmp_path / "squad"), dataset="a",
                               device="cpu", test=True))
    assert "test f1, best threshold" in capsys.readouterr().out


def test_the_made_up_facts_hold_out_names_and_templates():
    script = runpy.run_path(str(ROOT / "data/facts/generate.py"))
    rows = script["generate"]()
    parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")}
    for row in rows:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"]):
            assert row["context"][start:start + len(text)] == text
    makers = [script["Maker"](split) for split in parts]
    for sets in ([{*maker.names} for maker in makers],
                 *([{(key, each) for key, found in getattr(maker, some).items() for each in found} for maker in makers]
                   for some in ("asked", "stated"))):
        assert all(sets) and not any(a & b for i, a in enumerate(sets) for b in sets[:i])
    runs = {split: [labelled.runs(labelled.text_of(row)) for row in found] for split, found in parts.items()}
    known = set().union(*runs["train"])
    worst = max(len(own & known) / len(own) for split in ("val", "test") for own in runs[split])
    assert worst < 0.2
    without = [np.mean([not row["answers"]["text"] for row in found]) for found in parts.values()]
    assert all(0.2 < share < 0.3 for share in without)
    found, source, _ = labelled_sets.fetch("facts", [], Path("nowhere"))
    assert found == rows and source == "data/facts/generate.py"


BAD = [({"answers": {"text": ["king"], "answer_start": [3]}}, "the answer 'king' is not in its context at"
        " answer_start = 3; it stands at 4"),
       ({"answers": {"text": ["queen"], "answer_start": [4]}}, "the answer 'queen' is not in its context at"
        " answer_start = 4$"),
       ({"answers": {"text": [""], "answer_start": [0]}}, "the answer '' is not in its context"),
       ({"answers": {"text": ["king"], "answer_start": [-8]}}, "the answer 'king' is not in its context"),
       ({"answers": {"text": ["king"]}}, "must have the lists text and answer_start, of one length"),
       ({"answers": "king"}, "must have the lists text and answer_start"),
       ({"question": " ?! ", "context": " "}, "the question ' .! ' is empty"),
       ({"context": " "}, "the context ' ' is empty"),
       ({"context": None}, "None is not valid text")]


@pytest.mark.parametrize("change, message", BAD)
def test_a_bad_row_is_named(change, message, tmp_path):
    good = {"question": "who?", "context": "the king sees.", "answers": {"text": ["king"], "answer_start": [4]}}
    path = write(tmp_path / "rows.jsonl", json.dumps(good), json.dumps({**good, **change}))
    with pytest.raises(UserError, match=f"rows.jsonl, line 2: .*{message}"):
        list(questions.read([path]))


def test_a_bad_file_is_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"data": [{"title": "x"}]}')
    with pytest.raises(UserError, match="a.json: is not in SQuAD's layout, data > paragraphs > qas .KeyError"):
        list(questions.read([path]))


@pytest.mark.parametrize("indent, mark", [(None, ""), (2, ""), (1, "\ufeff")])
def test_squads_layout_is_known_however_it_is_written(tmp_path, indent, mark):
    asked = {"question": "who?", "answers": [{"text": "king", "answer_start": 4}]}
    published = {"name": "mine", "data": [{"paragraphs": [{"context": "the king sees.", "qas": [asked]}]}]}
    path = tmp_path / "a.json"
    path.write_text(mark + json.dumps(published, indent=indent), encoding="utf-8")
    assert questions.are_questions([path]) and [row["question"] for row in questions.read([path])] == ["who?"]


def test_answers_under_another_name_are_not_taken_for_none(tmp_path, capsys):
    row = {"question": "who?", "context": "the king sees.", "answers": {"text": ["king"], "answer_start": [4]}}
    none = {**row, "answers": None}
    path = write(tmp_path / "rows.jsonl", json.dumps(row), json.dumps(none))
    assert len(list(questions.read([path]))) == 2
    assert "questions: 2, of which 1 have no answer" in capsys.readouterr().out
    del none["answers"]
    write(path, json.dumps(row), json.dumps({**none, "answer": "king"}))
    with pytest.raises(UserError, match="line 2: has no answers, but answer: write it as answers"):
        list(questions.read([path]))
    write(path, json.dumps(none))
    with pytest.raises(UserError, match="no question has an answer"):
        list(questions.read([path]))


def test_wrong_use_is_one_line(trained, folder, tiny, tmp_path, capsys):
    (tmp_path / "words.txt").write_text(make_text(600), encoding="utf-8")
    texts.prepare([tmp_path / "words.txt"], tmp_path / "text", "char")
    with pytest.raises(UserError, match="is a data set of kind text, and this model needs one of kind answers"):
        run(tmp_path / "run", tiny, dataset=str(tmp_path / "text"))
    with pytest.raises(UserError, match="block_size = 6: a question and a text need at least 8"):
        run(tmp_path / "run", tiny, block_size=6)
    with pytest.raises(UserError, match="train_rows = 999: the data set .* has only 400"):
        run(tmp_path / "run", tiny, train_rows=999)
    moved = {"question": "who?", "context": "Alma sees.", "answers": {"text": ["Alma"], "answer_start": [99]}}
    with pytest.raises(UserError, match="the answer 'Alma' is not in its text at answer_start = 99: prepare"):
        words_of_answer(moved)
    for arguments, message in (
            (["--prompt=who?"], "context = '': this model finds answers in a text: add --context=FILE:page.txt"),
            (["--context=Alma sees."], "prompt = '': is no question: add --prompt with one"),
            (["--prompt=?", "--context=Alma sees."], "prompt = '.': is no question"),
            (["--prompt=who?", "--context=..."], "context = ...: there is no word in this text"),
            (["--prompt=who?", f"--context={__file__}"], "is no text: .* add --context=FILE:.*answering.py"),
            (["--prompt=who?", "--context=FILE:nowhere.txt"], "context = FILE:nowhere.txt: there is no such file"),
            (["--prompt=who?", f"--context=FILE:{tmp_path}"], "context = FILE:.*: is a folder: name a file")):
        with pytest.raises(UserError, match=message):
            sampled(trained, capsys, *arguments)


def test_rows_to_learn_from_are_questions_with_all_their_windows(folder, tiny):
    task = QuestionAnsweringTask(settings_for("question-answering", **{**tiny, "train_rows": 20, "batch_size": 5}))
    task.open(folder, ALONE)
    task.fit(Answerer(AnswererConfig(block_size=24)))
    asked = task.asked_of["train"]
    assert len({asked[row] for step in range(99) for row in task.pick(step)}) == 20 < len(task.rows)
    assert len(task.rows) == np.isin(asked, [*task.chosen]).sum()
