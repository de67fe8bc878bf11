"""Raw material into a data set to train on: data/<name>/{train.bin, val.bin, tokenizer.json, meta.json}.

    python prepare.py my.txt                            a file; also a folder of texts of any suffix, or a URL
    python prepare.py src/ a.md --name=mine             several; --files="*.py,*.md" or "!*.csv": of folders only these
    python prepare.py my.txt --tokenizer=bpe:4096       char (default), byte, gpt2, or a BPE trained on the text
    python prepare.py my.txt --tokenizer=out            the tokenizer of a model, to go on from it or to score it
    python prepare.py shakespeare_char                  a known data set (train.py does this by itself)
    python prepare.py my_folder/ --image_size=48        images with a captions.jsonl; sources/images.py says more
    python prepare.py my_folder/ --tokenizer=gpt2       documents in .parquet, .jsonl, .csv or .tsv files, or in
    python prepare.py fineweb                           billions from the hub; sources/documents.py says more

Text is UTF-8; the first 90 % of each file is for training, the rest for validation. It may be larger than memory.
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from configurator import UserError, check_idle, check_ranges, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    tokenizer: str = "char"  # char, byte, gpt2, bpe:SIZE; or a tokenizer.json, a run's or a published model's folder
    name: str = ""  # the data set's name, or a folder's path; default: from the source
    files: str = ""  # which files of a folder count, such as "*.py,*.md" or "!*.csv"; default: all that can be read
    val_fraction: float = 0.1  # share of each file's characters or of the images, at the end, or of the documents
    newlines: Literal["one", "keep"] = "one"  # of texts: Windows' line ends become one newline, or stay
    image_size: int = 48  # pixels of both sides that images are resized to
    column: str = "text"  # of tables: where the documents, or the captions of images, are
    processes: int = 0  # that tokenize documents at the same time; 0: one per CPU core
    max_files: int = 0  # of documents to read, from the first; 0: all

    def __post_init__(self):
        check_ranges(self, image_size=1, processes=0, max_files=0)
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction = {self.val_fraction}: must lie between 0 and 1")


if __name__ == "__main__":  # --help and typos answer before the slow imports
    SOURCES = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    sys.argv[1:] = [arg for arg in sys.argv[1:] if arg.startswith("-")] or ([] if SOURCES else ["--help"])
    SETTINGS, _ = from_command_line(Settings, __doc__)

from machine.terminal import printable
from sources import documents, images, texts
from sources.known import CORPORA, GENERATED, TOKENIZERS, claim, download, locate, prepare_known

GPT2_TOKENS = 100_000_000  # from which on a GPT-2 from scratch is worth its while
ONLY = {  # the settings that some kinds of sources alone have
    "texts": ("newlines", "files"), "documents": ("column", "processes", "max_files", "files"),
    "captions": ("image_size",), "metadata": ("image_size", "column"),
    "a known text": (), "a known corpus": ("column", "processes", "max_files"), "known images": ("image_size",)}


def main(settings, sources):
    """Prepares the sources by their kind, and prints a command that trains on them."""
    sources = list(map(os.path.expanduser, sources))
    is_known = len(sources) == 1 and sources[0] in TOKENIZERS and not Path(sources[0]).exists()
    name, recipe = prepare_known_source(settings, sources[0]) if is_known else prepare_own(settings, sources)
    model = settings.tokenizer if os.path.isdir(settings.tokenizer) else ""  # to go on from
    start = [*["--task=image-text"] * ("vlm" in recipe), f"--init_from={model}"] if model else [recipe]
    command = ["python", "train.py", *start, f"--dataset={name}", f"--out_dir=out/{locate(name).name}"]
    print(printable(f"train on it: {shlex.join(command)}"))


def prepare_known_source(settings, source):
    """(name, recipe) of a known data set, prepared under its own name or settings.name."""
    name, is_corpus, has_images = settings.name or source, source in CORPORA, source in GENERATED
    check_kind(settings, "a known corpus" if is_corpus else "known images" if has_images else "a known text")
    if name == source:  # its settings are the same for all
        own = {"tokenizer": TOKENIZERS[source], "val_fraction": 0.0005 if is_corpus else 0.1, "image_size": 48,
               "column": "text"}
        for key, value in own.items():
            if getattr(settings, key) not in (value, getattr(Settings, key)):
                raise UserError(f"{source} is a data set with {key} = {value}: add --name=NEW for another one")
        settings = replace(settings, **own)
    if is_corpus:
        folder = locate(name) if name == source else claim(name, CORPORA[source][0])
        found = documents.hub_source(*CORPORA[source])._replace(column=settings.column)
        return name, prepare_documents(settings, found, folder)
    name = prepare_known(source, name, settings.tokenizer, settings.val_fraction, settings.image_size)
    return name, f"config/vlm_{source}.py" if has_images else text_recipe(TOKENIZERS.get(name, settings.tokenizer))


def prepare_own(settings, sources):
    """(name, recipe) of files and folders, or of a URL."""
    is_url = len(sources) == 1 and "://" in sources[0]
    check_sources(settings, sources, is_url)
    paths = list(map(Path, sources))
    tables = images.find_tables(paths[0]) if len(paths) == 1 else []
    found, rows = ([], []) if is_url or tables else texts.find(paths, documents.READERS, settings.files)
    if not (is_url or tables or found or rows):
        which = f" that match --files={settings.files}" * bool(settings.files)
        raise UserError(f"{', '.join(sources)}: there are no texts and no documents{which}; pictures need a"
                        " captions.jsonl, see sources/images.py")
    check_kind(settings, tables[0].stem.lower() if tables else "documents" if rows else "texts")
    path = os.path.abspath(urlsplit(sources[0]).path if is_url else sources[0])  # absolute: "." has no name
    name = settings.name or re.sub(r"\W+", "_", Path(path).stem)
    source = sources[0] if is_url else ", ".join(map(os.path.abspath, sources))
    source = os.fsencode(source).decode("utf-8", "backslashreplace")  # names may be no UTF-8
    folder, how = claim(name, source), (settings.tokenizer, settings.val_fraction)
    if tables:
        images.prepare(paths[0], folder, *how, settings.image_size, source, settings.column)
        return name, "config/vlm_shapes.py"
    if rows:
        return name, prepare_documents(settings, documents.local_source(source, rows, settings.column), folder)
    if is_url:
        found = [folder / "input.txt"]
        download(source, found[0])
    texts.prepare(found, folder, *how, source, settings.newlines)
    return name, text_recipe(settings.tokenizer)


def text_recipe(tokenizer):
    return "config/finetune_gpt2.py" if tokenizer == "gpt2" else "config/shakespeare_char.py"


def check_sources(settings, sources, is_url):
    """Raises UserError for a source that isn't there, and for settings that don't fit what the sources are."""
    for source in sources:
        if not is_url and not os.path.isfile(source) and not os.path.isdir(source):
            raise UserError(f"{source} is no file on disk, no folder, no URL, and none of {', '.join(TOKENIZERS)}")
    if is_url and Path(urlsplit(sources[0]).path).suffix.lower() in documents.READERS:
        raise UserError(f"{sources[0]}: only texts are fetched; download the documents, and name their file")
    if len(sources) > 1 and not settings.name:
        raise UserError(f"{len(sources)} sources make one data set: name it, --name=NEW")
    if settings.files and not any(map(os.path.isdir, sources)):
        raise UserError(f"files = {settings.files}: chooses among the files of a folder; leave it out")


def prepare_documents(settings, found, folder):
    """Prepares the files that the settings choose; returns a recipe that fits what there is."""
    found = found._replace(files=found.files[:settings.max_files or None])
    meta = documents.prepare(found, folder, settings.tokenizer, settings.val_fraction, settings.processes)
    return "config/gpt2.py" if meta["train_tokens"] > GPT2_TOKENS else text_recipe(settings.tokenizer)


def check_kind(settings, kind):
    """Raises UserError for a setting that does nothing for sources of this kind."""
    for name in {name for names in ONLY.values() for name in names}.difference(ONLY[kind]):
        check_idle(settings, f"does nothing for {kind}", name)


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS, SOURCES)
