"""The loss of a trained model on a whole split: deterministic, twice the same run gives the same digits.

    python evaluate.py --out_dir=out                    also on a CPU; the best checkpoint, on the validation split
    torchrun --nproc_per_node=2 evaluate.py --out_dir=out

Writes evaluation.json into the out directory. Beside the loss on the whole split stands the estimate that nanoGPT
reports, the mean over random windows, under its own name: the two are different measures, never to be mixed.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_ranges, check_run, from_command_line, one_line_errors


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


def check_paths(settings):
    """Raises UserError for a run or a data set that isn't there."""
    check_run(settings.out_dir)
    if settings.dataset:
        from prepare import check_dataset
        check_dataset(settings.dataset)


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__, check=check_paths)

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import distributed
import tokenizer as tokenizers
from batches import (
    Dataset,
    ImageTextDataset,
    encode_captions,
    encode_rows,
    fixed_rows,
    fixed_windows,
    gather,
    gather_captions,
    gather_images,
    gather_rows,
    random_offsets,
)
from device import autocast, pick_dtype
from model import GPT
from prepare import ensure, locate
from tokenizer import write_json
from vlm import Gemma, PaliGemma, SigLIP, encode_prompt, generate, parse_boxes

EVAL_TOKENS = 16384  # tokens per batch of an evaluation: memory, not a result, depends on it


@torch.no_grad()
def split_loss(model, tokens, block_size, world, dtype, limit=0):
    """(mean loss in nats, tokens scored) over fixed windows of `tokens`, shared among the ranks.

    limit: most tokens to score (0: all). A model in training mode is returned to it.
    """
    batches = fixed_windows(len(tokens), block_size, max(1, EVAL_TOKENS // block_size), limit)
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for (offsets, length), counts in world.share(batches):
        batch = gather(tokens, offsets, length, world.device)
        scored = batch["targets"].numel() * counts
        with autocast(world.device, dtype):
            total += model(**batch).item() * scored
        count += scored
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


def evaluate_text(model, tokenizer, dataset, settings, world, dtype):
    """What is known of a language model on a split of a text."""
    tokens = dataset.tokens(settings.split, model.config.block_size)
    loss, count = split_loss(model, tokens, model.config.block_size, world, dtype)
    random_windows = random_window_loss(model, tokens, model.config.block_size, world, dtype, settings.random_windows,
                                        settings.batch_size, settings.seed) if settings.random_windows else None
    characters = dataset.meta[f"{settings.split}_characters"]
    return {"tokens": count, "loss": loss, "perplexity": math.exp(loss),
            "bits_per_char": loss / math.log(2) * len(tokens) / characters, "random_window_loss": random_windows}


# ----------------------------------------------------------------------------------------------------------------------
# Images

@torch.no_grad()
def answer_loss(model, dataset, data, batch_size, world, dtype, limit=0):
    """The mean loss in nats of the tokens of all answers in `data`, a split's encoded rows, shared among the ranks."""
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for rows, counts in world.share(fixed_rows(len(data.images), batch_size, limit)):
        batch = gather_rows(dataset.images, data, rows, world.device)
        scored = int((batch["targets"] >= 0).sum()) * counts
        with autocast(world.device, dtype):
            total += model(**batch).item() * scored
        count += scored
    model.train(was_training)
    total, count = world.sum(total, count)
    return total / count


def answers(model, tokenizer, dataset, rows, device, blank=False, batch_size=64):
    """The model's greedy answers to rows of the data set, as texts. blank: grey instead of every image."""
    longest = max(len(tokenizer.encode(row["answer"])) for row in rows) + 1
    found = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start:start + batch_size]
        images = gather_images(dataset.images, [row["image"] for row in batch], device)
        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in batch]
        steps = generate(model, images * (not blank), prompts, longest, temperature=0, eos=tokenizer.eos)
        for ids in torch.stack(list(steps), dim=1).tolist():
            end = ids.index(tokenizer.eos) if tokenizer.eos in ids else len(ids)
            found.append(tokenizer.decode(ids[:end]).strip())
    return found


def box_iou(answer, truth):
    """The mean over the boxes of both of each one's best overlap with the other's of its label, from 0 to 1."""
    found, right = parse_boxes(answer, 1, 1), parse_boxes(truth, 1, 1)
    best = [max((overlap(box, other) for other in others if other.label == box.label), default=0.0)
            for boxes, others in ((found, right), (right, found)) for box in boxes]
    return sum(best) / len(best) if best else float(answer == truth)


def overlap(a, b):
    """Intersection over union of two boxes."""
    width, height = min(a.right, b.right) - max(a.left, b.left), min(a.bottom, b.bottom) - max(a.top, b.top)
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((box.right - box.left) * (box.bottom - box.top) for box in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


def evaluate_answers(model, tokenizer, dataset, settings, world, dtype):
    """Exact matches for each kind of question, with the image and without it; overlap of boxes."""
    rows = dataset.rows[settings.split]
    with autocast(world.device, dtype):
        seen, blind = (answers(model, tokenizer, dataset, rows, world.device, blank) for blank in (False, True))
    result = {"rows": len(rows), "loss": answer_loss(model, dataset, encode_rows(rows, tokenizer), 64, world, dtype)}
    for kind in (*sorted({row["kind"] for row in rows}), ""):
        chosen = [i for i, row in enumerate(rows) if kind in ("", row["kind"])]
        label = f" {kind}" if kind else ""
        result[f"exact{label}"] = sum(seen[i] == rows[i]["answer"] for i in chosen) / len(chosen)
        result[f"exact{label} (image blanked)"] = sum(blind[i] == rows[i]["answer"] for i in chosen) / len(chosen)
        with_boxes = [i for i in chosen if parse_boxes(rows[i]["answer"], 1, 1)] if kind else []
        if with_boxes:
            result[f"box IoU{label}"] = sum(box_iou(seen[i], rows[i]["answer"]) for i in with_boxes) / len(with_boxes)
    return result


@torch.no_grad()
def pair_accuracy(model, dataset, data, batch_size, device, dtype):
    """How well a SigLIP tells the pairs of a split apart: every rank scores all of them.

    loss: in batches of batch_size. retrieval: the share of images (texts) whose best of all texts (images) is their
    own, or says the same. zero-shot: among the captions that several images share, taken as the names of classes.
    """
    was_training, losses, images, texts = model.training, [], [], []
    model.eval()
    for rows in fixed_rows(len(data.images), batch_size):
        batch = gather_captions(dataset.images, data, rows, device)
        with autocast(device, dtype):
            losses.append(model(**batch, across_ranks=False).item() * len(rows))
            images.append(F.normalize(model.encode_images(batch["images"]).float(), dim=-1))
            texts.append(F.normalize(model.text(batch["tokens"], batch["padding"]).float(), dim=-1))
    model.train(was_training)
    scores = (torch.cat(images) @ torch.cat(texts).T).cpu()  # (images, texts)
    _, same, counts = np.unique(data.ids, axis=0, return_inverse=True, return_counts=True)
    same, shared = torch.from_numpy(same.reshape(-1)), torch.from_numpy(counts > 1)[same.reshape(-1)]
    result = {"loss": sum(losses) / len(data.images),
              "retrieval image to text": (same[scores.argmax(1)] == same).float().mean().item(),
              "retrieval text to image": (same[scores.argmax(0)] == same).float().mean().item()}
    if shared.any():
        picked = same[scores[shared].masked_fill(~shared, -2).argmax(1)]
        result |= {"zero-shot": (picked == same[shared]).float().mean().item(),
                   "zero-shot classes": int((counts > 1).sum())}
    return result


def main(settings):
    world = distributed.start(settings.device)
    folder = checkpoint.find_any(settings.out_dir, settings.checkpoint)
    model, tokenizer, config = checkpoint.load(folder, world.device)
    text = model.config if isinstance(model, GPT | Gemma) else model.config.text
    dtype, why = pick_dtype(settings.dtype, world.device)
    name = world.from_main(lambda: ensure(settings.dataset or config["dataset"]))
    dataset = (Dataset if text is model.config else ImageTextDataset)(locate(name))
    if not tokenizers.same_vocabulary(tokenizer, tokenizers.load(dataset.folder / "tokenizer.json")):
        raise UserError(f"data set {name} was made with another tokenizer than {folder}: prepare it with that one")
    if isinstance(model, PaliGemma):
        found = evaluate_answers(model, tokenizer, dataset, settings, world, dtype)
    elif isinstance(model, SigLIP):
        captions = encode_captions(dataset.rows[settings.split], tokenizer)
        found = pair_accuracy(model, dataset, captions, settings.batch_size, world.device, dtype)
    else:
        found = evaluate_text(model, tokenizer, dataset, settings, world, dtype)
    result = {"step": config["step"], "checkpoint": folder.name, "dataset": name, "split": settings.split, **found,
              "dtype": str(dtype).removeprefix("torch.")}
    if world.is_main:
        print(f"{folder}, {settings.split} split of {name}, {result['dtype']} ({why})")
        for key, value in result.items():
            print(f"  {key:36} {value:,.6f}" if isinstance(value, float) else f"  {key:36} {value}")
        path = Path(settings.out_dir) / "evaluation.json"
        write_json(path, result)
        print(f"written to {path}")
    world.close()


if __name__ == "__main__":
    with one_line_errors(), distributed.others_explain():
        main(SETTINGS)
