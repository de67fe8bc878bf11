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

import checkpoint
from configurator import UserError
from device import device_name
from tokenizer import write_json, write_text


class Log:
    """log.jsonl, one row a line; the terminal; and wandb if wanted. Silent on all but the main rank.

    tokens: those of one update; flops: what each worker computes in one; peak: a worker's FLOP/s, or None.
    """

    def __init__(self, out_dir, settings, step, tokens, flops, peak, world):
        self.settings, self.tokens, self.flops, self.peak = settings, tokens, flops, peak
        self.file = self.run = None
        self.first_step, self.began = step, time.perf_counter()
        self.restart(step)
        if not world.is_main:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        path = out_dir / "log.jsonl"
        if step:  # the rows after the checkpoint will be written again
            write_text(path, "".join(line + "\n" for line in rows_until(path, step)))
        self.file = open(path, "a", encoding="utf-8", buffering=1)
        if settings.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb needs a package: pip install wandb") from None
            self.run = wandb.init(project=settings.wandb_project, name=settings.wandb_name or None,
                                  id=run_id(out_dir), resume="allow", config=asdict(settings), dir=str(out_dir))

    def restart(self, step):
        """The next row's time counts from here: after an evaluation or a save, which are no part of an update."""
        self.timed_from, self.clock = step, time.perf_counter()

    def row(self, step, **values):
        """A row with the mean time of the updates since `restart`. values: plain numbers, so the device is done."""
        seconds = (time.perf_counter() - self.clock) / (step - self.timed_from)
        row = {"step": step, **values, "ms": 1000 * seconds, "tokens_per_s": self.tokens / seconds}
        return row | ({"mfu": self.flops / seconds / self.peak} if self.peak and self.flops else {})

    def write(self, row):
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.file.name} can't be written: {error.strerror}") from error
        if self.run:
            self.run.log(row, step=row["step"])
        done = row["step"] - self.first_step
        left = (time.perf_counter() - self.began) / done * (self.settings.max_iters - row["step"])
        parts = [f"step {row['step']:>{len(str(self.settings.max_iters))}}/{self.settings.max_iters}",
                 f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}", f"{row['ms']:.1f} ms",
                 f"{row['tokens_per_s']:,.0f} tok/s"]
        parts += [f"{row['mfu']:.0%} of peak"] if "mfu" in row else []
        parts += [f"{int(left) // 60}:{int(left) % 60:02d} left"]
        parts += [f"val loss {row['val_loss']:.4f}"] if "val_loss" in row else []
        print(" | ".join(parts), flush=True)

    def sync(self):
        """Has the rows so far reach the disk: a checkpoint must not be ahead of its log."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.file.close()
        if self.run:
            self.run.finish()


def rows_until(path, step):
    """The lines of a log up to a step; a last line that a kill cut short is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                yield line


def run_id(out_dir):
    """wandb's id of the run in out_dir, made at its start, so that a resumed run goes on in the same charts."""
    path = out_dir / "wandb_id"
    if not path.exists():
        write_text(path, os.urandom(4).hex())
    return path.read_text()


def record_start(out_dir, settings, world, **facts):
    """Adds to run.json what this start of the run runs on: versions, code, machine, command."""
    path = Path(out_dir) / "run.json"
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    starts.append({
        "started": now(), **facts, "seed": settings.seed, "command": [sys.executable, *sys.argv], "git": git_state(),
        "device": device_name(world.device), "workers": world.size, "host": platform.node(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "cuda": torch.version.cuda, **checkpoint.versions()})
    write_json(path, starts)


def record_end(out_dir, step, status):
    """Notes in run.json that this start ended by itself, at which step and with which exit status."""
    path = Path(out_dir) / "run.json"
    starts = json.loads(path.read_text(encoding="utf-8"))
    starts[-1] |= {"ended": now(), "end_step": step, "status": status}
    write_json(path, starts)


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


MOVING = "earlier.new"  # while it is there, what else is left of the run belongs into it
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
