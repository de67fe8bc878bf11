"""seq2seq.py against torch.nn.Transformer and a Marian of transformers, and the properties that the paper promises."""

import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from generate import generate, pick_tokens
from inside.attention import cross_attention
from seq2seq import Seq2Seq, Seq2SeqConfig

B, S, T, V = 3, 7, 6, 19
LENGTHS = torch.tensor([7, 4, 1])
GREEDY = functools.partial(pick_tokens, temperature=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(**changes):
    sizes = dict(n_layer=2, n_encoder_layer=3, n_head=4, n_embd=24, vocab_size=V, block_size=16)
    model = Seq2Seq(Seq2SeqConfig(**{**sizes, **changes})).eval()
    stir(model)
    return model


@torch.no_grad()
def stir(model):
    """Gives the model larger weights than at initialisation, so that every path matters, and uneven norms."""
    for i, (name, p) in enumerate(model.named_parameters()):
        if "embed_positions" not in name:  # Marian's are sines
            nn.init.normal_(p, std=0.3, generator=seeded(i))
            p.add_(1.0 if p.dim() == 1 and "weight" in name else 0.0)  # the gain of a norm


def batch(vocab_size=V):
    """source (B, S), tokens and targets (B, T)."""
    return [torch.randint(vocab_size, shape, generator=seeded(i)) for i, shape in enumerate([(B, S), (B, T), (B, T)])]


class NoPositions(nn.Module):
    def forward(self, x, positions):
        return x, None


# ----------------------------------------------------------------------------------------------------------------------
# Others' implementations

@pytest.mark.parametrize("changes", [{}, dict(final_norm=False)], ids=["final norms", "no final norm"])
@pytest.mark.parametrize("block", ["pre", "post"])
def test_the_papers_base_size_has_its_number_of_parameters(block, changes):
    with torch.device("meta"):
        model = Seq2Seq(Seq2SeqConfig(n_layer=6, n_head=8, n_embd=512, vocab_size=37000, block=block, **changes))
        theirs = nn.Transformer(512, 8, 6, 6, 2048)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)]
    assert sum(counts) == (44_138_496 if changes else 44_140_544)
    assert changes or sum(counts) == sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(counts) + 37000 * 512  # the embedding is the head too


def torchs(model):
    """torch.nn.Transformer with the weights of the model's two trunks. Dropout is off, as it draws other numbers."""
    c = model.config
    theirs = nn.Transformer(c.n_embd, c.n_head, c.n_encoder_layer, c.n_layer, 4 * c.n_embd, dropout=0.0,
                            batch_first=True, norm_first=c.block == "pre")
    with torch.no_grad():
        for ours, other in ((model.encoder, theirs.encoder), (model.decoder, theirs.decoder)):
            other.norm.load_state_dict(ours.ln_f.state_dict())
            for block, layer in zip(ours.blocks, other.layers):
                norms = [block.ln_1, block.ln_2] if block.ln_x is None else [block.ln_1, block.ln_x, block.ln_2]
                pairs = [(layer.self_attn, block.attn)]
                if block.cross_attn is not None:
                    pairs.append((layer.multihead_attn, block.cross_attn))
                for theirs_attn, attn in pairs:
                    parts = (attn.q_proj, attn.k_proj, attn.v_proj)
                    theirs_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
                    theirs_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
                    theirs_attn.out_proj.load_state_dict(attn.o_proj.state_dict())
                for i, norm in enumerate(norms, start=1):
                    getattr(layer, f"norm{i}").load_state_dict(norm.state_dict())
                layer.linear1.load_state_dict(block.mlp.up_proj.state_dict())
                layer.linear2.load_state_dict(block.mlp.down_proj.state_dict())
    return theirs


def reference(model, theirs, source, lengths, tokens):
    """Logits (B, T, V) of torch.nn.Transformer between our embeddings and our head, from the formulas of the paper."""
    C = model.config.n_embd
    angles = torch.arange(16)[:, None] / 10000 ** (torch.arange(0, C, 2) / C)  # (16, C / 2)
    table = torch.empty(16, C)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    source_table = model.wte if model.source_wte is None else model.source_wte
    x = source_table(source) * C ** 0.5 + table[:source.size(1)]
    y = model.wte(tokens) * C ** 0.5 + table[:tokens.size(1)]
    padding = torch.arange(source.size(1)) >= lengths[:, None]
    future = ~torch.ones(tokens.size(1), tokens.size(1)).tril().bool()
    out = theirs(x, y, tgt_mask=future, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    return F.linear(out, model.wte.weight if model.head is None else model.head.weight)


@pytest.mark.parametrize("changes", [{}, dict(shared=False, tied=False, source_vocab_size=23)],
                         ids=["one embedding", "three"])
@pytest.mark.parametrize("block", ["pre", "post"])
def test_logits_and_gradients_equal_those_of_torchs_transformer(block, changes):
    model = make(block=block, **changes).train()
    theirs = torchs(model).train()  # in evaluation it takes another path, which has no gradients
    source, tokens, targets = batch()
    expected = reference(model, theirs, source, LENGTHS, tokens)
    found = model(source, LENGTHS, tokens)
    assert expected.std() > 0.3  # large enough for the tolerance to mean something
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    weights = torch.rand(B, T, generator=seeded())
    nats = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    tables = [p for name, p in model.named_parameters() if "coder" not in name]
    grads = torch.autograd.grad((nats * weights).sum(), [*tables, *theirs.parameters()])
    (model(source, LENGTHS, tokens, targets) * weights).sum().backward()
    for table, grad in zip(tables, grads):
        torch.testing.assert_close(table.grad, grad, atol=1e-4, rtol=1e-3)
    with torch.no_grad():  # our gradients, in the places of the weights, go the same way as the weights did
        for p in model.parameters():
            p.copy_(p.grad)
    for ours, grad in zip(torchs(model).parameters(), grads[len(tables):]):
        torch.testing.assert_close(ours, grad, atol=1e-4, rtol=1e-3)


def test_a_smoothed_loss_is_torchs():
    model, (source, tokens, targets) = make(), batch()
    nats, uniform = model(source, LENGTHS, tokens, targets, smoothing=True)
    logits = model(source, LENGTHS, tokens).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="none", label_smoothing=0.1).view(B, T)
    torch.testing.assert_close(0.9 * nats + 0.1 * uniform, expected)
    torch.testing.assert_close(nats, model(source, LENGTHS, tokens, targets))


def marian():
    """A tiny random Marian (Junczys-Dowmunt et al. 2018): post-norm, sinusoidal, scaled, tied, without final norms.

    It differs from the paper and from seq2seq.py in two ways: all sines of its positions come before all cosines, and
    its output head has a bias, which is zero here.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.MarianConfig(
        vocab_size=V, d_model=24, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, activation_function="relu",
        max_position_embeddings=16, scale_embedding=True, pad_token_id=1, eos_token_id=0, decoder_start_token_id=1,
        forced_eos_token_id=None, attn_implementation="eager")
    theirs = transformers.MarianMTModel(config).eval()
    stir(theirs)
    with torch.no_grad():
        theirs.model.decoder.layers[-1].final_layer_norm.weight.neg_()  # or each token is followed by itself
    return theirs


def from_marian(theirs):
    """A Seq2Seq with the weights of a Marian."""
    model, state = make(block="post", final_norm=False), theirs.state_dict()
    renamed = {"self_attn": "attn", "encoder_attn": "cross_attn", "out_proj": "o_proj", "fc1": "mlp.up_proj",
               "fc2": "mlp.down_proj", "self_attn_layer_norm": "ln_1", "encoder_attn_layer_norm": "ln_x",
               "final_layer_norm": "ln_2", "layers": "blocks"}
    found = {"wte.weight": state["model.shared.weight"]}
    for name, value in state.items():
        if ".layers." in name:
            found[".".join(renamed.get(part, part) for part in name.removeprefix("model.").split("."))] = value
    assert model.load_state_dict(found, strict=True)
    table = model.wpe.table
    model.wpe.table = torch.cat((table[:, 0::2], table[:, 1::2]), dim=1)  # all sines, then all cosines
    return model


def test_logits_cached_steps_and_greedy_text_equal_those_of_a_marian():
    theirs = marian()
    model, (source, tokens, _) = from_marian(theirs), batch()
    real = (torch.arange(S) < LENGTHS[:, None]).long()
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=real, decoder_input_ids=tokens).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(model(source, LENGTHS, tokens), expected, atol=1e-4, rtol=1e-4)
        text = theirs.generate(input_ids=source, attention_mask=real, max_new_tokens=12, do_sample=False, num_beams=1)
    steps = generate(model, torch.ones(B, 1, dtype=torch.long), 12, GREEDY, 0, **model.encode(source, LENGTHS))
    written = torch.stack(list(steps), dim=1)
    for found, row in zip(written.tolist(), text[:, 1:].tolist()):
        end = found.index(0) + 1 if 0 in found else len(found)
        assert found[:end] == row[:end]
    assert len(set(map(tuple, written.tolist()))) > 1


# ----------------------------------------------------------------------------------------------------------------------
# What must hold

@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("block", ["pre", "post"])
def test_padding_changes_nothing(block, positions):
    model, (source, tokens, targets) = make(block=block, positions=positions), batch()
    expected = model(source, LENGTHS, tokens, targets)
    wider, longer = (F.pad(x, (0, 4), value=5) for x in (source, tokens))
    torch.testing.assert_close(model(wider, LENGTHS, longer, F.pad(targets, (0, 4)))[:, :T], expected)
    for b, n in enumerate(LENGTHS):
        alone = model(source[b:b + 1, :n], LENGTHS[b:b + 1], tokens[b:b + 1], targets[b:b + 1])
        torch.testing.assert_close(alone, expected[b:b + 1])


def test_a_later_target_token_cannot_change_an_earlier_output_and_every_source_token_can():
    model, (source, tokens, _) = make(), batch()
    before = model(source, LENGTHS, tokens)
    for t in range(T):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(source, LENGTHS, changed)
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.allclose(after[:, t], before[:, t])
    for s in range(S):
        changed = source.clone()
        changed[:, s] = (changed[:, s] + 1) % V
        moved = (model(changed, LENGTHS, tokens) != before).all(-1).all(-1)  # (B,)
        assert torch.equal(moved, s < LENGTHS)


def test_permuting_the_source_without_positions_permutes_the_memory():
    model, (source, _, _) = make(), batch()
    order, whole = torch.randperm(S, generator=seeded()), torch.tensor([S] * B)
    with_positions = model.read(source, whole)[0]
    assert not torch.allclose(model.read(source[:, order], whole)[0], with_positions[:, order], atol=0.1)
    model.wpe = NoPositions()
    memory = model.read(source, whole)[0]
    torch.testing.assert_close(model.read(source[:, order], whole)[0], memory[:, order])


@pytest.mark.parametrize("n_kv_head", [0, 2])
@pytest.mark.parametrize("block", ["pre", "post"])
def test_cross_attention_weights_sum_to_1_are_0_on_padding_and_explain_the_output(block, n_kv_head):
    model, (source, tokens, _) = make(block=block, n_kv_head=n_kv_head), batch()
    seen = []
    layer = model.decoder.blocks[1].cross_attn
    hook = layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    weights = cross_attention(model, source, LENGTHS, tokens)
    hook.remove()
    assert weights.shape == (2, B, 4, T, S)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, B, 4, T))
    for b, n in enumerate(LENGTHS):
        assert (weights[:, b, ..., n:] == 0).all() and (weights[:, b, ..., :n] > 0).all()
    _, v = model.encode(source, LENGTHS)["memory"][1]
    heads = weights[1] @ v.repeat_interleave(4 // v.size(1), dim=1)  # (B, H, T, D)
    torch.testing.assert_close(layer.o_proj(heads.transpose(1, 2).flatten(2)), seen[0])


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("block", ["pre", "post"])
def test_steps_with_caches_equal_one_pass(block, positions):
    model, (source, tokens, _) = make(block=block, positions=positions), batch()
    expected = model(source, LENGTHS, tokens)
    caches, context = model.make_caches(B, T), model.encode(source, LENGTHS)
    for first, last in ((0, 2), (2, 3), (3, 6)):  # a prompt, one token, several
        x = model.hidden(tokens[:, first:last], caches, first, **context)
        torch.testing.assert_close(model.logits(x), expected[:, first:last])
    slots, caches = torch.arange(T), model.make_caches(B, T + 3)  # as a CUDA graph needs them
    torch.testing.assert_close(model.logits(model.hidden(tokens, caches, slots, **context)), expected)


def test_the_encoder_and_the_keys_and_values_of_the_memory_run_once_per_translation():
    model, (source, tokens, _) = make(), batch()
    calls = []
    for name, part in (("encoder", model.encoder), *((f"keys {i}", block.cross_attn.k_proj)
                                                     for i, block in enumerate(model.decoder.blocks))):
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    written = list(generate(model, tokens[:, :1], 10, GREEDY, **model.encode(source, LENGTHS)))
    assert len(written) == 10 and calls == ["encoder", "keys 0", "keys 1"]


def test_dropout_in_training_averages_to_evaluation_and_draws_by_the_seed():
    model, (source, tokens, _) = make(dropout=0.1).train(), batch()
    torch.manual_seed(0)
    one, two = model(source, LENGTHS, tokens), model(source, LENGTHS, tokens)
    torch.manual_seed(0)
    assert torch.equal(model(source, LENGTHS, tokens), one) and not torch.equal(one, two)


@pytest.mark.parametrize("changes, message", [
    (dict(source_vocab_size=20), "source_vocab_size = 20: one shared vocabulary has vocab_size = 19"),
    (dict(bigrams=True), "bigrams = True: an encoder-decoder has no table"),
    (dict(n_encoder_layer=-1), "n_encoder_layer = -1: must be at least 0"),
    (dict(mlp="tanh"), "mlp = 'tanh': must be one of .*relu"),
])
def test_invalid_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_more_tokens_than_positions_are_refused():
    model, (source, tokens, _) = make(block_size=5), batch()
    with pytest.raises(ValueError, match="a source of 7 tokens exceeds block_size = 5"):
        model(source, LENGTHS, tokens)
    with pytest.raises(ValueError, match="6 tokens exceed block_size = 5"):
        model(source[:, :5], LENGTHS.clamp(max=5), tokens)
