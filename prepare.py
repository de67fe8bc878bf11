"""Raw material into a data set to train on: data/<name>/{train.bin, val.bin, tokenizer.json, meta.json}.

    python prepare.py my.txt                            a file; also a folder of .txt files, or a URL
    python prepare.py my.txt --tokenizer=bpe:4096       char (default), byte, gpt2, or a BPE trained on the text
    python prepare.py shakespeare_char                  a known data set (train.py does this by itself)
    python train.py config/shakespeare_char.py --dataset=my
    python prepare.py my_folder/ --image_size=48        images with a captions.jsonl; sources/images.py says more
    python prepare.py my_folder/ --tokenizer=gpt2       documents in parquet or .jsonl files, or in billions from
    python prepare.py fineweb                           the hub; sources/documents.py says more

Text is UTF-8; the first 90 % of its characters are for training, the rest for validation. It may be larger than memory.
"""

import re
import sys
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

from sources import documents, texts
from sources.known import CORPORA, KNOWN_NAMES, download, known_recipe, locate, prepare_known


def prepare_known_set(source, known, name, settings):
    if known and source not in CORPORA:
        return prepare_known(source, name, settings.tokenizer, settings.val_fraction, settings.image_size)


def prepare_images(source, known, name, settings):
    path = Path(source)
    if (path / "captions.jsonl").exists():
        from sources import images  # here, for it imports torch and Pillow
        images.prepare(path, locate(name), settings.tokenizer, settings.val_fraction, settings.image_size, source)
        return name


def prepare_documents(source, known, name, settings):
    path = Path(source)
    if known:
        found = documents.hub_source(*CORPORA[source])
    else:
        found = documents.folder_source(path) if path.exists() else None
    if found:
        if path.is_dir() and (text := next(path.rglob("*.txt"), None)):
            raise UserError(f"{source} holds documents ({found.files[0][0]}) and texts ({text.name}): which are meant?"
                            " Put them into folders of their own")
        found = replace(found, files=found.files[:settings.max_files or None])
        documents.prepare(found, locate(name), settings.tokenizer, settings.val_fraction, settings.processes)
        return name


def prepare_texts(source, known, name, settings):
    path = Path(source)
    if "://" in source:
        path = locate(name) / "input.txt"
        download(source, path)
    paths = sorted(filter(Path.is_file, path.rglob("*.txt"))) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"the folder {source} holds no .txt, .parquet or .jsonl files")
    if not paths[0].is_file():
        raise UserError(f"{source} is no file, no folder, no URL, and none of {', '.join(KNOWN_NAMES)}")
    texts.prepare(paths, locate(name), settings.tokenizer, settings.val_fraction, source)
    return name


# Kinds of sources, tried in this order. Each function returns the name of the data set that it has prepared, or None
# if the source is of another kind.
KINDS = {"known": prepare_known_set, "images": prepare_images, "documents": prepare_documents, "texts": prepare_texts}
# The recipe to train on a known data set or a kind of source; on all others it is shakespeare_char.
RECIPES = {"shapes": "vlm_shapes", "digits": "vlm_digits", **dict.fromkeys(CORPORA, "gpt2"),
           "images": "vlm_shapes", "documents": "gpt2"}


def main(settings, sources):
    """Prepares the one source, and names a recipe to train on it."""
    if len(sources) != 1:
        raise UserError(f"one source at a time, not {len(sources)}: {' '.join(sources)};"
                        " put several texts into a folder")
    source = sources[0]
    known = source in KNOWN_NAMES and not Path(source).exists()
    if known and not settings.name:
        settings = settings_of_known(source, settings)
    name = settings.name or re.sub(r"\W+", "_", Path(source.rstrip("/")).stem)
    for kind in KINDS:
        prepared = KINDS[kind](source, known, name, settings)
        if prepared:
            break
    recipe = RECIPES.get(source if known else kind, "shakespeare_char")
    print(f"train on it: python train.py config/{recipe}.py --dataset={prepared}")


def settings_of_known(name, settings):
    """The settings of a known data set, the same for all. Raises UserError if others are asked for."""
    tokenizer, val_fraction = known_recipe(name)
    own = {"tokenizer": tokenizer, "val_fraction": val_fraction, "image_size": Settings.image_size}
    for key, value in own.items():
        if getattr(settings, key) not in (value, getattr(Settings, key)):
            raise UserError(f"{name} is a data set with {key} = {value}: add --name=NEW for another one")
    return replace(settings, **own)


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS, SOURCES)
