"""lora.py: adding LoRA changes no output, only its matrices learn, and merging gives an ordinary model again."""

import copy
import functools

import pytest
import torch
import torch.nn as nn

from configurator import UserError
from generate import generate, pick_tokens
from lora import LoRALinear, add_lora, merge_lora
from machine.distributed import World, wrap
from model import GPT, MLP, GPTConfig, TransformerConfig, all_blocks, init_weights
from optimizer import freeze
from published import files, paligemma
from vit import ViTConfig, init_parts
from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
BATCH = dict(images=torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1,
             tokens=torch.randint(1256, (3, 7), generator=torch.Generator().manual_seed(2)),
             prefix=torch.tensor([2, 3, 4]))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model():
    model = PaliGemma(PaliGemmaConfig(
        ViTConfig(n_layer=1, n_head=2, n_embd=16, image_size=28, patch_size=14),
        GemmaConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, head_dim=6, vocab_size=1256, block_size=64)))
    init_parts(model, seeded())
    for p in model.decoder.transformer.parameters():  # large enough that a change shows in the logits
        p.data *= 5
    return model.eval()


def make_llama(**changes):
    """A small GPT of Llama's shape, with weights that are large enough that a change shows in the logits."""
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_hidden=24, block_size=12, vocab_size=30, norm_eps=1e-5,
                 norm="plain_rmsnorm", mlp="swiglu", positions="rotary")
    model = GPT(GPTConfig(**{**shape, **changes}))
    init_weights(model, seeded(), std=0.3)
    return model


def adapted(model):
    """{names of the layers that have LoRA matrices}."""
    return {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def train(model, steps=8):
    """A few updates of the parameters that are not frozen; returns the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(steps):
        loss = model(**BATCH, targets=BATCH["tokens"].roll(-1, 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_adding_lora_changes_no_output_and_the_seed_determines_a():
    model, names = make_model(), set(make_model().state_dict())
    before = model(**BATCH)
    add_lora(model, 2, seeded(7))
    assert torch.equal(model(**BATCH), before)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert {name.rpartition(".")[2] for name in layers} == PROJECTIONS and len(layers) == 2 * len(PROJECTIONS)
    assert type(model.projector) is nn.Linear and names < set(model.state_dict())
    drawn = [layer.lora_a for layer in layers.values()]
    again = make_model()
    add_lora(again, 2, seeded(7))
    assert all(torch.equal(a, b.lora_a) for a, b in zip(
        drawn, (m for m in again.modules() if isinstance(m, LoRALinear))))
    assert not torch.equal(drawn[0], drawn[1]) and torch.cat([a.flatten() for a in drawn]).std() > 0.1


def test_only_the_lora_matrices_learn():
    model = make_model()
    add_lora(model, 2, seeded())
    model.vision.requires_grad_(False)
    model.projector.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    losses = train(model)
    assert losses[-1] < losses[0] - 0.03
    added = {name for name in before if ".lora_" in name}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == added
    assert {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])} == added


def test_outputs_equal_the_formula():
    linear = nn.Linear(5, 4)
    weight, x = linear.weight.clone(), torch.randn(2, 3, 5, generator=seeded())
    for alpha, scale in ((0, 2), (12, 4)):
        model = nn.Sequential(linear)
        add_lora(model, 3, seeded(), alpha)
        a, b = model[0].lora_a, model[0].lora_b
        assert a.shape == (3, 5) and b.shape == (4, 3)
        b.data.normal_(generator=seeded())
        torch.testing.assert_close(model(x), x @ (weight + scale * b @ a).T + linear.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_merging_keeps_the_outputs(bias):
    mlp = MLP(TransformerConfig(n_embd=16, bias=bias))
    names, x = list(mlp.state_dict()), torch.randn(5, 16, generator=seeded())
    add_lora(mlp, 4, seeded())
    mlp.up_proj.lora_b.data.normal_(0, 0.1, generator=seeded())
    mlp.down_proj.lora_b.data.normal_(0, 0.1, generator=seeded())
    before = mlp(x)
    merge_lora(mlp)
    assert list(mlp.state_dict()) == names and all(type(m) is not LoRALinear for m in mlp.modules())
    torch.testing.assert_close(mlp(x), before, atol=1e-5, rtol=0)


def test_lora_of_16_bit_weights_is_float32():
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    add_lora(model, 2, seeded())
    assert model[0].lora_a.dtype == model[0].lora_b.dtype == torch.float32
    model[0].lora_b.data.normal_(generator=seeded())
    x = torch.randn(4, 8, generator=seeded()).to(torch.bfloat16)
    before = model(x)
    assert before.dtype == torch.bfloat16
    merge_lora(model)
    assert model[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(x), before, atol=0.1, rtol=0.02)


def test_answers_are_the_same_before_and_after_merging():
    model, found = make_model(), []
    prompts, padding = torch.tensor([[2, 50, 60], [0, 2, 70]]), torch.tensor([0, 1])

    def write():
        with torch.inference_mode():
            image = model.encode(BATCH["images"][:2])
        pick = functools.partial(pick_tokens, temperature=0)
        found.append(torch.stack(list(generate(model, prompts, 6, pick, image=image, padding=padding))))

    add_lora(model, 2, seeded())
    write()
    train(model)
    write()
    merge_lora(model)
    write()
    plain, learned, merged = found
    assert torch.equal(merged, learned) and not torch.equal(learned, plain)


def test_transformers_loads_a_fine_tuned_and_merged_model(tmp_path):
    """Loaded from the published layout, fine-tuned, merged, and saved in that layout."""
    transformers = pytest.importorskip("transformers")
    from test_published import IMAGE, N, make_tokenizer, their_inputs
    (tmp_path / "before").mkdir()
    make_tokenizer().save(str(tmp_path / "before" / "tokenizer.json"))
    paligemma.save(make_model(), paligemma.load_tokenizer(tmp_path / "before" / "tokenizer.json"), tmp_path / "before")
    model, tokenizers = files.load(str(tmp_path / "before"))
    before = model(**BATCH)
    add_lora(model, 2, seeded())
    train(model)
    merge_lora(model)
    paligemma.save(model, tokenizers["tokenizer"], tmp_path / "after")
    theirs, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "after", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.image_token_id == IMAGE
    logits = model(BATCH["images"], BATCH["tokens"])
    expected = theirs.eval()(**their_inputs(BATCH["images"], BATCH["tokens"].tolist())).logits[:, N:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (model(**BATCH) - before).abs().max() > 0.1


def test_targets_name_the_layers_that_are_adapted():
    for targets, names in (("", PROJECTIONS), ("q_proj", {"q_proj"}), ("v_proj, down_proj", {"v_proj", "down_proj"})):
        model = make_llama()
        add_lora(model, 2, seeded(), targets=targets)
        assert adapted(model) == names
        assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    untied = make_llama(tied=False)
    add_lora(untied, 2, seeded(), targets="head")
    assert adapted(untied) == {"head"}


@pytest.mark.parametrize("targets, name", [("q_proj,wq", "wq"), ("head", "head"), ("wte", "wte"), ("q_proj,", "")])
def test_a_target_that_the_model_lacks_is_refused_and_the_model_stays_as_it_was(targets, name):
    model = make_llama()
    with pytest.raises(UserError) as refused:
        add_lora(model, 2, seeded(), targets=targets)
    assert str(refused.value) == (f"lora_targets = {targets!r}: no linear layer of the model has the name {name!r},"
                                  " only q_proj, k_proj, v_proj, o_proj, up_proj, down_proj, gate_proj")
    assert not adapted(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"targets": "q_proj,v_proj"}, {"alpha": 0.5}])
def test_a_merged_llama_writes_what_it_wrote_before(changes):
    model, tokens = make_llama().eval(), torch.randint(30, (2, 12), generator=seeded(1))
    names, plain = list(model.state_dict()), model(tokens)
    add_lora(model, 2, seeded(), **changes)
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            p.data.normal_(0, 0.3, generator=seeded(2))
    before = model(tokens)
    merge_lora(model)
    assert list(model.state_dict()) == names and (before - plain).abs().max() > 0.01
    torch.testing.assert_close(model(tokens), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["lora", "wte", "transformer"])
def test_recomputing_gives_the_same_gradients_whatever_is_frozen(part):
    """Even if no block's input needs a gradient."""
    tokens, found = torch.randint(30, (2, 12), generator=seeded(1)), []
    for recompute in (False, True):
        model = make_llama(tied=False)
        if part == "lora":
            add_lora(model, 2, seeded())
        else:
            freeze(model, {part: 0.0})
        wrap(model, all_blocks(model), False, False, recompute, torch.float32, World(0, 1, torch.device("cpu")))
        model(tokens, tokens.roll(-1, 1)).sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            name for name, p in model.named_parameters() if p.requires_grad}
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    plain, recomputed = found
    assert len(plain) >= 2 and any(grad.abs().max() > 0 for grad in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_rank_below_one_and_a_model_without_linear_layers_are_refused():
    with pytest.raises(UserError, match="lora_rank = 0: must be at least 1"):
        add_lora(make_model(), 0)
    with pytest.raises(UserError, match="lora_rank = 1: .* has no linear layers"):
        add_lora(nn.Embedding(2, 2), 1)


def test_an_untied_head_learns_too():
    """Every matrix that LoRA adds gets a gradient, so the model uses all of them."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11, tied=False))
    init_weights(model, torch.Generator().manual_seed(0))
    add_lora(model, 2, torch.Generator().manual_seed(1))
    tokens = torch.arange(8)[None]
    model(tokens, tokens).sum().backward()
    assert model.head.lora_b.grad.abs().max() > 0
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
