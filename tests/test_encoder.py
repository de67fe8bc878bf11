"""encoder.py against torch.nn.TransformerEncoder, what its models promise, and starts from another model's encoder."""

import dataclasses

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import settings_for
from test_seq2seq import NoPositions, seeded, stir

from configurator import UserError
from encoder import Classifier, ClassifierConfig, Encoder, EncoderConfig, MaskedLM, SentenceConfig, SentenceEncoder
from model import GPT, GPTConfig
from tasks.classification import ClassificationTask

B, S, V = 3, 7, 19
LENGTHS = torch.tensor([7, 4, 1])
SIZES = dict(n_layer=2, n_head=4, n_embd=24, vocab_size=V, block_size=16)
TOKENS = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(0))


def make(cls=Encoder, config=EncoderConfig, **changes):
    model = cls(config(**{**SIZES, **changes})).eval()
    stir(model)
    return model


def torchs(encoder):
    """torch.nn.TransformerEncoder with the weights of the encoder's trunk."""
    c = encoder.config
    layer = nn.TransformerEncoderLayer(c.n_embd, c.n_head, 4 * c.n_embd, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=c.block == "pre")
    norm = nn.LayerNorm(c.n_embd) if c.final_norm else None
    theirs = nn.TransformerEncoder(layer, c.n_layer, norm, enable_nested_tensor=False)
    with torch.no_grad():
        if norm is not None:
            norm.load_state_dict(encoder.transformer.ln_f.state_dict())
        for block, layer in zip(encoder.transformer.blocks, theirs.layers):
            parts = (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
            layer.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            layer.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
            for name, part in (("self_attn.out_proj", block.attn.o_proj), ("norm1", block.ln_1), ("norm2", block.ln_2),
                               ("linear1", block.mlp.up_proj), ("linear2", block.mlp.down_proj)):
                layer.get_submodule(name).load_state_dict(part.state_dict())
    return theirs


@pytest.mark.parametrize("block", ["pre", "post"])
def test_outputs_equal_those_of_torchs_encoder(block):
    post = block == "post"
    ours = make(block=block, mlp="gelu_erf", embed_norm=post, final_norm=not post, n_types=2)
    theirs = torchs(ours).train()  # in evaluation it takes another path
    types = (torch.arange(S) > 2).long().expand(B, S)
    x = ours.wte.weight[TOKENS] + ours.wpe.weight[:S] + ours.types.weight[types]
    if post:
        x = F.layer_norm(x, (24,), ours.ln_e.weight, ours.ln_e.bias)
    padding = torch.arange(S) >= LENGTHS[:, None]
    expected, found = theirs(x, src_key_padding_mask=padding), ours(TOKENS, LENGTHS, types)
    assert expected.std() > 0.3
    torch.testing.assert_close(found[~padding], expected[~padding], atol=1e-4, rtol=1e-4)


def test_parameters_depend_on_the_length_of_texts_by_the_position_table_alone():
    short, long = (sum(p.numel() for p in make(block_size=size).parameters()) for size in (16, 40))
    assert long - short == 24 * 24
    assert short == sum(p.numel() for p in torchs(make()).parameters()) + (V + 16) * 24
    assert sum(p.numel() for p in make(positions="rotary", block_size=40).parameters()) == short - 16 * 24


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_padding_changes_nothing(positions, pool):
    models = [make(Classifier, ClassifierConfig, labels=("a", "b", "c"), pool=pool, positions=positions),
              make(SentenceEncoder, SentenceConfig, positions=positions)]
    for model in models:
        found = model(TOKENS, LENGTHS)
        assert found.std() > 0.1
        for row, length in enumerate(LENGTHS):
            alone = model(TOKENS[row:row + 1, :length], LENGTHS[row:row + 1])
            torch.testing.assert_close(found[row:row + 1], alone, atol=1e-5, rtol=1e-5)


def test_without_positions_the_order_of_tokens_does_not_matter():
    model, order = make(), torch.randperm(S, generator=seeded(1))
    with_positions = model(TOKENS)[:, order] - model(TOKENS[:, order])
    assert with_positions.abs().max() > 0.1
    model.wpe = NoPositions()
    torch.testing.assert_close(model(TOKENS)[:, order], model(TOKENS[:, order]), atol=1e-5, rtol=1e-5)


def test_every_token_sees_every_other_one():
    model, x = make(), torch.randn(1, S, 24, generator=seeded(2), requires_grad=True)
    model.transformer(x)[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(1) > 0).all()


def test_a_text_longer_than_the_model_is_an_error():
    with pytest.raises(ValueError, match="a text of 17 tokens exceeds block_size = 16"):
        make()(torch.zeros(1, 17, dtype=torch.long))


# ----------------------------------------------------------------------------------------------------------------------
# A start from another model

class ToyTask(ClassificationTask):
    def own(self):
        return {"labels": ["a", "b"], "several": False}


def adopted(model, source="elsewhere", **changes):
    task = ToyTask(settings_for("classification", **changes), None, source)
    return task, task.adopt(model, seeded())


@pytest.mark.parametrize("model", [
    make(MaskedLM), make(SentenceEncoder, SentenceConfig, pooler=True, embed_norm=True, norm_eps=1e-3, n_types=2),
    make(Classifier, ClassifierConfig, labels=["a", "c"])], ids=["masked", "sentences", "other labels"])
def test_another_models_encoder_gets_a_new_head(model, capsys, request):
    source = request.node.name  # another one in each test, for the same line is not said twice
    task, new = adopted(model, source, pool="first")
    new.eval()
    torch.testing.assert_close(new.encoder(TOKENS, LENGTHS), model.encoder(TOKENS, LENGTHS), atol=0, rtol=0)
    assert type(new) is Classifier and new.config.labels == ["a", "b"] and new.config.pool == "first"
    assert task.shape(new).items() >= {"n_layer": 2, "n_embd": 24, "block_size": 16, "pool": "first"}.items()
    assert f"{source}: its encoder gets a new head" in capsys.readouterr().err


def test_a_model_with_the_same_labels_goes_on(capsys):
    model = make(Classifier, ClassifierConfig, labels=["a", "b"], pool="first")
    task, same = adopted(model)
    assert same is model and task.shape(same)["pool"] == "first" and not capsys.readouterr().err


def test_a_gpt_is_refused():
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(UserError, match="init_from = elsewhere: is of the class GPT, .* starts from an encoder"):
        adopted(gpt)


def test_classifiers_give_nats_of_logits():
    config = ClassifierConfig(**SIZES, labels=("a", "b", "c"))
    for several, targets in ((False, torch.tensor([2, 0, 1])), (True, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]))):
        model = Classifier(dataclasses.replace(config, several=several)).eval()
        stir(model)
        p = model(TOKENS, LENGTHS).double()
        p = p.sigmoid() if several else p.softmax(-1)
        right = torch.where(targets > 0, p, 1 - p).log().mean(-1) if several else p[torch.arange(B), targets].log()
        torch.testing.assert_close(model(TOKENS, LENGTHS, targets).double(), -right, atol=1e-5, rtol=1e-5)
