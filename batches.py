"""Prepared data sets, and which of their rows make up a batch: a pure function of (seed, step), or fixed to evaluate.

Nothing here keeps state. So a run resumes from its step number alone, an evaluation can't disturb the order of
training, and the rows of a batch do not depend on the number of workers.

Axes: B batch, n images or pairs of a data set, S height and width of an image in pixels.
"""

import contextlib
import functools
import json

import numpy as np
import torch

from configurator import UserError

MOST_CHECKED = 2**26  # tokens of a split that are looked at when it is opened: a tenth of a second

# ----------------------------------------------------------------------------------------------------------------------
# Text

class Dataset:
    """A prepared folder of text. splits: {"train": ids, "val": ids}, memory-mapped. meta: the content of meta.json.

    Raises UserError if the files don't fit meta.json.
    """

    def __init__(self, folder):
        self.folder, self.meta = folder, read_meta(folder, "text")
        self.splits = {split: self.open_split(split) for split in ("train", "val")}

    def __repr__(self):
        counts = " and ".join(f"{len(tokens):,} {split} tokens" for split, tokens in self.splits.items())
        return f"Dataset({self.folder}: {counts})"

    def open_split(self, split):
        dtype, counts = np.dtype(self.meta["dtype"]), [self.meta[f"{split}_tokens"]]
        paths = [self.folder / f"{split}.bin"]
        if "shards" in self.meta:
            counts = self.meta["shards"][split]
            paths = [self.folder / f"{split}_{i:05}.bin" for i in range(len(counts))]
        for path, count in zip(paths, counts):
            if not path.exists() or path.stat().st_size != count * dtype.itemsize:
                raise UserError(f"{path} does not hold the {count:,} tokens that meta.json promises: prepare it again")
        arrays = [np.memmap(path, dtype=dtype, mode="r") for path, count in zip(paths, counts) if count]
        for array in arrays:
            if array[:MOST_CHECKED // len(arrays)].max() >= self.meta.get("vocab_size", 2**32):
                raise UserError(f"{array.filename} has numbers that are no tokens: prepare it again")
        return arrays[0] if len(arrays) == 1 else Joined(arrays)

    def tokens(self, split, block_size):
        """The ids of one split. Raises UserError if there are too few for one window of block_size + 1."""
        tokens = self.splits[split]
        if len(tokens) <= block_size:
            change = "larger" if split == "val" else "smaller"
            longest = max(1, min(map(len, self.splits.values())) - 1)
            raise UserError(f"the {split} split of {self.folder} has {len(tokens)} tokens, and block_size ="
                            f" {block_size} needs {block_size + 1}: use a longer text, a {change} --val_fraction in"
                            f" prepare.py, or --block_size={longest}")
        return tokens


class Joined:
    """One-dimensional arrays, one after the other, that are sliced as if they were one array."""

    def __init__(self, arrays):
        self.arrays, self.ends = arrays, np.cumsum([len(array) for array in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, window):
        i = np.searchsorted(self.ends, window.start, side="right")  # the array that the window starts in
        first, end = self.ends[i] - len(self.arrays[i]), self.ends[i]
        piece = self.arrays[i][window.start - first:window.stop - first]
        return piece if window.stop <= end else np.concatenate((piece, self[end:window.stop]))


META_KEYS = {"text": ("dtype", "train_tokens", "val_tokens"),
             "image-text": ("image_size", "images", "train_rows", "val_rows"),
             "pairs": ("dtype", "shared", "train_rows", "val_rows", "test_rows"),
             "image-labels": ("image_size", "images", "labels", "train_rows", "val_rows", "test_rows"),
             "images": ("image_size", "images", "train_rows", "val_rows"),
             "labels": ("labels", "several", "train_rows", "val_rows", "test_rows"),
             "tags": ("tags", "intents", "train_rows", "val_rows", "test_rows"),
             "answers": ("train_rows", "val_rows", "test_rows"),
             "columns": ("label", "labels", "columns", "train_rows", "val_rows", "test_rows"),
             **dict.fromkeys(("chat", "preferences"), ("world", "train_rows", "val_rows", "test_rows"))}
SPLITS = ("train", "val", "test")


def read_meta(folder, *kinds):
    """The content of meta.json. Raises UserError if it is damaged, or not of one of the kinds, keys of META_KEYS."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        found = meta.get("kind", "text")
        complete = all(name in meta for name in META_KEYS.get(found, ()))
    except (OSError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path} is damaged: prepare the data set again")
    if found not in kinds:
        hint = "; its pictures have no classes: sort them into a folder for each, and prepare them again"
        raise UserError(f"{folder} is a data set of kind {found}, and this model needs one of kind"
                        f" {' or '.join(kinds)}: name another --dataset"
                        + hint * (found == "images" and "image-labels" in kinds))
    return meta


def to_device(array, device):
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # from pinned memory the copy runs beside the computation
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def random_offsets(n_tokens, block_size, count, seed, step):
    """The offsets (count,) of random windows of block_size + 1 tokens: a pure function of (seed, step)."""
    generator = np.random.Generator(np.random.Philox(key=np.array((seed, step), dtype=np.uint64)))
    return generator.integers(0, n_tokens - block_size, size=count)


def read_windows(tokens, offsets, block_size, device):
    """{"tokens", "targets"}: int64 (len(offsets), block_size). The target of each token is the next token."""
    windows = np.stack([tokens[offset:offset + block_size + 1] for offset in offsets]).astype(np.int64)
    windows = to_device(windows, device)
    return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def fixed_windows(n_tokens, block_size, batch_size, limit=0):
    """A list of batches (offsets, length) of adjacent windows, in which every token but the first is a target once.

    length: tokens of each window: block_size, except that the last window may be shorter, in a batch of its own.
    limit: score at most this many tokens, but at least one window, in evenly spread windows; 0: all.
    """
    offsets = np.arange(0, n_tokens - 1, block_size)
    if limit and n_tokens - 1 > limit:
        keep = max(1, limit // block_size)
        offsets = offsets[np.arange(keep) * len(offsets) // keep]
    lengths = np.minimum(block_size, n_tokens - 1 - offsets)
    whole = offsets[lengths == block_size]
    batches = [(whole[i:i + batch_size], block_size) for i in range(0, len(whole), batch_size)]
    rest = [(offsets[-1:], int(lengths[-1]))] if len(whole) < len(offsets) else []
    return batches + rest


# ----------------------------------------------------------------------------------------------------------------------
# Images with text, or with labels

class ImageTextDataset:
    """A prepared folder of images with text. images: uint8 (n, S, S, 3), memory-mapped. meta: from meta.json.

    rows: {"train": [...], "val": [...]} of dicts with image (an index), prompt, answer, kind, and the original width
    and height in pixels. kind "image-labels": with image, label and file; also for "test". kind "images": with image
    and file. Raises UserError if the files don't fit meta.json.
    """

    def __init__(self, folder, *kinds):
        self.folder, self.meta = folder, read_meta(folder, *(kinds or ("image-text",)))
        self.image_size = self.meta["image_size"]
        self.images = open_images(folder, self.meta)
        self.rows = {split: self.read_rows(split) for split in SPLITS if f"{split}_rows" in self.meta}

    def __repr__(self):
        counts = " and ".join(f"{len(rows):,} {split} rows" for split, rows in self.rows.items())
        return f"ImageTextDataset({self.folder}: {counts}, {len(self.images):,} images of {self.image_size} pixels)"

    def read_rows(self, split):
        path, count = self.folder / f"{split}.jsonl", self.meta[f"{split}_rows"]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the file is missing or damaged
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            if len(rows) == count and all(row["image"] < self.meta["images"] for row in rows):
                return rows
        raise UserError(f"{path} does not hold the {count:,} rows that meta.json promises: prepare it again")


def open_images(folder, meta):
    """The images of a prepared folder, uint8 (n, S, S, 3), memory-mapped. Raises UserError if they don't fit meta."""
    path, shape = folder / "images.bin", (meta["images"], meta["image_size"], meta["image_size"], 3)
    if not path.exists() or path.stat().st_size != np.prod(shape):
        raise UserError(f"{path} does not hold the {shape[0]:,} images that meta.json promises: prepare it again")
    return np.memmap(path, dtype=np.uint8, mode="r", shape=shape)


def read_images(images, indices, device):
    """The images (n, S, S, 3), uint8, at B indices, as `scaled` gives them."""
    return scaled(images[indices], device)


def scaled(images, device):
    """Images (B, S, S, 3), uint8, as float32 (B, 3, S, S) in [-1, 1]."""
    return to_device(images, device).permute(0, 3, 1, 2).float() / 127.5 - 1


def shuffled_rows(n_rows, count, seed, step):
    """The indices (count,) of a step's rows: a pure function of (seed, step). Raises UserError for too few rows.

    An epoch is n_rows // count steps, without replacement. Each epoch has its own order.
    """
    if not 0 < count <= n_rows:
        raise UserError(f"batch_size = {count}: must be from 1 to {n_rows}, the number of training rows")
    epoch, place = divmod(step, n_rows // count)
    return epoch_order(n_rows, seed, epoch)[place * count:(place + 1) * count]


@functools.lru_cache(maxsize=2)
def epoch_order(n_rows, seed, epoch):
    order = np.random.Generator(np.random.Philox(key=np.array((seed, epoch), dtype=np.uint64))).permutation(n_rows)
    order.flags.writeable = False  # the cache hands out this very array
    return order


def fixed_rows(n_rows, batch_size, limit=0):
    """A list of batches of row indices, in order. limit: take at most this many rows, evenly spread; 0: all."""
    rows = np.arange(n_rows)
    if limit and n_rows > limit:
        rows = rows[np.arange(limit) * n_rows // limit]
    return [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]


# ----------------------------------------------------------------------------------------------------------------------
# Pairs: a sentence and its translation

class PairsDataset:
    """A prepared folder of pairs, memory-mapped. meta: from meta.json. Each split is "train", "val" or "test".

    lengths: {split: int32 (n, 2)}, the tokens of each source and target, without special tokens. rows: {split: list of
    dicts} with the texts source and target, and page where there are pages; a split is read when it is asked for.
    Raises UserError if the files don't fit meta.json.
    """

    def __init__(self, folder):
        self.folder, self.meta = folder, read_meta(folder, "pairs")
        self.lengths, self.files, self.ends, self.rows = {}, {}, {}, Rows(self, {"source": str, "target": str})
        for split in ("train", "val", "test"):
            count = self.meta[f"{split}_rows"]
            lengths = self.open(f"{split}_lengths.bin", np.int32, 2 * count).reshape(count, 2)
            ends = np.concatenate((np.zeros((1, 2), np.int64), np.cumsum(lengths, axis=0, dtype=np.int64)))
            self.files[split] = [self.open(f"{split}_{side}.bin", self.meta["dtype"], ends[-1, i])
                                 for i, side in enumerate(("source", "target"))]
            self.lengths[split], self.ends[split] = lengths, ends

    def __repr__(self):
        counts = ", ".join(f"{len(lengths):,} {split}" for split, lengths in self.lengths.items())
        return f"PairsDataset({self.folder}: {counts} pairs)"

    def open(self, name, dtype, count):
        path, dtype = self.folder / name, np.dtype(dtype)
        if not path.exists() or path.stat().st_size != count * dtype.itemsize:
            raise UserError(f"{path} does not hold the {count:,} numbers that it should: prepare the data set again")
        return np.memmap(path, dtype=dtype, mode="r") if count else np.zeros(0, dtype)

    def ids(self, split, row):
        """(source ids, target ids) of a row, without special tokens."""
        begin, end = self.ends[split][row], self.ends[split][row + 1]
        return tuple(file[begin[i]:end[i]] for i, file in enumerate(self.files[split]))


class Rows(dict):
    """{split: list of dicts}, where a split is read from the data set's {split}.jsonl when it is asked for.

    columns: {name: the type of its values}, which every row has.
    """

    def __init__(self, dataset, columns):
        super().__init__()
        self.dataset, self.columns = dataset, columns

    def __missing__(self, split):
        path, count = self.dataset.folder / f"{split}.jsonl", self.dataset.meta[f"{split}_rows"]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the file is missing or damaged
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            if all(isinstance(row[name], kind) for row in rows for name, kind in self.columns.items()):
                self[split] = rows
        if len(self.get(split, ())) != count:
            raise UserError(f"{path} does not hold the {count:,} rows that meta.json promises: prepare it again")
        return self[split]


def token_batches(lengths, batch_tokens, seed, step):
    """The indices of a step's rows, (B,): sentences of like length. A pure function of the arguments.

    lengths: (n, 2), the tokens of each source and target as the model sees them, special ones included. A batch has at
    most batch_tokens tokens, padding included: B times its longest source and its longest target. An epoch is
    `batches_per_epoch` steps, in which every row occurs once. Each epoch has its own order of batches, and deals the
    rows of equal lengths anew. Raises UserError if a single row is longer than a batch.
    """
    key = np.ascontiguousarray(lengths, dtype=np.int32).tobytes()  # an array can't be the key of a cache
    cuts = batch_cuts(key, batch_tokens)
    epoch, place = divmod(step, len(cuts) - 1)
    order, batches = epoch_of_batches(key, len(cuts) - 1, seed, epoch)
    batch = batches[place]
    return order[cuts[batch]:cuts[batch + 1]]


def batches_per_epoch(lengths, batch_tokens):
    """The number of `token_batches` of an epoch. It is the same in every epoch."""
    return len(batch_cuts(np.ascontiguousarray(lengths, dtype=np.int32).tobytes(), batch_tokens)) - 1


@functools.lru_cache(maxsize=8)
def batch_cuts(lengths, batch_tokens):
    """Where the batches begin in the sorted rows, and the end of the last one: int64 (number of batches + 1,).

    lengths: the bytes of an int32 array (n, 2). The cuts depend on the lengths alone, so that every epoch has as many.
    """
    lengths = np.frombuffer(lengths, dtype=np.int32).reshape(-1, 2)
    longest = int(lengths.sum(1).max(initial=0))
    if longest > batch_tokens:
        raise UserError(f"batch_size = {batch_tokens}: counts tokens here, and the longest pair has {longest}: use at"
                        " least as many")
    cuts, first, source, target = [0], 0, 0, 0  # source, target: the longest ones of the batch so far
    for place, (one, other) in enumerate(lengths[by_length(lengths)].tolist()):
        source, target = max(source, one), max(target, other)
        if (place + 1 - first) * (source + target) > batch_tokens:
            cuts.append(place)
            first, source, target = place, one, other
    return np.array([*cuts, len(lengths)])


@functools.lru_cache(maxsize=2)
def epoch_of_batches(lengths, n_batches, seed, epoch):
    """(the rows sorted by length, the batches in the order of the epoch). lengths: as for `batch_cuts`."""
    lengths = np.frombuffer(lengths, dtype=np.int32).reshape(-1, 2)
    generator = np.random.Generator(np.random.Philox(key=np.array((seed, epoch), dtype=np.uint64)))
    shuffled = generator.permutation(len(lengths))
    order = shuffled[by_length(lengths[shuffled])]  # rows of equal lengths stay shuffled
    order.flags.writeable = False  # the cache hands out parts of this very array
    return order, generator.permutation(n_batches)


def by_length(lengths):
    """The order (n,) of the rows by target length; equal ones by source length, alternately rising and falling.

    Thus neighbours have like sources too, where the next target length begins. Rows of equal lengths keep their order.
    """
    source, target = lengths.astype(np.int64).T
    return np.lexsort((np.where(target % 2, source, -source), target))


# ----------------------------------------------------------------------------------------------------------------------
# Labelled texts

LABELLED = {"labels": {"text": str, "labels": list}, "tags": {"words": list, "tags": list, "intent": str},
            "answers": {"question": str, "context": str, "answers": dict}}


class LabelledDataset:
    """A prepared folder of texts with labels. meta: from meta.json. Each split is "train", "val" or "test".

    rows: {split: list of dicts}. kind "labels": each has text and labels, a list of names. kind "tags": words, tags (a
    name for each word, or []), and intent (a name, or ""). kind "answers": question, context, and answers, with the
    lists text and answer_start. The tokenizer of the model makes token ids of them later, so a data set serves every
    model. Raises UserError if the files don't fit meta.json.
    """

    def __init__(self, folder, kind):
        self.folder, self.meta = folder, read_meta(folder, kind)
        self.rows = Rows(self, LABELLED[kind])

    def __repr__(self):
        counts = ", ".join(f"{self.meta[f'{split}_rows']:,} {split}" for split in ("train", "val", "test"))
        return f"LabelledDataset({self.folder}: {counts} rows)"


class ColumnsDataset:
    """A prepared folder of rows of a table. meta: from meta.json; its columns say the kind of each value.

    rows: {split: list of dicts} with label (the name of a class; where meta.json names none, a float) and values:
    {column: a float, the name of a category, a text, or the index of a picture; None if it is missing}. images: uint8
    (n, S, S, 3), memory-mapped, and image_size: S; None if no column has pictures. Raises UserError if the files don't
    fit meta.json.
    """
    TYPES = {"number": float, "category": str, "text": str, "picture": int}

    def __init__(self, folder):
        self.folder, self.meta = folder, read_meta(folder, "columns")
        self.image_size = self.meta.get("image_size")
        self.images = open_images(folder, self.meta) if self.image_size else None
        self.rows = Rows(self, {"values": dict, "label": str if self.meta["labels"] else float})
        quantity = [] if self.meta["labels"] else [{"kind": "number", "std": self.meta.get("std", 0)}]
        if not all(each.get("kind") in self.TYPES and each.get("std", 1) > 0
                   for each in self.meta["columns"] + quantity):
            raise UserError(f"{folder / 'meta.json'} is damaged: prepare the data set again")
        types = {column["name"]: self.TYPES[column["kind"]] for column in self.meta["columns"]}
        pictures = [column["name"] for column in self.meta["columns"] if column["kind"] == "picture"]
        for split in SPLITS:
            if not all(self.fits(row["values"], types, pictures) for row in self.rows[split]):
                raise UserError(f"{folder / split}.jsonl has a row that does not fit the columns of meta.json: prepare"
                                " the data set again")

    def fits(self, values, types, pictures):
        """True if a row has a value of its type, or None, for each column, and an index of a picture is in range."""
        return (values.keys() == types.keys()
                and all(value is None or type(value) is types[name] for name, value in values.items())
                and all(0 <= (values[name] or 0) < self.meta["images"] for name in pictures))

    def __repr__(self):
        counts = ", ".join(f"{self.meta[f'{split}_rows']:,} {split}" for split in SPLITS)
        return f"ColumnsDataset({self.folder}: {counts} rows, {len(self.meta['columns'])} columns)"


class DialogueDataset:
    """A prepared folder of dialogues. meta: from meta.json. Each split is "train", "val" or "test".

    rows: {split: list}. kind "chat": of messages, each a list of {"role", "content"}. kind "preferences": of dicts with
    messages, and with chosen and rejected, the texts of two answers. Raises UserError if the files don't fit meta.json.
    """

    def __init__(self, folder, kind="chat"):
        self.folder, self.meta = folder, read_meta(folder, kind)
        columns = {"messages": list} | (dict(chosen=str, rejected=str) if kind == "preferences" else {})
        found = Rows(self, columns)
        self.rows = {split: found[split] if kind == "preferences" else [row["messages"] for row in found[split]]
                     for split in ("train", "val", "test")}

    def __repr__(self):
        counts = ", ".join(f"{len(rows):,} {split}" for split, rows in self.rows.items())
        return f"DialogueDataset({self.folder}: {counts} rows)"


# ----------------------------------------------------------------------------------------------------------------------
# Texts of different lengths

def padded(rows, pad):
    """(ids (B, longest) int64, padded on the right; lengths (B,)) of B lists of ids."""
    lengths = np.array([len(ids) for ids in rows])
    out = np.full((len(rows), lengths.max()), pad, dtype=np.int64)
    for line, ids in zip(out, rows):
        line[:len(ids)] = ids
    return out, lengths


def length_batches(lengths, most):
    """A list of batches of indices, from the shortest to the longest, of at most `most` tokens with padding."""
    batches, batch = [], []
    for i in np.argsort(lengths, kind="stable"):
        if batch and lengths[i] * (len(batch) + 1) > most:
            batches.append(np.array(batch))
            batch = []
        batch.append(i)
    return batches + [np.array(batch)] * bool(batch)
