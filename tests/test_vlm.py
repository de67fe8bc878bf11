"""vlm.py: a tiny random PaliGemma against Hugging Face transformers, its caches and answers, and contrastive losses."""

import dataclasses
import functools
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vit
import vlm
from configurator import UserError
from generate import generate, pick_tokens
from model import GPTConfig, Rotary, init_weights, rotate
from published import files, paligemma
from run import checkpoint, pictures
from tasks.image_text import encode_prompt, pad_left
from tasks.loading import load
from vit import ViTConfig
from vlm import Gemma, GemmaConfig, PaliGemma, PaliGemmaConfig

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")
import test_published  # noqa: E402
from test_pictures import SiglipProcessor  # noqa: E402
from test_published import (  # noqa: E402
    IMAGE,
    SIZE,
    TEXT,
    VOCAB,
    N,
    make_images,
    randomize,
    seeded,
    their_inputs,
)

CLOSE = dict(atol=1e-4, rtol=0)
GREEDY = functools.partial(pick_tokens, temperature=0)


# The fixtures of test_published.py: a model in the published layout, and its tokenizer.
theirs, folder, loaded = test_published.theirs, test_published.folder, test_published.loaded
ours, tokenizer = test_published.ours, test_published.tokenizer


@pytest.fixture(scope="module")
def processor(folder):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<bos>",
                                                eos_token="<eos>", pad_token="<pad>", padding_side="left")
    images = SiglipProcessor(size={"height": SIZE, "width": SIZE})
    images.image_seq_length = N
    return transformers.PaliGemmaProcessor(images, fast)


def make_prompts(tokenizer):
    return [encode_prompt(tokenizer, prompt).tolist() for prompt in ("caption en", "detect cat ; dog", "ocr")]


@torch.inference_mode()
def answers(model, images, prompts, count):
    """The tokens of the greedy answers, (B, count)."""
    tokens, padding = pad_left(prompts)
    steps = generate(model, tokens, count, GREEDY, image=model.encode(images),
                     padding=padding if padding.any() else None)
    return torch.stack(list(steps), dim=1)


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
def test_gemma_logits_equal_transformers_with_and_without_caches(n_kv_head):
    config = transformers.GemmaConfig(**{**TEXT, "num_key_value_heads": n_kv_head})
    theirs = randomize(transformers.GemmaForCausalLM(config))
    model = Gemma(GemmaConfig(n_layer=2, n_head=4, n_kv_head=n_kv_head, head_dim=10, n_embd=24, n_hidden=40,
                              vocab_size=VOCAB, block_size=32)).eval()
    state = {name.replace("language_model.model.", "model."): p for name, p in (
        (paligemma.source(f"decoder.{name}").name, p) for name, p in model.state_dict().items())}
    for name, p in state.items():
        p.copy_(theirs.state_dict()[name])
    tokens = torch.randint(VOCAB, (2, 9), generator=seeded())
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(tokens), expected, **CLOSE)
    caches = model.make_caches(2, 9)
    parts = [model.logits(model.hidden(tokens[:, a:b], caches, a)) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    shifted = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]).mean(), shifted, **CLOSE)
    greedy = torch.stack(list(generate(model, tokens[:, :3], 6, GREEDY)), dim=1)
    torch.testing.assert_close(greedy, theirs.generate(tokens[:, :3], max_new_tokens=6, do_sample=False,
                                                       eos_token_id=None, pad_token_id=0)[:, 3:])


@torch.no_grad()
def test_paligemma_prefill_and_every_decode_step_equal_transformers(ours, theirs, tokenizer):
    image, prompt = make_images(1), make_prompts(tokenizer)[:1]
    inputs, T = their_inputs(image, prompt), len(prompt[0])
    expected = theirs(**inputs, use_cache=True)
    tokens = torch.tensor(prompt)
    torch.testing.assert_close(ours(image, tokens), expected.logits[:, N:], **CLOSE)
    caches = ours.make_caches(1, T + 8)
    x = ours.hidden(tokens, caches, image=ours.encode(image))
    torch.testing.assert_close(ours.logits(x), expected.logits[:, N:], **CLOSE)
    for step in range(8):
        token = torch.tensor([[(7 * step + 11) % VOCAB]])
        expected = theirs(input_ids=token, past_key_values=expected.past_key_values, use_cache=True)
        torch.testing.assert_close(ours.logits(ours.hidden(token, caches, T + step)), expected.logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("start", [lambda a, b: a, torch.arange], ids=["start is an int", "start is a tensor"])
def test_cached_outputs_equal_uncached_ones_after_an_image_and_padding(ours, tokenizer, start):
    """start is an int (the keys are the slots filled so far) or a tensor (all slots are keys, under a mask)."""
    tokens, padding = pad_left(make_prompts(tokenizer))
    image, caches, T = ours.encode(make_images()), ours.make_caches(3, tokens.size(1) + 6), tokens.size(1)
    answer = torch.randint(VOCAB, (3, 4), generator=seeded())
    row = dict(image=image, prefix=torch.full((3,), T), padding=padding)
    expected = ours.hidden(torch.cat((tokens, answer), dim=1), **row)[:, T:]
    ours.hidden(tokens, caches, image=image, padding=padding)
    for i in range(4):
        found = ours.hidden(answer[:, i:i + 1], caches, start(T + i, T + i + 1), image=image, padding=padding)
        torch.testing.assert_close(found[:, 0], expected[:, i], **CLOSE)


@torch.no_grad()
def test_training_mask_and_loss_equal_transformers(ours, theirs, processor, tokenizer):
    """Two rows whose prefixes and answers differ in length: transformers pads them on the left, we on the right."""
    prefixes, answers = ["caption en", "ocr"], ["cat", "two dogs"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    batch = processor(images=[picture, picture], text=prefixes, suffix=answers, return_tensors="pt", padding=True)
    expected = theirs(**batch)
    rows = [encode_prompt(tokenizer, prefix).tolist() for prefix in prefixes]
    ends = [[*tokenizer.encode(answer).tolist(), tokenizer.eos] for answer in answers]
    T = max(len(row) + len(end) for row, end in zip(rows, ends))
    tokens, targets = torch.zeros(2, T, dtype=torch.long), torch.full((2, T), -100)
    for i, (row, end) in enumerate(zip(rows, ends)):
        tokens[i, :len(row) + len(end)] = torch.tensor(row + end)
        targets[i, len(row) - 1:len(row) + len(end) - 1] = torch.tensor(end)
    images = torch.stack([pictures.pixels(picture, SIZE)] * 2)
    prefix = torch.tensor([len(row) for row in rows])
    logits = ours(images, tokens, prefix=prefix)
    for i, (row, end) in enumerate(zip(rows, ends)):
        length = len(row) + len(end)
        torch.testing.assert_close(logits[i, :length], expected.logits[i, -length:], **CLOSE)
    nats = ours(images, tokens, targets, prefix=prefix)
    assert (nats[targets == -100] == 0).all()
    torch.testing.assert_close(nats.sum() / (targets != -100).sum(), expected.loss, **CLOSE)
    places = torch.tensor([[len(row) - 1, len(row)] for row in rows])  # only these positions go through the head
    torch.testing.assert_close(ours(images, tokens, targets.gather(1, places), places, prefix), nats.gather(1, places))
    causal = ours(images, tokens, prefix=torch.zeros_like(prefix))
    assert (causal - logits).abs().max() > 0.1  # the prefix does attend to later tokens


@torch.no_grad()
def test_a_padded_batch_equals_transformers_and_each_row_alone(ours, theirs, tokenizer):
    images, prompts = make_images(), make_prompts(tokenizer)
    expected = theirs(**their_inputs(images, prompts)).logits
    tokens, padding = pad_left(prompts)
    logits = ours.logits(ours.hidden(tokens, image=ours.encode(images), padding=padding))
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[i, -len(prompt):], expected[i, -len(prompt):], **CLOSE)
        alone = ours(images[i:i + 1], torch.tensor([prompt]))
        torch.testing.assert_close(logits[i:i + 1, -len(prompt):], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_in_transformers(folder, theirs, ours, tokenizer):
    image, prompt = make_images(1), make_prompts(tokenizer)[:1]
    half, _ = files.load(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    their_half = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    inputs = their_inputs(image, prompt)
    exact = ours(image, torch.tensor(prompt))
    theirs_off = (their_half(**inputs).logits[:, N:].float() - exact).square().mean().sqrt()
    ours_off = (half(image, torch.tensor(prompt)) - exact).square().mean().sqrt()
    assert 0 < ours_off < 1.1 * theirs_off < 0.1 * exact.std()


def test_rotation_as_in_the_paper_equals_ours_with_permuted_rows():
    """Su et al. (equation 15) rotate pairs (2i, 2i + 1), we (i, i + D/2). With q and k permuted, scores agree."""
    D, T, C = 8, 5, 12
    x = torch.randn(T, C, generator=seeded())
    q_proj, k_proj = torch.randn(2, D, C, generator=seeded(1))
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)  # (T, D/2)

    def paper(v):
        even, odd, cos, sin = v[:, 0::2], v[:, 1::2], angles.cos(), angles.sin()
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(1)

    order = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
    table = Rotary(GPTConfig(positions="rotary", head_dim=D, block_size=T))
    turn = table(None, slice(T))[1]
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
    vit.init_parts(model, seeded())
    again = PaliGemma(config)
    vit.init_parts(again, seeded())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    tokens = torch.randint(30, (4, 6), generator=seeded())
    targets = tokens.roll(-1, 1)
    targets[:, :2] = -100
    batch = dict(images=torch.randn(4, 3, 8, 8, generator=seeded()), tokens=tokens, targets=targets,
                 prefix=torch.full((4,), 3))
    loss = model(**batch).sum() / (targets != -100).sum()
    assert loss.item() == pytest.approx(math.log(30), abs=0.3)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_saved_checkpoint_loads_back(ours, tokenizer, tmp_path):
    config = {"model_type": "paligemma", "model": dataclasses.asdict(ours.config), "settings": {"task": "image-text"}}
    with checkpoint.Writer(tmp_path, background=False) as writer:
        writer.save(["last"], ours, {"tokenizer": tokenizer}, config, {})
    task, model, _ = load(tmp_path / "last", dropout=0.1)
    assert (model.config.vision.dropout, model.config.text.dropout) == (0.1, 0.1)
    assert dataclasses.replace(model.config, dropout=0.0) == ours.config
    assert task.tokenizer.encode("cat").tolist() == [102]
    for mine, saved in zip(ours.parameters(), model.parameters()):
        assert torch.equal(mine, saved)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and generation

def test_prompts_are_tokenized_as_transformers_does(processor, tokenizer):
    picture = Image.new("RGB", (9, 9))
    for prompt in ("caption en", "detect cat", "<loc0007> cat", "", "two lines\nof cats", "ends in one\n"):
        ids = processor(images=picture, text=f"<image>{prompt}", return_tensors="pt").input_ids[0].tolist()
        assert ids == [IMAGE] * N + encode_prompt(tokenizer, prompt).tolist()
    apart = [*tokenizer.encode_controls("<bos>ends in one\n"), *tokenizer.encode("\n")]  # as in the paper
    assert encode_prompt(tokenizer, "ends in one\n").tolist() != apart
    assert encode_prompt(tokenizer, "detect cat").tolist() == [*tokenizer.encode_controls("<bos>detect cat"),
                                                                  *tokenizer.encode("\n")]
    with pytest.raises(UserError, match="leave out <image>"):
        encode_prompt(tokenizer, "<image>caption en")


def test_each_location_or_segment_is_one_token(tokenizer):
    ids = tokenizer.encode_controls("<loc0000><loc1023><seg000><seg127>")
    assert ids.tolist() == [IMAGE + 1, IMAGE + 1024, IMAGE + 1025, IMAGE + 1152]
    assert tokenizer.decode(ids) == "<loc0000><loc1023><seg000><seg127>"
    assert (tokenizer.eos, tokenizer.vocab_size) == (1, IMAGE + 1153)


@torch.no_grad()
def test_greedy_answers_equal_transformers_in_a_padded_batch_and_alone(ours, theirs, tokenizer):
    images, prompts = make_images(), make_prompts(tokenizer)
    inputs = their_inputs(images, prompts)
    expected = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = answers(ours, images, prompts, 12)
    assert found.tolist() == expected[:, inputs["input_ids"].size(1):].tolist()
    assert all(len(set(row)) > 7 for row in found.tolist()) and found.unique().numel() > 20
    for i, prompt in enumerate(prompts):
        assert answers(ours, images[i:i + 1], [prompt], 12).tolist() == found[i:i + 1].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Contrastive losses

def pairs(count=12, width=6):
    images, texts = torch.randn(2, count, width, generator=seeded(3))
    return [x.requires_grad_() for x in (images, texts, torch.tensor(1.2), torch.tensor(-0.7))]


def sigmoid_formula(images, texts, log_scale, bias):
    scores = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * log_scale.exp() + bias
    return -F.logsigmoid((2 * torch.eye(len(images)) - 1) * scores).sum(1)


@pytest.mark.parametrize("block", [1, 5, 12, 100])
def test_blockwise_sigmoid_loss_and_its_gradients_equal_the_formula(block):
    inputs, references = pairs(), pairs()
    nats, expected = vlm.sigmoid_nats(*inputs, block=block), sigmoid_formula(*references)
    torch.testing.assert_close(nats, expected)
    nats.sum().backward()
    expected.sum().backward()
    for x, reference in zip(inputs, references):
        torch.testing.assert_close(x.grad, reference.grad)


def test_sigmoid_loss_does_not_keep_the_whole_score_matrix():
    """autograd keeps fewer numbers for the backward pass than there are scores."""
    def kept(block):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            vlm.sigmoid_nats(*pairs(count=128, width=4), block=block)
        return sum(sizes)

    assert kept(32) < 128 * 128


def test_softmax_loss_equals_the_formula():
    images, texts, log_scale, _ = pairs()
    scores = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * log_scale.exp()
    rows, columns = scores.log_softmax(1).diagonal(), scores.log_softmax(0).diagonal()
    torch.testing.assert_close(vlm.softmax_nats(images, texts, log_scale), -(rows + columns) / 2)


@pytest.mark.parametrize("nats", [vlm.sigmoid_nats, lambda *inputs: vlm.softmax_nats(*inputs[:3])])
def test_losses_are_float32_under_autocast(nats):
    """In bfloat16, the losses of two checkpoints could be too coarse to compare."""
    inputs = pairs()
    expected = nats(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nats(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_scale_of_the_softmax_loss_starts_and_is_clamped_as_in_clip():
    images, texts, _, _ = pairs()
    scales = (torch.tensor(value).log() for value in (100.0, 300.0))
    torch.testing.assert_close(*(vlm.softmax_nats(images, texts, scale) for scale in scales))
    config = vlm.SigLIPConfig(ViTConfig(n_layer=1), vlm.TextEncoderConfig(n_layer=1), "softmax")
    assert vlm.SigLIP(config).log_scale.exp().item() == pytest.approx(1 / 0.07)


WORKER = """
import torch, torch.distributed as dist, vlm
dist.init_process_group("gloo")
rank = dist.get_rank()
images, texts = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(3))
for nats, parameters in ((lambda *a: vlm.sigmoid_nats(*a, block=5), (1.2, -0.7)), (vlm.softmax_nats, (1.2,))):
    inputs = [x[6 * rank:6 * rank + 6].clone().requires_grad_() for x in (images, texts)]
    parameters = [torch.tensor(p, requires_grad=True) for p in parameters]
    value = nats(*inputs, *parameters).sum()
    value.backward()
    print(value.item(), *(x for p in (*inputs, *parameters) for x in p.grad.flatten().tolist()))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_compute_the_loss_and_gradients_of_one():
    """Losses and parameter gradients are summed over the ranks. The gradient of a row is complete on its own rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True, env={
        **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}) for rank in range(2)]
    results = [[torch.tensor([*map(float, line.split())]) for line in worker.communicate(timeout=60)[0].splitlines()]
               for worker in workers]
    for row, (nats, inputs) in enumerate(((vlm.sigmoid_nats, pairs()), (vlm.softmax_nats, pairs()[:3]))):
        value = nats(*inputs).sum()
        value.backward()
        both = results[0][row] + results[1][row]
        torch.testing.assert_close(both[0], value.detach())
        for rank in range(2):
            mine = torch.cat([x.grad[6 * rank:6 * rank + 6].flatten() for x in inputs[:2]])
            torch.testing.assert_close(results[rank][row][1:73], mine, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(both[73:], torch.stack([x.grad for x in inputs[2:]]))


def test_initialisation_covers_convolutions():
    tower = vit.ViT(ViTConfig(n_layer=1, n_head=2, n_embd=64, image_size=32, patch_size=8))
    init_weights(tower, seeded())
    assert tower.patches.weight.std().item() == pytest.approx(0.02, rel=0.05) and tower.patches.bias.abs().max() == 0
