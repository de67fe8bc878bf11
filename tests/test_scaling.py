"""The formulas of scaling.py against counted parameters, and against tracked tensors of real training steps."""

from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import model as models
import scaling
import train
from configurator import UserError, parse
from model import GPT, GPTConfig, init_weights

ROOT = Path(scaling.__file__).parent
SMALL = train.Settings(n_layer=4, n_head=2, n_embd=128, block_size=576)  # long enough for the fused kernel on a CPU


def recipe(path):
    return parse(train.Settings, [str(path)])[0]


def build(s):
    return GPT(GPTConfig(n_layer=s.n_layer, n_head=s.n_head, n_embd=s.n_embd, block_size=s.block_size, bias=s.bias,
                         vocab_size=scaling.V))


@pytest.mark.parametrize("s", [*map(recipe, scaling.RECIPES), train.Settings(bias=True)],
                         ids=[*(path.stem for path in scaling.RECIPES), "with biases"])
def test_parameters_and_flops_are_those_of_the_model(s):
    with torch.device("meta"):
        model = build(s)
    assert scaling.parameters(s) == models.count_parameters(model)
    assert scaling.flops_per_token(s) == models.flops_per_token(model, s.block_size)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(scaling, "V", 2000)
    model = build(SMALL)
    init_weights(model, SMALL.n_layer)
    return model, train.make_optimizer(model, SMALL)


def loss_of(model, sequences):
    tokens = torch.zeros(sequences, SMALL.block_size, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(tokens, tokens)


def test_state_is_weights_gradients_and_two_moments(small):
    model, optimizer = small
    loss_of(model, 1).backward()
    optimizer.step()
    held = [p for p in model.parameters()] + [p.grad for p in model.parameters()]
    held += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert sum(tensor.nbytes for tensor in held) == scaling.state_bytes(SMALL)


@pytest.mark.parametrize("sequences", [1, 3])
def test_saved_activations_are_what_the_formula_adds_up(small, sequences):
    model, _ = small
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(model, sequences)
    assert loss.requires_grad
    in_backward = 8 * scaling.V * sequences * SMALL.block_size
    assert sum(saved.values()) == pytest.approx(scaling.activation_bytes(SMALL, sequences) - in_backward, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("recompute, tolerance", [(False, 0.01), (True, 0.05)])
def test_the_peak_is_that_of_a_training_step(small, recompute, tolerance):
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    model, optimizer = small
    for block in model.transformer.blocks if recompute else ():
        block.forward = lambda x, run=block.forward, **more: checkpoint(run, x, use_reentrant=False, **more)
    tracker = mem_tracker.MemTracker()

    def step():
        for _ in range(2):  # micro-batches: the second comes upon gradients
            tracker.reset_mod_stats()
            loss_of(model, 4).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    tracker.track_external(model, optimizer)  # its moments are there now
    with tracker:
        step()
    peak, = (parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())
    assert peak == pytest.approx(scaling.state_bytes(SMALL) + scaling.activation_bytes(SMALL, 4, recompute),
                                 rel=tolerance)


@pytest.mark.parametrize("path", scaling.RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_any_number_of_gpus_and_says_what_it_takes(path, monkeypatch):
    s = recipe(path)
    for workers in (2, 8, 64):
        monkeypatch.setenv("WORLD_SIZE", str(workers))
        steps = recipe(path).gradient_accumulation_steps
        assert s.batch_size % (workers * steps) == 0
        assert s.batch_size // (workers * steps) == min(scaling.sequences_at_once(s), s.batch_size // workers)
    monkeypatch.delenv("WORLD_SIZE")
    assert scaling.sentence(s) in " ".join(path.read_text(encoding="utf-8").split())


def test_the_readme_has_the_tables(capsys):
    scaling.main([])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 12 and "\n".join(printed[:6]) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(printed[6:]) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_other_models_are_not_counted_as_if_they_were_gpts():
    with pytest.raises(UserError, match="positions = 'rotary': the formulas are of the classic GPT"):
        scaling.main(["--positions=rotary"])
