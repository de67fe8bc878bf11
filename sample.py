"""Samples from a trained model: continuations of a prompt, one or many in a batch, or answers about images.

    python sample.py --out_dir=out --prompt="ROMEO:"            one sample, shown as it is written
    python sample.py --init_from=gpt2 --prompt="Once upon"      a published GPT-2 (by name, or its local folder)
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --chat        a conversation with a chat model
    python sample.py --help --task=columns       what a model of this task takes, such as --row; with --out_dir, a run's

A PaliGemma, published or trained here (--out_dir), answers prompts about an image, best at temperature 0:

    python sample.py --init_from=google/paligemma-3b-pt-224 --image=photo.jpg --prompt="caption en" --temperature=0
    ... --prompt="detect cat ; dog" --draw=boxes.png --attention=map.png        its boxes, and where it looked
    ... --dtype=bfloat16 --device=cpu                           half the memory: 6 GB for the 3 billion parameters
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_run, from_command_line, one_line_errors
from tasks import TASKS, elsewhere, find_task
from tasks.settings import image_files


@dataclass(frozen=True)
class Settings:
    # the model
    out_dir: str = "out"  # the folder of a run, or of one checkpoint
    checkpoint: Literal["best", "last"] = "best"  # which checkpoint of the run: best or last
    init_from: str = ""  # instead of out_dir: gpt2, gpt2-medium, -large, -xl, a hub id, or a published model's folder
    task: Literal[("", *TASKS)] = ""  # with --help: lists the settings for models of this task, such as columns
    # the prompt
    prompt: str = ""  # the text to continue; FILE:path reads a file, - reads stdin; empty: start a new text
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights and KV cache; auto: float32 on a CPU
    compile: bool = False  # on CUDA, compile the steps too: the first text takes longer, long ones are written faster


def own_settings(values):
    """Returns the dataclass of settings that the model's task adds. values: {name: value} of the fields of Settings."""
    if values["task"]:
        return TASKS[values["task"]].sampling
    if not values["init_from"]:
        check_run(values["out_dir"])
    return TASKS[find_task(values["init_from"] or values["out_dir"])].sampling


def check(settings, given):
    """Raises UserError if a file that is named does not exist, or no image is given to a model that needs one."""
    for path in image_files(settings.image) if hasattr(settings, "image") else ():
        if not path:
            raise UserError(f"image = {settings.image!r}: names no file, and this model needs one: add --image=FILE")
        if not Path(path).is_file():
            raise UserError(f"image = {path}: there is no such file")
    for name, text in ((name, getattr(settings, name, "")) for name in ("prompt", "rank", "context")):
        if text.startswith("FILE:") and (not (path := Path(text.removeprefix("FILE:"))).exists() or path.is_dir()):
            raise UserError(f"{name} = {text}: {'is a folder: name a file' * path.is_dir() or 'there is no such file'}")


HOW = dict(more=own_settings, check=check, elsewhere=elsewhere(lambda row: row.sampling, trained=True))
if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__, usual=TASKS["text"].sampling, **HOW)

from machine.capture import compile_steps
from machine.device import pick_device, weights_dtype
from machine.terminal import printable
from tasks.chat import talker
from tasks.loading import load


def read_prompt(prompt):
    """Returns the text of --prompt: the file after FILE:, standard input for -, else the prompt itself."""
    path = 0 if prompt == "-" else prompt.removeprefix("FILE:")  # 0: standard input
    try:
        if path == prompt:
            return prompt.encode().decode()  # raises for bytes on the command line that are not UTF-8
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--prompt={prompt}: can't be read as UTF-8 text: {error}") from None


def main(settings):
    prompt, device = read_prompt(settings.prompt), pick_device(settings.device)
    dtype = weights_dtype(settings.dtype, device)
    task, model, _ = load(settings.init_from or settings.out_dir, device, dtype, settings.checkpoint)
    if settings.compile:
        compile_steps(model, device)
    images, count = image_files(getattr(settings, "image", "")), getattr(settings, "num_samples", 1)
    requests = [{"text": prompt, "image": path} for path in images for _ in range(count)]
    pieces = talker(task, settings).sample(model, requests, settings)
    if len(requests) == 1:
        for _, piece in pieces:
            print(printable(piece), end="", flush=True)
        print()
        return
    texts = [""] * len(requests)
    for row, piece in pieces:
        texts[row] += piece
    print("\n".join(f"{printable(text)}\n{'-' * 80}" for text in texts))


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
