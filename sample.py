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
from tasks.settings import image_files


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
    for path in image_files(settings.image) if hasattr(settings, "image") else ():
        if not path:
            raise UserError(f"image = {settings.image!r}: names no file, and the model looks at images: --image=FILE")
        if not Path(path).is_file():
            raise UserError(f"image = {path}: there is no such file")
    if settings.prompt.startswith("FILE:") and not Path(settings.prompt.removeprefix("FILE:")).exists():
        raise UserError(f"prompt = {settings.prompt}: there is no such file")


HOW = dict(more=own_settings, check=check, elsewhere=elsewhere(lambda row: row.sampling, trained=True))
if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__, usual=TASKS["text"].sampling, **HOW)

from machine.device import pick_device, weights_dtype
from machine.terminal import printable
from tasks.task import load


def read_prompt(prompt):
    """The text that --prompt stands for."""
    path = 0 if prompt == "-" else prompt.removeprefix("FILE:")  # 0: standard input
    try:
        if path == prompt:
            return prompt.encode().decode()  # the shell may give bytes that are no text
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--prompt={prompt}: can't be read as UTF-8 text: {error}") from None


def main(settings):
    prompt, device = read_prompt(settings.prompt), pick_device(settings.device)
    dtype = weights_dtype(settings.dtype, device)
    task, model, _ = load(settings.init_from or settings.out_dir, device, dtype, settings.checkpoint)
    requests = [{"text": prompt, "image": path} for path in image_files(getattr(settings, "image", ""))
                for _ in range(settings.num_samples)]
    pieces = task.sample(model, requests, settings)
    if len(requests) == 1:
        for _, piece in pieces:
            print(printable(piece), end="", flush=True)
        print()
        return
    texts = [""] * len(requests)
    for row, piece in pieces:
        texts[row] += piece
    for text in texts:
        print(f"{printable(text)}\n{'-' * 80}")


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
