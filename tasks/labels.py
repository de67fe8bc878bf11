"""What the tasks share whose rows have labels: the choice of labels, how they are shown, measures, and their report.

Axes: n rows, N labels of the model.
"""

import functools
from pathlib import Path

import numpy as np
import torch

from configurator import say
from run.files import to_json, write_text
from run.pictures import draw_map, save_picture


def reports(task, model, split, world, dtype, settings):
    """{name: value} for evaluate.py: task.report of a split; with settings.test also measures and report of "test"."""
    result = world.from_main(functools.partial(task.report, model, split, dtype, settings))
    if settings.test:
        tested = task.evaluate(model, "test", world, dtype)
        tested |= world.from_main(functools.partial(task.report, model, "test", dtype, settings))
        result |= {f"test {name}": value for name, value in tested.items()}
    return result


def label_report(rows, shares, labels, wanted, floors, part, settings, several=False):
    """{name: value}: accuracy and F1 of a part, beside those of methods that need no model.

    Writes the answers to predictions.jsonl (predictions_test.jsonl) in settings.out_dir, and settings.picture.
    rows: dicts of the data set. shares: (n, N), the model's probabilities. wanted: (n, N + 1), bool; the last column:
    whether a row has a label that the model lacks. floors: {method: its labels (n, N), bool}.
    """
    decided = decide(shares, several)
    result = averages(decided, wanted)
    for name, floor in floors.items():
        result |= {f"{measure}, {name}": value for measure, value in averages(floor, wanted).items()}
    for name, value, count in zip(labels, f1(decided, wanted), wanted.sum(0)):
        if count:
            result[f"f1, {name} ({count})"] = float(value)
    if not settings.init_from:  # else there is no folder of a run
        path = Path(settings.out_dir) / ("predictions_test.jsonl" if part == "test" else "predictions.jsonl")
        write_text(path, "".join(to_json({**row, **answer(labels, p, several)}) for row, p in zip(rows, shares)))
    if settings.picture:
        draw_confusion(wanted, decided, labels, settings.picture, part)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Labels

def decide(shares, several=False):
    """(n, N), bool: which labels rows get whose labels have the probabilities `shares`, (n, N)."""
    return shares > 0.5 if several else shares.argmax(1)[:, None] == np.arange(shares.shape[1])


def answer(labels, shares, several=False):
    """{"predicted": names, "likeliest": {name: probability} of three labels} for a row. shares: (N,)."""
    chosen = np.flatnonzero(decide(shares[None], several))
    order = np.argsort(-shares, kind="stable")[:3]
    return {"predicted": [labels[i] for i in chosen],
            "likeliest": {labels[i]: round(float(shares[i]), 4) for i in order}}


def described(labels, shares, top, several=False):
    """The `top` likeliest labels of a row with their probabilities, as text; top = 0: all. shares: (N,).

    Where a row may have several labels, all that it gets are shown, before a bar.
    """
    order = np.argsort(-shares, kind="stable")
    parts = [f"{labels[i]} {shares[i]:.3f}" for i in order]
    top = top or len(parts)
    if not several:
        return ", ".join(parts[:top])
    count = int((shares > 0.5).sum())
    others = ", ".join(parts[count:top])
    return (", ".join(parts[:count]) or "none") + f" | {others}" * bool(others)


# ----------------------------------------------------------------------------------------------------------------------
# Measures

def f1(found, wanted):
    """(N,): the F1 of each label, NaN for one that no row has or gets. found: (n, N); wanted: (n, N + 1); bool."""
    wanted = wanted[:, :-1]
    both, either = (found & wanted).sum(0), found.sum(0) + wanted.sum(0)
    return np.divide(2 * both, either, out=np.full(len(both), np.nan), where=either > 0)


def averages(found, wanted):
    """{"accuracy": share of rows whose labels are all right, "macro_f1": mean F1 of the labels}. Arguments: see f1."""
    right = (found == wanted[:, :-1]).all(1) & ~wanted[:, -1]
    return {"accuracy": float(right.mean()), "macro_f1": float(np.nanmean(f1(found, wanted)))}


def draw_confusion(wanted, found, labels, path, part):
    """Writes a picture to the file `path`: how often each label was taken for which. wanted, found: see f1."""
    confusion = wanted[:, :-1].T.astype(np.float32) @ found
    confusion /= np.maximum(confusion.sum(1, keepdims=True), 1)  # shares of each right label
    picture = draw_map(torch.from_numpy(confusion), labels, labels)
    say(f"{save_picture(picture, path)}: the {part} part, a row for each right label, a column for each predicted one")
