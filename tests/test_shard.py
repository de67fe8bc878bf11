"""Sharded training (FSDP2) gives the numbers of one process, and any number of ranks can resume it."""

import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import settings_for
from test_checkpoint import load, make
from test_crash import DAMAGES, TOKENIZERS, every_fault, no_fsync  # noqa: F401
from test_tasks import KINDS, shapes, small  # noqa: F401
from test_train import as_arguments, command, curve, rows, run, weights

import model as models
import train
from configurator import UserError, differences
from machine import distributed
from machine.distributed import World
from optimizer import make_optimizers
from run import checkpoint
from run.shards import is_sharded
from tasks import loading as tasks

CPU = torch.device("cpu")


@pytest.fixture
def one_rank():
    """The World of a process group that has only this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, CPU)
    dist.destroy_process_group()


def step(model):
    """Makes one update of the model. Returns its AdamW."""
    optimizer = make_optimizers(model, train.Settings())["optimizer"]
    model(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 0]])).mean().backward()
    optimizer.step()
    return optimizer


def stepped(seed, world):
    """Returns a sharded model and its optimizer, after one update."""
    model = make(seed)
    distributed.shard(model, models.all_blocks(model), torch.float32, world)
    return model, step(model)


def save(out_dir, world, step, background, names=("best", "last")):
    model, optimizer = stepped(step, world)
    with checkpoint.Writer(out_dir, background, sharded=True) as writer:
        writer.save(names, model, TOKENIZERS, {"step": step}, {"step": step, "optimizer": optimizer.state_dict()})
    return model, optimizer


def moments(optimizer):
    """Returns the optimizer's state as whole tensors."""
    return [{name: value.full_tensor() if is_sharded(value) else value for name, value in entry.items()}
            for entry in optimizer.state_dict()["state"].values()]


# ----------------------------------------------------------------------------------------------------------------------
# Sharded checkpoints

@pytest.mark.parametrize("background", [False, True])
def test_shards_load_into_a_plain_model_and_into_both_kinds_of_optimizer(tmp_path, one_rank, background):
    model, optimizer = save(tmp_path, one_rank, 1, background)
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    for name in ("best", "last"):
        loaded, config = load(tmp_path / name)
        torch.testing.assert_close(loaded.state_dict(), whole, atol=0, rtol=0)
        assert config["step"] == 1 and (tmp_path / name / "model").is_dir()
    assert checkpoint.find_any(tmp_path / "last") == tmp_path / "last"
    saved = checkpoint.load_trainer(tmp_path / "last")["optimizer"]
    for other in (make_optimizers(loaded, train.Settings())["optimizer"], stepped(5, one_rank)[1]):
        checkpoint.load_optimizer(other, saved, tmp_path / "last")
        torch.testing.assert_close(moments(other), moments(optimizer), atol=0, rtol=0)
    with pytest.raises(UserError, match="the optimizer state of other parameters"):
        checkpoint.load_optimizer(torch.optim.AdamW(loaded.transformer.parameters()), saved, tmp_path / "last")


def test_the_state_of_an_ordinary_optimizer_loads_into_a_sharded_one(tmp_path, one_rank):
    optimizer, sharded = step(make(1)), stepped(2, one_rank)[1]
    checkpoint.load_optimizer(sharded, optimizer.state_dict(), tmp_path)
    assert all(is_sharded(entry["exp_avg"]) for entry in sharded.state.values())
    torch.testing.assert_close(moments(sharded), moments(optimizer), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_kill_at_any_instant_of_a_sharded_save(tmp_path, one_rank, background, no_fsync):  # noqa: F811
    for step in (1, 2):
        save(tmp_path / "before", one_rank, step, False)
    seen = set()
    for _, out_dir in every_fault(lambda out_dir: save(out_dir, one_rank, 3, background), base=tmp_path,
                                  prepare=lambda out_dir: shutil.copytree(tmp_path / "before", out_dir)):
        found = [checkpoint.find(out_dir, "last"), checkpoint.find_any(out_dir)]
        seen.add(tuple(load(folder)[1]["step"] for folder in found))
        assert (found[0] / "optimizer").is_dir()
        save(out_dir, one_rank, 4, background)
        assert sorted(os.listdir(out_dir)) == ["best", "last", "last.old"]
    assert seen == {(2, 2), (2, 3), (3, 3)}


@pytest.mark.parametrize("damage, name", [*((damage, "model") for damage in DAMAGES), ("flipped", "optimizer"),
                                          ("short", "SHA256SUMS"), ("missing", "SHA256SUMS")])
def test_a_damaged_shard_is_noticed(tmp_path, one_rank, name, damage, capsys):
    for step in (1, 2):
        save(tmp_path, one_rank, step, False, names=["last"])
    path = tmp_path / "last" / name
    path = path if path.is_file() else next(path.iterdir())
    DAMAGES[damage](path)
    assert checkpoint.find(tmp_path, "last").name == "last.old"
    said = capsys.readouterr().err
    if name != "SHA256SUMS":
        assert path.name in said
        assert checkpoint.find_any(tmp_path).name == ("last" if name == "optimizer" else "last.old")


def test_a_full_disk_is_reported_in_one_line_for_shards_too(tmp_path, one_rank):
    resource = pytest.importorskip("resource")
    save(tmp_path, one_rank, 1, False, names=["last"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="last can't be written: File too large.*last holds step 1"):
            save(tmp_path, one_rank, 2, True, names=["last"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["last"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_among_the_shards_is_not_read(tmp_path, one_rank, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, one_rank, 1, False, names=["last"])
    for name in ("model", "optimizer"):
        (tmp_path / "last" / name / ".metadata").write_bytes(pickle.dumps(Bomb()))
    load(tmp_path / "last")
    saved = checkpoint.load_trainer(tmp_path / "last")["optimizer"]
    checkpoint.load_optimizer(stepped(2, one_rank)[1], saved, tmp_path / "last")
    assert os.listdir(tmp_path) == ["last"]


# ----------------------------------------------------------------------------------------------------------------------
# Training

def test_ranks_get_equally_many_items_and_each_item_counts_once():
    for size in (1, 2, 3, 4):
        shares = [list(World(rank, size, CPU).share("abcde")) for rank in range(size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(item for share in shares for item, counts in share if counts) == list("abcde")


@pytest.mark.parametrize("changes", [{}, dict(dropout=0.2, micro_batch_size=4)])
def test_recomputing_does_not_change_the_curve(tmp_path, tiny, changes, monkeypatch):
    computed, real = {False: 0, True: 0}, models.Attention.forward

    def counted(self, *args, **per_call):
        computed[again] += self.training
        return real(self, *args, **per_call)

    monkeypatch.setattr(models.Attention, "forward", counted)
    for again in (False, True):
        run(tmp_path / str(again), tiny, **changes, max_iters=10, eval_interval=10, sample_tokens=0, recompute=again)
    assert curve(rows(tmp_path / "False")) == curve(rows(tmp_path / "True"))
    assert computed[True] == 2 * computed[False] > 0


def torchrun(ranks, *arguments):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    done = subprocess.run(command(*arguments, launcher=launcher), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_equal_to_rounding(one, other):
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a == pytest.approx(b, rel=3e-6, abs=1e-5)  # gradient norms are about 9


CHANGES = dict(micro_batch_size=4, grad_clip=0.3, dropout=0.1, lr_decay_iters=40)


@pytest.fixture(scope="module")
def halves(tmp_path_factory, tiny):
    """Folder of three runs: `whole` by one process; its first half by one process (`plain`) or by two (`sharded`)."""
    base = tmp_path_factory.mktemp("halves")
    run(base / "whole", tiny, **CHANGES)
    run(base / "plain", tiny, **CHANGES, max_iters=20)
    wanted = {**tiny, **CHANGES, **dict(max_iters=20, shard=True, recompute=True)}
    torchrun(2, *as_arguments(wanted, out_dir=str(base / "sharded")))
    return base


@pytest.mark.slow
@pytest.mark.parametrize("first, ranks, shard", [("sharded", 1, True), ("sharded", 2, True), ("sharded", 2, False),
                                                 ("plain", 2, True)])
def test_a_run_resumes_sharded_or_not_on_any_number_of_ranks(halves, tmp_path, first, ranks, shard):
    out_dir = tmp_path / "run"
    shutil.copytree(halves / first, out_dir)
    torchrun(ranks, "--resume", f"--out_dir={out_dir}", "--max_iters=40", f"--shard={shard}")
    assert_equal_to_rounding(rows(halves / "whole"), rows(out_dir))
    assert (out_dir / "last" / "model").is_dir() == (shard and ranks > 1)
    torch.testing.assert_close(weights(out_dir), weights(halves / "whole"), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_four_ranks_where_two_have_nothing_to_evaluate_and_one_has_nothing_to_train(tiny, tmp_path):
    wanted = {**tiny, **CHANGES, "micro_batch_size": 3}
    run(tmp_path / "one", wanted)
    said = torchrun(4, *as_arguments(wanted, shard=True, out_dir=str(tmp_path / "four")))
    assert_equal_to_rounding(rows(tmp_path / "one"), rows(tmp_path / "four"))
    task, model, _ = tasks.load(tmp_path / "one" / "last")
    assert task.show(model) in said  # the sample at the end


@pytest.mark.slow
def test_a_sharded_image_text_model_with_rates_for_its_parts(small, tmp_path):  # noqa: F811
    wanted = {**small, **KINDS["image-text"], "rates": {"vision": 0.0, "projector": 2.0}}
    train.main(settings_for("image-text", **wanted, out_dir=str(tmp_path / "one")), {})
    two = differences(settings_for("image-text", **wanted, recompute=True, out_dir=str(tmp_path / "two")))
    torchrun(2, *as_arguments(two), "--shard=True")  # not in `two`: settings refuse it for one worker
    assert_equal_to_rounding(rows(tmp_path / "one"), rows(tmp_path / "two"))
    before, after = (weights(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
