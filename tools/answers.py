"""Answers of a chat model, checked by its world, become a data set to learn from: its own right ones, or preferences.

    python -m tools.answers --out_dir=out/chat/countdown --name=countdown_checked
    python -m tools.answers --out_dir=out/chat/countdown --name=countdown_pairs --pairs=True

The model answers training problems of the world several times. Without --pairs, its right answers become dialogues,
each once: to fine-tune on what was checked. With --pairs, a right answer is preferred to a wrong or malformed one of
the same problem. Validation and test pairs come from the world's problems for these parts.
"""

from dataclasses import dataclass
from typing import Literal

from configurator import UserError, check_ranges, check_run, from_command_line, one_line_errors
from tasks.settings import check_model


@dataclass(frozen=True)
class Settings:
    out_dir: str = "out"  # the folder of a chat run, or of one checkpoint
    checkpoint: Literal["best", "last"] = "best"  # which checkpoint of the run: best or last
    name: str = ""  # the data set's name under data/, or the path of a folder
    pairs: bool = False  # make preferences: right answers above wrong or malformed ones
    problems: int = 6000  # how many training problems to answer
    samples: int = 8  # answers to each problem
    most: int = 4  # most answers or pairs of a problem that are kept
    temperature: float = 1.0  # below 1 the answers are safer and more alike, above 1 wilder
    seed: int = 1  # decides problems and answers; the demonstrations of prepare.py are the problems of seed 0

    def __post_init__(self):
        check_ranges(self, problems=1, samples=1, most=1, seed=0)
        if not self.temperature > 0:
            raise UserError(f"temperature = {self.temperature}: must be above 0, for the answers must differ")
        if not self.name:
            raise UserError("name the data set to make: --name=NEW")
        check_run(self.out_dir)
        check_model(self)


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__)

import functools
import itertools
import shlex

import numpy as np
import torch

from generate import pick_tokens
from machine.device import pick_device
from machine.distributed import World
from sources import dialogues
from sources.known import claim, ensure, locate
from tasks.chat import ChatTask, said, share
from tasks.loading import load
from worlds import SIZES, WORLDS


def main(settings):
    device = pick_device("auto")
    task, model, config = load(settings.out_dir, device, which=settings.checkpoint)
    if isinstance(task, ChatTask):
        task.open(locate(ensure(config["dataset"])), World(0, 1, device))
    world = getattr(task, "judge", None)
    if not world:
        raise UserError(f"out_dir = {settings.out_dir}: nobody can check its answers: name the run of a chat model on"
                        f" a data set from a world, {' or '.join(WORLDS)}")
    pick = functools.partial(pick_tokens, temperature=settings.temperature,
                             generator=torch.Generator(device).manual_seed(settings.seed))
    make = preferences if settings.pairs else checked
    rows = list(make(settings, task, model, pick))
    source = f"{'preferences between' if settings.pairs else 'right'} answers of {settings.out_dir}"
    dialogues.prepare(rows, claim(settings.name, source), settings.out_dir, dialogues.USUAL, source, world.name)
    for recipe in ("reward", "dpo") if settings.pairs else ("checked",):
        command = ["python", "train.py", f"config/chat/{recipe}.py", f"--dataset={settings.name}"]
        print("train on it: " + shlex.join([*command, f"--init_from={settings.out_dir}"]))


def checked(settings, task, model, pick):
    """Yields the model's right answers to training problems as dialogues; for other splits, those of the world."""
    for prompt, right, _ in answered(settings, task, model, pick, "train", settings.problems, settings.seed):
        for answer in right[:settings.most]:
            yield {"messages": [said("user", prompt), said("assistant", answer)], "split": "train"}
    yield from (row for row in dialogues.of_world(task.judge.name) if row["split"] != "train")


def preferences(settings, task, model, pick):
    """Yields pairs of a right answer and another one to problems of each split."""
    for split, count in {"train": settings.problems, **SIZES}.items():
        seed = settings.seed if split == "train" else 0  # those that score models
        found, without = 0, 0
        for i, (prompt, right, other) in enumerate(answered(settings, task, model, pick, split, count, seed)):
            pairs = list(itertools.product(right, other))
            order = np.random.Generator(np.random.Philox(key=np.array((settings.seed, i), np.uint64))).permutation
            for chosen, rejected in (pairs[j] for j in order(len(pairs))[:settings.most]):
                yield {"messages": [said("user", prompt)], "chosen": chosen, "rejected": rejected, "split": split}
            found += min(len(pairs), settings.most)
            without += not pairs
        print(f"{split}: {found:,} pairs; {without:,} of {count:,} problems have none")


def answered(settings, task, model, pick, split, count, seed):
    """Yields (prompt, right answers, wrong or malformed ones) of `count` problems, each answer once.

    Prints the shares of right and of malformed answers. Leaves out empty ones, and those with control tokens.
    """
    print(f"{split}: answering {count:,} problems {settings.samples} times", flush=True)
    try:
        prompts = [prompt for prompt, _ in task.judge.problems(split, count, seed)]
    except ValueError as error:
        raise UserError(f"problems = {count}: {error}") from None
    texts = task.texts(model, prompts, settings.samples, pick)
    verdicts = [[task.judge.check(prompt, text) for text in found] for prompt, found in zip(prompts, texts)]
    print(f"{split}: {settings.samples} answers to each of {count:,} problems: {share(verdicts, 1.0):.1%} right,"
          f" {share(verdicts, None):.1%} malformed")
    for prompt, found, judged in zip(prompts, texts, verdicts):
        plain = {text: verdict for text, verdict in zip(found, judged)
                 if text.strip() and task.chat.without_controls(text) == text}
        yield (prompt, [text for text, verdict in plain.items() if verdict == 1.0],
               [text for text, verdict in plain.items() if verdict != 1.0])


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
