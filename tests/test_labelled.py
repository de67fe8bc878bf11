"""sources/labelled.py, labelled_sets.py: texts and words with labels become data sets, which batches.py opens."""

import hashlib
import io
import itertools
import json
import random
import re
import runpy
import shutil
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_pairs import data, fake_packages, page, write  # noqa: F401, data is a fixture

import prepare
import tokenizer as tokenizers
from batches import LabelledDataset
from configurator import UserError
from sources import corpora, known, labelled, labelled_sets
from sources.download import Offline

SCRIPT = Path(prepare.__file__).parent / "data/home_assistant_intents/generate.py"
TEXTS = [f"{a} {b} {c}" for a, b, c in itertools.product(("a red", "my old", "no"), ("cat", "dog", "cow", "hen"),
                                                         ("sits", "runs", "sleeps here", "eats, too!"))]
LABELS = [text.split()[-1].strip("!") for text in TEXTS]
PARTS = ("train", "val", "test")


def run(*sources, **settings):
    settings = {"tokenizer": "byte", "val_fraction": 0.2, **settings}
    prepare.main(prepare.Settings(**settings), [str(source) for source in sources])


def everything(dataset, *columns):
    return sorted(tuple(map(str, map(row.get, columns))) for split in PARTS for row in dataset.rows[split])


# ----------------------------------------------------------------------------------------------------------------------
# Texts with labels

def test_each_kind_of_table_gives_the_same_data_set(data, tmp_path):  # noqa: F811
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS)]
    write(tmp_path / "a.jsonl", *map(json.dumps, rows))
    write(tmp_path / "b.csv", "label,text", *(f'{row["label"]},"{row["text"]}"' for row in rows))
    write(tmp_path / "c.tsv", "text\tlabel", *("\t".join(row.values()) for row in rows))
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for path in sorted(tmp_path.glob("?.*")):
        run(path, labels="label")
        dataset = LabelledDataset(data / path.stem, "labels")
        assert everything(dataset, "text", "labels") == sorted((row["text"], str([row["label"]])) for row in rows)
        assert dataset.meta["labels"] == sorted(set(LABELS)) and dataset.meta["several"] is False
        assert dataset.meta["sha256"] == LabelledDataset(data / "a", "labels").meta["sha256"], path
    assert repr(tokenizers.load(data / "a" / "tokenizer.json")) == "ByteTokenizer(256 bytes)"
    run(tmp_path / "a.jsonl", labels="label", name="usual", tokenizer="char")  # the default: a BPE of what there is
    assert LabelledDataset(data / "usual", "labels").meta["tokenizer"] == "bpe"


def test_a_text_may_have_several_labels_or_none(data, tmp_path, capsys):  # noqa: F811
    cells = [["x"], ["x", " y\t\nz"], [], [2]]  # a name has single spaces, and no line end
    lines = [f'{text}\t{json.dumps(cells[i % 4])}' for i, text in enumerate(TEXTS)]
    run(write(tmp_path / "many.tsv", "text\tkinds", *lines), labels="kinds")
    dataset = LabelledDataset(data / "many", "labels")
    assert dataset.meta["several"] and dataset.meta["labels"] == ["2", "x", "y z"]
    assert {labels for _, labels in everything(dataset, "text", "labels")} == {"['x']", "['x', 'y z']", "[]", "['2']"}
    said = capsys.readouterr().out
    assert "labels: 3, perhaps several for each text" in said and "several =" not in said


def test_the_split_is_by_hash_by_page_or_as_given(capsys):
    rows = [{"text": text, "labels": [label]} for text, label in zip(TEXTS, LABELS)]
    how = labelled.How(val_fraction=0.25)
    kept, _ = labelled.choose(rows, "labels", how, "x")
    sides = {row["text"]: row["split"] for row in kept}
    assert set(sides.values()) == set(PARTS)
    some, _ = labelled.choose(rows[::-2], "labels", how, "x")
    assert all(row["split"] == sides[row["text"]] for row in some)  # a text stays where it is
    paged, _ = labelled.choose([{**row, "page": row["text"][:3]} for row in rows], "labels", how, "x")
    assert len({(row["page"], row["split"]) for row in paged}) == 3
    given = [{**row, "split": "test" if i % 5 == 0 else "train"} for i, row in enumerate(rows)]
    kept, _ = labelled.choose(given, "labels", how, "x")  # validation is taken out of training
    assert [row["text"] for row in kept if row["split"] == "test"] == TEXTS[::5]
    assert {row["text"] for row in kept if row["split"] == "val"} == {
        text for text in set(TEXTS) - set(TEXTS[::5]) if sides[text] == "val"}
    assert "val: by a hash of the text, test: as given" in capsys.readouterr().out


def test_near_copies_of_training_texts_are_not_held_out(capsys):
    words = [f"w{chr(97 + i)}" for i in range(26)]
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(words, k=30)), "labels": ["x"], "page": str(i)} for i in range(40)]
    copies = [{"text": f"{row['text']} and so on, 7", "labels": ["y"], "page": f"copy {i}"}
              for i, row in enumerate(rows)]
    kept, left_out = labelled.choose(rows + copies, "labels", labelled.How(val_fraction=0.3), "x")
    place = {row["page"]: row["split"] for row in kept}
    both = [(place.get(str(i)), place.get(f"copy {i}")) for i in range(40)]
    assert {pair for pair in both if None not in pair} == {(split, split) for split in PARTS}
    assert left_out == {"copy": 80 - len(kept)} and len(kept) < 80
    said = f"left out: {80 - len(kept)} for validation or test but almost the same as one for training"
    assert said in capsys.readouterr().out


def test_texts_with_contradicting_labels_are_counted_and_kept_once_with_each(capsys):
    rows = [{"text": text, "labels": [label]} for text, label in zip(TEXTS, LABELS)]
    kept, left_out = labelled.choose(rows + [{**rows[0], "labels": [label]} for label in LABELS[1:3] * 2] + [rows[1]],
                                     "labels", labelled.How(val_fraction=0.2), "x")
    assert sorted(row["labels"][0] for row in kept if row["text"] == TEXTS[0]) == sorted(LABELS[:3])
    assert left_out["duplicate"] == 3 and len({row["split"] for row in kept if row["text"] == TEXTS[0]}) == 1
    assert "with different labels, and are kept with each of them: 1\n" in capsys.readouterr().out


def test_labels_that_training_lacks_are_counted(data, tmp_path, capsys):  # noqa: F811
    (tmp_path / "mine").mkdir()
    for name, lines in (("train", ["a,x", "b,y"]), ("dev", ["c,x"]), ("test", ["d,z", "e,x"])):
        write(tmp_path / "mine" / f"{name}.csv", "text,label", *lines)
    run(tmp_path / "mine", labels="label", val_fraction=0.1)
    assert LabelledDataset(data / "mine", "labels").meta["labels"] == ["x", "y"]
    assert "test: 1 of 2 texts have a label that no text for training has" in capsys.readouterr().out
    with pytest.raises(UserError, match="val_fraction = 0.2: the texts of .*mine name their split; leave it out"):
        run(tmp_path / "mine", labels="label")


# ----------------------------------------------------------------------------------------------------------------------
# Words with tags

SENTENCES = [  # text, {(start, end): label}, intent
    (f"{verb} the {color} lamp in Anna's {room}, please", {"color": color, "room": room}, verb)
    for verb, color, room in itertools.product(("start", "stop", "dim"), ("red", "dark blue", "new"),
                                               ("den", "bed room"))]


def test_spans_conll_and_parallel_files_give_the_same_data_set(data, tmp_path):  # noqa: F811
    (tmp_path / "c").mkdir()
    spans, conll, parallel = [], ["-DOCSTART- -X- O", ""], {"seq.in": [], "seq.out": [], "label": []}
    for text, values, intent in SENTENCES:
        found = [{"start": text.index(value), "end": text.index(value) + len(value), "label": label}
                 for label, value in values.items()]
        spans.append(json.dumps({"text": text, "spans": found[::-1], "intent": intent}))
        words = text.replace(",", " ,").split()
        tags = ["O"] * len(words)
        for label, value in values.items():
            place, length = words.index(value.split()[0]), len(value.split())
            tags[place:place + length] = [f"B-{label}"] + [f"I-{label}"] * (length - 1)
        conll += [f"# intent: {intent}", *(f"{word} POS {tag}" for word, tag in zip(words, tags)), ""]
        for name, line in zip(parallel, (" ".join(words), " ".join(tags), intent)):
            parallel[name].append(line)
    write(tmp_path / "a.jsonl", *spans)
    write(tmp_path / "b.conll", *conll)
    for name, found in parallel.items():
        write(tmp_path / "c" / name, *found)
    for source in ("a.jsonl", "b.conll", "c"):
        run(tmp_path / source, tags=True, val_fraction=0.3)
    first, *others = (LabelledDataset(data / name, "tags") for name in "abc")
    assert first.meta["intents"] == ["dim", "start", "stop"] and len(first.meta["tags"]) == 5
    assert len(everything(first, "words", "tags", "intent")) + first.meta["left_out"].get("copy", 0) == len(SENTENCES)
    assert all(other.meta["sha256"] == first.meta["sha256"] for other in others)


def test_other_schemes_become_bio():
    draw = random.Random(0)
    for _ in range(50):
        spans = [(draw.choice("abO"), draw.randint(1, 3)) for _ in range(6)]
        schemes = {"bio": [], "bioes": [], "iob1": []}
        for before, (name, n) in zip([None, *(name for name, _ in spans)], spans):
            marks = {"bio": "B" + "I" * (n - 1), "bioes": "S" if n == 1 else "B" + "I" * (n - 2) + "E",
                     "iob1": ("B" if before == name else "I") + "I" * (n - 1)}
            for scheme, tags in schemes.items():
                tags += ["O" if name == "O" else f"{mark}-{name}" for mark in marks[scheme]]
        assert all(labelled.bio(tags, "x") == schemes["bio"] for tags in schemes.values()), spans


@pytest.mark.parametrize("name, content, settings, message", [
    ("a.jsonl", '{"text": "to new york", "spans": [{"start": 3, "end": 11, "label": "a"}, {"start": 7, "end": 11,'
     ' "label": "b"}]}', {"tags": True}, "line 1: the span b from 7 to 11 .'york'. overlaps the one before it"),
    ("a.jsonl", '{"text": "to new york", "spans": [{"start": 3, "end": 9, "label": "a"}]}', {"tags": True},
     "the span a from 3 to 9 .'new yo'. does not begin and end at a word of 'to new york'"),
    ("a.jsonl", '{"text": "hi", "spans": [{"begin": 3}]}', {"tags": True}, "must be a list of objects with start, end"),
    ("a.jsonl", '{"text": "hi", "spans": [{"start": 0, "end": 9, "label": "a"}]}', {"tags": True}, "which has 2 char"),
    ("a.jsonl", '{"text": "hi", "spans": [{"start": 0, "end": 2, "label": "O"}]}', {"tags": True}, "needs a name"),
    ("a.jsonl", '{"text": "hi", "span": []}', {"tags": True}, "has only text, span: each line needs text and spans or"),
    ("a.jsonl", "\n".join(f'{{"text": "{word}", "spans": []}}' for word in "abcdefghijklmnopqrst"), {"tags": True},
     "no text for training has a tag other than O, or an intent"),
    ("a.jsonl", '{"words": ["a", " "], "tags": ["O", "O"]}', {"tags": True}, "line 1: ' ' is no word"),
    ("a.jsonl", '{"words": ["a", "b"], "tags": ["O"]}', {"tags": True}, "has 2 words and 1 tags: each word needs one"),
    ("a.conll", "a O\nb\n", {"tags": True}, "a.conll, line 2: 'b' has no tag: write a word and its tag"),
    ("a.conll", "a O\nb FOO\n", {"tags": True}, "a.conll, lines 1 to 2: tag = 'FOO': must be O, or B- or I- and a"),
    ("a.csv", "text,kind\na,b\n", {"labels": "label"}, "no column is named label, only text, kind: choose one with"),
    ("a.csv", "words,label\na,b\n", {"labels": "label"}, "no column is named text, .*: choose one with --column=NAME"),
    ("a.csv", "text,label\na,\n", {"labels": "label"}, "line 2: label = '': must be a name, or a list of names"),
    ("a.csv", "text,label\na,x\nb,x\nc,y\n", {"labels": "label"}, "only one text has the label y .1 such"),
    ("a.csv", "text,label\n" + "a,x\na,y\n" * 30, {"labels": "label"},
     "has the label x .2 such labels; left out: 58 with the text and labels of an earlier one., so that none can"),
    ("a.csv", "text,label\na,x\nb,x\n", {"labels": "label", "val_fraction": 0.4}, "none of 2 texts is for"),
    ("a.csv", "text,label,split\na,x,train\nb,x,val\nc,y,test\n", {"labels": "label", "val_fraction": 0.1},
     "the labels of the texts for training are .'x'.: there must be at least 2"),
    ("a.csv", "text,label,split\na,[],train\nb,[],val\nc,[],test\n", {"labels": "label", "val_fraction": 0.1},
     "the labels of the texts for training are ..: there must be at least 1"),
    ("a.csv", "text,label,split\na,x,later\n", {"labels": "label"}, "split = 'later': must be train, val or test"),
    ("a.txt", "some words", {"labels": "label"}, "labels = label: .*a.txt is no table: give a .csv"),
    ("a.csv", "text,label\na,x\n", {"labels": "label", "tags": True}, "choose one: texts have labels, or words have"),
    ("a.csv", "text,label\na,x\n", {"labels": "label", "newlines": "keep"}, "does nothing for texts with labels")])
def test_what_a_user_can_get_wrong_is_one_line(data, tmp_path, name, content, settings, message):  # noqa: F811
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / name, **settings)
    assert "\n" not in str(error.value)


def test_names_of_files_and_folders_say_the_split_unless_they_say_nothing(tmp_path):
    for name in ("all/train/seq.in", "all/dev/seq.in", "dev/a.csv", "dev/b.csv", "dev/c/train.tsv", "mine/test.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "")

    def found(*names):
        files = labelled.find([tmp_path / name for name in names], "", (".in", ".csv", ".tsv"))
        return {path.relative_to(tmp_path).as_posix(): part.get("split") for path, part in files}

    assert found("all") == found("all/train", "all/dev") == {"all/dev/seq.in": "val", "all/train/seq.in": "train"}
    assert found("mine") == found("mine/test.csv") == {"mine/test.csv": None}
    assert set(found("dev/a.csv", "dev/b.csv").values()) == {None}
    assert found("dev") == {"dev/a.csv": "val", "dev/b.csv": "val", "dev/c/train.tsv": "train"}


def test_parallel_files_need_equal_lengths(tmp_path):
    write(tmp_path / "seq.in", "a b", "c")
    write(tmp_path / "seq.out", "O O")
    with pytest.raises(UserError, match="they have seq.in 2, seq.out 1"):
        list(labelled.read_tags([tmp_path]))


# ----------------------------------------------------------------------------------------------------------------------
# Known sets

INTENTS = {
    "lists": {"area": {"wildcard": True}, "level": {"range": {"from": 1, "to": 3, "step": 1}},
              "state": {"values": [{"in": "(on|off)"}, "half [way]"]}},
    "expansion_rules": {"the": "(the|my)", "place": "[<the> ]{area}"},
    "intents": {"Set": {"data": [{"sentences": ["set <place> to {level:amount}[%| percent]", "(make <place>;{state})",
                                                "<place> {state}", "{level:amount}% in <place>"]}]},
                "Stop": {"data": [{"sentences": ["stop[ped]"]}]},
                "Wait": {"data": [{"sentences": ["wait {level}", "(wait|hold) {level}", "[now] wait {level}"]}]}}}


def test_a_template_expands_to_all_that_it_stands_for():
    module = runpy.run_path(str(SCRIPT))
    module["VALUES"]["area"] = module["VALUES"]["area"][:20]
    areas = module["part"](module["VALUES"]["area"], "val")
    found = {}
    for seed in range(2000):
        row = module["Expansion"]("(make <place>;{state})", INTENTS, [], "val", random.Random(seed)).row()
        found[" ".join(row["words"])] = row["tags"]
    states = {"on": ["B-state"], "off": ["B-state"], "half": ["B-state"], "half way": ["B-state", "I-state"]}
    expected = {}
    for the, area, (state, tags) in itertools.product(("", "the ", "my "), areas, states.items()):
        of_make = ["O"] * (1 + bool(the)) + ["B-area"] + ["I-area"] * area.count(" ")
        expected[f"make {the}{area} {state}"] = of_make + tags
        expected[f"{state} make {the}{area}"] = tags + of_make
    assert found == expected


def test_templates_and_values_are_held_out():
    module = runpy.run_path(str(SCRIPT))
    rows = module["generate"](INTENTS)
    assert rows == module["generate"](INTENTS) and {row["split"] for row in rows} == set(PARTS)
    values = {split: set() for split in PARTS}
    for row in rows:
        assert len(row["words"]) == len(row["tags"])
        area = [word for word, tag in zip(row["words"], row["tags"]) if tag.endswith("-area")]
        values[row["split"]].add(" ".join(area))
    assert not any(values[a] & values[b] - {""} for a, b in itertools.combinations(PARTS, 2))
    assert {row["split"] for row in rows if row["intent"] == "Stop"} == {"train"}  # one template
    said = {split: {re.sub(r"\d", "0", " ".join(row["words"])) for row in rows if row["split"] == split}
            for split in PARTS}
    assert not any(said[a] & said[b] for a, b in itertools.combinations(PARTS, 2)) and "wait 0" in said["train"]
    assert len({" ".join(row["words"]) for row in rows}) == len(rows)


def test_the_helps_pages_and_sentences_are_labelled(monkeypatch, tmp_path):
    def text(language, number):
        return page(("hd_1", f"{language} heading of {number}"), ("par_2", "Same in all"), ("par_3", f"{language} x"))

    packages = {f"libreoffice-help-{code}": (folder, {f"{topic}/{n}.html": text(folder, n) for n in range(30)
                                                      for topic in ("swriter", "scalc", "media")})
                for code, folder in (("en-us", "en-US"), ("it", "it"), ("en-gb", "en-GB"))}
    monkeypatch.setattr(corpora.subprocess, "run", fake_packages(packages))
    monkeypatch.setattr(corpora.shutil, "which", lambda name: name)
    rows, source, version = labelled_sets.fetch("help_topics", ["it"], tmp_path)
    assert {"text": "it heading of 7 Same in all it x", "labels": ["calc"], "page": "scalc/7.html"} in rows
    assert len(rows) == 60 and source == "Debian package libreoffice-help-it" and version == "1.2"
    rows, source, _ = labelled_sets.fetch("help_languages", [], tmp_path)
    assert source == "Debian packages libreoffice-help-{en,it}"
    assert {(row["text"].split()[0], *row["labels"]) for row in rows} == {("en-US", "en"), ("it", "it")}
    assert all("heading" in row["text"] for row in rows) and 4 < len(rows) < 60
    with pytest.raises(UserError, match="languages = en,it: help_topics is of one language"):
        labelled_sets.fetch("help_topics", ["en", "it"], tmp_path)


def test_the_published_formats_are_read(data, monkeypatch, tmp_path):  # noqa: F811
    def download(url, path):
        name = path.name
        if name.startswith("seq") or name == "label":
            split = path.parent.name
            write(path, *({"seq.in": f"fly to {split} {i}", "seq.out": "O O B-city B-number", "label": "flight"}[name]
                          for i in range(3)))
        elif name == "SST-2.zip":
            with zipfile.ZipFile(path, "w") as file:
                for part, texts in (("train", TEXTS), ("dev", ["it is \" good"] * 4)):
                    lines = [f"{text} \t{i % 2}" for i, text in enumerate(texts)]
                    file.writestr(f"SST-2/{part}.tsv", "\n".join(["sentence\tlabel", *lines]))
        else:
            make_imdb(path)

    monkeypatch.setattr(labelled_sets, "download", download)
    with pytest.raises(UserError, match=r"seq.in and others are not as expected \(sha256 "):
        prepare.main(prepare.Settings(), ["atis"])
    monkeypatch.setattr(labelled_sets, "check", lambda paths, expected: None)
    for name in ("atis", "sst2", "imdb"):
        prepare.main(prepare.Settings(tokenizer="byte", name=f"my_{name}"), [name])
    atis, sst2, imdb = (LabelledDataset(data / f"my_{name}", kind) for name, kind in
                        (("atis", "tags"), ("sst2", "labels"), ("imdb", "labels")))
    assert atis.rows["val"][2] == {"words": ["fly", "to", "dev", "2"], "tags": ["O", "O", "B-city", "B-number"],
                                   "intent": "flight"}
    assert [row["labels"][0] for row in sst2.rows["test"]] == ["negative", "positive"] * 2  # with doubles
    assert sst2.rows["test"][0]["text"] == 'it is " good'
    found = {split: {row["page"] for row in imdb.rows[split]} for split in PARTS}
    assert all(found.values()) and not found["train"] & found["val"] and "<br" not in imdb.rows["test"][0]["text"]
    assert {row["text"]: row["labels"] for row in imdb.rows["test"]}["pos test filma"] == ["positive"]
    with pytest.raises(UserError, match="languages = de: atis is in English alone"):
        prepare.main(prepare.Settings(languages="de"), ["atis"])


def make_imdb(path):
    """Writes a small archive of IMDB's format: a review per file NUMBER_STARS.txt, and the films in urls_*.txt."""
    with tarfile.open(path, "w:gz") as file:
        for split, label in itertools.product(("train", "test"), ("pos", "neg")):
            texts = {f"{label}/{i}_7.txt": f"{label} {split}<br /><br />film{chr(97 + i)}" for i in range(26)}
            texts[f"urls_{label}.txt"] = "".join(f"http://www.imdb.com/title/{split}{i}/usercomments\n"
                                                 for i in range(26))
            texts["unsup/0_0.txt"] = "no label"
            for name, text in texts.items():
                member = tarfile.TarInfo(f"aclImdb/{split}/{name}")
                member.size = len(text)
                file.addfile(member, io.BytesIO(text.encode()))


def test_without_a_network_tags_have_a_built_in_set(data, monkeypatch):  # noqa: F811
    failed = SimpleNamespace(returncode=1, stderr="collecting\nno route to host\n")
    monkeypatch.setattr(labelled_sets.subprocess, "run", lambda *arguments, **how: failed)
    monkeypatch.setattr(known, "built_in", lambda name, wanted, error: (name, wanted, str(error)))
    name, wanted, why = known.ensure("home_assistant_intents")
    assert (name, wanted) == ("flights", "home_assistant_intents") and "(no route to host): go online, or put" in why
    with pytest.raises(Offline, match="home-assistant-intents 2.* can't be downloaded"):
        prepare.main(prepare.Settings(name="mine"), ["home_assistant_intents"])


def test_checksums_are_sha256_or_md5(tmp_path):
    paths = [write(tmp_path / name, name) for name in ("a", "b")]
    content = b"".join(path.read_bytes() for path in paths)
    labelled_sets.check(paths, hashlib.sha256(content).hexdigest())
    labelled_sets.check(paths, hashlib.md5(content).hexdigest())
    with pytest.raises(UserError, match="a is not as expected .md5"):
        labelled_sets.check(paths[:1], hashlib.md5(content).hexdigest())


@pytest.mark.slow
def test_the_real_packages_give_what_the_readmes_say(data):  # noqa: F811
    if not shutil.which("apt-get") or not corpora.help_codes():
        pytest.skip("no apt-get, or no lists of packages")
    prepare.main(prepare.Settings(name="topics"), ["help_topics"])
    topics = LabelledDataset(data / "topics", "labels").meta
    assert len(topics["labels"]) == 9 and topics["train_rows"] > 1800
    prepare.main(prepare.Settings(name="home"), ["home_assistant_intents"])
    home = LabelledDataset(data / "home", "tags").meta
    assert [home[f"{split}_rows"] for split in PARTS] == [3748, 791, 790]  # the version is fixed
    assert len(home["intents"]) == 42 and len(home["tags"]) == 37
