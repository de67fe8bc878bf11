"""A tiny random GPT-2, saved by Hugging Face transformers, loads, samples and fine-tunes as there."""

import json
import shutil

import pytest
import torch
from conftest import settings_for
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sample
import train
from configurator import UserError
from published import files
from sources import texts
from tasks.loading import load

transformers = pytest.importorskip("transformers")
PROMPT = "the king sees a "


@pytest.fixture(scope="module")
def published(tmp_path_factory, text):
    """(folder, transformers' model). Its weights are large, so that a wrong mapping of names changes the logits."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-gpt2"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=350, special_tokens=["<|endoftext|>"],
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=48, vocab_size=len(fast),
                                     bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for i, p in enumerate(theirs.parameters()):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(folder)
    return folder, theirs


def test_logits_equal_those_of_transformers(published):
    folder, theirs = published
    ours, tokenizers = files.load(str(folder))
    tokens = torch.randint(tokenizers["tokenizer"].vocab_size, (3, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3  # large enough for the tolerance of 1e-5 to mean something
        assert (ours(tokens) - expected).abs().max() < 1e-5
        cropped, _ = files.load(str(folder), block_size=20)
        assert (cropped(tokens[:, :20]) - expected[:, :20]).abs().max() < 1e-5


def test_sharded_files_and_the_old_layout_of_the_hub_load_too(published, tmp_path):
    folder, theirs = published
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    # The hub's own gpt2 files have no "transformer." prefix, and carry the causal masks as buffers.
    old = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48) for i in range(3)}
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path / "old")
    expected = files.load(str(folder))[0].state_dict()
    for layout in ("shards", "old"):
        shutil.copy(folder / "tokenizer.json", tmp_path / layout)
        found = files.load(str(tmp_path / layout))[0].state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected), layout


def test_greedy_sampling_equals_transformers(published, capsys):
    folder, theirs = published
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    ids = fast(PROMPT, return_tensors="pt")
    expected = theirs.generate(**ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
    sample.main(settings_for("text", "sampling", init_from=str(folder), prompt=PROMPT, temperature=0.0,
                             max_new_tokens=30, device="cpu"))
    assert capsys.readouterr().out == fast.decode(expected[0]) + "\n"


def test_missing_and_unexpected_weights_are_named(published, tmp_path):
    folder, theirs = published
    shutil.copytree(folder, tmp_path / "bad")
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    state["transformer.h.1.surprise"] = state.pop("transformer.h.2.ln_1.weight")
    save_file(state, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(UserError, match="Missing.*blocks.2.ln_1.weight.*Unexpected.*transformer.h.1.surprise"):
        files.load(str(tmp_path / "bad"))


def test_weights_are_loaded_in_the_requested_dtype(published):
    expected = files.load(str(published[0]))[0].state_dict()
    found = files.load(str(published[0]), dtype=torch.bfloat16)[0].state_dict()
    assert all(torch.equal(found[name], expected[name].to(torch.bfloat16)) for name in expected)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(published, tmp_path):
    folder, theirs = published
    shutil.copytree(folder, tmp_path / "large")
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.add_tokens(["one more"])
    bpe.save(str(tmp_path / "large" / "tokenizer.json"))
    with pytest.raises(UserError, match="the tokenizer of .*large has 351 tokens, the model only 350"):
        files.load(str(tmp_path / "large"))


@pytest.mark.parametrize("key, value", [
    ("activation_function", "relu"), ("model_type", "qwen3"), ("n_inner", 64.0), ("tie_word_embeddings", None)])
def test_unsupported_models_are_refused(published, tmp_path, key, value):
    folder, _ = published
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=f"{key} = {value!r}, but (only|it must be)"):
        files.load(str(tmp_path / "other"))
    (tmp_path / "other" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="model_type = None, but only"):
        files.load(str(tmp_path / "other"))


def test_more_positions_than_learned_are_refused(published):
    with pytest.raises(UserError, match="block_size = 49: .* has learned only 48 positions"):
        files.load(str(published[0]), block_size=49)


def test_fine_tuning_starts_from_the_published_weights(published, tmp_path, text, tiny):
    folder, theirs = published
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    texts.prepare([tmp_path / "words.txt"], tmp_path / "words", "bpe:350")
    shutil.copy(folder / "tokenizer.json", tmp_path / "words")  # it has the same merges
    changes = dict(dataset=str(tmp_path / "words"), init_from=str(folder), max_iters=1, learning_rate=1e-30, min_lr=0.0)
    settings = settings_for("text", **{**tiny, **changes}, out_dir=str(tmp_path / "out"))
    train.main(settings, {"block_size": 32})
    _, model, _ = load(tmp_path / "out" / "last")
    tokens = torch.arange(32)[None]
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-5
    with pytest.raises(UserError, match="n_layer = 2, but .* has 3: leave it out"):
        train.main(settings, {"block_size": 32, "n_layer": 2})
