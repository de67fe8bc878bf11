"""Batches as a pure function of (seed, step), and fixed windows for evaluation.

Nothing here has a state: to resume a run only its step number is needed, evaluation can't disturb the order of
training, and one worker or four see the same sequences.
"""

import json

import numpy as np
import torch

from configurator import UserError


class Dataset:
    """A prepared folder: memory-mapped token ids of its splits, and its meta.

    Raises UserError if the folder's files don't fit its meta.json.
    """

    def __init__(self, folder):
        self.folder = folder
        with open(folder / "meta.json", encoding="utf-8") as file:
            self.meta = json.load(file)
        self.vocab_size = self.meta["vocab_size"]
        dtype = np.dtype(self.meta["dtype"])
        self.splits = {}
        for split in ("train", "val"):
            path, count = folder / f"{split}.bin", self.meta[f"{split}_tokens"]
            if not path.exists() or path.stat().st_size != count * dtype.itemsize:
                raise UserError(f"{path} does not hold the {count:,} tokens that meta.json promises: prepare it again")
            self.splits[split] = np.memmap(path, dtype=dtype, mode="r")

    def tokens(self, split, block_size):
        """The ids of one split. Raises UserError if they are fewer than one window of block_size + 1."""
        tokens = self.splits[split]
        if len(tokens) <= block_size:
            raise UserError(f"the {split} split of {self.folder} has {len(tokens)} tokens, and block_size ="
                            f" {block_size} needs {block_size + 1}: use a longer text, a larger --val_fraction in"
                            f" prepare.py, or --block_size={max(1, len(tokens) - 1)}")
        return tokens


def random_offsets(n_tokens, block_size, count, *key):
    """Where `count` random windows of block_size + 1 tokens start: a pure function of the key (two integers)."""
    generator = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
    return generator.integers(0, n_tokens - block_size, size=count)


def gather(tokens, offsets, block_size, device):
    """{tokens, targets}: (len(offsets), block_size) int64 tensors; targets are the tokens one place on."""
    windows = tokens[np.asarray(offsets)[:, None] + np.arange(block_size + 1)].astype(np.int64)
    windows = torch.from_numpy(windows)
    if device.type == "cuda":  # pinned memory lets the copy run beside the computation
        windows = windows.pin_memory().to(device, non_blocking=True)
    else:
        windows = windows.to(device)
    return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def fixed_windows(n_tokens, block_size, batch_size, limit=0):
    """Batches of (offsets, length) that score every token but the first once, in windows side by side.

    The last window may be shorter and then makes a batch of its own. limit > 0 caps the tokens scored: an evenly
    spread subset of the windows stands for a huge split.
    """
    offsets = np.arange(0, n_tokens - 1, block_size)
    if limit and n_tokens - 1 > limit:
        keep = max(1, limit // block_size)
        offsets = offsets[np.arange(keep) * len(offsets) // keep]
    tail = (n_tokens - 1) % block_size
    whole = offsets[:-1] if tail and offsets[-1] + block_size > n_tokens - 1 else offsets
    batches = [(whole[i:i + batch_size], block_size) for i in range(0, len(whole), batch_size)]
    return batches + ([(offsets[-1:], tail)] if len(whole) < len(offsets) else [])
