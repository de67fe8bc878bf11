import math
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from configurator import UserError
from machine.distributed import World
from run.guards import Guard, guard_outputs, require_finite

CPU = torch.device("cpu")


def make(world=None, scaled=False, saved=None, step=0, **settings):
    settings = SimpleNamespace(**{"max_grad_norm": 0.0, "max_loss_rise": 0.0, "max_minutes": 0.0, "save_minutes": 0.0,
                                  **settings})
    return Guard(settings, world or World(0, 1, CPU), step, scaled, saved or {}, lambda step: f"the rows {step - 1}")


def record(guard, *losses, norm=1.0):
    for loss in losses:
        guard.record(torch.tensor(loss), torch.tensor(norm), {"hits": torch.tensor(2 * loss)})


def test_read_returns_the_last_update_and_the_mean_since_the_last_log_row():
    guard = make()
    assert guard.due(1) and not guard.due(0)
    record(guard, 3.0, 1.0)
    assert guard.read(logging=False) == {"loss": 1.0, "mean_loss": 2.0, "grad_norm": 1.0, "hits": 2.0}
    assert guard.mean == 2.0 and not guard.due(2)
    record(guard, 5.0, norm=2.0)
    other = make(saved=guard.state, step=2)  # as in a resumed run
    record(other, 5.0, norm=2.0)
    for each in (guard, other):
        assert each.read() == {"loss": 5.0, "mean_loss": 3.0, "grad_norm": 2.0, "hits": 10.0} and each.mean == 3.0
        record(each, 7.0)
        assert each.read()["mean_loss"] == 7.0  # of the updates since the last log row


def test_the_ranks_shares_are_summed():
    class Two(World):
        def sum(self, *numbers):
            return [2.0 * number for number in numbers]

    guard = make(Two(0, 2, CPU))
    record(guard, 1.5, norm=0.5)
    assert guard.read() == {"loss": 3.0, "mean_loss": 3.0, "grad_norm": 0.5, "hits": 6.0}


def test_the_first_ctrl_c_is_answered_on_a_terminal(monkeypatch):
    said = []
    monkeypatch.setattr(os, "isatty", lambda number: number == 2)
    monkeypatch.setattr(os, "write", lambda number, line: said.append((number, line)))
    with make() as guard:
        signal.raise_signal(signal.SIGINT)
        assert guard.status == 130
    (number, line), = said
    assert number == 2 and b"Ctrl-C again ends the run at once" in line


@pytest.mark.parametrize("loss, norm, settings, message", [
    (math.nan, 1.0, {}, "the loss is nan .*: try a lower --learning_rate"),
    (1.0, math.inf, {}, "norm inf .*: try a lower --learning_rate"),
    (1.0, 99.0, dict(max_grad_norm=50.0), "norm 99.0000 .*: max_grad_norm = 50.0"),
    (3.5, 1.0, dict(max_loss_rise=1.0), "the running mean of the loss is 2.0000, and max_loss_rise = 1.0"),
])
def test_the_first_bad_update_is_named(loss, norm, settings, message):
    guard = make(step=10, saved={"mean_loss": 2.0}, **settings)
    record(guard, 2.0)
    record(guard, loss, norm=norm)
    record(guard, math.nan)
    with pytest.raises(UserError, match=f"{message}.*; the batch is the rows 11") as error:
        guard.read()
    assert "at step 12: " in str(error.value)


def test_float16_may_skip_updates():
    guard = make(scaled=True, max_grad_norm=5.0)
    record(guard, 3.0, norm=math.inf)
    assert guard.read()["grad_norm"] == math.inf


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send these signals")
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 75)])
def test_a_signal_sets_the_status_and_the_old_handlers_come_back(name, status):
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    for workers, second_ends in ((1, status in (130, 143)), (2, False)):
        with make(World(0, workers, CPU)) as guard:
            assert guard.status == 0
            signal.raise_signal(number)
            assert guard.status == status and guard.reason(status) == name.replace("SIGINT", "Ctrl-C")
            assert (signal.getsignal(number) is before) == second_ends
        assert signal.getsignal(number) is before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_hangup_that_is_ignored_at_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with make() as guard:
            signal.raise_signal(signal.SIGHUP)
            assert guard.status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_time_limits_stop_the_run_and_ask_for_saves():
    assert make(max_minutes=1e-9).status == 75 and make(max_minutes=60.0).status == 0
    assert make(max_minutes=1e-9).reason(75) == "--max_minutes=1e-09"
    found = []
    for save_minutes in (1e-9, 60.0, 0.0):
        guard = make(save_minutes=save_minutes)
        record(guard, 1.0)
        guard.read()
        found.append(guard.saving)
    assert found == [True, False, False]


def test_a_closed_output_sets_the_status_and_raises_nothing():
    reader, writer = os.pipe()
    with open(writer, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", sys.stderr)
        guard_outputs()
        print("one", flush=True)
        assert os.read(reader, 9) == b"one\n" and make().status == 0
        os.close(reader)
        for _ in range(2):
            print("two", flush=True)
        assert make().status == 141 and make().reason(141) == "the output was closed"


def test_a_measure_that_is_nan_is_named():
    require_finite("val_loss", 1.0, 3)
    with pytest.raises(UserError, match="val_bleu is nan at step 3: try a lower --learning_rate"):
        require_finite("val_bleu", math.nan, 3)
