"""Made-up bookings of a ledger, each with a picture, a text, a category and a number. Only all four tell its class.

    python prepare.py ledger                     into data/ledger, ready for training (pip install scikit-learn)
    python data/ledger/generate.py               writes data/ledger/source: rows.csv and its pictures, in scans/

An account starts with the amount on the slip, a handwritten digit from scikit-learn. The amount of the note is then
paid in or paid out. Is the target reached? Targets lie close to both possible ends, whichever it is, so that each of
the four columns is needed: without any one, the best guess is right at most four times in five.

Each part has scans of its own, and templates of notes of its own; a template is a phrase inside a frame.
"""

import csv
import itertools
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import random
import runpy

import numpy as np

from configurator import one_line_errors
from sources.pairs import split_of

SEED = 0
ROWS = {"train": 8000, "val": 1000, "test": 1000}
HELD_OUT = 0.15  # the share of templates, and of the scans of each digit, for validation, and again for test
NEAR = (-1, 0, 1, 2)  # target minus one of the two possible ends: two of the four are reached
WORDS = "zero one two three four five six seven eight nine".split()
PHRASES = "{} | a sum of {} | an amount of {} | exactly {} | {} in coins | {} in silver | {} in cash | the sum of {}"
FRAMES = """
    please book {} . | the note says {} . | the clerk wrote down {} . | {} , signed by the clerk . | today {} . |
    this is about {} . | for the account : {} . | {} , as agreed . | we confirm {} . | enter {} , please . |
    {} by messenger . | by letter we hear of {} . | {} , and nothing else . | the bank tells us {} . | it was {} ."""


def templates():
    """{split: a list of notes with {} for the amount}: a hash of each template decides."""
    found = {split: [] for split in ROWS}
    for phrase, frame in itertools.product(PHRASES.split("|"), FRAMES.split("|")):
        template = " ".join(frame.split()).format(phrase.strip())
        found[split_of(template, HELD_OUT)].append(template)
    return found


def scans_of(labels):
    """{split: {digit: indices of scans}}. labels: the digit of each scan."""
    found = {split: {} for split in ROWS}
    for digit in range(10):
        indices = [i for i, label in enumerate(labels) if label == digit]
        for split in ROWS:
            found[split][digit] = [i for i in indices if split_of(f"scan {i}", HELD_OUT) == split]
    return found


def bookings(labels):
    """Yields the rows of all parts: dicts of slip (the index of a scan), note, kind, target, reached, split."""
    draw, notes, scans = random.Random(SEED), templates(), scans_of(labels)
    for split, count in ROWS.items():
        for _ in range(count):
            start, amount = draw.randrange(10), draw.randrange(10)
            kind, sign = draw.choice((("paid in", 1), ("paid out", -1)))
            target = start + draw.choice((amount, -amount)) + draw.choice(NEAR)  # tells nothing of the kind
            yield {"slip": draw.choice(scans[split][start]), "note": draw.choice(notes[split]).format(WORDS[amount]),
                   "kind": kind, "target": target, "reached": "yes" if start + sign * amount >= target else "no",
                   "split": split}


def generate(folder):
    """Writes scans/0000.png and so on into `folder`, and rows.csv when they are complete."""
    from PIL import Image
    scans, labels = runpy.run_path(str(Path(__file__).parents[1] / "digits/generate.py"))["load_scans"]()
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").unlink(missing_ok=True)  # written last: a folder without it is unfinished
    for i, scan in enumerate(scans):
        Image.fromarray((scan * 255).round().astype(np.uint8)).save(folder / f"scans/{i:04}.png")
    rows = [{**row, "slip": f"scans/{row['slip']:04}.png"} for row in bookings(labels)]
    with open(folder / "rows.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    with one_line_errors():
        OUT = Path(__file__).resolve().parent / "source"
        generate(OUT)
        print(f"{OUT}: rows.csv and its scans; next: python prepare.py {OUT}/rows.csv --labels=reached --columns=all"
              " --name=NAME")
