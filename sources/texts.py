"""Makes a data set of texts: train.bin, val.bin, tokenizer.json, meta.json. Also: helpers for all kinds of data sets.

    python prepare.py my.txt                            also a folder of texts with any suffix, or a URL
    python prepare.py src/ notes.md --name=mine         several; --files="*.py" selects inside folders

Text must be UTF-8. HTML is reduced to the text that a page shows. The end of each file is for validation. Files are
read and written piece by piece, so they may be larger than memory.
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

import numpy as np

import tokenizer as tokenizers
from configurator import USERS_ERRORS, UserError
from machine.terminal import printable, progress, watched
from run.files import write_json
from run.lock import owned

CHUNK = 1 << 22  # characters of text held at a time
SAMPLE = 20_000_000  # characters that a BPE learns from, at most
SAMPLE_PIECE = 1 << 16  # characters of the sample that come from one place, at least, unless a text is shorter
LARGEST = 5  # files whose shares of the characters are printed

# ----------------------------------------------------------------------------------------------------------------------
# Which files are texts

FIRST_BYTES = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
               b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"%PDF-": "PDF", b"{\\rtf": "RTF"}
ABOUT = ("README", "LICENSE", "LICENCE", "COPYING", "NOTICE")  # texts that may lie beside documents
MOST_NAMED = 10  # files left out that are listed by name


def find(paths, document_suffixes, pattern=""):
    """Finds files to read. Returns (texts, files of documents), two lists of paths; one of the two is empty.

    paths: files and folders. document_suffixes: of files of documents, such as ".jsonl". pattern: as for `wanted`, for
    files in folders. Prints what is taken and what is left out. Raises UserError if there are both texts and documents.
    """
    texts, documents, left_out = [], [], []
    for path in paths:
        for file in files_in(path, pattern) if path.is_dir() else [path]:
            if file.suffix.lower() in document_suffixes and file.is_file():
                documents.append(file)
            elif path.is_dir() and (why := why_no_text(file)):  # a file named by itself is checked when it is read
                left_out.append(why)
            else:
                texts.append(file)
    if documents:  # a README or licence beside documents is about them
        left_out += [f"{file} is not a document" for file in texts if file.name.upper().startswith(ABOUT)]
        texts = [file for file in texts if not file.name.upper().startswith(ABOUT)]
    if documents and texts:
        suffix = documents[0].suffix
        raise UserError(f"there are documents ({len(documents):,}, such as {documents[0]}) and texts ({len(texts):,},"
                        f" such as {texts[0]}): choose one kind, --files=\"*{suffix}\" or --files=\"!*{suffix}\"")
    if paths != texts + documents:
        print_choice(texts + documents, left_out)
    return texts, documents


def print_choice(taken, left_out):
    """Prints how many files of each suffix are taken (paths), and why others are left out (sentences)."""
    suffixes = collections.Counter(file.suffix.lower() or "no suffix" for file in taken)
    print(printable(f"taken: {', '.join(f'{n:,} {suffix}' for suffix, n in suffixes.most_common()) or 'nothing'}"))
    for why in left_out[:MOST_NAMED]:
        print(printable(f"left out: {why}"))
    if len(left_out) > MOST_NAMED:
        print(f"left out: {len(left_out) - MOST_NAMED:,} more")


def files_in(folder, pattern):
    """Yields the paths of all files below the folder, sorted, that `wanted` accepts; hidden ones are left out.

    A folder that is a link or can't be read counts as a file here, so that the caller can report it as left out.
    """
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        is_open = path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK)  # other folders are reported
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if not is_open and not is_hidden and wanted(inside, pattern):
            yield path


def wanted(path, pattern):
    """True if a path inside a folder fits a pattern such as "*.py,*.md" or "!*.csv" (all but .csv); "" fits all."""
    def matches(glob):
        return fnmatch.fnmatchcase(path.as_posix().lower() if "/" in glob else path.name.lower(), glob.lower())

    globs = pattern.split(",") if pattern else []
    included = [glob for glob in globs if not glob.startswith("!")] or ["*"]
    excluded = [glob[1:] for glob in globs if glob.startswith("!")]
    return any(map(matches, included)) and not any(map(matches, excluded))


def why_no_text(path):
    """A sentence that says why the file is not plain text in UTF-8; "" if it is."""
    try:
        if not path.is_file():
            return f"{path} is not a readable file, or is a link to a folder"
        for _ in read_file(path):
            pass
    except (UserError, OSError) as error:
        return str(error)
    return ""


def check_start(path, start):
    """Raises UserError if the first bytes of a file, or its suffix, show that it is not plain text in UTF-8."""
    kind = next((kind for first, kind in FIRST_BYTES.items() if start.startswith(first)), "")
    remedy = "extract the text first"
    if kind.startswith("UTF"):
        remedy = f"run iconv -f {kind} -t UTF-8 {shlex.quote(str(path))} > NEW.txt"
    elif b"\0" in start:
        kind = kind or "binary"
    elif path.suffix.lower() in (".json", ".ipynb"):
        kind, remedy = "JSON", "write a .jsonl with one object per line"
    if kind:
        raise UserError(f"{path} is {kind}, not plain text in UTF-8: {remedy}")


def stamp(path):
    """[size in bytes, time of the last change in ns]. On Unix, restoring an old date (cp -p) counts as a change."""
    status = os.stat(path)
    return [status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)]


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def read_file(path, keep=False):
    """Yields the text of a file in pieces, for HTML only what a page shows. keep: line ends stay; else each is \\n.

    Raises UserError if the file is not plain text in UTF-8.
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
        except UnicodeDecodeError as error:  # error.object holds the last bytes read, and error.start is an index in it
            offset = raw.tell() - len(error.object) + error.start
            raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset:,};"
                            " convert it first, for instance: iconv -f LATIN1 -t UTF-8 OLD > NEW.txt") from None


class Page(HTMLParser):
    """Parses HTML. text: what the page shows, a line for each block; outside <pre>, white space becomes one space."""
    HIDDEN = ("script", "style", "template")
    INLINE = ("a abbr b bdi bdo big cite code data del dfn em font i img input ins kbd label mark q rp rt ruby s samp"
              " small span strike strong sub sup time tt u var wbr").split()

    def __init__(self, html):
        super().__init__()
        self.open, self.parts = collections.Counter(), []
        self.feed(html)
        self.close()
        self.text = re.sub(r"( ?\n)+( (?! ))?", "\n", "".join(self.parts)).strip() + "\n"

    def handle_starttag(self, tag, attrs):
        self.open[tag] += 1
        self.parts.append(self.gap(tag))

    def handle_endtag(self, tag):
        self.open[tag] = max(0, self.open[tag] - 1)
        self.parts.append(self.gap(tag))

    def gap(self, tag):
        return " " if tag in ("td", "th") else "" if tag in self.INLINE else "\n"

    def handle_data(self, data):
        if not any(self.open[tag] for tag in self.HIDDEN):
            self.parts.append(data if self.open["pre"] else re.sub(r"\s+", " ", data))


def read(parts, keep=False):
    """Yields in pieces the text of parts (path, start, stop: characters). Puts a newline before a part if the text
    before it does not end with one. keep: see `read_file`."""
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


def with_progress(texts, total, what):
    """Yields the texts, and shows a progress line. total: the number of characters."""
    with progress(total, what, " characters") as bar:
        for text in texts:
            yield text
            bar.update(len(text))


def whole_words(texts):
    """Yields the texts with the cuts between them moved to ends of words, so that a BPE sees whole words."""
    rest = ""
    for text in texts:
        text = rest + text
        last = re.match(r".*\S(?=\s\S)", text, re.DOTALL)
        cut = last.end() if last else len(text)
        yield text[:cut]
        rest = text[cut:]
    yield rest


def sample(texts, total):
    """Yields the texts, or SAMPLE characters spread over them, for a BPE to learn from. total: their characters."""
    due, seen, taken = 0, 0, 0  # characters
    for text in texts:
        seen += len(text)
        due += len(text) * min(1, SAMPLE / total)
        if due >= min(len(text), SAMPLE_PIECE):
            piece = text[:int(due)]
            yield piece
            due -= len(piece)
            taken += len(piece)
        if taken >= SAMPLE:
            break
    if taken < seen:
        print(f"the tokenizer learns from {taken:,} characters that are spread over {seen:,}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Writing

def prepare(paths, folder, tokenizer_name, val_fraction=0.1, source="", newlines="one"):
    """Writes a data set of the files; returns its meta. The last val_fraction of each file is for validation.

    source: the origin that meta.json names; "": paths[0]. newlines: see prepare.py. Raises UserError for a bad text.
    """
    source, keep = str(source or paths[0]), newlines == "keep"
    with writing(folder):
        stamps = list(map(stamp, paths))
        counts = [sum(map(len, read_file(path, keep))) for path in watched(paths, "counting characters")]
        cuts = [int(count * (1 - val_fraction)) for count in counts]
        parts = {"train": [(path, 0, cut) for path, cut in zip(paths, cuts)], "val": list(zip(paths, cuts, counts))}
        total, n_train = sum(counts), sum(cuts)
        if n_train < 2 or total - n_train < 2:
            raise UserError(f"{source} has {total} characters: too few to split into training and validation; add text")
        largest = sorted(zip(counts, paths), reverse=True)[:LARGEST]
        shares = printable(", ".join(f"{path.name} {100 * count / total:.0f} %" for count, path in largest))
        print(f"for validation: the last {100 * val_fraction:.3g} % of each file; the largest: {shares}", flush=True)
        everything = with_progress(read(parts["train"] + parts["val"], keep), total, "characters")
        training = sample(whole_words(read(parts["train"], keep)), n_train)
        tokenizer = tokenizers.build(tokenizer_name, lambda: everything, lambda: training)
        meta = {"source": source, "sha256": "", "characters": 0, "bytes": 0,
                "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "dtype": id_type(tokenizer)}
        digest = hashlib.sha256()
        for split, count in (("train", n_train), ("val", total - n_train)):
            pieces = with_progress(read(parts[split], keep), count, f"tokens for {split}")
            characters, n_bytes, n_tokens = write_tokens(folder / f"{split}.bin.new", pieces, tokenizer, digest)
            meta["characters"] += characters
            meta["bytes"] += n_bytes
            meta[f"{split}_characters"], meta[f"{split}_tokens"] = characters, n_tokens
        if stamps != list(map(stamp, paths)):
            raise UserError(f"{source} was changed while it was read: run again")
        meta["sha256"] = digest.hexdigest()
        tokenizer.save(folder / "tokenizer.json.new")
        return finish(folder, ("train.bin", "val.bin", "tokenizer.json"), meta)


@contextlib.contextmanager
def writing(folder):
    """A context that makes the folder and locks it for this process. At its end, every .new in the folder is removed,
    and so is a folder that was made for nothing.

    Raises UserError if another process has the folder, or the disk is full.
    """
    is_new = not folder.exists()
    with owned(folder, "name", "been preparing a data set"):
        try:
            yield
        except OSError as error:
            if error.errno not in USERS_ERRORS:
                raise
            raise UserError(f"{error.filename or folder} can't be written: {error.strerror}") from None
        finally:
            for path in folder.glob("*.new"):
                path.unlink(missing_ok=True)
            if is_new and [path.name for path in folder.iterdir()] == ["run.lock"]:
                with contextlib.suppress(OSError):  # Windows deletes no open file
                    (folder / "run.lock").unlink()
                    folder.rmdir()


def write_tokens(path, texts, tokenizer, digest):
    """Writes the token ids of the texts. Returns [characters, bytes, tokens]. digest: updated with the text's UTF-8."""
    counts = np.zeros(3, dtype=np.int64)
    with open(path, "wb") as file:
        for text in whole_words(texts):
            ids, encoded = stored(tokenizer.encode(text), tokenizer), text.encode("utf-8")
            file.write(ids.tobytes())
            digest.update(encoded)
            counts += len(text), len(encoded), len(ids)
    return counts.tolist()


def stored(ids, tokenizer):
    """The array `ids`, converted to the dtype of the .bin files."""
    assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size, "an id outside the vocabulary"
    return ids.astype(id_type(tokenizer))


def id_type(tokenizer):
    """The dtype of the ids in the .bin files, by name: "uint16" or "uint32"."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def put_in_place(folder, names, record_path, record):
    """Renames each NAME.new in the folder to NAME, then writes the record: without it, the files don't count."""
    record_path.unlink(missing_ok=True)
    for name in names:
        with open(folder / f"{name}.new", "rb+") as file:
            os.fsync(file.fileno())
        os.replace(folder / f"{name}.new", folder / name)
    write_json(record_path, record)


def finish(folder, names, meta):
    """Completes a data set: renames each NAME.new in the folder to NAME, writes and prints the meta, and returns it."""
    put_in_place(folder, names, folder / "meta.json", meta)
    numbers = [f"{name} = {value:,}" for name, value in meta.items() if type(value) is int]  # no bool
    print(printable(f"{folder / 'meta.json'}: {', '.join(numbers)}"), flush=True)
    return meta
