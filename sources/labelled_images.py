"""Makes a data set of pictures by class, or without classes: images.bin, {train,val,test}.jsonl, meta.json.

    python prepare.py my_folder/ --image_size=48        a folder for each class: my_folder/cats/1.jpg, ...; or below
    python prepare.py fashion_mnist                     my_folder/train/, my_folder/test/ and perhaps my_folder/val/
    python prepare.py digit_scans                       the second and third are known ones
    python prepare.py my_pictures/ --image_size=64      no classes: my_pictures/1.jpg, ...; for --task=masked-patches

A part that has no folder, val or test, is taken from the pictures for training: of each class the same share, chosen by
a hash of the pixels. A picture for training that occurs twice in a class is left out the second time. Copies that
differ in a pixel are not found: where pictures come in series, give each part a folder of its own. Pictures without
classes need no test part.
"""

import functools
import gzip
import hashlib
import json
import os
import re
import runpy
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError
from machine.terminal import printable, symbol, watched
from run.files import read_json
from run.pictures import read_image
from sources.corpora import apt_get, unpack
from sources.download import Offline, download
from sources.images import PICTURES, SPLITS
from sources.texts import files_in, finish, writing

PARTS = ("train", "val", "test")
FASHION = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141"
FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_FILES = [f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
FASHION_SUM = "14410854cf7a289477dcfc7df3f8ec24741e281cdcc425ede0d9a748ca630214"  # SHA-256 of the four, unpacked
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
ROOT = Path(__file__).resolve().parents[1]


class How(NamedTuple):
    """How pictures are prepared; prepare.py's settings of the same names."""
    image_size: int = 48
    val_fraction: float = 0.1  # of each class for validation, and once more for test, unless these are given
    unreadable: str = "refuse"  # or "skip"


def prepare(rows, folder, how, source, revision=""):
    """Writes the data set of an iterable of rows into the folder, and returns the dict of meta.json.

    A row is a dict with label (None in all rows: there are no classes), file (a name to show), split ("" if it may be
    in any), and read, a function that returns a PIL image in RGB. Raises UserError if one can't be read and
    how.unreadable is "refuse", if a split would be empty, or if a class has one picture.
    """
    with writing(folder):
        kept, left_out = write_images(rows, folder / "images.bin.new", how)
        choose_splits(kept, how.val_fraction, source)
        own = {"labels": labels_of(kept, source)} if has_classes(kept) else {}
        tell_copies(kept)
        meta = {"kind": "image-labels" if own else "images", "source": str(source), "revision": revision, "sha256": "",
                "images": len(kept), "image_size": how.image_size, **own, "left_out": left_out}
        digest = hashlib.sha256(np.memmap(folder / "images.bin.new", mode="r"))
        parts = [split for split in PARTS if any(row["split"] == split for row in kept)]
        for split in parts:
            chosen = [row for row in kept if row["split"] == split]
            meta[f"{split}_rows"] = len(chosen)
            names = ("image", "label", "file") if own else ("image", "file")
            text = "".join(json.dumps({name: row[name] for name in names}) + "\n" for row in chosen).encode()
            (folder / f"{split}.jsonl.new").write_bytes(text)
            digest.update(text)
        meta["sha256"] = digest.hexdigest()
        return finish(folder, ("images.bin", *(f"{split}.jsonl" for split in parts)), meta)


def has_classes(rows):
    return any(row["label"] is not None for row in rows)


def write_images(rows, path, how):
    """Writes the pictures, resized, to the file `path`: uint8 (n, size, size, 3).

    Returns (the rows of those that it wrote, {reason: how many it left out}). Each row then also has image, its index,
    and digest, of its pixels.
    """
    from PIL import Image
    kept, left_out, seen, size = [], Counter(), set(), how.image_size
    with open(path, "wb") as file:
        for row in watched(list(rows), "pictures"):
            try:
                pixels = np.asarray(row["read"]().resize((size, size), Image.Resampling.BICUBIC)).tobytes()
            except UserError as error:
                if how.unreadable == "refuse":
                    raise UserError(f"{error}; replace or remove the file, or add --unreadable=skip") from None
                print(printable(f"left out: {error}"), flush=True)
                left_out["unreadable"] += 1
                continue
            digest = hashlib.sha256(pixels).hexdigest()
            if (digest, row["label"]) in seen and row["split"] not in ("val", "test"):
                left_out["duplicate"] += 1
                continue
            seen.add((digest, row["label"]))
            file.write(pixels)
            kept.append({**row, "image": len(kept), "digest": digest})
    print(f"pictures: {len(kept):,}; left out: {left_out['unreadable']:,} that can't be read, {left_out['duplicate']:,}"
          " that are equal to an earlier one" + " of their class" * has_classes(kept), flush=True)
    return kept, dict(left_out)


def choose_splits(rows, val_fraction, source):
    """Sets the splits of rows in place: val and test as given, and what is not given from the others of each class.

    Without classes a test part is taken only if it is given.
    """
    wanted = ("val", "test") if has_classes(rows) else ("val",)
    missing = [split for split in wanted if all(row["split"] != split for row in rows)]
    if not missing and val_fraction != How().val_fraction:
        raise UserError(f"val_fraction = {val_fraction}: {source} has folders for {' and '.join(wanted)}; leave it out")
    if val_fraction * len(missing) >= 1:
        raise UserError(f"val_fraction = {val_fraction}: must be below 0.5: the test part is as large")
    classes = {}
    for row in sorted(rows, key=lambda row: row["digest"]):
        if row["split"] not in ("val", "test"):
            classes.setdefault(row["label"], []).append(row)
    lonely = [name for name, found in classes.items() if len(found) == 1]
    if lonely == [None] and missing:
        raise UserError(f"{source}: has one picture alone, so that none can be held out: add some")
    if lonely and missing:
        raise UserError(f"{source}: only one picture is of the class {lonely[0]} ({len(lonely):,} such classes), so"
                        " that none can be held out: add pictures, or remove its folder")
    for found in classes.values():
        share = max(1, round(len(found) * val_fraction))
        for i, row in enumerate(found):
            is_held_out = i < share * len(missing) and i < len(found) - 1
            row["split"] = missing[i // share] if is_held_out else "train"
    for split in ("train", *wanted):
        if not any(row["split"] == split for row in rows):
            raise UserError(f"{source}: none of its {len(rows):,} pictures is for {split}: add some")
    drawn = "by hash" + ", the same share of each class" * has_classes(rows)
    for split in wanted:
        print(f"{split}: {drawn if split in missing else 'as given'}", flush=True)


def labels_of(rows, source):
    """The names of the classes in training. Says which classes of the other parts are unknown."""
    labels = sorted({row["label"] for row in rows if row["split"] == "train"})
    if len(labels) < 2:
        raise UserError(f"{source}: the pictures for training are of {len(labels)} class, {labels[0]}: there must be at"
                        " least two")
    print(f"classes, {len(labels):,}: {', '.join(labels[:20])}{', ...' * (len(labels) > 20)}", flush=True)
    if alike := len(labels) - len({name.lower() for name in labels}):
        print(f"classes whose names differ from another one in capital letters alone: {alike:,}", flush=True)
    for split in ("val", "test"):
        found = [row for row in rows if row["split"] == split]
        if unknown := sorted({row["label"] for row in found} - {*labels}):
            count = sum(row["label"] in unknown for row in found)
            print(printable(f"{split}: {count:,} of {len(found):,} pictures are of classes that training lacks, such as"
                            f" {unknown[0]}; they count as errors"), flush=True)
    return labels


def tell_copies(rows):
    """Says how many pictures of the other parts are also in training."""
    trained = {row["digest"] for row in rows if row["split"] == "train"}
    for split in ("val", "test"):
        found = [row for row in rows if row["split"] == split]
        if copies := sum(row["digest"] in trained for row in found):
            print(f"{split}: {copies:,} of {len(found):,} pictures are also in training", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Folders

def find(folder, pattern=""):
    """The rows of a folder whose folders are classes; or, if most of its files are pictures in none, without labels.

    [] if most files are neither. The folders above the classes, or above pictures without classes, may be the parts,
    such as train/ and test/. pattern: see texts.wanted. Raises UserError if there is one class, or if some of the
    folders are parts and others are none.
    """
    files = list(files_in(folder, pattern))
    parts = {file: file.relative_to(folder).parts for file in files if file.suffix.lower() in PICTURES}
    tops = {names[0] for names in parts.values() if len(names) > 1}
    told = {name for name in tops if name.lower() in SPLITS}
    depth = 1 if tops and tops == told else 0
    found = {file: names for file, names in parts.items() if len(names) > depth + 1}
    loose = {file: names for file, names in parts.items() if file not in found}
    if 2 * len(loose) > len(files):
        return unlabelled(loose, len(files))
    if 2 * len(found) <= len(files):
        return []
    if tops != told and len({SPLITS[name.lower()] for name in told}) > 1:
        raise UserError(f"{folder}: {', '.join(sorted(told))} are parts, and {min(tops - told)} is none: give each part"
                        " a folder of classes, and remove the others")
    classes = {names[depth] for names in found.values()}
    if len(classes) < 2:
        raise UserError(f"{folder}: its pictures lie in one folder, {shown(*classes)}: each of at least two classes"
                        f" needs one; if the classes are below it, or there are none, give {folder / min(classes)}")
    if others := len(files) - len(found):
        print(f"left out: {others:,} files that are no pictures in the folder of a class", flush=True)
    return [{"label": shown(names[depth]), "split": SPLITS[names[0].lower()] if depth else "",
             "file": shown("/".join(names)), "read": functools.partial(read_image, file)}
            for file, names in found.items()]


def unlabelled(found, count):
    """The rows of pictures without classes. found: {path: its names below the folder}, count: of the folder's files."""
    if count > len(found):
        print(f"left out: {count - len(found):,} files that are no pictures, or lie in other folders", flush=True)
    return [{"label": None, "split": SPLITS[names[0].lower()] if len(names) > 1 else "",
             "file": shown("/".join(names)), "read": functools.partial(read_image, file)}
            for file, names in found.items()]


def shown(name):
    """A file's name as one line of valid text: it may have line ends, control characters, or not be UTF-8."""
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return re.sub("[\x00-\x1f\x7f]", symbol, " ".join(name.split()))


# ----------------------------------------------------------------------------------------------------------------------
# Known sets

def fetch(name, folder):
    """Returns (rows, source, revision) of a known set. folder: what is downloaded and kept lies there.

    Raises Offline if it can't be had.
    """
    return {"fashion_mnist": fashion_mnist, "digit_scans": digit_scans}[name](folder / "download")


def write_examples(folder):
    """Writes the first test picture of each class of a data set as FOLDER/pictures/<class>.png."""
    from PIL import Image
    meta = read_json(folder / "meta.json")
    size = meta["image_size"]
    images = np.memmap(folder / "images.bin", mode="r").reshape(-1, size, size, 3)
    lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "pictures").mkdir(exist_ok=True)
    first = {row["label"]: row["image"] for row in reversed(list(map(json.loads, lines)))}
    for label, image in first.items():
        name = re.sub(r"\W+", "_", label).lower()
        Image.fromarray(images[image]).save(folder / "pictures" / f"{name}.png")
    print(f"to try a model on: {folder / 'pictures'} has a test picture of each class", flush=True)


def row_of(pixels, label, split, file):
    """A row of grey pixels, uint8 (H, W)."""
    from PIL import Image
    return {"label": label, "split": split, "file": file, "read": lambda: Image.fromarray(pixels).convert("RGB")}


def fashion_mnist(folder):
    """Articles of a shop in 28 x 28 grey pixels: 60,000 for training, 10,000 for test (Xiao et al. 2017)."""
    files, source, revision = fashion_files(folder)
    if hashlib.sha256(b"".join(files)).hexdigest() != FASHION_SUM:
        raise UserError(f"{source} does not hold the expected pictures: delete {folder}, if it is there, and run again")
    rows = []
    for split, images, labels in (("train", *files[:2]), ("test", *files[2:])):
        images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)  # after a header of four numbers
        labels = np.frombuffer(labels, np.uint8, offset=8)
        rows += [row_of(image, CLOTHES[label], split, f"{split} {i}")
                 for i, (image, label) in enumerate(zip(images, labels))]
    return rows, source, revision


def fashion_files(folder):
    """(the four files of Fashion-MNIST, unpacked, source, version): from a Debian package, else from GitHub."""
    try:
        with tempfile.TemporaryDirectory() as temporary:
            apt_get([FASHION_PACKAGE], temporary)
            version = unpack(FASHION_PACKAGE, temporary, temporary)
            inside = Path(temporary, "usr/share/datasets/fashion-mnist")
            found = [gzip.decompress((inside / name).read_bytes()) for name in FASHION_FILES]
            return found, f"Debian package {FASHION_PACKAGE}", version
    except Offline as error:
        print(f"{error}; trying GitHub instead", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FASHION_FILES:
        if not (folder / name).exists():
            download(f"{FASHION}/data/fashion/{name}", folder / name)
    return [gzip.decompress((folder / name).read_bytes()) for name in FASHION_FILES], FASHION, ""


def digit_scans(folder):
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 grey pixels."""
    scans, digits = runpy.run_path(str(ROOT / "data/digits/generate.py"))["load_scans"]()
    rows = [row_of((scan * 255).round().astype(np.uint8), str(digit), "", f"scan {i}")
            for i, (scan, digit) in enumerate(zip(scans, digits))]
    return rows, "scikit-learn's load_digits", ""
