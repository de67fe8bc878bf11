"""Kills, full disks and damaged files: whatever happens, a run goes on to the numbers of an undisturbed one.

An audit hook sees every file that Python opens for writing, renames or deletes; the tests make each of these in turn
the last thing that happens. The slow tests kill for real: QUILL_KILLS=60 python -m pytest -m slow
tests/test_crash.py
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from test_checkpoint import load, make, save
from test_train import ROOT, as_arguments, assert_same_run, command, curve, rows, run, trainer, weights

import train
from configurator import UserError
from run import checkpoint, record, resume
from tokenizer import CharTokenizer

TOKENIZERS = {"tokenizer": CharTokenizer("abc")}
KILLS = int(os.environ.get("QUILL_KILLS", "6"))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
    """From here on nothing more happens."""


class Faults:
    """Counts the operations on files that change something; from the given one on, each of them raises."""

    def __init__(self, fatal, error=Killed, torn=False):
        self.fatal, self.error, self.torn, self.count, self.path = fatal, error, torn, 0, None

    def __call__(self, event, arguments):
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if not opened and event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        self.count += 1
        if self.count == self.fatal and self.torn and self.path and os.path.exists(self.path):
            os.truncate(self.path, os.path.getsize(self.path) // 2)  # the kill came while this file was written
        if self.count >= self.fatal:
            raise self.error
        self.path = arguments[0] if opened else None

    def __enter__(self):
        HOOKS.append(self)
        return self

    def __exit__(self, *error):
        HOOKS.remove(self)


HOOKS = []
sys.addaudithook(lambda event, arguments: [hook(event, arguments) for hook in HOOKS])


@pytest.fixture
def no_fsync(monkeypatch):
    """A kill, unlike a power cut, loses nothing that the system has; without it the tests take a fifth of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def every_fault(work, prepare=lambda out_dir: None, base=None):
    """Runs work(out_dir) once for each of its operations on files, which is its last; yields each out_dir left."""
    for torn in (False, True):
        for fatal in range(1, 10_000):
            out_dir = base / f"{fatal}{'torn' * torn}"
            prepare(out_dir)
            with Faults(fatal, torn=torn):
                try:
                    work(out_dir)
                    break
                except Killed:
                    pass
            yield fatal, out_dir
        assert fatal > 5


def save_both(out_dir, step, background):
    with checkpoint.Writer(out_dir, background) as writer:
        writer.save(["best", "last"], make(step), TOKENIZERS, {"step": step}, {"step": step})


def steps(out_dir):
    """What is found to resume and to sample, each loaded with its checksums: the steps."""
    last, any_ = checkpoint.find(out_dir, "last"), checkpoint.find_any(out_dir)
    for folder in (last, any_):
        model, config = load(folder)
        assert torch.equal(model.wte.weight, make(config["step"]).wte.weight)
    return checkpoint.load_trainer(last)["step"], config["step"]


@pytest.mark.parametrize("background", [False, True])
def test_a_kill_at_any_instant_of_a_save_leaves_what_can_be_resumed_and_sampled(tmp_path, background, capsys, no_fsync):
    for step in (1, 2):
        save_both(tmp_path / "before", step, False)
    seen = []
    for _, out_dir in every_fault(lambda out_dir: save_both(out_dir, 3, background), base=tmp_path,
                                  prepare=lambda out_dir: shutil.copytree(tmp_path / "before", out_dir)):
        seen.append(steps(out_dir))
        save_both(out_dir, 4, background)  # and the next save finds its way
        assert steps(out_dir) == (4, 4) and sorted(os.listdir(out_dir)) == ["best", "last", "last.old"]
    assert set(seen) == {(2, 2), (2, 3), (3, 3)}
    assert capsys.readouterr().err == ""  # a save cut short is no damage


def test_a_kill_inside_the_first_save_leaves_nothing_or_all(tmp_path, no_fsync):
    for _, out_dir in every_fault(lambda out_dir: save(out_dir, 1), base=tmp_path):
        if checkpoint.find(out_dir, "last"):
            assert steps(out_dir) == (1, 1)
        save(out_dir, 2)
        assert steps(out_dir) == (2, 2) and "last.new" not in os.listdir(out_dir)


def test_a_kill_while_a_run_is_set_aside_neither_loses_nor_mixes_it(tmp_path, no_fsync):
    (tmp_path / "before").mkdir()
    for name in record.OURS:
        (tmp_path / "before" / name).write_text(name)
    for fatal, out_dir in every_fault(record.set_aside, base=tmp_path,
                                      prepare=lambda out_dir: shutil.copytree(tmp_path / "before", out_dir)):
        if fatal > 1:
            assert not resume.to_resume(out_dir, "auto")  # a rest of the run is none
        record.set_aside(out_dir)
        assert os.listdir(out_dir) == ["earlier.1"] and sorted(os.listdir(out_dir / "earlier.1")) == sorted(record.OURS)


@pytest.mark.slow
def test_a_kill_at_any_operation_on_files_of_a_whole_run(tmp_path, tiny, monkeypatch, no_fsync):
    """Beside an earlier run in its folder, with --resume=auto after every kill, to the same numbers."""
    monkeypatch.setattr(train, "peak_flops", lambda *args: None)
    monkeypatch.setattr(record, "git_state", lambda: None)
    small = dict(tiny, max_iters=6, eval_interval=3, log_interval=1, n_layer=1, sample_tokens=0, resume="auto")
    run(tmp_path / "whole", small)
    earlier = tmp_path / "earlier"
    run(earlier, small, max_iters=2, seed=1)
    for kind in ("last", "last.old"):
        shutil.rmtree(earlier / kind, ignore_errors=True)
    for _, out_dir in every_fault(lambda out_dir: run(out_dir, small), base=tmp_path,
                                  prepare=lambda out_dir: shutil.copytree(earlier, out_dir)):
        found = run(out_dir, small)
        assert_same_run(tmp_path / "whole", out_dir)
        assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
        assert curve(rows(out_dir / "earlier.1")) == curve(rows(earlier))
        shutil.rmtree(out_dir)


def test_a_save_in_the_background_is_of_the_moment_when_it_was_asked_for(tmp_path, monkeypatch):
    changed, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: (changed.wait(), write(*args)))
    model, state = make(1), {"step": 1, "moments": [torch.ones(3)]}
    with checkpoint.Writer(tmp_path, background=True) as writer:
        for _ in range(2):
            writer.save(["last"], model, TOKENIZERS, {"step": 1}, state)
            with torch.no_grad():
                for tensor in (*model.parameters(), *state["moments"]):
                    tensor.add_(1)
            changed.set()
    for folder, moments in ((tmp_path / "last.old", torch.ones(3)), (tmp_path / "last", torch.ones(3) + 1)):
        assert torch.equal(checkpoint.load_trainer(folder)["moments"][0], moments)
    assert torch.equal(load(tmp_path / "last.old")[0].wte.weight, make(1).wte.weight)


# ----------------------------------------------------------------------------------------------------------------------
# Disks that are full or can't be written, damaged files

@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("limit", [0, 1000, 5000])  # the model's file is cut short, or trainer.pt
def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path, limit, background):
    resource = pytest.importorskip("resource")
    state = {"step": 1, "moments": torch.zeros(5000)}

    def write(step):
        with checkpoint.Writer(tmp_path, background) as writer:
            writer.save(["last"], make(step), TOKENIZERS, {"step": step}, state)

    write(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"last can't be written: File too large.*last holds step 1: python"):
            write(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["last"] and load(tmp_path / "last")[1]["step"] == 1
    write(3)
    assert load(checkpoint.find(tmp_path, "last"))[1]["step"] == 3


def test_a_folder_that_became_read_only_is_one_line(tmp_path, tiny, monkeypatch):
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    real, faults = train.update, Faults(1, error)

    def breaks(*args):
        if args[4] == 25:
            HOOKS.append(faults)
        return real(*args)

    monkeypatch.setattr(train, "update", breaks)
    try:
        with pytest.raises(UserError, match="run.json can't be written: Read-only file system; .*last holds step 20"):
            run(tmp_path, tiny, async_save=False)
    finally:
        HOOKS.clear()
    assert trainer(tmp_path)["step"] == 20
    with Faults(1, error), pytest.raises(UserError, match="out_dir = .*: Read-only file system; name another folder"):
        run(tmp_path, tiny, resume=True)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


DAMAGES = {"flipped": flip, "short": lambda path: os.truncate(path, path.stat().st_size // 2),
           "empty": lambda path: os.truncate(path, 0), "missing": lambda path: path.unlink()}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "tokenizer.json", "config.json", "SHA256SUMS"])
def test_damage_is_noticed_and_the_checkpoint_before_is_taken(tmp_path, name, damage, capsys):
    if (name, damage) == ("SHA256SUMS", "missing"):
        pytest.skip("so were checkpoints before there were checksums")
    save(tmp_path, 1)
    save(tmp_path, 2)
    DAMAGES[damage](tmp_path / "last" / name)
    assert checkpoint.find(tmp_path, "last") == tmp_path / "last.old"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("is missing" if damage == "missing" else "is damaged") in said
    assert name in said and f"using {tmp_path / 'last.old'} of step 1 instead" in said
    assert checkpoint.find_any(tmp_path).name == ("last" if name == "trainer.pt" else "last.old")
    DAMAGES[damage](tmp_path / "last.old" / name)
    with pytest.raises(UserError, match=f"{name}.*; there is no other checkpoint"):
        checkpoint.find(tmp_path, "last")
    with pytest.raises(UserError, match=name):
        checkpoint.load_trainer(tmp_path / "last")


def test_a_run_with_a_damaged_last_goes_on_from_the_one_before_to_the_same_numbers(tmp_path, tiny, trained, capfd):
    run(tmp_path, tiny, max_iters=40, eval_interval=10)
    shutil.rmtree(tmp_path / "best")
    flip(tmp_path / "last" / "trainer.pt")
    found = run(tmp_path, tiny, eval_interval=40, resume="auto")
    assert f"{tmp_path / 'last' / 'trainer.pt'} is damaged" in capfd.readouterr().err
    checkpoint.verify(tmp_path / "last.old")  # not the damaged one, which has a name of its own
    with pytest.raises(UserError, match="trainer.pt is damaged"):
        checkpoint.verify(tmp_path / "last.damaged")
    assert curve(found)[-2:] == curve(rows(trained))[-2:]
    torch.testing.assert_close(weights(tmp_path), weights(trained), atol=0, rtol=0)


def test_auto_does_not_start_over_a_run_whose_checkpoints_are_damaged(tmp_path, tiny):
    run(tmp_path, tiny, max_iters=5)
    flip(tmp_path / "last" / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors is damaged .* no other checkpoint"):
        run(tmp_path, tiny, resume="auto")


def test_other_data_under_the_same_name_is_refused(tmp_path, tiny, dataset):
    shutil.copytree(dataset, tmp_path / "data")
    settings = dict(tiny, dataset=str(tmp_path / "data"), max_iters=5)
    run(tmp_path / "out", settings)
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (tmp_path / "data" / "meta.json").write_text(json.dumps({**meta, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="was trained on other data than the data set"):
        run(tmp_path / "out", settings, resume=True)


# ----------------------------------------------------------------------------------------------------------------------
# For real

@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_many_times_a_run_ends_with_the_numbers_of_an_undisturbed_one(tmp_path, tiny, capsys):
    """SIGKILL at random instants of a run that does little but save; every third life waits for each save."""
    long = dict(tiny, max_iters=200 * KILLS, eval_interval=2, log_interval=1, eval_tokens=200, n_layer=1, n_embd=16,
                sample_tokens=0, resume="auto")
    run(tmp_path / "whole", long)
    out_dir, lots = tmp_path / "parts", random.Random(0)
    inside, reached, resumed_at = 0, 0, set()
    for kill in range(KILLS):
        process = subprocess.Popen(command(*as_arguments(long, out_dir=str(out_dir), async_save=kill % 3 > 0)),
                                   stdout=subprocess.DEVNULL, cwd=ROOT)
        if kill % 8:  # every eighth dies wherever it is in its first seconds, the others after the run is taken up
            before = starts(out_dir)
            while process.poll() is None and starts(out_dir) == before:
                time.sleep(0.02)
            time.sleep(0.8 * lots.random())
        else:
            time.sleep(3 * lots.random())
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        inside += any((out_dir / f"{name}.new").exists() for name in ("best", "last"))
        found = checkpoint.find(out_dir, "last")
        step = checkpoint.load_trainer(found)["step"] if found else 0
        assert step >= reached
        reached = step
        resumed_at.add(step)
        if found:
            checkpoint.load(checkpoint.find_any(out_dir))
    subprocess.run(command(*as_arguments(long, out_dir=str(out_dir))), check=True, capture_output=True, cwd=ROOT)
    assert_same_run(tmp_path / "whole", out_dir)
    assert checkpoint.read_config(out_dir / "best")["step"] == checkpoint.read_config(tmp_path / "whole/best")["step"]
    with capsys.disabled():
        print(f"\n{KILLS} kills, {inside} of them inside a save; went on at {len(resumed_at)} different steps, the last"
              f" {reached} of {long['max_iters']}")


def starts(out_dir):
    """How often the run in out_dir has been taken up."""
    path = out_dir / "run.json"
    return len(json.loads(path.read_text())["starts"]) if path.exists() else 0
