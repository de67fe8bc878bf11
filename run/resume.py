"""How a run is taken up again: from which checkpoint, with which settings."""

import os
from contextlib import suppress
from pathlib import Path

from configurator import UserError, flat_fields, flat_values
from run import checkpoint
from run.log import MOVING

KEPT = ("task", "dataset", "init_from", "optimizer", "lora_rank")  # beside the task's own settings but these:
FREE = ("publish",)


def to_resume(out_dir, resume):
    """The complete checkpoints to go on from; none if the run is to start. Raises UserError if there should be one.

    resume: False, True, or "auto", which starts where nothing was saved.
    """
    folders = []
    if resume and os.path.isdir(out_dir):
        if not (Path(out_dir) / MOVING).exists():  # what is left beside it belongs to a run that was being set aside
            folders = checkpoint.present(out_dir, "last")
    if resume is True and not folders:
        raise UserError(f"there is nothing to resume in {out_dir}: no checkpoint; drop --resume to start")
    return folders


def pick_up(out_dir, resume):
    """The checkpoint to go on from, or None to start."""
    if to_resume(out_dir, resume):
        for name in ("best", "last"):
            checkpoint.settle(out_dir, name)
    return checkpoint.first_intact(to_resume(out_dir, resume))


def earlier_settings(out_dir, resume):
    """The settings of the run that is to be resumed, from the first readable config.json; {} if it is to start."""
    folders = to_resume(out_dir, resume)
    for folder in folders[:-1]:
        with suppress(UserError):
            return checkpoint.read_config(folder)["settings"]
    return checkpoint.read_config(folders[-1])["settings"] if folders else {}


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


def restore(optimizers, scaler, state, folder):
    """Fills the optimizers from a checkpoint; what the settings say of rates, decay and memory stays.

    Raises UserError if the optimizer in the checkpoint is that of other parameters.
    """
    for name, optimizer in optimizers.items():
        chosen = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        try:
            checkpoint.load_optimizer(optimizer, state[name], folder)
        except (KeyError, ValueError):
            raise UserError(f"{folder / 'trainer.pt'} holds the optimizer of other parameters: resume with the --rates,"
                            " the --optimizer and the --lora_rank that the run had") from None
        for group, values in zip(optimizer.param_groups, chosen):
            group.update(values)
    scaler.load_state_dict(state["scaler"])
