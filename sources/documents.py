"""Makes shards of tokens from documents: train_00000.bin, val_00000.bin, shard_00000.json, ..., meta.json.

    python prepare.py my_folder/ --tokenizer=bpe:32000     .parquet, .jsonl, .csv, .tsv: a document in each row's `text`
    python prepare.py posts.csv --column=body              in another column
    python prepare.py fineweb --max_files=1                the first 0.7 billion tokens; later without it: the rest

Each document is followed by the tokenizer's end-of-text token. If it has none, a newline follows, or two after a
document of several lines. A document's hash decides whether it is for validation, so duplicates are on the same side.
A shard's .json is written last and records what the shard was made from. So the same command resumes after a kill, and
rewrites shards whose files, tokenizer or settings have changed. The result has the same bytes as a first run, with any
number of processes.
"""

import codecs
import contextlib
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import reprlib
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed, process
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tokenizer as tokenizers
from configurator import UserError
from machine.terminal import progress, watched
from run.files import read_json, rename, write_json
from sources.texts import check_start, finish, id_type, put_in_place, sample, stamp, stored, writing

SHARD_BYTES = 1 << 26  # of files: smaller neighbours share a shard
ROWS = 256  # documents of a parquet file in memory at a time
SAMPLE_BYTES = 1 << 30  # a BPE learns from the first files, up to about this size
COUNTS = ("documents", "bytes", "train_characters", "train_tokens", "val_characters", "val_tokens")


def prepare(source, folder, tokenizer_name, val_fraction=0.1, processes=0):
    """Writes the missing shards of a Source and meta.json. Returns meta.json's dict. processes: 0: one per CPU core."""
    suffixes = {Path(name).suffix.lower() for name, *_ in source.files}
    if ".parquet" in suffixes and not importlib.util.find_spec("pyarrow"):
        raise UserError("parquet files need pyarrow: pip install pyarrow")
    with writing(folder):
        tokenizer = common_tokenizer(source, folder, tokenizer_name, val_fraction)
        shards = group(source.files)
        write_missing(source, shards, folder, val_fraction, processes)
        records = [read_json(record_path(folder, number)) for number in range(len(shards))]
        totals = {key: sum(record[key] for record in records) for key in COUNTS}
        for split in ("train", "val"):
            if totals[f"{split}_tokens"] < 2:
                (folder / "recipe.json").unlink()  # frees the folder for another source
                raise UserError(f"{source.location} has {totals['documents']:,} documents, of which none is for"
                                f" {split}: add documents, or change --val_fraction")
        print(f"for validation: {totals['val_tokens']:,} tokens, in documents chosen by their hashes")
        digest = hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()
        meta = {"source": source.location, "revision": source.revision, "sha256": digest, "tokenizer": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size, "dtype": id_type(tokenizer), **totals,
                "shards": {split: [record[f"{split}_tokens"] for record in records] for split in ("train", "val")}}
        return finish(folder, (), meta)


def write_missing(source, shards, folder, val_fraction, processes):
    """Writes the shards that are missing or out of date. shards: lists of files, as from `group`."""
    tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    how = {"revision": source.revision, "column": source.column, "val_fraction": val_fraction, "tokenizer": tokenizer}
    jobs = [(number, source, {"files": files, "how": how}, folder) for number, files in enumerate(shards)
            if not is_finished(folder, number, files, how)]
    processes = min(processes or os.cpu_count(), len(jobs))
    stale = sum(record_path(folder, number).exists() for number, *_ in jobs)
    print(f"shards: {len(shards):,}, to write: {len(jobs):,} (stale: {stale:,}); processes: {processes}", flush=True)
    if jobs:
        (folder / "meta.json").unlink(missing_ok=True)
        in_processes(processes, jobs)
    shutil.rmtree(folder / "download", ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# Where the files are

class Source(NamedTuple):
    """Files of documents, in order: on this machine, or in a data set on the Hugging Face Hub at a commit."""
    location: str  # the paths given on the command line, or the data set's name on the hub
    revision: str  # the commit; "" for files on this machine
    files: tuple  # of [path, *stamp(path)], or on the hub of [path in the data set, bytes]
    column: str = "text"  # the column that holds the documents

    def fetch(self, name, folder):
        """The path of a file on disk. A file on the hub is downloaded into folder/download first, once."""
        if not self.revision:
            return Path(name)
        with hub(f"{self.location}/{name}") as api:
            return Path(api.hf_hub_download(self.location, name, repo_type="dataset", revision=self.revision,
                                            local_dir=folder / "download"))


def local_source(location, paths, column="text"):
    """The Source of the files `paths` on this machine. Raises UserError if a path is not UTF-8.

    location: the paths given on the command line, as one text; meta.json shows it as the data set's source.
    """
    names = list(map(os.path.abspath, paths))
    for name in names:
        if re.search("[\ud800-\udfff]", name):
            raise UserError(f"{name!r}: this path is not UTF-8; rename the file or its folder")
    return Source(location, "", tuple([name, *stamp(name)] for name in names), column)


def hub_source(name, under, revision):
    """The Source of the parquet files in the folder `under` of a data set on the hub, at a commit."""
    with hub(name) as api:
        entries = list(api.list_repo_tree(name, under, revision=revision, repo_type="dataset"))
    files = sorted([entry.path, entry.size] for entry in entries if entry.path.endswith(".parquet"))
    return Source(name, revision, tuple(files))


@contextlib.contextmanager
def hub(what):
    """A context with the hub's API. Turns the hub's errors into a UserError: why `what` can't be fetched."""
    from huggingface_hub import HfApi, errors, utils
    utils.disable_progress_bars()
    try:
        yield HfApi()
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{what} can't be fetched from the hub ({reason}): run again to resume") from None


# ----------------------------------------------------------------------------------------------------------------------
# Reading documents

def read(source, files, folder, val_fraction):
    """Yields (split, text, the text in UTF-8, the SHA-256 of that) for each document in the files; skips empty ones."""
    for name, *_ in files:
        path = source.fetch(name, folder)
        for where, row in READERS[path.suffix.lower()](path, source.column):
            text = pick(row, source.column, where)
            if text in (None, ""):
                continue
            try:
                content = text.encode("utf-8")
            except (AttributeError, UnicodeEncodeError):
                raise UserError(f"{where}: {reprlib.repr(text)} is not valid text; correct or remove the row") from None
            digest = hashlib.sha256(content).digest()
            is_val = int.from_bytes(digest[:8], "big") < val_fraction * 2**64
            yield "val" if is_val else "train", text, content, digest


def pick(row, column, where):
    """The value in a column of a row. Raises UserError that lists the columns if there is no such column."""
    if column not in row:
        raise UserError(f"{where}: no column is named {column}, only {', '.join(map(str, row))}: choose one with"
                        " --column=NAME")
    return row[column]


def read_jsonl(path, column=""):
    """Yields (where, {column: value}) for each line of a .jsonl file. Ignores `column`, which only read_parquet needs.

    where: the file and the line, for error messages. Raises UserError for a line that is not a JSON object.
    """
    with open(path, "rb") as file:
        check_start(path, file.peek())
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if not line:
                continue
            try:
                row = json.loads(line)
                reason = repr(type(row).__name__)
            except (ValueError, RecursionError) as error:
                row, reason = None, error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: is not a JSON object: {reason}; write one per line")
            yield f"{path}, line {number}", row


def read_table(path, column=""):
    """Yields (where, {column: value}) for each row of a .csv or .tsv; line 1 names the columns. Ignores `column`."""
    csv.field_size_limit((1 << 31) - 1)
    with open(path, "rb") as file:
        check_start(path, file.peek())
        rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True,
                          delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        read = 0  # lines of whole rows
        try:
            names = [name.strip() for name in next(filter(None, rows), [])]
            if doubles := {name for name in names if name and names.count(name) > 1}:
                raise UserError(f"{path}: several columns are named {', '.join(doubles)}: rename all but one")
            read = rows.line_num
            for row in rows:
                read = rows.line_num
                where = f"{path}, line {read}"
                if not row:
                    continue
                if len(row) != len(names):
                    raise UserError(f"{where}: has {len(row)} fields, but the first line names {len(names)}: put"
                                    " double quotes around a field that contains separators")
                yield where, dict(zip(names, row))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not a table in UTF-8 ({error}; lines before that: {rows.line_num}): convert"
                            f" it, for instance: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW{path.suffix}") from None
        except csv.Error as error:
            raise UserError(f"{path}, the row that begins in line {read + 1}: has a double quote that is not closed, or"
                            f" text after a closing one ({error}): close it; inside a field, write it twice") from None


def read_parquet(path, column):
    import pyarrow
    from pyarrow.parquet import ParquetFile
    try:
        with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:  # not a whole column in memory
            pick(dict.fromkeys(file.schema_arrow.names), column, path)
            batches = file.iter_batches(ROWS, columns=[column], use_threads=False)
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for number, value in enumerate(values, start=1):
                yield f"{path}, row {number}", {column: value}
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a complete parquet file ({error}): fetch it again") from None


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".csv": read_table, ".tsv": read_table}  # by suffix


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer

def common_tokenizer(source, folder, name, val_fraction):
    """Saves and returns the tokenizer of all shards. A learned one is kept while the files behind it are unchanged."""
    path, saved, new = folder / "recipe.json", folder / "tokenizer.json", folder / "tokenizer.json.new"
    basis = learned_from(source.files, name)
    recipe = {"source": source.location, "revision": source.revision, "column": source.column, "tokenizer": name,
              "val_fraction": val_fraction, "learned_from": basis}
    if basis and saved.exists() and path.exists() and read_json(path) == recipe:
        return tokenizers.load(saved)
    everything = (text for _, text, *_ in read(source, watched(source.files, "looking for characters"), folder, 0))
    training = (text for split, text, *_ in read(source, basis, folder, val_fraction) if split == "train")
    tokenizer = tokenizers.build(name, lambda: itertools.chain("\n", everything),
                                 lambda: sample(training, sum(file[1] for file in basis)))
    tokenizer.save(new)
    for old in (path, folder / "meta.json"):  # they describe the earlier contents of the folder
        old.unlink(missing_ok=True)
    rename(new, saved)
    write_json(path, recipe)
    return tokenizer


def learned_from(files, name):
    """Returns the files that the tokenizer `name` is learned from: for char, all; for bpe:SIZE, the first ones, until
    they have SAMPLE_BYTES together; for any other, which is not learned from text, []."""
    limit = math.inf if name == "char" else SAMPLE_BYTES if name.startswith("bpe:") else 0
    before = itertools.accumulate((file[1] for file in files), initial=0)
    return [file for file, size in zip(files, before) if size < limit]


# ----------------------------------------------------------------------------------------------------------------------
# Shards

def group(files):
    """The files of each shard, as a list of lists: one file, or neighbours with at most SHARD_BYTES together."""
    shards, total = [], math.inf
    for file in files:
        total += file[1]
        if total > SHARD_BYTES:
            shards.append([])
            total = file[1]
        shards[-1].append(file)
    return shards


def record_path(folder, number):
    return folder / f"shard_{number:05}.json"


def bin_names(number):
    return [f"{split}_{number:05}.bin" for split in ("train", "val")]


def is_finished(folder, number, files, how):
    """True if the shard is complete, and was made from these files with these settings (how)."""
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # the record is damaged or missing
        record = read_json(record_path(folder, number))
        counts = (record["train_tokens"], record["val_tokens"])
        is_whole = all((folder / name).stat().st_size in (2 * count, 4 * count)
                       for name, count in zip(bin_names(number), counts))
        return is_whole and record["files"] == files and record["how"] == how
    return False


def in_processes(processes, jobs):
    """Calls write_shard(*job) for each job, in parallel. The first error ends all processes and is raised here."""
    context = multiprocessing.get_context("spawn")
    sizes = [sum(file[1] for file in made_from["files"]) for _, _, made_from, _ in jobs]  # in bytes
    with (progress(sum(sizes), "documents", "B") as bar,
          ProcessPoolExecutor(processes, context, start_process) as pool):
        try:
            running = {pool.submit(write_shard, *job): size for job, size in zip(jobs, sizes)}
            for shard in as_completed(running):
                bar.write(shard.result())
                bar.update(running[shard])
        except process.BrokenProcessPool:
            raise UserError("a process was killed (memory?): run again to resume, with fewer --processes") from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def start_process():
    """Runs first in each worker process: it exits when its parent dies, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_shard(number, source, made_from, folder):
    """Writes train_NUMBER.bin, val_NUMBER.bin, and last shard_NUMBER.json. Returns a line about them to print.

    made_from: {"files": the shard's files, "how": the settings}, which is saved in the .json too.
    """
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    files, val_fraction = made_from["files"], made_from["how"]["val_fraction"]
    record, digest, names = {**made_from, **dict.fromkeys(COUNTS, 0)}, hashlib.sha256(), bin_names(number)
    with open(folder / f"{names[0]}.new", "wb") as train, open(folder / f"{names[1]}.new", "wb") as val:
        for split, text, content, document in read(source, files, folder, val_fraction):
            end = tokenizer.encode("\n\n" if "\n" in text else "\n") if tokenizer.eos is None else [tokenizer.eos]
            ids = np.concatenate((tokenizer.encode(text), end))
            file = train if split == "train" else val
            file.write(stored(ids, tokenizer).tobytes())
            digest.update(document)
            record["documents"] += 1
            record["bytes"] += len(content)
            record[f"{split}_characters"] += len(text)
            record[f"{split}_tokens"] += len(ids)
    record["sha256"] = digest.hexdigest()  # of the SHA-256 of all documents
    for name, *known in files:
        if source.revision:
            (folder / "download" / name).unlink(missing_ok=True)
        elif stamp(name) != known:
            raise UserError(f"{name} was changed while it was read: run again")
    put_in_place(folder, names, record_path(folder, number), record)
    n_tokens = record["train_tokens"] + record["val_tokens"]
    return f"shard {number:,}: {record['documents']:,} documents, {n_tokens:,} tokens"
