"""Trains a model with the settings of a recipe, and prints a sample at the end. Built-in data sets are prepared first.

    python train.py                                      the defaults below: a debug run of seconds on any machine
    python train.py config/shakespeare_char.py           a recipe; on a CPU it takes the recipe's on_cpu values
    python train.py --resume --out_dir=out               continues a stopped run, as if it had never stopped
    torchrun --nproc_per_node=2 train.py config/shakespeare_char.py

Config files override the defaults, and --name=value overrides both. The run writes the checkpoints `last` and `best`
(run/checkpoint.py), log.jsonl, run.json, samples.md and curves.svg to out_dir, and moves an earlier run there to
earlier.N. The settings of every run follow; --help --task=NAME also shows those of a task.

Exit status: 0 the run has finished; 2 an error, explained in one line. The run has saved and can be resumed after: 75
--max_minutes or SIGUSR1; 129 SIGHUP; 130 Ctrl-C; 141 the output was closed; 143 SIGTERM. torchrun makes 1 of all but 0.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from configurator import UserError, differences, from_command_line, one_line_errors
from sources.known import BUILT_IN, check_dataset, ensure, locate
from tasks import TASKS, elsewhere, own_data
from tasks.settings import OPTIMIZERS, check_training


@dataclass(frozen=True)
class Settings:
    # task, data and folders
    task: Literal[tuple(TASKS)] = "text"  # what to train; --help --task=NAME lists a task's own settings
    out_dir: str = "out"  # folder for everything the run writes
    dataset: str = "shakespeare_char"  # a name under data/, or a folder made by prepare.py
    init_from: str = "scratch"  # scratch, a run's folder, a published folder or hub id, gpt2, gpt2-medium, -large, -xl
    resume: Literal[False, True, "auto"] = False  # continue the run in out_dir; auto: start one if none was saved there
    # optimizer and learning rate
    optimizer: Literal[OPTIMIZERS] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for the rest
    batch_size: int = 16  # rows per update, all workers together
    micro_batch_size: int = 0  # rows per forward and backward pass; 0: batch_size / number of workers
    max_iters: int = 200  # number of updates
    learning_rate: float = 3e-3  # AdamW's peak learning rate
    muon_lr: float = 0.02  # Muon's peak learning rate; it follows the same schedule
    lr_schedule: Literal["cosine", "linear", "noam"] = "cosine"  # shape of the decay; noam: 1 / sqrt(update), endless
    min_lr: float = 3e-4  # AdamW's learning rate at the end of the decay
    warmup_iters: int = 20  # updates of linear warm-up to the peak
    lr_decay_iters: int = 0  # update at which the decay ends; 0: max_iters
    weight_decay: float = 0.1  # for matrices and embeddings only
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.99  # AdamW's decay of the mean squared gradient
    grad_clip: float = 1.0  # clip the gradient to this norm; 0: no clipping
    dropout: float = 0.0  # share of activations dropped in training; helps if the data is seen many times
    lora_rank: int = 0  # fine-tune init_from with LoRA of this rank (lora.py); 0: train all weights
    lora_alpha: float = 0.0  # LoRA's update counts lora_alpha / lora_rank times; 0: twice
    lora_targets: str = ""  # names of the linear layers that LoRA adapts, such as q_proj,v_proj; empty: all
    rates: dict[str, float] = field(default_factory=dict)  # learning rate multiplier for a part of the model; 0: frozen
    # evaluation, logging and saving
    eval_interval: int = 100  # updates between evaluations; a save follows each
    eval_tokens: int = 2_000_000  # tokens to score per evaluation, at most; 0: the whole split
    save_minutes: float = 10.0  # minutes between saves of `last`, if evaluations are rarer; 0: save at evaluations only
    log_interval: int = 10  # updates between log lines
    async_save: bool = True  # write checkpoints in the background; training waits only for a copy in memory
    max_minutes: float = 0.0  # save and exit with status 75 after this many minutes; 0: no limit
    max_grad_norm: float = 0.0  # stop if the gradient norm before clipping exceeds this; 0: only if NaN or infinite
    max_loss_rise: float = 0.0  # stop if the loss minus its running mean exceeds this; 0: only if NaN or infinite
    sample_tokens: int = 300  # tokens of the sample at the end; evaluations print at most 100; 0: no samples
    wandb: bool = False  # also log to Weights & Biases (pip install wandb; WANDB_MODE=offline needs no account)
    wandb_project: str = "quill"  # Weights & Biases project
    wandb_name: str = ""  # run name in Weights & Biases; default: wandb chooses one
    # the machine
    seed: int = 1337  # seed of weights, batches and dropout
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number format of matrix products
    compile: Literal["auto", True, False] = "auto"  # use torch.compile; auto: only for long runs on CUDA
    capture: bool = True  # on CUDA, record each update as a CUDA graph, where possible; it saves launching its kernels
    shard: bool = False  # split weights, gradients and optimizer state among torchrun's workers (FSDP2)
    recompute: bool = False  # recompute each block in the backward pass instead of storing its activations

    def __post_init__(self):
        check_training(self)


def has_accelerator(device):
    from machine import device as devices  # imports torch: only if a recipe has on_cpu values
    return devices.has_accelerator(device)


def earlier_settings(given):
    """Returns the saved settings of the run to resume; {} for a new run. Raises UserError if --resume finds none."""
    wanted, out_dir = given.get("resume"), given.get("out_dir", Settings.out_dir)
    there = os.path.isdir(out_dir)  # checked before run.resume is imported, which imports torch
    if wanted is True and not there:
        raise UserError(f"there is nothing to resume in {out_dir}: no such folder; drop --resume to start")
    if not wanted or not there:
        return {}
    from run import resume
    return resume.earlier_settings(out_dir, wanted, Settings, {task: row.training for task, row in TASKS.items()})


def refuse(saved, given):
    """Raises UserError if `given` changes a setting that a resumed run must keep. saved: the run's settings."""
    from run import resume
    resume.refuse_changes(saved, given, TASKS[saved["task"]].training, BUILT_IN)


HOW = dict(more=lambda values: TASKS[values["task"]].training, base=earlier_settings, refuse=refuse,
           check=lambda s, given: own_data(s.task, given) or check_dataset(s.dataset, s.init_from, TASKS[s.task].kinds),
           elsewhere=elsewhere(lambda row: row.training),
           has_accelerator=has_accelerator)  # how `parse` reads the command line
if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, GIVEN = from_command_line(Settings, __doc__, **HOW)

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from machine import distributed
from machine.capture import captured, obstacle_to_capture
from machine.device import autocast, cudnn_attention, peak_flops, pick_compile, pick_dtype, prepare_kernels
from model import all_blocks
from optimizer import clip, make_optimizers, set_rates
from run import checkpoint, resume
from run.guards import Guard, guard_outputs, lost_output, require_finite
from run.lock import owned
from run.log import Log, improves, measures, say_where
from tasks.loading import load, start


class Work:
    """What an update computes: `backward` for each of its micro-batches, then `finish`."""

    def __init__(self, task, wrapped, optimizers, scaler, world, dtype):
        self.task, self.wrapped, self.optimizers, self.scaler = task, wrapped, optimizers, scaler
        self.world, self.dtype = world, dtype

    def backward(self, arguments, weights):
        """Adds a micro-batch's gradients to those of the parameters. Arguments and results: see `Task.loss`."""
        with autocast(self.world.device, self.dtype):
            loss, shown = self.task.loss(self.wrapped, arguments, weights)
        self.scaler.scale(loss * self.world.size).backward()  # cancels the division by world.size
        return loss.detach(), {name: value.detach() for name, value in shown.items()}

    def finish(self):
        """Clips the gradients, makes the optimizers' step, and frees the gradients. Returns their norm before that."""
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = clip(self.wrapped, self.task.settings.grad_clip)
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm


def update(task, work, step, world):
    """Makes one update, after `step` earlier ones. Returns (loss, gradient norm, {name: value for the log}).

    Loss and values are this rank's shares, to be summed over the ranks. The ranks take the batch's micro-batches in
    turn; a rank that gets none computes the first one with weight 0.
    """
    rows = task.pick(step)
    total, size = task.weight(rows), task.piece(rows)
    turns = -(-len(rows) // (size * world.size))
    loss, shown = torch.zeros((), device=world.device), {}
    for turn in range(turns):
        number, share = turn * world.size + world.rank, 1 / total
        if number * size >= len(rows):
            number, share = 0, 0.0
        arguments, weights = micro_batch(task, rows[number * size:(number + 1) * size], step, number)
        # DDP averages gradients in the last backward pass only. FSDP does in each: a rank can't hold whole gradients.
        wait = isinstance(work.wrapped, DistributedDataParallel) and turn < turns - 1
        with work.wrapped.no_sync() if wait else nullcontext():  # around the forward pass too: DDP decides there
            micro_loss, micro_shown = work.backward(arguments, weights * share)
        loss += micro_loss
        for name, value in micro_shown.items():
            shown[name] = shown.get(name, 0) + value
    return loss, work.finish(), shown


def micro_batch(task, rows, step, number):
    """`Task.batch` for some rows of an update. What it draws, and dropout, depends on (seed, step, number) alone."""
    seed = int(np.random.SeedSequence((task.settings.seed, step, number)).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    return task.batch(rows, torch.Generator().manual_seed(seed))


def make_work(task, model, wrapped, folder, state, world, dtype):
    """(Work, why it is not captured as CUDA graphs, or None). folder, state: of the checkpoint to resume, if any."""
    obstacle = obstacle_to_capture(task, world, dtype)
    optimizers = make_optimizers(model, task.settings, capturable=not obstacle)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if folder:
        for name, optimizer in optimizers.items():
            checkpoint.load_optimizer(optimizer, state[name], folder)
        scaler.load_state_dict(state["scaler"])
    work = Work(task, wrapped, optimizers, scaler, world, dtype)
    if obstacle or state["step"] == task.settings.max_iters:
        return work, obstacle
    rows = task.pick(state["step"])
    return captured(work, *micro_batch(task, rows[:task.piece(rows)], state["step"], 0))


def train(settings, given, world):
    """Sets up the run and trains. Returns (task, model, Log, exit status, Guard); status 0 unless stopped early."""
    out_dir, device = Path(settings.out_dir), world.device
    folder = world.from_main(lambda: resume.pick_up(out_dir, settings.resume))
    notes = list(resume.notes(folder, settings))
    task, model = start(settings, given, folder, locate(settings.dataset), world)
    state = checkpoint.load_trainer(folder) if folder else {"step": 0, "best": None}
    step, best, status = state["step"], state["best"], 0
    # These choices affect rounding, so they are recorded in the settings: a resumed run keeps them.
    dtype, why_dtype = pick_dtype(settings.dtype, device)
    flops = task.cost(model)[1] * settings.max_iters if task.fixed_shapes else 0
    compiled, why_compiled = pick_compile(settings.compile, device, flops)
    prepare_kernels(device, dtype, task.fixed_shapes)
    s = task.settings = replace(task.settings, dtype=str(dtype).removeprefix("torch."), compile=compiled,
                                micro_batch_size=pick_micro_batch_size(task, world))

    sharded = s.shard and world.size > 1
    wrapped = distributed.wrap(model, all_blocks(model), sharded, compiled, s.recompute, dtype, world)
    model.train()
    guard = Guard(s, world, step, dtype == torch.float16, state, lambda n: task.where(task.pick(n - 1)))
    work, why_not_captured = make_work(task, model, wrapped, folder, state, world, dtype)
    s = task.settings = replace(s, capture=not why_not_captured)
    if world.is_main:
        changed = ", ".join(f"{name}={value!r}" for name, value in differences(settings).items())
        print(f"settings: {changed or 'the defaults'}")
        print(f"device: {device} x {world.size}; dtype: {s.dtype} ({why_dtype}); compile: {compiled} ({why_compiled})")
        if device.type == "cuda":
            print(f"capture: {s.capture} ({why_not_captured or 'an update is replayed as CUDA graphs'})")
        print("\n".join((task.summary(model), *notes)), flush=True)
    log = Log(out_dir, task, model, step, peak_flops(device, dtype), world)

    with log, guard, checkpoint.Writer(out_dir, s.async_save, sharded) as writer:
        while step < s.max_iters and not status:
            task.begin(step, model, world, dtype)
            lr = set_rates(work.optimizers, step + 1, s)
            guard.record(*update(task, work, step, world))  # no waiting for the device
            step += 1
            evaluating = step % s.eval_interval == 0 or step == s.max_iters
            logging = evaluating or step % s.log_interval == 0 or step == 1
            whole = step % task.round == 0
            if logging or whole and (guard.due(step) or guard.status and world.size == 1):
                row = log.row(step, lr=lr, **guard.read(logging))  # waits for the device
                status = world.max(guard.status) if whole and step < s.max_iters else 0
                if evaluating:
                    row |= evaluate(task, model, world, dtype, step)
                if better := improves(task.best, row, best):
                    best = row[f"val_{task.best[0]}"]
                if logging:
                    log.write(row, better, None if sharded else model)
                saving = evaluating or status or whole and guard.saving
                if saving and (world.is_main or sharded):
                    log.sync()
                    writer.save(["best"] * better + ["last"], model, task.tokenizers,
                                *snapshot(task, row, best, guard, work))
                    guard.note_save()
                if logging or saving:
                    log.restart(step, evaluating)
                writer.raise_pending()
    return task, model, log, status, guard


def snapshot(task, row, best, guard, work):
    """Returns a checkpoint's config.json and trainer.pt as dicts. row: the last log row. best: the best measure yet."""
    s, step = task.settings, row["step"]
    config = {**task.about, "lora_rank": s.lora_rank, "settings": asdict(s), "dataset": s.dataset, "step": step,
              "data": task.fingerprint(), "val_loss": None, **measures(row), "versions": checkpoint.versions()}
    states = {name: optimizer.state_dict() for name, optimizer in work.optimizers.items()}
    return config, {"step": step, "best": best, **guard.state, "scaler": work.scaler.state_dict(), **states}


def pick_micro_batch_size(task, world):
    """Returns the micro_batch_size to record: the setting, or else batch_size / workers, rounded up; 0 for a task that
    scores each row against all others, whose workers each take their share in one micro-batch."""
    s = task.settings
    if task.whole:
        if s.micro_batch_size or s.batch_size % world.size:
            raise UserError(f"batch_size = {s.batch_size}, micro_batch_size = {s.micro_batch_size}: --task={s.task}"
                            " scores each row against all others, so every worker takes one micro-batch: leave out"
                            f" --micro_batch_size, and choose a --batch_size that {world.size} divides")
        return 0
    size = s.micro_batch_size or -(-s.batch_size // world.size)
    count = -(-s.batch_size // size)
    if world.is_main and count < world.size:
        print(f"{world.size - count} of {world.size} workers are idle: a smaller --micro_batch_size gives them work")
    return size


def evaluate(task, model, world, dtype, step):
    """Returns the measures of the validation split, {"val_loss": ...}. Raises UserError if one is NaN or infinite."""
    model.eval()
    with cudnn_attention(False):  # the last batch of a split has a shape of its own
        found = task.evaluate(model, "val", world, dtype, task.settings.eval_tokens)
    model.train()
    for name, value in found.items():
        require_finite(f"val_{name}", value, step)
    return {f"val_{name}": value for name, value in found.items()}


def main(settings, given):
    """Trains. given: {name: value} of the settings that the user named. Raises SystemExit if the run stops early."""
    world = distributed.start(settings.device)
    with owned(settings.out_dir) if world.is_main else nullcontext():
        name = world.from_main(lambda: own_data(settings.task, given) or ensure(settings.dataset))
        task, model, log, stopped, guard = train(replace(settings, dataset=name), given, world)
        with log, guard:
            if world.is_main:
                if settings.shard and world.size > 1:
                    model = load(checkpoint.find(settings.out_dir, "last"), world.device)[1]  # whole
                say_where(task, model.eval(), log, stopped, guard.reason(stopped))
            stopped = stopped or guard.signalled or lost_output()
            log.close(stopped, guard.reason(stopped))
    world.close()
    if stopped:
        raise SystemExit(stopped)


if __name__ == "__main__":
    guard_outputs()
    with one_line_errors(), distributed.others_explain():
        main(SETTINGS, GIVEN)
