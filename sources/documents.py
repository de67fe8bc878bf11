"""Documents into shards of tokens: train_00000.bin, val_00000.bin, shard_00000.json, ..., tokenizer.json, meta.json.

    python prepare.py my_folder/ --tokenizer=bpe:32000     .parquet, .jsonl, .csv, .tsv: a document in each row's `text`
    python prepare.py posts.csv --column=body              in another column
    python prepare.py fineweb --max_files=1                the first 0.7 billion tokens; without it later, the rest

Each document is followed by the tokenizer's end-of-text token (two line breaks where it has none). It is for validation
if its hash says so: doubles stay on one side. A shard is finished when its .json is there: after a kill the same
command goes on. Whatever was there before, the bytes are those of a first start, with any number of processes: a shard
whose files have changed is written again, and so are all where the tokenizer that the files teach has changed.
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
import shutil
import signal
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, process, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tokenizer as tokenizers
from configurator import UserError
from machine.terminal import progress
from run.files import read_json, rename, write_json
from run.lock import owned
from sources.texts import check_start, id_type, new_files, put_in_place, stored

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
SHARD_BYTES = 1 << 26  # smaller neighbours share a shard
ROWS = 256  # documents of a parquet file held at a time
SAMPLE_BYTES = 1 << 30  # a BPE learns from the first files that hold so much,
SAMPLE_CHARACTERS = 100_000_000  # and from no more of their text than this
COUNTS = ("documents", "bytes", "train_characters", "train_tokens", "val_characters", "val_tokens")


def prepare(source, folder, tokenizer_name, val_fraction=0.1, processes=0):
    """Writes the shards of a Source that `folder` lacks, and returns the meta. processes: 0: one per CPU core."""
    if any(Path(name).suffix.lower() == ".parquet" for name, *_ in source.files) \
            and not importlib.util.find_spec("pyarrow"):
        raise UserError("parquet files need pyarrow: pip install pyarrow")
    with owned(folder, "name", "prepared a data set"):
        return write(source, folder, tokenizer_name, val_fraction, processes)


def write(source, folder, tokenizer_name, val_fraction, processes):
    """Writes what the folder, which no other process writes to, lacks."""
    shards = group(source.files)
    tokenizer = common_tokenizer(source, shards, folder, tokenizer_name, val_fraction)
    done, stale = finished(source, shards, folder)
    missing = [i for i in range(len(shards)) if i not in done]
    processes = min(processes or os.cpu_count(), len(missing))
    changed = f" ({len(stale):,} of them had other content)" * bool(stale)
    print(f"{len(shards):,} shards, {len(missing):,} to write{changed}, by {processes} processes", flush=True)
    if missing:
        (folder / "meta.json").unlink(missing_ok=True)
        with new_files(folder, *(name for i in missing for name in bin_names(i))):
            in_processes(processes, [(i, shards[i], source, folder, val_fraction) for i in missing])
    shutil.rmtree(folder / "download", ignore_errors=True)
    found = [read_json(record_path(folder, i)) for i in range(len(shards))]
    totals = {key: sum(record[key] for record in found) for key in COUNTS}
    for split in ("train", "val"):
        if totals[f"{split}_tokens"] < 2:
            raise UserError(f"none of {totals['documents']:,} documents is for {split}: use more, or another share")
    digest = hashlib.sha256("".join(record["sha256"] for record in found).encode()).hexdigest()
    meta = {"source": source.location, "revision": source.revision, "sha256": digest, "tokenizer": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size, "dtype": id_type(tokenizer), **totals,
            "shards": {split: [record[f"{split}_tokens"] for record in found] for split in ("train", "val")}}
    put_in_place(folder, (), meta)
    remove_surplus(folder, len(shards))
    return meta


# ----------------------------------------------------------------------------------------------------------------------
# Where the files are

class Source(NamedTuple):
    """Files with documents, in order: of a folder, or of a data set on the hub at one of its commits."""
    location: str  # the folder, or the data set's name
    revision: str  # the commit; "" for a folder
    files: tuple  # (path inside it, bytes), and in a folder the time of its last change
    column: str = "text"  # which the documents are in

    def fetch(self, name, folder):
        """Where the file lies on disk; one from the hub is downloaded into folder/download, once."""
        if not self.revision:
            return Path(self.location) / name
        with hub(f"{self.location}/{name}") as api:
            return Path(api.hf_hub_download(self.location, name, repo_type="dataset", revision=self.revision,
                                            local_dir=folder / "download"))

    def sealed(self, file):
        """The file as a finished shard records it: with the SHA-256 of its content, which a commit has fixed."""
        if self.revision:
            return file
        path = Path(self.location) / file[0]
        content = sha256(path)
        if stamp(path) != file[1:]:
            raise UserError(f"{path} was changed while it was read: run again")
        return [*file, content]

    def is_same(self, file, old):
        """Whether the file is the one that was sealed as `old`. Its content is read only if the times alone differ."""
        if file == old[:len(file)]:
            return True
        return file[:2] == old[:2] and len(old) == 4 and sha256(Path(self.location) / file[0]) == old[3]


def folder_source(files, column="text", named=()):
    """The documents of files. named: the files and folders on the command line that they are of."""
    places = [path if path.is_dir() else path.parent for path in named or files]
    folder = os.path.commonpath(list(map(os.path.abspath, places)))
    names = sorted((Path(os.path.relpath(path, folder)).as_posix(), path) for path in files)
    return Source(folder, "", tuple([name, *stamp(path)] for name, path in names), column)


def stamp(path):
    """[bytes, when the file changed in nanoseconds]: on Unix a date that was set back (cp -p) does not deceive it."""
    status = path.stat()
    return [status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)]


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hub_source(name, under, revision):
    """The parquet files in the folder `under` of a data set on the hub."""
    with hub(name) as api:
        entries = list(api.list_repo_tree(name, under, revision=revision, repo_type="dataset"))
    files = sorted([entry.path, entry.size] for entry in entries if entry.path.endswith(".parquet"))
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


# ----------------------------------------------------------------------------------------------------------------------
# Rows of files

def read(source, files, folder, val_fraction, report=lambda n: None):
    """Yields (split, text, its UTF-8, the SHA-256 of that) of each document in the files that is not empty.

    report(n) is told that n more bytes of the files have been read.
    """
    for name, size, *_ in files:
        path, told = source.fetch(name, folder), 0
        for where, row, position in READERS[path.suffix.lower()](path, source.column):
            report(position - told)
            told = position
            text = pick(row, source.column, where)
            if text in (None, ""):
                continue
            try:
                content = text.encode("utf-8")
            except (AttributeError, UnicodeEncodeError):
                raise UserError(f"{where}: {text!r:.60} is no text of whole characters") from None
            digest = hashlib.sha256(content).digest()
            is_val = int.from_bytes(digest[:8], "big") < val_fraction * 2**64
            yield "val" if is_val else "train", text, content, digest
        report(size - told)


def pick(row, column, where):
    """The value in a column of a row. Raises UserError that lists the columns if it has no such one."""
    if column not in row:
        raise UserError(f"{where}: no column is named {column}, only {', '.join(map(str, row))}: name the one to learn"
                        " with --column=NAME")
    return row[column]


def read_jsonl(path, column=""):
    """Yields (where, {column: value}, bytes read so far) of each row, as the other readers do."""
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
                raise UserError(f"{path}, line {number}: is no JSON object: {reason}; write one per line")
            yield f"{path}, line {number}", row, file.tell()


def read_table(path, column=""):
    """A .csv, or a .tsv with tabs between the fields. The first line names the columns."""
    csv.field_size_limit((1 << 31) - 1)
    with open(path, "rb") as file:
        check_start(path, file.peek())
        rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True,
                          delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            names = next(rows, [])
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if row and len(row) != len(names):
                    raise UserError(f"{where}: has {len(row)} fields, and the first line names {len(names)}: put"
                                    " double quotes around a field with separators in it")
                if row:
                    yield where, dict(zip(names, row)), file.tell()
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, after line {rows.line_num}: is no table in UTF-8: {error}") from None


def read_parquet(path, column):
    import pyarrow
    from pyarrow.parquet import ParquetFile
    try:
        with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:  # no whole column in memory
            pick(dict.fromkeys(file.schema_arrow.names), column, path)
            number, size = 0, path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(ROWS, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {column: value}, round(number * size)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no whole parquet file ({error}): fetch it again") from None


READERS = dict(zip(SUFFIXES, (read_parquet, read_jsonl, read_table, read_table)))


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer, and what goes on with it

def common_tokenizer(source, shards, folder, name, val_fraction):
    """The tokenizer of all shards. Raises UserError if the folder holds another data set.

    One that is learned is kept while the files are unchanged that it was learned from. Where it comes out otherwise
    than before, no shard counts as finished any more.
    """
    recipe = {"source": source.location, "revision": source.revision, "column": source.column, "tokenizer": name,
              "val_fraction": val_fraction}
    path, saved = folder / "recipe.json", folder / "tokenizer.json"
    found = check_recipe(source, shards, folder, recipe) if path.exists() else {}
    basis = learned_from(source.files, name)
    folder.mkdir(parents=True, exist_ok=True)
    learned = found.get("learned_from", basis if found and source.revision else [])
    if not basis or learned != basis or not saved.exists():
        tokenizer = tokenizers.build(name, lambda: [characters(source, folder)],
                                     lambda: sample(source, basis, folder, val_fraction))
        replace_tokenizer(folder, tokenizer)
    write_json(path, {**recipe, "learned_from": basis})  # last: without it the next start makes the tokenizer again
    return tokenizers.load(saved)


def replace_tokenizer(folder, tokenizer):
    """Saves the tokenizer of the folder. If it is another than the one before, no shard counts as finished any more."""
    path, new = folder / "tokenizer.json", folder / "tokenizer.json.new"
    tokenizer.save(new)
    if path.exists() and path.read_bytes() != new.read_bytes():
        print("the tokenizer is another one than before: all shards are written anew", flush=True)
        for old in (folder / "meta.json", *folder.glob("shard_*.json")):
            old.unlink(missing_ok=True)
    rename(new, path)


def check_recipe(source, shards, folder, recipe):
    """The recipe of the folder; {} if it has no finished shard of another one. Files that have moved are the same.

    Raises UserError if the finished shards are of another recipe.
    """
    found = {"column": "text", "source": recipe["source"], **read_json(folder / "recipe.json")}
    other = [key for key in recipe if found.get(key) != recipe[key]]
    if not other or other == ["source"] and finished(source, shards, folder)[0]:
        return found
    if any(folder.glob("shard_*.json")):
        other = ", ".join(f"{key} = {found.get(key)!r}" for key in other)
        raise UserError(f"{folder} holds another data set ({other}): delete it, or choose another --name")
    return {}


def learned_from(files, name):
    """The files that a tokenizer of this name is learned from: [] if it is not learned."""
    limit = math.inf if name == "char" else SAMPLE_BYTES if name.startswith("bpe:") else 0
    before = itertools.accumulate((file[1] for file in files), initial=0)
    return [file for file, size in zip(files, before) if size < limit]


def characters(source, folder):
    """All characters of the documents, and the newline that ends each: one pass over everything."""
    found = {"\n"}
    with progress(sum(file[1] for file in source.files), "looking for characters", "B") as bar:
        for _, text, _, _ in read(source, source.files, folder, 0, bar.update):
            found.update(text)
    return "".join(found)


def sample(source, files, folder, val_fraction):
    """Yields the first training documents, for a BPE to learn from."""
    count = 0
    for split, text, _, _ in read(source, files, folder, val_fraction):
        if split == "train":
            count += len(text)
            yield text
        if count >= SAMPLE_CHARACTERS:
            print(f"the tokenizer learns from the first {count:,} characters", flush=True)
            return


# ----------------------------------------------------------------------------------------------------------------------
# Shards

def group(files):
    """The files of each shard, as lists: one, or neighbours up to SHARD_BYTES together."""
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


def finished(source, shards, folder):
    """(numbers of the shards that are finished and whose files are the same, numbers of those with other files)."""
    done, stale = [], []
    for number, files in enumerate(shards):
        path = record_path(folder, number)
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # it is damaged: to be written again
            record = read_json(path)
            for name, count in zip(bin_names(number), (record["train_tokens"], record["val_tokens"])):
                if (folder / name).stat().st_size not in (2 * count, 4 * count):
                    raise UserError("it is not whole")
            old = record["files"]
            is_same = len(old) == len(files) and all(map(source.is_same, files, old))
            (done if is_same else stale).append(number)
            if is_same and [file[:len(files[0])] for file in old] != files:  # the next start needs not read them
                write_json(path, {**record, "files": [[*file, *past[3:]] for file, past in zip(files, old)]})
    return done, stale


def in_processes(processes, jobs):
    """write_shard(*job) for each job. The first error ends all processes and is raised here."""
    context = multiprocessing.get_context("spawn")
    counter, total = context.Value("q"), sum(file[1] for _, files, *_ in jobs for file in files)  # bytes of the files
    with (progress(total, "documents", "B") as bar,
          ProcessPoolExecutor(processes, context, start_process, [counter]) as pool):
        try:
            left = {pool.submit(write_shard, *job) for job in jobs}
            while left:
                done, left = wait(left, 0.5, FIRST_EXCEPTION)
                for future in done:
                    bar.write(future.result())
                bar.update(counter.value - bar.n)
        except process.BrokenProcessPool:
            raise UserError("a process was killed (memory?): run again to go on, with fewer --processes") from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def start_process(counter):
    """In each process: it exits when its parent dies, leaves Ctrl-C to the parent, and counts for it what is read."""
    write_shard.counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def count_bytes(n):
    counter = write_shard.counter
    with counter.get_lock():
        counter.value += n


def write_shard(number, files, source, folder, val_fraction):
    """Writes train_NUMBER.bin, val_NUMBER.bin and at last shard_NUMBER.json. Returns what there is to say of it."""
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    end = tokenizer.encode("\n\n") if tokenizer.eos is None else np.array([tokenizer.eos])
    record, digest = {"files": [], **dict.fromkeys(COUNTS, 0)}, hashlib.sha256()
    names = bin_names(number)
    with open(folder / f"{names[0]}.new", "wb") as train, open(folder / f"{names[1]}.new", "wb") as val:
        for split, text, content, document in read(source, files, folder, val_fraction, count_bytes):
            ids = np.concatenate((tokenizer.encode(text), end))
            (train if split == "train" else val).write(stored(ids, tokenizer).tobytes())
            digest.update(document)
            record["documents"] += 1
            record["bytes"] += len(content)
            record[f"{split}_characters"] += len(text)
            record[f"{split}_tokens"] += len(ids)
    record["sha256"] = digest.hexdigest()  # of its documents' SHA-256
    record["files"] = list(map(source.sealed, files))
    with contextlib.redirect_stdout(io.StringIO()) as said:  # the parent's line of progress is in the way here
        put_in_place(folder, names, record, record_path(folder, number).name)
    if source.revision:
        for name, _ in files:
            (folder / "download" / name).unlink(missing_ok=True)
    return said.getvalue().rstrip()


def remove_surplus(folder, count):
    """Removes the shards from number `count` on: of files that are gone, or that --max_files leaves out."""
    surplus = [path for path in folder.glob("*_*.*") if (match := re.fullmatch(
        r"(?:shard|train|val)_(\d{5,})\.(?:json|bin)(?:\.new)?", path.name)) and int(match[1]) >= count]
    for path in surplus:
        path.unlink()
    if number := sum(path.suffix == ".json" for path in surplus):
        print(f"removed {number:,} shards of files that are not among these any more", flush=True)
