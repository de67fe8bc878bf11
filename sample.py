"""Text from a trained model: one or many continuations of a prompt, in one batch with a KV cache.

    python sample.py --out_dir=out --prompt="ROMEO:"            one sample, shown as it is written
    python sample.py --out_dir=out --num_samples=10             ten at once
    python sample.py --out_dir=out --prompt=FILE:scene.txt      the prompt from a file; --prompt=- reads stdin
    python sample.py --init_from=gpt2 --prompt="Once upon"      a published GPT-2 (by name, or its local folder)

Needs nothing but the out directory. The model looks back at most block_size tokens: whenever that window is full,
its last half is kept and generation goes on from there, so a sample may be of any length.
"""

from dataclasses import dataclass
from typing import Literal

from configurator import UserError, check_ranges, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    # the model
    out_dir: str = "out"  # a run's folder, or one checkpoint's
    checkpoint: Literal["best", "last"] = "best"  # which of the run's two
    init_from: str = ""  # instead of out_dir: gpt2, gpt2-medium, -large, -xl, a hub id, or a published model's folder
    # the text
    prompt: str = ""  # the text to continue; FILE:path reads a file, - reads stdin; empty: a fresh start
    num_samples: int = 1  # how many continuations
    max_new_tokens: int = 500  # length of each
    temperature: float = 0.8  # below 1 is bolder, above 1 wilder; 0 always takes the likeliest token
    top_k: int = 200  # choose among the k likeliest tokens only; 0: all
    top_p: float = 1.0  # choose among the likeliest tokens that reach this probability together
    stop: str = ""  # end a sample before this text
    seed: int = 1337  # same seed, same samples
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights and cache; auto: float32 on a CPU

    def __post_init__(self):
        check_ranges(self, num_samples=1, max_new_tokens=1, temperature=0.0, top_k=0, top_p=0.0, seed=0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must lie above 0 and not above 1")


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__)

import torch

import checkpoint
from device import DTYPES, pick_device
from model import generate


def continuations(model, tokenizer, prompt, settings, show=None):
    """The texts that continue `prompt`, one for each of num_samples, generated as one batch.

    A sample ends at `stop` (which is left out), at the tokenizer's end of text, or at max_new_tokens.
    show(text): called with each new piece of the first sample's text as soon as its characters are whole.
    """
    device = next(model.parameters()).device
    tokens = torch.from_numpy(prompt_tokens(tokenizer, prompt)).to(device).expand(settings.num_samples, -1)  # (B, T)
    generator = torch.Generator(device).manual_seed(settings.seed)
    texts = [Text(tokenizer, settings.stop) for _ in range(settings.num_samples)]
    steps = generate(model, tokens, settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p,
                     generator)
    for next_tokens in steps:
        for text, token in zip(texts, next_tokens.tolist()):
            text.append(token)
        if show:
            show(texts[0].news())
        if all(text.ended for text in texts):
            break
    if show:
        show(texts[0].news(final=True))
    return [text.so_far(final=True) for text in texts]


class Text:
    """One sample as it grows: decodes token by token, holds back unfinished characters, ends at a stop text."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop, self.ended = tokenizer, stop, False
        self.done, self.pending, self.shown = "", [], 0  # decoded text, ids whose text is not whole yet, length shown

    def append(self, token):
        if self.ended:
            return
        if token == self.tokenizer.eos:
            self.ended = True
            return
        self.pending.append(token)
        piece = self.tokenizer.decode(self.pending)
        if piece.endswith("\ufffd") and len(self.pending) < 4:  # bytes of a character that is not complete
            return
        searched = max(0, len(self.done) - len(self.stop))
        self.done, self.pending = self.done + piece, []
        if self.stop and (at := self.done.find(self.stop, searched)) >= 0:
            self.done, self.ended = self.done[:at], True

    def so_far(self, final=False):
        return self.done + (self.tokenizer.decode(self.pending) if final and not self.ended else "")

    def news(self, final=False):
        """The text that came since the last call, short of what may turn out to be the beginning of `stop`."""
        text = self.so_far(final)
        held = 0 if final or self.ended else max(
            (n for n in range(1, len(self.stop)) if text.endswith(self.stop[:n])), default=0)
        news = text[self.shown:len(text) - held]
        self.shown += len(news)
        return news


def prompt_tokens(tokenizer, prompt):
    """The prompt's ids; for an empty one what a text starts with: the end of another, a new line, or id 0."""
    if prompt:
        try:
            return tokenizer.encode(prompt)
        except UserError as error:
            raise UserError(f"prompt: {error}") from None
    if tokenizer.eos is not None:
        return torch.tensor([tokenizer.eos]).numpy()
    try:
        return tokenizer.encode("\n")
    except UserError:
        return torch.zeros(1, dtype=torch.long).numpy()


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


def main(settings):
    device = pick_device(settings.device)
    if settings.init_from:
        model, tokenizer = checkpoint.load_published(settings.init_from, device)
    else:
        model, tokenizer, _ = checkpoint.load(checkpoint.find_any(settings.out_dir, settings.checkpoint), device)
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model.to(torch.bfloat16 if settings.dtype == "auto" and on_gpu else DTYPES.get(settings.dtype, torch.float32))
    prompt = read_prompt(settings.prompt)

    def show(text):
        print(text, end="", flush=True)

    if settings.num_samples == 1:
        show(prompt)
        continuations(model, tokenizer, prompt, settings, show)
        print()
    else:
        for text in continuations(model, tokenizer, prompt, settings):
            print(f"{prompt}{text}\n{'-' * 80}")


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
