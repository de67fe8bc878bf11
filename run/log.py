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
from run.files import write_json, write_text


class Log:
    """Writes rows into log.jsonl, to the terminal, and to wandb if wanted. Silent on all but the main rank.

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
        path = Path(out_dir) / "log.jsonl"
        if step:  # the rows after the checkpoint will be written again
            write_text(path, "".join(line + "\n" for line in rows_until(path, step)))
        self.file = open(path, "a", encoding="utf-8", buffering=1)
        if settings.wandb:
            self.wandb = start_wandb(path.parent, settings)

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

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def rows_until(path, step):
    """The lines of a log up to a step; a last line that a kill cut short is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                yield line


def start_wandb(out_dir, settings):
    """wandb's run. Its id is drawn once for out_dir, so that a resumed run goes on in the same charts."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs a package: pip install wandb") from None
    path = out_dir / "wandb_id"
    if not path.exists():
        write_text(path, os.urandom(4).hex())
    return wandb.init(project=settings.wandb_project, name=settings.wandb_name or None, id=path.read_text(),
                      resume="allow", config=asdict(settings), dir=str(out_dir))


def record_start(out_dir, settings, world, **facts):
    """Adds to run.json what this start of the run runs on: versions, code, machine, command."""
    path = Path(out_dir) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = checkpoint.read_json(path) if path.exists() else []
    starts.append({
        "started": now(), **facts, "seed": settings.seed, "command": [sys.executable, *sys.argv], "git": git_state(),
        "device": device_name(world.device), "workers": world.size, "host": platform.node(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "cuda": torch.version.cuda, **checkpoint.versions()})
    write_json(path, starts)


def record_end(out_dir, step, status):
    """Notes in run.json that this start ended by itself, at which step and with which exit status."""
    path = Path(out_dir) / "run.json"
    starts = checkpoint.read_json(path)
    starts[-1] |= {"ended": now(), "end_step": step, "status": status}
    write_json(path, starts)


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
          f"try it:      {task.command.format(out_dir=out_dir)}\n"
          f"evaluate it: python evaluate.py --out_dir={out_dir}")


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def git_state():
    """{commit, dirty} of this code; None where it is no git checkout or git is not there."""
    def git(*arguments):
        return subprocess.run(["git", "-C", Path(__file__).parent, *arguments], capture_output=True, text=True,
                              check=True, timeout=10).stdout.strip()
    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


MOVING = "earlier.new"  # while this folder is there, the other files of the run are still to be moved into it
OURS = [name + suffix for name in ("last", "best", "log.jsonl", "run.json", "evaluation.json", "wandb_id")
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
