"""Trains a model as a recipe says; prepares a known data set by itself; prints a sample at the end.

    python train.py                                      the defaults below: a debug run of seconds, on any machine
    python train.py config/shakespeare_char.py           a recipe; on a CPU it takes the recipe's on_cpu values
    python train.py config/shakespeare_char.py --max_iters=100 --out_dir=out/short
    python train.py --resume --out_dir=out               goes on where a run stopped, to the same numbers
    python train.py config/shakespeare_char.py --resume=auto       the same; where nothing was saved, it starts
    torchrun --nproc_per_node=2 train.py config/shakespeare_char.py

Later values win: defaults, config files, --name=value. The out directory gets the checkpoints `last` and `best`
(run/checkpoint.py), log.jsonl, run.json, samples.md and curves.svg; an earlier run found there is moved to earlier.N.
Below are the settings of every run; --help --task=NAME shows those of a task too.

Exit status: 0 finished; 2 an error that the one line explains; with a save: 75 stopped by --max_minutes or SIGUSR1,
129 by SIGHUP, 130 by Ctrl-C, 141 by an output that was closed, 143 by SIGTERM.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from configurator import UserError, differences, from_command_line, one_line_errors
from sources.known import BUILT_IN, check_dataset, ensure, locate
from tasks import TASKS, elsewhere
from tasks.settings import check_training


@dataclass(frozen=True)
class Settings:
    # where
    task: Literal[tuple(TASKS)] = "text"  # what is trained: text, contrastive, image-text
    out_dir: str = "out"  # everything the run leaves
    dataset: str = "shakespeare_char"  # a name under data/, or a folder made by prepare.py
    init_from: str = "scratch"  # or a run's folder, gpt2, gpt2-medium, -large, -xl, a hub id, a published folder
    resume: Literal[False, True, "auto"] = False  # continue the run in out_dir, with its settings; auto: or start it
    # the optimizer, with warm-up and decay
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, and AdamW for the rest
    batch_size: int = 16  # rows per update, over all workers
    micro_batch_size: int = 0  # rows in memory at a time; 0: the batch divided by the workers
    max_iters: int = 200  # updates
    learning_rate: float = 3e-3  # AdamW's at the peak
    muon_lr: float = 0.02  # Muon's at the peak; it falls in proportion
    lr_schedule: Literal["cosine", "linear"] = "cosine"  # the form of the decay
    min_lr: float = 3e-4  # at the end of the decay
    warmup_iters: int = 20  # updates to the peak
    lr_decay_iters: int = 0  # updates to min_lr; 0: max_iters
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.99  # and of its square
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    dropout: float = 0.0  # share of activations dropped in training; pays when the data is seen many times
    lora_rank: int = 0  # fine-tune init_from by LoRA of this rank, see lora.py; 0: all its weights
    rates: dict[str, float] = field(default_factory=dict)  # a multiple of the learning rate for a part; 0 freezes it
    # what it reports and saves
    eval_interval: int = 100  # updates between evaluations, each followed by a save
    eval_tokens: int = 2_000_000  # most tokens per evaluation; a shorter split is scored whole; 0: always whole
    save_minutes: float = 10.0  # minutes between saves of `last`, if evaluations are rarer; 0: only with these
    log_interval: int = 10  # updates between lines of the log
    async_save: bool = True  # write checkpoints in the background; training waits for a copy in memory only
    max_minutes: float = 0.0  # stop this start after so long, with a save and exit status 75; 0: no limit
    max_grad_norm: float = 0.0  # stop if the gradient's norm, before clipping, exceeds it; 0: if it is no number
    max_loss_rise: float = 0.0  # stop if a loss exceeds its mean of 100 updates by so much; 0: if it is no number
    sample_tokens: int = 300  # length of the sample at the end, and short ones at evaluations; 0: none
    wandb: bool = False  # log to Weights & Biases too (pip install wandb; WANDB_MODE=offline needs no account)
    wandb_project: str = "quill"  # its project
    wandb_name: str = ""  # the run's name there; default: wandb's choice
    # the machine
    seed: int = 1337  # of weights, batches and dropout
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: Literal["auto", True, False] = "auto"  # torch.compile
    shard: bool = False  # spread weights, gradients and moments over torchrun's workers instead of copying them
    recompute: bool = False  # compute each block again in the backward pass instead of keeping its activations

    def __post_init__(self):
        check_training(self)


def own_settings(values):
    """The class of the settings that the task adds."""
    return TASKS[values["task"]].training


def has_accelerator(device):
    from machine import device as devices  # imports torch: only if a recipe has on_cpu values
    return devices.has_accelerator(device)


def earlier_settings(given):
    """With --resume, the settings of the run that is being resumed."""
    wanted, out_dir = given.get("resume"), given.get("out_dir", Settings.out_dir)
    there = os.path.isdir(out_dir)  # asked here, for looking into it imports torch
    if wanted is True and not there:
        raise UserError(f"there is nothing to resume in {out_dir}: no such folder; drop --resume to start")
    if not wanted or not there:
        return {}
    from run import resume
    return resume.earlier_settings(out_dir, wanted)


def refuse(saved, given):
    """Raises UserError for a setting that a resumed run, which saved those, can't change."""
    from run import resume
    resume.refuse_changes(saved, given, own_settings(saved), BUILT_IN)


HOW = dict(more=own_settings, has_accelerator=has_accelerator, base=earlier_settings, refuse=refuse,
           check=lambda settings, given: check_dataset(settings.dataset), elsewhere=elsewhere(lambda row: row.training))
if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, GIVEN = from_command_line(Settings, __doc__, **HOW)

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from machine import distributed
from machine.device import autocast, keep_freed_memory, peak_flops, pick_compile, pick_dtype
from model import all_blocks
from optimizer import clip, make_optimizers, set_rates
from run import checkpoint, resume
from run.guards import Guard, guard_outputs, lost_output, require_finite
from run.lock import owned
from run.log import Log, improves, measures, say_where
from tasks.task import load, start


def update(task, wrapped, optimizers, scaler, step, world, dtype):
    """The update after `step` others: (this rank's share of the loss, the gradient's norm, what the task shows).

    The rows are cut into pieces, which the workers take in turn. What a piece draws follows from (seed, step, piece):
    no number depends on how many workers there are. A worker without a piece computes the first one, with weight 0.
    """
    s, device = task.settings, world.device
    rows = task.pick(step)
    size = s.micro_batch_size or len(rows) // world.size
    total, n_pieces = task.weight(rows), -(-len(rows) // size)
    turns = -(-n_pieces // world.size)
    loss, shown = torch.zeros((), device=device), {}
    for turn in range(turns):
        piece, share = turn * world.size + world.rank, 1 / total
        if piece >= n_pieces:
            piece, share = 0, 0.0
        seed = np.random.SeedSequence((s.seed, step, piece)).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))  # dropout draws from the global generators
        piece_rows = rows[piece * size:(piece + 1) * size]
        arguments, weights = task.batch(piece_rows, torch.Generator().manual_seed(int(seed)))
        # Copies exchange gradients once, in the last backward; shards in each, as a rank has no room for all of them.
        wait = isinstance(wrapped, DistributedDataParallel) and turn < turns - 1
        with wrapped.no_sync() if wait else nullcontext():  # around the forward pass too: DDP decides there
            with autocast(device, dtype):
                piece_loss, piece_shown = task.loss(wrapped, arguments, weights * share)
            scaler.scale(piece_loss * world.size).backward()  # the mean over ranks is then the sum
        loss += piece_loss.detach()
        for name, value in piece_shown.items():
            shown[name] = shown.get(name, 0) + value.detach()
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    norm = clip(wrapped, s.grad_clip)
    for optimizer in optimizers.values():
        scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    return loss, norm, shown


def train(settings, given, world):
    """The run: set up, then one loop. Returns (the task, the model, the log, the exit status or 0, the guard)."""
    out_dir, device = Path(settings.out_dir), world.device

    # The task, its data and its model.
    folder = world.from_main(lambda: resume.pick_up(out_dir, settings.resume))
    notes = list(resume.notes(folder, settings))
    task, model = start(settings, given, folder, locate(settings.dataset), world)
    state = checkpoint.load_trainer(folder) if folder else {"step": 0, "best": None}
    step, best, status = state["step"], state["best"], 0
    # What changes digits is decided once, from the whole run; it is recorded, and a resumed run keeps it.
    dtype, why_dtype = pick_dtype(settings.dtype, device)
    compiled, why_compiled = pick_compile(settings.compile, device, settings.max_iters)
    s = task.settings = replace(task.settings, dtype=str(dtype)[6:], compile=compiled,
                                micro_batch_size=piece_size(task, world))

    # Machinery.
    sharded = s.shard and world.size > 1
    wrapped = distributed.wrap(model, all_blocks(model), sharded, compiled, s.recompute, dtype, world)
    optimizers = make_optimizers(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if folder:
        for name, optimizer in optimizers.items():
            checkpoint.load_optimizer(optimizer, state[name], folder)
        scaler.load_state_dict(state["scaler"])
    if world.is_main:
        print("settings: " + (", ".join(f"{k}={v!r}" for k, v in differences(settings).items()) or "the defaults"))
        print(f"device: {device} x {world.size}; dtype: {s.dtype} ({why_dtype}); compile: {compiled} ({why_compiled})\n"
              + "\n".join((task.summary(model), *notes)), flush=True)
    log = Log(out_dir, task, model, step, peak_flops(device, dtype), world)

    model.train()
    guard = Guard(s, world, step, scaler.is_enabled(), state, lambda n: task.where(task.pick(n - 1)))
    with log, guard, checkpoint.Writer(out_dir, s.async_save, sharded) as writer:
        while step < s.max_iters and not status:
            lr = set_rates(optimizers, step + 1, s)
            guard.record(*update(task, wrapped, optimizers, scaler, step, world, dtype))  # stays on the device
            step += 1
            evaluating = step % s.eval_interval == 0 or step == s.max_iters
            logging = evaluating or step % s.log_interval == 0 or step == 1
            if logging or guard.due(step) or guard.status and world.size == 1:
                row = log.row(step, lr=lr, **guard.read(logging))  # waits for the device
                status, better = world.max(guard.status) if step < s.max_iters else 0, False
                if evaluating:
                    row |= evaluate(task, model, world, dtype, step)
                    if better := improves(task.best, row, best):
                        best = row[f"val_{task.best[0]}"]
                if logging:
                    log.write(row, better, None if sharded else model)
                if (saving := evaluating or status or guard.saving) and (world.is_main or sharded):
                    log.sync()
                    writer.save(["best"] * better + ["last"], model, task.tokenizers,
                                *snapshot(task, row, best, guard, optimizers, scaler))
                    guard.note_save()
                if logging or saving:
                    log.restart(step, evaluating)
                writer.raise_pending()
    return task, model, log, status, guard


def snapshot(task, row, best, guard, optimizers, scaler):
    """(what config.json says, what trainer.pt holds) of a checkpoint."""
    s, step = task.settings, row["step"]
    config = {**task.about, "lora_rank": s.lora_rank, "settings": asdict(s), "dataset": s.dataset, "step": step,
              "data": task.fingerprint(), "val_loss": None, **measures(row), "versions": checkpoint.versions()}
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    return config, {"step": step, "best": best, **guard.state, "scaler": scaler.state_dict(), **states}


def piece_size(task, world):
    """How many rows a piece of an update has: as set, or each worker's share at the run's first start.

    0: each worker's share at any start, for a task that scores each row against all others.
    """
    s = task.settings
    if task.whole:
        if s.micro_batch_size or s.batch_size % world.size:
            raise UserError(f"batch_size = {s.batch_size}, micro_batch_size = {s.micro_batch_size}: --task={s.task}"
                            " scores each row against all others, so every worker takes one piece: leave out"
                            f" --micro_batch_size, and choose a --batch_size that {world.size} divides")
        return 0
    size = s.micro_batch_size or -(-s.batch_size // world.size)
    n_pieces = -(-s.batch_size // size)
    if world.is_main and n_pieces < world.size:
        print(f"{world.size - n_pieces} of {world.size} workers are idle: an update has {n_pieces} pieces of {size}"
              " rows; a smaller --micro_batch_size gives all of them work, and slightly other numbers")
    return size


def evaluate(task, model, world, dtype, step):
    """{"val_loss": ..., ...} of the validation split. Raises UserError for what is no number."""
    model.eval()
    found = task.evaluate(model, "val", world, dtype, task.settings.eval_tokens)
    model.train()
    for name, value in found.items():
        require_finite(f"val_{name}", value, step)
    return {f"val_{name}": value for name, value in found.items()}


def main(settings, given):
    world = distributed.start(settings.device)
    keep_freed_memory()
    with owned(settings.out_dir) if world.is_main else nullcontext():
        name = world.from_main(lambda: ensure(settings.dataset))
        task, model, log, stopped, guard = train(replace(settings, dataset=name), given, world)
        with log, guard:
            if world.is_main:
                if settings.shard and world.size > 1:
                    model = load(checkpoint.find(settings.out_dir, "last"), world.device)[1]
                say_where(task, model.eval(), log, stopped, guard.reason(stopped))
            log.close(stopped := stopped or guard.signalled or lost_output(), guard.reason(stopped))
    world.close()
    if stopped:
        raise SystemExit(stopped)


if __name__ == "__main__":
    guard_outputs()
    with one_line_errors(), distributed.others_explain():
        main(SETTINGS, GIVEN)
