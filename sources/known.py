"""The data sets known by name: where each one's raw material comes from, and how it is prepared when it is missing.

    python prepare.py shakespeare_char                  by hand; train.py does this by itself
    python prepare.py fineweb                           a corpus, which is tens of gigabytes: only by hand

A new one is a row in one of the tables below, and a data/<name>/README.md with its origin and licence.
"""

import hashlib
import os
import queue
import runpy
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
CONNECT_SECONDS = 5


@dataclass(frozen=True)
class Known:
    """A text that can be downloaded: one file, checked by size and SHA-256."""
    url: str
    size: int
    sha256: str
    tokenizer: str


TINY_SHAKESPEARE = dict(url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                        size=1_115_394, sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
KNOWN = {"shakespeare_char": Known(**TINY_SHAKESPEARE, tokenizer="char"),
         "shakespeare_gpt2": Known(**TINY_SHAKESPEARE, tokenizer="gpt2")}
BUILT_IN = "python_reference"  # the language reference that every CPython carries for its help()
GENERATED = {"shapes": "bpe:1600", "digits": "char"}  # images with questions, by data/<name>/generate.py: tokenizers
CORPORA = {  # on the hub: data set, folder of its parquet files, commit
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT", "9bb295ddab0e05d785b879661af7260fed5140fc"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),
    "openwebtext": ("Skylion007/openwebtext", "plain_text", "b4325f019c648b1641a1784748667e8b74e5e064")}
KNOWN_NAMES = (*KNOWN, BUILT_IN, *GENERATED, *CORPORA)


class Offline(UserError):
    """The network did not answer."""


def known_recipe(name):
    """(tokenizer, val_fraction) of a known data set."""
    if name in CORPORA:
        return "gpt2", 0.0005
    return KNOWN[name].tokenizer if name in KNOWN else GENERATED.get(name, "char"), 0.1


def locate(dataset):
    """The folder of a data set: a name stands for data/<name>, anything with a slash for itself."""
    return Path(dataset) if "/" in dataset or os.sep in dataset else DATA / dataset


def check_dataset(dataset):
    """Raises UserError that says how to prepare it if a data set is neither ready nor one that prepares itself."""
    if (locate(dataset) / "meta.json").exists():
        return
    if dataset in CORPORA:
        raise UserError(f"there is no data set at {locate(dataset)}: make it first with python prepare.py {dataset},"
                        " which downloads tens of gigabytes")
    if dataset not in KNOWN_NAMES:
        ready = sorted(path.parent.name for path in DATA.glob("*/meta.json"))
        raise UserError(f"there is no data set at {locate(dataset)}: make one with python prepare.py FILE"
                        f" --name={dataset} (ready: {', '.join(ready) or 'none'}; known: {', '.join(KNOWN_NAMES)})")


def ensure(dataset):
    """The name of a data set that is ready: `dataset`, prepared if it is a known one, or what stands in for it.

    Raises UserError as `check_dataset` does.
    """
    check_dataset(dataset)
    if (locate(dataset) / "meta.json").exists():
        return dataset
    return prepare_known(dataset, dataset, *known_recipe(dataset))


def prepare_known(name, target, tokenizer, val_fraction, image_size=48):
    """Prepares a known data set, no corpus, as data set `target`; returns the name of what there is then.

    That is the built-in text's where `target` can't be had without a network.
    """
    try:
        path, origin = raw_material(name)
    except Offline as error:
        if target != name:
            raise
        bar = "!" * 100
        print(f"\n{bar}\nNO NETWORK: {error}\nUsing the built-in text instead of {name}: Python's language reference,"
              f" as data set {BUILT_IN!r}.\nIts losses can't be compared with those of {name}. When you are online, run"
              f" again,\nor put the file at {DATA / name / 'input.txt'} yourself.\n{bar}\n", flush=True)
        return ensure(BUILT_IN)
    if name in GENERATED:
        from sources import images  # imports torch
        images.prepare(path, locate(target), tokenizer, val_fraction, image_size, origin)
    else:
        from sources import texts  # imports numpy
        texts.prepare([path], locate(target), tokenizer, val_fraction, origin)
    return target


def raw_material(name):
    """(path, origin) of a known data set that is no corpus: a text file, or a folder of images; made if need be."""
    if name in KNOWN:
        return known_text(name), KNOWN[name].url
    if name == BUILT_IN:
        version = ".".join(map(str, sys.version_info[:3]))
        return built_in_text(), f"pydoc_data.topics of Python {version}"
    folder, script = DATA / name / "source", f"data/{name}/generate.py"
    print(f"generating {folder}", flush=True)
    runpy.run_path(str(ROOT / script))["generate"](folder)
    return folder, script


def known_text(name):
    """The path of a known text: on disk already, or downloaded once; checked either way."""
    known, path = KNOWN[name], DATA / name / "input.txt"
    if not path.exists():
        download(known.url, path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != known.sha256:
        raise UserError(f"{path} is not the expected text ({len(content):,} bytes, SHA-256 {found[:12]}..., expected"
                        f" {known.size:,} bytes, {known.sha256[:12]}...): delete it and run again")
    return path


def built_in_text():
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


def download(url, path):
    """Fetches `url` into `path`, whole or not at all. Raises Offline if nothing answers within CONNECT_SECONDS.

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
