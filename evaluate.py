"""Scores a trained model on a whole split. Deterministic: the same command gives the same digits.

    python evaluate.py --out_dir=out                    the best checkpoint, on the validation split; also on a CPU
    python evaluate.py --out_dir=out/titanic --test=True --picture=map.png      of rows with labels: also map_test.png
    python evaluate.py --init_from=gpt2 --dataset=shakespeare_gpt2      a published model, by name or folder
    torchrun --nproc_per_node=2 evaluate.py --out_dir=out
    python evaluate.py --help --task=translation        what a model of this task takes; with --out_dir, a run's

Prints one table, and writes it to evaluation.json in a run's out directory. Figures that are in there already and were
not measured again, such as those of --test, stay if they are of the same checkpoint, split and beam. For text, `loss`
is the mean over the whole split, and `random_window_loss` is nanoGPT's estimate, the mean over random windows. They are
different measures.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_run, from_command_line, one_line_errors, say
from sources.known import check_dataset, ensure, locate
from tasks import TASKS, elsewhere, find_task, own_data


@dataclass(frozen=True)
class Settings:
    out_dir: str = "out"  # the folder of a run, or of one checkpoint
    checkpoint: Literal["best", "last"] = "best"  # which checkpoint of the run: best or last
    init_from: str = ""  # instead of out_dir: a published model's name or folder; needs --dataset
    task: Literal[("", *TASKS)] = ""  # with --help: lists the settings for models of this task, such as translation
    dataset: str = ""  # another data set, made with the same tokenizer; empty: the one that the run was trained on
    split: Literal["val", "train"] = "val"  # which part of the data set: val or train
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products


def own_settings(values):
    """Returns the class of the settings that the model's task adds. values: {name: value} of the fields of Settings."""
    if values["task"]:
        return TASKS[values["task"]].evaluating
    if not values["init_from"]:
        check_run(values["out_dir"])
    elif not values["dataset"]:
        raise UserError(f"init_from = {values['init_from']}: say on which data, --dataset=NAME")
    return TASKS[find_task(values["init_from"] or values["out_dir"])].evaluating


def check(settings, given):
    """Raises UserError for a folder into which nothing may be written, and a data set that is not there."""
    folder = Path(settings.out_dir).resolve()
    if folder.name in ("reference", "reward") and (folder.parent / "run.json").exists():  # see tasks/reference.py
        raise UserError(f"out_dir = {settings.out_dir}: is a copy of another model that the run in {folder.parent}"
                        " needs as it is: evaluate that model's own run, or copy the folder first")
    if settings.dataset not in ("", *TASKS):  # a task's name: of the data that it makes
        check_dataset(settings.dataset)


HOW = dict(more=own_settings, check=check, elsewhere=elsewhere(lambda row: row.evaluating, trained=True))
if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__, usual=TASKS["text"].evaluating, **HOW)

from machine import distributed
from machine.device import pick_dtype
from run import checkpoint
from run.files import read_json, write_json
from tasks.loading import load

SAME = ("step", "checkpoint", "dataset", "split", "dtype")  # in figures that may stand together


def earlier(path, result, asked):
    """The evaluation.json at `path`, a dict, if it and `result` agree in SAME and in what Task.asked names; else {}."""
    with suppress(UserError, ValueError, TypeError):
        found = dict(read_json(path))
        if all(found.get(name) == result.get(name) for name in (*SAME, *asked)):
            return found
    return {}


def main(settings):
    world = distributed.start(settings.device)
    folder = settings.init_from or checkpoint.find_any(settings.out_dir, settings.checkpoint)
    task, model, config = load(folder, world.device, block_size=None)
    dtype, why = pick_dtype(settings.dtype, world.device)
    own = own_data(task.settings.task, {"dataset": settings.dataset})
    name = own or world.from_main(lambda: ensure(settings.dataset or config["dataset"]))
    task.open(locate(name), world)
    if name == config.get("dataset") and config.get("data", task.fingerprint()) != task.fingerprint():
        say(f"{name} has been prepared anew since {folder} was trained: rows may have changed their part")
    task.fit(model)
    found = task.evaluate(model, settings.split, world, dtype)
    found |= task.details(model, settings.split, world, dtype, settings, found)
    result = {"step": config.get("step"), "checkpoint": Path(folder).name, "dataset": name, "split": settings.split,
              **found, "dtype": str(dtype).removeprefix("torch.")}
    if world.is_main:
        print(f"{folder}, {settings.split} split of {name}, {result['dtype']} ({why})")
        for key, value in result.items():
            if isinstance(value, float):
                value = f"{value:,.6f}" if value == 0 or 1e-4 <= abs(value) < 1e15 else f"{value:.6g}"
            print(f"  {key:36} {value}")
        if not settings.init_from:
            save(Path(settings.out_dir) / "evaluation.json", result, task.asked)
    world.close()


def save(path, result, asked):
    """Writes evaluation.json, and says where. What `earlier` finds there stays beside it."""
    try:
        write_json(path, earlier(path, result, asked) | result)
        print(f"written to {path}")
    except OSError as error:  # the folder may belong to somebody else
        print(f"{path} can't be written: {error.strerror}")


if __name__ == "__main__":
    with one_line_errors(), distributed.others_explain():
        main(SETTINGS)
