"""What a trained model scores on a whole split: deterministic, twice the same run gives the same digits.

    python evaluate.py --out_dir=out                    also on a CPU; the best checkpoint, on the validation split
    torchrun --nproc_per_node=2 evaluate.py --out_dir=out

Prints one table, and writes it as evaluation.json into the out directory. Beside a text's loss on the whole split
stands nanoGPT's estimate, the mean over random windows, under its own name: the two are different measures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import check_run, from_command_line, one_line_errors
from sources.known import check_dataset, ensure, locate
from tasks import TASKS, elsewhere, find_task


@dataclass(frozen=True)
class Settings:
    out_dir: str = "out"  # a run's folder, or one checkpoint's
    checkpoint: Literal["best", "last"] = "best"  # which of the run's two
    dataset: str = ""  # another data set, with the same tokenizer; default: the one it was trained on
    split: Literal["val", "train"] = "val"  # which part of the data set
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the computation


def own_settings(values):
    """The class of the settings that the model's task adds."""
    check_run(values["out_dir"])
    return TASKS[find_task(values["out_dir"])].evaluating


HOW = dict(more=own_settings, check=lambda settings, given: settings.dataset and check_dataset(settings.dataset),
           elsewhere=elsewhere(lambda row: row.evaluating, trained=True))
if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__, usual=TASKS["text"].evaluating, **HOW)

from machine import distributed
from machine.device import pick_dtype
from run import checkpoint
from run.files import write_json
from tasks.task import load


def main(settings):
    world = distributed.start(settings.device)
    folder = checkpoint.find_any(settings.out_dir, settings.checkpoint)
    task, model, config = load(folder, world.device)
    dtype, why = pick_dtype(settings.dtype, world.device)
    name = world.from_main(lambda: ensure(settings.dataset or config["dataset"]))
    task.open(locate(name), world)
    task.fit(model)
    found = task.evaluate(model, settings.split, world, dtype)
    found |= task.details(model, settings.split, world, dtype, settings, found)
    result = {"step": config["step"], "checkpoint": folder.name, "dataset": name, "split": settings.split, **found,
              "dtype": str(dtype).removeprefix("torch.")}
    if world.is_main:
        print(f"{folder}, {settings.split} split of {name}, {result['dtype']} ({why})")
        for key, value in result.items():
            print(f"  {key:36} {value:,.6f}" if isinstance(value, float) else f"  {key:36} {value}")
        path = Path(settings.out_dir) / "evaluation.json"
        try:
            write_json(path, result)
            print(f"written to {path}")
        except OSError as error:  # a run of somebody else's
            print(f"{path} can't be written: {error.strerror}")
    world.close()


if __name__ == "__main__":
    with one_line_errors(), distributed.others_explain():
        main(SETTINGS)
