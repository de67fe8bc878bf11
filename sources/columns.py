"""Makes a data set of a table's rows, each with a label: {train,val,test}.jsonl, meta.json, perhaps images.bin.

    python prepare.py passengers.csv --labels=survived --columns=all       predict one column from all others
    python prepare.py wines.csv --labels=points:number --columns=all       a quantity, not a class (points:category)
    python prepare.py passengers.csv --labels=survived --columns="sex,age,deck:category,name:text,photo:picture"
    python prepare.py passengers.csv --labels=survived --columns="!ticket,deck:category"       from all but ticket
    python prepare.py titanic                           a known one; also breast_cancer, ledger, diabetes, diamonds

Tables are .csv, .tsv, .jsonl or .parquet. A column holds numbers, categories, texts, or names of picture files beside
the table. The kinds that are not told are found from the rows for training; all are printed. An empty cell is missing;
in a column of numbers, so is a word such as NA. A label is a quantity if it is a number with many values, as a price.

The files train, val and test of a folder keep that part, and so do rows whose column `split` says it. What has no part
gets one by a hash of its `page`, if the table has that column, or of its values: rows that share these stay together,
unless most rows have the values of another one, as in a table of few categories.

All rows are in memory at once: 0.6 GB, and three quarters of a minute of one CPU core, for 100,000 rows of 20 columns.
"""

import csv
import difflib
import functools
import gzip
import hashlib
import json
import math
import re
import runpy
import zipfile
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError
from machine.terminal import printable, watched
from run.pictures import read_image
from sources import labelled, labelled_images, labelled_sets
from sources.download import download
from sources.images import PICTURES
from sources.pairs import SPLITS
from sources.texts import finish, writing

KINDS = ("number", "category", "text", "picture")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?", re.I)
UNCLEAR = re.compile(r"[+-]?[$€£]?(\d{1,3}([,' ]\d{3})+(\.\d+)?|\d+[,.]?\d*) ?[%€]?")  # 1,234.5 or 3,5 or 35 %
ABSENT = ("na", "n/a", "nan", "null", "none", "?", "-")  # written for a number that is missing
MOST_VALUES = 100  # of a category that is found; each also occurs twice on average
MOST_CLASSES = 50  # labels that are numbers: more are a quantity
DATE = re.compile(r"\d{4}[-/]\d\d?[-/]\d\d?([T ].*)?|\d\d?[-/.]\d\d?[-/.](\d\d){1,2}")
MOST_SHOWN = 40  # columns, each in a line
LEAST_STD = 1e-100  # of a column of numbers; less: they are taken as equal
TITANIC = ("https://www.openml.org/data/v1/download/16826755/Titanic.arff",
           "c56e3785c96cd8aceac85f11bff21c2bf72841426f50903a6f27be8f334a7d03")  # SHA-256
DIAMONDS = ("plotnine", "0.15.0", "1ce9a109c124fc9b657039591ebb8acbc1c5ae238c9d9256aea9284bc6188436")  # SHA-256
ROOT = Path(__file__).resolve().parents[1]


class How(NamedTuple):
    """How tables are prepared; prepare.py's settings of the same names."""
    labels: str = ""  # the column that is predicted, perhaps with its kind: price:number
    columns: str = "all"  # the columns that it is predicted from
    tokenizer: str = ""  # of texts; "": bpe:4000, or for a small text a BPE of as many tokens as it yields
    val_fraction: float = 0.1  # the share of rows for validation, and once more for test
    image_size: int = 48
    unreadable: str = "refuse"  # or "skip": a picture that can't be read is missing


def prepare(rows, folder, how, source, revision=""):
    """Writes the data set of an iterable of rows into the folder, and returns the dict of meta.json.

    A row is a dict with where (for messages), cells ({column: value}), folder (where the names of its pictures start),
    and perhaps page and split; see `read`. Raises UserError for columns that the rows lack, for a cell that does not
    fit its column, for labels that are neither classes nor a quantity, and if a split would be empty.
    """
    with writing(folder):
        rows = list(rows)
        label, label_kind = name_and_kind(how.labels, {name for row in rows for name in row["cells"]}, "labels")
        how = how._replace(labels=label)
        asked = choose_columns(rows, how, source)
        if not label_kind:
            clear_absent(rows, how.labels)
            label_kind = find_label_kind(rows, how.labels)
        kept, left_out = choose_rows(rows, asked, label_kind, how, source)
        splits = {split: [row for row in kept if row["split"] == split] for split in SPLITS}
        labels = labels_of(splits, how.labels, source)
        kinds = kinds_of(asked, splits["train"], source)
        check_unused(how, kinds)
        images = read_values(kept, kinds, folder / "images.bin.new", how)
        meta = {"kind": "columns", "source": str(source), "revision": revision, "sha256": "", "label": how.labels,
                **labels, "columns": [described(name, kinds[name], splits["train"]) for name in kinds],
                **images, **learn(how, kinds, splits, folder / "tokenizer.json.new"), "left_out": left_out}
        print_columns(meta["columns"], splits["train"])
        files = [name for name, kind in (("images.bin", "picture"), ("tokenizer.json", "text"))
                 if kind in kinds.values()]
        digest = hashlib.sha256(np.memmap(folder / "images.bin.new", mode="r") if images.get("images") else b"")
        for split, found in splits.items():
            meta[f"{split}_rows"] = len(found)
            labelled.write_rows(folder / f"{split}.jsonl.new", found, ("values", "label"), digest)
        meta["sha256"] = digest.hexdigest()
        return finish(folder, (*files, *(f"{split}.jsonl" for split in SPLITS)), meta)


# ----------------------------------------------------------------------------------------------------------------------
# Which columns

def clear_absent(rows, name):
    """Takes away labels such as NA if all others are numbers."""
    labels = {text_of(row, name) for row in rows} - {""}
    absent = {label for label in labels if label.lower() in ABSENT}
    if absent < labels and all(map(NUMBER.fullmatch, labels - absent)):
        for row in rows:
            if text_of(row, name) in absent:
                row["cells"] = {**row["cells"], name: None}


def find_label_kind(rows, name):
    """number, for a quantity, if the labels are numbers and too many for classes; else another kind."""
    cells = [(row["cells"].get(name), row["folder"]) for row in rows if text_of(row, name)]
    are_few = len({text_in(cell) for cell, _ in cells}) <= max(10, min(MOST_CLASSES, len(cells) / 4))
    return "category" if are_few else find_kind(name, cells, "labels")


def choose_columns(rows, how, source):
    """{column: its kind, or "" if that must be found}: those of the rows' columns that how.columns selects."""
    found = dict.fromkeys(name for row in rows for name in row["cells"])
    if not rows:
        raise UserError(f"{source}: has no row: add some below the line with the names of the columns")
    items = [item.strip() for item in how.columns.split(",") if item.strip()]
    hidden = [item[1:].strip() for item in items if item.startswith("!")]
    kinds = dict(name_and_kind(item, found) for item in items if item != "all" and not item.startswith("!"))
    for setting, name in [("labels", how.labels), *(("columns", name) for name in (*kinds, *hidden))]:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            some = ", ".join(filter(None, [*found][:MOST_SHOWN])) + ", ..." * (len(found) > MOST_SHOWN)
            hint = f"did you mean {near[0]}?" if near else f"choose from {some}"
            raise UserError(f"{setting} = {getattr(how, setting)}: {source} has no column {name}; {hint}")
    if how.labels in kinds:
        raise UserError(f"columns = {how.columns}: {how.labels} is the column to predict, --labels: leave it out here")
    if hidden or "all" in items:
        kinds = {name: kinds.get(name, "") for name in found if name and name not in (how.labels, *hidden)}
        if "" in found:
            print("left out: a column without a name", flush=True)
    if not kinds:
        raise UserError(f"columns = {how.columns}: leaves no column of {source} to predict {how.labels} from: add one")
    return kinds


def name_and_kind(item, found, setting="columns"):
    """(column, kind or "") of an item of --columns or --labels, such as age or age:number."""
    name, colon, kind = item.rpartition(":")
    if item in found or not colon:
        return item, ""
    kinds = KINDS[:2] if setting == "labels" else KINDS
    if kind not in kinds:
        raise UserError(f"{setting} = {item}: {kind!r} is no kind: choose from {', '.join(kinds)}")
    return name, kind


def kinds_of(asked, rows, source):
    """{column: kind}, found from the rows for training where it is not told, without columns that hold nothing."""
    kinds = {}
    for name, kind in asked.items():
        cells = [(row["cells"][name], row["folder"]) for row in rows if not is_missing(row["cells"][name])]
        if cells:
            kinds[name] = kind or find_kind(name, cells)
            if not kind:
                say_doubtful(name, kinds[name], cells)
        else:
            print(printable(f"left out: {name}, which no row for training has"), flush=True)
    if not kinds:
        raise UserError(f"{source}: no row for training has a value in {', '.join(asked)}: choose other --columns")
    return kinds


def find_kind(name, cells, setting="columns"):
    """The kind of a column. cells: a list of (cell, the folder of its table), of which none is missing.

    setting: of prepare.py, which can tell the kind; "labels" for the column to predict.
    """
    numbers, others = [], set()
    for cell, _ in cells:
        try:
            numbers.append(number_in(cell))
        except ValueError:
            others.add(text_in(cell))
    if not others and numbers.count(None) < len(numbers):
        return "number"
    if others and all(map(UNCLEAR.fullmatch, others)):
        value = min(others)
        raise UserError(f"column {name}: {value!r} is no plain number: write it without separators and signs, and with"
                        f" a decimal point, or take it as it is with --{setting}={name}:category")
    texts = [(text_in(cell), folder) for cell, folder in cells]
    strange = [text for text, _ in texts if Path(text).suffix.lower() not in PICTURES]
    if not strange and any((folder / text).is_file() for text, folder in texts):
        return "picture"
    if 2 * len(strange) < len(texts):
        why = f"{strange[0][:40]!r} is none" if strange else f"there is no file {texts[0][0][:60]}"
        print(printable(f"{name}: looks like names of pictures, but {why}, and so is taken as words; correct that, or"
                        f" see which are amiss with --columns={name}:picture"), flush=True)
    if others and 2 * len(numbers) > len(cells):
        print(printable(f"{name}: holds numbers, but also {min(others)[:40]!r}, and so is taken as words; correct that,"
                        f" or see which cells are none with --{setting}={name}:number"), flush=True)
    values = {text for text, _ in texts}
    return "category" if len(values) <= MOST_VALUES and 2 * len(values) <= len(texts) else "text"


def say_doubtful(name, kind, cells):
    """Says how to change the kind that was found for dates and for numbers that may be codes, such as zip codes."""
    texts = [text_in(cell) for cell, _ in cells]
    are_ids = len(texts[0]) > 2 and len(set(texts)) == len(texts) > 10 and len(set(map(len, texts))) == 1
    are_dates, are_whole = all(map(DATE.fullmatch, texts)), kind == "number" and all(map(str.isdecimal, texts))
    if are_dates or are_whole and (are_ids or any(text[0] == "0" != text for text in texts)):
        what = "dates" if are_dates else "numbers that look like codes"
        other = "text" if kind == "category" else "category"
        print(printable(f"{name}: holds {what}, such as {min(texts)}, and is taken for a {kind}; to change that, name"
                        f" it {name}:{other} in --columns" + ", or write days as numbers" * are_dates), flush=True)


def check_unused(how, kinds):
    """Raises UserError for a setting that is given though no column has the kind that it is for."""
    for setting, kind in (("tokenizer", "text"), ("image_size", "picture"), ("unreadable", "picture")):
        value = getattr(how, setting)
        if value != getattr(How(), setting) and kind not in kinds.values():
            raise UserError(f"{setting} = {value}: does nothing, as no column is a {kind}; leave it out")


# ----------------------------------------------------------------------------------------------------------------------
# Which rows, and what for

def choose_rows(rows, columns, label_kind, how, source):
    """Returns (rows, {reason: number of rows left out}). Each row has a label, a split, and the cells of `columns`.

    key: of a row, its values as text. label: the name of a class; of the kind number, a float.
    """
    left_out, kept = Counter(), []
    for row in watched(rows, "rows"):
        _, *texts = [text_of(row, name) for name in (how.labels, *columns)]
        label = value_in(row["cells"].get(how.labels), how.labels, label_kind, row["where"], "labels")
        if label is None:
            left_out["unlabelled"] += 1
        elif not any(texts):
            left_out["empty"] += 1
        else:
            cells = {name: row["cells"].get(name) for name in columns}
            key = json.dumps([text.removesuffix(".0") for text in texts])  # a .jsonl may have 1.0 where a .csv has 1
            kept.append({**row, "cells": cells, "label": label, "key": key})
    counts = f"{left_out['unlabelled']:,} without a label, {left_out['empty']:,} without any value"
    if not kept:
        raise UserError(f"{source}: no row has both a label and a value (left out: {counts})")
    print(f"rows: {len(kept):,}; left out: {counts}", flush=True)
    choose_splits(kept, how, source)
    print_doubles(kept)
    return kept, dict(left_out)


def choose_splits(rows, how, source):
    """Sets the splits of rows in place: val and test as given, and what is not given by a hash."""
    if not 0 < how.val_fraction < 0.5:
        raise UserError(f"val_fraction = {how.val_fraction}: must lie between 0 and 0.5: the test part is as large")
    missing = {"val", "test"} - {row.get("split") for row in rows}
    if isinstance(rows[0]["label"], str):
        check_classes(rows, missing, how.labels)
    if not missing and how.val_fraction != How().val_fraction:
        raise UserError(f"val_fraction = {how.val_fraction}: the rows of {source} name their split; leave it out")
    has_pages, seen = any("page" in row for row in rows), Counter()
    is_crowded = not has_pages and 2 * len({row["key"] for row in rows}) < len(rows)
    for row in rows:
        seen[row["key"]] += 1
        group = f"{row['key']} {seen[row['key']]}" if is_crowded else row.get("page") or row["key"]
        part = {"page": group, "split": row.get("split", "train")}
        row["split"] = labelled.split_for(part, missing, how.val_fraction)
    by_hash = "by a hash of each row" if is_crowded else f"by a hash of the {'page' if has_pages else 'values'}"
    print(", ".join(f"{split}: {by_hash if split in missing else 'as given'}" for split in ("val", "test")), flush=True)


def print_doubles(rows):
    """Says how many rows repeat others, within the table and across its parts."""
    different = {row["key"] for row in rows}
    if doubles := len(rows) - len(different):
        labels = Counter(key for key, _ in {(row["key"], row["label"]) for row in rows})
        print(f"rows that repeat the values of an earlier one, and are kept: {doubles:,}; values that occur with"
              f" different labels: {sum(count > 1 for count in labels.values()):,}", flush=True)
    trained = {row["key"] for row in rows if row["split"] == "train"}
    for split in ("val", "test"):
        if copies := sum(row["key"] in trained for row in rows if row["split"] == split):
            print(f"{split}: {copies:,} rows have the values of a row for training", flush=True)


def check_classes(rows, missing, column):
    """Raises UserError if the labels are ids, or if a class has one row to split."""
    counts = Counter(row["label"] for row in rows)
    to_split = Counter(row["label"] for row in rows if row.get("split") not in ("val", "test")) if missing else {}
    lonely = [label for label, count in to_split.items() if count == 1]
    about = f"labels = {column}: {len(counts):,} different labels in {len(rows):,} rows"
    instead = f", or for a quantity --labels={column}:number" * all(map(NUMBER.fullmatch, counts))
    if len(counts) == len(rows) > 2:
        raise UserError(f"{about}: each row has its own, as an id has: choose a column of classes{instead}")
    if lonely:
        raise UserError(f"{about}: only one row has the label {lonely[0]} ({len(lonely):,} such labels), so that none"
                        f" can be held out: add rows, or leave it out{instead}")


def labels_of(splits, name, source):
    """meta.json's part on the label `name`: the sorted names of the classes in training; of a quantity, its statistics.

    Says how many other rows have classes beyond these.
    """
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"{source}: none of its {sum(map(len, splits.values())):,} rows is for {split}: add rows,"
                            " or a column split with train, val and test")
    labels = sorted({row["label"] for row in splits["train"]})
    if len(labels) < 2 or isinstance(labels[0], float) and labels[-1] - labels[0] < LEAST_STD:
        raise UserError(f"{source}: all rows for training have the label {labels[0]}: there must be at least two")
    if isinstance(labels[0], float):
        found = statistics([row["label"] for row in splits["train"]])
        about = f"from {labels[0]:,.6g} to {labels[-1]:,.6g}, mean {found['mean']:,.6g}, std {found['std']:,.6g}"
        print(printable(f"{name}: a quantity, in training {about}; to predict classes, --labels={name}:category"),
              flush=True)
        return {"labels": [], **found}
    shares = Counter(row["label"] for row in splits["train"]).most_common(5)
    shown = ", ".join(f"{label} {100 * count / len(splits['train']):.0f} %" for label, count in shares)
    other = f"; to predict a quantity, --labels={name}:number" * all(map(NUMBER.fullmatch, labels))
    if not other and all(map(UNCLEAR.fullmatch, labels)):
        other = "; for a quantity, write plain numbers, without signs and separators"
    print(printable(f"labels: {len(labels):,}; in training {shown}{', ...' * (len(labels) > 5)}{other}"), flush=True)
    for split in ("val", "test"):
        if unknown := sum(row["label"] not in labels for row in splits[split]):
            print(f"{split}: {unknown:,} of {len(splits[split]):,} rows have a label that no row for training has; it"
                  " counts as an error", flush=True)
    return {"labels": labels}


# ----------------------------------------------------------------------------------------------------------------------
# Values

def is_missing(cell):
    return cell is None or cell != cell or isinstance(cell, str) and not cell.strip()  # NaN differs from itself


def text_in(cell):
    """A cell as one line of text; "" if it is missing. Whole numbers are written without .0."""
    if is_missing(cell):
        return ""
    whole = isinstance(cell, float) and math.isfinite(cell) and cell.is_integer()
    return labelled.one_line(str(int(cell) if whole else cell))


def text_of(row, name):
    """The cell of a row as text. Raises UserError if it holds more than one value, or is no valid text."""
    cell = row["cells"].get(name)
    if isinstance(cell, (list, dict, tuple, bytes)):
        raise UserError(f"{row['where']}: {name} = {cell!r:.60}: is no single value: write one, or leave it out")
    text = text_in(cell)
    if not text.isascii():
        labelled.check_text(text, row["where"])
    return text


def number_in(cell):
    """The number in a cell, perhaps infinite; None if it is missing. Raises ValueError if it holds something else."""
    if is_missing(cell):
        return None
    if isinstance(cell, str):
        cell = cell.strip()
        if cell.lower() in ABSENT:
            return None
    if isinstance(cell, (int, float, Decimal)) and not isinstance(cell, bool) or \
            isinstance(cell, str) and NUMBER.fullmatch(cell):
        try:
            return float(cell)
        except OverflowError:
            return math.inf
    raise ValueError(cell)


def value_in(cell, name, kind, where, setting="columns"):
    """What a data set keeps of a cell: a float, the name of a category, or a text; None if it is missing.

    Raises UserError if a number is none, or is infinite. Pictures are kept by their index instead. setting: of
    prepare.py, which names the column.
    """
    if kind != "number":
        return text_in(cell) or None
    try:
        number = number_in(cell)
    except ValueError:
        raise UserError(f"{where}: {name} = {cell!r:.60}: must be a number, or empty where it is missing; or prepare"
                        f" the column with --{setting}={name}:category{' or :text' * (setting == 'columns')}") from None
    if number is not None and not abs(number) < 1e150:  # their squares must be finite
        raise UserError(f"{where}: {name} = {cell!r:.60}: is not finite, or too large: correct it, or leave it empty")
    return number


def read_values(rows, kinds, path, how):
    """Sets the values of the rows. Writes their pictures to the file `path`, and returns meta.json's part on these."""
    pictures = [name for name, kind in kinds.items() if kind == "picture"]
    indices = write_pictures(rows, pictures, path, how) if pictures else {}
    for row in watched(rows, "values of rows"):
        cells, where = row["cells"], row["where"]
        row["values"] = {name: indices.get(path_in(row, name)) if kind == "picture" else
                         value_in(cells[name], name, kind, where) for name, kind in kinds.items()}
    return {"image_size": how.image_size, "images": len(indices)} if pictures else {}


def path_in(row, name):
    """The path of the picture that a cell names; None if it is missing."""
    text = text_in(row["cells"][name])
    return row["folder"] / text if text else None


def write_pictures(rows, names, path, how):
    """Writes the pictures in some columns, resized, to the file `path`. Returns {path of a picture: its index}."""
    first = {}  # {path of a picture: (the row that names it first, the column)}
    for row in rows:
        for name in names:
            if (file := path_in(row, name)) is not None:
                first.setdefault(file, (row["where"], name))
    pictures = [{"label": "", "split": "val", "path": file, "read": functools.partial(read_picture, file, *about)}
                for file, about in first.items()]  # of this split, equal ones are kept
    kept, _ = labelled_images.write_images(pictures, path, how)
    if not kept:
        raise UserError(f"columns = {how.columns}: no picture of {', '.join(names)} can be read")
    return {picture["path"]: picture["image"] for picture in kept}


def read_picture(path, where, name):
    try:
        return read_image(path)
    except UserError as error:
        raise UserError(f"{where}: {name}: {error}") from None


def described(name, kind, rows):
    """What meta.json says of a column. rows: those for training."""
    values = [row["values"][name] for row in rows if row["values"][name] is not None]
    if kind == "number":
        return {"name": name, "kind": kind, **statistics(values or [0.0])}
    if kind == "category":
        return {"name": name, "kind": kind, "values": sorted(set(values))}
    return {"name": name, "kind": kind}


def statistics(numbers):
    """{"mean", "std"} of a list of numbers; the deviation of numbers that are hardly different is taken as 1."""
    std = float(np.std(numbers)) if min(numbers) < max(numbers) else 1.0
    return {"mean": float(np.mean(numbers)), "std": std if std > LEAST_STD else 1.0}


def print_columns(columns, rows):
    """Prints each column in a line. rows: those for training."""
    for column in columns[:MOST_SHOWN]:
        name, kind = column["name"], column["kind"]
        values = [row["values"][name] for row in rows if row["values"][name] is not None]
        different = len(set(values))
        if kind == "number":
            shown = f"mean {column['mean']:.4g}, std {column['std']:.4g}"
        elif kind == "category":
            shown = f"{different:,} values: {', '.join(column['values'][:6])}{', ...' * (different > 6)}"
        else:
            shown = f"{different:,} different"
        missing = f"; {len(rows) - len(values):,} of {len(rows):,} missing" if len(values) < len(rows) else ""
        constant = "; always the same, so it tells nothing" if different == 1 and not missing else ""
        print(printable(f"{name}: {kind}, {shown}{missing}{constant}"), flush=True)
    if more := Counter(column["kind"] for column in columns[MOST_SHOWN:]):
        print(f"and {', '.join(f'{count:,} of kind {kind}' for kind, count in more.items())}", flush=True)


def learn(how, kinds, splits, path):
    """Saves the tokenizer of the texts to `path`, if there are any. Returns meta.json's part on it."""
    names = [name for name, kind in kinds.items() if kind == "text"]
    if not names:
        return {}
    texts = {split: [{"text": row["values"][name]} for row in rows for name in names if row["values"][name]]
             for split, rows in splits.items()}
    vocabulary = labelled.learn(how.tokenizer, texts)
    vocabulary.save(path)
    return {"tokenizer": vocabulary.kind, "vocab_size": vocabulary.vocab_size}


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def read(paths, label, pattern=""):
    """Yields the rows of tables, as `prepare` takes them: where, cells, folder, perhaps page and split."""
    for path, part in labelled.tables(paths, pattern, label):
        check_separator(path)
        for where, cells in labelled.rows_of(path):
            parts = labelled.own_parts(cells, where)
            cells = {name: cell for name, cell in cells.items() if name not in ("page", "split")}
            yield {"where": where, "cells": cells, "folder": path.parent, **part, **parts}


def check_separator(path):
    """Raises UserError if the first line of a .csv has semicolons or tabs where it should have commas."""
    if path.suffix.lower() != ".csv":
        return
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        names = next(filter(str.strip, file), "")
    for mark, word in ((";", "semicolons"), ("\t", "tabs")):
        if mark in names and "," not in names:
            raise UserError(f"{path} separates its columns by {word}: save it with commas (and decimal points)"
                            + ", or name it .tsv" * (mark == "\t"))


# ----------------------------------------------------------------------------------------------------------------------
# Known sets

def fetch(name, folder):
    """Returns (rows, source, revision) of a known set. folder: what is made or downloaded lies there.

    Raises Offline if it can't be had, and UserError without scikit-learn.
    """
    loaders = {"titanic": titanic, "ledger": ledger, "diamonds": diamonds}
    return loaders[name](folder) if name in loaders else of_sklearn(name, folder)


def sklearn_datasets():
    try:
        import sklearn.datasets
    except ImportError:
        raise UserError("this data set comes with scikit-learn: pip install scikit-learn") from None
    return sklearn.datasets


def titanic(folder):
    """The 1,309 passengers of the Titanic. Those who share a ticket, such as families, share a page."""
    url, expected = TITANIC
    packed = Path(sklearn_datasets().__file__).parent / "tests/data/openml/id_40945/data-v1-dl-16826755.arff.gz"
    path = folder / "download" / "titanic.arff"
    if packed.exists():
        content, path = gzip.decompress(packed.read_bytes()), packed
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            download(url, path)
        content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != expected:
        raise UserError(f"{path} is not the expected table (SHA-256 {found}): delete it and run again")
    head, body = content.decode("utf-8").split("@data\n")
    names = re.findall("^@attribute '(.+?)'", head, re.M)
    passengers = [dict(zip(names, ["" if cell == "?" else cell for cell in row]))
                  for row in csv.reader(body.splitlines())]
    print("left out: boat and body, which tell who was rescued and who was found dead", flush=True)
    rows = [{"where": f"passenger {i}", "folder": folder, "page": cells["ticket"],
             "cells": {name: cells[name] for name in names if name not in ("boat", "body")}}
            for i, cells in enumerate(passengers, start=1)]
    return rows, "OpenML's data set 40945", "1"


def of_sklearn(name, folder):
    """A table that comes with scikit-learn: 569 tumours with thirty measures each, or 442 people with diabetes."""
    label, how = {"breast_cancer": ("tumour", {}), "diabetes": ("progression", {"scaled": False})}[name]
    found = getattr(sklearn_datasets(), f"load_{name}")(**how)
    names = list(map(str, found.feature_names))
    labels = found.target_names[found.target] if "target_names" in found else found.target
    rows = [{"where": f"row {i}", "folder": folder, "cells": {**dict(zip(names, measures)), label: value}}
            for i, (measures, value) in enumerate(zip(found.data.tolist(), labels.tolist()), start=1)]
    return rows, f"scikit-learn's load_{name}", ""


def diamonds(folder):
    """53,940 diamonds with their prices. A length of 0 is missing."""
    package, version, expected = DIAMONDS
    wheel = labelled_sets.pip_download(package, version, folder / "download")
    labelled_sets.check([wheel], expected)
    with zipfile.ZipFile(wheel) as file:
        lines = file.read("plotnine/data/diamonds.csv").decode("utf-8").splitlines()
    rows = [{"where": f"diamond {i}", "folder": folder,
             "cells": cells | {name: "" for name in "xyz" if not float(cells[name])}}
            for i, cells in enumerate(csv.DictReader(lines), start=1)]
    return rows, f"{package} on PyPI", version


def ledger(folder):
    """Bookings of which each has a scan, a text, a category and a number; see data/ledger/generate.py."""
    script = "data/ledger/generate.py"
    print(f"generating {folder / 'source'}", flush=True)
    runpy.run_path(str(ROOT / script))["generate"](folder / "source")
    return read([folder / "source" / "rows.csv"], "reached"), script, ""
