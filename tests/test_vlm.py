"""vlm.py and published PaliGemma checkpoints, against transformers on tiny random ones that are written here."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import checkpoint
import vlm
from configurator import UserError
from model import count_parameters, generate, init_weights, rotary, rotate
from vlm import Box, Gemma, GemmaConfig, PaliGemma, PaliGemmaConfig, ViTConfig

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

N, SIZE, VOCAB, IMAGE = 4, 28, 1300, 103  # image tokens, pixels, tokens, the id of <image>
VISION = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=2, image_size=SIZE, patch_size=14, vision_use_head=False)
TEXT = dict(model_type="gemma", hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=10, vocab_size=VOCAB)
CLOSE = dict(atol=1e-4, rtol=0)


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
    return checkpoint.load_published(str(folder))


@pytest.fixture(scope="module")
def ours(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def processor(folder):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<bos>",
                                                eos_token="<eos>", pad_token="<pad>", padding_side="left")
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    images.image_seq_length = N
    return transformers.PaliGemmaProcessor(images, fast)


def make_images(count=3, seed=0):
    return torch.rand(count, 3, SIZE, SIZE, generator=seeded(seed)) * 2 - 1


def make_prompts(tokenizer):
    return [vlm.encode_prompt(tokenizer, prompt).tolist() for prompt in ("caption en", "detect cat ; dog", "ocr")]


def their_inputs(images, prompts):
    """The same batch for transformers: image tokens in the text, padding before them."""
    T = max(map(len, prompts))
    ids = [[0] * (T - len(row)) + [IMAGE] * N + row for row in prompts]
    ids = torch.tensor(ids)
    return dict(input_ids=ids, pixel_values=images, token_type_ids=torch.zeros_like(ids),
                attention_mask=torch.tensor([[0] * (T - len(row)) + [1] * (N + len(row)) for row in prompts]))


# ----------------------------------------------------------------------------------------------------------------------
# Models

@torch.no_grad()
def test_siglip_features_equal_transformers(ours, theirs):
    images = make_images()
    expected = theirs.model.vision_tower(images).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.vision(images), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_gemma_logits_equal_transformers_uncached_and_cached(n_kv_head):
    config = transformers.GemmaConfig(**{**TEXT, "num_key_value_heads": n_kv_head})
    theirs = randomize(transformers.GemmaForCausalLM(config))
    model = Gemma(GemmaConfig(n_layer=2, n_head=4, n_kv_head=n_kv_head, head_dim=10, n_embd=24, n_hidden=40,
                              vocab_size=VOCAB, block_size=32)).eval()
    state = {name.replace("language_model.model.", "model."): p for name, p in (
        (checkpoint.published_name(f"decoder.{name}"), p) for name, p in model.state_dict().items())}
    for name, p in state.items():
        p.copy_(theirs.state_dict()[name])
    tokens = torch.randint(VOCAB, (2, 9), generator=seeded())
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(tokens), expected, **CLOSE)
    caches = model.make_caches(2, 9)
    parts = [model(tokens[:, a:b], caches=caches, start=a) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    shifted = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), shifted, **CLOSE)
    greedy = torch.stack(list(generate(model, tokens[:, :3], 6, temperature=0)), dim=1)
    torch.testing.assert_close(greedy, theirs.generate(tokens[:, :3], max_new_tokens=6, do_sample=False,
                                                       eos_token_id=None, pad_token_id=0)[:, 3:])


@torch.no_grad()
def test_paligemma_prefill_and_every_decode_step_equal_transformers(ours, theirs, tokenizer):
    image, prompt = make_images(1), make_prompts(tokenizer)[:1]
    inputs, T = their_inputs(image, prompt), len(prompt[0])
    expected = theirs(**inputs, use_cache=True)
    tokens = torch.tensor(prompt)
    torch.testing.assert_close(ours(image, tokens), expected.logits[:, N:], **CLOSE)
    caches = ours.make_caches(1, N + T + 8)
    x = ours.hidden(tokens, ours.encode(image), caches=caches)
    torch.testing.assert_close(ours.decoder.logits(x), expected.logits[:, N:], **CLOSE)
    for step in range(8):
        token = torch.tensor([[(7 * step + 11) % VOCAB]])
        expected = theirs(input_ids=token, past_key_values=expected.past_key_values, use_cache=True)
        x = ours.hidden(token, caches=caches, start=N + T + step)
        torch.testing.assert_close(ours.decoder.logits(x), expected.logits, **CLOSE)


@torch.no_grad()
def test_training_mask_and_loss_equal_transformers(ours, theirs, processor, tokenizer):
    """Two rows whose prefixes and answers differ in length: padded on the left there, on the right here."""
    prefixes, answers = ["caption en", "ocr"], ["cat", "two dogs"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    batch = processor(images=[picture, picture], text=prefixes, suffix=answers, return_tensors="pt", padding=True)
    expected = theirs(**batch)
    rows = [vlm.encode_prompt(tokenizer, prefix).tolist() for prefix in prefixes]
    ends = [[*tokenizer.encode(answer).tolist(), tokenizer.eos] for answer in answers]
    T = max(len(row) + len(end) for row, end in zip(rows, ends))
    tokens, targets = torch.zeros(2, T, dtype=torch.long), torch.full((2, T), -100)
    for i, (row, end) in enumerate(zip(rows, ends)):
        tokens[i, :len(row) + len(end)] = torch.tensor(row + end)
        targets[i, len(row) - 1:len(row) + len(end) - 1] = torch.tensor(end)
    images = torch.stack([vlm.pixels(picture, SIZE)] * 2)
    prefix = torch.tensor([len(row) for row in rows])
    logits = ours(images, tokens, prefix=prefix)
    for i, (row, end) in enumerate(zip(rows, ends)):
        length = len(row) + len(end)
        torch.testing.assert_close(logits[i, :length], expected.logits[i, -length:], **CLOSE)
    torch.testing.assert_close(ours(images, tokens, targets, prefix), expected.loss, **CLOSE)
    causal = ours(images, tokens, prefix=torch.zeros_like(prefix))
    assert (causal - logits).abs().max() > 0.1  # the prefix does look ahead


@torch.no_grad()
def test_padded_batch_equals_transformers_and_each_row_alone(ours, theirs, tokenizer):
    images, prompts = make_images(), make_prompts(tokenizer)
    expected = theirs(**their_inputs(images, prompts)).logits
    tokens, padding = vlm.pad_left(prompts)
    logits = ours(images, tokens, padding=padding)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[i, -len(prompt):], expected[i, -len(prompt):], **CLOSE)
        alone = ours(images[i:i + 1], torch.tensor([prompt]))
        torch.testing.assert_close(logits[i:i + 1, -len(prompt):], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_transformers(folder, theirs, ours, tokenizer):
    image, prompt = make_images(1), make_prompts(tokenizer)[:1]
    half, _ = checkpoint.load_published(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    their_half = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    inputs = their_inputs(image, prompt)
    exact = ours(image, torch.tensor(prompt))
    theirs_off = (their_half(**inputs).logits[:, N:].float() - exact).square().mean().sqrt()
    ours_off = (half(image, torch.tensor(prompt)) - exact).square().mean().sqrt()
    assert 0 < ours_off < 1.1 * theirs_off < 0.1 * exact.std()


def test_rotation_in_the_papers_form_is_ours_after_permuting_rows():
    """Su et al. (equation 15) turn neighbours (2i, 2i + 1), we turn (i, i + D/2): the same scores if q and k agree."""
    D, T, C = 8, 5, 12
    x = torch.randn(T, C, generator=seeded())
    q_proj, k_proj = torch.randn(2, D, C, generator=seeded(1))
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)  # (T, D/2)

    def paper(v):
        even, odd, cos, sin = v[:, 0::2], v[:, 1::2], angles.cos(), angles.sin()
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(1)

    order = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
    turn = rotary(torch.arange(T), D)
    expected = paper(x @ q_proj.T) @ paper(x @ k_proj.T).T
    scores = rotate(x @ q_proj[order].T, *turn) @ rotate(x @ k_proj[order].T, *turn).T
    torch.testing.assert_close(scores, expected, **CLOSE)
    unpermuted = rotate(x @ q_proj.T, *turn) @ rotate(x @ k_proj.T, *turn).T
    assert (unpermuted - expected).abs().max() > 0.1


def test_image_tokens_are_not_scaled_and_text_is(ours):
    images, tokens = make_images(1), torch.tensor([[5, 6]])
    seen = []
    hook = ours.decoder.transformer.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ours(images, tokens)
    hook.remove()
    torch.testing.assert_close(seen[0][:, :N], ours.encode(images))
    torch.testing.assert_close(seen[0][:, N:], ours.decoder.wte(tokens) * math.sqrt(24))


def test_a_paligemma_trains_from_its_initialisation():
    config = PaliGemmaConfig(ViTConfig(n_layer=1, n_head=2, n_embd=16, image_size=8, patch_size=4),
                             GemmaConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, vocab_size=30, block_size=32))
    model = PaliGemma(config)
    vlm.init_parts(model, seeded())
    again = PaliGemma(config)
    vlm.init_parts(again, seeded())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    tokens = torch.randint(30, (4, 6), generator=seeded())
    targets = tokens.roll(-1, 1)
    targets[:, :2] = -100
    batch = dict(images=torch.randn(4, 3, 8, 8, generator=seeded()), tokens=tokens, targets=targets,
                 prefix=torch.full((4,), 3))
    loss = model(**batch)
    assert loss.item() == pytest.approx(math.log(30), abs=0.3)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_its_own_checkpoint_loads_back(ours, tokenizer, tmp_path):
    checkpoint.save(tmp_path, "last", ours, tokenizer, {})
    model, its_tokenizer = checkpoint.load_initial(tmp_path, dropout=0.1)
    assert (model.config.vision.dropout, model.config.text.dropout) == (0.1, 0.1)
    assert dataclasses.replace(model.config, dropout=0.0) == ours.config
    assert its_tokenizer.encode("cat").tolist() == [102]
    for mine, saved in zip(ours.parameters(), model.parameters()):
        assert torch.equal(mine, saved)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and generation

def test_prompts_are_tokenized_as_transformers_does(processor, tokenizer):
    picture = Image.new("RGB", (9, 9))
    for prompt in ("caption en", "detect cat", "<loc0007> cat", "", "two lines\nof cats", "ends in one\n"):
        ids = processor(images=picture, text=f"<image>{prompt}", return_tensors="pt").input_ids[0].tolist()
        assert ids == [IMAGE] * N + vlm.encode_prompt(tokenizer, prompt).tolist()
    apart = [*tokenizer.encode("<bos>ends in one\n"), *tokenizer.encode("\n")]  # as the paper wants it
    assert vlm.encode_prompt(tokenizer, "ends in one\n").tolist() != apart
    assert vlm.encode_prompt(tokenizer, "detect cat").tolist() == [*tokenizer.encode("<bos>detect cat"),
                                                                  *tokenizer.encode("\n")]
    with pytest.raises(UserError, match="leave out <image>"):
        vlm.encode_prompt(tokenizer, "<image>caption en")


def test_locations_and_segments_are_one_token_each(tokenizer):
    ids = tokenizer.encode("<loc0000><loc1023><seg000><seg127>")
    assert ids.tolist() == [IMAGE + 1, IMAGE + 1024, IMAGE + 1025, IMAGE + 1152]
    assert tokenizer.decode(ids) == "<loc0000><loc1023><seg000><seg127>"
    assert (tokenizer.eos, tokenizer.vocab_size) == (1, IMAGE + 1153)


@torch.no_grad()
def test_greedy_answers_equal_transformers_token_for_token_padded_and_alone(ours, theirs, tokenizer):
    images, prompts = make_images(), make_prompts(tokenizer)
    inputs = their_inputs(images, prompts)
    expected = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    answers = torch.stack(list(vlm.generate(ours, images, prompts, 12, temperature=0)), dim=1)  # (B, 12)
    assert answers.tolist() == expected[:, inputs["input_ids"].size(1):].tolist()
    assert all(len(set(row)) > 7 for row in answers.tolist()) and answers.unique().numel() > 20
    for i, prompt in enumerate(prompts):
        alone = torch.cat(list(vlm.generate(ours, images[i:i + 1], [prompt], 12, temperature=0)))
        assert alone.tolist() == answers[i].tolist()


@torch.no_grad()
def test_a_row_that_ended_stays_ended_and_all_ended_stops(ours, tokenizer):
    images, prompts = make_images(), make_prompts(tokenizer)
    answers = torch.stack(list(vlm.generate(ours, images, prompts, 12, temperature=0)), dim=1)
    eos = next(token for token in answers[0, 2:].tolist() if token not in answers[1:])
    at = answers[0].tolist().index(eos)
    stopped = torch.stack(list(vlm.generate(ours, images, prompts, 12, temperature=0, eos=eos)), dim=1)
    assert stopped[0].tolist() == answers[0, :at].tolist() + [eos] * (12 - at)
    assert stopped[1:].tolist() == answers[1:].tolist()
    alone = list(vlm.generate(ours, images[:1], prompts[:1], 12, temperature=0, eos=eos))
    assert len(alone) == at + 1


@torch.no_grad()
def test_an_image_is_encoded_once_for_all_its_prompts_and_tokens(ours, tokenizer):
    image, prompts, batches = make_images(1), make_prompts(tokenizer), []
    hook = ours.vision.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    shared = torch.stack(list(vlm.generate(ours, image, prompts, 6, temperature=0)), dim=1)
    hook.remove()
    assert batches == [1]
    repeated = torch.stack(list(vlm.generate(ours, image.expand(3, -1, -1, -1), prompts, 6, temperature=0)), dim=1)
    assert shared.tolist() == repeated.tolist()


def test_sampling_obeys_its_limits_and_its_seed(ours, tokenizer):
    images, prompts = make_images(), make_prompts(tokenizer)

    def draw(seed, **how):
        return torch.stack(list(vlm.generate(ours, images, prompts, 6, **how, generator=seeded(seed))), dim=1).tolist()

    greedy = draw(0, temperature=0)
    assert draw(0, top_k=1) == draw(1, top_p=1e-9) == greedy
    assert draw(1) == draw(1) != draw(2)
    with pytest.raises(UserError, match="lower --max_new_tokens"):
        next(vlm.generate(ours, images, prompts, 9000))


# ----------------------------------------------------------------------------------------------------------------------
# Published checkpoints

@pytest.mark.parametrize("layout", ["first", "transformers 5", "transformers 5, inner", "with head and lm_head"])
@torch.no_grad()
def test_every_layout_loads(layout, folder, theirs, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAPPED_BYTES", 1000)  # several pieces for most tensors
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
    model, _ = checkpoint.load_published(str(tmp_path))
    assert model.config == ours.config and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters()))


@pytest.mark.parametrize("size, patches", [(None, 256), (448, 1024), (896, 4096)])
def test_sparse_configurations_mean_what_transformers_takes_them_for(size, patches):
    published = {  # as the files of google/paligemma-3b-pt-448 have it
        "model_type": "paligemma", "hidden_size": 2048, "image_token_index": 257152, "projection_dim": 2048,
        "text_config": {"hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma",
                        "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
                        "torch_dtype": "float32", "vocab_size": 257216},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                          "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "projection_dim": 2048,
                          "projector_hidden_act": "gelu_fast", "vision_use_head": False,
                          **({"image_size": size} if size else {})}}
    config = checkpoint.paligemma_config(published, "it")
    assert config.vision == ViTConfig(n_layer=27, n_head=16, n_embd=1152, n_hidden=4304, image_size=size or 224)
    assert config.text == GemmaConfig(n_layer=18, n_head=8, n_kv_head=1, head_dim=256, n_embd=2048, n_hidden=16384)
    assert config.vision.n_patches == patches
    with torch.device("meta"):
        assert count_parameters(PaliGemma(config)) == {256: 2923466480, 1024: 2924351216, 4096: 2927890160}[patches]
    bare = {"model_type": "paligemma", "text_config": {"model_type": "gemma"}, "vision_config": {}}
    theirs, mine = transformers.PaliGemmaConfig(**bare), checkpoint.paligemma_config(bare, "it")
    for section, part in (("vision_config", mine.vision), ("text_config", mine.text)):
        for ours, (key, _) in checkpoint.PALIGEMMA_SIZES[section].items():
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
    (lambda c: c.update(tie_word_embeddings=False), "tie_word_embeddings = False, but only True"),
    (lambda c: c["text_config"].update(vocab_size=1200), "has 1256 tokens, the model only 1200|another shape"),
], ids=["gemma2", "relu", "gelu", "bias", "rope", "untied", "vocabulary"])
def test_what_would_load_wrong_is_refused(change, message, folder, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_published(rewritten(folder, tmp_path, config=change))
    assert "\n" not in str(error.value)


def test_legacy_names_of_settings_are_understood(folder, ours, tmp_path):
    def older(config):
        config["text_config"].update(hidden_act="gelu", rope_theta=500.0)
        del config["text_config"]["rope_parameters"]

    model, _ = checkpoint.load_published(rewritten(folder, tmp_path, config=older))
    assert model.config.text == dataclasses.replace(ours.config.text, rope_theta=500.0)


def test_every_missing_unexpected_and_reshaped_key_is_named(folder, tmp_path):
    def damage(state):
        del state["language_model.model.layers.1.mlp.up_proj.weight"], state["vision_tower.post_layernorm.bias"]
        state["language_model.model.layers.0.extra"] = torch.zeros(1)
        state["multi_modal_projector.linear.bias"] = torch.zeros(3)

    with pytest.raises(UserError) as error:
        checkpoint.load_published(rewritten(folder, tmp_path, state=damage))
    assert str(error.value).endswith(
        "do not fit: missing ['language_model.model.layers.1.mlp.up_proj.weight',"
        " 'vision_tower.vision_model.post_layernorm.bias'], unexpected ['language_model.model.layers.0.extra'],"
        " of another shape ['multi_modal_projector.linear.bias [3] instead of [24]']")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="can't be read"):
        checkpoint.load_published(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saved_back_it_is_what_transformers_loads(dtype, folder, tokenizer, tmp_path):
    model, _ = checkpoint.load_published(str(folder), dtype=dtype)
    model.projector.bias.add_(0.5)  # as if trained
    checkpoint.save_published(model, tokenizer, tmp_path, shard_size=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    theirs, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == dtype and theirs.config.image_token_id == IMAGE
    image, prompt = make_images(1), make_prompts(tokenizer)[:1]
    logits, expected = model(image, torch.tensor(prompt)), theirs.eval()(**their_inputs(image, prompt)).logits[:, N:]
    torch.testing.assert_close(logits, expected.float(), atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0)
    again, its_tokenizer = checkpoint.load_published(str(tmp_path), dtype=dtype)
    assert again.config == model.config and its_tokenizer.vocab_size == tokenizer.vocab_size
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_saved_back_it_has_the_processor_that_transformers_loads(ours, tokenizer, tmp_path):
    checkpoint.save_published(ours, tokenizer, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is transformers.PaliGemmaProcessor and len(processor.tokenizer) == tokenizer.vocab_size
    image, prompts = picture("RGB"), ["caption en", "detect cat ; dog"]
    batch = processor(images=[image, image], text=[f"<image>{prompt}" for prompt in prompts], return_tensors="pt",
                      padding=True)
    rows = [vlm.encode_prompt(tokenizer, prompt).tolist() for prompt in prompts]
    assert batch.input_ids.tolist() == their_inputs(None, rows)["input_ids"].tolist()
    torch.testing.assert_close(batch.pixel_values[1], vlm.pixels(image, SIZE), atol=1e-6, rtol=0)
    ids = [processor.tokenizer.eos_token_id, processor.tokenizer.bos_token_id, processor.tokenizer.pad_token_id]
    assert ids == [1, 2, 0] and processor.decode(rows[0]) == tokenizer.decode(rows[0])


# ----------------------------------------------------------------------------------------------------------------------
# Images and boxes

def picture(mode):
    values = np.random.default_rng(0).integers(0, 256, (40, 33, 4), dtype=np.uint8)
    rgba = Image.fromarray(values, "RGBA")
    if mode == "P with transparency":
        image = rgba.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        return image
    if mode == "RGB with transparency":
        image = rgba.convert("RGB")
        image.info["transparency"] = tuple(values[0, 0, :3].tolist())
        return image
    if mode == "RGBA":
        return rgba
    return rgba.convert("LA") if mode == "LA" else rgba.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "RGBA", "P", "P with transparency", "RGB with transparency",
                                  "CMYK", "YCbCr", "HSV", "F"])
@pytest.mark.parametrize("size", [28, 56])  # smaller and larger than the picture
def test_pixels_equal_the_reference_for_every_mode(mode, size):
    image = picture(mode)
    reference = SiglipImageProcessorPil(size={"height": size, "width": size})
    expected = reference(images=image, return_tensors="pt").pixel_values[0]
    got = vlm.pixels(image, size)
    assert got.dtype == torch.float32 and got.shape == (3, size, size)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_cut(mode):
    grey = np.random.default_rng(0).integers(0, 256, (40, 33), dtype=np.uint8)
    wide = grey.astype(np.uint16) * 257
    if mode == "I":
        image = Image.fromarray(wide.astype(np.int32))
    else:
        image = Image.frombytes(mode, (33, 40), wide.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert image.mode == mode
    torch.testing.assert_close(vlm.pixels(image, 28), vlm.pixels(Image.fromarray(grey), 28), atol=0, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_exif_says(orientation, tmp_path):
    from transformers.image_utils import load_image
    image, exif = picture("RGB"), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    expected = load_image(str(tmp_path / "photo.png"))
    assert vlm.read_image(tmp_path / "photo.png").tobytes() == expected.tobytes()
    assert (expected.size == image.size) == (orientation < 5)


def test_what_is_no_image_is_said_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    picture("RGB").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    for name in ("missing.png", "text.png", "cut.png"):
        with pytest.raises(UserError, match=f"image = .*{name}: can't be read"):
            vlm.read_image(tmp_path / name)


def test_boxes_are_parsed_into_pixels():
    answer = ("<loc0256><loc0128><loc0768><loc0512> cat ; <loc0000><loc0000><loc1023><loc1023> big dog;"
              "<loc0001><loc0002><loc0003><loc0004><seg001><seg127>  bird")
    boxes = vlm.parse_boxes(answer, width=200, height=100)
    assert boxes[0] == Box(25.0, 25.0, 100.0, 75.0, "cat")
    assert boxes[1] == Box(0, 0, 200 * 1023 / 1024, 100 * 1023 / 1024, "big dog")
    assert boxes[2].label == "bird" and len(boxes) == 3
    for nothing in ("", "a cat", "<loc0001><loc0002><loc0003> cat", "<loc0001><loc0002><loc0003><loc1024> cat",
                    "<loc0001><loc0002><loc0003><loc0004><loc0005> cat"):
        assert vlm.parse_boxes(nothing, 200, 100) == []
    text = " ; ".join(vlm.box_text(box, 200, 100) for box in boxes)
    assert vlm.parse_boxes(text, 200, 100) == boxes
    assert vlm.box_text(Box(-5, 0, 250, 100, "x"), 200, 100) == "<loc0000><loc0000><loc1023><loc1023> x"


def test_boxes_are_drawn_where_they_are():
    image = Image.new("L", (200, 100), 255)
    drawn = vlm.draw_boxes(image, [Box(20, 30, 120, 90, "cat"), Box(190, 95, 150, 60, ""), Box(5, 5, 15, 15, "cat")])
    assert image.getpixel((20, 60)) == 255  # a copy was drawn on
    assert drawn.mode == "RGB" and drawn.size == (200, 100)
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert [drawn.getpixel(at) for at in ((20, 60), (120, 60), (70, 90), (70, 60))] == [red, red, red, white]
    assert [drawn.getpixel(at) for at in ((150, 80), (190, 80), (5, 10))] == [blue, blue, red]
    label = np.array(drawn)[32:44, 22:40]
    assert (label == red).all(-1).any() and (label == white).all(-1).any()


# ----------------------------------------------------------------------------------------------------------------------
# Contrastive losses

def pairs(count=12, width=6):
    images, texts = torch.randn(2, count, width, generator=seeded(3))
    return [x.requires_grad_() for x in (images, texts, torch.tensor(1.2), torch.tensor(-0.7))]


def full_sigmoid_loss(images, texts, log_scale, bias):
    scores = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * log_scale.exp() + bias
    return -F.logsigmoid((2 * torch.eye(len(images)) - 1) * scores).sum() / len(images)


@pytest.mark.parametrize("block", [1, 5, 12, 100])
def test_blockwise_sigmoid_loss_equals_the_whole_with_its_gradients(block):
    inputs, references = pairs(), pairs()
    loss, expected = vlm.sigmoid_loss(*inputs, block=block), full_sigmoid_loss(*references)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for x, reference in zip(inputs, references):
        torch.testing.assert_close(x.grad, reference.grad)


def test_blocks_hold_no_more_than_their_share_of_scores():
    """What autograd keeps for the backward pass does not grow with the number of scores."""
    def kept(block):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            vlm.sigmoid_loss(*pairs(count=128, width=4), block=block)
        return sum(sizes)

    assert kept(32) < 128 * 128


def test_softmax_loss_equals_the_formula():
    images, texts, log_scale, _ = pairs()
    scores = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * log_scale.exp()
    rows, columns = scores.log_softmax(1).diagonal(), scores.log_softmax(0).diagonal()
    torch.testing.assert_close(vlm.softmax_loss(images, texts, log_scale), -(rows.mean() + columns.mean()) / 2)


WORKER = """
import torch, torch.distributed as dist, vlm
dist.init_process_group("gloo")
rank = dist.get_rank()
images, texts = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(3))
for loss, parameters in ((lambda *a: vlm.sigmoid_loss(*a, block=5), (1.2, -0.7)), (vlm.softmax_loss, (1.2,))):
    inputs = [x[6 * rank:6 * rank + 6].clone().requires_grad_() for x in (images, texts)]
    parameters = [torch.tensor(p, requires_grad=True) for p in parameters]
    value = loss(*inputs, *parameters)
    value.backward()
    print(value.item(), *(x for p in (*inputs, *parameters) for x in p.grad.flatten().tolist()))
dist.destroy_process_group()
"""


def test_two_ranks_have_the_loss_and_gradients_of_one():
    """Averaged over ranks, as DDP does: the rows' gradients count half, being on one rank only."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True, env={
        **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}) for rank in range(2)]
    results = [torch.tensor([[*map(float, line.split())] + [0.0] * (76 - len(line.split()))
                             for line in worker.communicate(timeout=60)[0].splitlines()]) for worker in workers]
    for row, (loss, inputs) in enumerate(((vlm.sigmoid_loss, pairs()), (vlm.softmax_loss, pairs()[:3]))):
        value = loss(*inputs)
        value.backward()
        mean = (results[0][row] + results[1][row]) / 2
        torch.testing.assert_close(mean[0], value.detach())
        for rank in range(2):
            mine = torch.cat([x.grad[6 * rank:6 * rank + 6].flatten() for x in inputs[:2]])
            torch.testing.assert_close(results[rank][row, 1:73] / 2, mine, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(mean[73:73 + len(inputs) - 2], torch.stack([x.grad for x in inputs[2:]]))


def test_initialisation_covers_convolutions():
    tower = vlm.ViT(ViTConfig(n_layer=1, n_head=2, n_embd=64, image_size=32, patch_size=8))
    init_weights(tower, 1, seeded())
    assert tower.patches.weight.std().item() == pytest.approx(0.02, rel=0.05) and tower.patches.bias.abs().max() == 0
