"""A new model, or a new task, needs a class and a row and no other change to train, resume, sample and evaluate."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TOY_MODEL = '''
"""A language model that knows how often each token occurs, and nothing else."""

from dataclasses import dataclass

import torch
import torch.nn as nn

from model import predict


@dataclass(frozen=True)
class UnigramConfig:
    vocab_size: int
    block_size: int


class Unigram(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.scores = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, tokens, targets=None, places=None):
        return predict(self.logits, self.hidden(tokens), targets, places)

    def hidden(self, tokens, caches=None, start=0):
        return self.scores.expand(*tokens.shape, -1)

    def logits(self, x):
        return x
'''

TOY_TASK = '''
"""The parity of four bits: a task in one file."""

from dataclasses import dataclass

import torch
import torch.nn as nn

from tasks.task import Task


@dataclass(frozen=True)
class ParityConfig:
    width: int = 32


class Parity(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = nn.Sequential(nn.Linear(4, config.width), nn.ReLU(), nn.Linear(config.width, 1))

    def forward(self, bits, targets=None):
        logits = self.net(bits)[:, 0]
        if targets is None:
            return logits
        return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")


class ParityTask(Task):
    best = ("errors", min)
    models = {"parity": (Parity, ParityConfig)}

    def open(self, folder, world):
        self.world, self.tokenizers = world, {}

    def build(self, generator):
        torch.manual_seed(self.settings.seed)
        return Parity(ParityConfig())

    def pick(self, step):
        return [(self.settings.batch_size * step + i) % 16 for i in range(self.settings.batch_size)]

    def batch(self, rows, generator):
        bits = torch.tensor([[row >> i & 1 for i in range(4)] for row in rows]).float()
        return {"bits": bits, "targets": bits.sum(1) % 2}, torch.ones(len(rows))

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        arguments, _ = self.batch(range(16), None)
        wrong = (model(arguments["bits"]) > 0) != (arguments["targets"] > 0)
        return {"loss": model(**arguments).mean().item(), "errors": wrong.float().mean().item()}

    def sample(self, model, requests, sampling):
        for index, request in enumerate(requests):
            bits = torch.tensor([[int(bit) for bit in request["text"] or "0000"]]).float()
            yield index, "odd" if model(bits).item() > 0 else "even"
'''


@pytest.fixture
def house(tmp_path):
    """The folder of a copy of the project's code."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if name.endswith((".py", ".c", ".json")) and not name.startswith(("tests/", "data/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def add_row(path, table, row, more=""):
    """Adds a row to a table, which is a dict in the file, and the text `more` before the table."""
    text = path.read_text()
    assert text.count(f"\n{table} = {{") == 1
    path.write_text(text.replace(f"\n{table} = {{", f"\n{more}\n{table} = {{\n{row}", 1))


def python(house, *arguments):
    """What the command prints. Fails if its exit status is not 0."""
    done = subprocess.run([sys.executable, *arguments], cwd=house, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def train_resume_evaluate(house, *settings):
    """Checks that a resumed run has the losses of an undisturbed one, and that it is evaluated. Returns the losses."""
    common = (*settings, "--eval_interval=20", "--device=cpu", "--sample_tokens=20")
    python(house, "train.py", *common, "--max_iters=40", "--lr_decay_iters=40", "--out_dir=whole")
    python(house, "train.py", *common, "--max_iters=20", "--lr_decay_iters=40", "--out_dir=parts")
    python(house, "train.py", "--resume", "--max_iters=40", "--out_dir=parts")
    whole, parts = ({row["step"]: row["loss"] for row in rows(house / name)} for name in ("whole", "parts"))
    assert whole == parts
    python(house, "evaluate.py", "--out_dir=parts")
    return list(whole.values())


@pytest.mark.slow
def test_a_model_is_a_class_and_a_row(house, dataset):
    (house / "unigram.py").write_text(TOY_MODEL)
    row = '    "unigram": (Unigram, UnigramConfig),'
    add_row(house / "tasks" / "text.py", "MODELS", row, "from unigram import Unigram, UnigramConfig")
    losses = train_resume_evaluate(house, f"--dataset={dataset}", "--model=unigram", "--learning_rate=0.1")
    assert losses[-1] < losses[0] - 0.2
    assert len(python(house, "sample.py", "--out_dir=parts", "--max_new_tokens=30")) > 30
    found = json.loads((house / "parts" / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(rows(house / "parts")[-1]["val_loss"], abs=1e-5)
    done = subprocess.run([sys.executable, "train.py", f"--dataset={dataset}", "--model=unigram", "--n_layer=3"],
                          cwd=house, capture_output=True, text=True)
    assert done.returncode == 2 and "n_layer = 3: --model=unigram has no such setting" in done.stderr


@pytest.mark.slow
def test_a_task_is_a_file_and_a_row(house, dataset):
    (house / "tasks" / "parity.py").write_text(TOY_TASK)
    row = '    "parity": Row("ParityTask", settings.Nothing, settings.Nothing, settings.Nothing),\n'
    path = house / "tasks" / "__init__.py"
    path.write_text(path.read_text().replace("TASKS = {\n", "TASKS = {\n" + row, 1))
    losses = train_resume_evaluate(house, "--task=parity", f"--dataset={dataset}", "--learning_rate=0.1")
    assert losses[-1] < losses[0] / 2
    assert python(house, "sample.py", "--out_dir=parts", "--prompt=1110").strip() == "odd"
    assert "errors" in json.loads((house / "parts" / "evaluation.json").read_text())
