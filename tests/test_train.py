import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import settings_for

import batches
import configurator
import train
from configurator import UserError
from machine import device
from machine.distributed import World
from optimizer import learning_rate, make_optimizers
from run import checkpoint, guards
from run import resume as resuming
from run.log import start_wandb
from tasks import TASKS
from tasks.loading import initial, load
from tasks.text import TextTask

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
GOLDEN = {1: 3.2479, 10: 2.7495, 20: 2.6205, 40: 2.3558}  # {step: loss} of the tiny run; change it only on purpose


def run(out_dir, tiny, **changes):
    train.main(settings_for("text", **{**tiny, **changes}, out_dir=str(out_dir)), changes)
    return rows(out_dir)


def parse(*argv):
    """Returns (settings, given) for a command line of train.py."""
    return configurator.parse(train.Settings, argv, **train.HOW)


def resume(out_dir, *argv):
    """Resumes a run as the command line does, with its recorded settings. Returns all rows of its log."""
    train.main(*parse("--resume", f"--out_dir={out_dir}", *argv))
    return rows(out_dir)


def rows(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def curve(found):
    """Returns log rows without the values that depend on time."""
    return [{name: row[name] for name in row if name not in ("ms", "tokens_per_s", "mfu")} for row in found]


def trainer(out_dir):
    return checkpoint.load_trainer(Path(out_dir) / "last")


def weights(out_dir, name="last"):
    return checkpoint.load(Path(out_dir) / name).state


def recorded(out_dir):
    """Returns the settings in the config.json of a run's last checkpoint."""
    return checkpoint.read_config(Path(out_dir) / "last")["settings"]


def assert_same_run(a, b):
    assert curve(rows(a)) == curve(rows(b))
    torch.testing.assert_close(weights(a), weights(b), atol=0, rtol=0)
    one, other = trainer(a), trainer(b)
    assert one.keys() == other.keys() and one["mean_loss"] == other["mean_loss"]
    for name in one.keys() & {"optimizer", "muon"}:
        torch.testing.assert_close(one[name]["state"], other[name]["state"], atol=0, rtol=0)


def command(*args, launcher=(sys.executable,)):
    return [*launcher, str(ROOT / "train.py"), *args]


def as_arguments(tiny, **changes):
    return [f"--{name}={value}" for name, value in {**tiny, **changes}.items()]


def test_the_loss_curve_is_the_recorded_one(trained):
    found = {row["step"]: row["loss"] for row in rows(trained)}
    assert {step: round(found[step], 4) for step in GOLDEN} == pytest.approx(GOLDEN, abs=2e-3)


def test_the_log_has_the_expected_rows_and_values(trained, tiny):
    found = rows(trained)
    assert [row["step"] for row in found] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert all({"step", "loss", "lr", "ms", "tokens_per_s", "grad_norm", "mfu"} <= row.keys() for row in found)
    assert [row["step"] for row in found if "val_loss" in row] == [20, 40]
    steps = {int(entry["step"]) for entry in trainer(trained)["optimizer"]["state"].values()}
    assert steps == {tiny["max_iters"]} == {trainer(trained)["step"]}  # exactly max_iters updates
    config = checkpoint.read_config(Path(trained) / "last")
    assert config["settings"]["n_embd"] == 32 and config["val_loss"] == found[-1]["val_loss"]


def test_learning_rate_warms_up_and_decays():
    s = train.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=9, max_iters=110)
    rates = [learning_rate(update, s) for update in range(1, 120)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[59] == pytest.approx(0.55) and rates[109] == rates[118] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:109], rates[10:110]))
    assert learning_rate(50, replace(s, lr_decay_iters=50)) == pytest.approx(0.1)
    line = [learning_rate(update, replace(s, lr_schedule="linear")) for update in range(10, 111)]
    assert line == pytest.approx([1.0 - 0.009 * n for n in range(101)])


def test_matrices_decay_and_vectors_do_not(trained):
    model = load(Path(trained) / "last")[1]
    decayed, others = make_optimizers(model, train.Settings(weight_decay=0.3))["optimizer"].param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.dim() == 2 for p in decayed["params"])
    assert others["weight_decay"] == 0.0 and all(p.dim() == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


FAST = dict(optimizer="muon", positions="rotary", mlp="relu2", tied=False, bigrams=True, zero_init=True,
            lr_schedule="linear")


@pytest.mark.parametrize("changes", [  # few tokens in bfloat16, which is slow on CPUs without AMX
    dict(dropout=0.2, micro_batch_size=3),
    dict(FAST, dropout=0.2, dtype="bfloat16", n_layer=1, batch_size=2)])
def test_resuming_gives_the_numbers_of_an_undisturbed_run(tmp_path, tiny, changes, monkeypatch):
    run(tmp_path / "whole", tiny, **changes)
    real, calls = train.update, 0

    def dies(*args):
        nonlocal calls
        calls += 1
        if calls == 33:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update", dies)
        run(tmp_path / "parts", tiny, **changes)
    assert rows(tmp_path / "parts")[-1]["step"] == 30 and trainer(tmp_path / "parts")["step"] == 20
    with open(tmp_path / "parts" / "log.jsonl", "a") as file:
        file.write('{"step": 33, "lo')  # as if a kill had cut the line short
    run(tmp_path / "parts", tiny, **changes, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "whole" / "samples.md").read_text() == (tmp_path / "parts" / "samples.md").read_text()


@pytest.mark.slow
def test_resuming_from_a_save_between_two_log_rows_gives_the_same_numbers(tmp_path, tiny, trained, monkeypatch):
    monkeypatch.setattr(guards, "SECONDS", 1e-9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate", lambda *args: 1 / 0 if args[4] == 40 else {"val_loss": 2.0})
        breaking(patch, lambda loss, norm: raise_interrupt(), at=33)
        run(tmp_path, tiny, save_minutes=1e-9, eval_interval=40)
    assert trainer(tmp_path)["step"] == 32 and trainer(tmp_path)["losses"][1] == 2
    found = run(tmp_path, tiny, save_minutes=0, resume=True)
    assert curve(found)[-2:] == curve(rows(trained))[-2:]
    torch.testing.assert_close(weights(tmp_path), weights(trained), atol=0, rtol=0)


def raise_interrupt():
    raise KeyboardInterrupt


def test_samples_at_evaluations_do_not_change_the_run(tmp_path, tiny, trained):
    run(tmp_path, tiny, sample_tokens=0)
    assert_same_run(tmp_path, trained)
    assert not (tmp_path / "samples.md").exists()
    headings = re.findall("^## (.*)$", (Path(trained) / "samples.md").read_text(), re.MULTILINE)
    assert headings == [f"step 20, loss {rows(trained)[4]['loss']:.4f}", "step 40, the end"]


def test_a_folder_in_use_by_another_run_is_left_alone(tmp_path, tiny):
    run(tmp_path, tiny, max_iters=2, sample_tokens=0)
    holder = "import sys; from run.lock import owned\nwith owned(sys.argv[1]): print(1, flush=True), sys.stdin.read()"
    living = subprocess.Popen([sys.executable, "-c", holder, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              cwd=ROOT)
    living.stdout.readline()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for start in (lambda: run(tmp_path, tiny), lambda: resume(tmp_path)):
        with pytest.raises(UserError, match=f"process {living.pid} on .* has been training there since"):
            start()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    living.communicate()
    run(tmp_path, tiny, max_iters=2, sample_tokens=0)
    assert (tmp_path / "earlier.1").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows pipes behave differently")
def test_a_run_whose_output_is_closed_saves_and_reports_on_stderr(tmp_path, tiny):
    process = subprocess.Popen(command(*as_arguments(tiny, max_iters=10**6, log_interval=1, out_dir=str(tmp_path))),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(6):
        process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=60) == 141 and trainer(tmp_path)["step"] >= 2
    assert re.fullmatch(r"\nstopped at step \d+ \(the output was closed\) and saved; resume with: .*\n", said)


def test_the_micro_batch_size_does_not_change_the_curve(tmp_path, tiny, trained):
    found = run(tmp_path, tiny, micro_batch_size=3)  # the last of three micro-batches is smaller
    for a, b in zip(rows(trained), found):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-4)


LONG = dict(max_iters=1000, eval_interval=400)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, tiny):
    out_dir = tmp_path_factory.mktemp("runs") / "long"
    run(out_dir, tiny, **LONG)
    return out_dir


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows can't send these signals")
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 75)])
def test_a_signal_saves_and_the_run_can_be_resumed(tmp_path, tiny, long_run, name, status):
    arguments = as_arguments(tiny, **LONG, out_dir=str(tmp_path / "parts"))
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "parts" / "log.jsonl").exists() or len(rows(tmp_path / "parts")) < 5:
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"resume with: python train.py --resume --out_dir={tmp_path / 'parts'}" in out
    stopped = trainer(tmp_path / "parts")["step"]
    assert 20 <= stopped < 1000
    subprocess.run(command("--resume", f"--out_dir={tmp_path / 'parts'}"), check=True, capture_output=True, timeout=120)
    assert_same_run(long_run, tmp_path / "parts")


def test_best_and_last_are_kept_apart(tmp_path, tiny, monkeypatch):
    losses = iter([2.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(TextTask, "evaluate", lambda *args: {"loss": next(losses)})
    run(tmp_path, tiny, eval_interval=10)
    best, last = (checkpoint.read_config(tmp_path / name) for name in ("best", "last"))
    assert (best["step"], best["val_loss"]) == (20, 1.0) and (last["step"], last["val_loss"]) == (40, 4.0)
    assert not torch.equal(weights(tmp_path, "best")["wte.weight"], weights(tmp_path, "last")["wte.weight"])
    assert not (tmp_path / "best" / "trainer.pt").exists()


def breaking(monkeypatch, change, at=27):
    """From update `at` on, replaces (loss, norm) of an update by change(loss, norm)."""
    real = train.update

    def update(*args):
        loss, norm, shown = real(*args)
        step = args[2]
        return (*change(loss, norm), shown) if step + 1 >= at else (loss, norm, shown)

    monkeypatch.setattr(train, "update", update)


@pytest.mark.parametrize("change, settings, message", [
    (lambda loss, norm: (loss * math.nan, norm), {}, "the loss is nan .* at step 27: try a lower --learning_rate"),
    (lambda loss, norm: (loss + 2, norm), dict(max_loss_rise=1.0), "at step 27: the running mean of .*_rise = 1.0"),
])
def test_a_bad_update_stops_the_run_and_can_be_replayed(tmp_path, tiny, monkeypatch, change, settings, message):
    breaking(monkeypatch, change)
    with pytest.raises(UserError, match=f"{message}.*last holds step 20") as error:
        run(tmp_path, tiny, **settings)
    assert trainer(tmp_path)["step"] == 20 and rows(tmp_path)[-1]["step"] == 25  # found later, named exactly
    tokens = batches.random_offsets(28_052, 32, 8, train.Settings.seed, 26)
    assert f"the batch is the windows at the training tokens {', '.join(map(str, tokens))};" in str(error.value)
    assert f"python train.py --resume --out_dir={tmp_path} goes on from there" in str(error.value)
    with pytest.raises(UserError) as again:
        run(tmp_path, tiny, **settings, resume=True, log_interval=1)
    assert str(again.value) == str(error.value) and rows(tmp_path)[-1]["step"] == 26


def test_a_nan_is_not_saved_when_a_signal_comes_before_the_next_log_row(tmp_path, tiny, monkeypatch):
    def change(loss, norm):
        signal.raise_signal(signal.SIGINT)
        return loss * math.nan, norm

    breaking(monkeypatch, change, at=21)
    with pytest.raises(UserError, match="the loss is nan .* at step 21"):
        run(tmp_path, tiny, log_interval=1000)
    assert trainer(tmp_path)["step"] == 20


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send these signals")
def test_a_signal_during_the_last_sample_is_recorded_as_the_end(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(TextTask, "show", lambda *args: signal.raise_signal(signal.SIGTERM) or "text")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, tiny, max_iters=5, sample_tokens=5)
    end = json.loads((tmp_path / "run.json").read_text())["starts"][0]
    assert stopped.value.code == end["status"] == 143 and end["why"] == "SIGTERM" and trainer(tmp_path)["step"] == 5


def test_a_folder_that_was_moved_is_not_created_again(tmp_path, tiny, monkeypatch):
    def change(loss, norm):
        if (tmp_path / "out").exists():
            (tmp_path / "out").rename(tmp_path / "moved")
        return loss, norm

    breaking(monkeypatch, change)
    with pytest.raises(UserError, match="out was moved or deleted while the run was using it$"):
        run(tmp_path / "out", tiny, async_save=False)  # else the move may come in the middle of a save
    assert not (tmp_path / "out").exists() and trainer(tmp_path / "moved")["step"] == 20


def test_a_nan_validation_loss_stops_the_run(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(TextTask, "evaluate", lambda *args: {"loss": math.nan})
    with pytest.raises(UserError, match="val_loss is nan at step 20: .*; nothing was saved yet"):
        run(tmp_path, tiny)


def test_the_time_limit_saves_and_ends_with_status_75(tmp_path, tiny, trained, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, tiny, max_minutes=1e-9, log_interval=1000)
    assert stopped.value.code == 75 and trainer(tmp_path)["step"] == 1
    assert ("stopped at step 1 (--max_minutes=1e-09) and saved; resume with: python train.py --resume"
            f" --out_dir={tmp_path}") in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["starts"][0]["why"] == "--max_minutes=1e-09"
    settings, _ = parse("--resume", f"--out_dir={tmp_path}")
    assert settings.max_minutes == 0 and settings.max_iters == 40  # the limit is for one start
    run(tmp_path, tiny, max_minutes=0, resume=True)
    assert_same_run(trained, tmp_path)


def test_resume_auto_starts_and_resumes(tmp_path, tiny, trained):
    with pytest.raises(SystemExit):
        run(tmp_path, tiny, max_minutes=1e-9, resume="auto")
    for _ in range(2):  # the second has nothing left to do
        run(tmp_path, tiny, resume="auto")
        assert_same_run(trained, tmp_path)
    assert not list(tmp_path.glob("earlier*"))
    assert train.earlier_settings({"resume": "auto", "out_dir": str(tmp_path / "nowhere")}) == {}
    saved = train.earlier_settings({"resume": "auto", "out_dir": str(tmp_path)})
    assert saved["n_embd"] == 32 and saved["max_iters"] == 40


def test_neither_guards_nor_saving_in_the_background_change_a_sound_run(tmp_path, tiny, trained):
    run(tmp_path, tiny, async_save=False, max_grad_norm=50.0, max_loss_rise=1.0)
    assert_same_run(trained, tmp_path)
    for name in ("best", "last"):
        one, other = ((Path(folder) / name / "model.safetensors").read_bytes() for folder in (tmp_path, trained))
        assert one == other


def test_the_environment_is_recorded_at_every_start(tmp_path, tiny):
    run(tmp_path, tiny, max_iters=5)
    run(tmp_path, tiny, max_iters=10, resume=True)
    record = json.loads((tmp_path / "run.json").read_text())
    first, second = record["starts"]
    assert {"git", "device", "cpus", "host", "command", "started", "python", "torch", "numpy"} <= first.keys()
    assert first["seed"] == 1337 and first["workers"] == 1
    assert [(start["step"], start["end_step"], start["status"]) for start in (first, second)] == [(0, 5, 0), (5, 10, 0)]
    assert record["settings"]["max_iters"] == 10 and record["settings"]["dataset"] == tiny["dataset"]
    last = {"val_loss": rows(tmp_path)[-1]["val_loss"]}
    results = record["results"]
    assert results.pop("seconds") > 0 and results == {"step": 10, "last": last, "best": {"step": 10, **last}}


def test_rates_may_change_in_a_resumed_run_but_not_the_parts_that_have_one(tmp_path, tiny):
    run(tmp_path, tiny, max_iters=5, rates={"wte": 2.0, "wpe": 3.0}, sample_tokens=0)
    resume(tmp_path, "--max_iters=6", "--rates.wte=3", "--rates.wpe=2")  # moments stay with their parameters
    assert trainer(tmp_path)["step"] == 6 and recorded(tmp_path)["rates"] == {"wte": 3.0, "wpe": 2.0}
    with pytest.raises(UserError, match="trainer.pt holds the optimizer state of other parameters: .*--rates"):
        resume(tmp_path, "--max_iters=7", "--rates.wte=0")
    wide, narrow = (torch.optim.AdamW([torch.ones(size, requires_grad=True)]) for size in (3, 2))
    sum(wide.param_groups[0]["params"]).sum().backward()
    wide.step()
    with pytest.raises(UserError, match="the optimizer state of other parameters"):
        checkpoint.load_optimizer(narrow, wide.state_dict(), tmp_path)


def test_an_earlier_run_is_moved_and_other_files_stay(tmp_path, tiny, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    first = run(tmp_path, tiny, max_iters=5)
    run(tmp_path, tiny, max_iters=6)
    run(tmp_path, tiny, max_iters=7)
    assert curve(rows(tmp_path / "earlier.1")) == curve(first) and (tmp_path / "notes.txt").exists()
    assert [trainer(tmp_path / folder)["step"] for folder in ("earlier.1", "earlier.2", ".")] == [5, 6, 7]
    assert f"moved the earlier run in {tmp_path} to {tmp_path / 'earlier.2'}" in capsys.readouterr().out


def test_resume_takes_the_runs_own_settings_and_refuses_other_fixed_ones(tmp_path, tiny):
    run(tmp_path, tiny, max_iters=5)
    settings, _ = parse("--resume", f"--out_dir={tmp_path}", "--max_iters=9")
    assert (settings.n_embd, settings.dataset, settings.max_iters) == (32, tiny["dataset"], 9)
    assert train.earlier_settings({"out_dir": str(tmp_path)}) == {}
    for name, asked, value in (("n_embd", 64, 32), ("optimizer", "muon", "adamw"), ("init_from", "gpt2", "scratch"),
                               ("task", "contrastive", "text")):
        message = f"{name} = {asked!r}, but the run in .* has {value!r}: leave it out to resume, or start a new run"
        with pytest.raises(UserError, match=message):
            parse("--resume", f"--out_dir={tmp_path}", f"--{name}={asked}")
    with pytest.raises(UserError, match="nothing to resume in .*nowhere"):
        parse("--resume", f"--out_dir={tmp_path / 'nowhere'}")
    parse("--resume", f"--out_dir={tmp_path}", "--mlp=", "--positions=", "--n_kv_head=0")  # as the model has it
    with pytest.raises(UserError, match="optimizer = 'muon', but the run in"):  # checked before --shard with muon
        parse("--resume", f"--out_dir={tmp_path}", "--optimizer=muon", "--shard")


@pytest.mark.parametrize("changes, changed", [
    (dict(beta2=0.5), lambda in_block, is_matrix: not (in_block and is_matrix)),
    (dict(weight_decay=0.9), lambda in_block, is_matrix: is_matrix),
    (dict(muon_lr=0.1), lambda in_block, is_matrix: in_block and is_matrix)])
def test_a_resumed_run_applies_changed_optimizer_options(tmp_path, muon_run, changes, changed):
    for name in ("same", "other"):
        shutil.copytree(muon_run, tmp_path / name)
    resume(tmp_path / "same", "--max_iters=6")
    resume(tmp_path / "other", "--max_iters=6", *as_arguments(changes))
    same, other = weights(tmp_path / "same"), weights(tmp_path / "other")
    assert {name for name in same if not torch.equal(same[name], other[name])} == {
        name for name, p in same.items() if changed("blocks" in name, p.dim() == 2)}
    assert changes.items() <= recorded(tmp_path / "other").items()


@pytest.fixture(scope="module")
def muon_run(tmp_path_factory, tiny):
    """The folder of a run that made 5 of 6 updates with both optimizers."""
    out_dir = tmp_path_factory.mktemp("runs") / "muon"
    run(out_dir, tiny, optimizer="muon", max_iters=5, lr_decay_iters=6, sample_tokens=0)
    return out_dir


@pytest.mark.parametrize("first, second", [(12, 6), (6, 12)])
def test_a_resumed_run_keeps_the_choices_of_its_first_start(tmp_path, tiny, monkeypatch, first, second):
    """They depend on max_iters (compile), the machine (dtype) and the number of workers (micro_batch_size)."""
    compiled, real = [], train.pick_compile
    monkeypatch.setattr(device, "COMPILE_MIN_FLOPS", 9 * 107_520)  # of 9 updates; the run has 6 or 12
    monkeypatch.setattr(device, "has_triton", lambda: True)
    monkeypatch.setattr(train, "pick_compile", lambda choice, _, flops: real(choice, torch.device("cuda"), flops))
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    monkeypatch.setattr(device, "has_amx", lambda *_: first == 12)
    decided = {"compile": first == 12, "dtype": "bfloat16" if first == 12 else "float32", "micro_batch_size": 2,
               "capture": False}
    few = dict(tiny, dtype="auto", batch_size=2, n_layer=1, n_embd=8, block_size=8, eval_tokens=100, sample_tokens=0)
    with pytest.raises(SystemExit):
        run(tmp_path, few, max_iters=first, max_minutes=1e-9)
    assert decided.items() <= recorded(tmp_path).items() and len(compiled) == decided["compile"]
    monkeypatch.setattr(device, "has_amx", lambda *_: first != 12)
    resume(tmp_path, f"--max_iters={second}", "--max_minutes=0", "--batch_size=4")
    assert decided.items() <= recorded(tmp_path).items() and len(compiled) == 2 * decided["compile"]
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["compile"] for start in starts] == 2 * [decided["compile"]]


def test_the_micro_batch_size_is_a_workers_share_of_the_batch(capsys):
    def size(workers, whole=False, **settings):
        task = SimpleNamespace(settings=train.Settings(**settings), whole=whole)
        return train.pick_micro_batch_size(task, World(0, workers, CPU))

    assert [size(workers, batch_size=5) for workers in (1, 2, 4, 5)] == [5, 3, 2, 1]
    assert "1 of 4 workers are idle: a smaller --micro_batch_size gives them work" in capsys.readouterr().out
    assert [size(workers, whole=True, batch_size=6) for workers in (1, 2)] == [0, 0]
    for settings in (dict(batch_size=5), dict(batch_size=6, micro_batch_size=3)):
        with pytest.raises(UserError, match="worker takes one micro-batch: leave out --micro_batch_size, .* 2 divides"):
            size(2, whole=True, **settings)


def test_a_finished_run_can_be_extended(tmp_path, tiny, capsys):
    run(tmp_path, tiny, max_iters=20, lr_decay_iters=40)
    run(tmp_path, tiny, max_iters=20, lr_decay_iters=40, resume=True)  # there is nothing to do
    assert trainer(tmp_path)["step"] == 20 and len(rows(tmp_path)) == 5
    said = capsys.readouterr().out
    assert f"the run in {tmp_path} is finished, with 20 updates" in said and "\n0 updates in" in said
    with pytest.raises(UserError, match="max_iters = 19: the run in .* has already made 20 updates"):
        resume(tmp_path, "--max_iters=19")
    run(tmp_path, tiny, max_iters=40, lr_decay_iters=40, resume=True)
    assert rows(tmp_path)[-1]["loss"] == pytest.approx(GOLDEN[40], abs=2e-3)
    assert "the learning rate jumps" not in capsys.readouterr().out
    resume(tmp_path, "--max_iters=41", "--lr_decay_iters=80")
    assert ("jumps from 1.0e-03 to 6.1e-03 at step 40: max_iters = 41 (it was 40), lr_decay_iters = 80 (it was 40)"
            in capsys.readouterr().out)


def test_training_can_start_from_an_earlier_run(tmp_path, tiny, trained, capsys):
    found = run(tmp_path, tiny, init_from=trained, max_iters=1)
    assert found[0]["loss"] < 2.5 < GOLDEN[1]
    assert ("warmup_iters = 5: the learning rate never reaches its peak in max_iters = 1 updates; try a smaller one,"
            " such as --warmup_iters=0") in capsys.readouterr().out


def test_lora_trains_only_its_two_small_matrices_per_layer(tmp_path, tiny, trained):
    """Its checkpoint can be loaded, resumed, and merged when another run starts from it."""
    wanted = dict(tiny, init_from=trained, lora_rank=2, lora_alpha=1.0, lora_targets="q_proj,down_proj",
                  max_iters=10, dropout=0.1, sample_tokens=0)
    settings = settings_for("text", **wanted, out_dir=str(tmp_path / "whole"))
    _, model, *_ = train.train(settings, {}, World(0, 1, CPU))
    before, after = weights(trained, "best"), weights(tmp_path / "whole")
    assert {name for name in after if not torch.equal(after[name], before.get(name, after[name] * 0))} == {
        name for name in after if name.endswith(("lora_a", "lora_b"))} != set()
    _, loaded, config = load(tmp_path / "whole" / "last")
    tokens = torch.arange(32)[None] % 20
    logits = model.eval()(tokens)
    assert config["lora_rank"] == 2 and torch.equal(loaded(tokens), logits)
    assert {name.split(".")[-2] for name in after if name.endswith("lora_a")} == {"q_proj", "down_proj"}
    whole = replace(settings, init_from=str(tmp_path / "whole" / "last"), lora_rank=0, lora_alpha=0.0, lora_targets="")
    merged, _ = initial(whole, "cpu")
    assert merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(merged.eval()(tokens), logits)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", wanted, max_minutes=1e-9)
    resume(tmp_path / "parts", "--max_minutes=0")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for line, value in (("--lora_rank=3", 2), ("--lora_alpha=2", 1.0), ("--lora_targets=q_proj", "q_proj,down_proj")):
        with pytest.raises(UserError, match=f"{line.partition('=')[0][2:]} = .* has {value!r}: leave it out to resume"):
            resume(tmp_path / "parts", line)


def test_a_lora_run_from_before_alpha_and_targets_loads_and_keeps_its_scale(tmp_path, tiny, trained, monkeypatch):
    run(tmp_path, tiny, init_from=trained, lora_rank=2, max_iters=2, sample_tokens=0)
    now, saved = load(tmp_path)[1], checkpoint.load(tmp_path / "best")
    settings = {name: value for name, value in saved.config["settings"].items() if name not in resuming.ABSENT}
    older = saved._replace(config={**saved.config, "settings": settings})
    monkeypatch.setattr(checkpoint, "load", lambda folder: older)
    then, tokens = load(tmp_path)[1], torch.arange(32)[None] % 20
    assert torch.equal(now(tokens), then(tokens))
    with pytest.raises(UserError, match="lora_alpha = 8.0, but the run in out has 0: leave it out to resume"):
        resuming.refuse_changes(settings, {"lora_alpha": 8.0}, TASKS["text"].training, "")


def test_a_part_with_rate_0_stays_frozen_in_a_resumed_run(tmp_path, tiny, trained):
    run(tmp_path, tiny, init_from=trained, rates={"wte": 0.0}, max_iters=2, sample_tokens=0)
    resume(tmp_path, "--max_iters=4")
    before, after = weights(trained, "best"), weights(tmp_path)
    assert [name for name in after if torch.equal(after[name], before[name])] == ["wte.weight"]


@pytest.mark.slow
def test_wandb_logs_offline_and_a_missing_login_moves_no_files(tmp_path, tiny, monkeypatch):
    wandb = pytest.importorskip("wandb")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--wandb needs a package: pip install wandb"):
        patch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # as if it were a folder of that name
        start_wandb(tmp_path, train.Settings(), "name")
    run(tmp_path, tiny, max_iters=4, sample_tokens=0)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name, value in (("MODE", "online"), ("SILENT", "true"), ("CONFIG_DIR", str(tmp_path / "none"))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()  # wandb reads the environment only once
    with pytest.raises(UserError, match="--wandb: No API key .*; or set WANDB_MODE=offline, or leave --wandb out"):
        run(tmp_path, tiny, wandb=True)
    assert trainer(tmp_path)["step"] == 4 and not (tmp_path / "earlier.1").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    found = run(tmp_path, tiny, max_iters=5, wandb=True, sample_tokens=0)
    assert list(tmp_path.glob("wandb/offline-run-*")) and found[0]["ms"] < 1000


@pytest.mark.parametrize("changes, message", [
    (dict(FAST, shard=True), "optimizer = 'muon': needs whole matrices; leave out --shard"),
    (dict(FAST, learning_rate=0.0, min_lr=0.0), "learning_rate = 0: does not work with --optimizer=muon"),
    (dict(shard=True, dtype="float16"), "shard = True: does not work with --dtype=float16"),
])
def test_settings_that_exclude_each_other_are_refused(changes, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    with pytest.raises(UserError, match=message):
        settings_for("text", **changes)


@pytest.mark.parametrize("line, message", [
    ("--muon_lr=0.1", "muon_lr = 0.1: is for --optimizer=muon; "
     r"leave it out \(if a recipe sets it, --muon_lr=0.02 undoes that\)"),
    ("--lora_rank=2", "lora_rank = 2: is for fine-tuning with --init_from"),
    ("--init_from=x --lora_alpha=2 --lora_targets=q_proj",
     "lora_alpha = 2.0, lora_targets = 'q_proj': is for --lora_rank above 0; leave it out"),
    ("--init_from=gpt2 --zero_init", "zero_init = True: is for a model that starts from scratch"),
    ("--task=image-text --init_from=x --init_vision=y", "init_vision = 'y': is for a model that starts from scratch"),
    ("--wandb_name=mine", "wandb_name = 'mine': is for --wandb"),
    ("--vision.n_layer=2", "setting --vision.n_layer .*; it is only for --task=contrastive and --task=image-text"),
    ("--task=tagging --publish=x", "setting --publish .*; only models of --task=text, .*answering can be published"),
    ("--task=contrastive --n_kv_head=1", "setting --n_kv_head .*; it is only for --task=text and --task=image-text"),
])
def test_a_setting_that_does_nothing_is_refused(line, message):
    with pytest.raises(UserError, match=message):
        parse(*line.split())


def test_a_setting_that_the_model_can_not_have_is_refused(tmp_path, tiny, trained):
    with pytest.raises(UserError, match="n_layer = 3, but .*trained has 2: leave it out"):
        run(tmp_path, tiny, init_from=trained, n_layer=3)
    with pytest.raises(UserError, match="rates.head = 0.5: the model has no such part, only wte, wpe, transformer"):
        run(tmp_path, tiny, rates={"head": 0.5})
    with pytest.raises(UserError, match="model = 'gpt3': must be one of gpt, gemma"):
        run(tmp_path, tiny, model="gpt3")


def test_a_short_split_is_named_with_a_block_size_that_fits_both(tmp_path, tiny):
    with pytest.raises(UserError, match="the val split of .* has .* tokens, and block_size = 5000 needs 5001.* larger"):
        run(tmp_path, tiny, block_size=5000)
    with pytest.raises(UserError, match=r"the train split of .* a smaller --val_fraction .*--block_size=\d+") as error:
        run(tmp_path, tiny, block_size=10**6)
    run(tmp_path, tiny, block_size=int(str(error.value).rpartition("=")[2]), max_iters=1, batch_size=2)


@pytest.mark.parametrize("line, message", [
    ("train.py --batchsize=3", "unknown setting --batchsize on the command line; did you mean --batch_size"),
    ("train.py --dataset=no_such", "there is no data set at .*no_such: make one with python prepare.py FILE"),
    ("train.py --task=columns", "dataset = shakespeare_char: is a data set of kind text, .* one of kind columns: name"),
    ("train.py --resume --out_dir=no_such", "there is nothing to resume in no_such"),
    ("sample.py --out_dir=no_such", "there is no checkpoint in no_such"),
    ("sample.py --out_dir=. --prompt=FILE:no_such", "prompt = FILE:no_such: there is no such file"),
    ("evaluate.py --out_dir=. --dataset=no_such", "there is no data set at .*no_such"),
    ("prepare.py no_such.txt", "no_such.txt is not a file"),
    ("-m tools.bench --only=speed", "only = speed: must be some of peak"),
])
def test_mistakes_on_the_command_line_are_reported_before_torch_is_imported(without_torch, line, message):
    done = without_torch(*line.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.match(f"error: {message}", done.stderr)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "prepare.py", "-m tools.bench",
                                    "-m tools.scaling"])
def test_help_does_not_import_torch(without_torch, script):
    done = without_torch(*script.split(), "--help")
    assert done.returncode == 0 and f"python {script}" in done.stdout, done.stderr


@pytest.fixture
def without_torch(tmp_path):
    """A function that runs a script, or -m and a module, in a process where importing torch is an error."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "last").mkdir()  # as in a run's folder

    def start(first, *arguments):
        line = [sys.executable, first if first == "-m" else ROOT / first, *arguments]
        paths = os.pathsep.join(map(str, (tmp_path, ROOT)))
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": paths})

    return start
