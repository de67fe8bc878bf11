"""Reads and sets aside the files of earlier starts, and collects the facts that run.json records about each start."""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from configurator import say
from machine.device import device_name
from run import checkpoint
from run.files import rename

TIME = "%Y-%m-%dT%H:%M:%S%z"
MOVING = "earlier.new"  # if it exists, a move into earlier.N was cut short; the files beside it belong to it
OURS = [name + suffix for suffix in ("", ".new", ".old", ".damaged") for name in (
    "last", "best", "reference", "reward", "log.jsonl", "run.json", "samples.md", "curves.svg", "evaluation.json")]


def set_aside(out_dir):
    """Moves an earlier run's files in out_dir to the first free earlier.N. Finishes a move that was cut short."""
    moving = out_dir / MOVING
    found = [path for name in OURS if (path := out_dir / name).exists()]
    if found or moving.exists():
        moving.mkdir(exist_ok=True)
        for path in found:
            os.rename(path, moving / path.name)
        folders = (out_dir / f"earlier.{n}" for n in itertools.count(1))
        aside = next(folder for folder in folders if not folder.exists())
        os.rename(moving, aside)
        print(f"moved the earlier run in {out_dir} to {aside}")


def rows_until(path, step):
    """Yields the rows of a log.jsonl up to a step. Skips damaged lines, such as one that a kill cut short."""
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            if row["step"] <= step:
                yield row


def samples_until(path, step):
    """Returns the text of a samples.md before its first heading of a later step."""
    text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    headings = re.finditer(r"^## step (\d+), ", text, re.MULTILINE)
    return next((text[:found.start()] for found in headings if int(found[1]) > step), text)


def read_record(path):
    """Returns (starts, seconds so far, best results) of a run.json; ([], 0.0, {}) if it is missing or damaged.

    starts: the `facts` of each. best results: {"step": ..., "val_loss": ...}. Renames a damaged file to run.json.old.
    """
    if not path.exists():
        return [], 0.0, {}
    with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = json.loads(path.read_bytes())
        starts = [start | {} for start in found["starts"] if start["id"]]
        best = {name: value + 0 for name, value in found["results"].get("best", {}).items()}  # + 0 fails for text
        return starts, float(found["results"]["seconds"]), best
    rename(path, f"{path}.old")
    say(f"{path} was damaged: renamed it to {path}.old, and started a new one")
    return [], 0.0, {}


def facts(settings, step, world):
    """Returns the facts about this start for run.json: versions, code, machine, command. step: updates made before."""
    return {
        "id": os.urandom(4).hex(), "started": time.strftime(TIME), "step": step, "dtype": settings.dtype,
        "compile": settings.compile, "seed": settings.seed, "command": [sys.executable, *sys.argv], "git": git_state(),
        "device": device_name(world.device), "workers": world.size, "host": platform.node(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "cuda": torch.version.cuda, **checkpoint.versions()}


def git_state():
    """Returns the git commit of this code, with "-dirty" if files differ from it; None outside a git checkout."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
