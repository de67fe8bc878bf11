"""Documents into shards of tokens: train_00000.bin, val_00000.bin, shard_00000.json, ..., tokenizer.json, meta.json.

    python prepare.py my_folder/ --tokenizer=bpe:32000     *.parquet and *.jsonl files with a text in each row
    python prepare.py fineweb --max_files=1                the first 0.7 billion tokens; without it later, the rest

Each document, the row's `text`, is followed by the tokenizer's end-of-text token (two line breaks where it has none).
It is for validation if its hash says so: doubles stay on one side. A shard is finished when its .json is there: after a
kill the same command goes on. The bytes depend neither on that nor on the number of processes.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed, process
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tokenizer as tokenizers
from configurator import UserError
from run.files import read_json, write_json
from sources.texts import id_type, put_in_place, stored

SHARD_BYTES = 1 << 26  # smaller neighbours share a shard
ROWS = 256  # documents of a parquet file held at a time
SAMPLE_CHARACTERS = 100_000_000  # from which a BPE learns
COUNTS = ("documents", "bytes", "train_characters", "train_tokens", "val_characters", "val_tokens")


def prepare(source, folder, tokenizer_name, val_fraction=0.1, processes=0):
    """Writes the shards of a Source that `folder` lacks, and returns the meta. processes: 0: one per CPU core."""
    if tokenizer_name == "char":
        raise UserError("tokenizer = char: it has to know all characters beforehand; use gpt2, byte or bpe:SIZE")
    if any(name.endswith(".parquet") for name, _ in source.files) and not importlib.util.find_spec("pyarrow"):
        raise UserError("parquet files need pyarrow: pip install pyarrow")
    tokenizer = common_tokenizer(source, folder, tokenizer_name, val_fraction)
    shards = group(source.files)
    records = [folder / f"shard_{i:05}.json" for i in range(len(shards))]
    missing = [i for i, path in enumerate(records) if not path.exists() or read_json(path)["files"] != shards[i]]
    processes = min(processes or os.cpu_count(), len(missing))
    print(f"{len(shards):,} shards, {len(missing):,} to write, by {processes} processes", flush=True)
    if missing:
        (folder / "meta.json").unlink(missing_ok=True)
        in_processes(processes, [(i, shards[i], source, folder, val_fraction) for i in missing])
    shutil.rmtree(folder / "download", ignore_errors=True)
    found = [read_json(path) for path in records]
    totals = {key: sum(record[key] for record in found) for key in COUNTS}
    for split in ("train", "val"):
        if totals[f"{split}_tokens"] < 2:
            raise UserError(f"none of {totals['documents']:,} documents is for {split}: use more, or another share")
    digest = hashlib.sha256("".join(record["sha256"] for record in found).encode()).hexdigest()
    meta = {"source": source.location, "revision": source.revision, "sha256": digest, "tokenizer": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size, "dtype": id_type(tokenizer), **totals,
            "shards": {split: [record[f"{split}_tokens"] for record in found] for split in ("train", "val")}}
    put_in_place(folder, (), meta)
    return meta


class Source(NamedTuple):
    """Files with documents, in order: of a folder, or of a data set on the hub at one of its commits."""
    location: str  # the folder, or the data set's name
    revision: str  # the commit; "" for a folder
    files: tuple  # (path inside it, bytes)

    def fetch(self, name, folder):
        """Where the file lies on disk; one from the hub is downloaded into folder/download, once."""
        if not self.revision:
            return Path(self.location) / name
        with hub(f"{self.location}/{name}") as api:
            return Path(api.hf_hub_download(self.location, name, repo_type="dataset", revision=self.revision,
                                            local_dir=folder / "download"))


def folder_source(path):
    """The documents of a folder, or of one file; None if there are none. Raises UserError if there are texts too."""
    folder, paths = (path, sorted(path.rglob("*"))) if path.is_dir() else (path.parent, [path])
    files = tuple((p.relative_to(folder).as_posix(), p.stat().st_size) for p in paths
                  if p.suffix in (".parquet", ".jsonl") and p.exists() and not p.is_dir())
    texts = [p.name for p in paths if p.suffix == ".txt"]
    if files and texts:
        raise UserError(f"{path} holds documents ({files[0][0]}) and texts ({texts[0]}): put them into folders apart")
    return Source(str(folder), "", files) if files else None


def hub_source(name, under, revision):
    """The parquet files in the folder `under` of a data set on the hub."""
    with hub(name) as api:
        entries = list(api.list_repo_tree(name, under, revision=revision, repo_type="dataset"))
    files = sorted((entry.path, entry.size) for entry in entries if entry.path.endswith(".parquet"))
    return Source(name, revision, tuple(files))


@contextlib.contextmanager
def hub(what):
    """The hub's API; of its errors a UserError that says in one line why `what` can't be had."""
    from huggingface_hub import HfApi, errors, utils
    utils.disable_progress_bars()
    try:
        yield HfApi()
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{what} can't be had from the hub ({reason}): run again to go on") from None


def read(source, files, folder, val_fraction):
    """Yields (split, text, its UTF-8, the SHA-256 of that) of each document in the files that is not empty."""
    for name, _ in files:
        path = source.fetch(name, folder)
        for number, text in enumerate(read_rows(path), start=1):
            if text in (None, ""):
                continue
            try:
                content = text.encode("utf-8")
            except (AttributeError, UnicodeEncodeError):
                raise UserError(f"{path}, row {number}: {text!r:.60} is no text of whole characters") from None
            digest = hashlib.sha256(content).digest()
            is_val = int.from_bytes(digest[:8], "big") < val_fraction * 2**64
            yield "val" if is_val else "train", text, content, digest


def read_rows(path):
    """Yields the text of each row of a .parquet or .jsonl file; None for an empty line."""
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)["text"] if line.strip() else None
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}, line {number}: is no object with a text: {line.strip()!r:.60}") from None
        return
    import pyarrow
    from pyarrow.parquet import ParquetFile
    try:
        with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:  # no whole column in memory
            if "text" not in (names := file.schema_arrow.names):
                raise UserError(f"{path} has no column named text, only {', '.join(names)}: rename the one to learn")
            for batch in file.iter_batches(ROWS, columns=["text"], use_threads=False):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no whole parquet file ({error}): fetch it again") from None


def common_tokenizer(source, folder, tokenizer_name, val_fraction):
    """The tokenizer of all shards, made at the first start. Raises UserError if the folder holds another data set."""
    recipe = {"hub": source.location if source.revision else "", "revision": source.revision,
              "tokenizer": tokenizer_name, "val_fraction": val_fraction}
    path, meta = folder / "recipe.json", folder / "meta.json"
    found = read_json(path) if path.exists() else recipe
    if found != recipe or meta.exists() and "shards" not in read_json(meta):
        other = ", ".join(f"{k} = {v!r}" for k, v in found.items() if v != recipe[k]) or "not of shards"
        raise UserError(f"{folder} holds another data set ({other}): delete it, or choose another --name")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = tokenizers.build(tokenizer_name, None, lambda: sample(source, folder, val_fraction))
        tokenizer.save(folder / "tokenizer.json")
        write_json(path, recipe)  # last: without it the next start makes the tokenizer again
    return tokenizers.load(folder / "tokenizer.json")


def sample(source, folder, val_fraction):
    """Yields the first training documents, for a BPE to learn from."""
    characters = 0
    for split, text, _, _ in read(source, source.files, folder, val_fraction):
        if split == "train":
            characters += len(text)
            yield text
        if characters >= SAMPLE_CHARACTERS:
            return


def group(files):
    """The files of each shard, as lists of [path, bytes]: one, or neighbours up to SHARD_BYTES together."""
    shards, total = [], math.inf
    for name, size in files:
        total += size
        if total > SHARD_BYTES:
            shards.append([])
            total = size
        shards[-1].append([name, size])
    return shards


def in_processes(processes, jobs):
    """write_shard(*job) for each job. The first error ends all processes and is raised here."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(write_shard, *job) for job in jobs]):
                future.result()
        except process.BrokenProcessPool:
            raise UserError("a process was killed (memory?): run again to go on, with fewer --processes") from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def end_with_parent():
    """At the start of each process: it exits when its parent dies, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_shard(number, files, source, folder, val_fraction):
    """Writes train_NUMBER.bin, val_NUMBER.bin and at last shard_NUMBER.json."""
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    end = tokenizer.encode("\n\n") if tokenizer.eos is None else np.array([tokenizer.eos])
    record, digest = {"files": files, **dict.fromkeys(COUNTS, 0)}, hashlib.sha256()
    names = [f"{split}_{number:05}.bin" for split in ("train", "val")]
    with open(folder / f"{names[0]}.new", "wb") as train, open(folder / f"{names[1]}.new", "wb") as val:
        for split, text, content, document in read(source, files, folder, val_fraction):
            ids = np.concatenate((tokenizer.encode(text), end))
            (train if split == "train" else val).write(stored(ids, tokenizer).tobytes())
            digest.update(document)
            record["documents"] += 1
            record["bytes"] += len(content)
            record[f"{split}_characters"] += len(text)
            record[f"{split}_tokens"] += len(ids)
    record["sha256"] = digest.hexdigest()  # of its documents' SHA-256
    put_in_place(folder, names, record, f"shard_{number:05}.json")
    if source.revision:
        for name, _ in files:
            (folder / "download" / name).unlink(missing_ok=True)
