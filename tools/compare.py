"""Several runs side by side: a table of what differs and how it went, and their curves in one picture.

    python -m tools.compare out/sweep/*
    python -m tools.compare out/a out/b out/b/earlier.1 --out=ab.svg --markdown

Runs that differ only in their seed share a line: the mean over the seeds and the standard deviation (s.d.). Runs on
different data, or with different code of the model, have lines of their own. The best comes first. Losses are those of
the validation split. The time is that of the updates, without evaluations and saves. Folders without a run, and runs of
another task than most, are named and left out.
"""

import hashlib
import json
import os
import re
import statistics
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configurator import UserError, from_command_line, one_line_errors
from machine.terminal import printable
from run import curves
from run.curves import COLORS, INNER, LEFT, Curve, series
from run.files import read_json, write_text

# Runs of one recipe may differ in these settings: the seed, and those that change no loss.
IGNORED = ("seed", "out_dir", "resume", "wandb", "wandb_project", "wandb_name", "log_interval", "sample_tokens",
           "publish", "async_save", "max_minutes", "save_minutes")
MARKS = ("data", "code")  # compared as if they were settings: see `marks_of`
LEGEND = 24  # most lines of the legend


@dataclass(frozen=True)
class Settings:
    out: str = ""  # the picture; default: compare.svg in the folder that holds all the runs
    markdown: bool = False  # print the table as Markdown

    def __post_init__(self):
        if os.path.isdir(self.out):
            raise UserError(f"out = {self.out}: is a folder; name a file, {os.path.join(self.out, 'compare.svg')}")
        if not os.path.isdir(os.path.dirname(self.out) or "."):
            raise UserError(f"out = {self.out}: there is no folder {os.path.dirname(self.out)}; create it")


class Run(NamedTuple):
    folder: str
    task: str
    settings: dict  # flat, and the run's marks among them
    rows: list
    val: list  # of (step, validation loss)


class Group(NamedTuple):
    settings: dict
    runs: list
    best: list  # the best validation loss of each run
    last: list


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def read_runs(folders):
    """(Runs of the most common task, lines that say which folders are left out and why)."""
    found, left_out = [], []
    for folder in folders:
        if folder.endswith(".svg"):  # an earlier picture, from out/sweep/*
            continue
        rows, settings = curves.read_log(folder), curves.read_settings(folder)
        if not os.path.isdir(folder):
            left_out.append(f"{folder}: left out: there is no such folder")
        elif not rows or not settings:
            what = "rows in log.jsonl" if not rows else "settings in run.json"
            left_out.append(f"{folder}: left out: it has no {what}")
        elif not (val := series(rows, "val_loss")):
            left_out.append(f"{folder}: left out: it has not been evaluated yet")
        else:
            task = str(settings.get("task", "text"))
            found.append(Run(str(folder), task, settings | marks_of(folder), rows, val))
    tasks = Counter(run.task for run in found)
    task = max(tasks, key=tasks.get, default="")
    for run in found:
        if run.task != task:
            left_out.append(f"{run.folder}: left out: its task is {run.task}, that of most runs is {task}")
    return [run for run in found if run.task == task], left_out


def marks_of(folder):
    """{"data": digest, "code": digest}: which data set and code of the model the run's last checkpoint records.

    A mark that is not recorded or can't be read is left out.
    """
    with suppress(UserError, AttributeError, RecursionError):
        found = {name: read_json(Path(folder) / "last" / "config.json").get(name) for name in MARKS}
        return {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
                for name, value in found.items() if value}
    return {}


def group(runs):
    """The Groups of runs whose settings (without IGNORED) and marks are equal, the lowest mean loss first."""
    groups = {}
    for run in runs:
        recipe = {name: value for name, value in run.settings.items() if name not in IGNORED}
        groups.setdefault(repr(sorted(recipe.items())), (recipe, []))[1].append(run)
    found = [Group(recipe, members, [min(loss for _, loss in run.val) for run in members],
                   [run.val[-1][1] for run in members]) for recipe, members in groups.values()]
    return sorted(found, key=lambda one: statistics.fmean(one.best))


def differing(groups):
    """The names of settings that differ between groups; with differing MARKS, if some groups have equal settings."""
    def values(*names):
        return {repr([one.settings.get(name) for name in names]) for one in groups}

    names = [name for name in dict.fromkeys(name for one in groups for name in one.settings) if len(values(name)) > 1]
    plain = [name for name in names if name not in MARKS]
    return plain if len(values(*plain)) == len(groups) else names


# ----------------------------------------------------------------------------------------------------------------------
# Showing

def table(groups):
    """The lines of a table, each a list of texts; the heading comes first."""
    names, seeds = differing(groups), max(len(one.runs) for one in groups) > 1
    lines = [[*names, "best", *(("s.d.", "seeds") if seeds else ()), "last", "updates", "time", "folder"]]
    for one in groups:
        n = len(one.runs)
        spread = (f"{statistics.stdev(one.best):.4f}" if n > 1 else "-", str(n))
        steps, seconds = (statistics.fmean(run.rows[-1][name] for run in one.runs) for name in ("step", "seconds"))
        lines.append([*(shown(one.settings.get(name, "-")) for name in names), f"{statistics.fmean(one.best):.4f}",
                      *(spread if seeds else ()), f"{statistics.fmean(one.last):.4f}", f"{steps:,.0f}", clock(seconds),
                      one.runs[0].folder + (f" and {n - 1} more" if n > 1 else "")])
    return lines


def shown(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def clock(seconds):
    """A duration with its unit, such as "90 s" or "2.5 min"."""
    size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    return f"{seconds / size:,.{int(size > 60)}f} {unit}"


def print_table(lines, markdown):
    """Prints a table in columns, aligned to the right except for the last; or as Markdown."""
    lines = [[printable(re.sub(r"\s", " ", text)) for text in line] for line in lines]
    if markdown:
        lines = [[text.replace("|", r"\|") for text in line] for line in lines]
        print("\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:])))
        return
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [text.rjust(width) for text, width in zip(line[:-1], widths)]
        print("  ".join([*cells, line[-1]]))


def draw_together(named, path, title, about):
    """Writes one picture of runs. named: {label: [log rows of each run]}, one colour per label. about: its subtitle."""
    n, top, parts = len(named), 92, []
    colors = COLORS if n <= len(COLORS) else [f"hsl({330 * i // n}, 65%, 52%)" for i in range(n)]
    for i, (name, color) in enumerate(zip(list(named)[:LEGEND], colors)):
        words = f"{name}, and {n - LEGEND} more" if i == LEGEND - 1 and n > LEGEND else name
        parts += [f'<path d="M{LEFT} {top - 4}h18" stroke="{color}" stroke-width="3"/>',
                  curves.label(LEFT + 26, top, words)]
        top += 20
    runs = [(color, rows) for color, runs in zip(colors, named.values()) for rows in runs][::-1]  # the first on top
    longest = max(rows[-1]["seconds"] for _, rows in runs)
    unit, size = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    by_step = [Curve(series(rows, "val_loss"), color) for color, rows in runs]
    by_time = [Curve([(seconds / size, loss) for seconds, loss in series(rows, "val_loss", x="seconds")], color)
               for color, rows in runs]
    training = [Curve(series(rows, "mean_loss", "loss"), color) for color, rows in runs]
    panels = [("Validation loss in nats", by_step, "updates"),
              ("Validation loss by the time of the updates", by_time if longest else [], unit),
              ("Training loss in nats", training, "updates")]
    for heading, lines, unit in panels:
        if any(line.points for line in lines):
            limits = curves.loss_range(lines, skip=0.2)
            parts.append(curves.panel((LEFT, top + 30, INNER, 260), heading, lines, limits, unit))
            top += 350
    write_text(path, curves.page(title, about, parts, top))


def names_of(groups):
    """Yields each group's name in the legend: the settings that differ (or else its folder), and its loss."""
    names = differing(groups)
    for one in groups:
        words = ", ".join(f"{name} = {shown(one.settings.get(name, '-'))}" for name in names) or one.runs[0].folder
        n = len(one.runs)
        yield f"{words}: {statistics.fmean(one.best):.4f}" + (f", mean of {n} seeds" if n > 1 else "")


def place_for(folders):
    """The path of compare.svg: in the folder that contains all runs, or in the current one if that is the root."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    path = "compare.svg" if common == os.path.dirname(common) else os.path.join(common, "compare.svg")
    return min(path, os.path.relpath(path), key=len)


def main(folders, settings):
    if not folders:
        raise UserError("name the folders of the runs: python -m tools.compare out/sweep/*")
    runs, left_out = read_runs(list(dict.fromkeys(map(os.path.normpath, folders))))
    for line in left_out:
        print(printable(line, sys.stderr), file=sys.stderr)
    if not runs:
        raise UserError("none of these folders holds a run that has been evaluated")
    groups = group(runs)
    print_table(table(groups), settings.markdown)
    path = settings.out or place_for([run.folder for run in runs])
    named = {name: [run.rows for run in one.runs] for name, one in zip(names_of(groups), groups)}
    draw_together(named, path, f"{len(runs)} runs", "each with the settings that differ and its best validation loss")
    print(printable(f"curves: {path}"))


if __name__ == "__main__":
    FOLDERS = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    SETTINGS, _ = from_command_line(Settings, __doc__)
    with one_line_errors():
        main(FOLDERS, SETTINGS)
