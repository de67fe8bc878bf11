"""Text from a trained model, about images if it sees: one or many continuations of a prompt, in one batch.

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

Needs nothing but the out directory. A GPT looks back at most block_size tokens: whenever that window is full, its last
half is kept and generation goes on from there, so a sample may be of any length.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_ranges, check_run, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    # the model
    out_dir: str = "out"  # a run's folder, or one checkpoint's
    checkpoint: Literal["best", "last"] = "best"  # which of the run's two
    init_from: str = ""  # instead of out_dir: gpt2, gpt2-medium, -large, -xl, a hub id, or a published model's folder
    # the image, for a model that sees
    image: str = ""  # a picture's file; several with commas, each of which gets the prompt
    draw: str = ""  # where to draw the boxes of the answer on the image: a .png or .jpg
    attention: str = ""  # where to draw, for each token of the answer, what of the image it came from: a .png or .jpg
    # the text
    prompt: str = ""  # the text to continue; FILE:path reads a file, - reads stdin; empty: a fresh start
    num_samples: int = 1  # how many continuations
    max_new_tokens: int = 500  # length of each; about an image at most what the model's positions leave
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
        for name in ("draw", "attention"):
            path = getattr(self, name)
            if path and not path.lower().endswith((".png", ".jpg", ".jpeg")):
                raise UserError(f"{name} = {path}: must end in .png or .jpg")
            if path and (not self.image or "," in self.image or self.num_samples > 1):
                raise UserError(f"{name} = {path}: needs one --image and --num_samples=1")


def check_paths(settings):
    """Raises UserError for a file or folder that isn't there."""
    if not settings.init_from:
        check_run(settings.out_dir)
    for path in filter(None, settings.image.split(",")):
        if not Path(path).is_file():
            raise UserError(f"image = {path}: there is no such file")
    if settings.prompt.startswith("FILE:") and not Path(settings.prompt.removeprefix("FILE:")).exists():
        raise UserError(f"prompt = {settings.prompt}: there is no such file")


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__, check=check_paths)

import torch

import checkpoint
import vlm
from device import DTYPES, pick_device
from model import generate


def continuations(model, tokenizer, prompt, settings, show=None, images=None):
    """The Texts that continue `prompt`, num_samples of them, or as many for each image, generated as one batch.

    images: (M, 3, H, W), if the model is a PaliGemma. A sample ends at `stop` (which is left out), at the tokenizer's
    end of text, or at max_new_tokens.
    show(text): called with the prompt, and with each new piece of the first sample's text as soon as its characters are
    whole; about an image, with the latter only.
    """
    count = settings.num_samples * (1 if images is None else len(images))
    texts = [Text(tokenizer, settings.stop) for _ in range(count)]
    steps = token_steps(model, tokenizer, prompt, settings, images)  # raises what is wrong with the prompt
    if show and images is None:
        show(prompt)
    for next_tokens in steps:
        for text, token in zip(texts, next_tokens.tolist()):
            text.append(token)
        if show:
            show(texts[0].news())
        if all(text.ended for text in texts):
            break
    if show:
        show(texts[0].news(final=True))
    return texts


def token_steps(model, tokenizer, prompt, settings, images=None):
    """Yields the next token of every sample, (B,); arguments as in `continuations`."""
    device = next(model.parameters()).device
    how = dict(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
               generator=torch.Generator(device).manual_seed(settings.seed))
    if images is None:
        tokens = torch.from_numpy(prompt_tokens(tokenizer, prompt)).to(device)  # (T,)
        return generate(model, tokens.expand(settings.num_samples, -1), settings.max_new_tokens, **how)
    tokens = vlm.encode_prompt(tokenizer, prompt)  # (T,)
    room = model.config.block_size - model.config.vision.n_patches - len(tokens)
    return vlm.generate(model, images.to(device), [tokens] * (len(images) * settings.num_samples),
                        min(settings.max_new_tokens, max(1, room)), eos=tokenizer.eos, **how)


class Text:
    """One sample as it grows: decodes token by token, holds back unfinished characters, ends at a stop text."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop, self.ended = tokenizer, stop, False
        self.ids, self.done, self.shown = [], "", 0  # all ids, the text of those before `start`, length shown
        self.before = self.start = 0  # ids[before:start] came last to the text; that of ids[start:] is not whole yet

    def append(self, token):
        if self.ended or token == self.tokenizer.eos:
            self.ended = True
            return
        self.ids.append(token)
        piece = self.pending()
        if piece.endswith("\ufffd") and len(self.ids) - self.start < 4:  # bytes of a character that is not complete
            return
        searched = max(0, len(self.done) - len(self.stop))
        self.done, self.before, self.start = self.done + piece, self.start, len(self.ids)
        if self.stop and (at := self.done.find(self.stop, searched)) >= 0:
            self.done, self.ended = self.done[:at], True

    def pending(self):
        """The text of ids[start:], decoded together with what comes before: some decoders strip a leading space."""
        before = self.tokenizer.decode(self.ids[self.before:self.start])
        return self.tokenizer.decode(self.ids[self.before:])[len(before):]

    def __str__(self):
        return self.done + self.pending()

    def news(self, final=False):
        """The text that came since the last call, short of what may turn out to be the beginning of `stop`."""
        text = str(self) if final else self.done
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


def load(settings, device):
    """(model, tokenizer), the weights in the precision that the settings ask for."""
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if settings.dtype == "auto" and on_gpu else DTYPES.get(settings.dtype, torch.float32)
    if settings.init_from:
        model, tokenizer = checkpoint.load_published(settings.init_from, device, dtype=dtype)
    else:
        model, tokenizer, _ = checkpoint.load(checkpoint.find_any(settings.out_dir, settings.checkpoint), device)
    name = settings.init_from or settings.out_dir
    if settings.image and not isinstance(model, vlm.PaliGemma):
        raise UserError(f"image = {settings.image}: the model of {name} reads text only; leave out --image")
    if not settings.image and isinstance(model, vlm.PaliGemma):
        raise UserError(f"the model of {name} is asked about an image: add --image=FILE")
    return model.to(dtype), tokenizer


def draw_boxes(picture, answer, path):
    """Prints the answer's boxes, and draws them on the picture into the file `path`."""
    boxes = vlm.parse_boxes(answer, *picture.size)
    if not boxes:
        print(f"there is no box in the answer, so {path} was not written")
        return
    for box in boxes:
        print(f"{box.label}: left {box.left:.0f}, top {box.top:.0f}, right {box.right:.0f}, bottom {box.bottom:.0f}")
    save_picture(vlm.draw_boxes(picture, boxes), path)


def draw_attention(model, tokenizer, picture, image, prompt, ids, path):
    """Draws where the model looked as it wrote each of the ids, or the end of an empty answer, into the file `path`."""
    ids = ids or [tokenizer.eos]
    weights = vlm.image_attention(model, image, vlm.encode_prompt(tokenizer, prompt), ids)
    save_picture(vlm.draw_attention(picture, weights, prompt, [tokenizer.decode([i]) for i in ids]), path)


def save_picture(picture, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(f"wrote {path}")


def main(settings):
    device = pick_device(settings.device)
    prompt = read_prompt(settings.prompt)
    paths = settings.image.split(",") if settings.image else []
    pictures = [vlm.read_image(path) for path in paths]
    model, tokenizer = load(settings, device)
    images, heads = None, [prompt] * settings.num_samples
    if pictures:
        prompt = prompt.rstrip("\r\n")  # one newline ends the prompt of an image anyway
        images = torch.stack([vlm.pixels(picture, model.config.vision.image_size) for picture in pictures]).to(device)
        heads = [f"{path}: " for path in paths for _ in range(settings.num_samples)]

    def show(text):
        print(text, end="", flush=True)

    if len(heads) == 1:
        (text,) = continuations(model, tokenizer, prompt, settings, show, images)
        print()
    else:
        for head, text in zip(heads, continuations(model, tokenizer, prompt, settings, images=images)):
            print(f"{head}{text}\n{'-' * 80}")
    if settings.draw:
        draw_boxes(pictures[0], str(text), settings.draw)
    if settings.attention:
        draw_attention(model, tokenizer, pictures[0], images, prompt, text.ids, settings.attention)


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
