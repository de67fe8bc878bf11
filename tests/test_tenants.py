"""What CONTRIBUTING.md promises: a new model, norm, optimizer or task is a class and a row, and nothing else.

Each then trains, resumes, samples and is evaluated. Once the edit is gone, or where it came later, a line says so.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from configurator import UserError
from published import files
from tasks.loading import load
from tokenizer import ByteTokenizer

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

    def hidden(self, tokens):
        return self.scores.expand(*tokens.shape, -1)

    def logits(self, x):
        return x
'''

NORM = '''
class ScaleNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(config.n_embd**0.5))

    def forward(self, x):
        return self.gain * F.normalize(x, dim=-1)

'''

OPTIMIZER = '''
@without_dynamo
class Lion(torch.optim.Optimizer):
    """Chen et al. 2023."""

    def __init__(self, groups, lr, betas, **_):
        super().__init__(groups, dict(lr=lr, betas=betas))

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean, (beta1, beta2) = self.state[p].setdefault("mean", torch.zeros_like(p)), group["betas"]
                p.sub_(group["lr"] * ((beta1 * mean + (1 - beta1) * p.grad).sign() + group["weight_decay"] * p))
                mean.lerp_(p.grad, 1 - beta2)

'''

TOY_TASK = '''
"""The parity of four bits: a task in one file, without data or tokenizer."""

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


def python(house, *arguments, status=0):
    """What the command prints; if it must fail with another status, what it prints on stderr."""
    done = subprocess.run([sys.executable, *arguments], cwd=house, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


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
    said = python(house, "train.py", f"--dataset={dataset}", "--model=unigram", "--n_layer=3", status=2)
    assert "n_layer = 3: --model=unigram has no such setting" in said
    assert "the model Unigram has no blocks of model.py, so it can't be looked into" in python(
        house, "look.py", "--out_dir=parts", status=2)


@pytest.mark.slow
def test_a_norm_and_an_optimizer_are_classes_and_rows(house, dataset):
    before = {name: (house / name).read_text() for name in ("model.py", "optimizer.py")}
    add_row(house / "model.py", "NORMS", '"scalenorm": ScaleNorm, ', NORM)
    add_row(house / "optimizer.py", "OPTIMIZERS", '"lion": Lion, ', OPTIMIZER)
    said = " ".join(python(house, "train.py", "--help", "--task=tagging").split())
    assert "see NORMS in model.py; one of scalenorm, layernorm, rmsnorm, plain_rmsnorm" in said
    losses = train_resume_evaluate(house, f"--dataset={dataset}", "--norm=scalenorm", "--optimizer=lion",
                                   "--learning_rate=1e-3", "--min_lr=1e-4")
    assert losses[-1] < losses[0] - 0.2
    assert len(python(house, "sample.py", "--out_dir=parts", "--max_new_tokens=30")) > 30
    said = python(house, "train.py", "--norm=scalednorm", status=2)
    assert said == ("error: --norm=scalednorm: norm must be one of scalenorm, layernorm, rmsnorm, plain_rmsnorm, or"
                    " empty\n")
    assert "muon_lr = 0.1: is for --optimizer=muon" in python(
        house, "train.py", "--optimizer=lion", "--muon_lr=0.1", status=2)
    (house / "optimizer.py").write_text(before["optimizer.py"])
    said = python(house, "train.py", "--resume", "--out_dir=parts", "--max_iters=50", status=2)
    assert said == ("error: optimizer = 'lion' in parts/last/config.json: the code has no such choice now; put it back,"
                    " or start a new run with --init_from=parts/last\n")
    (house / "model.py").write_text(before["model.py"])
    said = python(house, "sample.py", "--out_dir=parts", status=2)
    assert re.fullmatch("error: parts/best/config.json does not fit the code of GPT: norm = 'scalenorm': .*; put back"
                        " the code of that run\n", said)


@pytest.mark.slow
def test_a_task_is_a_file_and_a_row(house):
    (house / "tasks" / "parity.py").write_text(TOY_TASK)
    row = '    "parity": Row("ParityTask", settings.Nothing, settings.Nothing, settings.Nothing, None),\n'
    path = house / "tasks" / "__init__.py"
    path.write_text(path.read_text().replace("TASKS = {\n", "TASKS = {\n" + row, 1))
    losses = train_resume_evaluate(house, "--task=parity", "--learning_rate=0.1")
    assert losses[-1] < losses[0] / 2
    assert python(house, "sample.py", "--out_dir=parts", "--prompt=1110").strip() == "odd"
    found = json.loads((house / "parts" / "evaluation.json").read_text())
    assert "errors" in found and found["dataset"] == "parity"
    for command in ("train.py --task=parity", "evaluate.py --out_dir=parts"):
        said = python(house, *command.split(), "--dataset=shakespeare_char", status=2)
        assert "dataset = shakespeare_char: --task=parity makes its own data; leave it out" in said
    path.write_text(path.read_text().replace(row, ""))
    for command in ("train.py --resume", "evaluate.py", "sample.py"):
        said = python(house, *command.split(), "--out_dir=parts", status=2)
        assert re.search("task = 'parity'.*: the code has no such .* now; put it back", said)


# ----------------------------------------------------------------------------------------------------------------------
# An edited block

@pytest.fixture
def edited(monkeypatch):
    """Attention with one more parameter, `gate`."""
    before = model.Attention.__init__

    def after(self, config):
        before(self, config)
        self.gate = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(model.Attention, "__init__", after)


def test_a_run_from_before_an_edit_of_its_blocks_says_so(trained, edited):
    with pytest.raises(UserError) as error:
        load(trained)
    why = r"\(the code of model.Attention, .* has changed since .*/best was trained: put it back to load them\)"
    assert re.fullmatch(rf"the weights of .*/best {why} do not fit: Missing key.* .transformer.blocks.0.attn.gate..*",
                        str(error.value))


@pytest.mark.parametrize("parts", [{}, dict(positions="rotary", norm="plain_rmsnorm", mlp="swiglu")])
def test_parts_that_no_other_program_knows_are_not_published(parts, edited):
    refuse(make_gpt(**parts), "with transformer.blocks.0.attn.gate")


def test_parts_outside_the_blocks_and_missing_ones_are_not_published():
    gpt = make_gpt()
    gpt.values = torch.nn.Embedding(2, 2)
    refuse(gpt, "with values")
    del gpt.values, gpt.transformer.blocks[0].ln_2
    refuse(gpt, "without transformer.blocks.0.ln_2")


def make_gpt(**parts):
    return model.GPT(model.GPTConfig(n_layer=1, n_embd=16, vocab_size=ByteTokenizer().vocab_size, **parts))


def refuse(gpt, part):
    with pytest.raises(UserError, match=f"^the model GPT was edited, so it .* published: no layout has one {part}$"):
        files.layout(gpt, ByteTokenizer())
