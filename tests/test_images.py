"""Folders of images become data sets; shapes and digits are generated as their READMEs say."""

import functools
import io
import json
import re
import runpy
import sys
from copy import deepcopy
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare
import tokenizer as tokenizers
from batches import ImageTextDataset, read_images
from configurator import UserError
from run.pictures import parse_boxes, pixels
from sources import images, known

DATA = Path(prepare.__file__).parent / "data"
shapes = runpy.run_path(str(DATA / "shapes" / "generate.py"))
digits = runpy.run_path(str(DATA / "digits" / "generate.py"))
SIZE = shapes["SIZE"]  # pixels
HELD_OUT = {" ".join(names) for names in shapes["HELD_OUT"]}


def image_bytes(mode, size=(20, 10), **options):
    noise = np.random.default_rng(0).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, "TIFF" if mode in ("CMYK", "I;16") else "PNG", **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Twenty images of many modes, two rows each."""
    rows = []
    for i in range(20):
        name = f"{'ab'[i % 2]}/{i}.png"
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        mode = ("RGB", "RGBA", "L", "P", "CMYK", "1", "LA", "I;16")[i % 8]
        (tmp_path / "pictures" / name).write_bytes(image_bytes(mode, (20 + i, 10)))
        rows += [{"image": name, "prompt": "caption", "answer": f"picture {i} – ü"},
                 {"image": f"./{name}", "prompt": "detect it", "answer": "<loc0012><loc0100><loc0200><loc0300> it",
                  "kind": "boxes"}]
    write_rows(tmp_path / "pictures", rows)
    return tmp_path / "pictures"


def write_rows(folder, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n\n")


def read_rows(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_bytes().decode("utf-8-sig").split("\n")
            if line]


# ----------------------------------------------------------------------------------------------------------------------
# The user's own folders

def test_a_folder_becomes_a_data_set(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(known, "DATA", tmp_path / "data")
    prepare.main(prepare.Settings(image_size=8), [f"{folder}/"])
    assert "train_images = 18, train_rows = 36" in capsys.readouterr().out
    data = ImageTextDataset(tmp_path / "data" / "pictures")
    assert data.meta["kind"] == "image-text" and data.meta["source"] == str(folder)
    assert [row["image"] for row in data.rows["train"]] == np.repeat(np.arange(18), 2).tolist()
    assert [row["image"] for row in data.rows["val"]] == [18, 18, 19, 19]
    assert data.rows["val"][1] == {"image": 18, "prompt": "detect it", "kind": "boxes", "width": 38, "height": 10,
                                   "answer": "<loc0012><loc0100><loc0200><loc0300> it"}
    assert data.rows["val"][0]["kind"] == "caption" and data.rows["val"][0]["answer"] == "picture 18 – ü"
    for i, batch in enumerate(read_images(data.images, np.arange(20), torch.device("cpu"))):
        with Image.open(folder / f"{'ab'[i % 2]}/{i}.png") as image:
            assert torch.equal(batch, pixels(image, 8)), i


def test_preparing_again_gives_the_same_bytes(folder, tmp_path):
    one, two = (images.prepare(folder, tmp_path / name) for name in ("one", "two"))
    assert one == two
    for name in (*images.FILES, "meta.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert images.prepare(folder, tmp_path / "one", image_size=32)["sha256"] != two["sha256"]


def test_rotated_photographs_have_their_upright_size(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation: lies on its side
    (folder / "a" / "0.png").write_bytes(image_bytes("RGB", (20, 10), exif=exif))
    images.prepare(folder, tmp_path / "out")
    row = ImageTextDataset(tmp_path / "out").rows["train"][0]
    assert (row["width"], row["height"]) == (10, 20)


def test_splits_are_those_that_the_rows_name(folder, tmp_path):
    rows = read_rows(folder)
    write_rows(folder, [{**row, "split": "val" if "/3." in row["image"] else "train"} for row in rows])
    images.prepare(folder, tmp_path / "out")
    data = ImageTextDataset(tmp_path / "out")
    assert {row["image"] for row in data.rows["val"]} == {3} and data.meta["train_images"] == 19


@pytest.mark.parametrize("name, size", [("char", 1412), ("bpe:1450", 1450)])
def test_the_tokenizer_has_the_special_tokens(folder, tmp_path, name, size):
    images.prepare(folder, tmp_path / "out", name)
    tokenizer = tokenizers.load(tmp_path / "out" / "tokenizer.json")
    ids = {token: tokenizer.bpe.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", "<loc0012>", "<loc0100>")}
    assert tokenizer.vocab_size == size and tokenizer.eos == ids["<eos>"] and ids["<pad>"] == 0
    assert max(tokenizer.bpe.get_vocab().values()) == size - 1
    caption = tokenizer.encode_controls("<bos>caption\n")
    assert caption[0] == ids["<bos>"] and (len(caption) == 9) == (name == "char")
    text = "<loc0012><loc0100> red circle ü<seg000><seg127>\n<eos>"
    box = tokenizer.encode_controls(text)
    assert box[:2].tolist() == [ids["<loc0012>"], ids["<loc0100>"]] and tokenizer.decode(box) == text
    assert name != "char" or len(box) == 2 + len(" red circle ü\n".encode()) + 3


def test_merges_are_learned_from_training_rows_alone(folder, tmp_path):
    images.prepare(folder, tmp_path / "one", "bpe:1420")
    rows = read_rows(folder)
    write_rows(folder, [*rows[:36], *({**row, "answer": "zzzz zzzz zzzz" * 50} for row in rows[36:])])
    images.prepare(folder, tmp_path / "two", "bpe:1420")
    assert len({(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")}) == 1


GOOD = {"image": "a/0.png", "prompt": "caption", "answer": "x"}


@pytest.mark.parametrize("row, message", [
    (b"{'image': 1}", "is not a JSON object: Expecting property name"), (b"[1, 2]", "is not a JSON object: 'list'"),
    (b'{"image": "\xff"}', "is not a JSON object: 'utf-8' codec"),
    ({"image": "a/0.png", "prompt": "caption"}, "answer = None: must be text"),
    ({**GOOD, "image": None}, "image = None: must be text"),
    ({**GOOD, "answer": 7}, "answer = 7: must be text"), ({**GOOD, "prompt": ["x"]}, r"prompt = \['x'\]: must be text"),
    ({**GOOD, "kind": 3}, "kind = 3: must be text"), ({**GOOD, "answer": " \n"}, r"answer = ' \\n': is empty"),
    ({**GOOD, "split": "test"}, "split = 'test': must be \"train\" or \"val\""),
    ({**GOOD, "split": "val"}, "line 1: has no split, but other rows have one"),
    ({**GOOD, "image": "a/none.png"}, "image = 'a/none.png': there is no such file in"),
    ({**GOOD, "image": "a"}, "image = 'a': there is no such file"),
    ({**GOOD, "image": "a/../../secret.png"}, "image = 'a/../../secret.png': there is no such file in"),
    ({**GOOD, "image": "/etc/hosts"}, "image = '/etc/hosts': there is no such file in"),
    ({**GOOD, "prompt": "<image>caption"}, "prompt = '<image>caption': leave out '<image>'"),
    ({**GOOD, "answer": "x<eos>"}, "answer = 'x<eos>': leave out '<eos>'"),
    ({**GOOD, "answer": "\ud800"}, r"leave out '\\ud800'"),
    ({**GOOD, "image": "broken.png"}, "broken.png: can't be read: .*; replace the file or remove its rows"),
    ({**GOOD, "image": "torn.png"}, "torn.png: can't be read: .*; replace the file or remove its rows"),
])
def test_bad_rows_are_named_by_their_line(folder, tmp_path, row, message):
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "torn.png").write_bytes(image_bytes("RGB", (200, 200))[:5000])
    before = images.prepare(folder, tmp_path / "out")
    rows = read_rows(folder)
    write_rows(folder, [*rows[:4], row, *rows[4:], row])
    with pytest.raises(UserError, match=message) as error:
        images.prepare(folder, tmp_path / "out")
    line = 1 if "no split" in message else 5
    assert f"captions.jsonl, line {line}: " in str(error.value) and "\n" not in str(error.value)
    assert ImageTextDataset(tmp_path / "out").meta == before  # the earlier data set is intact
    with pytest.raises(UserError):
        images.prepare(folder, tmp_path / "new")
    assert not (tmp_path / "new" / "meta.json").exists()


def make_imagefolder(path, counts):
    """Hugging Face's layout: a folder for each split, with pictures and a metadata.jsonl. counts: {split: number}."""
    for split, count in counts.items():
        (path / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(count):
            (path / split / f"{i}.PNG").write_bytes(image_bytes("RGB", (20 + i, 10)))
            rows.append({"file_name": f"{i}.PNG", "text": f"{split} {i}"})
        (path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("counts, train, val, said", [
    ({"train": 5, "validation": 2, "test": 3}, ["train"], ["validation"], "images of test/ are left out"),
    ({"Train": 5, "dev": 2}, ["Train"], ["dev"], ""),
    ({"train": 5, "test": 3}, ["train"], ["test"], "images of test/ are for validation"),
    ({"train": 20}, ["train"], ["train"], ""), ({".": 20}, ["."], ["."], "")])
def test_hugging_faces_folders_are_data_sets(tmp_path, capsys, counts, train, val, said):
    source = make_imagefolder(tmp_path / "source", counts)
    prepare.main(prepare.Settings(name=str(tmp_path / "out"), image_size=8), [str(source)])
    assert said in capsys.readouterr().out
    data = ImageTextDataset(tmp_path / "out")
    for split, folders in (("train", train), ("val", val)):
        rows = data.rows[split]
        assert {row["answer"].split()[0] for row in rows} == {*folders}
        assert {(row["prompt"], row["kind"]) for row in rows} == {("caption", "caption")}
        assert all(row["width"] == 20 + int(row["answer"].split()[1]) for row in rows)
    assert len(data.rows["train"]) == (counts.get("train") or counts.get("Train") or 20) - 2 * (len(counts) == 1)


def test_columns_of_captions_may_have_other_names(tmp_path):
    source = make_imagefolder(tmp_path / "source", {"pictures": 10})
    (source / "pictures" / "metadata.jsonl").unlink()

    def answers(names, column="text"):
        lines = [names, *(f'pictures/{i}.PNG,"one, {i}",two {i}' for i in range(10))]
        (source / "Metadata.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
        images.prepare(source, tmp_path / "out", column=column, image_size=8)
        return ImageTextDataset(tmp_path / "out").rows["train"][3]["answer"]

    assert answers("file_name,caption,text") == answers("file_name,x,body", "body") == "two 3"
    assert answers("image_file_name,caption,n") == "one, 3"
    for names, column, message in (
            ("file_name,a,b", "text", "Metadata.csv, line 2: no column is named text, only file_name, a, b: .*--col"),
            ("file_name,caption,b", "body", "no column is named body, only"),
            ("file_name,x_file_name,text", "text", "line 2: 2 columns name a file, among file_name, x_file_name")):
        with pytest.raises(UserError, match=message):
            answers(names, column)
    (source / "pictures" / "3.PNG").unlink()
    with pytest.raises(UserError, match="Metadata.csv, line 5: image = 'pictures/3.PNG': there is no such file"):
        answers("file_name,text,n")


def test_tables_of_captions_are_found_in_upper_and_lower_case(folder, tmp_path):
    (folder / "captions.jsonl").rename(folder / "Captions.JSONL")
    assert [path.name for path in images.find_tables(folder)] == ["Captions.JSONL"]
    assert images.prepare(folder, tmp_path / "out")["train_rows"] == 36
    (folder / "Captions.JSONL").rename(folder / "metadata.jsonl")
    with pytest.raises(UserError, match="line 1: 0 columns name a file, among image, prompt, answer"):
        images.prepare(folder, tmp_path / "out")
    for content, message in ((b"", "has 0 images"), ("{}".encode("utf-16"), "is UTF-16"), (b"[\n{}]", "line 1: is no")):
        (folder / "metadata.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=f"metadata.jsonl.*{message}"):
            images.prepare(folder, tmp_path / "out")
    for path in folder.rglob("*.png"):
        path.unlink()
    assert images.find_tables(folder) == []  # without images it is a table of documents


def test_folders_and_settings_that_do_not_fit_are_refused(folder, tmp_path):
    whole = read_rows(folder)
    rows = [{**row, "split": "train"} for row in whole]
    for bad, message in (([], "has 0 images, and none for train"), (whole[:2], "has 1 images, and none for train"),
                         (rows, "has 20 images, and none for val"),
                         ([*rows, {**rows[0], "split": "val"}], "line 41: split = 'val', but an earlier row of a/0")):
        write_rows(folder, bad)
        with pytest.raises(UserError, match=message):
            images.prepare(folder, tmp_path / "out")
    write_rows(folder, whole)
    tokenizers.CharTokenizer("abc").save(tmp_path / "char.json")
    with pytest.raises(UserError, match="char.json: images need char or byte .*, bpe:SIZE, or the tokenizer of"):
        images.prepare(folder, tmp_path / "out", str(tmp_path / "char.json"), 0.5)
    with pytest.raises(UserError, match="bpe:300: 256 bytes and the special tokens need at least bpe:1412"):
        images.prepare(folder, tmp_path / "out", "bpe:300")
    with pytest.raises(UserError, match="image_size = 0: must be at least 1"):
        prepare.Settings(image_size=0)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes

@pytest.fixture(scope="module")
def scenes():
    return [shapes["make"](index, 3) for index in range(400)]


def test_held_out_combinations_are_never_trained_on(scenes):
    seen = {"train": set(), "val": set()}
    for index, (things, _, questions, split) in enumerate(scenes):
        names = {f"{thing.size} {thing.name}" for thing in things}
        seen[split] |= names
        text = " ".join(prompt + " " + answer for _, prompt, answer in questions)
        assert split == ("val" if index % 10 == 9 else "train")
        assert bool(names & HELD_OUT) == (split == "val")
        assert split == "val" or not any(name in text for name in HELD_OUT)
    assert seen["val"] > HELD_OUT and not seen["train"] & HELD_OUT
    sizes, colours, names = shapes["SIDES"], shapes["COLOURS"], shapes["SHAPES"]
    assert len(seen["train"]) == len(sizes) * len(colours) * len(names) - len(HELD_OUT)
    for part, every in enumerate((sizes, colours, names)):
        assert {name.split()[part] for name in seen["train"]} == set(every)


def derive(prompt, things):
    """The answer, worked out from the prompt's words alone; boxes as [(label, left, top, right, bottom)]."""
    def the(name):
        found = [t for t in things if name in (t.shape, f"{t.colour} {t.shape}")]
        assert len(found) == 1, prompt
        return found[0]

    def number(word):
        return sum(word in (t.colour, t.shape + "s", "shapes") for t in things)

    x, y = (lambda t: t.left + t.side / 2), (lambda t: t.top + t.side / 2)
    if prompt == "caption":
        words = [f"a {t.size} {t.colour} {t.shape}" for t in sorted(things, key=x)]
        return re.sub(", (?=[^,]*$)", " and ", ", ".join(words))
    if match := re.fullmatch(r"what colour is the (\w+)\?", prompt):
        return the(match[1]).colour
    if match := re.fullmatch(r"how many (?:(\w+) shapes|(\w+)) are there\?", prompt):
        return str(number(match[1] or match[2]))
    if match := re.fullmatch(r"is the (.+) left or right of the (.+)\?", prompt):
        assert abs(x(the(match[1])) - x(the(match[2]))) >= 8
        return "left" if x(the(match[1])) < x(the(match[2])) else "right"
    if match := re.fullmatch(r"is the (.+) above or below the (.+)\?", prompt):
        assert abs(y(the(match[1])) - y(the(match[2]))) >= 8
        return "above" if y(the(match[1])) < y(the(match[2])) else "below"
    if match := re.fullmatch(r"where is the (.+)\?", prompt):
        assert min(abs(x(the(match[1])) - SIZE / 2), abs(y(the(match[1])) - SIZE / 2)) >= 6
        x, y = x(the(match[1])), y(the(match[1]))
        return f"{'top' if y < SIZE / 2 else 'bottom'} {'left' if x < SIZE / 2 else 'right'}"
    if match := re.fullmatch(r"are there more (\w+) or (\w+)\?", prompt):
        assert number(match[1]) != number(match[2])
        return match[1] if number(match[1]) > number(match[2]) else match[2]
    if match := re.fullmatch(r"do the (\w+) and the (\w+) have the same colour\?", prompt):
        return "yes" if the(match[1]).colour == the(match[2]).colour else "no"
    if match := re.fullmatch(r"is the (.+) larger than the (.+)\?", prompt):
        assert abs(the(match[1]).side - the(match[2]).side) >= 5
        return "yes" if the(match[1]).side > the(match[2]).side else "no"
    label = re.fullmatch(r"detect (.+)", prompt)[1]
    return [(t.left, t.top, t.left + t.side, t.top + t.side, label) for t in sorted(things, key=x)
            if label in (t.shape, f"{t.colour} {t.shape}")]


def test_answers_are_right(scenes):
    asked = {}
    for things, _, questions, _ in scenes:
        for kind, prompt, answer in questions:
            found = [(*map(round, box[:4]), box.label) for box in parse_boxes(answer, SIZE, SIZE)] if kind == "detect" \
                else answer
            assert found == derive(prompt, things), (prompt, answer, things)
            asked.setdefault(kind, set()).add(answer)
    assert set(asked) == set(shapes["KINDS"])
    assert asked["count"] == set("0123") and asked["compare"] > {"yes", "no", "rings", "circles"}
    assert asked["colour"] == set(shapes["COLOURS"]) and len(asked["position"]) == 8
    assert max(answer.count(";") for answer in asked["detect"]) == 2


def test_boxes_hold_the_pixels_and_nothing_else():
    covered = {}
    for index in range(60):
        rng = np.random.default_rng(index)
        things = shapes["make_things"](rng, index % 2 == 1)
        bare = np.asarray(shapes["render"]([], deepcopy(rng)), dtype=int)
        image = np.asarray(shapes["render"](things, rng), dtype=int)
        drawn = (abs(image - bare) > 2).any(axis=2)  # (SIZE, SIZE)
        assert drawn.sum() == sum(cut(drawn, thing).sum() for thing in things)
        for thing in things:
            ys, xs = np.nonzero(cut(drawn, thing))
            edges = (xs.min(), ys.min(), thing.side - 1 - xs.max(), thing.side - 1 - ys.max())
            assert max(edges) <= 1 and min(edges) == 0 and thing.side == shapes["SIDES"][thing.size]
            exact = (abs(cut(image, thing) - shapes["COLOURS"][thing.colour]) <= 12).all(axis=2)
            covered.setdefault(thing.shape, []).append(exact.mean())
        assert all(separated(a, b) for a, b in permutations(things, 2))
    means = {shape: np.mean(share) for shape, share in covered.items()}  # rims are blended with the background
    area = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "star": 0.37, "heart": 0.63, "ring": 0.62}
    assert all(area[shape] - 0.2 < means[shape] <= area[shape] for shape in shapes["SHAPES"]), means


def cut(array, thing):
    return array[thing.top:thing.top + thing.side, thing.left:thing.left + thing.side]


def separated(a, b):
    gaps = (a.left - b.left - b.side, b.left - a.left - a.side, a.top - b.top - b.side, b.top - a.top - a.side)
    return max(gaps) >= 2 and abs(a.left + a.side / 2 - b.left - b.side / 2) >= 4


def test_an_image_is_a_pure_function_of_seed_and_index(scenes):
    for index in (0, 7, 9):
        things, image, questions, _ = shapes["make"](index, 3)
        assert things == scenes[index][0] and image.tobytes() == scenes[index][1].tobytes()
        assert questions == scenes[index][2] and shapes["make"](index, 4)[0] != things
    scans, labels = digits["load_scans"]()
    make = functools.partial(digits["make"], scans=scans, splits=digits["split_scans"](labels))
    assert make(5, 1)[0].tobytes() == make(5, 1)[0].tobytes() != make(5, 2)[0].tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# Digits

def test_a_scan_is_in_one_split_only():
    scans, labels = digits["load_scans"]()
    splits = digits["split_scans"](labels)
    assert sorted([*splits["train"], *splits["val"]]) == list(range(1797)) and scans.max() == 1
    assert not set(splits["train"]) & set(splits["val"]) and min(np.bincount(labels[splits["val"]])) >= 20


def test_numbers_are_made_of_the_scans_of_their_split(tmp_path):
    digits["generate"](tmp_path, images=100, seed=1)
    rows, (_, labels) = read_rows(tmp_path), digits["load_scans"]()
    splits = digits["split_scans"](labels)
    for index, row in enumerate(rows):
        assert row["split"] == ("val" if index % 10 == 9 else "train") and row["prompt"] == "read"
        assert set(row["scans"]) <= set(splits[row["split"]])
        assert row["answer"] == "".join(str(labels[scan]) for scan in row["scans"])
        assert row["kind"].split()[0] == str(len(row["answer"]))
    assert {row["kind"] for row in rows} == {"1 digit", "2 digits", "3 digits", "4 digits"}


def test_scans_stand_side_by_side_and_whole():
    scan = np.random.default_rng(0).random((8, 8))
    ink = digits["placed"](scan, (20, 30), 8, 0.0)
    assert np.allclose(ink[26:34, 16:24], scan, atol=1e-6) and np.isclose(ink.sum(), scan.sum())
    assert digits["placed"](scan, (20, 30), 16, 0.1).sum() == pytest.approx(4 * scan.sum(), rel=0.05)
    for i in range(3):
        scans = np.zeros((3, 8, 8))
        scans[i, 2:6, 2:6] = 1
        darkness = np.mean([255 - np.asarray(digits["compose"](scans, np.random.default_rng(seed)), dtype=float)
                            for seed in range(30)], axis=(0, 1, 3))
        assert (darkness - darkness.min()).argmax() // 12 == i


def test_without_scikit_learn_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        digits["load_scans"]()


@pytest.mark.parametrize("name", ["shapes", "digits"])
def test_generated_data_sets_are_prepared_by_name(name, tmp_path, monkeypatch):
    real = runpy.run_path
    monkeypatch.setattr(known, "DATA", tmp_path)
    monkeypatch.setattr(runpy, "run_path", lambda path: {"generate": functools.partial(real(path)["generate"],
                                                                                       images=40)})
    assert known.ensure(name) == name
    data = ImageTextDataset(tmp_path / name)
    assert (data.meta["train_images"], data.meta["val_images"], data.image_size) == (36, 4, 48)
    assert data.meta["source"] == f"data/{name}/generate.py" and str(tmp_path) not in json.dumps(data.meta)
    with pytest.raises(UserError, match=f"{name} always has image_size = 48: add --name=NEW"):
        prepare.main(prepare.Settings(image_size=32), [name])
    prepare.main(prepare.Settings(image_size=32, name="other"), [name])
    assert ImageTextDataset(tmp_path / "other").image_size == 32
