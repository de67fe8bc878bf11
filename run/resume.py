"""How a run is taken up again: from which checkpoint, with which settings."""

from pathlib import Path

from configurator import UserError, flat_fields, flat_values
from run import checkpoint
from run.files import rename
from run.log import MOVING

KEPT = ("task", "dataset", "init_from", "optimizer", "lora_rank")  # beside the task's own settings but these:
FREE = ("publish",)


def to_resume(out_dir, resume):
    """The complete checkpoints to go on from; none if the run is to start. Raises UserError if there should be one.

    resume: False, True, or "auto", which starts where nothing was saved.
    """
    folders = []
    if resume and not (Path(out_dir) / MOVING).exists():  # what is left beside it belongs to a run being set aside
        folders = checkpoint.candidates(out_dir, "last")
    if resume is True and not folders:
        raise UserError(f"there is nothing to resume in {out_dir}: no checkpoint; drop --resume to start")
    return folders


def pick_up(out_dir, resume):
    """The checkpoint to go on from, or None to start. Finishes a save that was killed between its two renames."""
    if not to_resume(out_dir, resume):
        return None
    for name in ("best", "last"):
        final, new = out_dir / name, out_dir / f"{name}.new"
        if (new / "config.json").is_file() and not final.exists():
            rename(new, final)
    return checkpoint.find(out_dir, "last")


def earlier_settings(out_dir, resume):
    """The settings of the run that is to be resumed, from its first intact checkpoint; {} if it is to start."""
    if not to_resume(out_dir, resume):
        return {}
    return checkpoint.read_config(checkpoint.find(out_dir, "last"))["settings"]


def refuse_changes(saved, given, own, stand_in):
    """Raises UserError for a setting that a resumed run can't change.

    own: the class of the task's settings. stand_in: the data set that an absent one may have been replaced by.
    """
    saved, out_dir = flat_values(saved), given.get("out_dir", "out")
    for name in (*KEPT, *(name for name in flat_fields(own) if name not in FREE)):
        value = saved.get(name, given.get(name))
        if given.get(name, value) != value and value != stand_in:
            raise UserError(f"{name} = {given[name]!r}, but the run in {out_dir} has {value!r}: drop it to resume, or"
                            f" start a new run with --init_from={out_dir}")
