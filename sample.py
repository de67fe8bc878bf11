"""What a trained model writes: one or many continuations of a prompt, in one batch; answers about images, if it sees.

    python sample.py --out_dir=out --prompt="ROMEO:"            one sample, shown as it is written
    python sample.py --out_dir=out --num_samples=10             ten at once
    python sample.py --out_dir=out --prompt=FILE:scene.txt      the prompt from a file; --prompt=- reads stdin
    python sample.py --init_from=gpt2 --prompt="Once upon"      a published GPT-2 (by name, or its local folder)

A PaliGemma, published or trained here (--out_dir), is asked about an image; its answers are best at temperature 0:

    python sample.py --init_from=google/paligemma-3b-pt-224 --image=photo.jpg --prompt="caption en" --temperature=0
    ... --image=a.jpg,b.jpg                                     one prompt for several images, in one batch
    ... --prompt="detect cat ; dog" --draw=boxes.png            the answer's boxes in pixels, and on the image
    ... --attention=map.png                                     where it looked for each token of its answer
    ... --dtype=bfloat16 --device=cpu                           half the memory: 6 GB for the 3 billion parameters

Needs nothing but the out directory, whose task decides which settings there are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_ranges, check_run, from_command_line, one_line_errors
from tasks import TASKS, elsewhere, find_task


@dataclass(frozen=True)
class Settings:
    # the model
    out_dir: str = "out"  # a run's folder, or one checkpoint's
    checkpoint: Literal["best", "last"] = "best"  # which of the run's two
    init_from: str = ""  # instead of out_dir: gpt2, gpt2-medium, -large, -xl, a hub id, or a published model's folder
    # the prompt
    prompt: str = ""  # the text to continue; FILE:path reads a file, - reads stdin; empty: a fresh start
    num_samples: int = 1  # how many answers to it
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights and cache; auto: float32 on a CPU

    def __post_init__(self):
        check_ranges(self, num_samples=1)


def own_settings(values):
    """The class of the settings that the model's task adds."""
    if not values["init_from"]:
        check_run(values["out_dir"])
    return TASKS[find_task(values["init_from"] or values["out_dir"])].sampling


def check(settings, given):
    """Raises UserError for a file that isn't there."""
    if getattr(settings, "image", None) == "":
        raise UserError("the model is asked about an image: add --image=FILE")
    for path in filter(None, getattr(settings, "image", "").split(",")):
        if not Path(path).is_file():
            raise UserError(f"image = {path}: there is no such file")
    if settings.prompt.startswith("FILE:") and not Path(settings.prompt.removeprefix("FILE:")).exists():
        raise UserError(f"prompt = {settings.prompt}: there is no such file")


HOW = dict(more=own_settings, check=check, elsewhere=elsewhere(lambda row: row.sampling))
if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__, usual=TASKS["text"].sampling, **HOW)

import torch

from machine.device import DTYPES, pick_device
from run import checkpoint
from tasks.task import load, load_published_task


def read_prompt(prompt):
    """The text that --prompt stands for."""
    path = 0 if prompt == "-" else prompt.removeprefix("FILE:")  # 0: standard input
    if path == prompt:
        return prompt
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt={prompt}: can't be read: {error}") from None


def load_model(settings):
    """(task, model), the weights on the device and in the precision that the settings ask for."""
    device = pick_device(settings.device)
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if settings.dtype == "auto" and on_gpu else DTYPES.get(settings.dtype, torch.float32)
    if settings.init_from:
        return load_published_task(settings.init_from, device, dtype)
    task, model, _ = load(checkpoint.find_any(settings.out_dir, settings.checkpoint), device)
    return task, model.to(dtype)


def main(settings):
    prompt = read_prompt(settings.prompt)
    task, model = load_model(settings)
    requests = [{"text": prompt, "image": path} for path in getattr(settings, "image", "").split(",")
                for _ in range(settings.num_samples)]
    pieces = task.sample(model, requests, settings)
    if len(requests) == 1:
        for _, piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    texts = [""] * len(requests)
    for row, piece in pieces:
        texts[row] += piece
    for text in texts:
        print(f"{text}\n{'-' * 80}")


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
