"""What evaluations share, and the tasks whose rows have labels: the choice of labels, measures, and their report.

Axes: n rows, N labels of the model.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from configurator import say
from machine.device import autocast
from run.files import to_json, write_text
from run.pictures import draw_map, save_picture


def averaged(world, parts, score):
    """{name: total / count} over all parts, the same on every rank. score(part): {name: (total, count)} of a part."""
    totals = {}
    for part, weight in world.share(parts):  # weight: 1, or 0 for a part that another rank counts
        for name, pair in score(part).items():
            totals[name] = totals.get(name, 0.0) + weight * np.array(pair)
    sums = {name: world.sum(*pair) for name, pair in totals.items()}
    return {name: total / max(count, 1) for name, (total, count) in sums.items()}


def mean_nats(model, world, dtype, parts, gather):
    """{"loss": mean nats of a target} over all parts. gather(part): (the model's arguments, weights of the targets)."""
    def score(part):
        arguments, weights = gather(part)
        with autocast(world.device, dtype):
            return {"loss": ((model(**arguments) * weights).sum().item(), weights.sum().item())}

    return averaged(world, parts, score)


def graded(nats, right, weights):
    """The loss and the accuracy of a batch, for `averaged`. All arguments: tensors (B,).

    weights: 1; 0 for a row whose label the model lacks. Such a row adds no nats, and counts as an error.
    """
    return {"loss": ((nats * weights).sum().item(), weights.sum().item()),
            "accuracy": ((right * weights).sum().item(), len(weights))}


def reports(task, model, split, world, dtype, settings, found=None):
    """{name: value}, as Task.details: task.report of a split; with settings.test also measures and report of "test"."""
    result = world.from_main(functools.partial(task.report, model, split, dtype, settings))
    if settings.test:
        tested = task.evaluate(model, "test", world, dtype)
        tested |= world.from_main(functools.partial(task.report, model, "test", dtype, settings))
        result |= {f"test {name}": value for name, value in tested.items()}
    return result


def label_report(rows, shares, labels, wanted, floors, part, settings, several=False):
    """{name: value}: accuracy and F1 of a part, beside those of methods that need no model.

    Writes the answers to predictions.jsonl in settings.out_dir, and settings.picture; see `of_part` for their names.
    rows: dicts of the data set. shares: (n, N), the model's probabilities. wanted: see `indicators`. floors: {method:
    its labels (n, N), bool}.
    """
    decided = decide(shares, several)
    result = averages(decided, wanted)
    for name, floor in floors.items():
        result |= {f"{measure}, {name}": value for measure, value in averages(floor, wanted).items()}
    for name, value, count in zip(labels, f1(decided, wanted), wanted.sum(0)):
        if count:
            result[f"f1, {name} ({count})"] = float(value)
    write_rows(settings, "predictions", part, ({**row, **answer(labels, p, several)} for row, p in zip(rows, shares)))
    if settings.picture:
        draw_confusion(wanted, decided, labels, of_part(settings.picture, part), part)
    return result


def write_rows(settings, name, part, rows):
    """Writes rows, dicts, to NAME.jsonl, as `of_part` names it, in settings.out_dir, if there is a run."""
    if not settings.init_from:
        write_text(of_part(Path(settings.out_dir) / f"{name}.jsonl", part), "".join(map(to_json, rows)))


def of_part(path, part):
    """The path of a file about a part of the data: as given, but with _test behind its name for the part "test"."""
    path = Path(path)
    return path.with_stem(f"{path.stem}_test") if part == "test" else path


def installed(what, *packages):
    """Whether packages, named as pip does, are installed. If not, says that `what`, a part of a report, is left out."""
    missing = [each for each in packages if not find_spec({"scikit-learn": "sklearn"}.get(each, each))]
    if missing:
        say(f"{what}: left out; for more, pip install {' '.join(missing)}")
    return not missing


# ----------------------------------------------------------------------------------------------------------------------
# Labels

def indicators(rows, names):
    """(n, N + 1), bool: which of the labels `names` rows have. The last column: whether they have another one.

    rows: the labels of each, a list.
    """
    index = {name: i for i, name in enumerate(names)}
    found = np.zeros((len(rows), len(names) + 1), dtype=bool)
    for line, labels in zip(found, rows):
        line[[index.get(name, -1) for name in labels]] = True
    return found


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
