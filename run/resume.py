"""Resuming a run: from which checkpoint, and with which settings."""

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

from configurator import UserError, flat_fields, flat_values
from optimizer import learning_rate
from run import checkpoint
from run.files import rename
from run.record import MOVING

FIXED = ("task", "dataset", "init_from", "optimizer", "lora_rank", "lora_alpha",
         "lora_targets")  # a resumed run can't change these
FREE = ("publish",)  # nor any of the task's settings, except these
DEFAULTS = {"mlp": "", "positions": ""}  # values that mean: as the model has it
ABSENT = {"lora_alpha": 0, "lora_targets": "", "qk_norm": False}  # in runs older than these settings
RATE = ("max_iters", "lr_decay_iters", "lr_schedule", "learning_rate", "min_lr", "warmup_iters")  # of the learning rate


def to_resume(out_dir, resume):
    """Returns the folders of checkpoints to resume from, best choice first; [] to start a new run.

    Unfinished saves are left out; a checkpoint that is damaged is not. resume: the setting. With True, raises UserError
    if there is no checkpoint; with "auto", a new run starts then.
    """
    folders = []
    if resume and not (Path(out_dir) / MOVING).exists():  # if it exists, the files beside it are an earlier run's
        folders = checkpoint.candidates(out_dir, "last")
    if resume is True and not folders:
        raise UserError(f"there is nothing to resume in {out_dir}: no checkpoint; drop --resume to start")
    return folders


def pick_up(out_dir, resume):
    """Returns the checkpoint to resume from, or None for a new run. Finishes a save that was killed between renames."""
    if not to_resume(out_dir, resume):
        return None
    for name in ("best", "last"):
        final, new = out_dir / name, out_dir / f"{name}.new"
        if (new / "config.json").is_file() and not final.exists():
            rename(new, final)
    found, last = checkpoint.find(out_dir, "last"), out_dir / "last"
    if found != last and last.exists():  # it is damaged; the next save must not rename it to last.old
        checkpoint.clear(out_dir / "last.damaged")
        rename(last, out_dir / "last.damaged")
    return found


def earlier_settings(out_dir, resume, cls, of_task):
    """Returns the settings of the run to resume, but max_minutes, which is for one start only; {} for a new run. cls:
    the class of every run's settings. of_task: {task: its own}. Raises UserError for a saved choice that is gone."""
    if not to_resume(out_dir, resume):
        return {}
    folder = checkpoint.find(out_dir, "last")
    saved = flat_values(checkpoint.read_config(folder)["settings"])
    saved.pop("max_minutes", None)
    for name, (kind, _) in {**flat_fields(of_task.get(saved["task"], cls)), **flat_fields(cls)}.items():
        known = get_args(kind)
        if known and saved.get(name, known[0]) not in known:
            raise UserError(f"{name} = {saved[name]!r} in {folder / 'config.json'}: the code has no such choice now;"
                            f" put it back, or start a new run with --init_from={folder}")
    return saved


def refuse_changes(saved, given, own, stand_in):
    """Raises UserError if `given` changes a setting of the run that can't change. saved: the run's settings.

    own: the class of the task's own settings, such as the model's shape; none of them can change, except FREE.
    stand_in: the data set that replaces one that can't be downloaded; a run on it may be given the real one.
    """
    out_dir, fixed = given.get("out_dir", "out"), {*FIXED, *flat_fields(own)} - {*FREE}
    for name, asked in given.items():
        value = saved.get(name, ABSENT.get(name, asked))
        if name in fixed and asked not in (value, DEFAULTS.get(name)) and value != stand_in:
            hint = f" (data prepared anew must be named {value}: delete the old ones first)" * (name == "dataset")
            raise UserError(f"{name} = {asked!r}, but the run in {out_dir} has {value!r}: leave it out to resume{hint},"
                            f" or start a new run with --init_from={out_dir}")


def notes(folder, settings):
    """Yields lines to print at the start: about the learning rate, and about resuming from `folder` (None: a new run).

    Raises UserError if max_iters is below the checkpoint's step.
    """
    s = settings
    if s.warmup_iters >= s.max_iters:
        yield (f"warmup_iters = {s.warmup_iters}: the learning rate never reaches its peak in max_iters = {s.max_iters}"
               f" updates; try a smaller one, such as --warmup_iters={s.max_iters // 10}")
    if not folder:
        return
    config = checkpoint.read_config(folder)
    step = config["step"]
    if s.max_iters < step:
        raise UserError(f"max_iters = {s.max_iters}: the run in {s.out_dir} has already made {step} updates; choose a"
                        f" larger one, or start a new run with --init_from={s.out_dir}")
    if s.max_iters == step:
        yield f"the run in {s.out_dir} is finished, with {step} updates; a larger --max_iters continues it"
        return
    yield f"resuming from step {step}, checkpoint {folder}"
    old = SimpleNamespace(**{**vars(s), **config["settings"]})
    before, now = learning_rate(step, old), learning_rate(step, s)
    if abs(now - before) > 0.01 * before:
        changed = [f"{name} = {getattr(s, name)} (it was {getattr(old, name)})" for name in RATE
                   if getattr(s, name) != getattr(old, name)]
        yield f"the learning rate jumps from {before:.1e} to {now:.1e} at step {step}: {', '.join(changed)}"
