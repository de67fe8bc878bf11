"""What stands in for an update and for a step, replayed as CUDA graphs, gives the same numbers; here with graphs that a
CPU replays by calling the recorded function. tests/test_cuda.py has the real ones."""

import contextlib
import copy
import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import settings_for

import generate
import train
from configurator import UserError
from machine import capture
from machine.attention import bias_of
from machine.capture import can_capture
from machine.distributed import World
from model import GPT, GPTConfig, init_weights
from optimizer import Muon, set_rates
from tasks.text import TextTask

WORLD = World(0, 1, torch.device("cpu"))
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=25)


def flat(result):
    """All tensors of nested tuples and dicts."""
    if torch.is_tensor(result):
        return [result]
    return [tensor for part in (result.values() if isinstance(result, dict) else result) for tensor in flat(part)]


@pytest.fixture
def graphs(monkeypatch):
    """Graphs for a CPU. As on a GPU, recording changes no value, and each replay overwrites the same results."""
    def record(work, generator=None, pool=None):
        changed = [tensor for part in graphs.state() for tensor in flat(part)]
        before, state = [tensor.clone() for tensor in changed], generator and generator.get_state()
        result = work()
        with torch.no_grad():
            for tensor, value in zip(changed, before):
                tensor.copy_(value)
        if generator:
            generator.set_state(state)

        def replay():
            for old, new in zip(flat(result), flat(work())):
                old.copy_(new)
        return SimpleNamespace(replay=replay, pool=lambda: None), result

    graphs = SimpleNamespace(state=lambda: [])
    monkeypatch.setattr(capture, "record", record)
    monkeypatch.setattr(capture, "side_stream", contextlib.nullcontext)
    return graphs


def trained(dataset, graphs, captured_from=None, bad=(), **changes):
    """(losses and norms of five updates, the model, its optimizers).

    captured_from: the first update that is captured; None: none is. bad: updates whose weights are NaN.
    """
    settings = settings_for("text", batch_size=6, micro_batch_size=3, learning_rate=1e-2, dropout=0.2, **changes)
    task = TextTask(settings)
    task.open(dataset, WORLD)
    model = GPT(GPTConfig(**SHAPE, dropout=0.2))
    init_weights(model, torch.Generator().manual_seed(0))
    task.fit(model.train())
    optimizers = train.make_optimizers(model, settings, capturable=captured_from is not None)
    work = train.Work(task, model, optimizers, torch.amp.GradScaler(enabled=False), WORLD, torch.float32)
    set_rates(optimizers, 1, settings)
    graphs.state = lambda: [list(model.parameters()), capture.tensors_of(optimizers)]
    results, weight = [], task.weight
    for step in range(5):
        if step == captured_from:
            work, _ = capture.captured(work, *train.micro_batch(task, task.pick(0)[:3], 0, 0))
        set_rates(optimizers, step + 1, settings)
        task.weight = lambda rows, step=step: float("nan") if step in bad else weight(rows)
        results.append(train.update(task, work, step, WORLD)[:2])
    return results, model, optimizers


@pytest.fixture(autouse=True)
def any_device(monkeypatch):
    monkeypatch.setattr(capture, "can_capture", lambda model, device: True)


def assert_same(found, expected):
    (results, model, optimizers), (others, other, others_optimizers) = found, expected
    torch.testing.assert_close(results, others, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dict(model.named_parameters()), dict(other.named_parameters()), rtol=1e-5, atol=1e-6)
    for name, optimizer in optimizers.items():
        torch.testing.assert_close(optimizer.state_dict()["state"], others_optimizers[name].state_dict()["state"])


@pytest.mark.parametrize("changes", [dict(optimizer="adamw"), dict(optimizer="muon", grad_clip=0.0)])
def test_a_captured_update_is_the_same_update(dataset, graphs, changes):
    """Also with dropout, several micro-batches, and rates that change; what its warm-up changed is undone."""
    plain = trained(dataset, graphs, **changes)
    for first in (0, 2):  # with new moments, and with those of earlier updates
        assert_same(trained(dataset, graphs, first, **changes), plain)


@pytest.mark.parametrize("first", [0, 2])
def test_a_capture_that_fails_changes_nothing(dataset, graphs, monkeypatch, first):
    def fail(self):
        real(self)
        raise RuntimeError("out of memory\nmore")

    plain, real = trained(dataset, graphs, optimizer="muon", grad_clip=0.0), Muon.step
    monkeypatch.setattr(capture, "warm_up", functools.partial(with_patch, capture.warm_up, Muon, "step", fail))
    assert_same(trained(dataset, graphs, first, optimizer="muon", grad_clip=0.0), plain)


def with_patch(work, target, name, value, *args, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        return work(*args, **more)


def test_the_results_of_an_update_outlive_the_next_one(dataset, graphs):
    """Else the error for a bad update would name another step."""
    results = trained(dataset, graphs, 0, bad=[1])[0]
    assert [bool(loss.isfinite() & norm.isfinite()) for loss, norm in results] == [True, False, False, False, False]


def test_a_run_says_what_keeps_it_from_capturing():
    task = TextTask(settings_for("text", batch_size=8))
    gpu = World(0, 1, torch.device("cuda"))
    assert capture.obstacle_to_capture(task, gpu, torch.bfloat16) is None
    assert capture.obstacle_to_capture(task, WORLD, torch.bfloat16) == "the device is cpu"
    assert "float16" in capture.obstacle_to_capture(task, gpu, torch.float16)
    assert "workers" in capture.obstacle_to_capture(task, replace(gpu, size=2), torch.bfloat16)
    task.fixed_shapes = False
    assert "shapes" in capture.obstacle_to_capture(task, gpu, torch.bfloat16)
    for name, value in dict(capture=False, recompute=True, micro_batch_size=3).items():
        task = TextTask(settings_for("text", batch_size=8, **{name: value}))
        assert name in capture.obstacle_to_capture(task, gpu, torch.bfloat16)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("changes", [{}, dict(positions="rotary", mlp="relu2", bigrams=True, tied=False, n_kv_head=1)])
@pytest.mark.parametrize("eos", [None, 3])
def test_captured_steps_write_the_same_tokens(graphs, monkeypatch, changes, eos, compiled):
    """Beyond the end of the window too; what the warm-up drew and wrote does not count."""
    model = GPT(GPTConfig(**SHAPE, **changes)).eval()
    init_weights(model, torch.Generator().manual_seed(0), std=0.3)
    prompt = torch.randint(25, (4, 5), generator=torch.Generator().manual_seed(1))

    def tokens():
        pick = functools.partial(generate.pick_tokens, top_k=9, generator=torch.Generator().manual_seed(2))
        return [chosen.clone() for chosen in generate.generate(model, prompt, 40, pick, eos)]

    expected, compiles = tokens(), []
    if compiled:
        monkeypatch.setattr(capture, "has_triton", lambda: True)
        monkeypatch.setattr(torch, "compile", lambda hidden, dynamic: lambda *args: compiles.append(0) or hidden(*args))
        capture.compile_steps(model, torch.device("cuda"))
    calls, real = [], capture.CapturedStep.record

    def record(self, *args):
        calls.append(args)
        graphs.state = lambda: [self.caches.last, self.tokens, self.start]
        real(self, *args)

    monkeypatch.setattr(capture.CapturedStep, "record", record)
    monkeypatch.setattr(generate, "can_capture", lambda model, device: True)
    monkeypatch.setattr(generate, "read_ahead", lambda steps: steps)
    assert torch.equal(torch.stack(tokens()), torch.stack(expected)) and len(calls) == 1
    assert bool(compiles) == compiled

    def fail(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(capture, "record", fail)
    monkeypatch.setattr(capture, "say", calls.append)
    assert torch.equal(torch.stack(tokens()), torch.stack(expected))  # without a graph, after the warm-up
    assert calls[2:] == ["the steps can't be captured as a CUDA graph (no room), so they are slower"]


def test_steps_that_cannot_be_compiled_are_refused(monkeypatch):
    with pytest.raises(UserError, match="compile = True: only steps on CUDA"):
        capture.compile_steps(GPT(GPTConfig(**SHAPE)), torch.device("cpu"))
    monkeypatch.setattr(capture, "has_triton", lambda: True)
    with pytest.raises(UserError, match="compile = True: the model Linear has no steps"):
        capture.compile_steps(torch.nn.Linear(1, 1), torch.device("cuda"))


def test_a_picker_that_is_not_known_and_a_hook_are_never_recorded(monkeypatch):
    model, device = GPT(GPTConfig(**SHAPE)), torch.device("cuda")
    assert can_capture(model, device) and not can_capture(model, WORLD.device)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hooked = copy.deepcopy(model)
        getattr(hooked.transformer.blocks[0], register)(lambda *_: None)
        assert not can_capture(hooked, device)
    monkeypatch.setattr(generate, "can_capture", lambda model, device: True)
    seen = []
    steps = generate.generate(model, torch.zeros(1, 1, dtype=torch.long), 4, lambda x: seen.append(x) or x.argmax(-1))
    assert len(list(steps)) == len(seen) == 4


def test_a_mask_becomes_a_bias_once():
    masks = [torch.rand(3, 1, 1, 11) > 0.5 for _ in range(3)]
    for mask in masks:
        bias = bias_of(mask, torch.bfloat16)
        assert bias_of(mask, torch.bfloat16) is bias and bias.stride(-2) == 16 and bias.dtype == torch.bfloat16
        assert torch.equal(bias == 0, mask) and torch.equal(bias == -torch.inf, ~mask)
    assert bias_of(masks[1], torch.bfloat16) is not bias and bias_of(masks[1], torch.float32).dtype == torch.float32
