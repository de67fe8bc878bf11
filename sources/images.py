r"""Turns images with questions and answers into a data set: images.bin, train.jsonl, val.jsonl and so on.

    python prepare.py my_folder/ --image_size=224 --tokenizer=bpe:2000

The folder holds images, and a captions.jsonl with a row for each question:

    {"image": "cats/1.jpg", "prompt": "caption", "answer": "a cat asleep on a keyboard"}
    {"image": "cats/1.jpg", "prompt": "detect cat", "answer": "<loc0256><loc0128><loc0768><loc0512> cat"}

A row may also name its kind (evaluation reports each kind by itself; default: the prompt's first word) and its split,
"train" or "val". Where no row names a split, the last 10 % of the images are for validation.

Hugging Face's layout works too: a metadata.jsonl, .csv or .tsv, with a `file_name` and a `text` (or `caption`, or
--column=NAME) for each image, in the folder or in each of train/, validation/, test/. Every prompt is then "caption".

Fine-tunes a published PaliGemma on it, by LoRA, with the vision tower frozen, and writes it in the published layout:

    python train.py --task=image-text --dataset=my_folder --init_from=google/paligemma-3b-pt-224 --rates.vision=0 \
        --lora_rank=8 --publish=tuned
"""

import hashlib
import json
import os
import re
import reprlib
from pathlib import PurePath

import numpy as np

import tokenizer as tokenizers
from configurator import UserError
from machine.terminal import progress
from run.pictures import LOCATIONS, SEGMENTS, read_image
from sources.documents import READERS, pick
from sources.texts import finish, writing

CONTROLS = ("<pad>", "<eos>", "<bos>", "<image>")  # in PaliGemma's order
FILES = ("images.bin", "train.jsonl", "val.jsonl", "tokenizer.json")  # of a data set; meta.json comes last
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
SPLITS = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val",
          "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}  # {name of a folder: split}


def prepare(path, folder, tokenizer_name="char", val_fraction=0.1, image_size=48, source="", column="text"):
    """Turns the images and captions in the folder `path` into a data set in `folder`; returns the dict of meta.json.

    tokenizer_name: char or byte (both one token per byte); bpe:SIZE, learned from the training rows; or the folder or
    tokenizer.json of an image-text model. source: the origin that meta.json names, if not `path`. column: as in
    `read_rows`. Raises UserError if a row can't be used; an earlier data set in `folder` then stays as it is.
    """
    tables = find_tables(path)
    if not tables:
        raise UserError(f"{path} has neither a captions.jsonl nor a metadata.jsonl: add one")
    with writing(folder):
        rows = [row for table in tables for row in read_rows(table, path, column)]
        if tables[0].stem.lower() == "metadata":
            rows = name_splits(rows)
        split_images(rows, val_fraction, tables[0])
        splits = {split: [row for row in rows if row["split"] == split] for split in ("train", "val")}
        special = (*CONTROLS, *LOCATIONS, *SEGMENTS)
        no_merges = f"bpe:{256 + len(special)}"
        name = no_merges if tokenizer_name in ("char", "byte") else tokenizer_name
        texts = [f"{row['prompt']}\n{row['answer']}" for row in splits["train"]]
        tokenizer = tokenizers.build(name, None, lambda: texts, special)
        if tokenizer.kind != "bpe" or None in map(tokenizer.bpe.token_to_id, ("<bos>", "<eos>")):
            raise UserError(f"tokenizer = {name}: images need char or byte (both one token per byte), bpe:SIZE, or the"
                            " tokenizer of an image-text model, with <bos> and <eos>")
        tokenizer.save(folder / "tokenizer.json.new")
        count = write_rows(path, rows, image_size, folder)
        meta = {"kind": "image-text", "source": str(source or path), "images": count, "image_size": image_size,
                "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
        for split, chosen in splits.items():
            meta[f"{split}_images"] = len({row["image"] for row in chosen})
            meta[f"{split}_rows"] = len(chosen)
        digest = hashlib.sha256()
        for name in FILES[:3]:
            digest.update(np.memmap(folder / f"{name}.new", mode="r"))
        meta["sha256"] = digest.hexdigest()
        return finish(folder, FILES, meta)


def find_tables(path):
    """The tables of a folder, a list of paths: captions.jsonl alone, or else the metadata.jsonl, .csv and .tsv.

    These may lie in the folder or in its train/, val/ or test/. One with no image in or below its folder is left out.
    """
    files = sorted(file for file in path.glob("*") if file.is_file())
    tables = [file for file in files if file.name.lower() == "captions.jsonl"]
    if not tables:
        files += sorted(file for file in path.glob("*/metadata.*") if file.parent.name.lower() in SPLITS)
        tables = [file for file in files if file.name.lower() in ("metadata.jsonl", "metadata.csv", "metadata.tsv")
                  and any(other.suffix.lower() in PICTURES for other in file.parent.rglob("*"))]
    return tables


def read_rows(table, folder, column):
    """Yields dicts of image (a path in the folder), prompt, answer, kind, split ("" if none), where (file and line).

    column: of a metadata table, the column that holds the captions.
    """
    for where, row in READERS[table.suffix.lower()](table, column):
        if table.stem.lower() == "metadata":
            row = from_metadata(row, table.parent.relative_to(folder), column, where)
        try:
            yield {**check_row(row, folder), "where": where}
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def from_metadata(row, folder, column, where):
    """Turns a metadata row, such as {"file_name": "1.jpg", "text": "a cat"}, into a row of captions.jsonl.

    folder: the table's, as seen from the data set's folder; the image's path begins with it. column: holds the caption.
    """
    names = [name for name in row if name == "file_name" or name.endswith("_file_name")]
    if len(names) != 1:
        raise UserError(f"{where}: {len(names)} columns name a file, among {', '.join(row)}: have just one, file_name")
    if column == "text" and column not in row and "caption" in row:
        column = "caption"
    image = row[names[0]]
    image = os.path.normpath(os.path.join(folder, image)) if isinstance(image, str) else image
    return {"image": image, "prompt": "caption", "answer": pick(row, column, where)}


def name_splits(rows):
    """The rows, with the splits that their folders name. If there is a val/, test/ is left out; else test/ is val.

    If all rows are in folders of one split, or of none, they are returned as they are, without a split.
    """
    folders = [row["image"].lower().split(os.sep)[:-1] for row in rows]
    splits = [next((SPLITS[name] for name in names if name in SPLITS), "") for names in folders]
    found = set(splits)
    if len(found) == 1:  # `split_images` will split them
        return rows
    if {"val", "test"} <= found:
        print("the images of test/ are left out: validation has a folder of its own", flush=True)
        return [{**row, "split": split} for row, split in zip(rows, splits) if split != "test"]
    if {"train", "test"} <= found:
        print("the images of test/ are for validation", flush=True)
    return [{**row, "split": split.replace("test", "val")} for row, split in zip(rows, splits)]


def check_row(row, folder):
    """The row, with every field filled in. Raises UserError if a field can't be used."""
    for name in ("image", "prompt", "answer", "kind", "split"):
        value = row.get(name)
        if value is None and name in ("kind", "split"):
            continue
        if not isinstance(value, str):
            raise UserError(f"{name} = {reprlib.repr(value)}: must be text, in double quotes")
        if found := re.search("|".join((*CONTROLS, "[\ud800-\udfff]")), value):  # or half of a surrogate pair
            raise UserError(f"{name} = {value!r}: leave out {found[0]!r}")
    prompt, answer, split = row["prompt"], row["answer"], row.get("split") or ""
    if not answer.strip():
        raise UserError(f"answer = {answer!r}: is empty, so there is nothing to learn; remove the row")
    if split not in ("train", "val", ""):
        raise UserError(f"split = {split!r}: must be \"train\" or \"val\", or be left out of all rows")
    image = os.path.normpath(row["image"])
    outside = PurePath(image).anchor or PurePath(image).parts[:1] == ("..",)
    if outside or not os.path.isfile(folder / image):
        raise UserError(f"image = {row['image']!r}: there is no such file in {folder}; add it or remove the row")
    kind = row.get("kind") or (prompt.split() or ["none"])[0]
    return {"image": image, "prompt": prompt, "answer": answer, "kind": kind, "split": split}


def split_images(rows, val_fraction, path):
    """Sets the splits of rows in place if no row has one: "val" for the last val_fraction of the images, else "train".

    Then checks the splits: every row has one, all rows of an image have the same, and each split has an image. Raises
    UserError if not, or if the rows have splits and val_fraction is not 0.1, its default. path: named in the errors.
    """
    if not any(row["split"] for row in rows):
        images = list(dict.fromkeys(row["image"] for row in rows))
        held_out = set(images[int(len(images) * (1 - val_fraction)):])
        for row in rows:
            row["split"] = "val" if row["image"] in held_out else "train"
    elif val_fraction != 0.1:
        raise UserError(f"val_fraction = {val_fraction}: the rows of {path} name their split; leave it out")
    splits = {}
    for row in rows:
        where, image, split = row["where"], row["image"], row["split"]
        if not split:
            raise UserError(f"{where}: has no split, but other rows have one: name it in all rows or in none")
        if splits.setdefault(image, split) != split:
            raise UserError(f"{where}: split = {split!r}, but an earlier row of {image} names the other: use one")
    for split in ("train", "val"):
        if split not in splits.values():
            raise UserError(f"{path} has {len(splits)} images, and none for {split}: add some, or name the rows' split")


def write_rows(path, rows, size, folder):
    """Writes train.jsonl.new, val.jsonl.new and images.bin.new, uint8 (n, size, size, 3). Returns the image count n."""
    from PIL import Image
    places = {}  # {image: (index, width, height)}, in pixels
    with (progress(len(rows), "rows") as bar,
          open(folder / "images.bin.new", "wb") as images, open(folder / "train.jsonl.new", "wb") as train,
          open(folder / "val.jsonl.new", "wb") as val):
        for row in rows:
            if row["image"] not in places:
                try:
                    picture = read_image(path / row["image"])
                except UserError as error:
                    raise UserError(f"{row['where']}: {error}; replace the file or remove its rows") from None
                places[row["image"]] = len(places), picture.width, picture.height
                images.write(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).tobytes())
            index, width, height = places[row["image"]]
            saved = {"image": index, "prompt": row["prompt"], "answer": row["answer"], "kind": row["kind"],
                     "width": width, "height": height}
            file = train if row["split"] == "train" else val
            file.write(json.dumps(saved, ensure_ascii=False).encode("utf-8") + b"\n")
            bar.update()
    return len(places)
