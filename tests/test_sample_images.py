"""sample.py with images: its answers, and the pictures that it writes of boxes and of attention."""

import copy
import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from conftest import settings_for

import sample
from configurator import UserError
from generate import generate, pick_tokens
from inside.attention import attention_weights, image_attention
from published import files, paligemma
from run import checkpoint
from run.pictures import pixels, read_image, save_picture
from tasks import image_text
from tasks.image_text import encode_prompt
from tasks.loading import load
from tokenizer import BPETokenizer, Transcript
from vit import ViTConfig
from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")  # test_published needs it
from test_published import make_tokenizer  # noqa: E402

LINE = "-" * 80
N, VOCAB = 9, 1256  # image tokens, size of the vocabulary


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a tiny random PaliGemma. Its weights are large, so that its answers vary."""
    model = PaliGemma(PaliGemmaConfig(
        ViTConfig(n_layer=2, n_head=2, n_embd=32, image_size=42, patch_size=14),
        GemmaConfig(n_layer=2, n_head=4, n_kv_head=2, head_dim=10, n_embd=24, vocab_size=VOCAB, block_size=64)))
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=seeded(i))
    folder = tmp_path_factory.mktemp("published")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    paligemma.save(model, paligemma.load_tokenizer(folder / "tokenizer.json"), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(published):
    """(task, model) of the published folder."""
    return load(published)[:2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The paths of two pictures, which differ in size and mode."""
    folder, values = tmp_path_factory.mktemp("photos"), np.random.default_rng(0).integers(0, 256, (30, 60, 3))
    paths = [str(folder / "a.png"), str(folder / "b.png")]
    Image.fromarray(values.astype(np.uint8)).save(paths[0])
    Image.fromarray(values[:, :20, 0].astype(np.uint8)).save(paths[1])
    return paths


def sampling(**settings):
    defaults = {"device": "cpu", "max_new_tokens": 12, "temperature": 0.0}
    return settings_for("image-text", "sampling", **{**defaults, **settings})


def run(folder, **settings):
    sample.main(sampling(init_from=str(folder), **{"prompt": "caption en", **settings}))


@torch.inference_mode()
def expected_ids(loaded, path, prompt="caption en", count=12):
    task, model = loaded
    image = model.encode(pixels(read_image(path), 42)[None])
    pick = functools.partial(pick_tokens, temperature=0)
    tokens = torch.from_numpy(encode_prompt(task.tokenizer, prompt))[None]
    return torch.cat(list(generate(model, tokens, count, pick, image=image))).tolist()


def expected_answer(loaded, path, prompt="caption en", count=12):
    return loaded[0].tokenizer.decode(expected_ids(loaded, path, prompt, count))


# ----------------------------------------------------------------------------------------------------------------------
# Answers

def test_an_answer_is_streamed_from_a_published_folder_and_from_a_run(published, loaded, photos, tmp_path, capsys):
    run(published, image=photos[0])
    answer = capsys.readouterr().out
    assert answer == expected_answer(loaded, photos[0]) + "\n" and len(answer) > 12
    task, model = loaded
    config = {"model_type": "paligemma", "model": dataclasses.asdict(model.config), "settings": {"task": "image-text"}}
    with checkpoint.Writer(tmp_path, background=False) as writer:
        writer.save(["best"], model, task.tokenizers, config, {})
    run("", out_dir=str(tmp_path), image=photos[0])
    assert capsys.readouterr().out == answer
    request = {"text": "caption en", "image": photos[0]}
    pieces = [piece for _, piece in task.sample(model, [request], sampling())]
    assert "".join(pieces) == answer[:-1] and sum(map(bool, pieces)) == 12
    found = ["", ""]
    for row, piece in task.sample(model, [{"text": "ocr", "image": photos[1]}, request], sampling()):
        found[row] += piece
    assert found == [f"{photos[1]}: {expected_answer(loaded, photos[1], 'ocr')}", f"{photos[0]}: {answer[:-1]}"]


def test_many_samples_of_many_images_encode_each_image_once(published, loaded, photos, capsys, monkeypatch):
    encoded, encode = [], PaliGemma.encode
    monkeypatch.setattr(PaliGemma, "encode", lambda self, images: encoded.append(len(images)) or encode(self, images))
    run(published, image=",".join(photos), num_samples=2)
    answers = [f"{path}: {expected_answer(loaded, path)}\n{LINE}\n" for path in photos for _ in range(2)]
    assert capsys.readouterr().out == "".join(answers) and answers[0] != answers[2]
    assert encoded[0] == 2 and len(encoded) == 1 + len(answers)  # one call by the command, one for each expected answer
    run(published, image=photos[0], num_samples=3, temperature=1.5)
    texts = capsys.readouterr().out.split(f"\n{LINE}\n")
    assert len(set(texts)) == 4 and texts.pop() == "" and all(text.startswith(f"{photos[0]}: ") for text in texts)


def test_the_prompt_of_an_image_ends_in_one_newline(published, loaded, photos, capsys):
    run(published, image=photos[0], prompt="ocr\r\n")  # as a file or `echo` ends it
    assert capsys.readouterr().out == expected_answer(loaded, photos[0], "ocr") + "\n"


def test_an_answer_ends_at_eos_at_the_stop_text_and_at_block_size(published, loaded, photos, capsys):
    answer = expected_answer(loaded, photos[0])
    run(published, image=photos[0], stop=answer[3:5])
    assert capsys.readouterr().out == answer[:answer.index(answer[3:5])] + "\n"
    task, model = copy.copy(loaded[0]), loaded[1]
    ids, tokenizer = expected_ids(loaded, photos[0]), copy.copy(task.tokenizer)
    tokenizer.eos, task.tokenizers = ids[5], {"tokenizer": tokenizer}
    pieces = task.sample(model, [{"text": "caption en", "image": photos[0]}], sampling())
    assert "".join(piece for _, piece in pieces) == tokenizer.decode(ids[:ids.index(ids[5])])
    run(published, image=photos[0], max_new_tokens=500)
    room = 64 - N - len(encode_prompt(tokenizer, "caption en"))
    assert capsys.readouterr().out == expected_answer(loaded, photos[0], count=room) + "\n"
    with pytest.raises(UserError, match="leave no room for an answer in the model's 64 positions"):
        run(published, image=photos[0], prompt=60 * "x")


def test_weights_are_loaded_in_the_precision_that_is_asked_for(published, photos, monkeypatch, capsys):
    dtypes, unfilled = [], files.unfilled
    monkeypatch.setattr(files, "unfilled", lambda *args: dtypes.append(args[-1]) or unfilled(*args))
    run(published, image=photos[0], dtype="bfloat16")
    run(published, image=photos[0])
    assert dtypes == [torch.bfloat16, torch.float32] and capsys.readouterr().out.count("\n") == 2


def test_a_file_name_may_have_a_comma_and_an_empty_name_is_refused(published, photos, tmp_path, capsys):
    named = tmp_path / "a,b.png"
    shutil.copy(photos[0], named)
    run(published, image=str(named), attention=str(tmp_path / "map.png"))
    assert capsys.readouterr().out.endswith("map.png\n") and (tmp_path / "map.png").exists()
    for image, message in ((f"{photos[0]},,{photos[1]}", "names no file, and this model needs one"),
                           ("", "names no file, and this model needs one"), ("c,d.png", "image = c: there is no")):
        with pytest.raises(UserError, match=message):
            sample.check(sampling(image=image), {})


def test_a_picture_that_can_not_be_written_is_an_error(published, photos, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="map.png: is a folder; name a file"):
        (tmp_path / "map.png").mkdir()
        sampling(image=photos[0], attention=str(tmp_path / "map.png"))

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="new.png can't be written: No space left on device"):
        run(published, image=photos[0], attention=str(tmp_path / "new.png"))


def test_a_picture_too_large_for_its_format_is_an_error(tmp_path):
    with pytest.raises(UserError, match="x.jpg can't be written: .*; a .png holds its 1 x 65501 pixels"):
        save_picture(Image.new("L", (1, 65_501)), tmp_path / "x.jpg")
    assert "wrote" in save_picture(Image.new("L", (1, 65_501)), tmp_path / "x.png")


def test_write_returns_the_answer_about_an_image(loaded, photos):
    task, model = loaded
    assert task.write(model, "caption en", photos[0], max_new_tokens=12, temperature=0) == expected_answer(
        loaded, photos[0])


def test_settings_that_do_not_fit_together_are_refused(published, photos):
    with pytest.raises(UserError, match="this model reads images: add --image=FILE"):
        run(published)
    with pytest.raises(UserError, match="image = none.png: can't be read"):
        run(published, image=f"{photos[0]},none.png")
    for setting in (dict(image="a.png,b.png"), dict(image="a.png", num_samples=2), dict()):
        with pytest.raises(UserError, match="draw = x.png: needs one --image and --num_samples=1"):
            sampling(draw="x.png", **setting)
    with pytest.raises(UserError, match="attention = x.tif: must end in .png or .jpg"):
        sampling(attention="x.tif", image="a.png")


# ----------------------------------------------------------------------------------------------------------------------
# Streaming

def sentencepiece_like(strip):
    """A small BPE of Gemma's kind: characters, a few words, bytes for the rest. strip: decoding drops a leading space.

    Llama's tokenizer strips one, Gemma's does not.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁catdogshe\n", "▁c", "▁ca",
             "▁cat", "▁▁"]
    merges = [("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("▁", "▁")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(dict.fromkeys(vocab))}, merges, unk_token="<unk>",
                               byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    return BPETokenizer(bpe)


@pytest.mark.parametrize("strip", [False, True])
def test_streamed_text_equals_the_whole_with_a_sentencepiece_tokenizer(strip):
    tokenizer = sentencepiece_like(strip)
    for said in ("cat dog", " a cat  cat", "   cat", "cats 你好 🙂🙂 a\n cat", "é", "a \n  dog", " \ufffd"):
        ids = tokenizer.encode(said).tolist()
        whole = tokenizer.decode(ids)
        assert whole == (said.removeprefix(" ") if strip else said)
        text, pieces = Transcript(tokenizer, ""), []
        for token in [*ids, tokenizer.eos]:
            text.append(token)
            pieces.append(text.news())
        assert not any("\ufffd" in piece for piece in pieces) and text.ids == ids
        pieces.append(text.news(final=True))
        assert "".join(pieces) == str(text) == whole
        assert max(map(len, pieces)) <= 4  # text is shown as soon as it is whole


def test_each_token_is_decoded_a_bounded_number_of_times(monkeypatch):
    tokenizer = sentencepiece_like(True)
    decoded, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    text = Transcript(tokenizer, "")
    for token in 100 * tokenizer.encode(" cat 你").tolist():
        text.append(token)
    assert max(decoded) <= 8 and sum(decoded) < 10 * len(text.ids)


# ----------------------------------------------------------------------------------------------------------------------
# Boxes

def test_boxes_of_the_answer_are_printed_and_drawn(published, loaded, photos, tmp_path, capsys, monkeypatch):
    answer = "<loc0256><loc0512><loc0768><loc1023> cat ; <loc0000><loc0000><loc0512><loc0256> dog"
    ids = loaded[0].tokenizer.encode(answer)
    monkeypatch.setattr(image_text, "generate", lambda *args, **how: (torch.tensor([i]) for i in [*ids, 1]))
    out = tmp_path / "new" / "boxes.png"
    run(published, image=photos[0], draw=str(out))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "cat: left 30, top 8, right 60, bottom 22", "dog: left 0, top 0, right 15, bottom 15", f"wrote {out}"]
    drawn = read_image(out)
    assert drawn.size == (60, 30) and drawn.getpixel((31, 21)) == (255, 0, 0) and drawn.getpixel((14, 2)) == (0, 0, 255)


def test_an_answer_without_boxes_says_so(published, photos, tmp_path, capsys):
    run(published, image=photos[0], draw=str(tmp_path / "boxes.png"))
    assert f"there is no box in the answer, so {tmp_path / 'boxes.png'} was not written" in capsys.readouterr().out
    assert not (tmp_path / "boxes.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Attention

def spied(model, run):
    """[(attention module, its inputs, its output)], one for each layer of the decoder that run() calls, in order."""
    seen = []
    hooks = [block.attn.register_forward_hook(lambda *layer: seen.append(layer))
             for block in model.decoder.transformer.blocks]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_weights_are_those_of_the_fused_kernel(published, dtype):
    model, _ = files.load(str(published), dtype=dtype)
    images, tokens = torch.rand(2, 3, 42, 42, generator=seeded()), torch.randint(VOCAB, (2, 7), generator=seeded())
    padding, prefix = torch.tensor([0, 2]), torch.tensor([3, 4])
    layers = spied(model, lambda: model.hidden(tokens, image=model.encode(images), prefix=prefix, padding=padding))
    assert len(layers) == 2
    for attention, (x, mask, rope, *_), output in layers:
        weights = attention_weights(attention, x, mask, rope)
        assert weights.shape == (2, 4, N + 7, N + 7) and weights.dtype == torch.float32
        visible = mask.expand_as(weights)
        assert weights[~visible].abs().max() == 0 and weights[visible].min() > 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, N + 7))
        v = attention.v_proj(x).unflatten(-1, (2, 10)).transpose(1, 2).repeat_interleave(2, dim=1)  # (B, H, S, D)
        y = (weights @ v.float()).to(dtype).transpose(1, 2).flatten(2)
        close = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.02, rtol=0.02)
        torch.testing.assert_close(attention.o_proj(y), output, **close)


@torch.no_grad()
def test_the_attention_of_a_token_is_that_of_the_position_that_wrote_it(loaded):
    (task, model), image = loaded, torch.rand(1, 3, 42, 42, generator=seeded())
    prompt = encode_prompt(task.tokenizer, "caption en").tolist()
    answer = torch.randint(VOCAB, (4,), generator=seeded()).tolist()
    looks = image_attention(model, image, prompt, answer)
    assert looks.shape == (4, N) and looks.min() > 0 and looks.sum(1).max() < 1
    for i in range(4):  # each row ends where it ended when token i was picked
        row = dict(tokens=torch.tensor([prompt + answer[:i]]), prefix=torch.tensor([len(prompt)]))
        layers = spied(model, lambda row=row: model.hidden(image=model.encode(image), **row))
        last = [attention_weights(attention, *inputs[:3])[0, :, -1, :N] for attention, inputs, _ in layers]
        torch.testing.assert_close(looks[i], torch.stack(last).mean((0, 1)))
    assert not any(block.attn._forward_pre_hooks for block in model.decoder.transformer.blocks)


def test_the_heat_map_has_a_panel_for_each_token(published, photos, tmp_path, capsys):
    run(published, image=photos[0], attention=str(tmp_path / "map.png"))
    assert capsys.readouterr().out.endswith(f"\nwrote {tmp_path / 'map.png'}\n")
    grid = read_image(tmp_path / "map.png")
    assert grid.size == (5 * (224 + 8), 3 * (112 + 8 + 22))  # the image and twelve tokens, five in a row


def test_an_empty_answer_has_the_heat_map_of_its_eos(published, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(image_text, "generate", lambda *args, **how: iter([torch.tensor([1])]))
    run(published, image=photos[0], attention=str(tmp_path / "map.png"))
    assert Image.open(tmp_path / "map.png").width == 2 * (224 + 8)
