"""The reference of a run: the model that it starts from. It is kept in the run's folder, for when the run is resumed.

    keep(task, model)                   before the first update: writes the checkpoint out_dir/reference
    reference = recall(task)            there and after a resume: the same weights
"""

import dataclasses
import shlex
from pathlib import Path

from configurator import UserError
from machine.digest import code_of
from run import checkpoint
from tasks.loading import load, model_type_of

NAME = "reference"


def keep(task, model):
    """Writes the model, whose weights are whole, as the checkpoint out_dir/reference. All ranks call this."""
    s = task.settings
    config = {"model_type": model_type_of(model, task.models), "model": dataclasses.asdict(model.config),
              "code": code_of(model), "lora_rank": s.lora_rank, "settings": dataclasses.asdict(s), "dataset": s.dataset,
              "step": 0, "versions": checkpoint.versions()}
    task.world.from_main(lambda: checkpoint.write(s.out_dir, NAME, model.state_dict(), task.tokenizers, config, None))


def recall(task, out_dir=""):
    """The model that `keep` wrote, in eval mode, without gradients. out_dir: the run's folder; "": as the task says.

    Raises UserError if it is missing or damaged.
    """
    out_dir = out_dir or task.settings.out_dir
    folder = Path(out_dir, NAME)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: the run compares with this model, which it started from. Restore the"
                        f" folder, or start a new run, {shlex.quote(f'--init_from={out_dir}')} --out_dir=NEW")
    return load(folder, task.world.device)[1].requires_grad_(False)
