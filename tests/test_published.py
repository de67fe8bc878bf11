"""Loading and saving of published PaliGemmas, compared with transformers on tiny random ones that are written here.

Published GPT-2s are in test_reference.py.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from configurator import UserError
from published import files, paligemma
from run import pictures
from run.cost import count_parameters
from vit import ViTConfig
from vlm import GemmaConfig, PaliGemma

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

N, SIZE, VOCAB, IMAGE = 4, 28, 1300, 103  # image tokens, pixels, tokens, the id of <image>
VISION = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=2, image_size=SIZE, patch_size=14, vision_use_head=False)
TEXT = dict(model_type="gemma", hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=10, vocab_size=VOCAB)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomize(model):
    """Larger weights than at initialisation, so that every path matters and answers are varied."""
    for i, (name, p) in enumerate(model.named_parameters()):
        std = 0.1 if "embed_tokens" in name else 1.0 if p.dim() == 1 else 0.3
        torch.nn.init.normal_(p, std=std, generator=seeded(i))
    return model.eval()


def make_tokenizer():
    """Characters, and runs of newlines as in Gemma's vocabulary; <image> has the id 103."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(33, 127)), "▁", "\n", "\n\n", "ca", "cat"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [("c", "a"), ("ca", "t")],
                                     unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.add_tokens(["\n", "\n\n"])
    return tokenizer


@pytest.fixture(scope="module")
def theirs():
    config = transformers.PaliGemmaConfig(vision_config=VISION, text_config=TEXT, image_token_index=IMAGE,
                                          projection_dim=24, hidden_size=24)
    return randomize(transformers.PaliGemmaForConditionalGeneration(config))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder, max_shard_size="40KB")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return files.load(str(folder))


@pytest.fixture(scope="module")
def ours(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]["tokenizer"]


def make_images(count=3, seed=0):
    return torch.rand(count, 3, SIZE, SIZE, generator=seeded(seed)) * 2 - 1


def make_picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8))


def encode(tokenizer, prompt):
    return tokenizer.encode_controls(f"<bos>{prompt}\n").tolist()


def their_inputs(images, prompts):
    """The same batch for transformers: image tokens in the text, padding before them."""
    T = max(map(len, prompts))
    ids = [[0] * (T - len(row)) + [IMAGE] * N + row for row in prompts]
    ids = torch.tensor(ids)
    return dict(input_ids=ids, pixel_values=images, token_type_ids=torch.zeros_like(ids),
                attention_mask=torch.tensor([[0] * (T - len(row)) + [1] * (N + len(row)) for row in prompts]))


@pytest.mark.parametrize("layout", ["first", "transformers 5", "transformers 5, inner", "with head and lm_head"])
@torch.no_grad()
def test_every_layout_loads(layout, folder, theirs, ours, tmp_path):
    if layout == "transformers 5, inner":
        theirs.save_pretrained(tmp_path, save_original_format=False)
    else:
        state = {}
        for shard in folder.glob("*.safetensors"):
            state.update(load_file(shard))
        assert any(name.startswith("vision_tower.encoder.") for name in state)  # what transformers 5 writes
        if layout != "transformers 5":
            state = {name.replace("vision_tower.", "vision_tower.vision_model."): p for name, p in state.items()}
        if layout == "with head and lm_head":
            state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"].clone()
            state["vision_tower.vision_model.head.probe"] = torch.zeros(1, 1, 32)
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    model, _ = files.load(str(tmp_path))
    assert model.config == ours.config and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters()))


@pytest.mark.parametrize("size, patches", [(None, 256), (448, 1024), (896, 4096)])
def test_missing_keys_of_a_configuration_have_transformers_defaults(size, patches):
    published = {  # as in google/paligemma-3b-pt-448
        "model_type": "paligemma", "hidden_size": 2048, "image_token_index": 257152, "projection_dim": 2048,
        "text_config": {"hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma",
                        "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
                        "torch_dtype": "float32", "vocab_size": 257216},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                          "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "projection_dim": 2048,
                          "projector_hidden_act": "gelu_fast", "vision_use_head": False,
                          **({"image_size": size} if size else {})}}
    config = paligemma.to_config(published, "it")
    assert config.vision == ViTConfig(n_layer=27, n_head=16, n_embd=1152, n_hidden=4304, image_size=size or 224)
    assert config.text == GemmaConfig(n_layer=18, n_head=8, n_kv_head=1, head_dim=256, n_embd=2048, n_hidden=16384)
    assert config.vision.n_patches == patches
    with torch.device("meta"):
        assert count_parameters(PaliGemma(config)) == {256: 2923466480, 1024: 2924351216, 4096: 2927890160}[patches]
    bare = {"model_type": "paligemma", "text_config": {"model_type": "gemma"}, "vision_config": {}}
    theirs, mine = transformers.PaliGemmaConfig(**bare), paligemma.to_config(bare, "it")
    for section, part in (("vision_config", mine.vision), ("text_config", mine.text)):
        for ours, (key, _) in paligemma.SIZES[section].items():
            assert getattr(part, ours) == getattr(getattr(theirs, section), key), key


def rewritten(folder, to, config=lambda config: None, state=lambda state: None):
    """A copy of a published folder as one file, with changes."""
    weights = {}
    for shard in folder.glob("*.safetensors"):
        weights.update(load_file(shard))
    settings = json.loads((folder / "config.json").read_text())
    config(settings)
    state(weights)
    save_file(weights, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(settings))
    (to / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    return str(to)


@pytest.mark.parametrize("change, message", [
    (lambda c: c["text_config"].update(model_type="gemma2"), "is a PaliGemma 2 .* use a PaliGemma 1"),
    (lambda c: c["text_config"].update(hidden_act="relu"), "text hidden_act = 'relu', but only 'gelu'"),
    (lambda c: c["vision_config"].update(hidden_act="gelu"), "vision hidden_act = 'gelu', but only"),
    (lambda c: c["text_config"].update(attention_bias=True), "attention_bias = True, but only False"),
    (lambda c: c["text_config"].update(rope_parameters={"rope_type": "linear"}), "rope_type = 'linear'"),
    (lambda c: c["vision_config"].update(image_size="28"), "image_size = '28', but it must be a whole number"),
    (lambda c: c.update(tie_word_embeddings=False), "tie_word_embeddings = False, but only True"),
    (lambda c: c["text_config"].update(vocab_size=1200), "has 1256 tokens, the model only 1200|another shape"),
], ids=["gemma2", "relu", "gelu", "bias", "rope", "size", "untied", "vocabulary"])
def test_configurations_that_we_cannot_compute_are_refused(change, message, folder, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        files.load(rewritten(folder, tmp_path, config=change))
    assert "\n" not in str(error.value)


def test_older_configurations_are_understood(folder, ours, tmp_path):
    def older(config):
        config["text_config"].update(hidden_act="gelu", rope_theta=500.0)
        del config["text_config"]["rope_parameters"]

    model, _ = files.load(rewritten(folder, tmp_path, config=older))
    assert model.config.text == dataclasses.replace(ours.config.text, rope_theta=500.0)


def test_every_missing_unexpected_and_reshaped_key_is_named(folder, tmp_path):
    def damage(state):
        del state["language_model.model.layers.1.mlp.up_proj.weight"], state["vision_tower.post_layernorm.bias"]
        state["language_model.model.layers.0.extra"] = torch.zeros(1)
        state["multi_modal_projector.linear.bias"] = torch.zeros(3)

    with pytest.raises(UserError) as error:
        files.load(rewritten(folder, tmp_path, state=damage))
    said = str(error.value)
    assert "do not fit: Missing key(s)" in said and "\n" not in said
    assert all(name in said for name in (
        '"decoder.transformer.blocks.1.mlp.up_proj.weight"', '"vision.transformer.ln_f.bias"',
        'Unexpected key(s) in state_dict: "language_model.model.layers.0.extra"', "size mismatch for projector.bias"))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="can't be read"):
        files.load(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_transformers_loads_a_saved_model(dtype, folder, tokenizer, tmp_path):
    model, _ = files.load(str(folder), dtype=dtype)
    model.projector.bias.add_(0.5)  # as if trained
    paligemma.save(model, tokenizer, tmp_path, shard_size=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    theirs, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == dtype and theirs.config.image_token_id == IMAGE
    image, prompt = make_images(1), [encode(tokenizer, "caption en")]
    logits, expected = model(image, torch.tensor(prompt)), theirs.eval()(**their_inputs(image, prompt)).logits[:, N:]
    torch.testing.assert_close(logits, expected.float(), atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0)
    again, its = files.load(str(tmp_path), dtype=dtype)
    assert again.config == model.config and its["tokenizer"].vocab_size == tokenizer.vocab_size
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_transformers_loads_the_processor_of_a_saved_model(ours, tokenizer, tmp_path):
    paligemma.save(ours, tokenizer, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is transformers.PaliGemmaProcessor and len(processor.tokenizer) == tokenizer.vocab_size
    image, prompts = make_picture(), ["caption en", "detect cat ; dog"]
    batch = processor(images=[image, image], text=[f"<image>{prompt}" for prompt in prompts], return_tensors="pt",
                      padding=True)
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    assert batch.input_ids.tolist() == their_inputs(None, rows)["input_ids"].tolist()
    torch.testing.assert_close(batch.pixel_values[1], pictures.pixels(image, SIZE), atol=1e-6, rtol=0)
    ids = [processor.tokenizer.eos_token_id, processor.tokenizer.bos_token_id, processor.tokenizer.pad_token_id]
    assert ids == [1, 2, 0] and processor.decode(rows[0]) == tokenizer.decode(rows[0])


def test_weights_in_a_bin_file_load_without_running_code(folder, ours, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    path = Path(rewritten(folder, tmp_path))
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    model, _ = files.load(str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters()))
    for write in (lambda: torch.save({"a": Evil()}, path / "pytorch_model.bin"),
                  lambda: (path / "pytorch_model.bin").write_bytes(b"nothing")):
        write()
        with pytest.raises(UserError, match="pytorch_model.bin is damaged, or holds more than tensors"):
            files.load(str(path))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_tokenizer_says_how_to_get_one(folder, tmp_path):
    path = Path(rewritten(folder, tmp_path))
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json: transformers writes it, .*save_pretrained"):
        files.load(str(path))
