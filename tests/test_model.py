"""model.py: attention against its formula, caches against the uncached model, initialisation, and invalid configs."""

import math

import pytest
import torch
import torch.nn.functional as F

from configurator import UserError
from model import (
    GPT,
    MLP,
    Attention,
    Block,
    GatedMLP,
    GPTConfig,
    KVCache,
    PlainRMSNorm,
    PostNormBlock,
    RMSNorm,
    SquaredReLUMLP,
    SwiGLUMLP,
    Transformer,
    TransformerConfig,
    causal_mask,
    init_weights,
    predict,
)
from positions import Rotary, Sinusoidal, rotate
from run.cost import count_parameters, flops_per_token
from vlm import Gemma, GemmaConfig

B, T, C = 2, 7, 24
FAST = dict(positions="rotary", mlp="relu2", tied=False, bigrams=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def make_gpt(seed=0, std=None, **changes):
    model = GPT(GPTConfig(**{**dict(n_layer=2, n_head=4, n_embd=C, block_size=16, vocab_size=11), **changes}))
    init_weights(model, seeded(seed))
    if std:  # larger weights than at initialisation, so that every path matters
        for p in model.parameters():
            torch.nn.init.normal_(p, std=std, generator=seeded(seed))
    return model.eval()


def make_attention(**changes):
    attention = Attention(TransformerConfig(**{**dict(n_head=4, n_embd=C, bias=True), **changes}))
    for i, p in enumerate(attention.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=seeded(i))
    return attention.eval()


def rotation(positions, head_dim):
    """(cos, sin) of positions below 128, each (T, D)."""
    return Rotary(GPTConfig(positions="rotary", head_dim=head_dim, block_size=128))(None, positions)[1]


def naive_attention(a, x, allowed=None, memory=None, turn=lambda x: x):
    """Attention (Vaswani et al., equation 1), computed one row, head and position at a time. allowed: (B, T, S)."""
    source = x if memory is None else memory
    out = torch.zeros(x.size(0), x.size(1), a.n_head * a.head_dim)
    for b in range(x.size(0)):
        q, k, v = a.q_proj(x[b]), a.k_proj(source[b]), a.v_proj(source[b])
        for h in range(a.n_head):
            mine = slice(h * a.head_dim, (h + 1) * a.head_dim)
            group = h * a.n_kv_head // a.n_head
            shared = slice(group * a.head_dim, (group + 1) * a.head_dim)
            queries, keys = turn(a.q_norm(q[:, mine])), turn(a.k_norm(k[:, shared]))
            for t in range(x.size(1)):
                scores = keys @ queries[t] / math.sqrt(a.head_dim)
                if allowed is not None:
                    scores = scores.masked_fill(~allowed[b, t], -math.inf)
                out[b, t, mine] = scores.softmax(-1) @ v[:, shared]
    return a.o_proj(out)


causal = torch.ones(T, T).tril().bool()
random_mask = (torch.rand(B, 1, T, T, generator=seeded(5)) < 0.5) | torch.eye(T).bool()  # each token sees itself
prefixes = torch.tensor([3, 5])[:, None, None, None]
prefix_mask = causal_mask(torch.arange(T), torch.arange(T), prefixes)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("mask, allowed", [
    (None, None), ("causal", causal.expand(B, T, T)), (causal, causal.expand(B, T, T)),
    (random_mask, random_mask.squeeze(1)), (prefix_mask, prefix_mask.squeeze(1)),
], ids=["none", "causal", "boolean", "per row", "prefix per row"])
def test_attention_equals_the_formula(mask, allowed, n_kv_head):
    attention, x = make_attention(n_kv_head=n_kv_head), randn(B, T, C)
    torch.testing.assert_close(attention(x, mask), naive_attention(attention, x, allowed))


def test_attention_with_memory_or_rotation_and_a_given_head_dim():
    attention = make_attention(head_dim=10, n_kv_head=2)
    x, memory = randn(B, T, C), randn(B, 5, C, seed=1)
    allowed = (torch.rand(B, 1, T, 5, generator=seeded(2)) < 0.5) | (torch.arange(5) == 0)
    torch.testing.assert_close(attention(x, allowed, memory=memory),
                               naive_attention(attention, x, allowed.squeeze(1), memory))
    angles = rotation(slice(T), 10)
    torch.testing.assert_close(attention(x, "causal", rope=angles),
                               naive_attention(attention, x, causal.expand(B, T, T), turn=lambda q: rotate(q, *angles)))


def test_qk_norm_bounds_the_scores_and_equals_its_formula():
    attention, x = make_attention(qk_norm=True, n_kv_head=2), randn(B, T, C)
    memory, angles = randn(B, 5, C, seed=1), rotation(slice(T), 6)
    torch.testing.assert_close(attention(x, "causal", rope=angles),
                               naive_attention(attention, x, causal.expand(B, T, T), turn=lambda q: rotate(q, *angles)))
    torch.testing.assert_close(attention(x, memory=memory), naive_attention(attention, x, memory=memory))
    norm, y = attention.k_norm, randn(B, T, 4, 6)
    torch.testing.assert_close(norm(y), y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(y.bfloat16()).dtype == torch.bfloat16
    with torch.no_grad():
        expected = attention(x)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight *= 1000
            projection.bias *= 1000
    torch.testing.assert_close(attention(x), expected, atol=1e-3, rtol=1e-3)  # up to epsilon, only the direction counts


def test_qk_norm_changes_no_names_and_its_gains_start_at_one():
    names, more = (set(make_gpt(qk_norm=on).state_dict()) for on in (False, True))
    assert {name.partition(".attn.")[2] for name in more - names} == {"q_norm.weight", "k_norm.weight"}
    assert names < more
    model = make_gpt(qk_norm=True, std=0.3)
    init_weights(model, seeded())
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith("_norm.weight"))


def test_prefix_mask_is_full_inside_the_prefix_and_causal_after_it():
    mask = causal_mask(torch.arange(5), torch.arange(5), prefix=3)
    assert mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_attention_weights_sum_to_one():
    attention = make_attention()
    with torch.no_grad():  # all values are 1, so each head outputs the sum of its weights
        attention.v_proj.weight.zero_()
        attention.v_proj.bias.fill_(1.0)
    expected = attention.o_proj(torch.ones(C)).expand(B, T, C)
    for mask in (None, "causal", random_mask):
        torch.testing.assert_close(attention(randn(B, T, C), mask), expected)


def test_attention_without_positions_is_permutation_equivariant():
    attention, x, order = make_attention(), randn(B, T, C), torch.randperm(T, generator=seeded())
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])
    turned = rotation(slice(T), 6)
    assert not torch.allclose(attention(x[:, order], rope=turned), attention(x, rope=turned)[:, order], atol=1e-2)


def test_rotated_scores_depend_on_distance_only_and_rotation_keeps_lengths():
    q, k = randn(1, 1, 1, 8), randn(1, 1, 1, 8, seed=1)

    def score(m, n):
        return (rotate(q, *rotation([m], 8)) * rotate(k, *rotation([n], 8))).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3
    torch.testing.assert_close(rotate(q, *rotation([77], 8)).norm(), q.norm())


def test_norms_and_mlps_equal_their_formulas():
    config, x = TransformerConfig(n_embd=C, n_hidden=20, bias=True, norm_eps=1e-6), randn(B, T, C)
    norm = RMSNorm(config)
    torch.nn.init.normal_(norm.weight, generator=seeded())
    torch.testing.assert_close(norm(x), F.rms_norm(x, (C,), 1 + norm.weight, 1e-6))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    plain = PlainRMSNorm(config)
    plain.weight.data = 1 + norm.weight.data
    torch.testing.assert_close(plain(x), norm(x))
    mlp, gated, swiglu = MLP(config), GatedMLP(config), SwiGLUMLP(config)
    torch.testing.assert_close(mlp(x), mlp.down_proj(F.gelu(mlp.up_proj(x), approximate="tanh")))
    inner = F.gelu(gated.gate_proj(x), approximate="tanh") * gated.up_proj(x)
    torch.testing.assert_close(gated(x), gated.down_proj(inner))
    inner = swiglu.gate_proj(x) * swiglu.gate_proj(x).sigmoid() * swiglu.up_proj(x)
    torch.testing.assert_close(swiglu(x), swiglu.down_proj(inner))
    squared = SquaredReLUMLP(config)
    expected = squared.down_proj(F.relu(squared.up_proj(x)).square())
    torch.testing.assert_close(squared(x), expected)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), [*squared.parameters()], retain_graph=True)
                            for y in (squared(x), expected))):
        torch.testing.assert_close(one, other)


def test_sinusoidal_positions_equal_the_papers_formula():
    table = Sinusoidal(GPTConfig(n_embd=10, n_head=1, block_size=300))(torch.zeros(1, 300, 10), slice(0, 300))[0][0]
    for p, i in ((0, 0), (1, 3), (7, 4), (299, 2)):
        assert table[p, 2 * i].item() == pytest.approx(math.sin(p / 10000 ** (2 * i / 10)), abs=1e-4)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(p / 10000 ** (2 * i / 10)), abs=1e-4)


def test_a_post_norm_block_equals_the_papers_formula():
    config, x, memory = TransformerConfig(n_embd=C, block="post", cross=True), randn(B, T, C), randn(B, 5, C, seed=1)
    block = PostNormBlock(config)
    y = block.ln_1(x + block.attn(x, "causal"))
    y = block.ln_x(y + block.cross_attn(y, memory=memory))
    torch.testing.assert_close(block(x, "causal", memory=memory), block.ln_2(y + block.mlp(y)))
    trunk = Transformer(TransformerConfig(n_layer=1, n_embd=C, block="post", final_norm=False))
    assert type(trunk.blocks[0]) is PostNormBlock
    torch.testing.assert_close(trunk(x), trunk.blocks[0](x))


def test_smoothing_gives_the_parts_of_pytorchs_smoothed_loss():
    logits, targets = randn(B, T, 11), torch.randint(11, (B, T), generator=seeded(1))
    nats, uniform = predict(lambda x: x, logits, targets, smoothing=True)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=0.1)
    torch.testing.assert_close((0.9 * nats + 0.1 * uniform).flatten(), expected)


def test_memory_without_cross_and_cross_without_memory_are_refused():
    x = randn(B, T, C)
    plain = Block(TransformerConfig(n_embd=C))
    cross = Block(TransformerConfig(n_embd=C, cross=True))
    assert cross(x, memory=x).shape == plain(x).shape
    for block, memory in ((plain, x), (cross, None)):
        with pytest.raises(AssertionError, match="belong together"):
            block(x, memory=memory)


def test_a_cross_attending_decoder_is_causal_and_sees_only_unmasked_memory():
    decoder = Transformer(TransformerConfig(n_layer=2, n_embd=C, n_head=4, cross=True)).eval()
    x, memory = randn(B, T, C), randn(B, 5, C, seed=1)
    mask = (torch.arange(5) < 3)[None]
    y = decoder(x, mask="causal", memory=memory, memory_mask=mask)
    hidden = memory.clone()
    hidden[:, 3:] += 1
    torch.testing.assert_close(decoder(x, mask="causal", memory=hidden, memory_mask=mask), y)
    assert not torch.allclose(decoder(x, mask="causal", memory=memory + 1, memory_mask=mask), y)
    remembered = decoder.remember(memory)
    for block in decoder.blocks:  # the remembered keys and values are not computed again
        block.cross_attn.k_proj = block.cross_attn.v_proj = None
    torch.testing.assert_close(decoder(x, mask="causal", memory=remembered, memory_mask=mask), y, atol=0, rtol=0)


@pytest.mark.parametrize("changes", [{}, FAST, dict(n_kv_head=2, norm="rmsnorm", mlp="geglu", bias=True, head_dim=8)])
def test_no_token_sees_a_later_one(changes):
    model = make_gpt(std=0.3, **changes)
    tokens = torch.randint(11, (1, 16), generator=seeded())
    before = model(tokens)
    for t in (0, 7, 15):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, FAST, dict(n_kv_head=1, norm="rmsnorm", mlp="geglu", qk_norm=True)])
@pytest.mark.parametrize("start", [lambda a, b: a, torch.arange], ids=["start is an int", "start is a tensor"])
def test_cached_logits_equal_uncached_ones_however_the_tokens_are_cut(changes, start):
    """start is an int (the keys are the slots filled so far) or a tensor (all slots are keys, under a mask)."""
    model = make_gpt(std=0.3, **changes)
    tokens = torch.randint(11, (3, 16), generator=seeded())
    expected = model(tokens)
    for cuts in ([0, 16], [0, 5, 6, 7, 16], list(range(17))):
        caches = model.make_caches(3)
        parts = [model.logits(model.hidden(tokens[:, a:b], caches, start(a, b))) for a, b in zip(cuts, cuts[1:])]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, FAST])
def test_reordered_caches_continue_the_chosen_rows(changes):
    model, rows = make_gpt(std=0.3, **changes), torch.tensor([2, 0, 0])
    tokens, caches = torch.randint(11, (3, 16), generator=seeded()), model.make_caches(3)
    model.hidden(tokens[:, :9], caches)
    caches.reorder(rows)
    found = model.logits(model.hidden(tokens[:, 9:], caches, 9))
    expected = model(torch.cat((tokens[rows, :9], tokens[:, 9:]), dim=1))[:, 9:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_gpt_with_rotary_positions_and_an_untied_head_computes_the_same_as_a_gemma():
    sizes = dict(n_layer=2, n_head=4, n_embd=C, norm="rmsnorm", mlp="geglu", block_size=16, vocab_size=11)
    gpt, gemma = make_gpt(std=0.3, **sizes, positions="rotary", tied=False), Gemma(GemmaConfig(**sizes, norm_eps=1e-5))
    gemma.transformer.load_state_dict(gpt.transformer.state_dict())
    with torch.no_grad():
        gemma.wte.weight.copy_(gpt.head.weight)
        gpt.wte.weight.copy_(gpt.head.weight * C**0.5)  # Gemma scales its embeddings
    tokens = torch.randint(11, (3, 16), generator=seeded())
    torch.testing.assert_close(gpt(tokens), gemma(tokens), atol=1e-5, rtol=1e-5)


def test_a_pair_is_a_token_and_the_previous_one():
    model = make_gpt(**FAST)
    tokens = torch.tensor([[3, 7, 7]])
    assert model.pairs(tokens, None, 0).tolist() == [[3, 3 * 11 + 7, 7 * 11 + 7]]


def test_cache_keeps_one_key_per_group_in_place():
    attention = make_attention(n_kv_head=2)
    cache = KVCache(attention, batch_size=B, size=9)
    k, v = cache.update(randn(B, 2, 3, 6), randn(B, 2, 3, 6), 4)
    assert k.shape == v.shape == (B, 2, 7, 6)
    assert k.data_ptr() == cache.k.data_ptr() and v.data_ptr() == cache.v.data_ptr()
    assert cache.k[:, :, :4].abs().sum() == 0 and cache.k[:, :, 7:].abs().sum() == 0


def test_initialisation_follows_its_table():
    model = make_gpt(n_layer=8, n_embd=128, n_head=4, bias=True, vocab_size=500)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.abs().max() == 0, name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name


def test_with_zero_initialised_outputs_blocks_are_the_identity():
    model = make_gpt()
    init_weights(model, seeded(), zero=True)
    x = randn(B, T, C)
    assert all(torch.equal(block(x), x) for block in model.transformer.blocks)


def test_initial_loss_is_near_that_of_guessing_and_the_seed_determines_the_weights():
    model = make_gpt(n_embd=128, vocab_size=65)
    tokens = torch.randint(65, (8, 17), generator=seeded())
    assert model(tokens[:, :-1], tokens[:, 1:]).mean().item() == pytest.approx(math.log(65), abs=0.1)
    same, other = make_gpt(n_embd=128, vocab_size=65), make_gpt(seed=1, n_embd=128, vocab_size=65)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))
    assert not torch.equal(model.wte.weight, other.wte.weight)


def test_a_model_given_targets_returns_the_cross_entropy_of_each():
    model = make_gpt(std=0.3)
    tokens, targets = torch.randint(11, (2, 2, 16), generator=seeded())
    nats = -model(tokens).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(model(tokens, targets), nats)
    places = torch.tensor([[3, 0, 15], [5, 5, 6]])  # only these positions go through the head
    torch.testing.assert_close(model(tokens, targets.gather(1, places), places), nats.gather(1, places))
    torch.testing.assert_close(model(tokens, places=places), model(tokens)[[[0], [1]], places])
    seen = []
    predict(lambda x: seen.append(x.shape) or model.logits(x), randn(2, 16, C), targets.gather(1, places), places)
    assert seen == [(2, 3, C)]
    targets[0] = -100
    torch.testing.assert_close(model(tokens, targets), torch.stack((torch.zeros(16), nats[1])))


def test_counts_of_parameters_and_flops():
    model = make_gpt()
    # token and position embeddings; per block: four C x C and two C x 4C matrices, two gains; the last norm's gain
    assert count_parameters(model) == 11 * C + 16 * C + 2 * (4 * C * C + 8 * C * C + 2 * C) + C
    flops = 6 * (count_parameters(model) - 16 * C) + 12 * 2 * C * 16
    fast = make_gpt(**FAST)
    assert count_parameters(fast) == count_parameters(model) - 16 * C + 11 * 11 * C + 11 * C
    assert flops_per_token(model, 16) == flops_per_token(fast, 16) == flops  # lookup tables cost no FLOPs


@pytest.mark.parametrize("changes, message", [
    (dict(n_embd=100, n_head=3), r"n_embd = 100 does not divide into n_head = 3 heads: try n_embd = 99"),
    (dict(n_head=4, n_kv_head=3), "n_head = 4 does not divide into n_kv_head = 3 groups"),
    (dict(norm="batchnorm"), "norm = 'batchnorm': must be one of layernorm, rmsnorm, plain_rmsnorm"),
    (dict(n_layer=0), "n_layer = 0: must be at least 1"), (dict(dropout=1.0), "dropout = 1.0: must be below 1"),
    (dict(block_size=0), "block_size = 0: must be at least 1"),
    (dict(positions="sine"), "positions = 'sine': must be one of learned, sinusoidal, rotary"),
    (dict(positions="rotary", n_embd=36, n_head=4), "head_dim = 9: rotary positions rotate pairs of channels"),
    (dict(bigrams=True, vocab_size=50257), "bigrams = True: vocab_size = 50,257 is above 512; set"),
])
def test_invalid_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**changes)
