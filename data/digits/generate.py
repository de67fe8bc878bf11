"""Numbers to read, composed of scanned handwritten digits: PNG images and a captions.jsonl, as prepare.py reads them.

    python prepare.py digits                                        into data/digits, ready for training
    python data/digits/generate.py --images=100 --out=my_folder     the images and captions.jsonl alone

The 1,797 scans (8 x 8 pixels) come with scikit-learn. Every seventh scan of each digit is for validation: no training
image contains it. Each row also lists the scans that make up its number.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, check_ranges, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    images: int = 30000  # number of images
    seed: int = 0  # of all random choices
    out: str = ""  # folder to write to; default: data/digits/source

    def __post_init__(self):
        check_ranges(self, images=10, seed=0)


if __name__ == "__main__":  # --help and typos answer before the slow imports
    SETTINGS, _ = from_command_line(Settings, __doc__)

import json

import numpy as np
from PIL import Image

from machine.terminal import progress

SIZE = 48  # pixels of an image's sides
TRAIN_SPREAD = 2.0  # a scan's size and slant vary twice as much in training images


def load_scans():
    """(scans, labels): float (1797, 8, 8) with ink from 0 to 1, and the digits (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the scanned digits come with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    return digits.images / 16, digits.target


def split_scans(labels):
    """{"train": indices, "val": indices}: every seventh scan of each digit is for validation."""
    val = np.sort(np.concatenate([np.flatnonzero(labels == digit)[6::7] for digit in range(10)]))
    return {"train": np.setdiff1d(np.arange(len(labels)), val), "val": val}


def compose(scans, rng, spread=1.0):
    """A PIL image, RGB, SIZE x SIZE, of 1 to 4 scans (n, 8, 8), side by side as on a line of a form.

    Place, size, slant and colours are drawn from `rng`. At spread 1, size varies by 10 %, slant by 0.15 radians.
    """
    size = 11.5  # pixels of a scan's sides, before they vary
    left = rng.uniform(0, 2)
    top = (SIZE - size) / 2 + rng.uniform(-3, 3)
    ink = np.zeros((SIZE, SIZE))
    for i, scan in enumerate(scans):
        centre = left + (i + 0.5) * size + rng.uniform(-0.5, 0.5), top + size / 2 + rng.uniform(-1, 1)
        side, angle = size * (1 + spread * rng.uniform(-0.1, 0.1)), spread * rng.uniform(-0.15, 0.15)
        ink = np.maximum(ink, placed(scan, centre, side, angle))
    paper, pen = rng.integers(215, 256, size=3), rng.integers(0, 90, size=3)
    image = paper + ink[..., None] * (pen - paper) + rng.normal(scale=4, size=(SIZE, SIZE, 1))
    return Image.fromarray(image.round().clip(0, 255).astype(np.uint8))


def placed(scan, centre, size, angle):
    """One scan's ink on an otherwise empty image: float (SIZE, SIZE) from 0 to 1.

    The scan is enlarged to `size` pixels and turned by `angle` radians. Its middle is at `centre`, (x, y) in pixels.
    """
    (x, y), scale = centre, 8 / size
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    matrix = (cos, sin, 5 - cos * x - sin * y, -sin, cos, 5 + sin * x - cos * y)  # from the image to the scan
    picture = Image.fromarray(np.pad(scan, 1).astype(np.float32))  # a rim, because ink reaches the scan's edge
    ink = picture.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(ink).clip(0, 1)


def make(index, seed, scans, splits):
    """Image number `index`: (picture, indices of its scans, split). The same for the same index and seed."""
    rng = np.random.Generator(np.random.Philox(key=np.array((seed, index), dtype=np.uint64)))
    split = "val" if index % 10 == 9 else "train"
    chosen = rng.choice(splits[split], size=rng.integers(1, 5))
    return compose(scans[chosen], rng, 1.0 if split == "val" else TRAIN_SPREAD), chosen, split


def generate(folder, images=Settings.images, seed=Settings.seed):
    """Writes images/00000.png and so on into `folder`, and captions.jsonl when they are complete."""
    scans, labels = load_scans()
    splits, lines = split_scans(labels), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "captions.jsonl").unlink(missing_ok=True)  # written last: a folder without it is unfinished
    with progress(images, "images") as bar:
        for index in range(images):
            image, chosen, split = make(index, seed, scans, splits)
            name = f"images/{index:05}.png"
            image.save(folder / name, compress_level=1)
            kind = f"{len(chosen)} digit{'s' if len(chosen) > 1 else ''}"
            lines.append(json.dumps({"image": name, "prompt": "read", "answer": "".join(map(str, labels[chosen])),
                                     "kind": kind, "split": split, "scans": chosen.tolist()}))
            bar.update()
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    with one_line_errors():
        OUT = Path(SETTINGS.out or Path(__file__).resolve().parent / "source")
        generate(OUT, SETTINGS.images, SETTINGS.seed)
        print(f"{OUT}: {SETTINGS.images:,} images; next: python prepare.py {OUT} --name=NAME")
