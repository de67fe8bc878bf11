"""Raw material into a data set to train on: data/<name>/{train.bin, val.bin, tokenizer.json, meta.json}.

    python prepare.py my.txt                            a file; also a folder of .txt files, or a URL
    python prepare.py my.txt --tokenizer=bpe:4096       char (default), byte, gpt2, or a BPE trained on the text
    python prepare.py shakespeare_char                  a known data set (train.py does this by itself)
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
    column: str = "text"  # of tables

    def __post_init__(self):
        check_ranges(self, image_size=1, processes=0, max_files=0)
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction = {self.val_fraction}: must lie between 0 and 1")


if __name__ == "__main__":  # --help and typos answer before the slow imports
    SOURCES = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    sys.argv[1:] = [arg for arg in sys.argv[1:] if arg.startswith("-")] or ([] if SOURCES else ["--help"])
    SETTINGS, _ = from_command_line(Settings, __doc__)

from sources import documents, images, texts
from sources.known import CORPORA, GENERATED, TOKENIZERS, download, locate, prepare_known


def main(settings, sources):
    """Prepares the one source by its kind, and names a recipe to train on it."""
    if len(sources) != 1:
        raise UserError(f"one source at a time, not {' '.join(sources)}; put several texts into a folder")
    source, path = sources[0], Path(sources[0])
    known = source in TOKENIZERS and not path.exists()
    if known and not settings.name:  # its settings are the same for all
        own = {"tokenizer": TOKENIZERS[source], "val_fraction": 0.0005 if source in CORPORA else 0.1, "image_size": 48}
        for key, value in own.items():
            if getattr(settings, key) not in (value, getattr(Settings, key)):
                raise UserError(f"{source} is a data set with {key} = {value}: add --name=NEW for another one")
        settings = replace(settings, **own)
    name = settings.name or re.sub(r"\W+", "_", path.absolute().stem)  # absolute: "." has no name
    folder, how = locate(name), (settings.tokenizer, settings.val_fraction)
    recipe = "shakespeare_char"
    if known and source not in CORPORA:
        name = prepare_known(source, name, *how, settings.image_size)
        recipe = f"vlm_{source}" if source in GENERATED else recipe
    elif images.find_tables(path):
        images.prepare(path, folder, *how, settings.image_size, source, settings.column)
        recipe = "vlm_shapes"
    else:
        files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.suffix.lower() in
                 documents.SUFFIXES and file.exists() and not file.is_dir()]
        found = documents.hub_source(*CORPORA[source]) if known else files and documents.folder_source(
            files, settings.column, [path])
        if found:
            found = found._replace(files=found.files[:settings.max_files or None])
            documents.prepare(found, folder, *how, settings.processes)
            recipe = "gpt2"
        else:
            texts.prepare(find_texts(source, folder), folder, *how, source)
    print(f"train on it: python train.py config/{recipe}.py --dataset={name}")


def find_texts(source, folder):
    """The paths of the texts of a folder, a file, or a URL, which is downloaded into `folder`."""
    path = folder / "input.txt" if "://" in source else Path(source)
    if "://" in source:
        download(source, path)
    paths = sorted(filter(Path.is_file, path.rglob("*.txt"))) if path.is_dir() else [path]
    if not paths or not paths[0].is_file():
        raise UserError(f"{source} is no file, no URL, no folder of .txt, .parquet or .jsonl files, and none of"
                        f" {', '.join(TOKENIZERS)}")
    return paths


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS, SOURCES)
