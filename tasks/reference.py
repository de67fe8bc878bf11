"""The models that a run compares itself with and does not train. Copies lie in its folder, for whoever resumes it.

    keep(task, model)                   before the first update: writes the checkpoint out_dir/reference
    keep_copy(task, "reward", RUN)      the same of a run's best checkpoint, as out_dir/reward
    model = recall(task)                there and after a resume: the same weights as those of the reference
"""

import dataclasses
import shlex
from pathlib import Path

from configurator import UserError
from machine.digest import code_of
from run import checkpoint
from tasks.loading import load, model_type_of


def keep(task, model):
    """Writes the model, whose weights are whole, as the checkpoint out_dir/reference. All ranks call this."""
    s = task.settings
    config = {"model_type": model_type_of(model, task.models), "model": dataclasses.asdict(model.config),
              "code": code_of(model), "lora_rank": s.lora_rank, "settings": dataclasses.asdict(s), "dataset": s.dataset,
              "step": 0, "versions": checkpoint.versions()}
    state = model.state_dict()
    task.world.from_main(lambda: checkpoint.write(s.out_dir, "reference", state, task.tokenizers, config, None))


def keep_copy(task, name, source):
    """Copies the best checkpoint of the run `source` to out_dir/name. All ranks call this."""
    def copy():
        saved = checkpoint.load(checkpoint.find_any(source))
        checkpoint.write(task.settings.out_dir, name, saved.state, saved.tokenizers, saved.config, None)

    task.world.from_main(copy)


def recall(task, out_dir=""):
    """The model that `keep` wrote, in eval mode, without gradients. out_dir: the run's folder; "": as the task says."""
    return load(folder_of(task, "reference", out_dir), task.world.device)[1].requires_grad_(False)


def folder_of(task, name, out_dir=""):
    """The folder of the reference or the reward model of a run. Raises UserError if it is missing."""
    out_dir = out_dir or task.settings.out_dir
    folder = Path(out_dir, name)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing, a model that the run needs. Restore the folder, or start a new run,"
                        f" {shlex.quote(f'--init_from={out_dir}')} --out_dir=NEW")
    return folder
