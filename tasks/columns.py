"""The columns task: a transformer reads a row of a table, with its texts and pictures, and predicts its label.

    python train.py config/titanic.py
    python sample.py --out_dir=out/titanic --row='{"sex": "female", "age": 29, "name": "Smith, Miss. Anna"}'
    python evaluate.py --out_dir=out/titanic --test=True

The model takes a value that is missing, or a category that training lacked, for what it is: missing. evaluate.py also
hides each column from all rows, which tells what the model uses it for. tasks/outcomes.py has what differs between
labels that are classes and those that are a quantity.

Axes: B batch, n rows of a split, N labels of the model, c columns of categories, m of numbers, t of texts, p of
pictures, S tokens of a text, K columns with tokens.
"""

import functools
import itertools
import json
import shlex
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from batches import ColumnsDataset, fixed_rows, padded, scaled, shuffled_rows, to_device
from columns import KINDS, ColumnsConfig, ColumnsModel, init_columns
from configurator import UserError, check_idle, say
from inside.attention import noted
from inside.picture import check_chosen, draw
from machine.device import autocast
from machine.terminal import watched
from run.cost import size_in_words
from sources.columns import check_separator, read_picture, text_of, value_in
from sources.documents import READERS
from sources.labelled import rows_of
from tasks.classification import beginning
from tasks.image_text import check_patch
from tasks.labels import averaged, installed, reports
from tasks.outcomes import outcome
from tasks.settings import Predicting
from tasks.task import Task

SHAPE = ("n_layer", "n_head", "n_embd", "numbers", "block_size", "patch_size")
AT_ONCE = 256  # rows per batch of an evaluation: it limits memory and changes no result
FAR = 1000  # standard deviations from the mean: a number that is further away is taken as that
MOST_HIDDEN = 40  # columns that an evaluation hides, each in turn
MOST_WORDS = 2000  # of the texts of a column, from which the floors learn
SHOWN = 8  # values of a row in the command that a run suggests
MOST_NUMBERS = 50_000_000  # in the training rows from which they learn: 200 MB


class ColumnsTask(Task):
    models = {"columns": (ColumnsModel, ColumnsConfig)}
    rows_label = "the training rows"

    def open(self, folder, world):
        self.dataset, self.world = ColumnsDataset(folder), world
        if any(column["kind"] == "text" for column in self.dataset.meta["columns"]):
            self.open_tokenizer(folder)
        elif self.tokenizers is None:
            self.tokenizers = {}

    def build(self, generator):
        s, meta = self.settings, self.dataset.meta
        shape = {name: getattr(s, name) for name in (*SHAPE, "dropout")}
        size = self.tokenizer.vocab_size if self.tokenizers else 0
        about = ("columns", "label", "labels", "mean", "std", "image_size")
        about = {name: meta[name] for name in about if name in meta}
        model = ColumnsModel(ColumnsConfig(**shape, **about, vocab_size=size))
        for kind, name in (("number", "numbers"), ("text", "block_size"), ("picture", "patch_size")):
            if not model.config.places(kind):
                check_idle(s, f"{s.dataset} has no column of the kind {kind}", name)
        if model.patches is not None:
            check_patch("patch_size", s.patch_size, self.dataset.image_size)
        init_columns(model, generator)
        return model

    def shape(self, model):
        return {name: getattr(model.config, name) for name in SHAPE}

    def fit(self, model):
        """Also finds the tables and labels of all splits, as the model's `outcome` has them."""
        self.config, self.outcome, rows = model.config, outcome(model.config), self.dataset.rows
        check_columns(self.config, self.dataset)
        self.tables = {split: encoded([row["values"] for row in rows[split]], self.config, self.tokenizers)
                       for split in rows}
        self.labels = {split: self.outcome.labels(rows[split]) for split in rows}

    def pick(self, step):
        s = self.settings
        return shuffled_rows(len(self.labels["train"]), s.batch_size, s.seed, step)

    def batch(self, rows, generator):
        hidden = torch.rand(len(rows), len(self.config.columns), generator=generator) < self.settings.hide_rate
        return self.gather("train", rows, hidden.numpy())

    def gather(self, split, rows, hidden=None):
        """(the model's arguments, the weight of each row) for some rows of a split, on the device.

        hidden: see `arguments`.
        """
        targets, weights = self.outcome.targets(self.labels[split][rows])
        device = self.world.device
        found = arguments(self.config, self.tables[split], self.dataset.images, rows, device, hidden)
        return {**found, "targets": to_device(targets, device)}, to_device(weights, device)

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats, "accuracy": share of right answers}; of a quantity {"loss": mean squared error}.

        A class that the model lacks is an error. A quantity is standardised here.
        """
        def score(rows):
            found, weights = self.gather(split, rows)
            targets = found.pop("targets")
            with autocast(world.device, dtype):
                outputs = model(**found)
            return self.outcome.graded(outputs, targets, weights)

        most = max(1, int(limit / self.mean_tokens(split))) if limit else 0
        return averaged(world, fixed_rows(len(self.labels[split]), AT_ONCE, most), score)

    def mean_tokens(self, split):
        """The mean number of tokens of a row of a split, [CLS] among them."""
        of_texts = sum(len(ids) for row in self.tables[split].texts for ids in row)
        return len(self.config.owners(0)) + of_texts / len(self.labels[split])

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    details = reports

    def report(self, model, part, dtype, settings):
        """{name: value}: the outcome's report; and its measure where a column is hidden from all rows, for each.

        Writes the answers to predictions.jsonl (predictions_test.jsonl) in settings.out_dir.
        """
        config, table, images = model.config, self.tables[part], self.dataset.images
        if not config.labels:
            check_idle(settings, f"shows which class was taken for which; {config.label} is a quantity", "picture")
        labels, found = self.labels[part], self.outcome
        result = found.report(self.dataset.rows[part], self.answers(model, table, images, dtype), labels,
                              self.floors(part), part, settings)
        if len(config.columns) > MOST_HIDDEN:
            say(f"of {len(config.columns)} columns, the first {MOST_HIDDEN} are hidden in turn")
        for i, column in enumerate(watched(config.columns[:MOST_HIDDEN], "hiding columns")):
            hidden = np.arange(len(config.columns)) == i
            score = found.score(self.answers(model, table, images, dtype, hidden), labels)
            result[f"{found.measure}, without {column['name']}"] = score[found.measure]
        return {"rows": len(labels), **result}

    def floors(self, part):
        """{method: what it predicts for each row of a part (n,), a target}; {} without scikit-learn."""
        x = self.methods and self.features(part, np.arange(len(self.labels[part])))
        return {name: method.predict(x) for name, method in self.methods.items()}

    @functools.cached_property
    def methods(self):
        """{name: the outcome's method, which has learned from the training rows}; {} without scikit-learn."""
        if not installed("other methods beside the model", "scikit-learn"):
            return {}
        targets, weights = self.outcome.targets(self.labels["train"])
        known = np.flatnonzero(weights)
        width = self.features("train", known[:1]).shape[1]
        known = known[::-(-len(known) * width // MOST_NUMBERS)]
        x = self.features("train", known)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the steps did not reach the very optimum
            return {name: method.fit(x, targets[known].ravel()) for name, method in self.outcome.methods().items()}

    def features(self, split, rows):
        """Some rows of a split as numbers for the floors, float32 (B, features); NaN: a missing number.

        Standardised numbers and whether they are missing, a column for each category, tf-idf of the words of each text,
        and pixels from 0 to 1.
        """
        table, texts = Table(*(part[rows] for part in self.tables[split])), self.dataset.rows[split]
        parts = [np.where(table.missing, np.nan, table.numbers), table.missing]
        parts += [np.eye(1 + len(self.config.columns[i]["values"]))[ids]
                  for i, ids in zip(self.config.places("category"), table.categories.T)]
        parts += [vectors.transform([texts[row]["values"][name] or "" for row in rows]).toarray()
                  for name, vectors in self.words.items()]
        parts += [self.dataset.images[places].reshape(len(rows), -1) / np.float32(255) * (places >= 0)[:, None]
                  for places in table.pictures.T]
        return np.hstack(parts).astype(np.float32)

    @functools.cached_property
    def words(self):
        """{column of texts: scikit-learn's tf-idf vectors of its words, learned from the training rows}."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        found = {}
        for name in (self.config.columns[i]["name"] for i in self.config.places("text")):
            texts = [row["values"][name] or "" for row in self.dataset.rows["train"]]
            vectors = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", max_features=MOST_WORDS)
            found[name] = vectors.fit([*texts, "a"])  # so that there is a word
        return found

    # ------------------------------------------------------------------------------------------------------------------
    # Answers

    @torch.inference_mode()
    def answers(self, model, table, images, dtype=torch.float32, hidden=None):
        """The outcome's answers for the rows of a Table, such as probabilities (n, N). Arguments: see `arguments`."""
        device, found = next(model.parameters()).device, []
        for rows in fixed_rows(len(table.numbers), AT_ONCE):
            with autocast(device, dtype):
                outputs = model(**arguments(model.config, table, images, rows, device, hidden))
            found.append(outcome(model.config).answers(outputs.cpu()))
        return np.concatenate(found)

    def sample(self, model, requests, sampling):
        """Yields (index of a request, piece): the row's likeliest classes, or quantity; of several, below each's start.

        What a row lacks, what the model does not know and what it does not read is said on stderr.
        """
        config, found = model.config, outcome(model.config)
        if not config.labels:
            check_idle(sampling, f"{config.label} is a quantity, so there is one answer", "top")
        check_chosen(model, sampling)
        rows = read_rows(sampling.row, config)
        if sampling.attention and len(rows) > 1:
            raise UserError(f"attention = {sampling.attention}: shows one row, and {sampling.row} has {len(rows)}")
        say_missing(rows, config)
        values, images = with_pictures(rows, config)
        table = encoded(values, config, self.tokenizers)
        lines = [f"{config.label}: {found.shown(answer, sampling.top)}"
                 for answer in self.answers(model, table, images)]
        if len(rows) > 1:
            lines = [f"{in_words(row)}\n  {line}" for row, line in zip(rows, lines)]
        for index, _ in enumerate(requests):
            yield index, "\n".join(lines)
        if sampling.attention:
            device = next(model.parameters()).device
            yield 0, "\n"
            yield 0, draw_columns(model, arguments(config, table, images, [0], device), sampling)

    def show(self, model, short=False):
        """Rows of the validation part with the model's answers: ten, or if short three."""
        rows, count, shown, found = self.dataset.rows["val"], 3 if short else 10, [], outcome(model.config)
        places = np.arange(min(count, len(rows))) * len(rows) // min(count, len(rows))
        table = Table(*(part[places] if len(part) else part for part in self.tables["val"]))
        for place, answer in zip(places, self.answers(model, table, self.dataset.images)):
            words = found.shown(answer, Predicting.top, rows[place]["label"])
            shown.append(f"{in_words(rows[place]['values'])}\n  {model.config.label}: {words}")
        return "\n".join(shown)

    def command(self, out_dir):
        pictures = {self.config.columns[i]["name"] for i in self.config.places("picture")}
        row = {name: value for name, value in self.dataset.rows["val"][0]["values"].items()
               if value is not None and name not in pictures}
        row = dict(itertools.islice(row.items(), SHOWN))
        return f"{super().command(out_dir)} {shlex.quote(f'--row={json.dumps(row, ensure_ascii=False)}')}"

    def summary(self, model):
        s, config, n = self.settings, model.config, len(self.labels["train"])
        counts = ", ".join(f"{len(places)} of the kind {kind}" for kind in KINDS if (places := config.places(kind)))
        full = sum(len(ids) == config.block_size for row in self.tables["train"].texts for ids in row)
        return (f"model: {size_in_words(model)}; data: {n:,} rows of {s.dataset}; columns: {counts}"
                + f"; {full:,} texts fill the model's {config.block_size} tokens (a longer one is cut)" * (full > 0)
                + f"; {s.max_iters} updates = {s.max_iters * s.batch_size / n:.1f} epochs"
                + f"\nloss: the square of (error of {config.label} / {config.std:,.6g})" * (not config.labels))

    def cost(self, model):
        """(mean tokens of an update, 0: its FLOPs are not counted)."""
        return round(self.settings.batch_size * self.mean_tokens("train")), 0


def check_columns(config, dataset):
    """Raises UserError unless the data set has the model's columns, and predicts the same one."""
    meta, where = dataset.meta, dataset.folder
    there, read = set(meta["labels"]), set(config.labels)
    if meta["label"] != config.label or not there & read and (there or read):
        its, own = (", ".join(labels)[:60] or "a quantity" for labels in (meta["labels"], config.labels))
        raise UserError(f"{where} is for predicting {meta['label']} ({its}), and the model predicts {config.label}"
                        f" ({own}): name another --dataset")
    there, read = ({column["name"]: column["kind"] for column in columns} for columns in (meta["columns"],
                                                                                            config.columns))
    for name in there | read:
        if there.get(name) != read.get(name):
            raise UserError(f"the column {name} is {of_kind(there.get(name))} in {where}, and {of_kind(read.get(name))}"
                            " in the model: prepare the table with the model's columns, --columns="
                            f"{','.join(f'{name}:{kind}' for name, kind in read.items())}")
    if config.places("picture") and dataset.image_size != config.image_size:
        raise UserError(f"the pictures of {where} have {dataset.image_size} pixels, but the model reads"
                        f" {config.image_size}: prepare them in that size, --image_size={config.image_size}")


def of_kind(kind):
    return f"of the kind {kind}" if kind else "missing"


# ----------------------------------------------------------------------------------------------------------------------
# Rows as tensors

class Table(NamedTuple):
    """n rows, ready for a model: the columns of each kind in the model's order."""
    categories: np.ndarray  # (n, c) 1 + the value's index; 0: missing or unknown
    numbers: np.ndarray  # (n, m) standardised; 0: missing
    missing: np.ndarray  # (n, m) whether the number is missing
    texts: np.ndarray  # (n, t) of lists of ids; []: missing
    pictures: np.ndarray  # (n, p) indices of images; -1: missing


def encoded(rows, config, tokenizers):
    """The Table of rows, dicts of the columns' values; None or absent: missing. A picture is the index of its image."""
    def filled(kind, dtype, convert):
        columns = [config.columns[i] for i in config.places(kind)]
        found = np.zeros((len(rows), len(columns)), dtype)
        for j, column in enumerate(columns):
            for i, row in enumerate(rows):
                value = row.get(column["name"])
                found[i, j] = convert(column, value)
        return found

    def place(column, value):
        return 1 + column["values"].index(value) if value in column["values"] else 0

    def standardised(column, value):
        return 0.0 if value is None else min(max((value - column["mean"]) / column["std"], -FAR), FAR)

    def ids(column, value):
        return tokenizers["tokenizer"].encode(value or "")[:config.block_size].tolist()

    return Table(filled("category", np.int64, place), filled("number", np.float32, standardised),
                 filled("number", bool, lambda column, value: value is None), filled("text", object, ids),
                 filled("picture", np.int64, lambda column, value: -1 if value is None else value))


def arguments(config, table, images, rows, device, hidden=None):
    """The arguments of a ColumnsModel for some rows of a Table, on the device.

    images: uint8, (any, H, W, 3), or None without pictures. hidden: bool (B, columns) or (columns,), values to leave
    out; None: none.
    """
    hidden = np.broadcast_to(False if hidden is None else hidden, (len(rows), len(config.columns)))
    of = {kind: hidden[:, config.places(kind)] for kind in KINDS}
    found = {"categories": np.where(of["category"], 0, table.categories[rows]),
             "numbers": np.where(of["number"], np.float32(0), table.numbers[rows]),
             "missing": of["number"] | table.missing[rows]}
    if config.places("text"):
        texts = [[] if is_hidden else ids for ids, is_hidden in zip(table.texts[rows].flat, of["text"].flat)]
        (tokens, lengths), shape = padded(texts, 0), of["text"].shape
        found |= {"tokens": tokens.reshape(*shape, tokens.shape[1]), "lengths": lengths.reshape(shape)}
    if config.places("picture"):
        places = table.pictures[rows]
        found["seen"] = (places >= 0) & ~of["picture"]
    found = {name: to_device(np.ascontiguousarray(array), device) for name, array in found.items()}
    if config.places("picture"):
        found["images"] = scaled(images[np.maximum(places, 0).ravel()], device).unflatten(0, places.shape)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Rows of one's own

def read_rows(text, config):
    """The rows in --row: dicts of the model's columns, as a data set has them, but with the path of a picture.

    text: JSON, or FILE:path of a table. Raises UserError for a table that can't be read, a value that does not fit its
    column, and a column of JSON that the model does not read; those of a table are said on stderr.
    """
    path, kinds = Path(text.removeprefix("FILE:")), {column["name"]: column["kind"] for column in config.columns}
    if text.startswith("FILE:"):
        if path.suffix.lower() not in READERS:
            raise UserError(f"row = {text}: is no table: name a {', '.join(READERS)}")
        check_separator(path)
        found, folder = list(rows_of(path)), path.parent
        if not found:
            raise UserError(f"row = {text}: has no rows")
        if others := [name for name in found[0][1] if name not in kinds]:
            say(f"columns that the model does not read: {', '.join(others):.200}")
    else:
        found, folder = [("row", json.loads(text))], Path()
        for name in found[0][1].keys() - kinds:
            why = "is what the model predicts" if name == config.label else f"is no column, only {', '.join(kinds)} are"
            raise UserError(f"row: {name} {why}: leave it out")
    if not any(name in cells for _, cells in found for name in kinds):
        raise UserError(f"row = {text:.60}: has none of the model's columns, {', '.join(kinds):.200}")
    return [{name: own_value({"where": where, "cells": cells, "folder": folder}, name, kind)
             for name, kind in kinds.items()} for where, cells in found]


def own_value(row, name, kind):
    """The value of a row for a column, as a data set has it, but the path of a picture. Raises UserError if it is none.

    row: a dict with where, cells and folder, as sources/columns.py has it.
    """
    if kind == "number":
        return value_in(row["cells"].get(name), name, kind, row["where"])
    text = text_of(row, name) or None
    return row["folder"] / text if text and kind == "picture" else text


def say_missing(rows, config):
    """Says on stderr which values rows lack, which categories training lacked, and which numbers are far from its."""
    n, lacking, unknown = len(rows), [], []
    for column in config.columns:
        values = [row[column["name"]] for row in rows]
        if count := values.count(None):
            lacking.append(column["name"] + f" (in {count} of {n} rows)" * (count < n))
        far = [value for value in values if column["kind"] == "number" and value is not None
               and abs(value - column["mean"]) > FAR * column["std"]]
        if far:
            say(f"{column['name']} = {far[0]:g} is more than {FAR:,} standard deviations from the mean of training, and"
                " is taken as that")
        if column["kind"] == "category":
            unknown += [f"{column['name']} {value}" for value in dict.fromkeys(values)
                        if value is not None and value not in column["values"]]
    if lacking:
        say(f"missing: {', '.join(lacking):.200}")
    if unknown:
        say(f"categories that training lacked, which count as missing: {', '.join(unknown):.200}")


def with_pictures(rows, config):
    """(the rows with indices instead of paths of pictures, the pictures (any, H, W, 3), uint8)."""
    from PIL import Image
    names, size, images = [config.columns[i]["name"] for i in config.places("picture")], config.image_size, []
    rows = [dict(row) for row in rows]
    for i, row, name in ((i, row, name) for i, row in enumerate(rows) for name in names if row[name] is not None):
        picture = read_picture(row[name], f"row {i + 1}", name)
        images.append(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)))
        row[name] = len(images) - 1
    return rows, np.stack(images) if images else np.zeros((1, size, size, 3), np.uint8)


def in_words(row):
    """The beginning of a row's values, as text, without the indices of pictures."""
    return beginning(", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                               for name, value in row.items() if value is not None and not isinstance(value, int)))


def draw_columns(model, found, sampling):
    """Writes the picture sampling.attention: where the columns of a row, and [CLS], look. Returns a line about it.

    found: the model's arguments, of one row. A column's tokens count together: the mean of where they look, and the sum
    of what is looked at. A column without tokens is not shown.
    """
    with torch.inference_mode(), noted(block.attn for block in model.transformer.blocks) as looks:
        model(**found)
        _, there = model.embed(**{"tokens": None, "lengths": None, "images": None, "seen": None, **found})
    owners = model.config.owners(found["tokens"].size(2) if "tokens" in found else 0)
    names = ["[CLS]", *(model.config.columns[i]["name"] for i in model.config.listed)]
    if len(names) == 1:
        raise UserError("attention: all columns of this model are numbers in its head, so there is nothing to look at")
    member = F.one_hot(owners, len(names)).float() * there[0].cpu()[:, None]  # (L, 1 + K)
    shown = member.sum(0) > 0
    member, names = member[:, shown], [name for name, is_shown in zip(names, shown.tolist()) if is_shown]
    weights = torch.stack([each[0].cpu() for each in looks])  # (layers, heads, L, L)
    return draw((member / member.sum(0)).mT @ weights @ member, names, names, sampling)
