"""Texts into a data set: train.bin, val.bin, tokenizer.json, meta.json; and what data sets of all kinds share.

    python prepare.py my.txt                            also a folder of texts with any suffix, or a URL
    python prepare.py src/ notes.md --name=mine         several; --files="*.py": of a folder only these

Text is UTF-8, and of HTML what a page shows. The end of each file is for validation. Text is read and written piece by
piece, so it may be larger than memory.
"""

import collections
import contextlib
import fnmatch
import hashlib
import io
import os
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

import tokenizer as tokenizers
from configurator import USERS_ERRORS, UserError
from machine.terminal import progress
from run.files import write_json
from run.lock import owned

CHUNK = 1 << 22  # characters of text held at a time
SAMPLE = 20_000_000  # characters that a BPE learns from, at most
LARGEST = 5  # files whose shares of a data set are said
SAMPLE_PIECE = 1 << 16  # characters of that which come from one place, at least, unless a file is shorter

# ----------------------------------------------------------------------------------------------------------------------
# Which files are texts

FIRST_BYTES = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
               b"\x1f\x8b": "gzip", b"BZh9": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"%PDF-": "PDF",
               b"PK\x03\x04": "zip (as .docx, .xlsx and .epub are)", b"{\\rtf": "RTF", b"SQLite format 3": "SQLite",
               b"\x89PNG": "a picture", b"GIF8": "a picture", b"\xff\xd8\xff": "a picture"}
ZEROS = {(0, 1, 0, 1): "UTF-16LE", (1, 0, 1, 0): "UTF-16BE", (0, 1, 1, 1): "UTF-32LE", (1, 1, 1, 0): "UTF-32BE"}
MOST_NAMED = 10  # of the files that were left out


def find(paths, document_suffixes, pattern=""):
    """(texts, files of documents) that are named, or lie in the folders among the paths; one of the two is empty.

    pattern: which files of a folder count, as in "*.py"; empty: all. Prints what was taken, and what was left out.
    Raises UserError where there are texts and documents.
    """
    texts, documents, left_out = [], [], []
    for path in paths:
        for file in files_in(path, pattern, left_out) if path.is_dir() else [path]:
            if file.suffix.lower() in document_suffixes and file.exists() and not file.is_dir():
                documents.append(file)
            elif why := file != path and why_no_text(file):
                left_out.append(why)
            else:
                texts.append(file)
    if documents:
        left_out += [f"{file} is a text, and the others are documents" for file in texts if is_beside(file)]
        texts = [file for file in texts if not is_beside(file)]
    if documents and texts:
        raise UserError(f"there are documents ({documents[0]}) and texts ({texts[0]}): say which files of a folder"
                        f" count, such as --files=\"*{documents[0].suffix}\" or --files=\"*{texts[0].suffix}\"")
    if paths != (taken := texts + documents):
        suffixes = collections.Counter(file.suffix.lower() or "no suffix" for file in taken)
        print(f"taken: {', '.join(f'{n:,} {suffix}' for suffix, n in suffixes.most_common()) or 'nothing'}")
    for why in left_out[:MOST_NAMED]:
        print(f"left out: {why}")
    if len(left_out) > MOST_NAMED:
        print(f"left out: {len(left_out) - MOST_NAMED:,} more")
    return texts, documents


def is_beside(file):
    return file.name.upper().startswith(("README", "LICENSE", "LICENCE", "COPYING", "NOTICE"))


def files_in(folder, pattern, left_out):
    """The files in the folder and below, in order, that match the pattern and are not hidden.

    Why a folder can't be listed is added to left_out.
    """
    def failed(error):
        left_out.append(f"{error.filename} can't be read: {error.strerror}")

    found = []
    for place, folders, names in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if name[0] != "."]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]  # which os.walk does not follow
        found += [Path(place, name) for name in names + links if name[0] != "."]
    names = {path: path.relative_to(folder).as_posix() if "/" in pattern else path.name for path in found}
    return sorted(path for path in found if fnmatch.fnmatchcase(names[path].lower(), (pattern or "*").lower()))


def why_no_text(path):
    """Why the file is no text of UTF-8; "" if it is one."""
    try:
        if not path.is_file():
            return f"{path} is {'a link to a folder' if path.is_dir() else 'no regular file, or a link to nothing'}"
        for _ in read_file(path):
            pass
    except (UserError, OSError) as error:
        return str(error)
    return ""


def check_start(path, start):
    """Raises UserError if a file that starts with these bytes is no text of UTF-8."""
    often = tuple(int(start[i::4].count(0) > len(start) / 8) for i in range(4))  # zeros, at each fourth byte
    kind = next((kind for first, kind in FIRST_BYTES.items() if start.startswith(first)), ZEROS.get(often))
    kind = kind or "JSON" * (path.suffix.lower() in (".json", ".ipynb")) or "binary" * (b"\0" in start)
    remedy = {"JSON": "write a row on each line, as .jsonl", "a picture": "pictures need a captions.jsonl"}.get(kind)
    if kind.startswith("UTF"):
        remedy = f"iconv -f {kind} -t UTF-8 {shlex.quote(str(path))} > NEW.txt"
    if kind:
        raise UserError(f"{path} is {kind}, and no text of UTF-8: {remedy or 'take the text out of it first'}")


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def read_file(path, keep=False):
    """Yields the text of a file, piece by piece; of HTML what it shows. keep: line ends stay; else each is \\n.

    Raises UserError if it is no text of UTF-8.
    """
    with open(path, "rb") as raw:
        start = raw.read(4096)
        check_start(path, start)
        raw.seek(0)
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="" if keep else None)
        try:
            if path.suffix.lower() in (".html", ".htm", ".xhtml") or re.match(rb"\s*<(!doctype )?html", start, re.I):
                yield Page(file.read()).text
            while text := file.read(CHUNK):
                yield text
        except UnicodeDecodeError as error:  # counts from where its piece of the file starts
            offset = raw.tell() - len(error.object) + error.start
            raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset:,};"
                            " convert it first, for instance: iconv -f LATIN1 -t UTF-8 OLD > NEW.txt") from None


class Page(HTMLParser):
    """What a page of HTML shows, as text: a line for each block, and outside <pre> one blank for all white space."""
    HIDDEN = ("script", "style", "template")
    INLINE = ("a abbr b bdi bdo big cite code data del dfn em font i img input ins kbd label mark q rp rt ruby s samp"
              " small span strike strong sub sup time tt u var wbr").split()

    def __init__(self, html):
        super().__init__()
        self.open, self.parts = collections.Counter(), []
        self.feed(html)
        self.close()
        self.text = re.sub(r"( ?\n)+( (?! ))?", "\n", "".join(self.parts)).strip() + "\n"

    def handle_starttag(self, tag, attrs, count=1):
        self.open[tag] += count
        self.parts.append(" " if tag in ("td", "th") else "" if tag in self.INLINE else "\n")

    def handle_endtag(self, tag):
        self.handle_starttag(tag, (), -1 if self.open[tag] else 0)

    def handle_data(self, data):
        if not any(self.open[tag] for tag in self.HIDDEN):
            self.parts.append(data if self.open["pre"] else re.sub(r"\s+", " ", data))


def read(parts, keep=False):
    """Yields the text of the parts of files, (path, first character, last), piece by piece.

    A newline is put between parts without one.
    """
    last = "\n"
    for path, start, stop in parts:
        at, gap = 0, "" if last.endswith("\n") else "\n"
        for text in read_file(path, keep):
            if piece := text[max(0, start - at):max(0, stop - at)]:
                yield gap + piece
                last, gap = piece, ""
            at += len(text)
            if at >= stop:
                break


def shown(texts, total, what):
    """The texts, with a line of progress. total: their characters."""
    with progress(total, what, " characters") as bar:
        for text in texts:
            yield text
            bar.update(len(text))


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


def sample(texts, total):
    """Of texts of `total` characters what a BPE learns from: all, or SAMPLE characters that are spread over them."""
    share, due = min(1, SAMPLE / total), 0
    if share < 1:
        print(f"the tokenizer learns from {SAMPLE:,} of {total:,} training characters, from all parts", flush=True)
    for text in texts:
        due += share * len(text)
        if due >= min(len(text), SAMPLE_PIECE):
            yield text[:int(due)]
            due -= min(len(text), int(due))


# ----------------------------------------------------------------------------------------------------------------------
# Writing

def prepare(paths, folder, tokenizer_name, val_fraction=0.1, source="", newlines="one"):
    """Writes the data set of the files' text into `folder`, and returns its meta. Raises UserError for a bad text."""
    source, keep = str(source or paths[0]), newlines == "keep"
    counts = count_characters(paths, keep)
    cuts = [int(count * (1 - val_fraction)) for count in counts]
    parts = {"train": [(path, 0, cut) for path, cut in zip(paths, cuts)], "val": list(zip(paths, cuts, counts))}
    total, n_train = sum(counts), sum(cuts)
    if n_train < 2 or total - n_train < 2:
        raise UserError(f"{source} has {total} characters: too few to split for training and validation")
    print(f"for validation: the last {100 * val_fraction:.3g} % of {in_shares(paths, counts)}", flush=True)
    tokenizer = tokenizers.build(tokenizer_name,
                                 lambda: shown(read(parts["train"] + parts["val"], keep), total, "characters"),
                                 lambda: sample(whole_words(read(parts["train"], keep)), n_train))
    meta = {"source": source, "sha256": "", "characters": 0, "bytes": 0,
            "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "dtype": id_type(tokenizer)}
    digest = hashlib.sha256()
    names = ("train.bin", "val.bin", "tokenizer.json")
    with owned(folder, "name", "prepared a data set"), new_files(folder, *names):
        for split, count in (("train", n_train), ("val", total - n_train)):
            text = shown(read(parts[split], keep), count, f"tokens for {split}")
            characters, n_bytes, n_tokens = write_tokens(folder / f"{split}.bin.new", text, tokenizer, digest)
            meta["characters"] += characters
            meta["bytes"] += n_bytes
            meta[f"{split}_characters"], meta[f"{split}_tokens"] = characters, n_tokens
        meta["sha256"] = digest.hexdigest()
        tokenizer.save(folder / "tokenizer.json.new")
        put_in_place(folder, names, meta)
    return meta


def count_characters(paths, keep):
    """How many characters each file has."""
    counts = []
    with progress(sum(path.stat().st_size for path in paths), "counting", "B") as bar:
        for path in paths:
            counts.append(0)
            for text in read_file(path, keep):
                counts[-1] += len(text)
                bar.update(len(text.encode("utf-8")))
    return counts


def in_shares(paths, counts):
    """The files in words, with the shares that the largest have of all characters."""
    if len(paths) == 1:
        return str(paths[0])
    largest = sorted(zip(counts, paths), key=lambda row: -row[0])[:LARGEST]
    shares = ", ".join(f"{path.name} {100 * count / sum(counts):.2g} %" for count, path in largest)
    return f"each of {len(paths):,} files; the largest shares of both splits: {shares}"


@contextlib.contextmanager
def new_files(folder, *names):
    """Makes the folder. Removes each NAME.new in it should what is inside fail; a full disk is a UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in USERS_ERRORS:
            raise
        what = error.filename or f"{folder} can't be written"
        raise UserError(f"{what}: {error.strerror}") from None
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                (folder / f"{name}.new").unlink()


def write_tokens(path, texts, tokenizer, digest):
    """Writes the token ids of the texts; returns how many characters, bytes of UTF-8, and tokens there are."""
    counts = np.zeros(3, dtype=np.int64)
    with open(path, "wb") as file:
        for text in whole_words(texts):
            ids, encoded = stored(tokenizer.encode(text), tokenizer), text.encode("utf-8")
            file.write(ids.tobytes())
            digest.update(encoded)
            counts += len(text), len(encoded), len(ids)
    return counts.tolist()


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
