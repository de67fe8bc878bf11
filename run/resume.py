"""How a run is taken up again: from which checkpoint, with which settings."""

from pathlib import Path
from types import SimpleNamespace

from configurator import UserError, flat_fields, flat_values
from optimizer import learning_rate
from run import checkpoint
from run.files import rename
from run.record import MOVING

KEPT = ("task", "dataset", "init_from", "optimizer", "lora_rank")  # beside the task's own settings but these:
FREE = ("publish",)
OWN = {"mlp": "", "positions": ""}  # values that stand for the model's own
RATE = ("max_iters", "lr_decay_iters", "lr_schedule", "learning_rate", "min_lr", "warmup_iters")  # what makes the rate


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
    found, last = checkpoint.find(out_dir, "last"), out_dir / "last"
    if found != last and last.exists():  # it is damaged, and the next save would keep it in the place of the one found
        checkpoint.clear(out_dir / "last.damaged")
        rename(last, out_dir / "last.damaged")
    return found


def earlier_settings(out_dir, resume):
    """The settings of the run that is to be resumed, from its first intact checkpoint; {} if it is to start.

    max_minutes is left out: it is for one start.
    """
    if not to_resume(out_dir, resume):
        return {}
    saved = flat_values(checkpoint.read_config(checkpoint.find(out_dir, "last"))["settings"])
    saved.pop("max_minutes", None)
    return saved


def refuse_changes(saved, given, own, stand_in):
    """Raises UserError for a setting that a resumed run can't change.

    own: the class of the task's settings. stand_in: the data set that an absent one may have been replaced by.
    """
    out_dir, kept = given.get("out_dir", "out"), {*KEPT, *flat_fields(own)} - {*FREE}
    for name, asked in given.items():
        value = saved.get(name, asked)
        if name in kept and asked not in (value, OWN.get(name)) and value != stand_in:
            raise UserError(f"{name} = {asked!r}, but the run in {out_dir} has {value!r}: drop it to resume, or"
                            f" start a new run with --init_from={out_dir}")


def notes(folder, settings):
    """Lines on what is special about the run: about its rate, and about going on from the checkpoint `folder`, or None.

    Raises UserError if the settings end before the checkpoint.
    """
    s = settings
    if s.warmup_iters >= s.max_iters:
        yield (f"warmup_iters = {s.warmup_iters}: the learning rate rises to the end, for max_iters = {s.max_iters}; a"
               f" smaller one, such as --warmup_iters={s.max_iters // 10}, lets it reach its peak")
    if not folder:
        return
    config = checkpoint.read_config(folder)
    step = config["step"]
    if s.max_iters < step:
        raise UserError(f"max_iters = {s.max_iters}: the run in {s.out_dir} has made {step} updates already; name more,"
                        f" or start a new run with --init_from={s.out_dir}")
    if s.max_iters == step:
        yield f"the run in {s.out_dir} is finished: it has made its {step} updates; a larger --max_iters adds some"
        return
    yield f"going on from step {step}, with {folder}"
    old = SimpleNamespace(**{**vars(s), **config["settings"]})
    before, now = learning_rate(step, old), learning_rate(step, s)
    if abs(now - before) > 0.01 * before:
        changed = [f"{name} = {getattr(s, name)} (it was {getattr(old, name)})" for name in RATE
                   if getattr(s, name) != getattr(old, name)]
        yield f"the learning rate jumps from {before:.1e} to {now:.1e} at step {step}: {', '.join(changed)}"
