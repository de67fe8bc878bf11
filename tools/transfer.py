"""What a pre-trained encoder is worth: topics or intents, learned from few labelled texts and from many.

    python prepare.py help_topics
    python prepare.py data/help_topics/train.jsonl --column=text --tokenizer=data/help_topics --name=help_text
    python train.py config/masked_help.py                       pre-trains on the same pages, without their labels
    python -m tools.transfer --sentences=FOLDER                 FOLDER: a published BERT, such as all-MiniLM-L6-v2

    python prepare.py home_assistant_intents
    python -m tools.transfer --sentences=FOLDER --data=intents  commands to a house, each with one of 42 intents

Trains each start with 50, 200, 1,000 and all labelled texts, as their own rows of a table. "Frozen" means that only the
head learns, "LoRA" that the encoder learns by matrices of rank 8. Prints the accuracies on validation and test, beside
those of a bag of words that learned from the same texts, and writes transfer.svg. What was stopped goes on with the
same command; what has a score keeps it.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from configurator import UserError, check_idle, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    data: Literal["topics", "intents"] = "topics"  # what to learn: topics of help pages, intents of commands to a house
    masked: str = "out/masked_help"  # the run of the masked model, for topics; empty: leave it out
    sentences: str = ""  # the folder of a published BERT; empty: leave it out
    out: str = "out/transfer"  # the folder of the runs, one inside it for topics and one for intents

    def __post_init__(self):
        if self.data == "intents":
            check_idle(self, "has read help pages, and is for --data=topics", "masked")


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__)

from run import curves
from run.files import read_json, write_text
from tools.versus import require_same_code, train

ROOT = Path(__file__).resolve().parent.parent
ROWS = (50, 200, 1000, 0)  # labelled texts to learn from; 0: all
BAG = "bag of words"
LARGE = ("--block_size=64 --batch_size=16 --learning_rate=2e-3 --min_lr=0 --lr_schedule=linear --weight_decay=0.01"
         " --beta2=0.999 --dtype=float32 --sample_tokens=0")


class Data(NamedTuple):
    dataset: str
    small: str  # arguments of train.py for a small encoder
    large: str  # those for a published one
    floor: str  # what evaluate.py calls the accuracy of the bag of words
    shown: str  # under the picture's title


DATA = {"topics": Data("help_topics", "config/classify_topics.py",
                       f"--task=classification --dataset=help_topics {LARGE}", f"accuracy, {BAG}",
                       "topics of help pages, test part"),
        "intents": Data("home_assistant_intents",
                        "config/tag_home.py --learn=intents --hide_rate=0 --batch_size=16",
                        f"--task=tagging --dataset=home_assistant_intents --learn=intents {LARGE}",
                        f"intent_accuracy, {BAG}", "intents of commands to a house, test part")}


class Start(NamedTuple):
    arguments: str  # of train.py
    updates: tuple  # for each of ROWS


def starts(settings):
    """{name: Start} of all that the settings ask for.

    The values for topics were chosen once, on the validation part; those for intents and LoRA are a first guess.
    """
    small, large = DATA[settings.data].small, f"{DATA[settings.data].large} --init_from={settings.sentences}"
    if settings.data == "intents":
        found = {"from scratch": Start(small, (100, 200, 400, 940))}
        updates = {"": (60, 120, 250, 470), "frozen": (100, 200, 400, 700), "LoRA": (60, 120, 250, 470)}
    else:
        found = {"from scratch": Start(small, (60, 100, 188, 374))}
        updates = {"": (40, 80, 126, 250), "frozen": (60, 100, 200, 300), "LoRA": (40, 80, 126, 250)}
        if settings.masked:
            masked = f"{small} --init_from={settings.masked}"
            found["masked model"] = Start(f"{masked} --rates.encoder=0.5", (60, 100, 188, 374))
            found["masked model, frozen"] = Start(f"{masked} --rates.encoder=0 --optimizer=adamw --muon_lr=0.02",
                                                  (60, 100, 188, 374))
    if settings.sentences:
        found["published BERT"] = Start(f"{large} --rates.encoder=0.1", updates[""])
        found["published BERT, frozen"] = Start(f"{large} --rates.encoder=0", updates["frozen"])
        found["published BERT, LoRA"] = Start(f"{large} --lora_rank=8 --rates.encoder=0.5", updates["LoRA"])
    return found


def score(folder):
    """The evaluation.json of a run's end, with its test part, which is scored once. Raises UserError if that fails."""
    path = folder / "evaluation.json"
    if not path.exists():
        command = ["evaluate.py", f"--out_dir={folder}", "--checkpoint=last", "--test=True", "--device=cpu"]
        done = subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8")
        if done.returncode:
            raise UserError(f"evaluate.py --out_dir={folder} failed: {done.stderr.strip()}")
    return read_json(path)


def learn(name, start, out):
    """Trains a start with each of ROWS. Returns [content of evaluation.json]."""
    found = []
    for rows, updates in zip(ROWS, start.updates):
        folder = out / name.replace(", ", "_").replace(" ", "_") / (str(rows) if rows else "all")
        words = ["train.py", *start.arguments.split(), f"--train_rows={rows}", f"--max_iters={updates}",
                 f"--warmup_iters={updates // 10}", f"--eval_interval={updates}", "--device=cpu"]
        train(words, 1337, folder, updates)
        found.append(score(folder))
        print(f"{name}, {rows or 'all'} labels: {found[-1]['accuracy']:.1%} of the validation part", flush=True)
    return found


def table(results):
    """The lines of a Markdown table. results: {name: [(validation accuracy, test accuracy) for each of ROWS]}."""
    yield "| validation / test | " + " | ".join(f"{rows:,} labels" if rows else "all" for rows in ROWS) + " |"
    yield "| --- |" + " --- |" * len(ROWS)
    for name, pairs in results.items():
        yield f"| {name} | " + " | ".join(f"{100 * val:.1f} / {100 * test:.1f}" for val, test in pairs) + " |"


def draw(results, data, path):
    """Writes a picture of the test accuracies. data: a row of DATA."""
    most = read_json(f"data/{data.dataset}/meta.json")["train_rows"]
    lines, parts, top = [], [], 92
    for (name, pairs), color in zip(results.items(), curves.COLORS):
        lines.append(curves.Curve([(rows or most, test) for rows, (_, test) in zip(ROWS, pairs)], color))
        parts += [f'<path d="M{curves.LEFT} {top - 4}h18" stroke="{color}" stroke-width="3"/>',
                  curves.label(curves.LEFT + 26, top, name)]
        top += 20
    box = (curves.LEFT, top + 30, curves.INNER, 300)
    parts.append(curves.panel(box, "Accuracy", lines, unit="labelled texts"))
    write_text(path, curves.page("Few labels and many", data.shown, parts, top + 390))


def main(settings):
    os.chdir(ROOT)  # recipes and data sets are named from there
    os.environ["OMP_NUM_THREADS"] = "1"  # so small a model is not faster with more
    data, out, results = DATA[settings.data], Path(settings.out) / settings.data, {}
    require_same_code(out)
    for name, start in starts(settings).items():
        found = learn(name, start, out)
        results[name] = [(each["accuracy"], each["test accuracy"]) for each in found]
        results[BAG] = [(each[data.floor], each[f"test {data.floor}"]) for each in found]
    print("\n" + "\n".join(table(results)))
    draw(results, data, out / "transfer.svg")
    print(f"written to {out / 'transfer.svg'}")


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
