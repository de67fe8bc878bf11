import errno
import functools
import hashlib
import http.server
import json
import os
import threading

import numpy as np
import pytest

import prepare
import tokenizer as tokenizers
from configurator import UserError
from sources import known, texts

TEXT = "To be, or not to be — that is the question:\r\n" * 40 + "ω"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The path of an empty data folder, used instead of data/."""
    monkeypatch.setattr(known, "DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "hamlet.txt"
    path.write_bytes(TEXT.encode())
    return path


def run(*sources, **settings):
    prepare.main(prepare.Settings(**settings), [str(source) for source in sources])


def contents(folder):
    """(training text, validation text, meta) of a data set, read from its files."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    splits = [np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"]) for split in ("train", "val")]
    assert [len(ids) for ids in splits] == [meta["train_tokens"], meta["val_tokens"]]
    return *(tokenizer.decode(ids.tolist()) for ids in splits), meta


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:280"])
def test_the_first_ninety_percent_are_for_training(data, source, tokenizer):
    run(source, tokenizer=tokenizer, newlines="keep")
    train, val, meta = contents(data / "hamlet")
    assert train + val == TEXT and len(train) == int(len(TEXT) * 0.9)
    assert meta["characters"] == len(TEXT) and meta["bytes"] == len(TEXT.encode())
    assert (meta["train_characters"], meta["val_characters"]) == (len(train), len(val))
    assert meta["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest() and meta["dtype"] == "uint16"
    run(source, tokenizer=tokenizer, val_fraction=0.5, name="half")
    text = TEXT.replace("\r", "")  # by default, Windows line ends become \n
    train, val, _ = contents(data / "half")
    assert train + val == text and len(val) == len(text) - len(text) // 2


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:280"])
def test_pieces_make_the_same_tokens_as_the_whole(data, source, tokenizer, monkeypatch):
    run(source, tokenizer=tokenizer, name="whole")
    monkeypatch.setattr(texts, "CHUNK", 61)  # in the middle of words
    run(source, tokenizer=tokenizer, name="pieces")
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        assert (data / "pieces" / name).read_bytes() == (data / "whole" / name).read_bytes(), name


def test_large_vocabularies_get_wide_ids_and_wrong_ids_are_refused(tmp_path):
    class Large:
        vocab_size = 70_000

        def encode(self, text):
            return np.array([69_999, 70_000][:len(text)])

    assert texts.write_tokens(tmp_path / "x.bin", ["a"], Large(), hashlib.sha256()) == [1, 1, 1]
    assert np.fromfile(tmp_path / "x.bin", dtype=np.uint32).tolist() == [69_999]
    with pytest.raises(AssertionError, match="outside"):
        texts.write_tokens(tmp_path / "x.bin", ["ab"], Large(), hashlib.sha256())


def make_files(folder, **contents):
    """Writes files into a folder. In the names of the arguments, __ stands for a slash and _ for a dot."""
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_the_end_of_each_file_is_for_validation(data, tmp_path, capsys, monkeypatch):
    folder = make_files(tmp_path / "plays", a_TXT=b"\xef\xbb\xbf" + b"a" * 30, b__c_py="b" * 9 + "\n", d="d" * 160)
    run(folder)
    train, val, _ = contents(data / "plays")
    assert train == "a" * 27 + "\n" + "b" * 9 + "\n" + "d" * 144 and val == "aaa\n" + "\n" + "d" * 16
    said = capsys.readouterr().out
    assert "the last 10 % of each file; the largest" in said and "d 80 %, a.TXT 15 %, c.py 5 %" in said
    assert "taken: 1 .txt, 1 .py, 1 no suffix" in said
    run(folder / "d", folder / "b", name="two")
    assert contents(data / "two")[0] == "d" * 144 + "\n" + "b" * 9
    with pytest.raises(UserError, match="2 sources make one data set: choose its name with --name=NEW"):
        run(folder / "d", folder / "b")


def test_files_left_out_of_a_folder_are_listed_with_the_reason(data, tmp_path, capsys):
    folder = make_files(tmp_path / "mixed", a_txt="words\n" * 9, _git__b_txt="hidden", note_pdf="%PDF-1.4",
                        x_json="{}", l_txt=b"caf\xe9", chap_txt__in_md="more\n" * 9, z_bin=b"ab\0",
                        w_txt="x".encode("utf-16-le") * 9)
    (folder / "dead.jsonl").symlink_to("nowhere")
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    run(folder)
    assert contents(data / "mixed")[2]["characters"] == 9 * 6 + 9 * 5
    said = capsys.readouterr().out
    for name, reason in (("note.pdf", "PDF"), ("x.json", "JSON"), ("l.txt", "not UTF-8: byte 0xe9"),
                         ("z.bin", "binary"), ("w.txt", "binary"), ("dead.jsonl", "not a readable file"),
                         ("link", "not a readable file, or is a link to a folder")):
        assert f"left out: {folder / name} is {reason}" in said
    assert "hidden" not in "".join(contents(data / "mixed")[:2])
    for i in range(20):
        (folder / f"{i}.bin").write_bytes(b"\0")
    run(folder, files="A*.*T")
    assert contents(data / "mixed")[2]["characters"] == 9 * 6
    run(folder, files="*.[BT]*")
    said = capsys.readouterr().out
    assert said.count("left out: ") == 11 and "left out: 13 more" in said and "taken: 1 .txt\n" in said
    assert contents(data / "mixed")[2]["characters"] == 9 * 6


def test_texts_beside_documents_are_left_out_or_refused(data, tmp_path, capsys):
    rows = "\n".join(json.dumps({"text": f"document {i}"}) for i in range(100))
    folder = make_files(tmp_path / "both", a_JSONL=rows, README_md="about", b_txt="words\n" * 9)
    with pytest.raises(UserError, match="documents .*a.JSONL. and texts .*b.txt.: .*=.*JSONL. or --files=.!.*JSONL"):
        run(folder)
    run(folder, files="!*.jsonl,*.txt")
    assert contents(data / "both")[2]["characters"] == 54
    (folder / "b.txt").unlink()
    run(folder, tokenizer="byte", name="documents", processes=1)
    assert "README.md is not a document" in capsys.readouterr().out
    assert json.loads((data / "documents" / "meta.json").read_text())["documents"] == 100
    (tmp_path / "few.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UserError, match="has 1 documents, of which none is for .*: add documents"):
        run(tmp_path / "few.jsonl", tokenizer="byte", name="more", processes=1)
    run(folder, tokenizer="byte", name="more", processes=1)


def test_html_becomes_the_text_that_a_page_shows(data, tmp_path):
    page = """<!DOCTYPE html><title>A &amp; B</title><style>p {}</style><script>var x = "<p>no</p>";</script>
        <h1>Head<em>ing</em></h1> <p>One   two
        three <b>four</b>.</p><p>Five<br>six &#8212; seven</p><table><tr><td>1</td><td>2</td></table>
        <pre>\ndef f():\n    return 1\n</pre><p>end"""
    (tmp_path / "page").write_text(page, encoding="utf-8")
    assert "".join(texts.read_file(tmp_path / "page")) == (
        "A & B\nHeading\nOne two three four.\nFive\nsix — seven\n1  2\ndef f():\n    return 1\nend\n")


def test_a_url_is_fetched(data, tmp_path, source):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/hamlet.txt"
        run(url)
        with pytest.raises(UserError, match="the server answered 404"):
            run(url.replace("hamlet", "macbeth"))
        server.shutdown()
    text = TEXT.replace("\r", "")
    assert contents(data / "hamlet")[0] == text[:int(len(text) * 0.9)]
    with pytest.raises(known.Offline, match="can't be reached"):
        run(url)


def test_an_interrupted_download_leaves_no_file(tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 10)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(known.Offline, match="the download broke off"):
            known.download(f"http://127.0.0.1:{server.server_port}/", tmp_path / "x.txt")
        server.shutdown()
    assert not (tmp_path / "x.txt").exists()


@pytest.mark.parametrize("content, message", [
    (b"", "has 0 characters"), (b"\xef\xbb\xbf", "has 0 characters"), (b"ab", "has 2 characters: too few"),
    (b"x" * 70 + b"\xe9t\xe9", "is not UTF-8: byte 0xe9 at offset 70"), (b"x" * 70 + b"\xe9", "0xe9 at offset 70"),
    ("\ufeff€".encode() * 3000 + b"\xe9", "0xe9 at offset 18,000"),
    ("words ".encode("utf-16"), "is UTF-16, .*iconv -f UTF-16 -t UTF-8 .*bad.txt"), (b"\x1f\x8bx", "is gzip"),
    ("words ".encode("utf-32"), "is UTF-32, .*iconv -f UTF-32 "), ("words".encode("utf-16-be"), "is binary"),
    (b"PK\x03\x04", "is zip"), (b"words\0", "is binary"),
])
def test_bad_texts_give_the_reason(data, tmp_path, content, message, monkeypatch):
    monkeypatch.setattr(texts, "CHUNK", 64)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "bad.txt")
    assert not (data / "bad" / "meta.json").exists()


def test_bad_sources_and_settings_give_the_reason(data, tmp_path, source):
    (tmp_path / "empty").mkdir()
    for sources, message in (([tmp_path / "none.txt"], "none.txt is not a file, a folder, a URL, or one of"),
                             ([tmp_path / "empty"], "empty: there are no texts or documents"),
                             (["http://x/rows.CSV?a=1"], "only texts are fetched"),
                             (["nothing://x"], "is not a URL that can be fetched|unknown url type")):
        with pytest.raises(UserError, match=message):
            run(*sources)
    for settings in (dict(column="x"), dict(processes=2), dict(max_files=1), dict(image_size=9), dict(files="*.txt")):
        with pytest.raises(UserError, match=f"{next(iter(settings))} = .*leave it out"):
            run(source, **settings)
    with pytest.raises(UserError, match="val_fraction = 1.0: must lie between"):
        prepare.Settings(val_fraction=1.0)
    with pytest.raises(UserError, match="make one with python prepare.py FILE --name=mine"):
        known.ensure("mine")


def test_only_its_own_source_replaces_a_data_set(data, tmp_path, source, capsys, monkeypatch):
    run(source)
    run(source, val_fraction=0.5)
    assert "already has a data set of this source: updating it" in capsys.readouterr().out
    before = (data / "hamlet" / "train.bin").read_bytes()
    other = make_files(tmp_path / "other", hamlet_txt="A country road. A tree. Evening.\n" * 9,
                       docs__a_jsonl='{"text": "x"}\n' * 99, images__captions_jsonl="")
    for path in (other / "hamlet.txt", other / "docs", other / "images"):
        with pytest.raises(UserError, match="holds another data set, of .*hamlet.txt: delete it, or choose"):
            run(path, name="hamlet")
    assert (data / "hamlet" / "train.bin").read_bytes() == before
    for meta in ("[", "{}", "[1]", ""):
        (data / "hamlet" / "meta.json").write_text(meta)
        with pytest.raises(UserError, match="holds another data set, of an unknown source: delete it"):
            run(source)
    for name, inside in (("photos", "1.jpg"), ("run", "run.lock")):
        make_files(tmp_path / name, run_json="{}")
        (tmp_path / name / inside).touch()
        with pytest.raises(UserError, match=f"name = .*{name}: .* holds unrelated files: choose another"):
            run(source, name=str(tmp_path / name))
        assert len(list((tmp_path / name).iterdir())) == 2
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", "./", "data/", "../"):
        with pytest.raises(UserError, match="holds all data sets: choose another name"):
            run(source, name=name)
    for name in ("shakespeare_char", str(data / "fineweb"), "data/shapes"):
        with pytest.raises(UserError, match="belongs to a known data set: choose another name"):
            run(source, name=name)
    assert [path.name for path in data.iterdir()] == ["hamlet"]
    monkeypatch.chdir(other / "docs")
    (other / "docs" / "a.jsonl").unlink()
    make_files(other / "docs", a_md="words\n" * 9)
    run(".")  # named after the folder
    assert (data / "docs" / "meta.json").exists()


def test_a_text_that_changes_while_it_is_read_is_refused(data, source, monkeypatch):
    def cut(name, *arguments):
        assert (data / "hamlet" / "run.lock").exists()  # no other process may write there now
        source.write_bytes(source.read_bytes()[:100])
        return tokenizers.ByteTokenizer()

    monkeypatch.setattr(tokenizers, "build", cut)
    with pytest.raises(UserError, match="hamlet.txt was changed while it was read: run again"):
        run(source, tokenizer="byte")
    assert not (data / "hamlet").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_left_out_without_waiting(data, tmp_path, capsys):
    folder = make_files(tmp_path / "mixed", a_txt="words\n" * 9)
    os.mkfifo(folder / "b.jsonl")
    run(folder)
    assert "b.jsonl is not a readable file" in capsys.readouterr().out
    with pytest.raises(UserError, match="b.jsonl is not a file, a folder"):
        run(folder / "b.jsonl", name="pipe")


def test_a_full_disk_leaves_nothing_behind(data, source, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(texts, "stored", full)
    with pytest.raises(UserError, match="hamlet can't be written: No space left on device"):
        run(source)
    assert not (data / "hamlet").exists()


def test_a_models_tokenizer_is_reused_and_the_command_fine_tunes_it(data, tmp_path, source, capsys, monkeypatch):
    monkeypatch.setenv("HOME" if os.name != "nt" else "USERPROFILE", str(tmp_path))
    run("~/hamlet.txt", name=str(tmp_path / "a set"))
    assert "'--dataset=" in (said := capsys.readouterr().out) and "'--out_dir=out/a set'" in said
    (tmp_path / "a run" / "best").mkdir(parents=True)
    tokenizers.CharTokenizer("\n abcdefghijklmnopqrstuvwxyz").save(tmp_path / "a run" / "best" / "tokenizer.json")
    make_files(tmp_path, new_txt="to be or not\n" * 9, odd_txt="to be or not\n" * 9 + "É")
    run(tmp_path / "new.txt", tokenizer=str(tmp_path / "a run"))
    assert contents(data / "new")[2]["vocab_size"] == 28
    assert f"train.py '--init_from={tmp_path}/a run' --dataset=new --out_dir=out/new\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="the character 'É' .U.00C9., in .*É., is not among"):
        run(tmp_path / "odd.txt", tokenizer=str(tmp_path / "a run"))


def test_a_tokenizer_on_the_hub_is_downloaded(data, tmp_path, source, capsys, monkeypatch):
    hub, asked = pytest.importorskip("huggingface_hub"), []
    (tmp_path / "cache").mkdir()
    tokenizers.CharTokenizer("\n abcdefghijklmnopqrstuvwxyz").save(tmp_path / "cache" / "tokenizer.json")

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(hub, "snapshot_download", download)
    make_files(tmp_path, new_txt="to be or not\n" * 9)
    run(tmp_path / "new.txt", tokenizer="maker/model-1.5")
    (name, wanted), = asked
    assert name == "maker/model-1.5" and {"tokenizer.json", "vocab.txt", "config.json"} < set(wanted)
    assert contents(data / "new")[2]["vocab_size"] == 28
    assert "train.py --init_from=maker/model-1.5 --dataset=new" in capsys.readouterr().out

    def fail(name, allow_patterns):
        raise hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="tokenizer = out/typo: no folder .* .the hub can't be reached.; with"):
        run(source, tokenizer="out/typo")


def test_a_bpe_learns_from_a_sample_spread_over_the_text(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "SAMPLE", 4000)
    monkeypatch.setattr(texts, "SAMPLE_PIECE", 100)
    pieces = [chr(97 + i) * 999 + " " for i in range(20)]
    found = list(texts.sample(pieces, 20_000))
    assert len("".join(found)) == 4000 and set("".join(found)) == set("".join(pieces)) - {" "}
    assert "learns from 4,000 characters that are spread over 20,000" in capsys.readouterr().out
    assert list(texts.sample(pieces[:3], 3000)) == pieces[:3]
    many = ["ab " * 10] * 1000
    assert "".join(texts.sample(many, 30_000)).count("ab") == 1330  # texts shorter than SAMPLE_PIECE are taken whole


def test_without_a_network_the_built_in_text_is_used(data, monkeypatch, capsys):
    def offline(url, path):
        raise known.Offline(f"{url} can't be reached")

    monkeypatch.setattr(known, "download", offline)
    assert known.ensure("shakespeare_char") == "python_reference"
    assert "NO NETWORK" in capsys.readouterr().out
    train, val, meta = contents(data / "python_reference")
    assert "Python" in train and meta["source"].startswith("pydoc_data.topics of Python 3.")
    assert not (data / "shakespeare_char").exists()
    assert known.ensure("shakespeare_char") == "python_reference"  # every run prints the notice
    assert "NO NETWORK" in capsys.readouterr().out


def test_a_known_text_is_checked(data, monkeypatch):
    expected = hashlib.sha256(b"words " * 9).hexdigest()
    monkeypatch.setitem(known.KNOWN, "shakespeare_char", ("char", "http://x", expected))
    path = data / "shakespeare_char" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"words ")
    with pytest.raises(UserError, match="is not the expected text .SHA-256"):
        known.ensure("shakespeare_char")
    path.write_bytes(b"words " * 9)
    assert known.ensure("shakespeare_char") == "shakespeare_char"
    assert contents(data / "shakespeare_char")[2]["characters"] == 54
