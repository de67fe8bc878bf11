"""The Llama layout, in and out: tiny random models of each family, compared with transformers."""

import dataclasses
import fnmatch
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import settings_for
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import sample
import tokenizer as tokenizers
import train
from configurator import UserError
from generate import generate, pick_tokens
from model import GPT, GPTConfig, init_weights
from published import files, llama
from run.cost import count_parameters
from sources import texts
from tasks.loading import load
from vlm import Gemma, GemmaConfig

transformers = pytest.importorskip("transformers")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PROMPT = "the king sees a "
BEGIN, END, TURN, VOCAB = 0, 1, 2, 310  # ids of control tokens; the tokenizer has 300 tokens, as in Qwen fewer
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=96, bos_token_id=BEGIN, eos_token_id=END, pad_token_id=END)
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 700.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
           "original_max_position_embeddings": 24}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
FAMILIES = {  # name: what differs from SIZES
    "llama": dict(model_type="llama", rope_parameters=LLAMA_3, tie_word_embeddings=True),
    "untied": dict(model_type="llama", rope_parameters=LINEAR, head_dim=10, tie_word_embeddings=False),
    "biases": dict(model_type="llama", attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh"),
    "mistral": dict(model_type="mistral", sliding_window=None, head_dim=6),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "gemma": dict(model_type="gemma", head_dim=10, num_key_value_heads=1)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def bpe(text):
    """A tokenizer like Llama 3's: each text begins with a control token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, special_tokens=special,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    begin = processors.TemplateProcessing(single=f"{special[BEGIN]} $A", special_tokens=[(special[BEGIN], BEGIN)])
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return bpe


@pytest.fixture(scope="module")
def families(tmp_path_factory, bpe):
    """{name: (folder, transformers' model)}: a checkpoint of each family, in several files."""
    made = {}
    for name, changes in FAMILIES.items():
        folder = tmp_path_factory.mktemp("hub") / name
        config = transformers.AutoConfig.for_model(**{**SIZES, **changes})
        theirs = transformers.AutoModelForCausalLM.from_config(config)
        for i, (key, p) in enumerate(theirs.named_parameters()):
            torch.nn.init.normal_(p, std=0.1 if "embed" in key else 0.8 if p.dim() == 1 else 0.3, generator=seeded(i))
        theirs.eval().save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        bpe.save(str(folder / "tokenizer.json"))
        made[name] = folder, theirs
    return made


@pytest.fixture(params=FAMILIES)
def family(request, families):
    return families[request.param]


def tokens_of(theirs, count=3, length=96):
    return torch.randint(3, theirs.config.vocab_size, (count, length), generator=seeded())


@torch.no_grad()
def test_logits_and_cached_steps_equal_those_of_transformers(family):
    folder, theirs = family
    ours, tokens = files.load(str(folder))[0], tokens_of(theirs)
    expected = theirs(tokens).logits
    assert expected.std() > 0.2  # large enough for the tolerance to mean something
    torch.testing.assert_close(ours(tokens), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    caches = ours.make_caches(3)
    pieces = [ours.hidden(tokens[:, a:b], caches, a) for a, b in ((0, 50), (50, 51), (51, 90), (90, 91))]
    torch.testing.assert_close(ours.logits(torch.cat(pieces, 1)), expected[:, :91], atol=3e-5, rtol=0)
    half = files.load(str(folder), dtype=torch.bfloat16)[0]
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(half.parameters(), ours.parameters()))
    theirs_half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    error, usual = (half(tokens) - expected).std(), (theirs_half(tokens).logits.float() - expected).std()
    assert error < 1.3 * usual  # rounding, as much as there


def test_gradients_equal_those_of_transformers(family):
    folder, theirs = family
    ours, tokens = files.load(str(folder))[0], tokens_of(theirs)
    ours(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    theirs.zero_grad()
    theirs(tokens, labels=tokens).loss.backward()
    gradients = {llama.first_name(name): p.grad for name, p in theirs.named_parameters()}
    named = dict(ours.named_parameters())
    assert {llama.source(name).name for name in named} == gradients.keys()
    for name, p in named.items():
        expected = gradients[llama.source(name).name]
        assert expected.abs().max() > 1e-5, name
        torch.testing.assert_close(p.grad, expected, atol=1e-4 * expected.abs().max().item(), rtol=0, msg=name)


@pytest.mark.parametrize("name, prompt", [*((name, PROMPT) for name in FAMILIES), ("llama", "")])
def test_greedy_text_equals_that_of_transformers(families, capsys, name, prompt):
    folder, theirs = families[name]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = torch.tensor([fast(prompt).input_ids])
    assert ids[0, 0] == BEGIN
    written = theirs.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=END)[0, ids.size(1):].tolist()
    written = written[:written.index(END)] if END in written else written
    sample.main(settings_for("text", "sampling", init_from=str(folder), prompt=prompt, temperature=0.0,
                             max_new_tokens=40, device="cpu"))
    assert capsys.readouterr().out == prompt + fast.decode(written) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# config.json

def rewritten(folder, to, state=lambda state: None, drop=(), **changes):
    """A copy of a published folder as one file, with changes. drop: keys to take out of config.json."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("model*"))
    config, weights = json.loads((folder / "config.json").read_text()), {}
    for shard in folder.glob("*.safetensors"):
        weights.update(load_file(shard))
    state(weights)
    save_file(weights, to / "model.safetensors")
    config = {key: value for key, value in config.items() if key not in drop}
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return str(to)


def spelt_out(config):
    """A configuration without the zeros that stand for another field."""
    return dataclasses.replace(config, n_kv_head=config.n_kv_head or config.n_head,
                               head_dim=config.head_dim or config.n_embd // config.n_head)


@pytest.mark.parametrize("kind", llama.DEFAULTS)
def test_missing_keys_have_the_defaults_of_transformers(kind):
    theirs = transformers.AutoConfig.for_model(kind)
    window = {"sliding_window": None} if kind == "mistral" else {}
    ours = spelt_out(llama.to_config({"model_type": kind, **window}, "it", 0, 0.0))
    full = {"head_dim": 128, **theirs.to_dict(), **window}  # a Qwen 2 has no such key
    assert [getattr(ours, field) for field in llama.SIZES] == [full[key] for key in llama.SIZES.values()]
    assert (ours.rope_theta, ours.rope_scaling) == (theirs.rope_parameters["rope_theta"], {})
    assert ours.mlp == llama.ACTIVATIONS[theirs.hidden_act]
    assert kind != "mistral" or llama.DEFAULTS[kind]["sliding_window"] == theirs.sliding_window
    assert llama.to_config(full, "it", 0, 0.0) == ours  # every key that transformers writes is known


PUBLISHED = {  # {what of config.json decides: the number of parameters that the model's page names}
    "HuggingFaceTB/SmolLM2-135M": (134_515_008, {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000, "rope_scaling": None, "rope_interleaved": False, "tie_word_embeddings": True,
        "vocab_size": 49152, "pretraining_tp": 1, "is_llama_config": True, "attention_bias": False}),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 8192},
        "tie_word_embeddings": True, "vocab_size": 128256, "mlp_bias": False}),
    "Qwen/Qwen2.5-0.5B": (494_032_768, {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "max_window_layers": 24,
        "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "vocab_size": 151936}),
    "mistralai/Mistral-7B-v0.3": (7_248_023_552, {
        "model_type": "mistral", "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": None,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "vocab_size": 32768}),
    "google/gemma-2b": (2_506_172_416, {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "hidden_act": "gelu",
        "hidden_activation": None, "vocab_size": 256000})}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_on_the_hub_give_models_of_their_size(name):
    count, theirs = PUBLISHED[name]
    with torch.device("meta"):
        assert count_parameters(llama.MODEL(llama.to_config(theirs, name, 64, 0.0))) == count


def test_older_configurations_are_understood(families, tmp_path):
    folder, _ = families["llama"]
    expected = files.load(str(folder))[0].config
    old = {key: value for key, value in LLAMA_3.items() if key != "rope_theta"}
    path = rewritten(folder, tmp_path / "old", drop=["rope_parameters", "dtype"], rope_theta=700.0, rope_scaling=old,
                     torch_dtype="float32", pretraining_tp=1, rope_interleaved=False, use_mrope=False,
                     _attn_implementation_autoset=True)
    assert files.load(path)[0].config == expected
    old = {"type": "linear", "factor": 2.0}
    theirs = {"model_type": "llama", "rope_scaling": old, "rope_theta": 7}
    config = llama.to_config(theirs, "it", 0, 0.0)
    assert (config.rope_theta, config.rope_scaling) == (7.0, {"factor": 2.0})


REFUSED = {  # what it is about: (family, changes of config.json, what the error says)
    "unknown family": ("llama", dict(model_type="qwen3"), "model_type = 'qwen3', but only gpt2, llama"),
    "activation": ("llama", dict(hidden_act="gelu"), "hidden_act = 'gelu', but only silu and gelu_pytorch_tanh"),
    "yarn": ("llama", dict(rope_parameters={**LINEAR, "rope_type": "yarn"}), "rope_type = 'yarn', but only default, l"),
    "dynamic": ("qwen2", dict(rope_scaling={"type": "dynamic", "factor": 2}), "rope_type = 'dynamic', but only"),
    "rope key": ("llama", dict(rope_parameters={**LINEAR, "mscale": 2}), "rope_parameters has 'mscale'"),
    "rope per layer": ("llama", dict(rope_parameters={"full_attention": LINEAR}), "has 'full_attention'"),
    "partial": ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    "partial inside": ("llama", dict(rope_parameters={**LINEAR, "partial_rotary_factor": 0.5}), "partial_rotary_fact"),
    "one bias": ("llama", dict(attention_bias=True), "attention_bias = True and mlp_bias = False"),
    "other bias": ("qwen2", dict(attention_bias=True), "attention_bias = True, which no qwen2"),
    "window": ("mistral", dict(sliding_window=95), "sliding_window = 95, but only .*--block_size=95"),
    "window of a qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=8), "sliding_window = 8"),
    "layers": ("qwen2", dict(layer_types=["full_attention", "sliding_attention"], sliding_window=8), "window = 8"),
    "other layers": ("qwen2", dict(layer_types=["linear_attention"] * 2), "layer_types has 'linear_attention'"),
    "a llama's window": ("llama", dict(sliding_window=8), "sliding_window = 8"),
    "soft-capping": ("gemma", dict(final_logit_softcapping=30.0), "final_logit_softcapping = 30.0, which no gemma"),
    "multiplier": ("llama", dict(residual_multiplier=0.22), "residual_multiplier = 0.22"),
    "quantized": ("llama", dict(quantization_config={"bits": 4}), "quantization_config = .'bits': 4"),
    "slices": ("llama", dict(pretraining_tp=2), "pretraining_tp = 2"),
    "experts": ("mistral", dict(num_local_experts=8), "num_local_experts = 8"),
    "normed queries": ("llama", dict(use_qk_norm=True), "use_qk_norm = True"),
    "both ways": ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention = True"),
    "not causal": ("llama", dict(is_causal=False), "is_causal = False"),
    "odd head": ("mistral", dict(head_dim=7), "head_dim = 7: rotary"),
    "no table": ("llama", dict(rope_parameters="default"), "config.json can't be used"),
    "text": ("llama", dict(hidden_size="32"), "hidden_size = '32', but it must be a whole number"),
    "16.0": ("gemma", dict(head_dim=16.0), "head_dim = 16.0, but it must be a whole number"),
    "yes": ("llama", dict(num_hidden_layers=True), "num_hidden_layers = True, but it must be a whole number"),
    "endless": ("llama", dict(vocab_size=float("inf")), "vocab_size = inf, but it must be a whole number"),
    "half": ("mistral", dict(max_position_embeddings=64.5), "max_position_embeddings = 64.5, but it must be a whole"),
    "half a window": ("mistral", dict(sliding_window=99.5), "sliding_window = 99.5, but it must be a whole number"),
    "no epsilon": ("llama", dict(rms_norm_eps=None), "rms_norm_eps = None, but it must be a finite number above 0"),
    "theta": ("llama", dict(rope_parameters={**LINEAR, "rope_theta": -1}), "rope_theta = -1, but it must be a finite"),
    "factor": ("llama", dict(rope_parameters={**LINEAR, "factor": 0}), "factor = 0, but it must be a finite number"),
    "no factor": ("llama", dict(rope_parameters={"rope_type": "linear"}), "factor = None, but it must be a finite"),
    "perhaps": ("llama", dict(tie_word_embeddings="no"), "tie_word_embeddings = 'no', but it must be true or false"),
    "several": ("llama", dict(model_type=["llama"]), r"model_type = .'llama'., but only gpt2, llama")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_nearly_a_llama_is_refused_by_name(case, families, tmp_path):
    name, changes, message = REFUSED[case]
    drop = ["rope_parameters"] if "rope_scaling" in changes else []
    path = rewritten(families[name][0], tmp_path / "near", drop=drop, **changes)
    with pytest.raises(UserError, match=message) as error:
        files.load(path)
    assert "\n" not in str(error.value)


def test_a_window_that_no_position_leaves_is_loaded(families, tmp_path):
    folder, theirs = families["mistral"]
    path = rewritten(folder, tmp_path / "window", sliding_window=40)
    ours, tokens = files.load(path, block_size=40)[0], tokens_of(theirs, length=40)
    assert (ours.config.context, files.load(path, block_size=20)[0].config.context) == (0, 40)  # published with 40
    slides = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), slides(tokens).logits, atol=1e-4, rtol=0)


def test_missing_and_unexpected_tensors_are_named(families, tmp_path):
    def damage(state):
        state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)  # as in Qwen 3
        del state["model.layers.1.mlp.gate_proj.weight"], state["lm_head.weight"]

    path = rewritten(families["untied"][0], tmp_path / "bad", damage)
    with pytest.raises(UserError, match="Missing.*blocks.1.mlp.gate_proj.*head.weight.*Unexpected.*0.self_attn.q_norm"):
        files.load(path)


def test_a_tied_head_and_old_tables_in_the_file_are_left_out(families, tmp_path):
    def add(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    folder, _ = families["llama"]
    model, expected = files.load(rewritten(folder, tmp_path / "old", add))[0], files.load(str(folder))[0]
    assert model.head is None and all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


def test_a_head_of_its_own_and_a_tensor_that_occurs_twice_are_refused(families, tmp_path):
    folder, _ = families["llama"]
    extra = torch.ones(VOCAB, 32)
    for i, (name, message) in enumerate((("lm_head.weight", "lm_head.weight is not the embedding: turn it off"),
                                         ("norm.weight", "was the same tensor"))):
        path = rewritten(folder, tmp_path / str(i), lambda state, name=name: state.update({name: extra}))
        with pytest.raises(UserError, match=message):
            files.load(path)


def test_shards_and_their_index_are_downloaded(families, tmp_path, monkeypatch):
    folder, _ = families["llama"]

    def download(name, patterns, setting):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=lambda _, names: [
            file for file in names if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)])
        return tmp_path

    monkeypatch.setattr(files, "download", download)
    assert files.load("someone/llama")[0].config == files.load(folder)[0].config


def test_weights_beside_the_ones_of_the_index_are_not_read(families, tmp_path):
    folder, _ = families["llama"]
    path = shutil.copytree(folder, tmp_path / "stale")
    shard = min(path.glob("*.safetensors"))
    save_file({key: tensor * 0 for key, tensor in load_file(shard).items()}, path / "model-00009-of-00009.safetensors")
    model, expected = files.load(path)[0], files.load(folder)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))
    index = path / "model.safetensors.index.json"
    for words, message in (("[]", "has no weight_map"), (None, "has no weights: model.safetensors or .*index.json")):
        index.unlink() if words is None else index.write_text(words)
        with pytest.raises(UserError, match=message):
            files.load(path)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer

def test_what_ends_a_text_is_kept_where_the_tokenizer_goes(families, tmp_path, bpe):
    folder, _ = families["llama"]
    path = tmp_path / "chat"
    shutil.copytree(folder, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [TURN, END, 250]}))
    its = files.load(str(path))[1]["tokenizer"]
    assert (its.eos, its.ends, its.start) == (TURN, [TURN, END], [BEGIN])  # 250 is no control token
    its.save(tmp_path / "saved.json")
    again = tokenizers.load(tmp_path / "saved.json")
    assert (again.eos, again.ends, again.start) == (TURN, [TURN, END], [BEGIN])
    assert Tokenizer.from_file(str(tmp_path / "saved.json")).encode(PROMPT).ids == bpe.encode(PROMPT).ids
    (path / "generation_config.json").unlink()
    assert tokenizers.build(str(path), None, None).ends == [END]  # from config.json
    transcript = tokenizers.Transcript(again)
    for token in (*again.encode("a b").tolist(), END, 50):
        transcript.append(token)
    assert str(transcript) == "a b" and transcript.ended


# ----------------------------------------------------------------------------------------------------------------------
# Training

@pytest.fixture(scope="module")
def words(families, tmp_path_factory, text):
    """A data set made with the tokenizer of the published models."""
    folder = tmp_path_factory.mktemp("data") / "words"
    (folder.parent / "words.txt").write_text(text, encoding="utf-8")
    texts.prepare([folder.parent / "words.txt"], folder, str(families["llama"][0]))
    return folder


def test_fine_tuning_goes_on_from_the_published_weights(families, words, tmp_path, tiny):
    folder, theirs = families["qwen2"]
    shutil.copytree(folder, tmp_path / "chat")
    (tmp_path / "chat" / "generation_config.json").write_text(json.dumps({"eos_token_id": [TURN, END]}))
    changes = dict(dataset=str(words), init_from=str(tmp_path / "chat"), max_iters=1, learning_rate=1e-30, min_lr=0.0,
                   lora_rank=2)
    train.main(settings_for("text", **{**tiny, **changes}, out_dir=str(tmp_path / "out")), {"block_size": 32})
    task, model, _ = load(tmp_path / "out" / "last")
    tokens = tokens_of(theirs, length=32)
    assert model.config.block_size == 32 and (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert (task.tokenizer.ends, task.tokenizer.start) == ([TURN, END], [BEGIN])


def test_training_keeps_a_window_and_sampling_all_positions(families, words, tmp_path, tiny, capsys):
    path = rewritten(families["llama"][0], tmp_path / "long", max_position_embeddings=131072)
    assert files.load(path)[0].config.block_size == 131072
    settings = dict(tiny, dataset=str(words), init_from=path, max_iters=1, batch_size=1, eval_tokens=2000)
    train.main(settings_for("text", **settings, out_dir=str(tmp_path / "out")), {})
    assert "has 131,072 positions: a run keeps 1,024" in capsys.readouterr().err
    model = load(tmp_path / "out")[1]
    assert model.config.block_size == 1024
    assert llama.to_published(model)[0]["max_position_embeddings"] == 131072
    with pytest.raises(UserError, match="block_size = 97: .* has only 96 positions"):
        files.load(str(families["llama"][0]), block_size=97)


# ----------------------------------------------------------------------------------------------------------------------
# Out

def publish(model, folder, bpe):
    """Writes what to_published says; files.save does more."""
    config, state = llama.to_published(model)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    bpe.save(str(folder / "tokenizer.json"))
    return folder


OWN = {  # settings of a GPT of our own
    "as the recipe": dict(norm="plain_rmsnorm", mlp="swiglu", n_kv_head=2, n_hidden=40),
    "gains of 1 + weight": dict(norm="rmsnorm", mlp="geglu", tied=False, rope_scaling={"factor": 2.0}),
    "biases": dict(norm="rmsnorm", mlp="swiglu", bias=True, head_dim=6, rope_theta=300.0),
    "biases of q, k, v": dict(norm="plain_rmsnorm", mlp="swiglu", qkv_bias=True, head_dim=10),
    "llama 3": dict(norm="plain_rmsnorm", mlp="swiglu",
                    rope_scaling={"factor": 8.0, "low": 1.0, "high": 4.0, "context": 20}),
    "gemma": None}


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_transformers_loads_a_model_of_our_own(name, tmp_path, bpe):
    sizes = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=VOCAB, block_size=64)
    changes = OWN[name]
    model = Gemma(GemmaConfig(**sizes)) if changes is None else GPT(GPTConfig(**sizes, positions="rotary", **changes))
    init_weights(model, seeded(), std=0.3)
    for i, p in enumerate(model.parameters()):
        if p.dim() == 1:
            p.add_(0.3 * torch.randn(p.shape, generator=seeded(i)))
    assert llama.misfit(model.config) == ""
    folder = publish(model.eval(), tmp_path / "ours", bpe)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tokens_of(theirs, length=64)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=2e-5, rtol=0)
    again = files.load(str(folder))[0]
    torch.testing.assert_close(again(tokens), model(tokens), atol=2e-5, rtol=0)
    steps = generate(model, tokens[:, :5], 20, pick_tokens_greedily)
    expected = theirs.generate(tokens[:, :5], max_new_tokens=20, do_sample=False)[:, 5:]
    assert np.array_equal(torch.stack(list(steps), 1), expected)


def pick_tokens_greedily(logits):
    return pick_tokens(logits, temperature=0.0)


def test_a_published_model_goes_out_as_it_came_in(family, tmp_path, bpe):
    folder, theirs = family
    model = files.load(str(folder))[0]
    again = transformers.AutoModelForCausalLM.from_pretrained(publish(model, tmp_path / "again", bpe))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters()))
    tokens = tokens_of(theirs)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_control_tokens_keep_their_roles(families, tmp_path):
    folder, _ = families["qwen2"]
    path = rewritten(folder, tmp_path / "chat", bos_token_id=TURN, pad_token_id=BEGIN, eos_token_id=END)
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": [[2], true, "x"]}')  # nothing usable
    model, its = files.load(path)
    its["tokenizer"].save(tmp_path / "kept.json")  # as in a checkpoint
    files.save(model, tokenizers.load(tmp_path / "kept.json"), tmp_path / "again")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    for has in (config, reader):
        assert (has.bos_token_id, has.pad_token_id, has.eos_token_id) == (TURN, BEGIN, END)


def test_settings_that_the_layout_cannot_hold_are_named():
    fits = dict(positions="rotary", norm="plain_rmsnorm", mlp="swiglu")
    for name, value in (("positions", "learned"), ("norm", "layernorm"), ("mlp", "relu2"), ("bigrams", True)):
        assert llama.misfit(GPTConfig(**{**fits, name: value})) == f"{name} = {value!r}"
    assert llama.misfit(GPTConfig()) == "positions = 'learned', norm = 'layernorm', mlp = 'gelu'"
    assert llama.misfit(GPTConfig(**fits)) == llama.misfit(GemmaConfig()) == ""
    assert llama.misfit(GemmaConfig(bias=True)) == "bias = True"
