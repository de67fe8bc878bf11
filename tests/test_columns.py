"""Rows of a table: the model against plain PyTorch, what is missing, measures, a resumed run, answers and errors."""

import functools
import json
import re
import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import curve_of, run_of, settings_for
from test_train import resume

import evaluate
import sample
from batches import ColumnsDataset
from columns import ColumnsConfig, ColumnsModel, init_columns
from configurator import UserError, parse, say
from inside.attention import attention_weights
from machine.distributed import World
from run import checkpoint
from tasks import columns as columns_task
from tasks.columns import ColumnsTask, arguments, check_columns, draw_columns, encoded
from tasks.loading import load
from tasks.outcomes import Quantity
from tokenizer import WordTokenizer
from vit import ViT, sincos_2d

Image = pytest.importorskip("PIL.Image")
ALONE = World(0, 1, torch.device("cpu"))
COLUMNS = [{"name": "age", "kind": "number", "mean": 40.0, "std": 20.0},
           {"name": "fare", "kind": "number", "mean": 2.0, "std": 1.0},
           {"name": "sex", "kind": "category", "values": ["female", "male"]},
           {"name": "port", "kind": "category", "values": ["C", "Q", "S"]},
           {"name": "name", "kind": "text"}, {"name": "note", "kind": "text"}, {"name": "photo", "kind": "picture"}]
SIZE = 8
WORDS = ("king", "queen", "fool", "the", "a")


def make_rows(count, seed=0):
    """Rows of every kind of column, about a tenth of whose values are missing. The label needs sex, age and photo."""
    generator, rows = np.random.default_rng(seed), []
    for _ in range(count):
        age, sex, photo = float(generator.integers(1, 80)), generator.choice(["female", "male"]), generator.integers(4)
        words = generator.choice(WORDS, generator.integers(1, 6))
        values = {"age": age, "fare": generator.random() * 4, "sex": str(sex), "port": "CQS"[generator.integers(3)],
                  "name": " ".join(words), "note": str(words[0]), "photo": int(photo)}
        label = "yes" if (age > 40) ^ (sex == "male") or photo == 3 else "no"
        rows.append({"values": {name: None if generator.random() < 0.1 else value for name, value in values.items()},
                     "label": label})
    return rows


def price(values):
    """A quantity that is linear in three columns. A missing number counts as its mean, a missing category as another.
    """
    age, fare = (column["mean"] if values[column["name"]] is None else values[column["name"]] for column in COLUMNS[:2])
    return 5000.0 + 30 * (age - 40) - 200 * (fare - 2) + {"female": -400, "male": 300, None: 0}[values["sex"]]


def write_set(folder, columns=COLUMNS, seed=0, quantity=False, **changes):
    """A prepared folder by hand. quantity: whether the label is a `price`. changes: of meta.json."""
    folder.mkdir()
    vocabulary = WordTokenizer(WORDS)
    vocabulary.save(folder / "tokenizer.json")
    images = np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8)
    (folder / "images.bin").write_bytes(images.tobytes())
    meta = {"kind": "columns", "source": "made up", "revision": "", "sha256": "0", "label": "saved",
            "labels": ["no", "yes"], "columns": columns, "left_out": {}, "image_size": SIZE, "images": 4,
            "tokenizer": "word", "vocab_size": vocabulary.vocab_size, **changes}
    names = [column["name"] for column in columns]
    for split, count in (("train", 200), ("val", 60), ("test", 60)):
        rows = make_rows(count, seed + len(split))
        if quantity:
            rows = [{**row, "label": price(row["values"])} for row in rows]
        if quantity and split == "train":
            prices = [row["label"] for row in rows]
            meta |= {"label": "price", "labels": [], "mean": np.mean(prices), "std": np.std(prices)}
        for row in rows:
            row["values"] = {name: row["values"].get(name) for name in names}
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        meta[f"{split}_rows"] = count
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def tiny(data):
    return dict(dataset=str(data), n_layer=1, n_head=2, n_embd=16, block_size=4, batch_size=20, max_iters=60,
                warmup_iters=3, learning_rate=2e-2, min_lr=1e-3, eval_interval=30, log_interval=10, device="cpu",
                dtype="float32")


run = functools.partial(run_of, "columns")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("runs") / "out"
    run(folder, tiny)
    return folder


def opened(folder, data):
    task, model, _ = load(folder)
    task.open(data, ALONE)
    task.fit(model)
    return task, model


@pytest.fixture(scope="module")
def prices(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data") / "prices", COLUMNS[:4], quantity=True)


@pytest.fixture(scope="module")
def tiny_price(tiny, prices):
    return {**{name: value for name, value in tiny.items() if name != "block_size"}, "dataset": str(prices)}


@pytest.fixture(scope="module")
def regressed(tmp_path_factory, tiny_price):
    folder = tmp_path_factory.mktemp("runs") / "out"
    run(folder, tiny_price, max_iters=100, eval_interval=100, numbers="head", hide_rate=0.0)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# The model

def made(numbers="tokens", columns=COLUMNS, labels=("no", "yes", "perhaps"), **changes):
    """A random model in eval mode."""
    model = ColumnsModel(ColumnsConfig(
        n_layer=2, n_head=2, n_embd=16, columns=columns, labels=labels, numbers=numbers,
        vocab_size=9, block_size=5, image_size=SIZE, patch_size=4, **changes))
    for i, value in enumerate(model.state_dict().values()):
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(i)) * 0.7)
    return model.eval()


def inputs(model, count=12):
    """(rows, images, the model's arguments for them)."""
    rows = [row["values"] for row in make_rows(count)]
    images = np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8)
    table = encoded(rows, model.config, {"tokenizer": WordTokenizer(WORDS)})
    return rows, images, arguments(model.config, table, images, np.arange(count), ALONE.device)


def by_hand(model, row, images):
    """The logits of one row: its list without padding, through torch.nn.TransformerEncoderLayer, and the head."""
    config, column = model.config, iter(model.columns.weight)
    listed, extra = [next(column)[None]], []
    for each, table in zip([each for each in COLUMNS if each["kind"] == "category"], model.categories):
        place = each["values"].index(row[each["name"]]) + 1 if row[each["name"]] else 0
        listed.append((table.weight[place] + next(column))[None])
    for i, each in enumerate(COLUMNS[:2]):
        value = row[each["name"]]
        number = 0.0 if value is None else (value - each["mean"]) / each["std"]
        extra += [(number, float(value is None))]
        if config.numbers == "tokens":
            vector = model.missing.weight[i] if value is None else number * model.numbers.weight[i]
            listed.append((vector + next(column))[None])
    for name in ("name", "note"):
        words, own = (row[name] or "").split()[:config.block_size], next(column)
        if words:
            listed.append(model.wte.weight[[4 + WORDS.index(word) for word in words]]
                          + model.wpe.weight[:len(words)] + own)
    own = next(column)
    if row["photo"] is not None:
        image = torch.from_numpy(images[row["photo"]]).permute(2, 0, 1).float() / 127.5 - 1
        patches = F.unfold(image[None], 4, stride=4)[0].T  # (N, 3 * 4 * 4)
        listed.append(patches @ model.patches.weight.flatten(1).T + model.patches.bias + model.patch_positions.weight
                      + own)
    x = torch.cat(listed)[None]
    for block in model.transformer.blocks:
        theirs = nn.TransformerEncoderLayer(16, 2, 64, 0.0, lambda x: F.gelu(x, approximate="tanh"), batch_first=True,
                                            norm_first=True)
        pairs = {"self_attn.out_proj": block.attn.o_proj, "linear1": block.mlp.up_proj, "linear2": block.mlp.down_proj,
                 "norm1": block.ln_1, "norm2": block.ln_2}
        state = {f"{name}.{key}": value for name, part in pairs.items() for key, value in part.state_dict().items()}
        for key in ("weight", "bias"):
            state[f"self_attn.in_proj_{key}"] = torch.cat([getattr(getattr(block.attn, f"{name}_proj"), key)
                                                           for name in "qkv"])
        theirs.load_state_dict(state)
        x = theirs(x)
    x = F.layer_norm(x[0, 0], (16,), model.transformer.ln_f.weight, model.transformer.ln_f.bias)
    if config.numbers == "head":
        x = torch.cat((x, *torch.tensor(extra).T))
    return model.head.out(F.relu(model.head.dense(x)))


@torch.no_grad()
@pytest.mark.parametrize("numbers", ["tokens", "head"])
def test_each_row_equals_its_own_list_put_together_by_hand(numbers):
    model = made(numbers)
    rows, images, found = inputs(model)
    assert all(any(row[column["name"]] is None for row in rows) for column in COLUMNS if column["name"] != "fare")
    logits = model(**found)
    expected = torch.stack([by_hand(model, row, images) for row in rows])
    assert expected.std(0).min() > 0.1
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    targets = torch.arange(len(rows)) % 3
    torch.testing.assert_close(model(**found, targets=targets), -logits.log_softmax(-1)[range(len(rows)), targets])


@torch.no_grad()
def test_a_quantity_is_one_output_and_its_error_is_squared():
    model = made(labels=(), mean=5.0, std=3.0)
    rows, images, found = inputs(model)
    outputs, targets = model(**found), torch.linspace(-2, 2, len(rows))
    by_rows = torch.stack([by_hand(model, row, images) for row in rows])  # (12, 1)
    torch.testing.assert_close(outputs, by_rows, atol=2e-5, rtol=1e-4)
    expected = [[(float(output) - float(target))**2] for output, target in zip(outputs, targets)]
    torch.testing.assert_close(model(**found, targets=targets[:, None]), torch.tensor(expected))


@torch.no_grad()
def test_what_is_missing_changes_nothing_and_no_row_another():
    model = made()
    _, _, found = inputs(model)
    before = model(**found)
    unseen = {name: value.clone() for name, value in found.items()}
    unseen["images"][~found["seen"]] = 0.7
    unseen["tokens"][torch.arange(5) >= found["lengths"][..., None]] = 3
    assert (~found["seen"]).any() and (unseen["tokens"] != found["tokens"]).any()
    torch.testing.assert_close(model(**unseen), before, atol=0, rtol=0)
    more = {name: torch.cat((value[:3], torch.zeros_like(value[:1]), value[4:])) for name, value in found.items()}
    after = model(**more)
    others = torch.arange(len(before)) != 3
    torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=1e-6)
    assert (after[3] - before[3]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("numbers", ["tokens", "head"])
def test_the_order_of_the_columns_is_that_of_the_embeddings_alone(numbers):
    model, order = made(numbers), [6, 3, 5, 1, 2, 0, 4]  # all kinds in another order, and each kind within itself
    other = made(numbers, [COLUMNS[i] for i in order])
    state = model.state_dict()
    for name in ("numbers", "missing") if numbers == "tokens" else ():
        state[f"{name}.weight"] = state[f"{name}.weight"][[1, 0]]
    for key in ("0", "1"):
        state[f"categories.{key}.weight"] = model.categories[1 - int(key)].weight
    mine, theirs = ([each.config.columns[i]["name"] for i in each.config.listed] for each in (model, other))
    assert sorted(mine) == sorted(theirs) and mine != theirs
    state["columns.weight"] = state["columns.weight"][[0, *(1 + mine.index(name) for name in theirs)]]
    if numbers == "head":
        places = [*range(16), 17, 16, 19, 18]
        state["head.dense.weight"] = state["head.dense.weight"][:, places]
    other.load_state_dict(state)
    torch.testing.assert_close(other(**inputs(other)[2]), model(**inputs(model)[2]), atol=1e-5, rtol=1e-5)


def test_patches_start_with_positions_and_are_embedded_as_by_the_vision_transformer():
    model = made()
    tower = ViT(model.config.vision)
    tower.patches.load_state_dict(model.patches.state_dict())
    tower.wpe.weight.data.copy_(model.patch_positions.weight)
    images, seen = [], tower.transformer.blocks[0].register_forward_pre_hook(lambda block, x: images.append(x[0]))
    _, _, found = inputs(model)
    tower(found["images"][:, 0])
    seen.remove()
    x, _ = model.embed(**found)
    torch.testing.assert_close(x[:, -4:] - model.columns.weight[-1], images[0], atol=1e-5, rtol=1e-5)
    init_columns(model, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.patch_positions.weight, sincos_2d(model.config.vision), atol=0, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Training and measures

def test_a_hidden_value_is_a_missing_one_and_as_many_are_hidden_as_asked(data, tiny):
    task, model = made_task(data, tiny)
    rows = [row["values"] for row in task.dataset.rows["train"]]
    for i, column in enumerate(COLUMNS):
        lacking = encoded([{**row, column["name"]: None} for row in rows], model.config, task.tokenizers)
        hidden, _ = task.gather("train", np.arange(len(rows)), np.arange(len(COLUMNS)) == i)
        expected = arguments(model.config, lacking, task.dataset.images, np.arange(len(rows)), ALONE.device)
        for name, value in expected.items():
            assert torch.equal(hidden[name], value) or name == "images"
    rows = np.arange(200)
    first, again = (task.batch(rows, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    whole, _ = task.gather("train", rows)
    was, now = (sum(int(part.sum()) for part in (found["categories"] > 0, ~found["missing"], found["lengths"] > 0,
                                                 found["seen"])) for found in (whole, first))
    assert now / was == pytest.approx(0.6, abs=0.05)


def made_task(data, tiny, **changes):
    task = ColumnsTask(settings_for("columns", **{**tiny, "hide_rate": 0.4, **changes}))
    task.open(data, ALONE)
    model = task.build(torch.Generator().manual_seed(0))
    task.fit(model)
    return task, model


def test_an_evaluation_is_the_mean_over_all_rows_beside_floors_and_without_each_column(trained, data):
    pytest.importorskip("sklearn")
    task, model = opened(trained, data)
    rows, nats, right, without = task.dataset.rows["val"], [], [], []
    for row in rows:
        for lacking, found in (((), right), (("sex",), without)):
            values = {name: None if name in lacking else value for name, value in row["values"].items()}
            table = encoded([values], model.config, task.tokenizers)
            logits = model(**arguments(model.config, table, task.dataset.images, [0], ALONE.device))[0].double()
            found.append(model.config.labels[logits.argmax()] == row["label"])
            if not lacking:
                nats.append(-logits.log_softmax(0)[model.config.labels.index(row["label"])].item())
    found = task.evaluate(model, "val", ALONE, torch.float32)
    assert found == pytest.approx({"loss": np.mean(nats), "accuracy": np.mean(right)}, abs=1e-5)
    assert found["loss"] == pytest.approx(checkpoint.read_config(trained / "best")["val_loss"], abs=1e-6)
    assert task.evaluate(model, "val", ALONE, torch.float32, limit=150)["loss"] != found["loss"]
    evaluate.main(settings_for("columns", "evaluating", out_dir=str(trained), device="cpu", test=True,
                               picture=str(trained / "confusion.png")))
    measured = json.loads((trained / "evaluation.json").read_text())
    assert measured["accuracy, without sex"] == pytest.approx(np.mean(without)) != measured["accuracy"]
    for start, part in (("", "val"), ("test ", "test")):
        answers = [json.loads(line) for line in
                   (trained / f"predictions{'_test' * bool(start)}.jsonl").read_text().splitlines()]
        assert [row["values"] for row in answers] == [row["values"] for row in task.dataset.rows[part]]
        assert measured[f"{start}accuracy"] == np.mean([row["predicted"] == [row["label"]] for row in answers])
        share = np.mean([row["label"] == "yes" for row in answers])
        assert measured[f"{start}accuracy, most frequent"] == pytest.approx(max(share, 1 - share))
        assert measured[f"{start}accuracy, gradient boosting"] > measured[f"{start}accuracy, most frequent"]
        assert f"{start}accuracy, logistic regression" in measured


def test_a_resumed_run_equals_an_undisturbed_one(tiny, tmp_path):
    changes = dict(max_iters=8, eval_interval=4, log_interval=2, dropout=0.1, micro_batch_size=6, numbers="head")
    whole = run(tmp_path / "whole", tiny, **changes)
    run(tmp_path / "parts", tiny, **{**changes, "max_iters": 4, "lr_decay_iters": 8})
    resume(tmp_path / "parts", "--max_iters=8")
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert len(whole) == 5 and one["head.dense.weight"].shape == (16, 16 + 4)


def test_a_resumed_run_of_a_quantity_equals_an_undisturbed_one(tiny_price, tmp_path):
    changes = dict(max_iters=8, eval_interval=4, log_interval=2, dropout=0.1, micro_batch_size=6)
    whole = run(tmp_path / "whole", tiny_price, **changes)
    run(tmp_path / "parts", tiny_price, **{**changes, "max_iters": 4, "lr_decay_iters": 8})
    resume(tmp_path / "parts", "--max_iters=8")
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert whole == curve_of(tmp_path / "parts") and one["head.out.weight"].shape == (1, 16)


def test_measures_of_a_quantity_are_those_of_scikit_learn_and_a_linear_one_is_learned(regressed, prices):
    metrics = pytest.importorskip("sklearn.metrics")
    evaluate.main(settings_for("columns", "evaluating", out_dir=str(regressed), device="cpu", test=True))
    measured = json.loads((regressed / "evaluation.json").read_text())
    rows = {part: [json.loads(line) for line in (prices / f"{part}.jsonl").read_text().splitlines()]
            for part in ("train", "val", "test")}
    mean, std = (getattr(np, name)([row["label"] for row in rows["train"]]) for name in ("mean", "std"))
    for start, part in (("", "val"), ("test ", "test")):
        path = regressed / f"predictions{'_test' * bool(start)}.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        truth, own = ([row[name] for row in found] for name in ("truth", "answer"))
        assert truth == [row["label"] for row in rows[part]] and found[0]["values"] == rows[part][0]["values"]
        for name, answers in (("", own), (", mean", [mean] * len(truth))):
            expected = {"rmse": metrics.root_mean_squared_error(truth, answers),
                        "mae": metrics.mean_absolute_error(truth, answers), "r2": metrics.r2_score(truth, answers)}
            written = {key: measured[f"{start}{key}{name}"] for key in expected}
            assert written == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert measured[f"{start}loss"] == pytest.approx((measured[f"{start}rmse"] / std)**2, rel=1e-4)
        assert measured[f"{start}r2"] > 0.95 and measured[f"{start}r2, ridge regression"] > 0.95
        assert measured[f"{start}r2"] > measured[f"{start}r2, gradient boosting"] > 0.5
        assert measured[f"{start}rmse, without sex"] > 3 * measured[f"{start}rmse"]
        assert measured[f"{start}rmse, without port"] < 1.5 * measured[f"{start}rmse"]
    with pytest.raises(UserError, match="picture = 'a.png': shows which class was taken for which; price is a quant"):
        evaluate.main(settings_for("columns", "evaluating", out_dir=str(regressed), device="cpu", picture="a.png"))


def test_the_loss_of_a_quantity_is_the_same_on_any_number_of_workers(regressed, prices):
    task, model = opened(regressed, prices)
    values = [row["values"] for row in task.dataset.rows["val"]]
    table = encoded(values, model.config, task.tokenizers)
    outputs = model(**arguments(model.config, table, task.dataset.images, np.arange(60), ALONE.device))[:, 0].double()
    labels = torch.tensor([row["label"] for row in task.dataset.rows["val"]]).double()
    expected = ((outputs - (labels - model.config.mean) / model.config.std)**2).mean().item()
    shares = []
    with mock.patch.object(columns_task, "AT_ONCE", 13), mock.patch.object(World, "sum", lambda world, *sums: shares.
                                                                           append(sums) or sums):
        for size in (1, 2, 3):
            shares.clear()
            for rank in range(size):
                task.evaluate(model, "val", World(rank, size, ALONE.device), torch.float32)
            total, count = np.sum(shares, axis=0)
            assert (total / count, count) == (pytest.approx(expected, rel=1e-5), 60), size


def test_evaluating_without_scikit_learn_says_what_it_leaves_out(trained, regressed, capsys):
    for folder, name in ((trained, "accuracy"), (regressed, "rmse")):
        say.cache_clear()  # it says a line once
        missing = dict.fromkeys(("sklearn", *(name for name in sys.modules if name.startswith("sklearn."))))
        with mock.patch.dict("sys.modules", missing):
            evaluate.main(settings_for("columns", "evaluating", out_dir=str(folder), device="cpu", test=True))
        said = capsys.readouterr()
        assert f"  {name} " in said.out and f"  test {name}, without sex" in said.out
        assert not re.search("boosting|most frequent|mean", said.out)
        assert said.err.count("other methods beside the model: left out; for more, pip install scikit-learn\n") == 1


def test_another_run_may_start_from_it_if_it_reads_the_same_columns(trained, tiny, tmp_path):
    run(tmp_path / "more", tiny, init_from=str(trained), rates={"transformer": 0.0}, max_iters=2, eval_interval=2)
    (_, first, _), (_, second, _) = load(trained), load(tmp_path / "more")
    torch.testing.assert_close(first.transformer.state_dict(), second.transformer.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(first.head.state_dict(), second.head.state_dict(), atol=0.1, rtol=0)
    port = [column if column["name"] != "port" else {"name": "port", "kind": "text"} for column in COLUMNS]
    for name, changes, message in (
            ("fewer", dict(columns=COLUMNS[1:]), "the column age is missing in .*fewer, and of the kind number in the"),
            ("text", dict(columns=port), "the column port is of the kind text in .*text, and of the kind category in"),
            ("label", dict(label="drowned"), "is for predicting drowned .no, yes., and the model predicts saved"),
            ("extra", dict(columns=[*COLUMNS, {"name": "page", "kind": "number", "mean": 0.0, "std": 1.0}]),
             "the column page is of the kind number in .*extra, and missing in the model: .*=age:number,fare:")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", tiny, init_from=str(trained), dataset=str(write_set(tmp_path / name, **changes)))


# ----------------------------------------------------------------------------------------------------------------------
# Answers and errors

def sampled(folder, capsys, *arguments):
    """(what sample.py prints, what it says on stderr)."""
    capsys.readouterr()
    sample.main(parse(sample.Settings, [f"--out_dir={folder}", "--device=cpu", *arguments], **sample.HOW)[0])
    said = capsys.readouterr()
    return said.out, said.err


ROW = {"age": 50, "fare": 2.5, "sex": "female", "port": "C", "name": "the king", "note": "fool"}


def test_the_likeliest_classes_of_a_row_are_printed_and_what_it_lacks_is_said(trained, data, capsys, tmp_path):
    task, model = opened(trained, data)
    picture = np.random.default_rng(3).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    out, err = sampled(trained, capsys, f"--row={json.dumps({**ROW, 'photo': str(tmp_path / 'photo.png')})}")
    table = encoded([{**ROW, "photo": 0}], model.config, task.tokenizers)
    p = model(**arguments(model.config, table, picture[None], [0], ALONE.device)).softmax(-1)[0]
    names = sorted(zip(p.tolist(), model.config.labels), reverse=True)
    assert out == "saved: " + ", ".join(f"{name} {share:.3f}" for share, name in names) + "\n" and not err
    assert task.write(model, row=json.dumps({**ROW, "photo": str(tmp_path / "photo.png")}), top=0) + "\n" == out
    _, err = sampled(trained, capsys, '--row={"age": null, "sex": "other", "name": "the"}')
    assert "missing: age, fare, port, note, photo\n" in err
    assert "categories that training lacked, which count as missing: sex other\n" in err
    (tmp_path / "rows.csv").write_text("age,sex,photo,saved,ticket\n50,female,photo.png,yes,7\n,male,,no,8\n")
    out, err = sampled(trained, capsys, f"--row=FILE:{tmp_path}/rows.csv", "--top=1")
    assert out.count("\n  saved: ") == 2 and out.startswith("age 50, sex female, photo ")
    assert "columns that the model does not read: saved, ticket\n" in err
    assert "missing: age (in 1 of 2 rows), fare, port, name, note, photo (in 1 of 2 rows)\n" in err
    assert task.show(model).count("\n") > task.show(model, short=True).count("\n") == 5
    _, script, _, row = shlex.split(task.command(trained))
    assert script == "sample.py" and "saved: " in sampled(trained, capsys, row)[0]


def test_a_picture_shows_which_columns_each_column_looked_at(trained, data, capsys, tmp_path):
    task, model = opened(trained, data)
    config, row = model.config, {**ROW, "note": None, "name": "the king a", "photo": 2}
    found = arguments(config, encoded([row], config, task.tokenizers), task.dataset.images, [0], ALONE.device)
    drawn = []
    with mock.patch.object(columns_task, "draw", lambda *about: drawn.append(about) or "drawn"):
        draw_columns(model, found, SimpleNamespace(attention="map.png"))
    (weights, rows, names, _), = drawn
    assert rows == names == ["[CLS]", "sex", "port", "age", "fare", "name", "photo"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 7))
    x, _ = model.embed(**found)
    own = {"[CLS]": [0], "sex": [1], "port": [2], "age": [3], "fare": [4], "name": [5, 6, 7], "photo": [11, 12, 13, 14]}
    real = [i for places in own.values() for i in places]  # the empty note has the tokens 8 to 10
    each = attention_weights(model.transformer.blocks[0].attn, model.transformer.blocks[0].ln_1(x[:, real]))[0, 1]
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            block = each[[real.index(a) for a in own[one]]][:, [real.index(b) for b in own[other]]]
            assert weights[0, 1, i, j].item() == pytest.approx(block.sum(1).mean().item(), abs=1e-5)
    out, _ = sampled(trained, capsys, f"--row={json.dumps(ROW)}", f"--attention={tmp_path}/map.png")
    assert out.endswith(f"wrote {tmp_path}/map.png\n") and Image.open(tmp_path / "map.png").width > 100


def test_a_quantity_is_answered_in_its_own_unit(regressed, prices, capsys, tmp_path):
    task, model = opened(regressed, prices)
    config, row = model.config, {"age": 50, "fare": 2.5, "sex": "female", "port": None}
    output = model(**arguments(config, encoded([row], config, task.tokenizers), task.dataset.images, [0], ALONE.device))
    expected = config.mean + config.std * output.item()
    say.cache_clear()
    out, err = sampled(regressed, capsys, f"--row={json.dumps(row)}")
    assert 100 <= config.std < 1000 and out == f"price: {expected:,.0f}\n" and "missing: port\n" in err
    assert task.write(model, row=json.dumps(row)) + "\n" == out
    (tmp_path / "rows.csv").write_text("age,sex,price\n50,female,7\n,male,8\n")
    out, _ = sampled(regressed, capsys, f"--row=FILE:{tmp_path}/rows.csv")
    assert len(re.findall(r"\n  price: \d,\d{3}\n", out)) == 2
    first = task.show(model).splitlines()[1]
    assert first.endswith(f"  (right: {task.dataset.rows['val'][0]['label']:,.0f})")
    _, script, _, asked = shlex.split(task.command(regressed))
    assert script == "sample.py" and sampled(regressed, capsys, asked)[0].startswith("price: ")
    with pytest.raises(UserError, match="top = 1: price is a quantity, so there is one answer; leave it out"):
        sampled(regressed, capsys, f"--row={json.dumps(row)}", "--top=1")
    out, _ = sampled(regressed, capsys, f"--row={json.dumps(row)}", f"--attention={tmp_path}/map.png")
    assert out.startswith("price: ") and (tmp_path / "map.png").exists()
    for std, shown in ((79_000.0, "182,300"), (2.0, "182,345.68"), (0.05, "182,345.6781"), (3e6, "180,000")):
        assert Quantity(SimpleNamespace(std=std)).shown(182_345.67812) == shown
    assert [Quantity(SimpleNamespace(std=std)).shown(5.67891 * std) for std in (1e30, 1e-12)] == ["5.679e+30",
                                                                                                  "5.679e-12"]


def test_a_model_of_classes_does_not_predict_a_quantity(trained, regressed, data, prices, tiny, tmp_path):
    other = write_set(tmp_path / "other", label="price")
    for start, dataset, message in (
            (trained, prices, "is for predicting price .a quantity., and the model predicts saved .no, yes.: name"),
            (regressed, data, "is for predicting saved .no, yes., and the model predicts price .a quantity.: name"),
            (regressed, other, "is for predicting price .no, yes., and the model predicts price .a quantity.: name")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", tiny, init_from=str(start), dataset=str(dataset))
    with pytest.raises(UserError, match="is for predicting price .a quantity., and the model predicts price .no, yes"):
        check_columns(replace(load(trained)[1].config, label="price"), ColumnsDataset(prices))


def test_wrong_use_is_one_line(trained, tiny, data, dataset, tmp_path, capsys):
    numbers = write_set(tmp_path / "numbers", COLUMNS[2:4])
    for changes, message in (
            (dict(patch_size=3), "patch_size = 3: does not divide the images' 8 pixels; 2, 4, 8 do"),
            (dict(dataset=str(dataset)), "is a data set of kind text"),
            (dict(batch_size=999), "batch_size = 999: must be from 1 to"),
            (dict(dataset=str(numbers), block_size=9), "block_size = 9: .*numbers has no column of the kind text"),
            (dict(dataset=str(numbers), block_size=32, numbers="head"), "numbers = 'head': .* of the kind number"),
            (dict(init_from=str(trained), n_embd=32), "n_embd = 32, but .* has 16: leave it out")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", tiny, **changes)
    (tmp_path / "empty.csv").write_text("age,sex\n")
    (tmp_path / "others.csv").write_text("foo,bar\n1,2\n")
    (tmp_path / "x.png").write_bytes(b"no picture")
    for row, message in (
            ("", "row = '': must be an object in JSON, such as"), ("[1]", "row = '.1.': must be an object in JSON"),
            ("FILE:no.csv", "row = FILE:no.csv: there is no such file"),
            (f"FILE:{tmp_path}/x.png", "row = FILE:.*x.png: is no table: name a .parquet, .jsonl"),
            (f"FILE:{tmp_path}/empty.csv", "row = FILE:.*empty.csv: has no rows"),
            ('{"agee": 3}', "row: agee is no column, only age, fare, sex, port, name, note, photo are: leave it out"),
            ('{"saved": "yes"}', "row: saved is what the model predicts: leave it out"),
            ('{"age": "old"}', "row: age = 'old': must be a number, or empty where it is missing"),
            ('{"name": ["a"]}', "row: name = .'a'.: is no single value"),
            (json.dumps({"photo": f"{tmp_path}/x.png"}), "row 1: photo: image = .*x.png: can't be read"),
            ('{"photo": "no.png"}', "row 1: photo: image = no.png: can't be read: .*No such file"),
            (f"FILE:{tmp_path}/others.csv", "row = FILE:.*: has none of the model's columns, age, fare"),
            ("{}", "row = .*: has none of the model's columns")):
        with pytest.raises(UserError, match=message):
            sampled(trained, capsys, f"--row={row}")
    with pytest.raises(UserError, match="prompt = 'x': this model reads rows of a table: use --row"):
        sampled(trained, capsys, "--prompt=x")
    with pytest.raises(UserError, match="attention_layer = 2: the model has 1"):
        sampled(trained, capsys, '--row={"age": 3}', f"--attention={tmp_path}/map.png", "--attention_layer=2")


def test_a_number_out_of_all_bounds_is_said_and_gives_probabilities(trained, capsys):
    (far, said), (farther, _) = (sampled(trained, capsys, f'--row={{"age": {age}}}') for age in ("1e9", "1e30"))
    assert far == farther and "nan" not in far
    assert "age = 1e+09 is more than 1,000 standard deviations from the mean of training, and is taken as" in said
