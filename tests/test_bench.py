"""tools/bench.py: its rows are in the JSON, commands that fail are named, and its update trains."""

import json
import shlex
import sys

import pytest
import torch

from configurator import UserError
from tools import bench


@pytest.mark.slow
def test_every_measured_row_is_in_the_json(tmp_path, capsys, monkeypatch):
    tiny = dict(n_layer=1, n_head=2, n_embd=32, n_hidden=32)
    monkeypatch.setattr(bench, "VISION", bench.VISION | tiny)
    monkeypatch.setattr(bench, "TEXT", bench.TEXT | tiny | dict(head_dim=16, vocab_size=300))
    out, nothing = tmp_path / "bench.json", f"{shlex.quote(sys.executable)} -c pass"
    monkeypatch.setattr(bench, "TRANSLATOR", bench.TRANSLATOR | dict(n_layer=1, n_embd=32, vocab_size=300))
    bench.main(bench.Settings(only="train,sample,vlm,translate,against", sizes="small", dtypes="float32", batches="1,2",
                              new_tokens=4, repeats=1, transformers=False, device="cpu", ours=nothing,
                              against=nothing, out=str(out)))
    rows = {row["case"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"small, float32, ours",
                         *(f"small, float32, {n} at once, {what}ours" for n in (1, 2)
                           for what in ("first token, ", "")),
                         *(f"float32, {n} at once, {what}, ours" for n in (1, 8)
                           for what in ("1 tokens", "64 tokens", "after the first")),
                         *(f"{n} at once, beam {beam}, ours" for n in (1, 32) for beam in (1, 4)), "ours", "theirs"}
    printed = capsys.readouterr().out
    assert all(case in printed and row["least"] <= row["median"] <= row["most"] for case, row in rows.items())
    differences = [case for case in rows if "after the first" in case]  # of two measurements: may be below 0
    assert all(row["median"] > 0 for case, row in rows.items() if case not in differences)


def test_auto_means_other_cases_on_cuda_and_leaves_what_was_set():
    cpu, cuda = (bench.Settings(batches="3").on(torch.device(name)) for name in ("cpu", "cuda"))
    assert (cpu.sizes, cpu.dtypes, cpu.batches, cpu.repeats) == ("small,full", "float32,bfloat16", "3", 5)
    assert (cuda.sizes, cuda.dtypes, cuda.batches, cuda.repeats) == ("full,fast,124m", "bfloat16", "3", 3)
    assert "start" in cpu.only and "start" not in cuda.only


def test_several_calls_are_one_measurement(tmp_path):
    table, calls = bench.Table(bench.Settings(repeats=2, out=str(tmp_path / "b.json")), torch.device("cpu")), []
    row = table.compare("train", {"case": lambda: calls.append(bench.time.sleep(0.01))}, calls=5)["case"]
    assert len(calls) == 3 * 5 and 10 <= row["median"] < 50  # ms per call; the first of three runs warms up
    table.bandwidth = 8000  # bytes/s; a model of 10 weights has 40 bytes
    assert table.floor(torch.nn.Linear(10, 1, bias=False), 3) == {"floor tokens/s": 600}


def test_the_fast_size_trains_with_muon_and_its_step_is_measured(monkeypatch):
    fast = bench.SHAPES["fast"]
    tiny = fast._replace(batch_size=2, shape=fast.shape | dict(n_layer=1, n_embd=32, block_size=8))
    monkeypatch.setitem(bench.SHAPES, "fast", tiny)
    settings = bench.Settings(only="train,sample", sizes="fast", dtypes="float32", batches="1", repeats=1, device="cpu")
    table = bench.Table(settings, torch.device("cpu"))
    bench.measure_train(table)
    bench.measure_sample(table)
    bench.measure_muon(table, "fast")
    assert [row["case"] for row in table.rows] == ["fast, float32, ours", "fast, Muon's step alone"]


def test_failing_commands_and_bad_settings_are_named():
    with pytest.raises(UserError, match="ended with status 3: alas"):
        bench.command([sys.executable, "-c", "import sys; sys.exit(print('alas') or 3)"], ".")()
    with pytest.raises(UserError, match="no_such_program -x: can't be started: No such file"):
        bench.command(["no_such_program", "-x"], ".")()
    with pytest.raises(UserError, match="out = no_such_folder/b.json: there is no folder no_such_folder"):
        bench.Settings(out="no_such_folder/b.json")
    with pytest.raises(UserError, match="give both or neither"):
        bench.Settings(against="true")


def test_the_measured_update_trains_the_model():
    task = bench.OneBatch(torch.randint(65, (4, 65), generator=bench.seeded()), torch.device("cpu"))
    model = bench.new_gpt(bench.SHAPES["small"][0]).train()
    world = bench.World(0, 1, torch.device("cpu"))
    work, _ = bench.train.make_work(task, model, model, None, {"step": 0}, world, torch.float32)
    losses = [bench.train.update(task, work, 0, world)[0] for _ in range(3)]
    assert losses[0].item() == pytest.approx(4.17, abs=0.1) and losses[2] < losses[1] < losses[0]
