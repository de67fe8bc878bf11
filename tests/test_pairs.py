"""sources/pairs.py and sources/corpora.py: parallel text becomes a data set of pairs, which batches.py opens."""

import gzip
import hashlib
import json
import shutil
import struct
import subprocess
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

import prepare
import tokenizer as tokenizers
from batches import PairsDataset
from configurator import UserError
from sources import corpora, known, pairs
from sources.download import Offline

ENGLISH = [f"The {a} {b} number {i} is here." for i, (a, b) in
           enumerate((a, b) for a in ("red", "blue", "old", "new", "big") for b in "cat dog house tree sea".split())]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ITALIAN = [line.upper() for line in ENGLISH]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The path of an empty data folder, used instead of data/."""
    monkeypatch.setattr(known, "DATA", tmp_path / "data")
    return tmp_path / "data"


def run(*sources, **settings):
    settings = {"tokenizer": "byte", "val_fraction": 0.2, **settings}  # a BPE of the default size needs more text
    prepare.main(prepare.Settings(**settings), [str(source) for source in sources])


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def two_files(folder, english=ENGLISH, italian=ITALIAN):
    return write(folder / "en.txt", *english), write(folder / "it.txt", *italian)


def everything(dataset):
    return {(row["source"], row["target"]) for split in ("train", "val", "test") for row in dataset.rows[split]}


def check(dataset):
    """The ids are those of the texts, in every split."""
    names = ["tokenizer", "tokenizer" if dataset.meta["shared"] else "tokenizer_source"]
    target, source = (tokenizers.load(dataset.folder / f"{name}.json") for name in names)
    for split in ("train", "val", "test"):
        for number, row in enumerate(dataset.rows[split]):
            ids = dataset.ids(split, number)
            assert [len(part) for part in ids] == dataset.lengths[split][number].tolist()
            assert ids[0].tolist() == source.encode(row["source"]).tolist()
            assert ids[1].tolist() == target.encode(row["target"]).tolist()


@pytest.mark.parametrize("settings, kinds", [
    (dict(tokenizer="byte"), ("BPETokenizer(259 tokens)", None)),
    (dict(tokenizer="bpe:280", shared=False), ("BPETokenizer(280 tokens)", "BPETokenizer(280 tokens)")),
    (dict(tokenizer="word:2"), ("WordTokenizer(", None)),
    (dict(tokenizer="word:2", shared=False), ("WordTokenizer(", "WordTokenizer("))])
def test_two_files_become_pairs_with_one_vocabulary_or_two(data, tmp_path, settings, kinds):
    run(*two_files(tmp_path), name="mine", languages="en,it", **settings)
    dataset = PairsDataset(data / "mine")
    assert everything(dataset) == set(zip(ENGLISH, ITALIAN))
    assert (dataset.meta["source_language"], dataset.meta["target_language"]) == ("en", "it")
    for name, kind in zip(("tokenizer", "tokenizer_source"), kinds):
        path = data / "mine" / f"{name}.json"
        assert path.exists() == bool(kind)
        if kind:
            vocabulary = tokenizers.load(path)
            assert repr(vocabulary).startswith(kind)
            assert len({vocabulary.pad, vocabulary.bos, vocabulary.eos, None}) == 4
    check(dataset)
    assert sum(dataset.meta[f"{split}_tokens"] for split in ("train", "val", "test")) == sum(
        dataset.lengths[split].sum() for split in dataset.lengths)


def test_two_files_without_languages_are_texts_with_a_hint(data, tmp_path, capsys):
    run(*two_files(tmp_path), name="mine")
    assert "if line N of one translates line N of the other, add --languages=en,it" in capsys.readouterr().out
    with pytest.raises(UserError, match="a data set of kind text, and this model needs one of kind pairs"):
        PairsDataset(data / "mine")


def test_tables_and_tmx_give_the_same_pairs_as_two_files(data, tmp_path):
    both = list(zip(ENGLISH, ITALIAN))
    files = {
        "a.tsv": ["it\tid\ten", *(f"{it}\t7\t{en}" for en, it in both)],
        "b.csv": ["question,answer", *(f'"{en}","{it}"' for en, it in both)],
        "c.jsonl": [json.dumps({"translation": {"it": it, "en": en}}) for en, it in both],
        "d.tsv": [f"{en}\t{it}\tCC-BY \"quoted" for en, it in both],
        "e.tmx": ["<tmx><body>", *(f'<tu><tuv xml:lang="EN-us"><seg>{en[:4]}<bpt i="1">&lt;b&gt;</bpt><hi>{en[4:]}</hi>'
                                   f'</seg></tuv><tuv xml:lang="it"><seg>{it}</seg></tuv></tu>' for en, it in both),
                  "</body></tmx>"]}
    settings = {"a": dict(languages="en,it"), "b": dict(columns="question,answer"), "c": dict(languages="en,it"),
                "d": dict(columns="1,2"), "e": dict(languages="en,it")}
    run(*two_files(tmp_path), name="mine", languages="en,it")
    for name, lines in files.items():
        run(write(tmp_path / name, *lines), **settings[name[0]])
        assert everything(PairsDataset(data / name[0])) == set(both), name
        assert (data / name[0] / "val.jsonl").read_bytes() == (data / "mine" / "val.jsonl").read_bytes()
    run(tmp_path / "e.tmx", name="guessed")  # a .tmx with two languages needs no setting
    assert PairsDataset(data / "guessed").meta["source_language"] == "EN-us"


def test_pairs_that_teach_nothing_are_counted(data, tmp_path, capsys):
    english = [*ENGLISH, "", "Linux is Linux.", "1 2 3 4 5 6 7 8", "Hi", ENGLISH[0], "the   end of\tit"]
    italian = [*ITALIAN, "solo", "Linux is Linux.", "uno", "Ehi", ITALIAN[0], "la fine"]
    run(*two_files(tmp_path, english, italian), name="mine", languages="en,it", max_words=7, min_words=2)
    dataset = PairsDataset(data / "mine")
    assert dataset.meta["left_out"] == {"empty": 1, "identical": 1, "long": 1, "short": 1, "duplicate": 1}
    said = capsys.readouterr().out
    assert "1 empty on one side, 1 identical on both sides, 1 too long, 1 too short, 1 twice the same" in said
    assert ("the end of it", "la fine") in everything(dataset)
    assert pairs.why_not("你好吗", "come stai", pairs.How(max_words=2)) == "long"  # each character is a word


def test_near_copies_are_on_the_same_side_and_a_pair_keeps_its_side():
    sources = [text for i in range(60) for text in (f"Press key {i}!", f"Line {LETTERS[i % 26]}{i}:")]
    sources += ["press KEY 7", "PRESS KEY: 7", "Press Key 0", "press, key; 1", "(Press key) 012"]
    rows = [{"source": source, "target": f"{n} {source}"} for n, source in enumerate(sources)]
    kept, _ = pairs.choose(rows, pairs.How(val_fraction=0.3))
    sides = {row["source"]: row["split"] for row in kept}
    assert len({sides[source] for source in sides if "key" in source.lower()}) == 1
    assert set(sides.values()) == {"train", "val", "test"}
    some, _ = pairs.choose(rows[::2], pairs.How(val_fraction=0.3))
    assert all(sides[row["source"]] == row["split"] for row in some)
    assert rows[0].keys() == {"source", "target"}  # the caller's rows stay as they are


def test_pages_are_held_out_whole_and_without_near_copies():
    rows = [{"source": f"Sentence {LETTERS[i]} of page {LETTERS[page % 20]}{LETTERS[page // 20]}", "target": str(i),
             "page": str(page)} for page in range(60) for i in range(9)]
    rows += [{"source": "See the Index.", "target": f"{page}", "page": str(page)} for page in range(60)]
    kept, left_out = pairs.choose(rows, pairs.How(val_fraction=0.2))
    sides = {}
    for row in kept:
        sides.setdefault(row["page"], set()).add(row["split"])
    assert all(len(found) == 1 for found in sides.values()) and len(sides) == 60
    by_split = {split: [row for row in kept if row["split"] == split] for split in ("train", "val", "test")}
    assert all(60 < len(found) for found in by_split.values())
    assert {row["split"] for row in kept if row["source"] == "See the Index."} == {"train"}
    assert left_out == {"copy": sum({"train"} != found for found in sides.values())}


def test_bad_pairs_give_the_reason(data, tmp_path):
    english, italian = two_files(tmp_path)
    short, empty = write(tmp_path / "short.txt", *ITALIAN[:-1]), write(tmp_path / "empty.txt", *[""] * len(ENGLISH))
    table = write(tmp_path / "t.tsv", "en\tit", *(f"{en}\t{it}" for en, it in zip(ENGLISH, ITALIAN)))
    memory = write(tmp_path / "m.tmx", '<tmx><tu><tuv xml:lang="en"><seg>a</seg></tuv></tu></tmx>')
    broken = write(tmp_path / "b.tmx", "<tmx><tu>")
    numbers = write(tmp_path / "n.jsonl", '{"en": 7, "it": "sette"}')
    for sources, settings, message in (
            ((english, short), dict(languages="en,it"), "en.txt has 25 lines and .*short.txt 24: line N of one must"),
            ((english, empty), dict(languages="en,it"), "empty.txt has no text: both sides need some"),
            ((english,), dict(languages="en,it"), "pairs come from two texts, line by line, and --languages=en,it"),
            ((english, table), dict(languages="en,it"), "give files of one kind"),
            ((english, italian), dict(languages="en"), "languages = en: must be two names, the source's first"),
            ((table,), dict(languages="en,de"), "line 2: no column is named de, only en, it: choose two with --col"),
            ((table,), dict(columns="1,3"), "line 1: no column is named 3, only 1, 2"),
            ((memory,), dict(languages="en,it"), "m.tmx has no language it, only en: choose two"),
            ((memory,), dict(), "m.tmx has 1 languages .en.: choose two with --languages"),
            ((broken,), dict(languages="en,it"), "b.tmx is not a complete .tmx: "),
            ((numbers,), dict(languages="en,it"), "line 1: en = 7: is not valid text"),
            ((tmp_path,), dict(languages="en,it"), "pairs come from files on this machine"),
            ((table,), dict(languages="en,it", tokenizer="bpe:4000"), "bpe:4000: the text yields only .* tokens; use "),
            ((table,), dict(languages="en,it", tokenizer="gpt2:x"), "tokenizer = gpt2:x: must be char"),
            ((table,), dict(languages="en,it", tokenizer="word:999"), "word:999: no word occurs 999 times"),
            ((table,), dict(languages="en,it", val_fraction=0.5), "val_fraction = 0.5: must lie between 0 and 0.5"),
            ((table,), dict(languages="en,it", val_fraction=1e-9), "none of 25 pairs is for val .left out: none.: add"),
            ((table,), dict(languages="en,it", image_size=9), "image_size = 9: does nothing for pairs; leave it out")):
        with pytest.raises(UserError, match=message):
            run(*sources, name="bad", **settings)
        assert not (data / "bad" / "meta.json").exists()
    run(table, name="small", languages="en,it", tokenizer="char")  # the default
    assert json.loads((data / "small" / "meta.json").read_text())["vocab_size"] < 4000  # as many as the text yields
    with pytest.raises(UserError, match="shared = False: does nothing beside"):
        run(table, name="more", languages="en,it", tokenizer=str(data / "small"), shared=False)
    prepare.main(prepare.Settings(name="bytes", languages="en,it", tokenizer="char"), [str(table)], {"tokenizer"})
    assert json.loads((data / "bytes" / "meta.json").read_text())["vocab_size"] == 259
    with pytest.raises(UserError, match="max_words = 2: must be .*3"):
        prepare.Settings(min_words=3, max_words=2)


def test_a_vocabulary_is_taken_from_a_models_folder(data, tmp_path):
    run(*two_files(tmp_path), name="mine", languages="en,it", tokenizer="word:1", shared=False)
    run_folder = tmp_path / "out" / "best"
    run_folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_source.json"):
        shutil.copy(data / "mine" / name, run_folder)
    write(tmp_path / "t.tsv", "en\tit", *(f"{en} Well\t{it}" for en, it in zip(ENGLISH, ITALIAN)))
    run(tmp_path / "t.tsv", languages="en,it", tokenizer=str(tmp_path / "out"))
    for name in ("tokenizer.json", "tokenizer_source.json"):
        assert (data / "t" / name).read_bytes() == (data / "mine" / name).read_bytes()
    check(PairsDataset(data / "t"))
    tokenizers.CharTokenizer("abc").save(run_folder / "tokenizer.json")
    with pytest.raises(UserError, match="pairs need bpe:SIZE, word:TIMES, char or byte .*, or the folder of a mod"):
        run(tmp_path / "t.tsv", name="chars", languages="en,it", tokenizer=str(tmp_path / "out"))


def test_a_damaged_data_set_of_pairs_is_named(data, tmp_path):
    run(*two_files(tmp_path), name="mine", languages="en,it")
    dataset = PairsDataset(data / "mine")
    assert repr(dataset).endswith(f"{len(dataset.rows['train'])} train, {len(dataset.rows['val'])} val,"
                                  f" {len(dataset.rows['test'])} test pairs)")
    for name in ("val_target.bin", "test_lengths.bin", "val.jsonl"):
        shutil.copytree(data / "mine", tmp_path / name)
        (tmp_path / name / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"{name} does not hold the .*prepare"):
            PairsDataset(tmp_path / name).rows["val"]


# ----------------------------------------------------------------------------------------------------------------------
# Known sets

def test_phrases_are_made_without_a_network_and_take_the_place_of_others(data, monkeypatch, capsys):
    assert known.ensure("phrases") == "phrases"
    dataset = PairsDataset(data / "phrases")
    assert ("Where is the water?", "Dov'è l'acqua?") in everything(dataset)
    assert ("Is the mirror expensive?", "Lo specchio è caro?") in everything(dataset)
    assert len(everything(dataset)) == 468 and dataset.meta["left_out"] == {}
    before = dataset.meta["sha256"]
    shutil.rmtree(data / "phrases")
    monkeypatch.setattr(corpora.shutil, "which", lambda name: None)
    assert known.ensure("libreoffice_help") == "phrases"
    assert "NO NETWORK: libreoffice-help-en-us is a Debian package" in capsys.readouterr().out
    assert PairsDataset(data / "phrases").meta["sha256"] == before
    with pytest.raises(Offline, match="libreoffice-help-de is a Debian package, and this machine has no apt-get"):
        prepare.main(prepare.Settings(languages="de,en"), ["libreoffice_help"])
    with pytest.raises(UserError, match="phrases has only en and it"):
        prepare.main(prepare.Settings(languages="en,de"), ["phrases"])
    with pytest.raises(UserError, match="phrases always has tokenizer = bpe:400: add --name=NEW"):
        prepare.main(prepare.Settings(tokenizer="word:1"), ["phrases"])
    prepare.main(prepare.Settings(languages="it,en", tokenizer="word:1"), ["phrases"])  # its name has the languages
    assert ("Dov'è l'acqua?", "Where is the water?") in everything(PairsDataset(data / "phrases_it_en"))


def page(*paragraphs):
    lines = (f'<p id="{name}" class="x" dir="auto">{text}</p>' for name, text in paragraphs)
    return "\n".join(("<html><p>menu</p>", *lines))


def fake_packages(pages):
    """A stand-in for subprocess.run, as sources/corpora.py calls it. pages: {package: (folder, {page: HTML})}."""
    def run(command, cwd=None, **how):
        if command[0] == "apt-cache":
            return SimpleNamespace(stdout="\n".join(pages))
        if command[0] == "apt-get":
            wanted = command[command.index("download") + 1:]
            for package in pages.keys() & set(wanted):
                known.Path(cwd, f"{package}_1.2_all.deb").touch()
            return SimpleNamespace(returncode=not set(wanted) <= pages.keys(), stderr="E: Unable to locate package")
        if command[1] == "-x":
            folder, files = pages[known.Path(command[2]).name.partition("_")[0]]
            for name, text in files.items():
                path = known.Path(command[3], "usr/share/libreoffice/help", folder, "text", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        return SimpleNamespace(stdout="1.2\n")
    return run


def test_libreoffice_help_is_aligned_by_page_and_paragraph(monkeypatch, tmp_path):
    keys = '<span id="1"><span hidden="true" class="MAC">Cmd</span><span hidden="true">Ctrl</span>'
    english = page(("par_1", "<a name='x'></a>Press <span class='k'>Enter</span> &amp; wait."), ("par_2", "English"),
                   ("hd_3", f'{keys}<span hidden="true" class="CALC"><b>no</b></span></span>+F2<br>opens it'))
    italian = page(("hd_3", f"{keys}</span>+F2<br>lo apre"), ("par_1", "Premi Invio &amp; aspetta."))
    pages = {"libreoffice-help-en-us": ("en-US", {"a/b.html": english, "only.html": english}),
             "libreoffice-help-it": ("it", {"a/b.html": italian})}
    monkeypatch.setattr(corpora.subprocess, "run", fake_packages(pages))
    monkeypatch.setattr(corpora.shutil, "which", lambda name: name)
    rows, source, revision = corpora.fetch("libreoffice_help", ["en", "it"], tmp_path)
    assert rows == [
        {"source": "Press Enter & wait.", "target": "Premi Invio & aspetta.", "page": "a/b.html"},
        {"source": "Ctrl+F2 opens it", "target": "Ctrl+F2 lo apre", "page": "a/b.html"}]
    assert source == "Debian packages libreoffice-help-en-us and libreoffice-help-it" and revision == "1.2"
    with pytest.raises(UserError, match="no package libreoffice-help-xx: choose languages of en, it"):
        corpora.fetch("libreoffice_help", ["en", "xx"], tmp_path)
    pages.clear()
    for name, languages in (("libreoffice_help", ["en", "it"]), ("bible_en_es", ["en", "es"])):
        with pytest.raises(Offline, match="E: Unable to locate package.: run apt-get update"):
            corpora.fetch(name, languages, tmp_path)


def osis(text, *words):
    """A verse in OSIS. words: (number or numbers, the words of the text that they mark), in order."""
    for numbers, marked in words:
        before, found, text = text.partition(marked)
        yield f'{before}<w lemma="{" ".join(f"strong:{number}" for number in numbers.split())}">{found}</w>'
    yield text


def write_module(folder, entries):
    """A SWORD module in format zText: the entries in two blocks of the New Testament; the Old Testament is empty."""
    folder.mkdir(parents=True)
    blocks, places = [b"", b""], b""
    for number, entry in enumerate(entries):
        block, entry = int(number >= 2), entry.encode()
        places += struct.pack("<IIH", block, len(blocks[block]) if entry else 0, len(entry))
        blocks[block] += entry
    packed, index = b"", b""
    for block in blocks:
        new = zlib.compress(block)
        index += struct.pack("<III", len(packed), len(new), len(block))
        packed += new
    for part, contents in (("ot", (b"", b"", b"")), ("nt", (places, index, packed))):
        for end, content in zip(("bzv", "bzs", "bzz"), contents):
            (folder / f"{part}.{end}").write_bytes(content)


ENGLISH_VERSE = ("¶ And God said,<note>a</note> Let there be light &amp; light:", ("1", "God"), ("2", "said"),
                 ("3", "be"), ("4", "light"), ("4", "light"))
SPANISH_VERSE = ("Y dijo ¿Dios? Sea la luz.", ("2", "Y dijo"), ("1", "Dios"), ("3", "Sea"), ("4", "luz"))
HEADING = '<chapter n="{0}" osisID="Gen.{0}" sID="x"/><title level="1">Genesis</title>'


def test_verses_are_linked_by_unambiguous_numbers(monkeypatch, tmp_path):
    """"said" is not linked, as its number marks two words in Spanish; nor is "light", whose number occurs twice."""
    entries = {"en": ["", HEADING.format(1), "".join(osis(*ENGLISH_VERSE)), HEADING.format(2), "alone",
                      "".join(osis("a b c", ("5 6", "a"), ("7", "b")))],
               "es": ["", HEADING.format(1), "".join(osis(*SPANISH_VERSE)), HEADING.format(2), "",
                      "".join(osis("x y z", ("5", "x"), ("7", "z")))]}

    def unpack(package, folder, to):
        language, module = next((key, module) for key, (name, module) in corpora.BIBLES.items() if name == package)
        write_module(known.Path(to, "usr/share/sword/modules/texts/ztext", module), entries[language])
        return "1.2"

    monkeypatch.setattr(corpora, "apt_get", lambda packages, folder: None)
    monkeypatch.setattr(corpora, "unpack", unpack)
    rows, source, revision = corpora.fetch("bible_en_es", ["en", "es"], tmp_path)
    assert rows == [
        {"source": "And God said, Let there be light & light:", "target": "Y dijo ¿Dios? Sea la luz.", "page": "Gen.1",
         "links": [[1, 2], [5, 3]]},
        {"source": "alone", "target": "", "page": "Gen.2", "links": []},
        {"source": "a b c", "target": "x y z", "page": "Gen.2", "links": [[1, 2]]}]
    assert source == "Debian packages sword-text-kjv and sword-text-sparv" and revision == "1.2 and 1.2"
    assert corpora.fetch("bible_en_es", ["es", "en"], tmp_path)[0][0]["links"] == [[2, 1], [3, 5]]
    with pytest.raises(UserError, match="languages = en,it: bible_en_es has only en and es"):
        corpora.fetch("bible_en_es", ["en", "it"], tmp_path)


def test_links_are_saved_beside_the_rows(tmp_path):
    rows = [{"source": one, "target": other, "links": [[1, number % 5]]}
            for number, (one, other) in enumerate(zip(ENGLISH, ITALIAN))]
    pairs.prepare(rows, tmp_path / "linked", pairs.How(languages="en,it", tokenizer="byte", val_fraction=0.2), "here")
    dataset = PairsDataset(tmp_path / "linked")
    found = {row["source"]: row["links"] for split in ("train", "val", "test") for row in dataset.rows[split]}
    assert found == {row["source"]: row["links"] for row in rows if row["source"] in found} and found


def test_opus_books_has_the_hubs_layout_and_passages_as_pages(data, monkeypatch, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table
    rows = [{"id": str(i), "translation": {"en": f"Sentence {i}.", "it": f"Frase {i}."}} for i in range(450)]
    path = tmp_path / "train-00000-of-00001.parquet"
    write_table(pyarrow.Table.from_pylist(rows), path)

    class Api:
        def list_repo_tree(self, name, under=None, **how):
            assert name == "Helsinki-NLP/opus_books" and how["revision"] == corpora.OPUS_BOOKS[1]
            paths = ["README.md", "de-en", "en-it"] if under is None else [f"{under}/{path.name}"]
            return [SimpleNamespace(path=path, size=1) for path in paths]

        def hf_hub_download(self, name, file, **how):
            assert file == f"en-it/{path.name}"
            return path

    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    found, source, revision = corpora.fetch("opus_books", ["it", "en"], tmp_path)
    found = list(found)
    assert found[101] == {"source": "Frase 101.", "target": rows[101]["translation"]["en"], "page": "passage 1"}
    assert len({row["page"] for row in found}) == 5 and source == "Helsinki-NLP/opus_books en-it" and revision
    with pytest.raises(UserError, match="languages = en,zz: opus_books has no such pair, only de-en, en-it"):
        corpora.fetch("opus_books", ["en", "zz"], tmp_path)
    monkeypatch.setattr(Api, "list_repo_tree", lambda *arguments, **how: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(Offline, match="can't be fetched from the hub .no route."):
        corpora.fetch("opus_books", ["en", "it"], tmp_path)


def test_multi30k_keeps_its_own_splits_and_is_checked(data, monkeypatch, tmp_path):
    sizes, urls = {"train": 30, "val": 4, "test_2016_flickr": 5}, []

    def download(url, path):
        urls.append(url)
        split, language, _ = path.name.split(".")
        text = "Oslo\n" + "".join(f"{language} {split} {i}\n" for i in range(1, sizes[split]))
        path.write_bytes(gzip.compress(text.encode(), mtime=0))

    monkeypatch.setattr(corpora, "download", download)
    with pytest.raises(UserError, match="languages = en,it: multi30k has only cs, de, en, fr"):
        prepare.main(prepare.Settings(languages="en,it"), ["multi30k"])
    with pytest.raises(UserError, match="are not the expected files .SHA-256"):
        prepare.main(prepare.Settings(), ["multi30k"])
    folder = data / "multi30k" / "download"
    for language in ("en", "de"):
        for name in sizes:
            path = folder / f"{name}.{language}.gz"
            path.exists() or download(f"{corpora.MULTI30K}/{path.name}", path)
        content = b"".join((folder / f"{name}.{language}.gz").read_bytes() for name in sizes)
        monkeypatch.setitem(corpora.CHECKSUMS, language, hashlib.sha256(content).hexdigest())
    prepare.main(prepare.Settings(tokenizer="byte", name=str(tmp_path / "captions")), ["multi30k"])
    dataset = PairsDataset(tmp_path / "captions")
    assert [dataset.meta[f"{split}_rows"] for split in ("train", "val", "test")] == [29, 4, 5]
    assert dataset.rows["val"][0]["source"] == "Oslo" and dataset.meta["left_out"] == {"identical": 1}
    assert dataset.rows["test"][4] == {"source": "en test_2016_flickr 4", "target": "de test_2016_flickr 4"}
    assert len(urls) == len(set(urls)) == 6 and urls[0] == f"{corpora.MULTI30K}/train.en.gz"


@pytest.mark.slow
def test_the_real_packages_give_what_the_readme_says(data):
    if not shutil.which("apt-get") or subprocess.run(
            ["apt-cache", "pkgnames", "libreoffice-help-it"], capture_output=True).stdout == b"":
        pytest.skip("no apt-get, or no lists of packages")
    rows, _, _ = corpora.fetch("libreoffice_help", ["en", "it"], data)
    assert len(rows) > 50_000 and len({row["page"] for row in rows}) > 2000
    assert np.mean([row["source"] != row["target"] for row in rows]) > 0.5
