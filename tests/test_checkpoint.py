import os
import pickle
import shutil

import pytest
import torch

import checkpoint
from configurator import UserError
from model import GPT, GPTConfig, init_weights
from tokenizer import CharTokenizer


def make(seed):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=3))
    init_weights(model, 1, torch.Generator().manual_seed(seed))
    return model


def save(out_dir, seed, name="last"):
    checkpoint.save(out_dir, name, make(seed), CharTokenizer("abc"), {"step": seed}, {"step": seed})


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, 3)
    model, tokenizer, config = checkpoint.load(checkpoint.find(tmp_path, "last"), dropout=0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make(3).parameters()))
    assert model.config == GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=3, dropout=0.1)
    assert tokenizer.decode([0, 2]) == "ac" and config["step"] == 3 and not model.training
    assert checkpoint.load_trainer(tmp_path / "last") == {"step": 3}
    assert sorted(os.listdir(tmp_path)) == ["last"]


def test_which_checkpoint_is_taken(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint in .*: train one first"):
        checkpoint.find_any(tmp_path)
    save(tmp_path, 1, "last")
    assert checkpoint.find_any(tmp_path, "best").name == "last"
    save(tmp_path, 2, "best")
    assert [checkpoint.find_any(tmp_path, name).name for name in ("best", "last")] == ["best", "last"]
    assert checkpoint.find_any(tmp_path / "last") == tmp_path / "last"


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json", "tokenizer.json"])
def test_damage_is_named_without_checksums_too(tmp_path, name):
    save(tmp_path, 1)
    os.remove(tmp_path / "last" / "SHA256SUMS")
    whole = (tmp_path / "last" / name).read_bytes()
    for damaged in (whole[:len(whole) // 2], b""):
        (tmp_path / "last" / name).write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / "last")
            checkpoint.load_trainer(tmp_path / "last")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    save(tmp_path, 1)
    os.remove(tmp_path / "last" / "SHA256SUMS")
    for write in (lambda file: pickle.dump(Evil(), file, protocol=2), lambda file: torch.save({"step": Evil()}, file)):
        with open(tmp_path / "last" / "trainer.pt", "wb") as file:
            write(file)
        with pytest.raises(UserError, match="trainer.pt can't be read"):
            checkpoint.load_trainer(tmp_path / "last")
    assert not (tmp_path / "run").exists()


def test_foreign_weights_are_refused(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "last", tmp_path / "foreign")
    os.remove(tmp_path / "foreign" / "SHA256SUMS")
    path = tmp_path / "foreign" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"n_embd": 8', '"n_embd": 16'))
    with pytest.raises(UserError, match="of another shape .*'wte.weight'"):
        checkpoint.load(tmp_path / "foreign")
    path.write_text(text.replace('"gpt"', '"llama"'))
    with pytest.raises(UserError, match="is not a Quill checkpoint"):
        checkpoint.load(tmp_path / "foreign")
