"""Hidden patches of pictures: the model against transformers' SimMIM, what is hidden and scored, measures, answers."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import run_of, settings_for
from test_image_classification import ALONE, COLOURS, make_loose, make_pictures, opened, prepared, sampled
from test_train import resume

import evaluate
import train
from configurator import UserError
from published.vit import NAMES, ROWS_IN_A_BATCH_OF_ONE
from run import checkpoint
from tasks.loading import load
from tasks.masked_patches import MaskedPatchesTask
from vit import MaskedPatches, MaskedPatchesConfig, ViTConfig, images_of, init_parts, patches_of

Image = pytest.importorskip("PIL.Image")
TINY = dict(n_layer=1, n_head=2, n_embd=16, image_size=8, patch_size=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepared(make_pictures(folder / "source", 20), folder / "set")
    return folder / "set"


@pytest.fixture(scope="module")
def tiny(data):
    return dict(dataset=str(data), n_layer=1, n_head=2, n_embd=16, patch_size=2, batch_size=16, max_iters=40,
                warmup_iters=3, learning_rate=1e-2, min_lr=1e-3, eval_interval=20, log_interval=5, normalise=False,
                device="cpu", dtype="float32")


run = functools.partial(run_of, "masked-patches")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("runs") / "out"
    run(folder, tiny)
    return folder


def made(**changes):
    model = MaskedPatches(MaskedPatchesConfig(ViTConfig(**{**TINY, **changes})))
    init_parts(model, torch.Generator().manual_seed(0))
    return model


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# The model

@torch.no_grad()
def test_the_guess_equals_transformers(tmp_path):
    transformers, stored = pytest.importorskip("transformers"), pytest.importorskip("safetensors.torch")
    theirs = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=8, patch_size=2,
        layer_norm_eps=0.05, encoder_stride=2)).eval()
    for i, value in enumerate(theirs.state_dict().values()):
        value.copy_(noise(*value.shape, seed=i) * 0.3)
    theirs.save_pretrained(tmp_path)  # where the names are those of all versions
    found = stored.load_file(tmp_path / "model.safetensors")
    found = {name.removeprefix("vit."): value for name, value in found.items()}
    ours = MaskedPatches(MaskedPatchesConfig(ViTConfig(n_layer=2, n_head=3, n_embd=24, n_hidden=40, image_size=8,
                                                       patch_size=2, cls=True, mlp="gelu_erf", norm_eps=0.05)))
    state = {"mask.weight": found["embeddings.mask_token"][0], "head.weight": found["decoder.0.weight"][..., 0, 0],
             "head.bias": found["decoder.0.bias"]}
    for name in ours.vision.state_dict():
        name = theirs_name = f"vision.{name}"
        for our, their in NAMES:
            theirs_name = theirs_name.replace(our, their)
        state[name] = found[theirs_name][0] if theirs_name in ROWS_IN_A_BATCH_OF_ONE else found[theirs_name]
    ours.load_state_dict(state)
    images, places = noise(3, 3, 8, 8), torch.tensor([[0, 5, 6], [1, 2, 15], [3, 8, 11]])
    hidden = torch.zeros(3, 16, dtype=torch.bool).scatter(1, places, True)
    expected = patches_of(theirs(images, bool_masked_pos=hidden).reconstruction, 2)[hidden].view(3, 3, 12)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images, places), expected, atol=1e-5, rtol=0)
    targets = noise(3, 3, 12, seed=1)
    torch.testing.assert_close(ours(images, places, targets), ((expected - targets)**2).mean(-1), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"stem": True}, {"cls": True}])
def test_a_guess_does_not_see_what_it_guesses(changes):
    model, images, places = made(**changes), noise(1, 3, 8, 8), torch.tensor([[0, 5, 6, 15]])
    before = model(images, places)
    for patch in range(16):
        other = images.clone()
        y, x = 2 * (patch // 4), 2 * (patch % 4)
        other[:, :, y:y + 2, x:x + 2] += 1
        change = (model(other, places) - before).abs().max()
        assert change == 0 if patch in places else change > 1e-5


def test_patches_are_cut_row_by_row_and_joined_again():
    images = noise(2, 3, 6, 6)
    patches = patches_of(images, 2)
    expected = [[images[b, :, y:y + 2, x:x + 2].reshape(-1) for y in (0, 2, 4) for x in (0, 2, 4)] for b in range(2)]
    assert torch.equal(patches, torch.stack([torch.stack(row) for row in expected]))
    assert torch.equal(images_of(patches, 2), images)


# ----------------------------------------------------------------------------------------------------------------------
# The task

@pytest.mark.parametrize("normalise", [False, True])
def test_hidden_patches_alone_are_targets_and_the_generator_hides_them(trained, data, normalise):
    task, model = opened(trained, data)
    task.settings.normalise = normalise
    rows = np.arange(6)
    arguments, weights = task.batch(rows, torch.Generator().manual_seed(3))
    places, targets = arguments["places"], arguments["targets"]
    assert places.shape == weights.shape == (6, 10) and weights.eq(1).all()  # 0.6 of 16 patches
    assert all(len({*row}) == 10 for row in places.tolist()) and len({tuple(row) for row in places.tolist()}) > 1
    again, _ = task.batch(rows, torch.Generator().manual_seed(3))
    other, _ = task.batch(rows, torch.Generator().manual_seed(4))
    assert places.equal(again["places"]) and not places.equal(other["places"])
    for image, at, found in zip(arguments["images"], places.tolist(), targets):
        for place, target in zip(at, found):
            y, x = 2 * (place // 4), 2 * (place % 4)
            pixels = image[:, y:y + 2, x:x + 2].reshape(-1)
            if normalise:  # with PyTorch's var, as in MAE's code
                pixels = (pixels - pixels.mean()) / math.sqrt(pixels.var() + 1e-6)
            torch.testing.assert_close(target, pixels)
    assert task.weight(rows) == weights.sum()


def test_an_evaluation_is_the_mean_error_beside_floors(trained, data, capsys):
    task, model = opened(trained, data)
    images = {split: (task.dataset.images[at] / 127.5 - 1).astype(np.float32) for split, at in task.images.items()}
    cells = {split: np.stack([each[:, y:y + 2, x:x + 2].transpose(0, 3, 1, 2).reshape(len(each), 12)
                              for y in range(0, 8, 2) for x in range(0, 8, 2)], axis=1)
             for split, each in images.items()}  # (n, 16, 12)
    places = task.places(len(images["val"]), 16, torch.Generator().manual_seed(0)).numpy()
    errors = {name: [] for name in ("model", "mean of the visible patches", "mean training picture", "nearest")}
    for image, patches, hidden in zip(images["val"], cells["val"], places):
        picture = torch.tensor(image).permute(2, 0, 1)[None]
        guess = model(picture, torch.tensor(hidden)[None])[0].detach().numpy()
        seen = [place for place in range(16) if place not in hidden]
        for place, found in zip(hidden, guess):
            near = min(seen, key=lambda other: math.dist(divmod(other, 4), divmod(place, 4)))
            for name, value in zip(errors, (found, patches[seen].mean(0), cells["train"][:, place].mean(0),
                                            patches[near])):
                errors[name].append(((patches[place] - value)**2).mean())
    expected = {name: np.mean(each) for name, each in errors.items()}
    assert task.evaluate(model, "val", ALONE, torch.float32)["loss"] == pytest.approx(expected["model"], abs=1e-6)
    evaluate.main(settings_for("masked-patches", "evaluating", out_dir=str(trained), device="cpu",
                               dtype="float32"))
    measured = json.loads((trained / "evaluation.json").read_text())
    assert measured["loss"] == pytest.approx(checkpoint.read_config(trained / "best")["val_loss"], abs=1e-6)
    assert measured["loss, nearest visible patch"] == pytest.approx(expected["nearest"], abs=1e-5)
    for name in ("mean of the visible patches", "mean training picture"):
        assert measured[f"loss, {name}"] == pytest.approx(expected[name], abs=1e-5)
    assert measured["loss"] < 0.5 * measured["loss, mean training picture"]  # it sees the colour


def test_a_resumed_run_equals_an_undisturbed_one_and_other_tasks_go_on_from_it(tiny, data, tmp_path, capsys):
    changes = dict(max_iters=8, eval_interval=4, dropout=0.1, micro_batch_size=5, stem=True, normalise=True)
    run(tmp_path / "whole", tiny, **changes)
    run(tmp_path / "parts", tiny, **{**changes, "max_iters": 4, "lr_decay_iters": 8})
    resume(tmp_path / "parts", "--max_iters=8")
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    own = dict(dataset=str(data), batch_size=16, max_iters=2, eval_interval=2, device="cpu", dtype="float32")
    for task, source in (("image-classification", "whole"), ("masked-patches", "image-classification")):
        train.main(settings_for(task, **own, init_from=str(tmp_path / source), rates={"vision": 0.0},
                                out_dir=str(tmp_path / task)), {})
        _, before, _ = load(tmp_path / source)
        _, after, _ = load(tmp_path / task)
        torch.testing.assert_close(after.vision.state_dict(), before.vision.state_dict(), atol=0, rtol=0)
        assert f"{source}: its vision tower gets a new head" in capsys.readouterr().err
    run(tmp_path / "more", {name: value for name, value in tiny.items() if name not in TINY and name != "normalise"},
        init_from=str(tmp_path / "whole"), rates={"vision": 0.0, "mask": 0.0}, max_iters=1, learning_rate=1e-4,
        min_lr=0.0)
    torch.testing.assert_close(checkpoint.load(tmp_path / "more" / "last").state, one, atol=1e-3, rtol=0)


def test_pictures_without_classes_will_do(tiny, tmp_path):
    prepared(make_loose(tmp_path / "source"), tmp_path / "set")
    found = run(tmp_path / "out", {**tiny, "dataset": str(tmp_path / "set"), "max_iters": 4, "eval_interval": 4})
    assert [row["step"] for row in found if "val_loss" in row] == [4]
    evaluate.main(settings_for("masked-patches", "evaluating", out_dir=str(tmp_path / "out"), device="cpu"))


def test_pictures_with_text_will_do_and_are_taken_once(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    np.zeros((3, 8, 8, 3), np.uint8).tofile(folder / "images.bin")
    for split, images in (("train", (0, 0, 2)), ("val", (1,))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"image": image}) + "\n" for image in images))
    meta = dict(kind="image-text", image_size=8, images=3, train_rows=3, val_rows=1)
    (folder / "meta.json").write_text(json.dumps(meta))
    task = MaskedPatchesTask(settings_for("masked-patches"))
    task.open(folder, ALONE)
    assert {split: each.tolist() for split, each in task.images.items()} == {"train": [0, 2], "val": [1]}


# ----------------------------------------------------------------------------------------------------------------------
# Answers and errors

def test_guesses_are_drawn_beside_what_was_seen_and_the_truth(trained, data, capsys, tmp_path):
    task, model = opened(trained, data)
    for name in ("red", "blue"):
        Image.new("RGB", (30, 20), COLOURS[name]).save(tmp_path / f"{name}.png")
    both = sampled(trained, capsys, f"--image={tmp_path}/red.png,{tmp_path}/blue.png", f"--draw={tmp_path}/guess.png")
    assert f"{tmp_path}/red.png: 10 of 16 patches hidden, loss 0." in both and f"wrote {tmp_path}/guess.png" in both
    drawn = np.asarray(Image.open(tmp_path / "guess.png")).astype(int)
    panels = [drawn[top + 26:top + 194, left + 4:left + 172] for top in (0, 198) for left in (0, 176, 352)]
    generator = torch.Generator().manual_seed(1337)
    for name, (seen, guess, whole) in (("red", panels[:3]), ("blue", panels[3:])):
        hidden = np.isin(np.arange(16), task.places(1, 16, generator).numpy()).reshape(4, 4)
        hidden = hidden.repeat(42, 0).repeat(42, 1)
        colour = np.array(COLOURS[name])
        assert (whole == colour).all() and (seen[~hidden] == colour).all() and (guess[~hidden] == colour).all()
        assert (abs(seen[hidden] - 128) < 2).all() and 0 < abs(guess[hidden] - colour).mean() < 40
    one = sampled(trained, capsys, f"--image={tmp_path}/red.png")
    assert one.startswith("10 of 16 patches hidden, loss 0.") and task.write(model, image=tmp_path / "red.png") in one
    assert sampled(trained, capsys, f"--image={tmp_path}/red.png", "--seed=1") != one
    assert task.show(model).count("\n") > task.show(model, short=True).count("\n") == 2


def test_a_normalised_guess_has_the_right_mean_and_spread(trained, data):
    task, _ = opened(trained, data)
    model, image, places = made(), noise(3, 8, 8).clamp(-1, 1), torch.tensor([1, 5, 11])
    loss, guess = task.guess(model, image, places)
    patches = patches_of(image[None], 2)[0]
    found = patches_of(guess[None], 2)[0]
    raw = model(image[None], places[None])[0].detach()
    mean, spread = patches[places].mean(1, keepdim=True), (patches[places].var(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(found[places], raw * spread + mean)
    assert torch.equal(found[0], patches[0])
    assert loss == pytest.approx((raw - (patches[places] - mean) / spread).square().mean().item(), abs=1e-6)


def test_wrong_use_is_one_line(trained, tiny, dataset, tmp_path, capsys):
    for changes, message in (
            (dict(patch_size=3), "patch_size = 3: does not divide the images' 8 pixels; 2, 4, 8 do"),
            (dict(patch_size=8), "patch_size = 8: is the whole picture"),
            (dict(dataset=str(dataset)), "of kind text, and this model needs one of kind images or image-labels"),
            (dict(batch_size=999), "batch_size = 999: must be from 1 to"),
            (dict(mask_rate=1.0), "mask_rate = 1.0: must lie between 0 and 1"),
            (dict(init_from=str(trained), normalise=True), "normalise = True, but .* has False: leave it out"),
            (dict(patch_size=1, stem=True), "stem = True, patch_size = 1: a convolutional stem halves")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", tiny, **changes)
    for words, message in ((["--prompt=what"], "prompt = 'what': this model reads images alone"),
                           ([], "image = '': names no file"), (["--image=x.png"], "image = x.png: there is no such"),
                           (["--image=x.png", "--draw=x.txt"], "draw = x.txt: must end in .png or .jpg")):
        with pytest.raises(UserError, match=message):
            sampled(trained, capsys, *words)
