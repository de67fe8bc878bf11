"""Measures the figures that README.md and EXPERIMENTS.md claim once more, and says whether each of them holds.

    python -m tools.figures --list                                 every figure: its name, its minutes, its claim
    python -m tools.figures debug-muon                             measures it again
    python -m tools.figures cpu-recipe --row="--batch_size=12"     one row of its table
    python -m tools.figures --minutes=1                            all figures that take at most a minute each

figures.json has one entry per table or claim: its page and section, the command, the seeds, the commit and the machine
that gave the numbers, and `within`, how far a new measurement may lie from them. The command runs once for each row and
seed; the mean over the seeds is compared. Times and speeds depend on the machine. So a ratio of two of them in one run
is claimed where that is steady; the others are shown and not judged. out/figures/NAME/ keeps the commands' outputs.

Exit status: 0 every figure holds; 1 one does not; 2 a command failed.
"""

import difflib
import os
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, check_idle, check_ranges, from_command_line, one_line_errors
from machine.terminal import columns
from run.files import read_json

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    list: bool = False  # print the figures that are named, or all, and measure nothing
    row: str = ""  # measure only this row of the one figure named: the text of its first cell, without backquotes
    minutes: float = 0.0  # in place of names: all figures that take at most so many minutes each

    def __post_init__(self):
        check_ranges(self, minutes=0)


def choose(figures, names, settings):
    """{name: entry} of the figures to measure: those with `names`, or all within settings.minutes if that is not 0.

    Raises UserError if there are none, and for an unknown name, an unknown row, or an entry without a command.
    """
    if settings.minutes:
        check_idle(settings, "it is for a figure that is named", "row")
        if names:
            raise UserError(f"minutes = {settings.minutes:g}: is in place of names; leave it out, or {' '.join(names)}")
        able = {name: entry for name, entry in figures.items() if entry["command"]}
        found = {name: entry for name, entry in able.items() if entry["minutes"] <= settings.minutes}
        if not found:
            shortest = min(entry["minutes"] for entry in able.values())
            raise UserError(f"minutes = {settings.minutes:g}: the quickest figure takes {shortest:g}")
        return found
    if not names or (settings.row and len(names) > 1):
        raise UserError(f"name {'one' if settings.row else 'a'} figure: python -m tools.figures --list shows them all")
    for name in names:
        require_known(figures, name)
        if not figures[name]["command"]:
            raise UserError(f"{name}: no command of this repository gives it: {figures[name]['why']}")
        rows_of(figures[name], settings.row)
    return {name: figures[name] for name in names}


def require_known(figures, name):
    """Raises UserError if there is no figure of this name."""
    if name not in figures:
        near = difflib.get_close_matches(name, figures, n=1)
        hint = f"did you mean {near[0]}?" if near else "python -m tools.figures --list shows them all"
        raise UserError(f"{name}: there is no such figure; {hint}")


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
    with open(folder / "output.txt", "w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(["bash", "-c", command], cwd=ROOT, env={**os.environ, "PATH": path}, stdout=file,
                                   stderr=subprocess.STDOUT)
        try:
            process.wait()
        except KeyboardInterrupt:  # reaches the command too, which ends by itself
            process.wait()
            print("\nstopped; the same command starts this figure anew (--row measures one row)", file=sys.stderr)
            raise
        file.seek(0)
        output = file.read()
    if process.returncode:
        last = (output.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"exit status {process.returncode} of: {command}: {last} ({file.name} has all of it)")
    return output


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


def measure_all(chosen, row=""):
    """Measures figures, or the named row alone, and prints a line for each number. Returns how many do not hold."""
    words = {True: "holds", False: "DOES NOT HOLD", None: "not judged: it depends on the machine"}
    verdicts = []
    for name, entry in chosen.items():
        print(f"{name}: {entry['says']}", flush=True)
        rows = rows_of(entry, row)
        if "setup" in entry:
            run(entry["setup"], ROOT / "out" / "figures" / name / "setup")
        for number, (label, values) in enumerate(rows.items()):
            for what, measured in measure(name, entry, values, number).items():
                claimed = statistics.fmean(values[what]) if isinstance(values[what], list) else values[what]
                verdicts.append(holds(entry, what, measured, claimed))
                print(f"    {label}: {what} {measured:.6g}, claimed {claimed:.6g}: {words[verdicts[-1]]}", flush=True)
    print(f"{verdicts.count(True)} numbers hold, {verdicts.count(False)} do not,"
          f" {verdicts.count(None)} are not judged")
    return verdicts.count(False)


# ----------------------------------------------------------------------------------------------------------------------

def print_list(figures, machines):
    """Prints each figure's name, minutes, machine and claim, wrapped to the terminal."""
    width = max(map(len, figures))
    for name, entry in figures.items():
        minutes = f"{entry['minutes']:g} min" if entry["command"] else "no command"
        start = f"{name:{width}}  {minutes:>10}  {entry['machine']:4}  "
        print(textwrap.fill(start + entry["says"], columns(), subsequent_indent=" " * len(start)))
    print("; ".join(f"{key}: {words}" for key, words in machines.items()))


def main(names, settings):
    data = read_json(ROOT / "figures.json")
    figures = data["figures"]
    if settings.list:
        for name in names:
            require_known(figures, name)
        print_list({name: figures[name] for name in names or figures}, data["machines"])
    elif measure_all(choose(figures, names, settings), settings.row):
        raise SystemExit(1)


if __name__ == "__main__":
    NAMES = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    SETTINGS, _ = from_command_line(Settings, __doc__)
    with one_line_errors():
        main(NAMES, SETTINGS)
