"""Models that go out: transformers computes the same with them, and they are published whole or not at all."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import settings_for
from PIL import Image
from test_crash import every_fault, no_fsync  # noqa: F401
from test_image_classification import make_pictures, prepared

import train
from configurator import UserError, parse
from lecture import Bigram, BigramConfig
from lora import merge_lora
from model import GPT, MLP, GPTConfig, init_weights
from published import check_publish, files
from run import pictures
from tasks.loading import load, publish
from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, same_vocabulary
from tools import publish as command
from vit import ImageClassifier, ImageClassifierConfig, ViTConfig

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PROMPT = "the king sees a "
LLAMA = dict(norm="plain_rmsnorm", mlp="swiglu", positions="rotary", n_kv_head=1, n_hidden=40)
MODELS = {  # name: (tokenizer of a text, parts of a GPT, the class that transformers has for it)
    "char, gelu": (lambda text: CharTokenizer(sorted(set(text))), {}, "GPT2LMHeadModel"),
    "byte, relu2, untied": (lambda text: ByteTokenizer(), dict(mlp="relu2", tied=False, n_hidden=24),
                            "GPT2LMHeadModel"),
    "bpe, bias": (lambda text: BPETokenizer.train([text], 300), dict(bias=True, norm_eps=1e-4), "GPT2LMHeadModel"),
    "bpe, qkv_bias": (lambda text: BPETokenizer.train([text], 300), dict(qkv_bias=True), "GPT2LMHeadModel"),
    "char, llama": (lambda text: CharTokenizer(sorted(set(text))), LLAMA, "LlamaForCausalLM"),
}


def make_model(tokenizer, **parts):
    """A GPT whose weights, biases and gains are large, so that a wrong one changes the logits."""
    model = GPT(GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 48, "vocab_size":
                             tokenizer.vocab_size, **parts}))
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.4, generator=torch.Generator().manual_seed(i))
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def case(request, text, tmp_path_factory):
    """(our model, its tokenizer, the folder that it was published in, the name of transformers' class)."""
    make_tokenizer, parts, name = MODELS[request.param]
    tokenizer, folder = make_tokenizer(text), tmp_path_factory.mktemp("out") / "model"
    model = make_model(tokenizer, **parts)
    files.save(model, tokenizer, folder)
    return model, tokenizer, folder, name


@torch.no_grad()
def test_transformers_computes_the_same_logits(case):
    model, tokenizer, folder, name = case
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and type(theirs).__name__ == name and theirs.dtype == torch.float32
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == tokenizer.eos  # None: a tokenizer without
    tokens = torch.randint(tokenizer.vocab_size, (3, 48), generator=torch.Generator().manual_seed(0))
    expected = theirs.eval()(tokens).logits
    assert expected.std() > 0.3  # large enough for the tolerance to mean something
    torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)
    again, its = files.load(folder)
    assert torch.equal(again(tokens), model(tokens)) and same_vocabulary(its["tokenizer"], tokenizer)


def test_transformers_writes_the_same_greedy_text(case):
    model, tokenizer, folder, _ = case
    task, again, _ = load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    batch = reader(PROMPT, return_tensors="pt", return_token_type_ids=False)
    written = theirs.generate(**batch, do_sample=False, max_new_tokens=20)[0]
    assert reader.decode(written) == task.write(again, PROMPT, temperature=0.0, max_new_tokens=20, top_k=200)
    longest = theirs.generate(**batch, do_sample=False)[0]  # by its generation settings, up to the last position
    assert len(longest) == 48


def test_transformers_reads_text_as_the_tokenizer_does(case, text):
    _, tokenizer, folder, _ = case
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(reader) == tokenizer.vocab_size
    for words in (text, " a  b ", "\n\n\nking", "", "lord s n t ,"[:9]):
        ids = reader(words)["input_ids"]
        assert ids == tokenizer.encode(words).tolist() and reader.decode(ids) == words


def test_a_published_model_is_complete_readable_by_all_and_of_one_dtype(tmp_path):
    tokenizer = ByteTokenizer()
    model = make_model(tokenizer).to(torch.bfloat16)
    files.save(model, tokenizer, tmp_path / "model", shard_size=10_000)
    names = set(os.listdir(tmp_path / "model"))
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert "model.safetensors.index.json" in names and len(names) > 7 and os.listdir(tmp_path) == ["model"]
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again, _ = files.load(tmp_path / "model", dtype=torch.bfloat16)
    assert theirs.dtype == torch.bfloat16 and again.config == dataclasses.replace(model.config, bias=True, n_hidden=64)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    files.save(again, tokenizer, tmp_path / "model")  # replaces the several files by one
    assert "model.safetensors.index.json" not in os.listdir(tmp_path / "model") and os.listdir(tmp_path) == ["model"]


# ----------------------------------------------------------------------------------------------------------------------
# What can't be published, and where

@pytest.mark.parametrize("model, message", [
    (GPT(GPTConfig(bigrams=True)), r"gpt2 can't hold bigrams = True"),
    (GPT(GPTConfig(qk_norm=True)), r"gpt2 can't hold qk_norm = True; the layout of llama .*, qk_norm = True"),
    (GPT(GPTConfig(positions="rotary", norm="layernorm")), r"gpt2 can't hold positions = 'rotary'"),
    (GPT(GPTConfig(norm="plain_rmsnorm", mlp="swiglu")), r"gpt2 can't hold norm = 'plain_rmsnorm', mlp = 'swiglu'"),
    (GPT(GPTConfig(n_kv_head=1, head_dim=16)), r"gpt2 can't hold n_kv_head = 1, head_dim = 16"),
    (Bigram(BigramConfig()), "no published layout holds the model Bigram, only GPT, Gemma, PaliGemma")],
    ids=["bigrams", "qk_norm", "rotary", "rmsnorm", "heads", "lecture"])
def test_a_model_that_no_layout_holds_is_refused_by_name(model, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        files.save(model, ByteTokenizer(), tmp_path / "model")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("parts", [{}, LLAMA])
@pytest.mark.parametrize("change", [dict(block="post"), dict(final_norm=False)])
def test_norms_in_other_places_are_refused(parts, change):
    with pytest.raises(UserError, match=f"can't hold .*{next(iter(change))} = "):
        files.layout(make_model(ByteTokenizer(), **parts, **change), ByteTokenizer())


def test_an_edited_block_is_published_with_a_line_that_says_so(monkeypatch, capsys):
    model = make_model(ByteTokenizer())
    files.layout(model, ByteTokenizer())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(MLP, "inner", lambda self, x: self.up_proj(x).relu())
    files.layout(model, ByteTokenizer())
    assert "the code of model.MLP was edited" in capsys.readouterr().err


def test_a_run_that_can_not_be_published_is_refused_before_it_trains(tmp_path, tiny):
    for parts in (dict(bigrams=True), dict(positions="rotary")):
        settings = settings_for("text", **tiny, **parts, out_dir=str(tmp_path / "run"), publish=str(tmp_path / "model"))
        with pytest.raises(UserError, match="can't be published"):
            train.main(settings, {})
        assert not (tmp_path / "run" / "log.jsonl").exists() and not (tmp_path / "model").exists()


def test_a_model_goes_to_a_new_folder_or_over_a_published_one(tmp_path, monkeypatch):
    ours, theirs = '{"model_type": "gpt", "settings": {}}', '{"architectures": ["X"]}'
    found = {"published": {"config.json": theirs, "model-00001-of-00002.safetensors": "", "tokenizer.json": ""},
             "noted": {"config.json": theirs, "README.md": ""}, "cloned": {"config.json": theirs, ".git": ""},
             "notes": {"notes.txt": ""}, "odd": {"config.json": "7"}, "halved": {"config.json": "{"},
             "checkpoint": {"config.json": ours, "model.safetensors": "", "SHA256SUMS": ""},
             "copied": {"config.json": ours, "model.safetensors": ""}, "empty": {}}
    for folder, content in found.items():
        (tmp_path / folder).mkdir()
        for name, words in content.items():
            (tmp_path / folder / name).write_text(words)
    monkeypatch.chdir(tmp_path)
    for name in ("", "new", "new/deeper", "empty", "published", "out/published"):
        check_publish(name, "out")
    for name, held in (("noted", "README.md"), ("cloned", ".git"), ("notes", "notes.txt"), ("odd", "config.json"),
                       ("halved", "config.json"), ("checkpoint", "SHA256SUMS"), ("copied", "config.json"),
                       (".", "checkpoint")):
        with pytest.raises(UserError, match=f"publish = {re.escape(name)}: holds {re.escape(held)}, so it is not just"):
            check_publish(name, str(tmp_path.parent / "elsewhere"))
    for name in ("out", "out/", "../" + tmp_path.name, "out/best", "out/last/x", "out/best.old", "out/run.json/x",
                 "empty"):
        with pytest.raises(UserError, match="the run in out needs that folder; name another"):
            check_publish(name, "out", "empty")  # it started from the last one
    (tmp_path / "mine.replaced").mkdir()
    (tmp_path / "mine.replaced" / "thesis.txt").touch()
    with pytest.raises(UserError, match="publish = mine: needs the name .*mine.replaced for a while"):
        check_publish("mine", "out")
    with pytest.raises(UserError, match="to = notes/notes.txt: is not a folder"):
        check_publish("notes/notes.txt", "out", setting="to")
    monkeypatch.setattr(os.path, "ismount", lambda path: path.endswith("volume"))
    for name in ("notes/notes.txt/x", "volume"):  # a file is in the way; a mounted folder
        with pytest.raises(UserError, match=f"publish = {name}: no folder can be made or replaced there"):
            check_publish(name, "out")


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_leaves_a_whole_model_or_none(before, tmp_path, no_fsync):  # noqa: F811
    tokenizer = CharTokenizer("ab")
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=2, block_size=4))
    init_weights(model)
    files.save(model, tokenizer, tmp_path / "before" / "model")

    def prepare(base):
        if before:
            shutil.copytree(tmp_path / "before", base)

    for _, base in every_fault(lambda base: files.save(model, tokenizer, base / "model"), prepare, tmp_path):
        place = base / "model"
        if before and not place.exists():
            with pytest.raises(UserError, match="model.unfinished is the new model, .*model.replaced the old one"):
                files.load(place)
            place = base / "model.replaced"
        if before or place.exists():
            assert torch.equal(files.load(place)[0].wte.weight, model.wte.weight)
        files.save(model, tokenizer, base / "model")  # the next one works as usual, and clears up
        assert os.listdir(base) == ["model"]


def test_a_full_disk_is_named_and_the_old_model_stays(tmp_path, monkeypatch):
    model = make_model(ByteTokenizer())
    files.save(model, ByteTokenizer(), tmp_path / "model")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(UserError, match="model can't be written: No space left on device"):
        files.save(model, ByteTokenizer(), tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"] and files.load(tmp_path / "model")


# ----------------------------------------------------------------------------------------------------------------------
# Runs

def test_a_run_publishes_its_best_model_and_another_run_starts_from_it(tmp_path, tiny, dataset, capsys):
    out_dir, folder = str(tmp_path / "run"), str(tmp_path / "model")
    train.main(settings_for("text", **tiny, out_dir=out_dir, publish=folder), {})
    assert f"published in {folder}" in capsys.readouterr().out
    task, model, _ = load(out_dir)
    _, again, _ = load(folder)
    tokens = torch.from_numpy(task.tokenizer.encode(PROMPT))[None]
    assert torch.equal(model(tokens), again(tokens))
    tuned = {**tiny, "lora_rank": 2, "max_iters": 4, "init_from": folder, "out_dir": str(tmp_path / "tuned")}
    train.main(settings_for("text", **{**tuned, "mlp": ""}), {})  # on the data set with characters
    for which in ("best", "last"):
        publish(tuned["out_dir"], folder, which)  # in the place of the first
        _, expected, _ = load(tuned["out_dir"], which=which)
        merge_lora(expected)
        _, found, _ = load(folder)
        assert torch.equal(found(tokens), expected(tokens)) and not torch.equal(found(tokens), model(tokens))


def test_the_command_publishes_a_finished_run(trained, tmp_path, capsys):
    settings, _ = parse(command.Settings, [f"--out_dir={trained}", f"--to={tmp_path / 'model'}", "--dtype=bfloat16"])
    command.main(settings)
    assert "published in" in capsys.readouterr().out
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["bos_token_id"] is None
    _, model, _ = load(trained)
    _, again, _ = load(tmp_path / "model")
    torch.testing.assert_close(again.wte.weight, model.wte.weight, atol=1e-2, rtol=1e-2)
    for words, message in (([f"--out_dir={trained}"], "name the folder to write: --to=FOLDER"),
                           ([f"--out_dir={tmp_path / 'none'}", "--to=x"], "there is no checkpoint in"),
                           ([f"--out_dir={trained}", f"--to={trained}"], "to = .*: the run in .* needs that folder"),
                           ([f"--out_dir={trained}", f"--to={Path(trained).parent}"], "needs that folder")):
        with pytest.raises(UserError, match=message):
            parse(command.Settings, words)


# ----------------------------------------------------------------------------------------------------------------------
# Classifiers of images

def write_pictures(folder):
    """Writes noisy pictures as files whose modes, shapes and formats differ. Returns their paths."""
    generator = np.random.default_rng(0)
    shapes = {"colour.png": (20, 31, 3), "grey.png": (8, 8), "large_grey.jpg": (50, 40), "small.bmp": (5, 3, 3),
              "transparent.png": (20, 9, 4), "grey_transparent.png": (9, 9, 2)}
    for name, shape in shapes.items():
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return [folder / name for name in shapes]


@torch.no_grad()
@pytest.mark.parametrize("parts", [{}, dict(mlp="gelu_erf", n_hidden=20, norm_eps=0.05, patch_size=2)])
def test_transformers_gives_the_same_logits_for_a_picture_file(parts, tmp_path):
    vision = ViTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "image_size": 8, "patch_size": 4, "cls": True,
                          **parts})
    model = ImageClassifier(ImageClassifierConfig(vision, ("T-shirt/top", "Bag", "bag"))).eval()
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.4, generator=torch.Generator().manual_seed(i))
    files.save(model, None, tmp_path / "model")
    theirs, info = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model",
                                                                                output_loading_info=True)
    assert not any(info.values()) and type(theirs).__name__ == "ViTForImageClassification"
    reader = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    namer = transformers.pipeline("image-classification", str(tmp_path / "model"))
    again, found = files.load(tmp_path / "model")
    assert found == {} and again.config.labels == model.config.labels
    for path in write_pictures(tmp_path):
        own = pictures.pixels(pictures.read_image(path), 8)[None]
        pixels = reader(Image.open(path), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels, own, atol=1.01 / 127.5, rtol=0)  # torchvision may round otherwise
        expected = model(own)
        assert expected.std() > 0.1 and torch.equal(again(own), expected)
        torch.testing.assert_close(theirs.eval()(own).logits, expected, atol=1e-5, rtol=0)
        if "transparent" not in path.name:
            named = {each["label"]: each["score"] for each in namer(str(path))}
            shares = dict(zip(model.config.labels, expected[0].softmax(-1).tolist()))
            assert named == pytest.approx(shares, abs=2e-3)


def test_a_run_with_pictures_is_published_or_refused_before_it_trains(tmp_path, capsys):
    prepared(make_pictures(tmp_path / "source"), tmp_path / "set")
    tiny = dict(dataset=str(tmp_path / "set"), n_layer=1, n_head=2, n_embd=16, patch_size=4, batch_size=8, max_iters=4,
                eval_interval=2, device="cpu", dtype="float32", sample_tokens=0)
    out_dir, folder = str(tmp_path / "run"), str(tmp_path / "model")
    train.main(settings_for("image-classification", **tiny, pool="first", out_dir=out_dir, publish=folder), {})
    assert f"published in {folder} as a vit" in capsys.readouterr().out
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(folder)[1](images), load(out_dir)[1](images))
    for changes, found in ((dict(stem=True), "pool = 'mean', stem = True"), ({}, "pool = 'mean'")):
        own = dict(tiny, **changes, out_dir=str(tmp_path / "mean"))
        message = f"the layout of vit can't hold {found}. Train one with --pool=first --stem=False$"
        with pytest.raises(UserError, match=message):
            train.main(settings_for("image-classification", **own, publish=str(tmp_path / "new")), {})
        assert not (tmp_path / "mean" / "log.jsonl").exists() and not (tmp_path / "new").exists()
    train.main(settings_for("image-classification", **own), {})
    with pytest.raises(UserError, match=message):
        command.main(parse(command.Settings, [f"--out_dir={tmp_path / 'mean'}", f"--to={tmp_path / 'new'}"])[0])
    train.main(settings_for("masked-patches", **tiny, out_dir=str(tmp_path / "masked")), {})
    with pytest.raises(UserError, match="no published layout holds the model MaskedPatches, only GPT, "):
        publish(tmp_path / "masked", tmp_path / "new")
