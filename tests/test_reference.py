"""Against Hugging Face transformers: a tiny random GPT-2, written to disk in the published layout."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import checkpoint
import sample
import train
from configurator import UserError

transformers = pytest.importorskip("transformers")
PROMPT = "the king sees a "


@pytest.fixture(scope="module")
def published(tmp_path_factory, text):
    """(folder, their model): weights far from zero, so that a wrong mapping can't hide."""
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
    ours, tokenizer = checkpoint.load_published(str(folder))
    tokens = torch.randint(tokenizer.vocab_size, (3, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3  # a scale at which 1e-5 means something
        assert (ours(tokens) - expected).abs().max() < 1e-5
        cropped, _ = checkpoint.load_published(str(folder), block_size=20)
        assert (cropped(tokens[:, :20]) - expected[:, :20]).abs().max() < 1e-5


def test_shards_and_the_old_layout_of_the_hub_load_too(published, tmp_path):
    folder, theirs = published
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    # The hub's own gpt2 files have no "transformer." prefix, and carry the causal masks as buffers.
    old = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48) for i in range(3)}
    (tmp_path / "old").mkdir()
    checkpoint.save_file(old, tmp_path / "old" / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path / "old")
    expected = checkpoint.load_published(str(folder))[0].state_dict()
    for layout in ("shards", "old"):
        shutil.copy(folder / "tokenizer.json", tmp_path / layout)
        found = checkpoint.load_published(str(tmp_path / layout))[0].state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected), layout


def test_sampling_continues_as_transformers_does(published, capsys):
    folder, theirs = published
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    ids = fast(PROMPT, return_tensors="pt")
    expected = theirs.generate(**ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
    sample.main(sample.Settings(init_from=str(folder), prompt=PROMPT, temperature=0.0, max_new_tokens=30, device="cpu"))
    assert capsys.readouterr().out == fast.decode(expected[0]) + "\n"


def test_weights_that_do_not_fit_are_named(published, tmp_path):
    folder, theirs = published
    shutil.copytree(folder, tmp_path / "bad")
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    state["transformer.h.1.surprise"] = state.pop("transformer.h.2.ln_1.weight")
    checkpoint.save_file(state, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(UserError, match=r"missing \['transformer.blocks.2.ln_1.weight'\],"
                                        r" unexpected \['transformer.blocks.1.surprise'\]"):
        checkpoint.load_published(str(tmp_path / "bad"))


@pytest.mark.parametrize("key, value", [("activation_function", "relu"), ("model_type", "llama"),
                                        ("tie_word_embeddings", False)])
def test_other_models_are_refused_by_name(published, tmp_path, key, value):
    folder, _ = published
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=f"{key} = {value!r}, but only"):
        checkpoint.load_published(str(tmp_path / "other"))


def test_fine_tuning_starts_from_the_published_weights(published, tmp_path, text, tiny):
    import prepare
    import tokenizer as tokenizers
    folder, theirs = published
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    prepare.prepare([tmp_path / "words.txt"], tmp_path / "words", "bpe:350")
    (tmp_path / "words" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())  # same merges
    assert tokenizers.same_vocabulary(tokenizers.load(folder / "tokenizer.json"),
                                      tokenizers.load(tmp_path / "words" / "tokenizer.json"))
    given = {"block_size": 32}
    settings = train.Settings(**{**tiny, "dataset": str(tmp_path / "words"), "init_from": str(folder), "max_iters": 1,
                                 "learning_rate": 0.0, "min_lr": 0.0}, out_dir=str(tmp_path / "out"))
    train.main(settings, given)
    model, _, _ = checkpoint.load(tmp_path / "out" / "last")
    tokens = torch.arange(32)[None]
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-5
    with pytest.raises(UserError, match="n_layer = 2, but .* has 3: leave it out"):
        train.main(settings, {**given, "n_layer": 2})
