import os
import pickle
import shutil

import pytest
import torch

from configurator import UserError
from model import GPT, GPTConfig, init_weights
from run import checkpoint
from tokenizer import ByteTokenizer, CharTokenizer

SMALL = dict(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=3)


def make(seed):
    model = GPT(GPTConfig(**SMALL))
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


def save(out_dir, seed, name="last", tokenizers=None, trainer=None):
    with checkpoint.Writer(out_dir, background=False) as writer:
        writer.save([name], make(seed), tokenizers or {"tokenizer": CharTokenizer("abc")},
                    {"model_type": "gpt", "model": SMALL, "step": seed}, trainer or {"step": seed})


def load(folder):
    """Returns (model, config) of a checkpoint folder that holds a model of `make`."""
    saved = checkpoint.load(folder)
    model = checkpoint.unfilled(GPT, GPTConfig(**SMALL), "cpu")
    checkpoint.fill(model, saved.state, folder)
    return model, saved.config


def seal(folder):
    """Renews the checksums after a test has changed files."""
    config = checkpoint.read_config(folder)
    for name in ("SHA256SUMS", "config.json"):
        (folder / name).unlink()
    checkpoint.seal(folder, config)


def test_a_checkpoint_loads_what_was_saved(tmp_path):
    save(tmp_path, 3)
    model, config = load(checkpoint.find(tmp_path, "last"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make(3).parameters()))
    assert config["model"] == SMALL and config["step"] == 3 and not model.training
    assert checkpoint.load_trainer(tmp_path / "last") == {"step": 3}
    assert checkpoint.load(tmp_path / "last").tokenizers["tokenizer"].decode([0, 2]) == "ac"
    assert sorted(os.listdir(tmp_path)) == ["last"]
    assert len({path.stat().st_mode for path in (tmp_path / "last").iterdir()}) == 1  # the same file permissions


def test_files_that_cannot_be_deleted_do_not_end_a_run(tmp_path, monkeypatch):
    """NFS keeps files that are open. A later save deletes them."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors: None)
        for step in (1, 2, 3):
            save(tmp_path, step)
    assert checkpoint.read_config(checkpoint.find(tmp_path, "last"))["step"] == 3
    save(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ["last", "last.old"]


def test_tokenizers_are_kept_by_name(tmp_path):
    save(tmp_path, 1, tokenizers={"tokenizer": CharTokenizer("abc"), "tokenizer_target": ByteTokenizer()})
    found = checkpoint.load(tmp_path / "last").tokenizers
    assert {name: tokenizer.kind for name, tokenizer in found.items()} == {"tokenizer": "char",
                                                                          "tokenizer_target": "byte"}
    (tmp_path / "last" / "tokenizer_target.json").unlink()
    with pytest.raises(UserError, match="tokenizer_target.json is missing"):
        checkpoint.load(tmp_path / "last")


def test_the_preferred_checkpoint_is_found(tmp_path):
    assert checkpoint.find(tmp_path, "last") is None and not checkpoint.is_run(tmp_path)
    with pytest.raises(UserError, match="there is no checkpoint in .*: train one first"):
        checkpoint.find_any(tmp_path)
    save(tmp_path, 1, "last")
    assert checkpoint.find_any(tmp_path, "best").name == "last"
    save(tmp_path, 2, "best")
    assert [checkpoint.find_any(tmp_path, name).name for name in ("best", "last")] == ["best", "last"]
    shutil.copytree(tmp_path / "best", tmp_path / "copies" / "kept")
    for folder in (tmp_path / "last", tmp_path / "best", tmp_path / "copies" / "kept"):
        assert checkpoint.find_any(folder) == folder and checkpoint.is_run(folder)
    assert checkpoint.is_run(tmp_path) and not checkpoint.is_run(tmp_path / "copies")


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.write_text(""), "SHA256SUMS is damaged .its end is missing"),
    (lambda path: path.write_bytes(bytes(range(256))), "SHA256SUMS is damaged .its end is missing"),
    (lambda path: path.unlink(), "SHA256SUMS is missing"),
], ids=["empty", "bytes", "gone"])
def test_a_damaged_checksum_file_is_named(damage, message, tmp_path):
    with checkpoint.Writer(tmp_path, background=False) as writer:
        writer.save(["best"], make(1), {"tokenizer": CharTokenizer("abc")}, {"settings": {}, "step": 1}, {})
    damage(tmp_path / "best" / "SHA256SUMS")
    for name in (tmp_path / "best", tmp_path):
        with pytest.raises(UserError, match=message):
            checkpoint.load(checkpoint.find_any(name))


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    save(tmp_path, 1)
    for write in (lambda file: pickle.dump(Evil(), file, protocol=2), lambda file: torch.save({"step": Evil()}, file)):
        with open(tmp_path / "last" / "trainer.pt", "wb") as file:
            write(file)
        seal(tmp_path / "last")
        with pytest.raises(UserError, match="trainer.pt can't be read"):
            checkpoint.load_trainer(tmp_path / "last")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_shape_are_named(tmp_path):
    save(tmp_path, 1)
    state = checkpoint.load(tmp_path / "last").state
    wider = checkpoint.unfilled(GPT, GPTConfig(**{**SMALL, "vocab_size": 5}), "cpu")
    state["surprise"] = state.pop("wpe.weight")
    with pytest.raises(UserError) as error:
        checkpoint.fill(wider, state, "out")
    said = str(error.value)
    assert said.startswith("the weights of out do not fit: Missing key(s)") and "\n" not in said
    assert all(name in said for name in ('"wpe.weight"', '"surprise"', "size mismatch for wte.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_that_a_model_computes_keep_their_values(dtype):
    class Rotary(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.linear = torch.nn.Linear(size, size)
            self.register_buffer("angles", torch.arange(size, device="cpu") / 7, persistent=False)
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    model = checkpoint.unfilled(Rotary, 5, "cpu", dtype)
    assert model.linear.weight.dtype == dtype and model.linear.weight.shape == (5, 5) and model.seen.dtype == torch.long
    assert model.angles.dtype == torch.float32 and torch.equal(model.angles, torch.arange(5) / 7)
    checkpoint.fill(model, {"linear.weight": torch.eye(5), "linear.bias": torch.ones(5), "seen": torch.tensor(3)}, "x")
    assert torch.equal(model.linear.weight, torch.eye(5, dtype=dtype)) and model.seen == 3


def test_an_optimizer_keeps_its_own_options_when_its_state_is_loaded(tmp_path):
    def stepped(**options):
        model = make(1)
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        model(torch.tensor([[0, 1, 2]])).sum().backward()
        optimizer.step()
        return optimizer

    saved = stepped(weight_decay=0.1).state_dict()
    other = torch.optim.AdamW(make(2).parameters(), weight_decay=50.0)
    checkpoint.load_optimizer(other, saved, tmp_path)
    torch.testing.assert_close(other.state_dict()["state"], saved["state"], atol=0, rtol=0)
    assert other.param_groups[0]["weight_decay"] == 50.0
    with pytest.raises(UserError, match="trainer.pt holds the optimizer state of other parameters"):
        checkpoint.load_optimizer(torch.optim.AdamW([make(1).wte.weight]), saved, tmp_path)
