"""Measures the figures that README.md and EXPERIMENTS.md claim once more, and says whether each of them holds.

    python -m tools.figures --list                                 every figure: its name, its minutes, its claim
    python -m tools.figures debug-run                              measures it again
    python -m tools.figures cpu-recipe --row="--batch_size=12"     one row of its table
    python -m tools.figures --minutes=1                            all figures that take at most a minute each

figures.json has one entry per table: its page and section, the command, the seeds, the commit and the machine that gave
the numbers, and `within`, how far a new measurement may lie from them. The command runs once for each row and seed; the
mean over the seeds is compared. Times and speeds depend on the machine. So what is claimed is a ratio of two of them in
one run; a time alone is shown and not judged. The output of each command is kept in out/figures/NAME/.

Exit status: 0 every figure holds; 1 one does not; 2 a command failed.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, check_ranges, from_command_line, one_line_errors
from machine.terminal import columns
from run.files import read_json

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    list: bool = False  # print what there is, and measure nothing
    row: str = ""  # measure only this row: the text of its first cell, without backquotes
    minutes: float = 0.0  # in place of names: all figures that take at most so many minutes each

    def __post_init__(self):
        check_ranges(self, minutes=0)


def choose(figures, names, settings):
    """{name: entry} of the figures to measure: those with `names`, or all within settings.minutes if that is not 0.

    Raises UserError if there are no names, and for an unknown name or one without a command.
    """
    if settings.minutes:
        return {name: entry for name, entry in figures.items()
                if entry["command"] and entry["minutes"] <= settings.minutes}
    if not names:
        raise UserError("name a figure: python -m tools.figures --list shows them all")
    for name in names:
        if name not in figures:
            raise UserError(f"{name}: there is no such figure; python -m tools.figures --list shows them all")
        if not figures[name]["command"]:
            raise UserError(f"{name}: no command of this repository gives it: {figures[name]['why']}")
    return {name: figures[name] for name in names}


def rows_of(entry, wanted):
    """{label: row} of the rows to measure: all, or the wanted one alone. Raises UserError if there is no such row."""
    rows = {label.replace("`", ""): row for label, row in entry["rows"].items()}
    if wanted and wanted not in rows:
        raise UserError(f"row = {wanted}: there is no such row; there are: {'; '.join(rows)}")
    return {wanted: rows[wanted]} if wanted else rows


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

def run(command, folder):
    """Runs a bash command in the repository. Empties `folder`, and keeps the output there. Returns the output.

    Raises UserError if the command fails.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # `python` is this one
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env={**os.environ, "PATH": path}, encoding="utf-8",
                          errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (folder / "output.txt").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{command} failed with exit status {done.returncode}: {folder / 'output.txt'} has its output")
    return done.stdout


def last_number(pattern, output):
    """The last number in the output that the pattern's group matches. Raises UserError if there is none."""
    found = re.findall(pattern, output)
    if not found:
        raise UserError(f"the output has nothing that matches {pattern!r}")
    return float(found[-1].replace(",", ""))


def value(find, output):
    """The number that `find` describes: a pattern, or a list of two for the ratio of the first to the second."""
    if isinstance(find, str):
        return last_number(find, output)
    first, second = (last_number(pattern, output) for pattern in find)
    return first / second


def filled(entry, row, seed, out):
    """The command of an entry's row, with the row's values, the seed and the run's folder in place of {name}s."""
    command = entry["command"]
    for key, text in {"with": "", **row, "seed": seed, "out": out}.items():
        command = command.replace(f"{{{key}}}", str(text))
    return command


def measure(name, entry, row, number):
    """{what: the mean over the seeds} of a row of an entry. number: which row it is, for the name of its folder."""
    found = []
    for seed in entry.get("seeds", [0]):
        folder = ROOT / "out" / "figures" / name / f"row{number}-seed{seed}"
        output = run(filled(entry, row, seed, folder.as_posix()), folder)
        found.append({what: value(find, output) for what, find in entry["find"].items() if what in row})
    return {what: statistics.fmean(one[what] for one in found) for what in found[0]}


def holds(entry, what, measured, claimed):
    """Whether the number `measured` agrees with `claimed`: True or False, or None if the entry has no `within` for it.

    what: the number's name, a key of the entry's `find` and `within`. `within` is the largest factor between the two if
    `find` has two patterns for it and so gives a ratio. Otherwise it is the largest difference.
    """
    within = entry.get("within", {}).get(what)
    if within is None:
        return None
    if isinstance(entry["find"][what], str):
        return abs(measured - claimed) <= within
    return claimed / within <= measured <= claimed * within


def measure_all(chosen, settings):
    """Measures figures and prints a line for each number. Returns the number of those that do not hold."""
    wrong = 0
    for name, entry in chosen.items():
        print(f"{name}: {entry['says']}", flush=True)
        if "setup" in entry:
            run(entry["setup"], ROOT / "out" / "figures" / name / "setup")
        for number, (label, row) in enumerate(rows_of(entry, settings.row).items()):
            for what, measured in measure(name, entry, row, number).items():
                claimed = statistics.fmean(row[what]) if isinstance(row[what], list) else row[what]
                verdict = holds(entry, what, measured, claimed)
                words = {True: "holds", False: "DOES NOT HOLD", None: "not judged: it depends on the machine"}[verdict]
                print(f"    {label}: {what} {measured:.6g}, claimed {claimed:.6g}: {words}", flush=True)
                wrong += verdict is False
    return wrong


# ----------------------------------------------------------------------------------------------------------------------

def print_list(figures, machines):
    """Prints each figure's name, minutes, machine and claim."""
    width = max(map(len, figures))
    for name, entry in figures.items():
        minutes = f"{entry['minutes']:g} min" if entry["command"] else "no command"
        claim = f"{entry['page']}, {machines[entry['machine']]}, commit {entry['commit']}: {entry['says']}"
        print(f"{name:{width}}  {minutes:>10}  {claim}"[:max(columns(), 100)] if sys.stdout.isatty() else
              f"{name:{width}}  {minutes:>10}  {claim}")


def main(names, settings):
    data = read_json(ROOT / "figures.json")
    if settings.list:
        print_list(data["figures"], data["machines"])
        return
    wrong = measure_all(choose(data["figures"], names, settings), settings)
    if wrong:
        print(f"{wrong} of the figures do not hold")
        raise SystemExit(1)


if __name__ == "__main__":
    NAMES = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    SETTINGS, _ = from_command_line(Settings, __doc__)
    with one_line_errors():
        main(NAMES, SETTINGS)
