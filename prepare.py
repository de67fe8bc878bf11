"""Any text into a data set to train on: data/<name>/{train.bin, val.bin, tokenizer.json, meta.json}.

    python prepare.py my.txt                            a file; also a folder of .txt files, or a URL
    python prepare.py my.txt --tokenizer=bpe:4096       char (default), byte, gpt2, or a BPE trained on the text
    python prepare.py shakespeare_char                  a known data set (train.py does this by itself)
    python train.py config/shakespeare_char.py --dataset=my
    python prepare.py my_folder/ --image_size=48        images with a captions.jsonl; prepare_images.py says more
    python prepare.py my_folder/ --tokenizer=gpt2       documents in parquet or .jsonl files, or in billions from
    python prepare.py fineweb                           the hub; prepare_documents.py says more

The first 90 % of the characters are for training, the rest for validation. Text is UTF-8. Everything is read and
written piecewise, so the text may be larger than memory.
"""

import codecs
import hashlib
import os
import queue
import re
import runpy
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

from configurator import UserError, check_ranges, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    tokenizer: str = "char"  # char, byte, gpt2, or bpe:SIZE
    name: str = ""  # the data set's name, or a folder's path; default: from the source
    val_fraction: float = 0.1  # share of the characters or images, at the end, or of the documents, for validation
    image_size: int = 48  # pixels of both sides that images are resized to
    processes: int = 0  # that tokenize documents at the same time; 0: one per CPU core
    max_files: int = 0  # of documents to read, from the first; 0: all

    def __post_init__(self):
        check_ranges(self, image_size=1, processes=0, max_files=0)


if __name__ == "__main__":  # --help and typos answer before the slow imports
    SOURCES = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    sys.argv[1:] = [arg for arg in sys.argv[1:] if arg.startswith("-")] or ([] if SOURCES else ["--help"])
    SETTINGS, _ = from_command_line(Settings, __doc__)

import numpy as np

import tokenizer as tokenizers
from prepare_documents import folder_source, hub_source, write_shards
from tokenizer import write_json

DATA = Path(__file__).resolve().parent / "data"
CHUNK = 1 << 22  # bytes of text held at a time
CONNECT_SECONDS = 5


@dataclass(frozen=True)
class Known:
    """A data set that can be fetched: its one text file, checked by size and SHA-256."""
    url: str
    size: int
    sha256: str
    tokenizer: str


TINY_SHAKESPEARE = dict(url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                        size=1_115_394, sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
KNOWN = {"shakespeare_char": Known(**TINY_SHAKESPEARE, tokenizer="char"),
         "shakespeare_gpt2": Known(**TINY_SHAKESPEARE, tokenizer="gpt2")}
BUILT_IN = "python_reference"  # the language reference that every CPython carries for its help()
CORPORA = {  # on the hub: data set, folder of its parquet files, commit
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT", "9bb295ddab0e05d785b879661af7260fed5140fc"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),
    "openwebtext": ("Skylion007/openwebtext", "plain_text", "b4325f019c648b1641a1784748667e8b74e5e064")}
CORPUS_SETTINGS = "gpt2", 0.0005  # their tokenizer and val_fraction
GENERATED = {"shapes": "bpe:1600", "digits": "char"}  # images with questions, by data/<name>/generate.py: tokenizers


class Offline(UserError):
    """The network did not answer."""


# ----------------------------------------------------------------------------------------------------------------------
# Text in

def read(paths, start=0, stop=None):
    """Yields the characters start..stop of the files' joined text, piece by piece, without byte-order marks.

    A newline is put between files where there is none. Raises UserError for bytes that are not UTF-8.
    """
    at = 0
    for text in joined(paths):
        piece = text[max(0, start - at):None if stop is None else max(0, stop - at)]
        at += len(text)
        if piece:
            yield piece
        if stop is not None and at >= stop:
            return


def joined(paths):
    text = ""
    for path in paths:
        if text and not text.endswith("\n"):
            yield "\n"
        for piece in decoded(path):
            text = piece
            yield text


def decoded(path):
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            block = file.read(CHUNK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - (len(error.object) - len(block)) + error.start
                raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {at:,};"
                                " convert it first, for instance: iconv -f LATIN1 -t UTF-8") from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset += len(block)
            if text:
                yield text
            if not block:
                return


def whole_words(texts):
    """Moves the cuts between pieces to where a space follows a word, so that a BPE sees no word torn apart."""
    rest = ""
    for text in texts:
        text = rest + text
        cuts = [match.end() for match in re.finditer(r"\S(?=\s\S)", text[-10_000:])]
        cut = len(text) - len(text[-10_000:]) + cuts[-1] if cuts else len(text)
        yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest


# ----------------------------------------------------------------------------------------------------------------------
# Data set out

def prepare(paths, folder, tokenizer_name, val_fraction=0.1, source=""):
    """Writes the data set of the files' text into `folder`, and returns its meta.

    meta.json is written last: a folder without it is not a data set. Raises UserError for an empty text, one
    that is too short to split, or one that is not UTF-8.
    """
    check_fraction(val_fraction)
    digest, n_characters, n_bytes = hashlib.sha256(), 0, 0
    for text in read(paths):
        encoded = text.encode("utf-8")
        digest.update(encoded)
        n_characters, n_bytes = n_characters + len(text), n_bytes + len(encoded)
    n_train = int(n_characters * (1 - val_fraction))
    if n_characters == 0:
        raise UserError(f"{source or paths[0]} is empty: there is nothing to train on")
    if n_train < 2 or n_characters - n_train < 2:
        raise UserError(f"{source or paths[0]} has {n_characters} characters: too few to split for training and"
                        " validation")
    tokenizer = tokenizers.build(tokenizer_name, lambda: read(paths), lambda: whole_words(read(paths, 0, n_train)))
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    meta = {"source": str(source or paths[0]), "sha256": digest.hexdigest(), "characters": n_characters,
            "bytes": n_bytes, "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
            "dtype": np.dtype(dtype).name}
    folder.mkdir(parents=True, exist_ok=True)
    for split, start, stop in (("train", 0, n_train), ("val", n_train, n_characters)):
        meta[f"{split}_characters"] = stop - start
        meta[f"{split}_tokens"] = write_tokens(folder / f"{split}.bin.new", read(paths, start, stop), tokenizer, dtype)
    tokenizer.save(folder / "tokenizer.json.new")
    publish(folder, ("train.bin", "val.bin", "tokenizer.json"), meta)
    return meta


def prepare_pairs(path, folder, tokenizer_name="char", val_fraction=0.1, image_size=48, source=""):
    """Writes the data set of the folder `path`, images with a captions.jsonl, into `folder`, and returns its meta.

    Raises UserError for a row or an image that can't be used; a data set that was in `folder` stays as it is.
    """
    import prepare_images  # here, for text needs neither torch nor Pillow
    check_fraction(val_fraction)
    meta = {"kind": "image-text", "source": str(source or path),
            **prepare_images.write_pairs(path, folder, tokenizer_name, image_size, val_fraction)}
    publish(folder, prepare_images.FILES, meta)
    return meta


def prepare_documents(source, folder, tokenizer_name, val_fraction=0.1, processes=0):
    """Writes the data set of a prepare_documents.Source into `folder`, and returns its meta; goes on where it stopped.

    Raises UserError for documents that can't be used.
    """
    check_fraction(val_fraction)
    meta = write_shards(source, folder, tokenizer_name, val_fraction, processes)
    publish(folder, (), meta)
    return meta


def check_fraction(val_fraction):
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction = {val_fraction}: must lie between 0 and 1")


def publish(folder, names, meta):
    """Renames each NAME.new of the folder to NAME; meta.json comes last, and is missing meanwhile."""
    write_json(folder / "meta.json.new", meta)
    (folder / "meta.json").unlink(missing_ok=True)
    for name in (*names, "meta.json"):
        os.replace(folder / f"{name}.new", folder / name)


def write_tokens(path, texts, tokenizer, dtype):
    """Writes the token ids of the texts as raw `dtype`, and returns how many there are."""
    count, reported = 0, 0
    with open(path, "wb") as file:
        for text in whole_words(texts):
            ids = tokenizer.encode(text)
            if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size <= np.iinfo(dtype).max + 1:
                raise ValueError(f"token id {ids.max()} outside 0..{tokenizer.vocab_size - 1} or {dtype}")
            ids.astype(dtype).tofile(file)
            count += len(ids)
            if count - reported > 50_000_000:
                print(f"  {path.name}: {count:,} tokens so far", flush=True)
                reported = count
    return count


# ----------------------------------------------------------------------------------------------------------------------
# Where texts come from

def download(url, path):
    """Fetches `url` into `path`, atomically. Raises Offline if nothing answers within CONNECT_SECONDS.

    The connection is opened in a thread: a name look-up has no time-out of its own.
    """
    answers = queue.Queue()

    def connect():
        try:
            answers.put(urllib.request.urlopen(url, timeout=CONNECT_SECONDS))
        except Exception as error:
            answers.put(error)

    print(f"downloading {url}", flush=True)
    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_SECONDS + 1)
    except queue.Empty:
        answer = TimeoutError(f"no answer in {CONNECT_SECONDS} s")
    if isinstance(answer, urllib.error.HTTPError):
        raise UserError(f"{url}: the server answered {answer.code} {answer.reason}")
    if isinstance(answer, ValueError):
        raise UserError(f"{url} is not a URL that can be fetched: {answer}")
    if isinstance(answer, Exception):
        raise Offline(f"{url} can't be reached: {getattr(answer, 'reason', answer)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with answer, open(part, "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
    except (TimeoutError, ConnectionError, urllib.error.URLError) as error:
        raise Offline(f"{url}: the download broke off: {error}") from None
    os.replace(part, path)


def fetch_known(name):
    """The path of a known data set's text: on disk already, or downloaded once; checked either way."""
    known, path = KNOWN[name], DATA / name / "input.txt"
    if not path.exists():
        download(known.url, path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != known.sha256:
        raise UserError(f"{path} is not the expected text ({len(content):,} bytes, SHA-256 {found[:12]}..., expected"
                        f" {known.size:,} bytes, {known.sha256[:12]}...): delete it and run again")
    return path


def write_built_in():
    """The path of the built-in text, written out from Python's own documentation."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python lacks pydoc_data, so there is no built-in text either:"
                        " use a text of your own, python prepare.py my.txt") from None
    path = DATA / BUILT_IN / "input.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n", encoding="utf-8", newline="\n")
    return path


def generate_known(name):
    """The folder of a generated data set's images and captions.jsonl, made anew by data/<name>/generate.py."""
    folder = DATA / name / "source"
    print(f"generating {folder}", flush=True)
    script = Path(__file__).resolve().parent / "data" / name / "generate.py"
    runpy.run_path(str(script))["generate"](folder)
    return folder


def prepare_known(name):
    """Prepares a known data set; without a network, the built-in text instead. Returns the name of what there is."""
    if name in GENERATED:
        source = f"data/{name}/generate.py"
        report(prepare_pairs(generate_known(name), DATA / name, GENERATED[name], source=source), name)
        return name
    if name == BUILT_IN:
        version = ".".join(map(str, sys.version_info[:3]))
        report(prepare([write_built_in()], DATA / name, "char", source=f"pydoc_data.topics of Python {version}"), name)
        return name
    try:
        path = fetch_known(name)
    except Offline as error:
        bar = "!" * 100
        print(f"\n{bar}\nNO NETWORK: {error}\nUsing the built-in text instead of {name}: Python's language reference,"
              f" as data set {BUILT_IN!r}.\nIts losses can't be compared with those of {name}. When you are online, run"
              f" again,\nor put the file at {DATA / name / 'input.txt'} yourself.\n{bar}\n", flush=True)
        return BUILT_IN if (DATA / BUILT_IN / "meta.json").exists() else prepare_known(BUILT_IN)
    report(prepare([path], DATA / name, KNOWN[name].tokenizer, source=KNOWN[name].url), name)
    return name


def known_names():
    return *KNOWN, BUILT_IN, *GENERATED, *CORPORA


def locate(dataset):
    """The folder of a data set: a name stands for data/<name>, anything with a slash for itself."""
    return Path(dataset) if "/" in dataset or os.sep in dataset else DATA / dataset


def ensure(dataset):
    """The name of a data set that is ready: `dataset`, prepared if it is a known one, or what stands in for it.

    Raises UserError as `check_dataset` does.
    """
    check_dataset(dataset)
    return dataset if (locate(dataset) / "meta.json").exists() else prepare_known(dataset)


def check_dataset(dataset):
    """Raises UserError that says how to prepare it if a data set is neither ready nor one that prepares itself."""
    if (locate(dataset) / "meta.json").exists():
        return
    if dataset in CORPORA:
        raise UserError(f"there is no data set at {locate(dataset)}: make it first with python prepare.py {dataset},"
                        " which downloads tens of gigabytes")
    if dataset not in known_names():
        ready = sorted(path.parent.name for path in DATA.glob("*/meta.json"))
        raise UserError(f"there is no data set at {locate(dataset)}: make one with python prepare.py FILE"
                        f" --name={dataset} (ready: {', '.join(ready) or 'none'}; known: {', '.join(known_names())})")


def report(meta, name):
    folder = locate(name)
    if meta.get("kind") == "image-text":
        print(f"{folder}: {meta['train_rows']:,} training rows on {meta['train_images']:,} images,"
              f" {meta['val_rows']:,} validation rows on {meta['val_images']:,}; {meta['image_size']} x"
              f" {meta['image_size']} pixels, {meta['vocab_size']:,} kinds of tokens", flush=True)
        return
    print(f"{folder}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens"
          f" of {meta['vocab_size']:,} kinds ({meta['tokenizer']})", flush=True)


def main(settings, sources):
    if len(sources) != 1:
        raise UserError(f"one source at a time, not {len(sources)}: {' '.join(sources)};"
                        " put several texts into a folder")
    source, path = sources[0], Path(sources[0])
    name = settings.name or re.sub(r"\W+", "_", Path(source.rstrip("/")).stem)
    known = source in known_names() and not path.exists()
    as_known = known and not settings.name
    if as_known:
        check_known(source, settings)
    documents = find_documents(source, known)
    if documents:
        tokenizer, fraction = CORPUS_SETTINGS if as_known else (settings.tokenizer, settings.val_fraction)
        documents = replace(documents, files=documents.files[:settings.max_files or None])
        report(prepare_documents(documents, locate(name), tokenizer, fraction, settings.processes), name)
    elif as_known:
        name = prepare_known(source)
    elif (path / "captions.jsonl").exists() or source in GENERATED and known:
        pairs = generate_known(source) if known else path
        report(prepare_pairs(pairs, locate(name), settings.tokenizer, settings.val_fraction, settings.image_size,
                             f"data/{source}/generate.py" if known else source), name)
    else:
        paths = find_texts(source, name)
        report(prepare(paths, locate(name), settings.tokenizer, settings.val_fraction, source), name)
    images = (locate(name) / "images.bin").exists()
    recipe = "gpt2_124m" if documents else "vlm_digits" if source == "digits" else "vlm_shapes" if images \
        else "shakespeare_char"
    print(f"train on it: python train.py config/{recipe}.py --dataset={name}")


def check_known(name, settings):
    """A known data set is one and the same for all: raises UserError for settings that make another one of it."""
    tokenizer, fraction = CORPUS_SETTINGS if name in CORPORA else (
        KNOWN[name].tokenizer if name in KNOWN else GENERATED.get(name, "char"), Settings.val_fraction)
    for key, value in (("tokenizer", tokenizer), ("val_fraction", fraction), ("image_size", Settings.image_size)):
        if getattr(settings, key) not in (value, getattr(Settings, key)):
            raise UserError(f"{name} is a data set with {key} = {value}: add --name=NEW for another one")


def find_documents(source, known):
    """The prepare_documents.Source that a source stands for; None if it isn't one of documents."""
    if known:
        return hub_source(*CORPORA[source]) if source in CORPORA else None
    path = Path(source)
    documents = folder_source(path) if path.exists() and not (path / "captions.jsonl").exists() else None
    if documents and path.is_dir() and (text := next(path.rglob("*.txt"), None)):
        raise UserError(f"{source} holds documents ({documents.files[0][0]}) and texts ({text.name}): which are meant?"
                        " Put them into folders of their own")
    return documents


def find_texts(source, name):
    """The text files that a source stands for; a URL is fetched for the data set `name`."""
    path = Path(source)
    if "://" in source:
        download(source, locate(name) / "input.txt")
        return [locate(name) / "input.txt"]
    if path.is_dir():
        if not (paths := sorted(path.rglob("*.txt"))):
            raise UserError(f"the folder {source} holds no .txt, .parquet or .jsonl files")
        return paths
    if path.is_file():
        return [path]
    if source in KNOWN:
        return [fetch_known(source)]
    raise UserError(f"{source} is no file, no folder, no URL, and none of {', '.join(known_names())}")


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS, SOURCES)
