"""Images with questions and answers into a data set: images.bin, train.jsonl, val.jsonl, tokenizer.json, meta.json.

    python prepare.py my_folder/ --image_size=224 --tokenizer=bpe:2000

The folder holds images, and a captions.jsonl with a row for each question:

    {"image": "cats/1.jpg", "prompt": "caption", "answer": "a cat asleep on a keyboard"}
    {"image": "cats/1.jpg", "prompt": "detect cat", "answer": "<loc0256><loc0128><loc0768><loc0512> cat"}

A row may also name its kind (evaluation reports each kind by itself; default: the prompt's first word) and its split,
"train" or "val". Where no row names a split, the last 10 % of the images are for validation.
"""

import codecs
import hashlib
import json
import os
import re
from pathlib import PurePath

import numpy as np
from PIL import Image

from configurator import UserError
from run.pictures import LOCATIONS, SEGMENTS, read_image
from sources.texts import put_in_place
from tokenizer import BPETokenizer

CONTROLS = ("<pad>", "<eos>", "<bos>", "<image>")  # in PaliGemma's order
FILES = ("images.bin", "train.jsonl", "val.jsonl", "tokenizer.json")


def prepare(path, folder, tokenizer_name="char", val_fraction=0.1, image_size=48, source=""):
    """Writes the data set of the folder `path`, images with a captions.jsonl, into `folder`, and returns its meta.

    tokenizer_name: char or byte, a token per byte; or bpe:SIZE, learned from the training rows. Raises UserError that
    names the line of a row or an image that can't be used; a data set that was in `folder` stays as it is.
    """
    captions = path / "captions.jsonl"
    rows = list(read_rows(captions))
    split_images(rows, val_fraction, captions)
    splits = {split: [row for row in rows if row["split"] == split] for split in ("train", "val")}
    tokenizer = make_tokenizer(tokenizer_name, splits["train"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json.new")
    meta = {"kind": "image-text", "source": str(source or path), "image_size": image_size,
            "images": write_rows(captions, rows, image_size, folder),
            "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    for split, chosen in splits.items():
        meta[f"{split}_images"] = len({row["image"] for row in chosen})
        meta[f"{split}_rows"] = len(chosen)
    digest = hashlib.sha256()
    for name in FILES[:3]:
        digest.update(np.memmap(folder / f"{name}.new", mode="r"))
    meta["sha256"] = digest.hexdigest()
    put_in_place(folder, FILES, meta)
    return meta


def read_rows(path):
    """Yields the rows of a captions.jsonl: image (a normal path), prompt, answer, kind, split ("" if none), line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                try:
                    yield {**check_row(line, path.parent), "line": number}
                except UserError as error:
                    raise UserError(f"{path}, line {number}: {error}") from None


def check_row(line, folder):
    """A row from its line of JSON. Raises UserError that says what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:  # of JSON, or of UTF-8
        raise UserError(f"is not JSON: {error}; write one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"is {json.dumps(row):.60}: must be an object with image, prompt and answer")
    row = {"split": "", **{name: value for name, value in row.items() if value is not None}}
    for name in ("image", "prompt", "answer"):
        if name not in row:
            raise UserError(f"has no {name}: every row needs image, prompt and answer")
    row.setdefault("kind", (str(row["prompt"]).split() or ["none"])[0])
    row = {name: row[name] for name in ("image", "prompt", "answer", "kind", "split")}
    for name, value in row.items():
        if not isinstance(value, str):
            raise UserError(f"{name} = {json.dumps(value):.60}: must be text, in double quotes")
        if control := re.search("|".join(CONTROLS), value):
            raise UserError(f"{name} = {value!r}: leave out {control[0]}, it is put where it belongs by itself")
        if re.search("[\ud800-\udfff]", value):
            raise UserError(f"{name} = {value!r}: half of a surrogate pair is no character; remove it")
    if not row["answer"].strip():
        raise UserError(f"answer = {row['answer']!r}: is empty, so there is nothing to learn; remove the row")
    if row["split"] not in ("train", "val", ""):
        raise UserError(f"split = {row['split']!r}: must be \"train\" or \"val\", or be left out of all rows")
    image = os.path.normpath(row["image"])
    if PurePath(image).anchor or PurePath(image).parts[:1] == ("..",):
        raise UserError(f"image = {row['image']!r}: leaves the folder {folder}; put the image there and name it by its"
                        " relative path")
    if not os.path.isfile(folder / image):
        raise UserError(f"image = {row['image']!r}: there is no such file in {folder}; add it or remove the row")
    return {**row, "image": image}


def split_images(rows, val_fraction, path):
    """Checks the rows' splits. If none is named, the last val_fraction of the images are for validation."""
    if not any(row["split"] for row in rows):
        images = list(dict.fromkeys(row["image"] for row in rows))
        held_out = set(images[int(len(images) * (1 - val_fraction)):])
        for row in rows:
            row["split"] = "val" if row["image"] in held_out else "train"
    splits = {}
    for row in rows:
        line = f"{path}, line {row['line']}"
        if not row["split"]:
            raise UserError(f"{line}: has no split, which other rows have: name it in all rows or in none")
        if splits.setdefault(row["image"], row["split"]) != row["split"]:
            raise UserError(f"{line}: split = {row['split']!r}, but an earlier row has {row['image']} in the other"
                            " split: keep an image's rows together")
    for split in ("train", "val"):
        if split not in splits.values():
            raise UserError(f"{path} has {len(splits)} images, and none for {split}: add images, or name the split of"
                            " every row")


def make_tokenizer(name, rows):
    """A BPE with PaliGemma's special tokens: a token per byte, or with merges learned from the rows (bpe:SIZE)."""
    special = (*CONTROLS, *LOCATIONS, *SEGMENTS)
    kind, _, size = name.partition(":")
    if name in ("char", "byte"):
        return BPETokenizer.train([], 256 + len(special), special)
    if kind == "bpe" and size.isdecimal():
        return BPETokenizer.train((f"{row['prompt']}\n{row['answer']}" for row in rows), int(size), special)
    raise UserError(f"tokenizer = {name}: must be char or byte (both a token per byte), or bpe:SIZE, for images")


def write_rows(captions, rows, size, folder):
    """Writes the files of the rows, and the images as uint8 (n, size, size, 3). Returns n.

    The images are made square by bicubic resizing, without regard to their proportions, as pictures.pixels does it.
    """
    places = {}  # of an image: its index, and its width and height in pixels
    with (open(folder / "images.bin.new", "wb") as images, open(folder / "train.jsonl.new", "wb") as train,
          open(folder / "val.jsonl.new", "wb") as val):
        for row in rows:
            if row["image"] not in places:
                try:
                    picture = read_image(captions.parent / row["image"])
                except UserError as error:
                    raise UserError(f"{captions}, line {row['line']}: {error}; replace the file or remove its"
                                    " rows") from None
                places[row["image"]] = len(places), picture.width, picture.height
                images.write(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).tobytes())
            index, width, height = places[row["image"]]
            saved = {"image": index, "prompt": row["prompt"], "answer": row["answer"], "kind": row["kind"],
                     "width": width, "height": height}
            file = train if row["split"] == "train" else val
            file.write(json.dumps(saved, ensure_ascii=False).encode("utf-8") + b"\n")
    return len(places)
