import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

import train
from configurator import UserError
from machine.distributed import World
from run import curves, log
from run.log import Log, measures
from run.record import read_record, rows_until, samples_until

WORLD = World(0, 1, torch.device("cpu"))
ROW = {"step": 1000, "lr": 1e-3, "loss": 2.5, "mean_loss": 2.6, "grad_norm": 1.0, "ms": 1234.5, "tokens_per_s": 12345.0,
       "mfu": 0.25, "val_loss": 2.4, "val_exact": 0.5, "val_retrieval_image_to_text": 0.25}


def make(out_dir, step=0, **settings):
    task = SimpleNamespace(settings=train.Settings(**settings), best=("loss", min), cost=lambda model: (1000, 0),
                           fingerprint=lambda: {"val_tokens": 30_000})
    return Log(out_dir, task, None, step, None, WORLD)


@pytest.mark.parametrize("columns, expected", [
    (40, ["step 1000/2000", "loss 2.5000", "val loss 2.4000 best"]),
    (80, ["step 1000/2000", "loss 2.5000", "0:10 left", "val loss 2.4000 best"]),
    (300, ["step 1000/2000", "loss 2.5000", "1234.5 ms", "0:10 left", "val loss 2.4000 best", "val exact 0.5000"])])
def test_a_printed_line_fits_and_keeps_the_important_parts(tmp_path, monkeypatch, columns, expected):
    monkeypatch.setattr(log, "columns", lambda: columns)
    monkeypatch.setattr(Log, "seconds_left", lambda self: 10)
    row = {name: value for name, value in ROW.items() if name != "val_retrieval_image_to_text"}
    line = make(tmp_path, max_iters=2000).line(row, True)
    assert line.split(" | ") == expected and len(line) <= max(52, min(columns, 100))
    assert "best" not in make(tmp_path, max_iters=2000).line(row, False)
    assert len(make(tmp_path, max_iters=2000).line(ROW, True)) <= max(52, min(columns, 100))


@pytest.mark.parametrize("step", [0, 500])
def test_the_time_left_does_not_count_the_first_update(tmp_path, monkeypatch, step):
    """The first update takes a minute, the others 0.1 s, an evaluation 5 s."""
    now, found = [0.0], {}
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    record = make(tmp_path, step, max_iters=step + 1000, eval_interval=250)
    for n in range(step + 1, step + 1001):
        now[0] += 60 if n == step + 1 else 0.1
        row = record.row(n)
        found[n - step] = record.seconds_left(), (1000 - n + step) * 0.1 + (4 - (n - step) // 250) * 5
        if n % 250 == 0:
            now[0] += 5
        if n % 10 == 0:
            record.restart(n, n % 250 == 0)
    assert row["ms"] == pytest.approx(100) and found[1][0] is None
    assert found[10] == (103, pytest.approx(119))  # before the first evaluation, it is taken for 30 forward passes
    assert all(abs(left - right) <= 0.6 for n, (left, right) in found.items() if n > 250)


def test_samples_are_kept_up_to_the_checkpoint(tmp_path):
    texts = {10: "```\n## a heading\n\n```\nx\n```\n\n", 20: "plain\r\x1b[0m", 30: "````` `", 40: ""}
    record = make(tmp_path)
    for step, text in texts.items():
        record.keep_sample(f"step {step}, loss 1.0000", text)
    path = tmp_path / "samples.md"
    whole = path.read_bytes()
    assert b"``````\n````` `\n``````\n" in whole and b"````\n```\n## a heading" in whole
    assert samples_until(path, 40).encode() == whole
    assert samples_until(path, 25).encode() == whole[:whole.index(b"## step 30")]
    record.keep_sample("step 40, loss 1.0000", "")  # a second time
    assert path.read_bytes() == whole


def test_damaged_records_are_skipped(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n7\n{"step": "a"}\n\xff\n{"step": 2, "x": 0.1}\n{"step": 3}\n{"step": 2, "l')
    assert list(rows_until(path, 2)) == [{"step": 1}, {"step": 2, "x": 0.1}]
    path = tmp_path / "run.json"
    for text in ("[", "{}", "[1, 2]", '{"starts": 3}', '{"starts": [{"id": "a"}], "results": {}}', "\x00",
                 "[" * 100_000, '{"starts": [{"id": "a"}], "results": {"seconds": 3, "best": {"val_loss": "abc"}}}'):
        path.write_text(text)
        assert read_record(path) == ([], 0.0, {}) and (tmp_path / "run.json.old").read_text() == text
    assert "was damaged: renamed it to" in capsys.readouterr().err
    path.write_text('{"starts": [{"id": "a"}], "results": {"seconds": 3}}')
    assert read_record(path) == ([{"id": "a"}], 3.0, {})


def test_the_best_result_survives_a_damaged_log(tmp_path):
    record = make(tmp_path)
    record.write({**ROW, "step": 5, "val_loss": 2.0}, True, None)
    record.write({**ROW, "step": 10, "val_loss": 1.0}, True, None)
    record.close(0, "")
    (tmp_path / "log.jsonl").write_text('{"step": 7, "val_loss": "abc"}\n')
    assert make(tmp_path, step=10).record["results"]["best"] == {"step": 10, **measures(ROW), "val_loss": 1.0}
    assert "best" not in make(tmp_path, step=9).record["results"]  # it came after the checkpoint


@pytest.mark.parametrize("error, status, why", [(UserError("too large"), 2, "too large"), (KeyError(1), 1, "KeyError"),
                                                (KeyboardInterrupt(), 130, "KeyboardInterrupt")])
def test_an_error_is_recorded_as_the_end_of_the_start(tmp_path, error, status, why):
    with pytest.raises(type(error)):
        with make(tmp_path):
            raise error
    start = json.loads((tmp_path / "run.json").read_text())["starts"][0]
    assert (start["status"], start["why"], start["end_step"]) == (status, why, 0)


def test_an_infinite_norm_and_a_failing_picture_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "draw", lambda out_dir: 1 / 0)
    record = make(tmp_path)
    record.write({**ROW, "step": 1, "grad_norm": math.inf}, False, None)
    record.close(0, "")
    assert '"grad_norm": null' in (tmp_path / "log.jsonl").read_text()  # JSON has no infinity
    assert curves.read_log(tmp_path)[0]["val_loss"] == 2.4
    assert "curves.svg can't be drawn: ZeroDivisionError" in capsys.readouterr().err
    assert json.loads((tmp_path / "run.json").read_text())["starts"][0]["status"] == 0
