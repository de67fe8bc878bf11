"""Looks inside a model: one HTML file that shows what it expected at each token, where it looked, and what it wrote.

    python look.py --out_dir=out --prompt="ROMEO:"              writes look.html, which opens in any browser
    python look.py --init_from=gpt2 --prompt="Once upon" --out=gpt2.html       a published model, by name or folder
    python look.py --out_dir=out/vlm_shapes --image=photo.png --prompt=caption        the picture, word by word
    python look.py --out_dir=out/fashion_mnist --image=shirt.png                      its class, patch by patch
    python look.py --out_dir=out --live                         the same page on 127.0.0.1, with a model that answers

The file needs no network: text, numbers, attention and picture are in it. A model that writes goes on from the prompt,
as with sample.py and its settings. Click a token, or press the arrow keys.
"""

import os
from dataclasses import dataclass, replace
from typing import Literal

from configurator import UserError, check_idle, check_ranges, check_run, from_command_line, joined, one_line_errors
from run.curves import read_settings
from tasks import TASKS, elsewhere, find_task
from tasks.settings import image_files


@dataclass(frozen=True)
class Settings:
    # the model
    out_dir: str = "out"  # the folder of a run, or of one checkpoint
    checkpoint: Literal["best", "last"] = "best"  # which checkpoint of the run: best or last
    init_from: str = ""  # instead of out_dir: gpt2, gpt2-medium, -large, -xl, a hub id, or a published model's folder
    # the prompt
    prompt: str = ""  # the text to read or continue; FILE:path reads a file, - reads stdin; empty: start a new text
    # the page
    out: str = "look.html"  # the file to write
    live: bool = False  # instead of a file: serve the page, with a prompt to type, until Ctrl-C
    host: str = "127.0.0.1"  # with --live: the address to listen on; only this machine can reach the default
    port: int = 8000  # with --live: the port to listen on; 0: any free one
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights and KV cache; auto: float32 on a CPU


@dataclass(frozen=True)
class Short:
    max_new_tokens: int = 200  # most tokens to write; if not set, at most as many as fit into the model's window


def own_settings(values):
    """Returns the dataclass of settings that the model's task adds. values: {name: value} of the fields of Settings."""
    begun = os.path.exists(os.path.join(values["out_dir"], "run.lock"))  # but perhaps not saved yet
    if not (values["init_from"] or begun):
        check_run(values["out_dir"])
    name = "" if values["init_from"] else read_settings(values["out_dir"]).get("task")
    task = name if name in TASKS else find_task(values["init_from"] or values["out_dir"])
    if task in CLOSED:
        raise UserError(f"a model of --task={task} can't be looked into yet: use sample.py")
    sampling = TASKS[task].sampling
    return joined(sampling, Short) if hasattr(sampling, "max_new_tokens") else sampling


CLOSED = ("contrastive", "reward", "masked-patches", "columns")  # tasks that make no record yet

# Settings of sample.py for what the page does not show, or shows anyway.
IDLE = ("num_samples", "n_best", "show_steps", "draw", "attention", "attention_layer", "attention_head",
        "attention_each", "rank", "top")


def check(settings, given):
    """Raises UserError for a setting that would do nothing, or if the page can't be written to `out`."""
    check_idle(settings, "does nothing for look.py", *(name for name in IDLE if hasattr(settings, name)))
    if len(image_files(getattr(settings, "image", ""))) > 1:
        raise UserError(f"image = {settings.image}: the page shows one image: name one")
    if settings.live:
        check_idle(settings, "does nothing beside --live", "out", "prompt")
        check_ranges(settings, port=0)
        return
    check_idle(settings, "is for --live", "host", "port")
    folder = os.path.dirname(settings.out) or "."
    if not settings.out.endswith((".html", ".htm")):
        raise UserError(f"out = {settings.out}: must end in .html")
    if os.path.isdir(settings.out):
        raise UserError(f"out = {settings.out}: is a folder; name a file")
    if not os.path.isdir(folder):
        raise UserError(f"out = {settings.out}: there is no folder {folder}: create it, or name another file")


HOW = dict(more=own_settings, check=check, elsewhere=elsewhere(lambda row: row.sampling, trained=True))
if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, GIVEN = from_command_line(Settings, __doc__, usual=joined(TASKS["text"].sampling, Short), **HOW)

import sample
from inside.live import serve
from inside.page import page
from machine.device import pick_device, weights_dtype
from run.files import write_text
from tasks.chat import talker
from tasks.loading import load
from tokenizer import prompt_tokens


def open_model(settings, which):
    """(task, model, config) of the checkpoint `which`; the task talks if the settings say so."""
    device = pick_device(settings.device)
    dtype = weights_dtype(settings.dtype, device)
    task, model, config = load(settings.init_from or settings.out_dir, device, dtype, which)
    if not isinstance(settings, TASKS[task.settings.task].sampling):
        raise UserError(f"{settings.out_dir} now has a model of --task={task.settings.task}: start look.py again")
    return talker(task, settings), model, config


def fitting(task, model, prompt, settings):
    """The settings, with fewer max_new_tokens if a text that goes on from the prompt would leave the model's window."""
    if task.settings.task != "text":
        return settings
    room = model.config.block_size - len(prompt_tokens(task.tokenizer, prompt))
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, room)) if room > 0 else settings


def main(settings, given=()):
    if settings.live:
        return serve(settings, lambda which: open_model(settings, which))
    sample.check(settings, {})
    request = {"text": sample.read_prompt(settings.prompt), "image": getattr(settings, "image", "")}
    task, model, _ = open_model(settings, settings.checkpoint)
    if "max_new_tokens" not in given:
        settings = fitting(task, model, request["text"], settings)
    text = page(task.inside(model, request, settings))
    write_text(settings.out, text)
    print(f"{settings.out}: {len(text) / 1000:,.0f} kB; open it in a browser")


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS, GIVEN)
