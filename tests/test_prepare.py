import functools
import hashlib
import http.server
import json
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
    """An empty data folder in place of the project's."""
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
    """(training text, validation text, meta) as the files say."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    splits = [np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"]) for split in ("train", "val")]
    assert [len(ids) for ids in splits] == [meta["train_tokens"], meta["val_tokens"]]
    return *(tokenizer.decode(ids.tolist()) for ids in splits), meta


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:280"])
def test_the_first_ninety_percent_are_for_training(data, source, tokenizer):
    run(source, tokenizer=tokenizer)
    train, val, meta = contents(data / "hamlet")
    assert train + val == TEXT and len(train) == int(len(TEXT) * 0.9)
    assert meta["characters"] == len(TEXT) and meta["bytes"] == len(TEXT.encode())
    assert (meta["train_characters"], meta["val_characters"]) == (len(train), len(val))
    assert meta["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest() and meta["dtype"] == "uint16"
    run(source, tokenizer=tokenizer, val_fraction=0.5, name="half")
    assert len(contents(data / "half")[1]) == len(TEXT) - len(TEXT) // 2


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:280"])
def test_pieces_make_the_same_tokens_as_the_whole(data, source, tokenizer, monkeypatch):
    run(source, tokenizer=tokenizer, name="whole")
    monkeypatch.setattr(texts, "CHUNK", 61)  # cuts words
    run(source, tokenizer=tokenizer, name="pieces")
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        assert (data / "pieces" / name).read_bytes() == (data / "whole" / name).read_bytes(), name


def test_large_vocabularies_get_wide_ids_and_wrong_ids_are_refused(tmp_path):
    class Large:
        vocab_size = 70_000

        def encode(self, text):
            return np.array([69_999, 70_000][:len(text)])

    assert texts.write_tokens(tmp_path / "x.bin", ["a"], Large()) == 1
    assert np.fromfile(tmp_path / "x.bin", dtype=np.uint32).tolist() == [69_999]
    with pytest.raises(AssertionError, match="outside"):
        texts.write_tokens(tmp_path / "x.bin", ["ab"], Large())


def test_a_folder_is_joined_in_order_without_byte_order_marks(data, tmp_path):
    folder = tmp_path / "plays"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone two")
    (folder / "b" / "c.txt").write_bytes(b"three four\n")
    (folder / "d.txt").write_bytes(b"five six")
    (folder / "note.pdf").write_bytes(b"\xff\xff")
    run(folder)
    train, val, _ = contents(data / "plays")
    assert train + val == "one two\nthree four\nfive six"


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
    assert contents(data / "hamlet")[0] == TEXT[:int(len(TEXT) * 0.9)]
    with pytest.raises(known.Offline, match="can't be reached"):
        run(url)


def test_half_a_download_is_none(tmp_path):
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
])
def test_bad_text_is_named(data, tmp_path, content, message, monkeypatch):
    monkeypatch.setattr(texts, "CHUNK", 64)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "bad.txt")
    assert not (data / "bad" / "meta.json").exists()


def test_bad_sources_are_named(data, tmp_path):
    for sources, message in (([tmp_path / "none.txt"], "is no file, no URL, no folder of .txt"),
                             ([tmp_path], "is no file, no URL, no folder of .txt"),
                             (["a", "b"], "one source at a time"),
                             (["nothing://x"], "is not a URL that can be fetched|unknown url type")):
        with pytest.raises(UserError, match=message):
            run(*sources)
    with pytest.raises(UserError, match="val_fraction = 1.0: must lie between"):
        prepare.Settings(val_fraction=1.0)
    with pytest.raises(UserError, match="make one with python prepare.py FILE --name=mine"):
        known.ensure("mine")


def test_without_a_network_the_built_in_text_stands_in(data, monkeypatch, capsys):
    def offline(url, path):
        raise known.Offline(f"{url} can't be reached")

    monkeypatch.setattr(known, "download", offline)
    assert known.ensure("shakespeare_char") == "python_reference"
    assert "NO NETWORK" in capsys.readouterr().out
    train, val, meta = contents(data / "python_reference")
    assert "Python" in train and meta["source"].startswith("pydoc_data.topics of Python 3.")
    assert not (data / "shakespeare_char").exists()
    assert known.ensure("shakespeare_char") == "python_reference"  # the notice is for every run
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
