"""Pictures by class: the classifier against transformers' ViT, what prepare.py takes and refuses, measures, answers."""

import functools
import gzip
import hashlib
import json
import os
import shlex
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_of, sampled, settings_for
from test_train import resume

import evaluate
import prepare
import sample
import train
from batches import ImageTextDataset, scaled
from configurator import UserError, parse, say
from inside.attention import rollout
from machine.distributed import World
from run import checkpoint
from sources import known, labelled_images
from sources.download import Offline
from tasks.image_classification import ImageClassificationTask, changed, nearest
from tasks.loading import load
from tokenizer import CharTokenizer
from vit import ImageClassifier, ImageClassifierConfig, ViT, ViTConfig, init_parts
from vlm import SigLIP, SigLIPConfig, TextEncoderConfig

Image = pytest.importorskip("PIL.Image")
ALONE = World(0, 1, torch.device("cpu"))
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def make_pictures(folder, count=12, parts=("",), seed=0):
    """Folders of noisy pictures of one colour each; below folders of `parts`, if they have names."""
    generator = np.random.default_rng(seed)
    for part in parts:
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(-30, 30, (9, 12, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


def prepared(folder, to, **how):
    how = labelled_images.How(**{"image_size": 8, **how})
    return labelled_images.prepare(labelled_images.find(folder), to, how, "made up")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepared(make_pictures(folder / "source", 20), folder / "set")
    return folder / "set"


@pytest.fixture(scope="module")
def tiny(data):
    return dict(dataset=str(data), n_layer=1, n_head=2, n_embd=16, patch_size=4, batch_size=16, max_iters=30,
                warmup_iters=3, learning_rate=1e-2, min_lr=1e-3, eval_interval=15, log_interval=5, shift=1, flip=True,
                device="cpu", dtype="float32")


run = functools.partial(run_of, "image-classification")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("runs") / "out"
    run(folder, tiny)
    return folder


def opened(folder, data):
    task, model, _ = load(folder)
    task.open(data, ALONE)
    task.fit(model)
    return task, model


# ----------------------------------------------------------------------------------------------------------------------
# The model

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, transformers' model) of a tiny random ViT."""
    transformers = pytest.importorskip("transformers")
    names = dict(enumerate(["red", "mauve", "blue", "green", "pink"]))
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=8, patch_size=4,
        layer_norm_eps=0.05, id2label=names)).eval()
    for i, value in enumerate(theirs.state_dict().values()):
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    folder = tmp_path_factory.mktemp("hub") / "vit"
    theirs.save_pretrained(folder)
    return folder, theirs


def test_a_classifier_with_a_class_token_equals_transformers(published):
    folder, theirs = published
    task, ours, _ = load(folder)
    assert type(task) is ImageClassificationTask and ours.config.labels == ("red", "mauve", "blue", "green", "pink")
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(images).logits, ours(images)
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-5
    targets = torch.tensor([0, 3, 4])
    torch.testing.assert_close(ours(images, targets), -found.log_softmax(-1)[range(3), targets])


def test_a_published_model_names_images_and_is_fine_tuned_with_a_new_head(published, data, tiny, tmp_path, capsys):
    folder, theirs = published
    Image.new("RGB", (30, 20), COLOURS["red"]).save(tmp_path / "red.png")
    sample.main(parse(sample.Settings, [f"--init_from={folder}", "--device=cpu", f"--image={tmp_path}/red.png"],
                      **sample.HOW)[0])
    picture = (torch.tensor(COLOURS["red"])[:, None, None] / 127.5 - 1).expand(1, 3, 8, 8)
    p = theirs(picture).logits.softmax(-1)[0]
    assert f"{theirs.config.id2label[int(p.argmax())]} {p.max():.3f}" in capsys.readouterr().out
    own = {name: value for name, value in tiny.items() if name not in ("n_layer", "n_head", "n_embd", "patch_size")}
    train.main(settings_for("image-classification", **own, init_from=str(folder), rates={"vision": 0.0},
                            out_dir=str(tmp_path / "out")), {})
    _, tuned, _ = load(tmp_path / "out")
    torch.testing.assert_close(tuned.vision.state_dict(), load(folder)[1].vision.state_dict(), atol=0, rtol=0)
    assert tuned.config.labels == ("blue", "green", "red")


def test_attention_rolled_out_is_the_product_of_transformers_weights(published):
    _, model, _ = load(published[0])
    published[1].set_attn_implementation("eager")
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = published[1](image, output_attentions=True).attentions
    expected = torch.linalg.multi_dot([0.5 * each[0].mean(0) + 0.5 * torch.eye(5) for each in reversed(weights)])
    torch.testing.assert_close(rollout(model, image), expected[0, 1:])
    assert not any(module._forward_pre_hooks for module in model.modules())
    mean = ImageClassifier(ImageClassifierConfig(ViTConfig(n_layer=3, n_head=2, n_embd=8, image_size=8, patch_size=4),
                                                 ("a", "b")))
    assert rollout(mean, image).sum().item() == pytest.approx(1) and rollout(mean, image).shape == (4,)


def test_a_published_model_that_differs_is_refused_by_name(published, tmp_path):
    for changes, message in ((dict(hidden_act="swish"), "hidden_act = 'swish', but only 'gelu'"),
                             (dict(architectures=["ViTModel"]), "architectures = .'ViTModel'., but only"),
                             (dict(id2label={"1": "a", "2": "b"}), "id2label = .*must name the classes from 0 on"),
                             (dict(num_hidden_layers=3), "vision.transformer.blocks.2"),
                             (dict(id2label={"0": "a", "1": "b"}), "head.weight")):
        changed_folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(published[0], changed_folder)
        config = json.loads((changed_folder / "config.json").read_text())
        (changed_folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=message):
            load(changed_folder)
    for found, message in ((dict(image_mean=[0.485, 0.456, 0.406]), "image_mean = .0.485.*, but only .0.5, 0.5, 0.5."),
                           (dict(do_normalize=False), "do_normalize = False, but only True can be loaded"),
                           (dict(rescale_factor=1 / 127.5), "rescale_factor = 0.0078.*, but only 1/255 can be loaded")):
        (published[0] / "preprocessor_config.json").write_text(json.dumps(found))
        with pytest.raises(UserError, match=message):
            load(published[0])
    (published[0] / "preprocessor_config.json").unlink()


def test_patches_come_row_by_row_from_the_top():
    embed = ViT(ViTConfig(n_layer=1, n_head=1, n_embd=8, image_size=24, patch_size=8)).patches
    for place in range(9):
        image = torch.zeros(1, 3, 24, 24)
        y, x = 8 * (place // 3), 8 * (place % 3)
        image[..., y:y + 8, x:x + 8] = 1
        moved = (embed(image) - embed(torch.zeros(1, 3, 24, 24))).flatten(2).abs().sum(1)[0]  # (9,)
        assert (moved > 0).nonzero().tolist() == [[place]]


@torch.no_grad()
def test_a_stem_sees_each_patch_in_its_place_and_each_image_alone():
    stem = ViT(ViTConfig(n_layer=1, n_head=1, n_embd=8, image_size=24, patch_size=8, stem=True)).patches
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stem(images)[1:2], stem(images[1:2]))
    for layer in stem:
        if isinstance(layer, torch.nn.Conv2d):  # so that nothing is cut off or cancels
            layer.weight.abs_()
            layer.bias.zero_()
    bare = torch.nn.Sequential(*(layer for layer in stem if not isinstance(layer, torch.nn.GroupNorm)))
    seen = torch.zeros(9, 24, 24, dtype=torch.bool)  # which patch sees which pixel
    for y in range(24):
        for x in range(24):
            image = torch.zeros(1, 3, 24, 24)
            image[..., y, x] = 1
            seen[:, y, x] = bare(image).flatten(2).sum(1)[0] > 0
    for place in range(9):
        y, x = 8 * (place // 3), 8 * (place % 3)
        expected = torch.zeros(24, 24, dtype=torch.bool)
        expected[max(0, y - 7):y + 8, max(0, x - 7):x + 8] = True  # the patch, and 7 pixels above it and on its left
        assert seen[place].equal(expected)


def test_without_positions_the_mean_of_patches_does_not_know_their_order():
    model = ImageClassifier(ImageClassifierConfig(ViTConfig(n_layer=1, n_head=2, n_embd=8, image_size=8, patch_size=4),
                                                  ("a", "b")))
    init_parts(model, torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    swapped = torch.cat((images[..., 4:], images[..., :4]), dim=-1)
    with torch.no_grad():
        assert (model(images) - model(swapped)).abs().max() > 1e-3
        model.vision.wpe.weight.zero_()
        torch.testing.assert_close(model(images), model(swapped))


# ----------------------------------------------------------------------------------------------------------------------
# Preparing

def test_each_class_is_divided_alike_and_pictures_keep_their_pixels(tmp_path):
    meta = prepared(make_pictures(tmp_path / "source", 20), tmp_path / "set", val_fraction=0.2)
    assert meta["labels"] == ["blue", "green", "red"]
    assert [meta[f"{split}_rows"] for split in ("train", "val", "test")] == [36, 12, 12]
    data, seen = ImageTextDataset(tmp_path / "set", "image-labels"), set()
    for rows in data.rows.values():
        assert len({row["label"] for row in rows}) == 3
        for row in rows:
            picture = Image.open(tmp_path / "source" / row["file"]).resize((8, 8), Image.Resampling.BICUBIC)
            assert (data.images[row["image"]] == np.asarray(picture)).all() and row["file"].startswith(row["label"])
            seen.add(row["file"])
    assert len(seen) == 60


@pytest.mark.parametrize("parts, given", [(("Train", "test"), "test"), (("train", "val", "test"), "val test"),
                                          (("training", "validation"), "val")])
def test_folders_of_parts_stay_what_they_are(tmp_path, parts, given):
    source = tmp_path / "source"
    for seed, part in enumerate(parts):
        make_pictures(source, 10, (part,), seed)
    prepared(source, tmp_path / "set")
    for split, rows in ImageTextDataset(tmp_path / "set", "image-labels").rows.items():
        tops = {row["file"].partition("/")[0] for row in rows}
        assert {labelled_images.SPLITS[top.lower()] for top in tops} == {split if split in given else "train"}
    if given == "val test":
        with pytest.raises(UserError, match="val_fraction = 0.2: made up has folders for val and test"):
            prepared(source, tmp_path / "set", val_fraction=0.2)


def test_what_can_not_be_used_is_named_in_one_line(tmp_path, capsys):
    source = make_pictures(tmp_path / "source", 10)
    (source / "README.md").write_text("three colours")
    (source / "red" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="image = .*red/0.png: can't be read: .*; replace or .* --unreadable=skip"):
        prepare.main(prepare.Settings(name=str(tmp_path / "set"), image_size=8), [str(source)])
    assert not (tmp_path / "set").exists()
    (source / "red" / "1.png").write_bytes((source / "red" / "2.png").read_bytes())
    prepare.main(prepare.Settings(name=str(tmp_path / "set"), image_size=8, unreadable="skip"), [str(source)])
    said = capsys.readouterr().out
    assert "left out: image = " in said and "1 that can't be read, 1 that are equal to an earlier one" in said
    assert "train on it: python train.py config/fashion_mnist.py" in said
    assert json.loads((tmp_path / "set" / "meta.json").read_text())["images"] == 28
    (source / "odd").mkdir()
    (source / "red" / "2.png").rename(source / "odd" / "2.png")
    with pytest.raises(UserError, match="only one picture is of the class odd .1 such classes.* add pictures, or"):
        prepare.main(prepare.Settings(name=str(tmp_path / "new"), image_size=8, unreadable="skip"), [str(source)])
    with pytest.raises(UserError, match="tokenizer = 'byte': pictures by class have no text"):
        prepare.main(prepare.Settings(name=str(tmp_path / "new"), tokenizer="byte"), [str(source)])


def test_folders_that_are_no_classes_are_not_taken_for_some(tmp_path):
    one = make_pictures(tmp_path / "one", 3)
    for name in ("red", "green"):
        for path in (one / name).iterdir():
            path.unlink()
    texts = make_pictures(tmp_path / "texts", 1)
    for i in range(4):
        (texts / f"{i}.txt").write_text("words")
    with pytest.raises(UserError, match="lie in one folder, blue: each .* two classes needs one; .* give .*one/blue"):
        labelled_images.find(one)
    assert not labelled_images.find(texts)
    assert len(labelled_images.find(texts, "*.png")) == 3


def make_loose(folder, count=20, parts=("",), seed=0):
    """Noisy pictures of one colour each, in the folder itself or in folders of `parts`."""
    for source in make_pictures(folder / "made", count, parts, seed).rglob("*.png"):
        *part, colour, name = source.relative_to(folder / "made").parts
        folder.joinpath(*part).mkdir(exist_ok=True)
        source.rename(folder.joinpath(*part, f"{colour}_{name}"))
    shutil.rmtree(folder / "made")
    return folder


def test_pictures_in_no_folder_of_a_class_are_divided_and_none_is_on_both_sides(tmp_path, capsys):
    source = make_loose(tmp_path / "my_pictures")
    for i in range(30):  # copies
        shutil.copy(source / f"red_{i % 3}.png", source / f"z{i}.png")
    (source / "about.txt").write_text("three colours")
    prepare.main(prepare.Settings(name=str(tmp_path / "set"), image_size=8, val_fraction=0.2), [str(source)])
    said = capsys.readouterr().out
    for line in ("left out: 1 files that are no pictures, or lie in other folders", "30 that are equal to an earlier",
                 "val: by hash\n", "train on it: python train.py --task=masked-patches --dataset="):
        assert line in said
    data = ImageTextDataset(tmp_path / "set", "images")
    assert {split: len(rows) for split, rows in data.rows.items()} == {"train": 48, "val": 12}
    pixels = {split: {data.images[row["image"]].tobytes() for row in rows} for split, rows in data.rows.items()}
    assert len(pixels["train"] | pixels["val"]) == 60
    for row in data.rows["val"]:
        picture = Image.open(source / row["file"]).resize((8, 8), Image.Resampling.BICUBIC)
        assert row.keys() == {"image", "file"} and (data.images[row["image"]] == np.asarray(picture)).all()
    run_settings = settings_for("image-classification", dataset=str(tmp_path / "set"), patch_size=4)
    with pytest.raises(UserError, match="of kind images, .* image-labels: .* have no classes: sort them into a folder"):
        ImageClassificationTask(run_settings).open(tmp_path / "set", ALONE)


def test_parts_of_pictures_without_classes_stay_and_what_can_not_be_divided_is_refused(tmp_path, capsys):
    source = make_loose(tmp_path / "source", 4, ("train", "val", "test"))
    shutil.copy(source / "train" / "red_0.png", source / "val")
    meta = prepared(source, tmp_path / "set")
    assert [meta[f"{split}_rows"] for split in ("train", "val", "test")] == [12, 12, 12]
    assert "val: 1 of 12 pictures are also in training" in capsys.readouterr().out
    with pytest.raises(UserError, match="val_fraction = 0.2: made up has folders for val; leave it out"):
        prepared(source, tmp_path / "set", val_fraction=0.2)
    (tmp_path / "one").mkdir()
    shutil.copy(source / "train" / "red_0.png", tmp_path / "one")
    with pytest.raises(UserError, match="made up: has one picture alone, so that none can be held out: add some"):
        prepared(tmp_path / "one", tmp_path / "new")
    with pytest.raises(UserError, match="tokenizer = 'byte': pictures without classes have no text"):
        prepare.main(prepare.Settings(name=str(tmp_path / "new"), tokenizer="byte"), [str(source)])


def test_a_loose_picture_makes_no_class_of_the_parts_and_a_class_beside_them_is_refused(tmp_path):
    source = make_pictures(tmp_path / "source", 2, ("train", "test"))
    shutil.copy(source / "train" / "red" / "0.png", source)
    assert {row["label"] for row in labelled_images.find(source)} == {"red", "green", "blue"}
    make_pictures(source, 2, ("holiday",))
    with pytest.raises(UserError, match="test, train are parts, and holiday is none: give each part"):
        labelled_images.find(source)


def test_odd_names_of_classes_become_one_line_of_text(tmp_path):
    source = make_pictures(tmp_path / "source", 2)
    (source / "red").rename(source / "deep\nred\x1b")
    (source / "blue").rename(os.fsdecode(os.fsencode(source) + b"/bl\xe9"))
    assert {row["label"] for row in labelled_images.find(source)} == {"deep red\u241b", "green", "bl\\xe9"}


def test_unknown_classes_and_copies_in_the_held_out_parts_are_said(tmp_path, capsys):
    source = make_pictures(tmp_path / "source", 4, ("train", "val", "test"))
    (source / "test" / "red").rename(source / "test" / "mauve")
    (source / "val" / "blue" / "0.png").write_bytes((source / "train" / "blue" / "1.png").read_bytes())
    prepared(source, tmp_path / "set")
    said = capsys.readouterr().out
    assert "test: 4 of 12 pictures are of classes that training lacks, such as mauve; they count as errors" in said
    assert "val: 1 of 12 pictures are also in training" in said


def idx(array):
    """An array as Fashion-MNIST's files have it, compressed."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def test_fashion_mnist_is_read_from_its_files_or_the_scans_take_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(known, "DATA", tmp_path)

    def no_package(packages, folder):
        raise Offline("no apt-get here")

    monkeypatch.setattr(labelled_images, "apt_get", no_package)
    generator, arrays = np.random.default_rng(0), []
    for count in (40, 20):
        arrays += [generator.integers(0, 256, (count, 28, 28)), np.arange(count) % 10]
    (tmp_path / "fashion_mnist" / "download").mkdir(parents=True)
    for name, array in zip(labelled_images.FASHION_FILES, arrays):
        (tmp_path / "fashion_mnist" / "download" / name).write_bytes(idx(array))
    with pytest.raises(UserError, match="does not hold the expected pictures: delete .*download"):
        known.ensure("fashion_mnist")
    whole = hashlib.sha256(b"".join(gzip.decompress(idx(array)) for array in arrays))
    monkeypatch.setattr(labelled_images, "FASHION_SUM", whole.hexdigest())
    assert known.ensure("fashion_mnist") == "fashion_mnist"
    data = ImageTextDataset(tmp_path / "fashion_mnist", "image-labels")
    assert [data.meta[f"{split}_rows"] for split in ("train", "val", "test")] == [30, 10, 20]
    for i, row in enumerate(data.rows["test"]):
        assert row["label"] == labelled_images.CLOTHES[i % 10] and row["file"] == f"test {i}"
        assert (data.images[row["image"]] == arrays[2][i][..., None]).all()
    pytest.importorskip("sklearn")
    monkeypatch.setattr(labelled_images, "fashion_files", lambda folder: no_package([], folder))
    (tmp_path / "fashion_mnist" / "meta.json").unlink()
    assert known.ensure("fashion_mnist") == "digit_scans" and "NO NETWORK: no apt-get here" in capsys.readouterr().out
    assert ImageTextDataset(tmp_path / "digit_scans", "image-labels").meta["images"] == 1797


# ----------------------------------------------------------------------------------------------------------------------
# Training and measures

def test_pictures_are_moved_and_mirrored_whole():
    image = np.zeros((400, 9, 9, 3), np.uint8)
    image[:, 4, 3] = 255
    assert changed(image, 0, False, torch.Generator()) is image
    found = changed(image, 2, True, torch.Generator().manual_seed(0))
    places = {tuple(np.argwhere(each[..., 0])[0]) for each in found}
    assert places == {(y, x) for y in range(2, 7) for x in range(1, 8)}  # x: 3 or, mirrored, 5; each by -2 to 2
    assert (found.reshape(400, -1) > 0).sum(1).tolist() == [3] * 400
    edge = np.zeros((50, 5, 5, 3), np.uint8)
    edge[:, :, 0] = 7
    assert {int((each[..., 0] > 0).sum()) for each in changed(edge, 2, False, torch.Generator().manual_seed(1))} == {
        0, 5, 10, 15}  # columns beyond the edge repeat it
    again = changed(image, 2, True, torch.Generator().manual_seed(0))
    assert (found == again).all() and not image[:, 5].any()


def test_without_scikit_learn_the_regression_is_left_out_in_a_line(trained, data, monkeypatch, capsys):
    task, _ = opened(trained, data)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    say.cache_clear()  # so that it is said again
    assert list(task.floors("val")) == ["most frequent", "nearest mean"]
    assert capsys.readouterr().err == "logistic regression: left out; for more, pip install scikit-learn\n"


def test_an_evaluation_is_the_mean_over_all_pictures_beside_floors(trained, data, capsys):
    pytest.importorskip("sklearn")
    task, model = opened(trained, data)
    rows, nats, right = task.dataset.rows["val"], [], []
    for row in rows:
        picture = torch.tensor(np.array(task.dataset.images[row["image"]])).permute(2, 0, 1) / 127.5 - 1
        logits = model(picture[None])[0].double()
        nats.append(-logits.log_softmax(0)[model.config.labels.index(row["label"])].item())
        right.append(model.config.labels[logits.argmax()] == row["label"])
    found = task.evaluate(model, "val", ALONE, torch.float32)
    assert found == pytest.approx({"loss": np.mean(nats), "accuracy": np.mean(right)}, abs=1e-5)
    assert found["accuracy"] > 0.8 and found["loss"] == pytest.approx(
        checkpoint.read_config(trained / "best")["val_loss"], abs=1e-6)
    assert task.evaluate(model, "val", ALONE, torch.float32, limit=8)["loss"] != found["loss"]
    evaluate.main(settings_for("image-classification", "evaluating", out_dir=str(trained), device="cpu", test=True,
                               picture=str(trained / "confusion.png")))
    measured = json.loads((trained / "evaluation.json").read_text())
    for start, part in (("", "val"), ("test ", "test")):
        answers = [json.loads(line) for line in
                   (trained / f"predictions{'_test' * bool(start)}.jsonl").read_text().splitlines()]
        assert [row["file"] for row in answers] == [row["file"] for row in task.dataset.rows[part]]
        assert measured[f"{start}accuracy"] == np.mean([row["predicted"] == [row["label"]] for row in answers])
        assert measured[f"{start}accuracy, most frequent"] == pytest.approx(1 / 3)
        assert min(measured[f"{start}accuracy, {name}"] for name in ("nearest mean", "logistic regression")) > 0.9
    assert Image.open(trained / "confusion.png").width > 90


def test_the_nearest_mean_is_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = np.random.default_rng(0)
    x, classes, others = generator.random((60, 7)), generator.choice([0, 2, 3], 60), generator.random((90, 7))
    assert (nearest(x, classes, others) == neighbors.NearestCentroid().fit(x, classes).predict(others)).all()


def test_a_class_that_the_model_lacks_is_an_error_and_weighs_nothing(trained, data):
    task, model = opened(trained, data)
    before = task.evaluate(model, "val", ALONE, torch.float32)
    rows = task.dataset.rows["val"]
    right = [i for i, row in enumerate(rows) if task.probabilities(model, scaled(
        task.dataset.images[[row["image"]]], ALONE.device)).argmax() == model.config.labels.index(row["label"])]
    rows[right[0]]["label"] = "mauve"
    task.fit(model)
    found = task.evaluate(model, "val", ALONE, torch.float32)
    assert found["accuracy"] == pytest.approx(before["accuracy"] - 1 / len(rows))
    assert task.targets("val", range(len(rows)))[1].sum() == len(rows) - 1
    logits = model(scaled(task.dataset.images[[row["image"] for row in rows]], ALONE.device))
    known = [i for i in range(len(rows)) if i != right[0]]
    targets = torch.tensor([model.config.labels.index(rows[i]["label"]) for i in known])
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[known], targets).item(), abs=1e-6)


def test_few_training_pictures_are_drawn_alike_from_each_class(tmp_path):
    source = make_pictures(tmp_path / "source", 40)
    for i in range(30):
        (source / "blue" / f"{i}.png").unlink()
    prepared(source, tmp_path / "set")  # 8, 32 and 32 pictures for training

    def task_for(**changes):
        task = ImageClassificationTask(settings_for("image-classification", patch_size=4, batch_size=9, **changes))
        task.open(tmp_path / "set", ALONE)
        task.fit(task.build(torch.Generator()))
        return task

    chosen = {seed: task_for(train_rows=18, seed=seed) for seed in (1, 2)}
    for task in chosen.values():
        names = [task.dataset.rows["train"][row]["label"] for row in task.rows]
        assert [names.count(name) for name in ("blue", "green", "red")] == [2, 8, 8] and len({*task.rows}) == 18
        assert {*task.pick(0), *task.pick(1)} == {*task.rows}  # an epoch
        assert len(task.training_pixels[0]) == 18 and sorted(task.training_pixels[1]) == 2 * [0] + 8 * [1] + 8 * [2]
    assert {*chosen[1].rows} != {*chosen[2].rows} and (task_for(train_rows=18, seed=1).rows == chosen[1].rows).all()
    assert {*task_for(train_rows=9, seed=1).rows} < {*chosen[1].rows} and len({*task_for().rows}) == 72
    with pytest.raises(UserError, match="train_rows = 73: the data set .* has only 72 training pictures"):
        task_for(train_rows=73)


def test_a_resumed_run_equals_an_undisturbed_one(tiny, tmp_path):
    changes = dict(max_iters=8, eval_interval=4, log_interval=2, dropout=0.1, micro_batch_size=5, pool="first")
    whole = run(tmp_path / "whole", tiny, **changes, stem=True)
    run(tmp_path / "parts", tiny, **{**changes, "max_iters": 4, "lr_decay_iters": 8}, stem=True)
    resume(tmp_path / "parts", "--max_iters=8")
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert len(whole) == 5 and "vision.cls.weight" in one and "vision.patches.0.weight" in one


def test_a_start_from_another_model_keeps_its_tower(trained, tiny, data, tmp_path, capsys):
    siglip = SigLIP(SigLIPConfig(ViTConfig(n_layer=1, n_head=2, n_embd=8, image_size=8, patch_size=4),
                                 TextEncoderConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=3)))
    init_parts(siglip, torch.Generator().manual_seed(0))
    task = ImageClassificationTask(settings_for("image-classification"), {"tokenizer": CharTokenizer("abc")}, "siglip")
    task.open(data, ALONE)
    model = task.adopt(siglip, torch.Generator())
    torch.testing.assert_close(model.vision.state_dict(), siglip.vision.state_dict(), atol=0, rtol=0)
    assert "siglip: its vision tower gets a new head" in capsys.readouterr().err and not task.tokenizers
    run(tmp_path / "more", tiny, init_from=str(trained), rates={"vision": 0.0}, max_iters=2, eval_interval=2)
    (_, first, _), (_, second, _) = load(trained), load(tmp_path / "more")
    torch.testing.assert_close(first.vision.state_dict(), second.vision.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(first.head.weight, second.head.weight, atol=0.1, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Answers and errors

def test_the_likeliest_classes_of_an_image_are_printed(trained, data, capsys, tmp_path):
    task, model = opened(trained, data)
    for name in ("red", "blue"):
        Image.new("RGB", (30, 20), COLOURS[name]).save(tmp_path / f"{name}.png")
    found = sampled(trained, capsys, f"--image={tmp_path}/red.png", "--top=0").strip()
    names, shares = zip(*(each.split() for each in found.split(", ")))
    picture = (torch.tensor(COLOURS["red"])[:, None, None] / 127.5 - 1).expand(3, 8, 8)
    p = model(picture[None]).softmax(-1)[0]
    assert [*map(float, shares)] == pytest.approx(sorted(p.tolist(), reverse=True), abs=6e-4)
    assert names[0] == "red" == model.config.labels[p.argmax()]
    both = sampled(trained, capsys, f"--image={tmp_path}/red.png,{tmp_path}/blue.png", "--top=1")
    assert f"{tmp_path}/red.png: red " in both and f"{tmp_path}/blue.png: blue " in both
    assert task.write(model, image=tmp_path / "red.png", top=1).startswith("red ")
    said = sampled(trained, capsys, f"--image={tmp_path}/red.png", f"--attention={tmp_path}/map.png")
    assert said.endswith(f"wrote {tmp_path}/map.png\n") and Image.open(tmp_path / "map.png").width > 400
    with pytest.raises(UserError, match="attention = x.png: needs one --image"):
        sampled(trained, capsys, f"--image={tmp_path}/red.png,{tmp_path}/blue.png", "--attention=x.png")
    _, script, _, image = shlex.split(task.command(trained))
    assert script == "sample.py" and sampled(trained, capsys, image.replace("FILE", f"{tmp_path}/red.png"))
    assert task.show(model).count("\n") > task.show(model, short=True).count("\n") == 2


def test_wrong_use_is_one_line(trained, tiny, data, dataset, tmp_path, capsys):
    for changes, message in (
            (dict(patch_size=3), "patch_size = 3: does not divide the images' 8 pixels; 2, 4, 8 do"),
            (dict(patch_size=8, stem=True, dataset=str(dataset)), "is a data set of kind text"),
            (dict(batch_size=999), "batch_size = 999: must be from 1 to"),
            (dict(init_from=str(trained), n_embd=32), "n_embd = 32, but .* has 16: leave it out")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", tiny, **changes)
    with pytest.raises(UserError, match="stem = True, patch_size = 6: a convolutional stem halves"):
        ViTConfig(image_size=24, patch_size=6, stem=True)
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="image = .*x.png: can't be read"):
        sampled(trained, capsys, f"--image={tmp_path}/x.png")
    with pytest.raises(UserError, match="prompt = 'what': this model reads images alone"):
        sampled(trained, capsys, "--prompt=what")
    shouted = make_pictures(tmp_path / "source", 10)
    for name in COLOURS:
        (shouted / name).rename(shouted / name.upper())
    prepared(shouted, tmp_path / "shouted")
    evaluating = dict(out_dir=str(trained), device="cpu")
    with pytest.raises(UserError, match="has none of the model's classes, such as blue: name another"):
        evaluate.main(settings_for("image-classification", "evaluating", **evaluating,
                                   dataset=str(tmp_path / "shouted")))
    prepared(make_pictures(tmp_path / "large", 10), tmp_path / "sixteen", image_size=16)
    with pytest.raises(UserError, match="have 16 pixels, but the model reads 8: prepare them in that size"):
        evaluate.main(settings_for("image-classification", "evaluating", **evaluating,
                                   dataset=str(tmp_path / "sixteen")))
