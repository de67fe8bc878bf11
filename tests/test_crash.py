"""Kills, full disks and damaged files: a resumed run still gives the numbers of an undisturbed one.

An audit hook sees every file that Python opens for writing, renames or deletes. The tests stop the work at each of
these operations in turn. A slow test kills processes: QUILL_KILLS=60 python -m pytest -m slow tests/test_crash.py
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
    """Stands for a kill: every later operation on a file raises it again, so that no clean-up has an effect."""


class Faults:
    """Counts the operations that write, rename or delete files. From number `fatal` on, each raises `error`.

    torn: at that point, the file that was opened last is cut in half, as if a kill had come while it was written.
    """

    def __init__(self, fatal, error=Killed, torn=False):
        self.fatal, self.error, self.torn, self.count, self.path = fatal, error, torn, 0, None

    def __call__(self, event, arguments):
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if not opened and event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        self.count += 1
        if self.count == self.fatal and self.torn and self.path and os.path.exists(self.path):
            os.truncate(self.path, os.path.getsize(self.path) // 2)
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
    """Leaves out fsync, which only matters in a power cut: the tests then take a fifth of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def every_fault(work, prepare=lambda out_dir: None, base=None):
    """Runs work(out_dir) again and again, killed at its first operation on a file, its second, ... until it completes.

    Yields (number of the operation, out_dir) after each kill. prepare(out_dir): is called before each run.
    """
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
    """Loads the checkpoints to resume and to sample, with their checksums. Returns their steps."""
    last, any_ = checkpoint.find(out_dir, "last"), checkpoint.find_any(out_dir)
    for folder in (last, any_):
        model, config = load(folder)
        assert torch.equal(model.wte.weight, make(config["step"]).wte.weight)
    return checkpoint.load_trainer(last)["step"], config["step"]


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_kill_at_any_instant_of_a_save_leaves_whole_checkpoints(tmp_path, background, capsys, no_fsync):
    for step in (1, 2):
        save_both(tmp_path / "before", step, False)
    seen = []
    for _, out_dir in every_fault(lambda out_dir: save_both(out_dir, 3, background), base=tmp_path,
                                  prepare=lambda out_dir: shutil.copytree(tmp_path / "before", out_dir)):
        seen.append(steps(out_dir))
        save_both(out_dir, 4, background)  # the next save works as usual
        assert steps(out_dir) == (4, 4) and sorted(os.listdir(out_dir)) == ["best", "last", "last.old"]
    assert set(seen) == {(2, 2), (2, 3), (3, 3)}
    assert capsys.readouterr().err == ""  # an unfinished save is not reported as damage


def test_a_kill_in_the_first_save_leaves_a_whole_checkpoint_or_none(tmp_path, no_fsync):
    for _, out_dir in every_fault(lambda out_dir: save(out_dir, 1), base=tmp_path):
        if checkpoint.find(out_dir, "last"):
            assert steps(out_dir) == (1, 1)
        save(out_dir, 2)
        assert steps(out_dir) == (2, 2) and "last.new" not in os.listdir(out_dir)


def test_a_kill_while_an_earlier_run_is_moved_loses_none_of_its_files(tmp_path, no_fsync):
    (tmp_path / "before").mkdir()
    for name in record.OURS:
        (tmp_path / "before" / name).write_text(name)
    for fatal, out_dir in every_fault(record.set_aside, base=tmp_path,
                                      prepare=lambda out_dir: shutil.copytree(tmp_path / "before", out_dir)):
        if fatal > 1:
            assert not resume.to_resume(out_dir, "auto")  # part of a run can't be resumed
        record.set_aside(out_dir)
        assert os.listdir(out_dir) == ["earlier.1"] and sorted(os.listdir(out_dir / "earlier.1")) == sorted(record.OURS)


@pytest.mark.slow
def test_a_kill_at_any_operation_on_a_file_in_a_whole_run(tmp_path, tiny, monkeypatch, no_fsync):
    """The folder also holds an earlier run. After each kill, --resume=auto gives the numbers of an undisturbed run."""
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


def test_a_background_save_writes_the_state_at_the_time_of_the_call(tmp_path, monkeypatch):
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
# Full and read-only disks, damaged files

@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("limit", [0, 1000, 5000])  # bytes per file: too few for the model or for trainer.pt
def test_a_full_disk_is_reported_in_one_line_and_keeps_the_old_checkpoint(tmp_path, limit, background):
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


def test_a_folder_that_becomes_read_only_is_reported_in_one_line(tmp_path, tiny, monkeypatch):
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    real, faults = train.update, Faults(1, error)

    def breaks(*args):
        if args[2] == 25:
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
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path, name, damage, capsys):
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


def test_resuming_from_last_old_gives_the_same_numbers(tmp_path, tiny, trained, capfd):
    run(tmp_path, tiny, max_iters=40, eval_interval=10)
    shutil.rmtree(tmp_path / "best")
    flip(tmp_path / "last" / "trainer.pt")
    found = run(tmp_path, tiny, eval_interval=40, resume="auto")
    assert f"{tmp_path / 'last' / 'trainer.pt'} is damaged" in capfd.readouterr().err
    checkpoint.verify(tmp_path / "last.old")  # the damaged one did not replace it
    with pytest.raises(UserError, match="trainer.pt is damaged"):
        checkpoint.verify(tmp_path / "last.damaged")
    assert curve(found)[-2:] == curve(rows(trained))[-2:]
    torch.testing.assert_close(weights(tmp_path), weights(trained), atol=0, rtol=0)


def test_auto_does_not_start_a_new_run_over_damaged_checkpoints(tmp_path, tiny):
    run(tmp_path, tiny, max_iters=5)
    flip(tmp_path / "last" / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors is damaged .* no other checkpoint"):
        run(tmp_path, tiny, resume="auto")


def test_resuming_with_other_data_under_the_same_name_is_refused(tmp_path, tiny, dataset):
    shutil.copytree(dataset, tmp_path / "data")
    settings = dict(tiny, dataset=str(tmp_path / "data"), max_iters=5)
    run(tmp_path / "out", settings)
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (tmp_path / "data" / "meta.json").write_text(json.dumps({**meta, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="was trained on other data than the data set"):
        run(tmp_path / "out", settings, resume=True)


# ----------------------------------------------------------------------------------------------------------------------
# Real kills

@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_run_that_is_killed_many_times_gives_the_numbers_of_an_undisturbed_one(tmp_path, tiny, capsys):
    """SIGKILL at random instants of a run that mostly saves; in every third start, training waits for the saves."""
    long = dict(tiny, max_iters=200 * KILLS, eval_interval=2, log_interval=1, eval_tokens=200, n_layer=1, n_embd=16,
                sample_tokens=0, resume="auto")
    run(tmp_path / "whole", long)
    out_dir, lots = tmp_path / "parts", random.Random(0)
    inside, reached, resumed_at = 0, 0, set()
    for kill in range(KILLS):
        process = subprocess.Popen(command(*as_arguments(long, out_dir=str(out_dir), async_save=kill % 3 > 0)),
                                   stdout=subprocess.DEVNULL, cwd=ROOT)
        if kill % 8:  # every eighth is killed in its first seconds, the others after they have resumed
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
        print(f"\n{KILLS} kills, {inside} of them in a save; resumed from {len(resumed_at)} different steps, the last"
              f" {reached} of {long['max_iters']}")


def starts(out_dir):
    """Returns how often the run in out_dir has started."""
    path = out_dir / "run.json"
    return len(json.loads(path.read_text())["starts"]) if path.exists() else 0
