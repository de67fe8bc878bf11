"""Fixtures for all tests: a small text that is the same on every machine, a data set made of it, and a tiny run."""

import json
import os

GPUS = os.environ.setdefault("QUILL_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))  # for test_cuda.py
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare exact numbers, so they run on the CPU

from pathlib import Path

import numpy as np
import pytest

from sources import texts

WORDS = ("the a some this every no king queen fool ghost lord lady storm sword night day crown grave loves hates fears"
         " sees hears takes gives breaks keeps and but or so then never always here there now").split()


def make_text(n_words=6000, seed=0):
    """Returns lines of random words: something to learn, and the same on every machine."""
    picks = np.random.Generator(np.random.Philox(key=seed)).integers(0, len(WORDS), size=n_words)
    return "".join(WORDS[i] + ("\n" if n % 8 == 7 else " ") for n, i in enumerate(picks))


def settings_for(task, kind="training", **values):
    """Returns train.py's settings for a task, checked; with kind "sampling" or "evaluating", those of that script."""
    import evaluate
    import sample
    import train
    from configurator import joined
    from tasks import TASKS
    command = {"training": train, "sampling": sample, "evaluating": evaluate}[kind]
    if kind == "training":
        values["task"] = task
    return joined(command.Settings, getattr(TASKS[task], kind))(**values)


def run_of(task, out_dir, settings, **changes):
    """Trains with the settings and the changes, which count as given by the user. Returns `curve_of` the run."""
    import train
    train.main(settings_for(task, **{**settings, **changes}, out_dir=str(out_dir)), changes)
    return curve_of(out_dir)


def curve_of(out_dir):
    """[{"step", "loss", "grad_norm", perhaps "plain_loss" and "val_loss"}] of a run's log."""
    rows = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "plain_loss", "grad_norm", "val_loss") if key in row}
            for row in rows]


def sampled(out_dir, capsys, *arguments):
    """What sample.py prints for a run."""
    import sample
    from configurator import parse
    capsys.readouterr()
    sample.main(parse(sample.Settings, [f"--out_dir={out_dir}", "--device=cpu", *arguments], **sample.HOW)[0])
    return capsys.readouterr().out


@pytest.fixture(scope="session")
def text():
    return make_text()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, text):
    """The folder of a prepared character-level data set."""
    folder = tmp_path_factory.mktemp("data") / "words"
    source = folder.with_suffix(".txt")
    source.write_text(text, encoding="utf-8")
    texts.prepare([source], folder, "char")
    return folder


@pytest.fixture(scope="session")
def tiny(dataset):
    """Settings of a run that takes about a second."""
    return dict(dataset=str(dataset), n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, max_iters=40,
                warmup_iters=5, learning_rate=1e-2, min_lr=1e-3, eval_interval=20, log_interval=5, sample_tokens=20,
                device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny):
    """The out directory of a finished tiny run."""
    import train
    out_dir = str(tmp_path_factory.mktemp("runs") / "trained")
    train.main(settings_for("text", **tiny, out_dir=out_dir), {})
    return out_dir
