"""tools/scaling.py: its formulas give the sizes of real models and the memory of real training steps."""

from pathlib import Path

import pytest
import torch
from conftest import settings_for
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from model import GPT, GPTConfig, init_weights
from optimizer import make_optimizers
from tools import scaling

ROOT = Path(scaling.__file__).parents[1]
# A context long enough for the fused attention kernel on a CPU.
SMALL = GPTConfig(n_layer=4, n_head=2, n_embd=128, block_size=576, vocab_size=2000)


def recipe(name, *more):
    return scaling.read([*(str(scaling.CONFIG / file) for file in scaling.RECIPES[name]), *more])


def test_gpt_2s_published_sizes_come_out():
    found = {name: sum(p.numel() for p in recipe(name)[1].parameters()) for name in scaling.RECIPES}
    assert {name: round(n / 1e6) for name, n in found.items()} == {"124m": 124, "350m": 355, "774m": 774, "1.5b": 1557}
    _, model = recipe("124m", "--bias")
    assert model.wte.weight.is_meta
    assert sum(p.numel() for p in model.parameters()) == 124_439_808  # Radford et al. 2019's own, which has biases


@pytest.fixture
def small():
    model = GPT(SMALL)
    init_weights(model)
    return model, make_optimizers(model, settings_for("text"))["optimizer"]


def loss_of(model, sequences):
    tokens = torch.zeros(sequences, SMALL.block_size, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (model(tokens, tokens) / tokens.numel()).sum()


def test_state_is_weights_gradients_and_two_moments(small):
    model, optimizer = small
    loss_of(model, 1).backward()
    optimizer.step()
    held = [p for p in model.parameters()] + [p.grad for p in model.parameters()]
    held += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert sum(tensor.nbytes for tensor in held) == scaling.state_bytes(model)


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_formula_adds_up_the_saved_activations(small, sequences):
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
    in_backward = 8 * SMALL.vocab_size * sequences * SMALL.block_size
    assert sum(saved.values()) == pytest.approx(scaling.activation_bytes(model, sequences) - in_backward, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("recompute, tolerance", [(False, 0.01), (True, 0.05)])
def test_the_formula_gives_the_peak_of_a_training_step(small, recompute, tolerance):
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    model, optimizer = small
    for block in model.transformer.blocks if recompute else ():
        block.forward = lambda x, run=block.forward, **more: checkpoint(run, x, use_reentrant=False, **more)
    tracker = mem_tracker.MemTracker()

    def step():
        for _ in range(2):  # micro-batches: the second adds to the first one's gradients
            tracker.reset_mod_stats()
            loss_of(model, 4).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    tracker.track_external(model, optimizer)  # the first step has made the moments
    with tracker:
        step()
    peak, = (parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())
    expected = scaling.state_bytes(model) + scaling.activation_bytes(model, 4, recompute)
    assert peak == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", scaling.RECIPES)
def test_a_recipes_batch_divides_evenly_and_its_docstring_says_what_it_takes(name):
    s, model = recipe(name)
    for workers in (1, 2, 8, 64):
        at_once = min(s.micro_batch_size, s.batch_size // workers)
        assert s.batch_size % (workers * at_once) == 0
    text = (scaling.CONFIG / scaling.RECIPES[name][-1]).read_text(encoding="utf-8")
    assert scaling.sentence(s, model) in " ".join(text.split())


def test_the_tables_have_a_row_per_recipe(capsys):
    scaling.main([])
    tables = [part.strip().splitlines() for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    assert [len(table) for table in tables] == [6, 6]
    assert tables[0][2] == "| 124m | 124M | 10B | 8.5e+18 | 6.0 h | 45 min | 6 min | 2.49B | 1.5 h | 11 min | 1 min |"
    assert tables[1][2] == "| 124m | 2.0 | 0.5 | 0.3 | 1.0 | 0.6 | 32 | 34.3 | 21.7 |"


@pytest.mark.parametrize("argument", ["--positions=rotary", "--model=gemma", "--init_from=gpt2", "--task=contrastive"])
def test_other_models_than_the_classic_gpt_are_refused(argument):
    name, _, value = argument.lstrip("-").partition("=")
    with pytest.raises(UserError, match=f"{name} = {value!r}: the formulas are for the classic GPT"):
        scaling.main([argument])
