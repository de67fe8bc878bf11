"""The loss of a trained model on a whole split: deterministic, twice the same run gives the same digits.

    python evaluate.py --out_dir=out                    also on a CPU; the best checkpoint, on the validation split
    torchrun --nproc_per_node=2 evaluate.py --out_dir=out

Writes evaluation.json into the out directory. Beside the loss on the whole split stands the estimate that nanoGPT
reports, the mean over random windows, under its own name: the two are different measures, never to be mixed.
"""

import math
from dataclasses import dataclass
from typing import Literal

from configurator import UserError, check_ranges, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    out_dir: str = "out"  # a run's folder, or one checkpoint's
    checkpoint: Literal["best", "last"] = "best"  # which of the run's two
    dataset: str = ""  # another data set, with the same tokenizer; default: the one it was trained on
    split: Literal["val", "train"] = "val"  # which part of the data set
    random_windows: int = 200  # batches of the random-window estimate; 0: none
    batch_size: int = 64  # windows per batch of the random-window estimate
    seed: int = 1337  # of the random windows
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the computation

    def __post_init__(self):
        check_ranges(self, random_windows=0, batch_size=1, seed=0)


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__)

from pathlib import Path

import torch

import checkpoint
import distributed
import tokenizer as tokenizers
from batches import Dataset, fixed_windows, gather, random_offsets
from device import autocast, pick_dtype
from prepare import ensure, locate
from tokenizer import write_json

EVAL_TOKENS = 16384  # tokens per batch of an evaluation: memory, not a result, depends on it


@torch.no_grad()
def split_loss(model, tokens, block_size, world, dtype, limit=0):
    """(mean loss in nats, tokens scored) over fixed windows of `tokens`, shared among the ranks.

    limit: most tokens to score (0: all). A model in training mode is returned to it.
    """
    batches = fixed_windows(len(tokens), block_size, max(1, EVAL_TOKENS // block_size), limit)
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for offsets, length in batches[world.rank::world.size]:
        batch = gather(tokens, offsets, length, world.device)
        with autocast(world.device, dtype):
            total += model(**batch).item() * batch["targets"].numel()
        count += batch["targets"].numel()
    model.train(was_training)
    total, count = world.sum(total, count)
    return total / count, int(count)


@torch.no_grad()
def random_window_loss(model, tokens, block_size, world, dtype, n_batches, batch_size, seed):
    """nanoGPT's protocol: the mean loss of n_batches batches of windows at random places."""
    total = 0.0
    for i in range(world.rank, n_batches, world.size):
        offsets = random_offsets(len(tokens), block_size, batch_size, seed, i)
        with autocast(world.device, dtype):
            total += model(**gather(tokens, offsets, block_size, world.device)).item()
    return world.sum(total)[0] / n_batches


def main(settings):
    world = distributed.start(settings.device)
    folder = checkpoint.find_any(settings.out_dir, settings.checkpoint)
    model, tokenizer, config = checkpoint.load(folder, world.device)
    dtype, why = pick_dtype(settings.dtype, world.device, model.config.n_embd)
    name = world.from_main(lambda: ensure(settings.dataset or config["dataset"]))
    dataset = Dataset(locate(name))
    if not tokenizers.same_vocabulary(tokenizer, tokenizers.load(dataset.folder / "tokenizer.json")):
        raise UserError(f"data set {name} was made with another tokenizer than {folder}: prepare it with that one")
    tokens = dataset.tokens(settings.split, model.config.block_size)
    loss, count = split_loss(model, tokens, model.config.block_size, world, dtype)
    random_windows = random_window_loss(model, tokens, model.config.block_size, world, dtype, settings.random_windows,
                                        settings.batch_size, settings.seed) if settings.random_windows else None
    characters = dataset.meta[f"{settings.split}_characters"]
    result = {
        "step": config["step"], "checkpoint": folder.name, "dataset": name, "split": settings.split,
        "tokens": count, "loss": loss, "perplexity": math.exp(loss),
        "bits_per_char": loss / math.log(2) * len(tokens) / characters,
        "random_window_loss": random_windows, "dtype": str(dtype).removeprefix("torch.")}
    if world.is_main:
        print(f"{folder}, {settings.split} split of {name}, {result['dtype']} ({why})")
        for key, value in result.items():
            print(f"  {key:20} {value:,.6f}" if isinstance(value, float) else f"  {key:20} {value}")
        path = Path(settings.out_dir) / "evaluation.json"
        write_json(path, result)
        print(f"written to {path}")
    world.close()


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
