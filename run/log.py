"""A run's record: log.jsonl, run.json, the terminal, and Weights & Biases if wanted."""

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import UserError
from machine.device import device_name, peak_memory
from run import checkpoint
from run.files import read_json, write_json, write_text

TIME = "%Y-%m-%dT%H:%M:%S%z"


class Log:
    """Writes run.json, rows into log.jsonl, to the terminal, and to wandb if wanted. Silent on all but the main rank.

    tokens, flops: of one update; peak: a worker's FLOP/s, or None.
    Raises UserError if wandb is wanted but not installed.
    """

    def __init__(self, out_dir, settings, step, tokens, flops, peak, world):
        self.settings, self.tokens, self.flops, self.peak = settings, tokens, flops / world.size, peak
        self.file = self.wandb = None
        self.first_step, self.began = step, time.perf_counter()
        self.restart(step)
        if not world.is_main:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        self.run_json = out_dir / "run.json"
        self.starts = read_json(self.run_json) if self.run_json.exists() else []
        self.starts.append(facts(settings, step, world))
        write_json(self.run_json, self.starts)
        path = out_dir / "log.jsonl"
        if step and path.exists():  # the rows after the checkpoint will be written again
            write_text(path, "".join(rows_until(path, step)))
        self.file = open(path, "a", encoding="utf-8", buffering=1)
        if settings.wandb:
            self.wandb = start_wandb(out_dir, settings, self.starts[0]["id"])

    def restart(self, step):
        """Counts the next row's time from here: after an evaluation or a save, which are no part of an update."""
        self.timed_from, self.clock = step, time.perf_counter()

    def row(self, step, **values):
        """A row with the mean time of the updates since `restart`. values: plain numbers, so the device is done."""
        seconds = (time.perf_counter() - self.clock) / (step - self.timed_from)
        row = {"step": step, **values, "ms": 1000 * seconds, "tokens_per_s": self.tokens / seconds}
        if self.peak and self.flops:
            row["mfu"] = self.flops / seconds / self.peak
        return row

    def write(self, row):
        """Adds the row to log.jsonl and wandb; the terminal shows loss, rate, speed, time left, validation measures.

        Raises UserError if log.jsonl can't be written.
        """
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.file.name} can't be written: {error.strerror}") from error
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        step, last = row["step"], self.settings.max_iters
        left = int((time.perf_counter() - self.began) / (step - self.first_step) * (last - step))
        parts = [f"step {step:>{len(str(last))}}/{last}", f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}",
                 f"{row['ms']:.1f} ms", f"{row['tokens_per_s']:,.0f} tok/s"]
        if "mfu" in row:
            parts.append(f"{row['mfu']:.0%} of peak")
        parts.append(f"{left // 60}:{left % 60:02d} left")
        parts += [f"{name.replace('_', ' ')} {row[name]:.4f}" for name in row if name.startswith("val_")]
        print(" | ".join(parts), flush=True)

    def sync(self):
        """Has the rows so far reach the disk: a checkpoint must not be ahead of its log."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self, step, status):
        """Notes in run.json that this start ended by itself, at which step and with which exit status."""
        if self.file is None:
            return
        self.file.close()
        self.starts[-1] |= {"ended": time.strftime(TIME), "end_step": step, "status": status}
        write_json(self.run_json, self.starts)
        if self.wandb:
            self.wandb.finish()


def rows_until(path, step):
    """The lines of a log up to a step; a last line that a kill cut short is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                yield line + "\n"


def start_wandb(out_dir, settings, name):
    """wandb's run of this id. A resumed run has the id of its first start, so that it goes on in the same charts."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs a package: pip install wandb") from None
    return wandb.init(project=settings.wandb_project, name=settings.wandb_name or None, id=name, resume="allow",
                      config=asdict(settings), dir=str(out_dir))


def facts(settings, step, world):
    """What a start of the run runs on: versions, code, machine, command."""
    return {
        "id": os.urandom(4).hex(), "started": time.strftime(TIME), "step": step, "dtype": settings.dtype,
        "compile": settings.compile, "seed": settings.seed, "command": [sys.executable, *sys.argv], "git": git_state(),
        "device": device_name(world.device), "workers": world.size, "host": platform.node(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "cuda": torch.version.cuda, **checkpoint.versions()}


def git_state():
    """The commit of this code, with "-dirty" if files differ from it; None if this is no git checkout."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def say_where(task, model, step, stopped, seconds):
    """The end of a run: a sample, where everything lies, what to run next."""
    out_dir = task.settings.out_dir
    if stopped:
        print(f"\nstopped at step {step} and saved; go on with: python train.py --resume --out_dir={out_dir}")
        return
    if task.settings.sample_tokens:
        print(f"\n{task.show(model)}\n")
    task.finish()
    best = checkpoint.read_config(checkpoint.find(out_dir, "best"))
    measure = f"val_{task.best[0]}"
    print(f"{step} updates in {seconds:.0f} s, at most {peak_memory(task.world.device) / 2**20:,.0f} MiB;"
          f" best {measure.replace('val_', 'validation ')} {best[measure]:.4f} at step {best['step']}")
    print(f"in {out_dir}: checkpoints best and last, log.jsonl, run.json\n"
          f"try it:      {task.command(out_dir)}\n"
          f"evaluate it: python evaluate.py --out_dir={out_dir}")


MOVING = "earlier.new"  # while this folder is there, the other files of the run are still to be moved into it
OURS = [name + suffix for name in ("last", "best", "log.jsonl", "run.json", "evaluation.json")
        for suffix in ("", ".new", ".old")]


def set_aside(out_dir):
    """Moves an earlier run's files in out_dir into the first free folder earlier.N; goes on with a move cut short."""
    moving = out_dir / MOVING
    found = [path for name in OURS if (path := out_dir / name).exists()]
    if found or moving.exists():
        moving.mkdir(exist_ok=True)
        for path in found:
            os.rename(path, moving / path.name)
        aside = next(path for n in itertools.count(1) if not (path := out_dir / f"earlier.{n}").exists())
        os.rename(moving, aside)
        print(f"{out_dir} held an earlier run: it is in {aside} now")
