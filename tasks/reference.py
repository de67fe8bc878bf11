"""The models that a run compares itself with and does not train. Copies lie in its folder, for whoever resumes it.

    keep(task, model)                   before the first update: writes the checkpoint out_dir/reference
    keep_copy(task, "reward", RUN)      the same of a run's best checkpoint, as out_dir/reward
    its_task, model = recall(task)      there and after a resume: the same weights; or recall(task, "reward")
"""

import dataclasses
import shlex
from pathlib import Path

from configurator import NoResume, UserError
from machine.digest import code_of
from run import checkpoint
from tasks import task_class
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


def recall(task, name="reference", out_dir=""):
    """(task, model) of such a copy, the model in eval mode, without gradients.

    name: "reference", a model that the task trains; else the task whose model the copy is. out_dir: the run's folder;
    "": as the task says. Raises NoResume if the copy is missing, damaged or another model.
    """
    out_dir = out_dir or task.settings.out_dir
    folder = Path(out_dir, name)
    try:
        if not (folder / "config.json").exists():
            raise UserError(f"{folder} is missing")
        its_task, model, _ = load(folder, task.world.device)
        if not model_type_of(model, task.models if name == "reference" else task_class(name).models):
            raise UserError(f"{folder} has another model, {type(model).__name__}")
    except UserError as error:
        raise NoResume(f"{error}: the run needs this model. Restore the folder, or start a new run,"
                       f" {shlex.quote(f'--init_from={out_dir}')} --out_dir=NEW") from None
    return its_task, model.requires_grad_(False)
