"""Texts into a data set: train.bin, val.bin, tokenizer.json, meta.json; and what data sets of all kinds share.

    python prepare.py my.txt                            also a folder of .txt files, or a URL

Text is UTF-8. It is read and written piece by piece, so it may be larger than memory.
"""

import hashlib
import os
import re
import sys

import tokenizer as tokenizers
from configurator import UserError
from run.files import write_json

CHUNK = 1 << 22  # characters of text held at a time


def prepare(paths, folder, tokenizer_name, val_fraction=0.1, source=""):
    """Writes the data set of the files' text into `folder`, and returns its meta. Raises UserError for a bad text."""
    source = str(source or paths[0])
    digest, n_characters, n_bytes = hashlib.sha256(), 0, 0
    for text in read(paths):
        encoded = text.encode("utf-8")
        digest.update(encoded)
        n_characters += len(text)
        n_bytes += len(encoded)
    n_train = int(n_characters * (1 - val_fraction))
    if n_train < 2 or n_characters - n_train < 2:
        raise UserError(f"{source} has {n_characters} characters: too few to split for training and validation")
    tokenizer = tokenizers.build(tokenizer_name, lambda: read(paths), lambda: whole_words(read(paths, 0, n_train)))
    meta = {"source": source, "sha256": digest.hexdigest(), "characters": n_characters, "bytes": n_bytes,
            "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "dtype": id_type(tokenizer)}
    folder.mkdir(parents=True, exist_ok=True)
    for split, start, stop in (("train", 0, n_train), ("val", n_train, n_characters)):
        meta[f"{split}_characters"] = stop - start
        meta[f"{split}_tokens"] = write_tokens(folder / f"{split}.bin.new", read(paths, start, stop), tokenizer)
    tokenizer.save(folder / "tokenizer.json.new")
    put_in_place(folder, ("train.bin", "val.bin", "tokenizer.json"), meta)
    return meta


def read(paths, start=0, stop=sys.maxsize):
    """Yields the characters start..stop of the files, piece by piece; a newline is put between files without one."""
    at, last = 0, "\n"
    for path in paths:
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                text = ("" if last.endswith("\n") else "\n") + file.read(CHUNK)
                while text and at < stop:
                    if at + len(text) > start:
                        yield text[max(0, start - at):stop - at]
                    at, last = at + len(text), text
                    text = file.read(CHUNK)
            except UnicodeDecodeError as error:  # counts from where its piece of the file starts
                offset = file.buffer.tell() - len(error.object) + error.start
                raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset:,};"
                                " convert it first, for instance: iconv -f LATIN1 -t UTF-8") from None


def whole_words(texts):
    """Moves the cuts between pieces to where a space follows a word, so that a BPE sees no word torn apart."""
    rest = ""
    for text in texts:
        text = rest + text
        last = re.match(r".*\S(?=\s\S)", text, re.DOTALL)
        cut = last.end() if last else len(text)
        yield text[:cut]
        rest = text[cut:]
    yield rest


def write_tokens(path, texts, tokenizer):
    """Writes the token ids of the texts, and returns how many there are."""
    count = 0
    with open(path, "wb") as file:
        for text in whole_words(texts):
            ids = stored(tokenizer.encode(text), tokenizer)
            ids.tofile(file)
            count += len(ids)
    return count


def stored(ids, tokenizer):
    """The ids as the files hold them."""
    assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size, "an id outside the vocabulary"
    return ids.astype(id_type(tokenizer))


def id_type(tokenizer):
    """The dtype of the ids in the files."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def put_in_place(folder, names, meta, last="meta.json"):
    """Renames each NAME.new of the folder to NAME; then writes and prints meta: without it they are not a data set."""
    (folder / last).unlink(missing_ok=True)
    for name in names:
        with open(folder / f"{name}.new", "rb+") as file:
            os.fsync(file.fileno())
        os.replace(folder / f"{name}.new", folder / name)
    write_json(folder / last, meta)
    numbers = [f"{name} = {value:,}" for name, value in meta.items() if isinstance(value, int)]
    print(f"{folder / last}: {', '.join(numbers)}", flush=True)
