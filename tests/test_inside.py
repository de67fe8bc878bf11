"""Looking inside: attention weights, and records of every kind of model."""

import base64
import json
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chat import chat_tokenizer
from configurator import UserError
from encoder import (
    Classifier,
    ClassifierConfig,
    EncoderConfig,
    MaskedLM,
    SentenceConfig,
    SentenceEncoder,
    Tagger,
    TaggerConfig,
)
from inside import record
from inside.attention import attention_weights, noted
from inside.picture import visible
from lecture import Bigram, BigramConfig
from lora import add_lora
from model import GPT, Attention, GPTConfig, init_weights
from run.pictures import draw_map, draw_maps, pixels, read_image
from seq2seq import Seq2Seq, Seq2SeqConfig
from tasks.arithmetic import ArithmeticTask
from tasks.chat import ChatTask
from tasks.classification import ClassificationTask
from tasks.encoding import marks_of
from tasks.image_classification import ImageClassificationTask
from tasks.image_text import ImageTextTask
from tasks.masked import MaskedTask
from tasks.reward import RewardTask
from tasks.settings import Answering, Chatting, Classifying, Filling, Looking, Recognising, Translating
from tasks.tagging import TaggingTask
from tasks.text import TextTask
from tasks.translation import TranslationTask
from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, ControlTokenizer, WordTokenizer
from vit import ImageClassifier, ImageClassifierConfig, ViTConfig
from vlm import Gemma, GemmaConfig, PaliGemma, PaliGemmaConfig

LETTERS = CharTokenizer("\n abcdefghijklmnopqrstuvwxyz")
WORDS = WordTokenizer("the a king queen fool sees hears loves il la re regina matto vede sente ama".split())
SIZES = dict(n_layer=3, n_head=4, n_embd=32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(model):
    """The model with random weights, large enough that attention and predictions are far from even."""
    init_weights(model, seeded())
    for i, p in enumerate(model.parameters()):
        p.data += torch.empty_like(p).normal_(0, 0.25 if p.dim() > 1 else 0.1, generator=seeded(i))
    return model.eval()


def gpt(vocab_size=LETTERS.vocab_size, **more):
    return made(GPT(GPTConfig(**{**SIZES, "block_size": 40, "vocab_size": vocab_size, **more})))


def task_of(cls, tokenizer, **settings):
    found = cls(SimpleNamespace(**settings), {"tokenizer": tokenizer})
    found.step = 12345
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Attention weights

LLAMA = dict(positions="rotary", n_kv_head=2, qk_norm=True, norm="plain_rmsnorm", mlp="swiglu", tied=False)
PAIRS = dict(SIZES, vocab_size=19, block_size=16)
LENGTHS = torch.tensor([7, 4])


def lora_gpt():
    model = gpt()
    add_lora(model, 3, seeded())
    for name, p in model.named_parameters():
        if "lora_b" in name:
            p.data.normal_(0, 0.3, generator=seeded(2))
    return model


def reads(model):
    tokens = torch.randint(model.config.vocab_size, (2, 9), generator=seeded())
    return lambda: model.hidden(tokens)


def translates(model):
    source, tokens = (torch.randint(19, (2, n), generator=seeded(n)) for n in (7, 6))
    return lambda: (model.hidden(tokens, **model.encode(source, LENGTHS)), model(source, LENGTHS, tokens))


def encodes(model):
    tokens = torch.randint(19, (2, 7), generator=seeded())
    return lambda: model.encoder(tokens, LENGTHS)


def vlm(vocab_size=60, **more):
    text = GemmaConfig(n_layer=2, n_head=4, n_kv_head=2, head_dim=10, n_embd=24, vocab_size=vocab_size, block_size=40)
    vision = ViTConfig(n_layer=2, n_head=2, n_embd=32, image_size=42, patch_size=14)
    return made(PaliGemma(PaliGemmaConfig(vision, text)))


def answers(model):
    images, tokens = torch.rand(2, 3, 42, 42, generator=seeded()), torch.randint(60, (2, 7), generator=seeded())
    padding, prefix = torch.tensor([0, 2]), torch.tensor([3, 4])
    return lambda: (model.hidden(tokens, image=model.encode(images)),
                    model.hidden(tokens, image=model.encode(images), prefix=prefix, padding=padding))


KINDS = {
    "gpt": lambda: (model := gpt(), reads(model)),
    "post-norm": lambda: (model := gpt(block="post"), reads(model)),
    "llama": lambda: (model := gpt(**LLAMA), reads(model)),
    "gemma": lambda: (model := made(Gemma(GemmaConfig(**SIZES, n_kv_head=1, head_dim=12, vocab_size=28))),
                      reads(model)),
    "lora": lambda: (model := lora_gpt(), reads(model)),
    "seq2seq": lambda: (model := made(Seq2Seq(Seq2SeqConfig(**PAIRS))), translates(model)),
    "grouped seq2seq": lambda: (model := made(Seq2Seq(Seq2SeqConfig(**PAIRS, n_kv_head=2, positions="rotary",
                                                                    block="post"))), translates(model)),
    "encoder": lambda: (model := made(MaskedLM(EncoderConfig(**PAIRS))), encodes(model)),
    "paligemma": lambda: (model := vlm(), answers(model)),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_weights_times_values_are_what_the_layer_returns(kind):
    """Which says that the mask, the rotation, the norms and the groups are those of the pass itself."""
    model, run = KINDS[kind]()
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    passes = []
    hooks = [layer.register_forward_hook(lambda *one: passes.append(one), with_kwargs=True) for layer in layers]
    with noted(layers) as looks:
        run()
    for hook in hooks:
        hook.remove()
    assert len(looks) == len(passes) >= len(layers)
    for weights, (layer, inputs, named, output) in zip(looks, passes):
        assert weights.dtype == torch.float32 and weights.min() >= 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        memory = named.get("memory")
        _, v = memory if isinstance(memory, tuple) else layer.keys_values(inputs[0] if memory is None else memory)
        y = weights @ v.repeat_interleave(layer.n_head // layer.n_kv_head, dim=1)  # (B, H, T, D)
        torch.testing.assert_close(layer.o_proj(y.transpose(1, 2).flatten(2)), output, atol=1e-5, rtol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_weights_of_a_cache_are_refused():
    model = gpt()
    with pytest.raises(AssertionError, match="one pass over all tokens"):
        attention_weights(model.transformer.blocks[0].attn, torch.zeros(1, 1, 32), cache=object())


# ----------------------------------------------------------------------------------------------------------------------
# Records

GREEDY = dict(temperature=0, max_new_tokens=6)


def text_record():
    task, model = task_of(TextTask, LETTERS), gpt(block="post", final_norm=False)
    found = task.inside(model, {"text": "hello"}, Chatting(temperature=2.0, max_new_tokens=6))
    ids = LETTERS.encode("".join(found["tokens"])).tolist()
    return found, model, model(torch.tensor(ids)[None])[0], ids, [found["tokens"]] * 2, model.transformer


def chat_record():
    tokenizer = chat_tokenizer(LETTERS)
    task, model = task_of(ChatTask, tokenizer), gpt(tokenizer.vocab_size, **LLAMA)
    found = task.inside(model, {"text": "hello"}, Chatting(**GREEDY, system="be"))
    assert "".join(found["tokens"][:found["written"]]) == "<|system|>be<|end|><|user|>hello<|end|><|assistant|>"
    ids = tokenizer.encode_controls("".join(found["tokens"])).tolist()
    return found, model, model(torch.tensor(ids)[None])[0], ids, [found["tokens"]] * 2, model.transformer


def translation_record():
    task = task_of(TranslationTask, WORDS)
    model = made(Seq2Seq(Seq2SeqConfig(**SIZES, vocab_size=WORDS.vocab_size, block_size=12)))
    found = task.inside(model, {"text": "the king sees"}, Translating(temperature=1.0, max_new_tokens=6))
    assert [text.strip() for text in found["source"]] == ["the", "king", "sees", "<eos>"] and found["written"] == 1
    ids = [WORDS.ids[text.strip()] for text in found["tokens"]]
    source = torch.tensor([[WORDS.ids[text.strip()] for text in found["source"]]])
    logits = model(source, torch.tensor([4]), torch.tensor([ids]))[0]
    return found, model, logits, ids, [found["tokens"], found["source"]], model.decoder


def masked_record(**more):
    task, size = task_of(MaskedTask, LETTERS, mask_rate=0.15), marks_of(LETTERS).size
    model = made(MaskedLM(EncoderConfig(**SIZES, vocab_size=size, block_size=20, **more)))
    found = task.inside(model, {"text": "he[MASK]lo"}, Filling())
    ids = [marks_of(LETTERS).cls, *LETTERS.encode("he"), marks_of(LETTERS).mask, *LETTERS.encode("lo")]
    assert found["tokens"] == ["[CLS]", "h", "e", "[MASK]", "l", "o"] and found["written"] == 6
    logits = model(torch.tensor([ids]))[0]
    logits[:, [marks_of(LETTERS).cls, marks_of(LETTERS).mask]] = -math.inf  # what sample.py leaves out too
    return found, model, logits, ids, [found["tokens"]] * 2, model.encoder.transformer


WRITERS = {"text": text_record, "chat": chat_record, "translation": translation_record, "masked": masked_record}


def unpacked(attention):
    data = np.frombuffer(zlib.decompress(base64.b64decode(attention["data"])), np.uint8)
    return torch.tensor(data).view(*(attention[name] for name in ("layers", "heads", "rows", "columns")))


def bits_of(p):
    return torch.distributions.Categorical(p).entropy().item() / math.log(2)


@torch.no_grad()
@pytest.mark.parametrize("kind", WRITERS)
def test_a_record_says_what_the_model_computes(kind):
    found, model, logits, ids, (rows, columns), trunk = WRITERS[kind]()
    T, p = len(found["tokens"]), logits.softmax(-1)
    assert json.loads(json.dumps(found)) == found and found["kind"] == kind and found["title"].endswith("step 12,345")
    ahead = 0 if kind == "masked" else 1  # how far a prediction is ahead of its position
    at = [each["at"] for each in found["predictions"]]
    assert at == list(range(1, T)) + [T] * (ahead and at[-1] == T)
    for each, tops in zip(found["predictions"], found["lens"]["top"], strict=True):
        row = p[each["at"] - ahead]
        assert [share for _, share in each["top"]] == pytest.approx(row.sort(descending=True).values[:20].tolist(),
                                                                    rel=1e-3)
        assert each["entropy"] == pytest.approx(bits_of(row), rel=1e-3)
        assert tops[-1] == each["top"][:3] and len(tops) == len(found["lens"]["layers"]) == 4
        there = None if each["at"] == T or found["tokens"][each["at"]] == "[MASK]" else ids[each["at"]]
        if there is None:
            assert each["p"] is each["rank"] is None
        else:
            assert each["p"] == pytest.approx(row[there].item(), rel=1e-3)
            text, share = each["top"][each["rank"]] if each["rank"] < 20 else (None, each["p"])
            assert share == each["p"] and text in (None, found["tokens"][each["at"]])
    attention = found["attention"][0]
    assert (attention["row_tokens"], attention["column_tokens"]) == (rows, columns)
    assert len(found["embedding"]["names"]) == len(found["embedding"]["xy"]) and found["notes"] == []


@torch.no_grad()
@pytest.mark.parametrize("kind", WRITERS)
def test_its_bytes_are_the_weights(kind):
    """Computed with the scores written out: from the input of each layer to a softmax."""
    found, model, _, ids, _, trunk = WRITERS[kind]()
    cross, inputs = kind == "translation", []
    layers = [block.cross_attn if cross else block.attn for block in trunk.blocks]
    hooks = [layer.register_forward_pre_hook(lambda *one: inputs.append(one), with_kwargs=True) for layer in layers]
    if cross:
        source = torch.tensor([[WORDS.ids[text.strip()] for text in found["source"]]])
        model.hidden(torch.tensor([ids]), **model.encode(source, torch.tensor([4])))
    else:
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    weights = torch.stack([attention_weights(layer, *args, **named)[0] for layer, args, named in inputs])
    data = unpacked(found["attention"][0])
    assert data.shape == weights.shape
    assert (data / 255 - weights).abs().max() <= 0.5 / 255 + 1e-6
    assert (data / 255).sum(-1).sub(1).abs().max() <= data.size(-1) * 0.5 / 255
    if not cross and kind != "masked":
        assert (data.triu(1) == 0).all()


@torch.no_grad()
def test_the_lens_is_the_head_on_the_residual_stream():
    found, model, _, ids, _, _ = chat_record()
    x, rope = model.wpe(model.embed(torch.tensor([ids])), slice(0, len(ids)))
    for layer, block in enumerate([None, *model.transformer.blocks]):
        x = x if block is None else block(x, mask="causal", rope=rope)
        p = model.logits(model.transformer.ln_f(x))[0].softmax(-1)
        for each, tops in zip(found["predictions"], found["lens"]["top"]):
            expected = p[each["at"] - 1].topk(3).values.tolist()
            assert [share for _, share in tops[layer]] == pytest.approx(expected, rel=1e-3)


def test_post_norm_and_bert_have_a_lens_too():
    found = masked_record(block="post", embed_norm=True, final_norm=False)[0]
    assert [tops[-1] for tops in found["lens"]["top"]] == [each["top"][:3] for each in found["predictions"]]


# Now those whose answer is not the next token.

@torch.no_grad()
def test_the_record_of_a_tagger():
    tokenizer, size = LETTERS, marks_of(LETTERS).size
    task = task_of(TaggingTask, tokenizer)
    model = made(Tagger(TaggerConfig(**SIZES, vocab_size=size, block_size=20, tags=("O", "B-x", "I-x"),
                                     intents=("go", "come"))))
    found = task.inside(model, {"text": "to you now"}, Looking())
    assert "".join(found["tokens"]) == "[CLS]to you now"
    ids = torch.tensor([[marks_of(tokenizer).cls, *tokenizer.encode("to you now")]])
    places = torch.tensor([[1, 3, 7]])  # the second word's first token is the space before it
    of_tags, of_intents = model(ids, torch.tensor([11]), places)
    p = [of_intents[0].softmax(-1), *of_tags[0].softmax(-1)]
    assert [each["at"] for each in found["predictions"]] == [0, 1, 3, 7]
    (said,) = task.label(model, [["to", "you", "now"]])
    labels = dict(zip([0, 1, 3, 7], [said.intent, *said.tags]))
    assert found["labels"] == [labels.get(i, "") for i in range(11)]
    for each, row, tops in zip(found["predictions"], p, found["lens"]["top"]):
        assert each["rank"] == 0 and each["p"] == pytest.approx(row.max().item(), rel=1e-3) and tops[-1] == each["top"]
    assert unpacked(found["attention"][0]).shape == (3, 4, 11, 11)


@torch.no_grad()
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("pool", ["mean", "first"])
def test_the_record_of_a_classifier(pool, several):
    task, size = task_of(ClassificationTask, LETTERS), marks_of(LETTERS).size
    model = made(Classifier(ClassifierConfig(**SIZES, vocab_size=size, block_size=8, labels=("a", "b", "c"), pool=pool,
                                             several=several)))
    found = task.inside(model, {"text": "a longer text"}, Classifying())
    assert "".join(found["tokens"]) == "[CLS]a longe"  # it loses its end, as in sample.py
    p = torch.from_numpy(task.probabilities(model, [task.framed(LETTERS.encode("a longer text"))]))[0]
    one, = found["predictions"]
    assert {name: share for name, share in one["top"]} == pytest.approx(dict(zip("abc", p.tolist())), rel=1e-3)
    bits = sum(-q * math.log2(q) for share in p.tolist() for q in ((share, 1 - share) if several else (share,)))
    assert one["entropy"] == pytest.approx(bits, rel=1e-3) and found["lens"]["top"][0][-1] == one["top"]
    assert found["labels"] == ([name for name, share in one["top"] if share > 0.5] if several else [one["top"][0][0]])


def test_a_sentence_encoder_has_attention_alone():
    task, size = task_of(MaskedTask, LETTERS, mask_rate=0.15), marks_of(LETTERS).size
    model = made(SentenceEncoder(SentenceConfig(**SIZES, vocab_size=size, block_size=20)))
    found = task.inside(model, {"text": "hello"}, Filling())
    assert found["predictions"] == [] and found["lens"] is None and len(found["attention"]) == 1


@torch.no_grad()
def test_the_record_of_an_answer_about_an_image(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (448, 300), "red").save(tmp_path / "red.png")
    tokenizer = ControlTokenizer(LETTERS, ["<bos>", "<eos>"])
    task, model = task_of(ImageTextTask, tokenizer), vlm(tokenizer.vocab_size)
    found = task.inside(model, {"text": "what", "image": str(tmp_path / "red.png")}, Answering(**GREEDY))
    assert "".join(found["tokens"][:found["written"]]) == "<bos>what\n"
    image = pixels(read_image(tmp_path / "red.png"), 42)[None]
    ids = tokenizer.encode_controls("".join(found["tokens"]))
    assert len(ids) == len(found["tokens"])
    prefix = torch.tensor([found["written"]])
    p = model(image, torch.tensor(ids)[None], prefix=prefix)[0].softmax(-1)
    at = [each["at"] for each in found["predictions"]]
    assert at[0] == found["written"] and at == list(range(at[0], at[0] + len(at))) and len(at) >= 1
    for each in found["predictions"]:
        assert each["top"][0][1] == pytest.approx(p[each["at"] - 1].max().item(), rel=1e-3)
    assert all(each["rank"] == 0 for each in found["predictions"] if each["at"] < len(ids))  # it took the likeliest
    on_image, own = found["attention"]
    T = len(ids)
    assert on_image["grid"] == [3, 3] and on_image["column_tokens"] == [] and own["column_tokens"] == found["tokens"]
    weights = torch.cat((unpacked(on_image), unpacked(own)), dim=-1) / 255
    assert weights.shape == (2, 4, T, 9 + T) and (weights.sum(-1) - 1).abs().max() <= (9 + T) * 0.5 / 255
    with noted(block.attn for block in model.decoder.transformer.blocks) as looks:
        model(image, torch.tensor(ids)[None], prefix=prefix)
    assert (weights - torch.stack(looks)[:, 0, :, 9:]).abs().max() <= 0.5 / 255 + 1e-6
    shown = base64.b64decode(found["image"].removeprefix("data:image/png;base64,"))
    (tmp_path / "small.png").write_bytes(shown)
    assert Image.open(tmp_path / "small.png").size == (224, 150)


@torch.no_grad()
@pytest.mark.parametrize("cls", [False, True])
def test_the_record_of_a_picture_that_gets_a_class(cls, tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    Image.effect_noise((60, 40), 80).save(tmp_path / "grey.png")
    model = made(ImageClassifier(ImageClassifierConfig(ViTConfig(**SIZES, image_size=12, patch_size=4, cls=cls),
                                                       ("a", "b", "c"))))
    task, request = task_of(ImageClassificationTask, None), {"image": str(tmp_path / "grey.png")}
    found, image = task.inside(model, request, Recognising()), pixels(read_image(tmp_path / "grey.png"), 12)[None]
    assert found["tokens"] == ["class"] * cls + [f"{row},{column}" for row in (1, 2, 3) for column in (1, 2, 3)]
    one, = found["predictions"]
    p = dict(zip("abc", task.probabilities(model, image)[0].tolist()))
    assert dict(one["top"]) == pytest.approx(p, rel=1e-3) and found["lens"]["top"][0][-1] == one["top"]
    assert found["labels"] == [one["top"][0][0]] == [max(p, key=p.get)] and one["p"] == one["top"][0][1]
    shown, = found["attention"]
    assert shown["grid"] == [3, 3] and shown["row_tokens"] == found["tokens"]
    with noted(block.attn for block in model.vision.transformer.blocks) as looks:
        model(image)
    assert (unpacked(shown) / 255 - torch.stack(looks)[:, 0, :, :, int(cls):]).abs().max() <= 0.5 / 255 + 1e-6
    small = base64.b64decode(found["image"].removeprefix("data:image/png;base64,"))
    (tmp_path / "small.png").write_bytes(small)
    assert Image.open(tmp_path / "small.png").size == (60, 40)
    monkeypatch.setattr("inside.record.MOST_TOKENS", 8)
    assert task.inside(model, request, Recognising())["notes"] == [
        "where its 9 patches look is not shown: they are too many"]
    with pytest.raises(UserError, match="this model reads images: add --image=FILE"):
        task.inside(model, {"text": "what"}, Recognising())


# ----------------------------------------------------------------------------------------------------------------------
# What is shown of long texts, large models and odd tokens

@torch.no_grad()
def test_beyond_the_context_the_last_window_is_shown(monkeypatch):
    task, model = task_of(TextTask, LETTERS), gpt(block_size=16)
    found = task.inside(model, {"text": "abcdefgh"}, Chatting(**{**GREEDY, "max_new_tokens": 20}))
    assert found["notes"] == ["only the last 16 of 27 tokens are shown", "the model reads the last 16 of them here;"
                              " when it wrote, its windows began elsewhere"] and found["written"] == 0
    assert len(found["tokens"]) == 16 and found["predictions"][-1]["at"] == 16  # of the token that it didn't read
    logits = model(torch.tensor(LETTERS.encode("".join(found["tokens"])))[None])[0]
    assert found["predictions"][-1]["top"][0][1] == pytest.approx(logits[-1].softmax(-1).max().item(), rel=1e-3)
    whole = task.inside(model, {"text": "abcdefgh"}, Chatting(**{**GREEDY, "max_new_tokens": 8}))
    monkeypatch.setattr(record, "MOST_TOKENS", 10)
    part = task.inside(model, {"text": "abcdefgh"}, Chatting(**{**GREEDY, "max_new_tokens": 8}))
    assert part["notes"] == ["only the last 10 of 16 tokens are shown"] and part["written"] == 8 - 6
    assert part["tokens"] == whole["tokens"][6:]
    moved = [{**each, "at": each["at"] - 6} for each in whole["predictions"][6:]]
    assert part["predictions"] == moved and part["lens"]["top"] == whole["lens"]["top"][6:]
    assert torch.equal(unpacked(part["attention"][0]), unpacked(whole["attention"][0])[:, :, 6:, 6:])
    monkeypatch.setattr(record, "MOST_WEIGHTS", 12 * 5 * 5)
    assert len(task.inside(model, {"text": "abcdefgh"}, Chatting(**GREEDY))["tokens"]) == 5


def test_nothing_is_predicted_after_the_end(monkeypatch):
    tokenizer = ControlTokenizer(LETTERS, ["<eos>"])
    task, model = task_of(TextTask, tokenizer), gpt(tokenizer.vocab_size)
    for last, most in ((tokenizer.eos, 5), (3, 6)):
        monkeypatch.setattr(record, "generate", lambda *_, last=last: iter([torch.tensor([i]) for i in (4, last)]))
        found = task.inside(model, {"text": "abcd"}, Chatting(**GREEDY))
        assert len(found["tokens"]) == 6 and found["predictions"][-1]["at"] == most


def test_of_a_long_text_an_encoder_shows_the_beginning(monkeypatch):
    whole = unpacked(masked_record_of("hello")["attention"][0])
    monkeypatch.setattr(record, "MOST_TOKENS", 4)
    found = masked_record_of("hello")
    assert torch.equal(unpacked(found["attention"][0]), whole[:, :, :4, :4])
    assert found["tokens"] == ["[CLS]", "h", "e", "l"] and found["notes"] == ["only the first 4 of 6 tokens are shown"]
    assert [each["at"] for each in found["predictions"]] == [1, 2, 3]


def masked_record_of(text):
    task, size = task_of(MaskedTask, LETTERS, mask_rate=0.15), marks_of(LETTERS).size
    model = made(MaskedLM(EncoderConfig(**SIZES, vocab_size=size, block_size=20)))
    return task.inside(model, {"text": text}, Filling())


def test_a_sum_shows_all_its_digits():
    task = ArithmeticTask(SimpleNamespace(digits=2, operations="+", working=False))
    task.tokenizers = {"tokenizer": CharTokenizer("0123456789+-*=")}
    model = gpt(14, block_size=task.block_size)
    found = task.inside(model, {"text": "7+8="}, None)
    assert "".join(found["tokens"]).startswith("07+08=") and found["predictions"][-1]["rank"] == 0
    shown = "".join(found["tokens"])[6:] + found["predictions"][-1]["top"][0][0]
    assert task.answer(shown) == task.answers(model, ["07+08="])[0]


def test_tokens_keep_their_spaces():
    words = WordTokenizer(["the", "old", "king", "\u2060,", "who"])
    for tokenizer, text in ((words, "the old king, who"), (ByteTokenizer(), "a b"), (LETTERS, "a b"),
                            (BPETokenizer.train(["the old king"], 290, exact=False), "the old kingdom")):
        assert "".join(map(record.namer(tokenizer), tokenizer.encode(text).tolist())).strip() == text
    assert list(map(record.namer(ByteTokenizer()), "è".encode())) == ["\\xc3", "\\xa8"]
    assert record.namer(LETTERS, {99: "[X]"})(99) == "[X]" and record.namer(LETTERS)(500) == "<500>"


def test_the_embedding_is_projected_on_its_main_axes():
    table = torch.nn.Embedding(40, 8)
    table.weight.data = torch.randn(40, 8, generator=seeded()) * torch.tensor([9.0, 4, 1, 1, 1, 1, 1, 1])
    found = record.embedding(table, [], str)
    centred = table.weight.detach() - table.weight.detach().mean(0)
    values, axes = torch.linalg.eigh(centred.T @ centred)
    expected = centred @ axes[:, [-1, -2]]
    xy = torch.tensor(found["xy"])
    signs = (xy * expected).sum(0).sign()
    torch.testing.assert_close(xy, expected * signs, atol=1e-2, rtol=1e-2)
    assert found["explained"] == pytest.approx((values[[-1, -2]] / values.sum()).tolist(), rel=1e-3)
    large = torch.nn.Embedding(600, 8)
    assert record.embedding(large, [7, 3, 7, 9], str)["names"] == ["3", "7", "9"]
    assert record.embedding(large, [7, 3], str) is None


def test_a_record_of_256_tokens_is_small():
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65)).eval()
    tokenizer = CharTokenizer(map(chr, range(48, 113)))
    init_weights(model, seeded())
    found = task_of(TextTask, tokenizer).inside(model, {"text": "A"}, Chatting(max_new_tokens=255))
    assert len(found["tokens"]) == 256 and len(json.dumps(found)) < 1.9e6
    noise = torch.rand(6, 6, 256, 256, generator=seeded()).tril()  # no attention is as hard to deflate
    worst = {**found, "attention": [record.packed("self", noise, found["tokens"], found["tokens"])]}
    assert len(json.dumps(worst)) < 1.9e6


@pytest.mark.parametrize("task, model, message", [
    (TextTask, lambda: Bigram(BigramConfig(28)), "the model Bigram has no blocks of model.py"),
    (RewardTask, gpt, "no GPT can be looked into yet"),
])
def test_what_has_no_inside_says_so(task, model, message):
    with pytest.raises(UserError, match=message):
        task_of(task, chat_tokenizer(LETTERS) if task is RewardTask else LETTERS).inside(
            model(), {"text": "a"}, Chatting(**GREEDY))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures

def test_each_head_has_a_small_map_under_its_name(monkeypatch, tmp_path):
    Image, drawn = pytest.importorskip("PIL.Image"), []
    for name, function in (("draw_map", draw_map), ("draw_maps", draw_maps)):
        monkeypatch.setattr(f"inside.picture.{name}", lambda *about, function=function, **how:
                            drawn.append(about) or function(*about, **how))
    task, model, path = task_of(TextTask, LETTERS), gpt(), str(tmp_path / "map.png")

    def sampled(**more):
        how = Chatting(**GREEDY, attention=path, **more)
        pieces = list(task.sample(model, [{"text": "a b"}], how))
        assert pieces[-1] == (0, f"\nwrote {path}") and min(Image.open(path).size) > 50
        return "".join(piece for _, piece in pieces[:-1]), *drawn[-1]

    text, mean, rows, columns = sampled()
    assert rows == columns == list(map(visible, text))
    with noted(block.attn for block in model.transformer.blocks) as looks:
        model(torch.tensor(LETTERS.encode(text))[None])
    looks = torch.stack(looks)[:, 0]  # (L, H, T, T)
    torch.testing.assert_close(mean, looks.mean((0, 1)).sqrt())
    torch.testing.assert_close(sampled(attention_layer=2, attention_head=3)[1], looks[1, 2].sqrt())
    torch.testing.assert_close(sampled(attention_layer=3)[1], looks[2].mean(0).sqrt())
    maps = sampled(attention_each=True)[1]
    assert len(maps) == 12 and torch.equal(maps["block 3, head 4"], looks[2, 3].sqrt())
    assert list(sampled(attention_each=True, attention_head=2)[1]) == [f"block {i}, head 2" for i in (1, 2, 3)]
    with pytest.raises(UserError, match="attention_head = 5: the model has 4; 0 takes the mean of all"):
        sampled(attention_head=5)
    longer = list(task.sample(model, [{"text": "a b" * 16}], Chatting(**GREEDY, attention=path)))
    window, count = model.config.block_size, len("".join(piece for _, piece in longer[:-1]))
    assert longer[-1] == (0, f"\nwrote {path}: the last {window} of {count} tokens")


def test_encoders_draw_their_texts(tmp_path):
    pytest.importorskip("PIL.Image")
    size, path = marks_of(LETTERS).size, str(tmp_path / "map.png")
    sizes = dict(SIZES, vocab_size=size, block_size=20)
    for cls, model, how in (
            (MaskedTask, MaskedLM(EncoderConfig(**sizes)), Filling),
            (TaggingTask, Tagger(TaggerConfig(**sizes, tags=("O", "x"))), Looking),
            (ClassificationTask, Classifier(ClassifierConfig(**sizes, labels=("a", "b"))), Classifying)):
        task = task_of(cls, LETTERS, mask_rate=0.15)
        text = "he[MASK]lo" if cls is MaskedTask else "hello"
        pieces = list(task.sample(made(model), [{"text": text}], how(attention=path, attention_each=True)))
        assert pieces[-2:] == [(0, "\n"), (0, f"wrote {path}")]
        if cls is not MaskedTask:
            with pytest.raises(UserError, match="attention: needs a --prompt of one"):
                list(task.sample(model, [{"text": "a\nb"}], how(attention=path)))


@pytest.mark.parametrize("settings, message", [
    (lambda: Chatting(attention="map.txt"), "attention = map.txt: must end in .png or .jpg"),
    (lambda: Chatting(attention_layer=1), "attention_layer = 1: is for --attention=FILE"),
    (lambda: Looking(attention_each=True), "attention_each = True: is for --attention=FILE"),
    (lambda: Chatting(attention="map.png", num_samples=2), "attention = map.png: shows one text"),
    (lambda: Chatting(attention="map.png", chat=True), "attention = map.png: shows one text"),
    (lambda: Filling(attention="map.png", rank="FILE:x"), "attention = map.png: shows one text, and --rank"),
    (lambda: Translating(attention="map.png", attention_head=-1), "attention_head = -1: must be at least 0"),
])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        settings()


def test_names_stay_apart_however_many():
    for count in (3, 70, 256):
        names = [f"token {i}" for i in range(count)]
        picture = draw_map(torch.rand(count, count, generator=seeded()).tril(), names, names)
        assert 100 < picture.width < 3200
    assert Looking().attention == ""
