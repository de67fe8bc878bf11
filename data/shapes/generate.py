"""Coloured shapes with captions, questions and boxes: PNG images and a captions.jsonl, as prepare.py reads them.

    python prepare.py shapes                                        into data/shapes, ready for training
    python data/shapes/generate.py --images=100 --out=my_folder     the images and captions.jsonl alone

Every tenth image is for validation, and shows at least one of the combinations of size, colour and shape in HELD_OUT,
which no training image shows and no training row names. A question is asked only if it has exactly one answer.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import check_ranges, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    images: int = 12000  # number of images
    seed: int = 0  # of all random choices
    out: str = ""  # folder to write to; default: data/shapes/source

    def __post_init__(self):
        check_ranges(self, images=10, seed=0)


if __name__ == "__main__":  # --help and typos answer before the slow imports
    SETTINGS, _ = from_command_line(Settings, __doc__)

import json
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from machine.terminal import progress
from run.pictures import Box, box_text

SIZE = 48  # pixels of an image's sides
GRID = 8  # pixels: things lie on this grid, so that there are few different boxes
SIDES = {"small": 12, "large": 20}  # pixels
COLOURS = {"red": (215, 35, 40), "orange": (245, 135, 20), "yellow": (240, 210, 30), "green": (40, 150, 60),
           "blue": (40, 80, 215), "purple": (125, 45, 165), "pink": (250, 130, 185), "black": (25, 25, 30)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
HELD_OUT = (("small", "red", "star"), ("large", "yellow", "circle"), ("small", "green", "heart"),
            ("large", "blue", "triangle"), ("small", "purple", "ring"), ("large", "black", "square"))
SUPERSAMPLING = 8  # shapes are drawn this many times as large, then averaged down


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str
    left: int  # pixels, as all below
    top: int
    side: int

    @property
    def centre(self):
        return self.left + self.side / 2, self.top + self.side / 2

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def held_out(self):
        return (self.size, self.colour, self.shape) in HELD_OUT


# ----------------------------------------------------------------------------------------------------------------------
# What is in an image

def make_things(rng, held_out):
    """One to three Things that don't touch, from left to right; at least one is in HELD_OUT if held_out, else none."""
    names = make_names(rng, held_out)
    while True:
        things = []
        for size, colour, shape in names:
            side = SIDES[size]
            left, top = map(int, GRID * rng.integers(0, (SIZE - side) // GRID + 1, size=2))
            things.append(Thing(size, colour, shape, left, top, side))
        if all(apart(a, b) for a, b in combinations(things, 2)):
            return sorted(things, key=lambda thing: thing.centre)


def make_names(rng, held_out):
    """[(size, colour, shape)] of one to three things. If held_out, the first is in HELD_OUT; if not, none is."""
    names, count = [], rng.choice(3, p=(0.2, 0.4, 0.4)) + 1
    while len(names) < count:
        size, colour, shape = rng.choice(list(SIDES)), rng.choice(list(COLOURS)), rng.choice(SHAPES)
        like = rng.random()  # below 0.6: a colour or shape is repeated, so that there is more to count
        if held_out and not names:
            size, colour, shape = HELD_OUT[rng.integers(len(HELD_OUT))]
        elif names and like < 0.3:
            colour = names[-1][1]
        elif names and like < 0.6:
            shape = names[-1][2]
        if held_out or (size, colour, shape) not in HELD_OUT:
            names.append((str(size), str(colour), str(shape)))
    return names


def apart(a, b):
    """True if two pixels or more are free between the boxes of a and b, and it is clear which one is further left."""
    (ax, ay), (bx, by), reach = a.centre, b.centre, (a.side + b.side) / 2 + 2
    return max(abs(ax - bx), abs(ay - by)) >= reach and abs(ax - bx) >= 4


# ----------------------------------------------------------------------------------------------------------------------
# Drawing

def render(things, rng):
    """The PIL image of the things, SIZE x SIZE pixels. Each touches all four sides of its box."""
    image = Image.fromarray(background(rng))
    for thing in things:
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-12, 13, size=3), 0, 255)
        image.paste(tuple(map(int, colour)), (thing.left, thing.top), mask(thing.shape, thing.side))
    return image


def background(rng):
    """A light colour, plain, shaded, striped or grainy: uint8 (SIZE, SIZE, 3)."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    direction = rng.uniform(0, 2 * np.pi)
    slope = x * np.cos(direction) + y * np.sin(direction)
    pattern = (np.zeros((SIZE, SIZE)), slope, np.sin(slope * rng.uniform(20, 60)) / 2,
               rng.normal(scale=0.4, size=(SIZE, SIZE)))[rng.integers(4)]
    return (rng.integers(200, 240, size=3) + 14 * pattern[..., None]).clip(0, 255).astype(np.uint8)


def mask(shape, side):
    """The shape in its box, a greyscale image (side, side): 255 inside it, 0 outside. Drawn large and averaged down."""
    large = side * SUPERSAMPLING
    image = Image.new("L", (large, large))
    draw = ImageDraw.Draw(image)
    draw.polygon([tuple(point) for point in outline(shape) * (large - 1)], fill=255)
    if shape == "ring":
        draw.ellipse((large * 0.27, large * 0.27, large * 0.73 - 1, large * 0.73 - 1), fill=0)
    return image.reduce(SUPERSAMPLING)


def outline(shape):
    """Corners (n, 2) of the shape in a unit square that it fills, y downwards."""
    if shape == "square":
        points = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    elif shape == "triangle":
        points = np.array([(0.5, 0), (1, 1), (0, 1)])
    else:
        t = np.linspace(0, 2 * np.pi, 10 if shape == "star" else 60, endpoint=False)
        x, y, radius = np.sin(t), -np.cos(t), np.where(np.arange(len(t)) % 2, 0.42, 1.0)
        if shape == "star":
            x, y = radius * x, radius * y
        elif shape == "heart":
            x, y = 16 * x ** 3, 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) + 13 * y
        points = np.stack((x, y), axis=1)
    return (points - points.min(axis=0)) / (points.max(axis=0) - points.min(axis=0))


# ----------------------------------------------------------------------------------------------------------------------
# Questions. Each function returns (prompt, answer), or None if there is no unambiguous question of its kind.

def caption(things, rng):
    """("caption", a text that describes all things, from left to right)."""
    phrases = [f"a {thing.size} {thing.name}" for thing in things]
    return "caption", " and ".join((", ".join(phrases[:-1]), phrases[-1])) if phrases[1:] else phrases[0]


def colour(things, rng):
    """(prompt, answer) about the colour of a thing that is the only one of its shape; None if there is none."""
    shapes = [thing.shape for thing in things]
    thing = pick([thing for thing in things if shapes.count(thing.shape) == 1], rng)
    return thing and (f"what colour is the {thing.shape}?", thing.colour)


def count(things, rng):
    """(prompt, answer) about the number of all things, or of those of one shape or colour; sometimes 0."""
    subject, seen = rng.integers(3), rng.random() < 0.75
    if subject == 0:
        return "how many shapes are there?", str(len(things))
    if subject == 1:
        shape = rng.choice([thing.shape for thing in things] if seen else SHAPES)
        return f"how many {shape}s are there?", str(sum(thing.shape == shape for thing in things))
    colour = rng.choice([thing.colour for thing in things] if seen else list(COLOURS))
    return f"how many {colour} shapes are there?", str(sum(thing.colour == colour for thing in things))


def position(things, rng):
    """(prompt, answer) about where a thing is; None if no question has a clear answer.

    It asks on which side of another thing, whose centre is 8 or more pixels away, or in which quarter of the image.
    """
    single, options = unique(things), []
    for a, b in permutations(single, 2):
        (ax, ay), (bx, by) = a.centre, b.centre
        if abs(ax - bx) >= 8:
            options.append((a, f"is the {a.name} left or right of the {b.name}?", "left" if ax < bx else "right"))
        if abs(ay - by) >= 8:
            options.append((a, f"is the {a.name} above or below the {b.name}?", "above" if ay < by else "below"))
    if not options or rng.random() < 0.3:
        for thing in single:
            x, y = (place - SIZE / 2 for place in thing.centre)
            if min(abs(x), abs(y)) >= 6:
                options.append((thing, f"where is the {thing.name}?",
                                f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"))
    return ask_one(options, rng)


def compare(things, rng):
    """(prompt, answer) that compares two things or shapes; None if no question has a clear answer.

    It asks if two things have the same colour, if one is larger, or which of two shapes occurs more often.
    """
    counts = {shape: sum(thing.shape == shape for thing in things) for shape in {thing.shape for thing in things}}
    kinds = {"colour": [], "size": [], "number": []}
    for a, b in permutations(things, 2):
        if counts[a.shape] == counts[b.shape] == 1:
            kinds["colour"].append((a, f"do the {a.shape} and the {b.shape} have the same colour?",
                                    "yes" if a.colour == b.colour else "no"))
        if counts[a.shape] != counts[b.shape]:
            kinds["number"].append((a, f"are there more {a.shape}s or {b.shape}s?",
                                    max(a.shape, b.shape, key=counts.get) + "s"))
    for a, b in permutations(unique(things), 2):
        if a.size != b.size:
            kinds["size"].append((a, f"is the {a.name} larger than the {b.name}?",
                                  "yes" if a.size == "large" else "no"))
    options = [options for options in kinds.values() if options]
    return ask_one(options[rng.integers(len(options))], rng) if options else None


def detect(things, rng):
    """("detect LABEL", boxes as text, from left to right) of all things of one shape, or one colour and shape."""
    thing = pick(things, rng)
    label = thing.name if rng.random() < 0.5 else thing.shape
    found = [thing for thing in things if label in (thing.name, thing.shape)]
    boxes = [Box(thing.left, thing.top, thing.left + thing.side, thing.top + thing.side, label) for thing in found]
    return f"detect {label}", " ; ".join(box_text(box, SIZE, SIZE) for box in boxes)


def unique(things):
    """The things that share their colour and shape with no other thing."""
    names = [thing.name for thing in things]
    return [thing for thing in things if names.count(thing.name) == 1]


def pick(things, rng):
    """A random thing, a held-out one if there is any, because validation is about these; None if `things` is empty."""
    things = [thing for thing in things if thing.held_out] or things
    return things[rng.integers(len(things))] if things else None


def ask_one(options, rng):
    """(prompt, answer) of one of the options (thing, prompt, answer), about a held-out thing if possible; or None."""
    options = [option for option in options if option[0].held_out] or options
    return options[rng.integers(len(options))][1:] if options else None


KINDS = {"caption": caption, "colour": colour, "count": count, "position": position, "compare": compare,
         "detect": detect}


# ----------------------------------------------------------------------------------------------------------------------
# Files

def make(index, seed):
    """(things, image, [(kind, prompt, answer)], split) of one image: a pure function of index and seed."""
    rng = np.random.Generator(np.random.Philox(key=np.array((seed, index), dtype=np.uint64)))
    split = "val" if index % 10 == 9 else "train"
    things = make_things(rng, held_out=split == "val")
    image = render(things, rng)
    asked = [(kind, ask(things, rng)) for kind, ask in KINDS.items()]
    return things, image, [(kind, *pair) for kind, pair in asked if pair], split


def generate(folder, images=Settings.images, seed=Settings.seed):
    """Writes images/00000.png and so on into `folder`, and captions.jsonl when they are complete."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "captions.jsonl").unlink(missing_ok=True)  # written last: a folder without it is unfinished
    lines = []
    with progress(images, "images") as bar:
        for index in range(images):
            _, image, questions, split = make(index, seed)
            name = f"images/{index:05}.png"
            image.save(folder / name, compress_level=1)
            for kind, prompt, answer in questions:
                row = {"image": name, "prompt": prompt, "answer": answer, "kind": kind, "split": split}
                lines.append(json.dumps(row))
            bar.update()
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    with one_line_errors():
        OUT = Path(SETTINGS.out or Path(__file__).resolve().parent / "source")
        generate(OUT, SETTINGS.images, SETTINGS.seed)
        print(f"{OUT}: {SETTINGS.images:,} images; next: python prepare.py {OUT} --name=NAME")
