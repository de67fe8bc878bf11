"""sources/columns.py: rows of a table with a class become a data set, which batches.py opens."""

import collections
import csv
import gzip
import itertools
import json
import random
import re
import runpy
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from test_pairs import data, write  # noqa: F401, data is a fixture

import prepare
from batches import ColumnsDataset
from configurator import UserError
from sources import columns, known, labelled_sets
from sources.download import Offline

ROOT = Path(prepare.__file__).parent
PARTS = ("train", "val", "test")


def run(*sources, **settings):
    settings = {"labels": "kind", "columns": "all", "val_fraction": 0.2, **settings}
    prepare.main(prepare.Settings(**settings), [str(source) for source in sources], settings)


def make_rows(count=120, seed=0):
    """Rows of all kinds of columns: an age that is missing at times, a colour, words, the file of a picture."""
    draw = random.Random(seed)
    words = "red blue old new big cat dog house tree sea".split()
    return [{"age": "" if i % 9 == 4 else round(draw.gauss(30, 10), 3), "colour": draw.choice(("red", "blue", "")),
             "note": " ".join(draw.choices(words, k=5)), "photo": f"pics/{draw.randrange(7)}.png" if i % 5 else "",
             "kind": draw.choice("xy")} for i in range(count)]


def make_pictures(folder):
    """Writes pics/0.png to pics/6.png, each of one grey."""
    Image = pytest.importorskip("PIL.Image")
    (folder / "pics").mkdir(exist_ok=True)
    for i in range(7):
        Image.new("RGB", (9, 9), (30 * i,) * 3).save(folder / f"pics/{i}.png")


def write_csv(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
    return path


def everything(dataset):
    """All rows as [(values, label)], each picture as its grey."""
    def shown(values):
        return {name: int(dataset.images[value].mean()) if name == "photo" and value is not None else value
                for name, value in values.items()}

    return sorted(((shown(row["values"]), row["label"]) for part in PARTS for row in dataset.rows[part]), key=repr)


def kinds(dataset):
    return {column["name"]: column["kind"] for column in dataset.meta["columns"]}


# ----------------------------------------------------------------------------------------------------------------------
# Values

def test_each_kind_of_table_gives_the_same_data_set(data, tmp_path):  # noqa: F811
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table
    rows = make_rows()
    make_pictures(tmp_path)
    typed = [{name: None if value == "" else value for name, value in row.items()} for row in rows]
    write_csv(tmp_path / "a.csv", rows)
    write_csv(tmp_path / "b.tsv", rows, "\t")
    write(tmp_path / "c.jsonl", *map(json.dumps, typed))
    write_table(pyarrow.Table.from_pylist(typed), tmp_path / "d.parquet")
    greys = [row["photo"] and 30 * int(row["photo"][5]) for row in typed]
    expected = [({**{name: row[name] for name in ("age", "colour", "note")}, "photo": grey}, row["kind"])
                for row, grey in zip(typed, greys)]
    for path in sorted(tmp_path.glob("?.*")):
        run(path, image_size=8)
        dataset = ColumnsDataset(data / path.stem)
        assert kinds(dataset) == {"age": "number", "colour": "category", "note": "text", "photo": "picture"}
        assert everything(dataset) == sorted(expected, key=repr), path
        assert dataset.meta["sha256"] == ColumnsDataset(data / "a").meta["sha256"], path
        assert (dataset.image_size, dataset.meta["labels"]) == (8, ["x", "y"])


def test_statistics_come_from_the_rows_for_training_as_scikit_learn_computes_them(data, tmp_path, capsys):  # noqa: F811
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    rows = [{**row, "split": PARTS[(i >= 80) + (i >= 100)], "constant": 0.1, "photo": ""}
            for i, row in enumerate(make_rows())]
    for row in rows[80:]:
        row.update(age=1000, colour="green")
    run(write_csv(tmp_path / "a.csv", rows), val_fraction=0.1)
    age, colour, note, constant = ColumnsDataset(data / "a").meta["columns"]  # a column without any value is left out
    ages = [[float(row["age"] or "nan")] for row in rows[:80]]
    scaler = preprocessing.StandardScaler().fit(ages)
    assert (age["mean"], age["std"]) == (pytest.approx(scaler.mean_[0]), pytest.approx(scaler.scale_[0]))
    encoder = preprocessing.OneHotEncoder().fit([[row["colour"]] for row in rows[:80] if row["colour"]])
    assert colour["values"] == encoder.categories_[0].tolist() == ["blue", "red"]
    assert constant == {"name": "constant", "kind": "number", "mean": pytest.approx(0.1), "std": 1.0}
    assert note == {"name": "note", "kind": "text"}
    said = capsys.readouterr().out
    assert "left out: photo, which no row for training has\n" in said
    assert "constant: number, mean 0.1, std 1; always the same, so it tells nothing\n" in said


@pytest.mark.parametrize("cells, kind", [
    (["1", "2.5", "-3e2", "", "NA", ".5"], "number"), (["1", "2", "3", "x"] * 9, "category"),
    (["1_0", "0x1"] * 9, "category"), ([True, False] * 9, "category"), (["?", "NA"] * 9, "category"),
    ([f"a longer text {i}" for i in range(20)], "text"), (["pics/0.png", "pics/1.png"] * 9, "category"),
    ([f"value {i % 150}" for i in range(900)], "text")])
def test_the_kind_of_a_column_is_found(tmp_path, cells, kind):
    assert columns.find_kind("c", [(cell, tmp_path) for cell in cells if not columns.is_missing(cell)]) == kind


@pytest.mark.parametrize("cells, kind, hint", [
    (["2024-05-01", "2024-5-2"] * 9, "category", "c: holds dates, such as 2024-05-01, and is taken for a category; to"),
    ([f"{i}.12.2023" for i in range(1, 31)], "text", "taken for a text; .* it c:category in --columns, or write days"),
    (["02134", "10001"] * 9, "number", "c: holds numbers that look like codes, such as 02134, and is taken"),
    ([1000.0 + i for i in range(20)], "number", "such as 1000, .* to change that, name it c:category in --columns$"),
    ([str(1000 + i % 19) for i in range(20)], "number", "^$"), (["2024", "0", "10"] * 9, "number", "^$"),
    ([f"{i}.2" for i in range(10, 40)], "number", "^$"), (["May 2024", "June 2024"] * 9, "category", "^$")])
def test_dates_and_codes_get_a_hint(tmp_path, capsys, cells, kind, hint):
    rows = [{"cells": {"c": cell}, "folder": tmp_path} for cell in cells]
    assert columns.kinds_of({"c": ""}, rows, "x") == {"c": kind}
    assert re.search(hint, capsys.readouterr().out.strip())
    columns.kinds_of({"c": kind}, rows, "x")  # it is told
    assert not capsys.readouterr().out


def test_a_quantity_is_found_by_its_values_or_told(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    draw = random.Random(1)
    prices = [round(draw.gauss(200_000, 80_000), 2) for _ in range(58)] + ["", "NA"]
    path = write_csv(tmp_path / "a.csv", changed(kind=prices, stars=[i % 5 for i in range(60)]))
    run(path)
    dataset = ColumnsDataset(data / "a")
    labels = {part: [row["label"] for row in dataset.rows[part]] for part in PARTS}
    assert sorted(sum(labels.values(), [])) == sorted(prices[:58]) and dataset.meta["left_out"]["unlabelled"] == 2
    assert dataset.meta["labels"] == []
    assert dataset.meta["mean"] == pytest.approx(np.mean(labels["train"]))
    assert dataset.meta["std"] == pytest.approx(np.std(labels["train"]))
    said = capsys.readouterr().out
    assert "left out: 2 without a label" in said and "python train.py config/diabetes.py --dataset=a " in said
    assert re.search(r"^kind: a quantity, in training from [\d,.]+ to .*; to predict classes, --labels=kind:category$",
                     said, re.M)
    run(path, labels="stars", name="classes")
    assert ColumnsDataset(data / "classes").meta["labels"] == ["0", "1", "2", "3", "4"]
    assert "to predict a quantity, --labels=stars:number\n" in capsys.readouterr().out
    monkeypatch.setattr(prepare, "MANY_ROWS", 20)
    run(path, labels="stars:number", name="quantity")
    assert "python train.py config/diamonds.py --dataset=quantity " in capsys.readouterr().out
    assert ColumnsDataset(data / "quantity").rows["val"][0]["label"] in (0.0, 1.0, 2.0, 3.0, 4.0)
    run(write_csv(tmp_path / "b.csv", changed(kind=[i % 20 for i in range(60)])), labels="kind:category")
    assert 10 < len(ColumnsDataset(data / "b").meta["labels"]) <= 20


def test_labels_that_are_no_plain_numbers_are_told(data, tmp_path, capsys):  # noqa: F811
    numbers = itertools.count()

    def said(cells, **how):
        run(write_csv(tmp_path / "a.csv", changed(kind=cells)), name=f"set{next(numbers)}", **how)
        return capsys.readouterr().out

    assert "left out: 6 without a label" in said([18 + i % 4 if i % 10 else "NA" for i in range(60)])
    assert "labels: 3; " in said(["none" if i % 10 == 0 else "xy"[i % 2] for i in range(60)])  # a class like others
    assert "; for a quantity, write plain numbers" in said([f"${i % 3},000" for i in range(60)])
    for cells, how, message in ((range(60), dict(labels="kind:category"), "or for a quantity --labels=kind:number"),
                                 ([i * 1e-200 for i in range(60)], {}, "have the label .*: there must be at least two"),
                                 (range(60), dict(labels="kind:number", columns=""), "several, --columns=all")):
        with pytest.raises(UserError, match=message):
            said(cells, **how)


def test_columns_are_chosen_by_name_and_kind(data, tmp_path, capsys):  # noqa: F811
    rows = [{**row, "photo": "", "": i, "a:b": i % 4} for i, row in enumerate(make_rows())]
    path = write_csv(tmp_path / "a.csv", rows)
    run(path, columns="colour:text,age,a:b", name="named")
    assert list(kinds(ColumnsDataset(data / "named")).items()) == [
        ("colour", "text"), ("age", "number"), ("a:b", "number")]
    run(path, columns="!note,!photo,a:b:category", name="others")
    assert kinds(ColumnsDataset(data / "others")) == {"age": "number", "colour": "category", "a:b": "category"}
    said = capsys.readouterr().out
    assert "train on it: python train.py config/titanic.py --dataset=others --out_dir=out/others\n" in said
    assert "left out: a column without a name\n" in said and "\ncolour: category, 2 values: blue, red; " in said


def test_a_cell_that_spans_lines_and_a_mark_at_the_start_are_read(data, tmp_path):  # noqa: F811
    rows = [{"kind": "xy"[i % 2], "n": str(i), "note": f"first line\nline {i}"} for i in range(40)]
    path = write_csv(tmp_path / "a.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Excel writes it
    run(path)
    assert everything(ColumnsDataset(data / "a"))[-1] == ({"n": 9.0, "note": "first line line 9"}, "y")


def test_a_picture_that_cannot_be_read_is_refused_or_missing(data, tmp_path, capsys):  # noqa: F811
    make_pictures(tmp_path)
    rows = [row for row in make_rows() if row["photo"]]
    (tmp_path / rows[5]["photo"]).write_text("no picture")
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(UserError, match=r"line \d+: photo: .*can't be read: .*add --unreadable=skip"):
        run(path)
    run(path, unreadable="skip")
    found = everything(ColumnsDataset(data / "a"))
    assert sum(values["photo"] is None for values, _ in found) == sum(row["photo"] == rows[5]["photo"] for row in rows)
    assert len(found) == len(rows) and "pictures: 6; left out: 1 that can't be read" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Parts

def parts(dataset):
    return {row["values"]["note"]: part for part in PARTS for row in dataset.rows[part]}


def test_a_row_keeps_its_part_when_others_are_added(data, tmp_path, capsys):  # noqa: F811
    rows = [{**row, "photo": ""} for row in make_rows(300)]
    run(write_csv(tmp_path / "some.csv", rows[:150]))
    run(write_csv(tmp_path / "all.csv", rows[::-1] + rows[:30]))
    some, whole = (ColumnsDataset(data / name) for name in ("some", "all"))
    assert parts(some).items() <= parts(whole).items() and set(parts(some).values()) == set(PARTS)
    said = capsys.readouterr().out
    assert "values of an earlier one, and are kept: 30; values that occur with different labels: 0\n" in said
    assert "rows for training" not in said  # equal rows share a part


def test_rows_that_share_a_page_stay_together_and_given_parts_are_kept(data, tmp_path, capsys):  # noqa: F811
    rows = [{**row, "photo": "", "page": i // 4} for i, row in enumerate(make_rows(200))]
    run(write_csv(tmp_path / "a.csv", rows))
    found = ColumnsDataset(data / "a")
    pages = {part: {row["page"] for row in found.rows[part]} for part in PARTS}
    assert sum(map(len, pages.values())) == len(set.union(*pages.values())) == 50 and all(pages.values())
    assert "page" not in kinds(found)
    for row in rows:
        row["split"] = "test" if row["page"] < 10 else ""
    rows[0]["kind"] = "z"
    run(write_csv(tmp_path / "b.csv", rows))
    found = ColumnsDataset(data / "b")
    assert {row["page"] for row in found.rows["test"]} == {str(page) for page in range(10)} and found.rows["val"]
    said = capsys.readouterr().out
    assert "val: by a hash of the page, test: as given" in said
    assert "test: 1 of 40 rows have a label that no row for training has" in said


def test_rows_of_a_table_of_few_values_get_a_part_each(data, tmp_path, capsys):  # noqa: F811
    rows = [{"sex": "fm"[i % 2], "deck": "abc"[i % 3], "kind": "xy"[i % 5 > 1]} for i in range(300)]
    run(write_csv(tmp_path / "a.csv", rows))
    meta = ColumnsDataset(data / "a").meta
    assert 30 < meta["val_rows"] < 90 and 30 < meta["test_rows"] < 90
    said = capsys.readouterr().out
    assert "val: by a hash of each row" in said and f"val: {meta['val_rows']} rows have the values of a row" in said


def test_rows_without_a_label_or_a_value_are_left_out(data, tmp_path, capsys):  # noqa: F811
    rows = [{**row, "photo": ""} for row in make_rows()]
    rows[3]["kind"] = rows[4]["kind"] = ""
    rows[5].update(age="", colour=" ", note="")
    run(write_csv(tmp_path / "a.csv", rows))
    assert ColumnsDataset(data / "a").meta["left_out"] == {"unlabelled": 2, "empty": 1}
    assert "rows: 117; left out: 2 without a label, 1 without any value\n" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# What is refused

def changed(**values):
    """60 rows, with a list of values, or one for all, in some columns."""
    rows = [{name: row[name] for name in ("age", "colour", "note", "kind")} for row in make_rows(60)]
    for name, value in values.items():
        for i, row in enumerate(rows):
            row[name] = value[i] if isinstance(value, list | range) else value
    return rows


@pytest.mark.parametrize("rows, settings, error", [
    (changed(), dict(columns="ages"), "columns = ages: .*a.csv has no column ages; did you mean age"),
    (changed(), dict(columns="!x"), "has no column x; choose from age, colour, note, kind"),
    (changed(), dict(labels="kin"), "labels = kin: .* has no column kin; did you mean kind"),
    (changed(), dict(columns="age,kind"), "kind is the column to predict, --labels: leave it out here"),
    (changed(), dict(columns="age:nummer"), "'nummer' is no kind: choose from number, category, text, pic"),
    (changed(), dict(columns="!age,!colour,!note"), "leaves no column of .*a.csv to predict kind from: add one"),
    (changed(kind=["z"] + ["x", "y"] * 30), {}, "only one row has the label z .1 such labels., so that none can be"),
    (changed(kind=[f"id {i}" for i in range(60)]), {}, "60 different labels in 60 rows: each row has its own, as"),
    (changed(kind=[i / 3 for i in range(59)] + ["inf"]), {}, "line 61: kind = 'inf': is not finite, or too large"),
    (changed(kind=[f"{i},200" for i in range(60)]), {}, "'0,200' is no plain number: .*, or .* --labels=kind:category"),
    (changed(), dict(labels="kind:number"), "kind = '[xy]': must be a number, .* with --labels=kind:category$"),
    (changed(), dict(labels="kind:text"), "labels = kind:text: 'text' is no kind: choose from number, category$"),
    (changed(), dict(labels="kind:class"), "labels = kind:class: 'class' is no kind: choose from number"),
    (changed(kind=7), dict(labels="kind:number"), "all rows for training have the label 7.0: there must"),
    (changed(kind=range(60)), dict(labels="kind:category"), "60 different labels in 60 rows: each row has its own"),
    (changed(kind="x"), {}, "all rows for training have the label x: there must be at least"),
    (changed(kind=""), {}, "no row has both a label and a value .left out: 60 without a label"),
    (changed(age=["old"] + list(range(59))), dict(columns="age:number"), "line 2: age = 'old': must be a number, or"),
    (changed(age=["inf"] + list(range(59))), {}, "line 2: age = 'inf': is not finite, or too large: correct it"),
    (changed(age=[f"{i},200.5" for i in range(60)]), {}, "'0,200.5' is no plain number: write it without"),
    (changed(age=[f"{i},5" for i in range(60)]), {}, "column age: '0,5' is no plain number: write it without"),
    (changed(age=[f"${i}" for i in range(60)]), {}, r"column age: '.\d+' is no plain number: write it without"),
    (changed(age=[f"{i}.5 %" for i in range(60)]), {}, r"column age: '\d+.5 %' is no plain number: write it without"),
    (changed(colour=""), dict(columns="colour"), "no row has both a label and a value"),
    (changed(split="west"), {}, "line 2: split = 'west': must be train, val or test"),
    (changed(age=7, colour="", note="", kind=["x", "y"] * 30, page=1), {}, "none of its 60 rows is for"),
    (changed(), dict(columns="age", tokenizer="byte"), "tokenizer = byte: does nothing, as no column is a text; leave"),
    (changed(), dict(image_size=9), "image_size = 9: does nothing, as no column is a picture; leave it out"),
    (changed(), dict(unreadable="skip"), "unreadable = skip: does nothing, as no column is a picture"),
    (changed(split=["train", "val", "test"] * 20), {}, "val_fraction = 0.2: the rows of .*a.csv name their split"),
    (changed(), dict(val_fraction=0.5), "val_fraction = 0.5: must lie between 0 and 0.5"),
    (changed(), dict(tags=True), "tags = True: does nothing for rows of a table")])
def test_what_cannot_be_a_table_of_classes_is_refused_in_a_line(data, tmp_path, rows, settings, error):  # noqa: F811
    with pytest.raises(UserError, match=error) as refused:
        run(write_csv(tmp_path / "a.csv", rows), **settings)
    assert "\n" not in str(refused.value) and not (data / "a").exists()


@pytest.mark.parametrize("name, text, error", [
    ("a.csv", "kind;age\nx;1\n", "a.csv separates its columns by semicolons: save it with commas"),
    ("a.csv", "kind;age\nx;1,5\n", "a.csv separates its columns by semicolons: save it with commas"),
    ("a.csv", "kind\tage\nx\t1\n", "a.csv separates its columns by tabs: .* or name it .tsv"),
    ("a.csv", "kind,age,age\nx,1,2\n", "several columns are named age: rename all but one"),
    ("a.csv", "kind,age\n", "a.csv: has no row: add some below the line with the names"), ("a.csv", "", "has no row"),
    ("a.jsonl", '{"kind": "x", "age": [1, 2]}\n', r"line 1: age = \[1, 2\]: is no single value: write one"),
    ("a.jsonl", '{"kind": {"a": 1}, "age": 1}\n', "line 1: kind = {'a': 1}: is no single value"),
    ("a.jsonl", '{"kind": "x", "age": "\\ud800"}\n', "line 1: .* is not valid text"),
    ("a.txt", "kind,age\n", "labels = kind: .*a.txt is no table: give a .csv, .tsv, .jsonl or .parquet")])
def test_what_is_no_table_is_refused_in_a_line(data, tmp_path, name, text, error):  # noqa: F811
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=error):
        run(tmp_path / name)


def test_a_column_that_is_mostly_numbers_is_said_to_hold_words(data, tmp_path, capsys):  # noqa: F811
    rows = changed(age=["old"] * 9 + list(range(51)), split=["train"] * 40 + ["val"] * 10 + ["test"] * 10)
    run(write_csv(tmp_path / "a.csv", rows), val_fraction=0.1)
    assert "age: holds numbers, but also 'old', and so is taken as words" in capsys.readouterr().out
    rows = changed(age=list(range(59)) + ["old"], split=["train"] * 40 + ["val"] * 10 + ["test"] * 10)
    with pytest.raises(UserError, match="line 61: age = 'old': must be a number, or empty"):  # of the rows for test
        run(write_csv(tmp_path / "b.csv", rows), val_fraction=0.1)


def test_words_that_look_like_pictures_are_said_to_be_none(data, tmp_path, capsys):  # noqa: F811
    run(write_csv(tmp_path / "a.csv", changed(colour=[f"{i}.png" for i in range(60)])))
    assert "colour: looks like names of pictures, but there is no file 0.png, and so" in capsys.readouterr().out
    with pytest.raises(UserError, match="columns = all: is for predicting .* name it with --labels=COLUMN"):
        prepare.main(prepare.Settings(columns="all"), [str(tmp_path / "a.csv")])


def test_numbers_that_hardly_differ_have_a_deviation(data, tmp_path):  # noqa: F811
    run(write_csv(tmp_path / "a.csv", changed(age=[1e-320, 0.0] * 30)))
    assert ColumnsDataset(data / "a").meta["columns"][0]["std"] == 1.0


def test_a_wide_table_is_shown_in_short(data, tmp_path, capsys):  # noqa: F811
    draw = random.Random(0)
    rows = [{"kind": "xy"[i % 2], **{f"c{n}": draw.random() for n in range(1000)}} for i in range(60)]
    run(write_csv(tmp_path / "a.csv", rows))
    assert len(ColumnsDataset(data / "a").meta["columns"]) == 1000
    said = capsys.readouterr().out
    assert "\nand 960 of kind number\n" in said and len(said.splitlines()) < 60


def test_a_quantity_without_a_deviation_is_damaged(data, tmp_path):  # noqa: F811
    run(write_csv(tmp_path / "a.csv", changed(kind=[i / 7 for i in range(60)])))
    meta, rows = data / "a" / "meta.json", data / "a" / "val.jsonl"
    whole = meta.read_text(), rows.read_text()
    for path, pattern, new in ((meta, r'"std": 2\.', '"std": -2.'), (meta, '"std"', '"dev"'),
                               (rows, r'"label": [\d.]+', '"label": "x"')):
        path.write_text(re.sub(pattern, new, path.read_text()))
        assert (meta.read_text(), rows.read_text()) != whole
        with pytest.raises(UserError, match="prepare"):
            ColumnsDataset(data / "a")
        meta.write_text(whole[0])
        rows.write_text(whole[1])
    ColumnsDataset(data / "a")


@pytest.mark.parametrize("name, damage", [
    ("meta.json", lambda text: text.replace('"labels"', '"x"')), ("train.jsonl", lambda text: text[:-9]),
    ("meta.json", lambda text: text.replace('"number"', '"numbr"')),
    ("val.jsonl", lambda text: text.replace('"age"', '"edge"')),
    ("test.jsonl", lambda text: text.replace('"photo": 1', '"photo": 9')),
    ("train.jsonl", lambda text: text.replace('"colour": "red"', '"colour": 1')), ("images.bin", lambda text: "")])
def test_damaged_files_are_refused(data, tmp_path, name, damage):  # noqa: F811
    make_pictures(tmp_path)
    run(write_csv(tmp_path / "a.csv", make_rows()), image_size=8)
    ColumnsDataset(data / "a")
    path = data / "a" / name
    before = path.read_text(encoding="latin-1")
    path.write_text(damage(before), encoding="latin-1")
    assert path.read_text(encoding="latin-1") != before
    with pytest.raises(UserError, match="prepare"):
        ColumnsDataset(data / "a")


# ----------------------------------------------------------------------------------------------------------------------
# Known sets

def test_the_passengers_of_a_ticket_are_in_one_part(data, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("sklearn")
    assert known.ensure("titanic") == "titanic"
    dataset = ColumnsDataset(data / "titanic")
    rows = {part: dataset.rows[part] for part in PARTS}
    assert sum(map(len, rows.values())) == 1309
    assert sum(row["label"] == "1" for found in rows.values() for row in found) == 500  # as all sources count
    tickets = [{row["page"] for row in found} for found in rows.values()]
    assert not any(one & other for one, other in itertools.combinations(tickets, 2))
    assert "ticket" not in kinds(dataset)
    astor, = (row for found in rows.values() for row in found if row["values"]["name"] == "Astor, Col. John Jacob")
    assert astor["values"]["fare"] == 227.525 and astor["label"] == "0" and astor["page"] == "PC 17757"
    assert "left out: boat and body" in capsys.readouterr().out


def test_titanic_is_downloaded_where_scikit_learn_lacks_it(data, tmp_path, monkeypatch):  # noqa: F811
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    packed = Path(sklearn_datasets.__file__).parent / "tests/data/openml/id_40945/data-v1-dl-16826755.arff.gz"
    content = gzip.decompress(packed.read_bytes())
    expected = columns.titanic(tmp_path)[0]
    assert "cabin" in expected[0]["cells"] and not {"boat", "body"} & expected[0]["cells"].keys()
    monkeypatch.setattr(columns, "sklearn_datasets", lambda: columns)  # whose folder lacks it
    monkeypatch.setattr(columns, "download", lambda url, path: path.write_bytes(content))
    assert [row["cells"] for row in columns.titanic(tmp_path)[0]] == [row["cells"] for row in expected]
    (tmp_path / "download/titanic.arff").write_bytes(content + b"\n")
    with pytest.raises(UserError, match="titanic.arff is not the expected table .*: delete it and run again"):
        columns.titanic(tmp_path)

    def offline(url, path):
        raise Offline(f"{url} can't be reached")

    monkeypatch.setattr(columns, "download", offline)
    with pytest.raises(Offline):
        known.ensure("titanic")


def test_breast_cancer_is_that_of_scikit_learn(data):  # noqa: F811
    load = pytest.importorskip("sklearn.datasets").load_breast_cancer
    prepare.main(prepare.Settings(), ["breast_cancer"])
    dataset, found = ColumnsDataset(data / "breast_cancer"), load()
    assert set(kinds(dataset).values()) == {"number"} and dataset.meta["labels"] == ["benign", "malignant"]
    expected = [(values.tolist(), str(found.target_names[target])) for values, target in zip(found.data, found.target)]
    assert sorted((list(values.values()), label) for values, label in everything(dataset)) == sorted(expected)


def test_diabetes_is_that_of_scikit_learn(data):  # noqa: F811
    load = pytest.importorskip("sklearn.datasets").load_diabetes
    known.ensure("diabetes")
    dataset, found = ColumnsDataset(data / "diabetes"), load(scaled=False)
    assert kinds(dataset) == {name: "category" if name == "sex" else "number" for name in found.feature_names}
    expected = [(values.tolist(), target) for values, target in zip(found.data, found.target)]
    rows = [(list(map(float, values.values())), label) for values, label in everything(dataset)]
    assert sorted(rows) == sorted(expected)


def test_diamonds_come_from_a_wheel_and_a_length_of_0_is_missing(data, tmp_path, monkeypatch):  # noqa: F811
    lines = ['"carat","cut","price","x","y","z"', *(f'{i / 100},"Good",{326 + i},{i % 30},4.1,2.43' for i in range(60))]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as file:
        file.writestr("plotnine/data/diamonds.csv", "\n".join(lines))
    monkeypatch.setattr(labelled_sets, "pip_download", lambda *about: tmp_path / "a.whl")
    with pytest.raises(UserError, match="a.whl is not as expected"):
        known.ensure("diamonds")
    digest = sha256((tmp_path / "a.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(columns, "DIAMONDS", (*columns.DIAMONDS[:2], digest))
    known.ensure("diamonds")
    rows = everything(ColumnsDataset(data / "diamonds"))
    assert sorted(label for _, label in rows) == list(range(326, 386))
    assert [label for values, label in rows if values["x"] is None] == [326, 356]


def test_each_column_of_the_ledger_is_needed():
    generate = runpy.run_path(str(ROOT / "data/ledger/generate.py"))
    labels = [i % 10 for i in range(1797)]
    rows = list(generate["bookings"](labels))
    amounts = {word: i for i, word in enumerate(generate["WORDS"])}

    def read(row):
        amount, = (amounts[word] for word in row["note"].split() if word in amounts)
        return labels[row["slip"]], amount, row["kind"], row["target"]

    def best(hidden):
        """The share of rows that the most frequent class gets right, for each combination of what is not hidden."""
        counts = collections.defaultdict(collections.Counter)
        for start, amount, kind, sign, near in itertools.product(range(10), range(10), ("paid in", "paid out"), (1, -1),
                                                                 generate["NEAR"]):
            target = start + sign * amount + near
            seen = [value for i, value in enumerate((start, amount, kind, target)) if i != hidden]
            counts[tuple(seen)][start + (amount if kind == "paid in" else -amount) >= target] += 1
        return sum(max(found.values()) for found in counts.values()) / 1600

    assert best(None) == 1 and all(0.7 < best(hidden) < 0.8 for hidden in range(4))
    for row in rows:
        start, amount, kind, target = read(row)
        assert (row["reached"] == "yes") == (start + (amount if kind == "paid in" else -amount) >= target)
    far = [row["kind"] for row in rows if read(row)[1] >= 4 and row["target"] > read(row)[0] + 2]
    assert 0.45 < far.count("paid in") / len(far) < 0.55  # the target does not tell the kind
    scans = [{row["slip"] for row in rows if row["split"] == part} for part in PARTS]
    notes = [{" ".join("{}" if word in amounts else word for word in row["note"].split()) for row in rows
              if row["split"] == part} for part in PARTS]
    for found in (scans, notes):
        assert all(found) and not any(one & other for one, other in itertools.combinations(found, 2))


@pytest.mark.slow
def test_the_ledger_is_prepared_from_its_pictures(data, monkeypatch):  # noqa: F811
    scans = pytest.importorskip("sklearn.datasets").load_digits().images
    known.ensure("ledger")
    dataset = ColumnsDataset(data / "ledger")
    assert kinds(dataset) == {"slip": "picture", "note": "text", "kind": "category", "target": "number"}
    assert [len(dataset.rows[part]) for part in PARTS] == [8000, 1000, 1000] and dataset.image_size == 16
    rows = list(csv.DictReader(open(data / "ledger/source/rows.csv")))
    for row, saved in list(zip(rows, dataset.rows["train"]))[:50]:
        small = dataset.images[saved["values"]["slip"]][..., 0].reshape(8, 2, 8, 2).mean((1, 3)) * 16 / 255
        assert np.abs(small - scans[int(row["slip"][6:10])]).mean() < 1  # enlarged, and of the same ink
        assert saved["values"]["note"] == row["note"] and saved["label"] == row["reached"]
