import csv
import filecmp
import hashlib
import http.server
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import huggingface_hub.constants
import numpy as np
import pytest

pyarrow = pytest.importorskip("pyarrow")
from conftest import make_text
from pyarrow import parquet

import prepare
import tokenizer as tokenizers
from batches import Dataset
from configurator import UserError
from sources import documents, known

ROOT = os.path.dirname(prepare.__file__)
SCRIPT = """import prepare, sys
from sources import documents
documents.SHARD_BYTES = 0
source, name, tokenizer, processes, max_files = sys.argv[1:]
prepare.main(prepare.Settings(tokenizer=tokenizer, name=name, processes=int(processes), max_files=int(max_files)),
             [source])"""


@pytest.fixture(autouse=True)
def a_shard_per_file(monkeypatch):
    monkeypatch.setattr(documents, "SHARD_BYTES", 0)


@pytest.fixture
def in_process(monkeypatch):
    """Shards are written in this process: others take a second to start."""
    monkeypatch.setattr(documents, "in_processes", lambda _, jobs: [documents.write_shard(*job) for job in jobs])


def make_documents(count, seed):
    return [f"{seed}.{i}: {make_text(20 + i % 50, 1000 * seed + i)}ω" for i in range(count)]


def write_parquet(path, texts, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=7, **more)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder, texts of its documents): two parquet files and a .jsonl; two of them contain the same document."""
    folder, doubled = tmp_path_factory.mktemp("corpus"), "0.0: twice"
    texts = [make_documents(300, 0) + [doubled], make_documents(10, 1), [doubled] + make_documents(40, 2)]
    write_parquet(folder / "a" / "0.parquet", texts[0][:5] + [None, ""] + texts[0][5:], compression="zstd")
    write_parquet(folder / "a" / "1.parquet", texts[1])
    lines = [json.dumps({"n": n, "text": text}) for n, text in enumerate(texts[2])]
    (folder / "b.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    return folder, sum(texts, [])


def run(source, folder, **settings):
    prepare.main(prepare.Settings(name=str(folder), **settings), [str(source)])
    return Dataset(folder)


def same(a, b):
    """True if two folders hold the same files, but for run.lock."""
    names = sorted({*os.listdir(a)} - {"run.lock"})
    return sorted({*os.listdir(b)} - {"run.lock"}) == names and filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_each_document_is_there_once_and_in_order(corpus, in_process, tmp_path, tokenizer):
    source, texts = corpus
    data = run(source, tmp_path / "out", tokenizer=tokenizer)
    tokenizer = tokenizers.load(tmp_path / "out" / "tokenizer.json")
    lines = ["<|endoftext|>"] * 2 if tokenizer.eos is not None else ["\n", "\n\n"]
    for split in ("train", "val"):
        chosen = [text for text in texts if (split == "val") == (
            int(hashlib.sha256(text.encode()).hexdigest(), 16) < 2**256 // 10)]
        ids = np.concatenate([np.array(array) for array in data.splits[split].arrays])
        assert tokenizer.decode(ids.tolist()) == "".join(text + lines["\n" in text] for text in chosen)
        assert data.meta[f"{split}_tokens"] == len(ids) == len(data.splits[split])
        assert data.meta[f"{split}_characters"] == sum(map(len, chosen))
    assert data.meta["documents"] == len(texts) and data.meta["bytes"] == sum(len(t.encode()) for t in texts)


def test_processes_and_grouping_change_nothing(corpus, tmp_path, monkeypatch, request):
    source, _ = corpus
    many = run(source, tmp_path / "many", tokenizer="bpe:300", processes=3)
    request.getfixturevalue("in_process")
    run(source, tmp_path / "one", tokenizer="bpe:300")
    assert same(tmp_path / "many", tmp_path / "one")
    monkeypatch.setattr(documents, "SHARD_BYTES", 1 << 20)
    one = run(source, tmp_path / "single", tokenizer="bpe:300")
    assert one.meta["shards"]["train"] == [len(one.splits["train"])] and len(many.meta["shards"]["train"]) == 3
    assert np.array_equal(one.splits["train"], many.splits["train"][0:len(one.splits["train"])])


def test_a_finished_shard_is_kept_and_a_missing_one_is_written(corpus, in_process, tmp_path, capsys):
    source, _ = corpus
    for folder in ("whole", "again"):
        run(source, tmp_path / folder, tokenizer="byte")
    kept = (tmp_path / "again" / "train_00000.bin").stat().st_mtime_ns
    (tmp_path / "again" / "shard_00001.json").unlink()
    (tmp_path / "again" / "train_00001.bin").write_bytes(b"torn")
    capsys.readouterr()
    run(source, tmp_path / "again", tokenizer="byte")
    assert "shards: 3, to write: 1 (stale: 0)" in capsys.readouterr().out
    assert same(tmp_path / "whole", tmp_path / "again")
    assert (tmp_path / "again" / "train_00000.bin").stat().st_mtime_ns == kept
    (tmp_path / "hamlet.txt").write_text("To be, or not to be. " * 9, encoding="utf-8")
    run(tmp_path / "hamlet.txt", tmp_path / "text")
    with pytest.raises(UserError, match="holds another data set, of .*hamlet.txt: delete it"):
        run(source, tmp_path / "text", tokenizer="byte")


@pytest.mark.slow
def test_after_a_kill_at_any_time_a_second_run_ends_with_the_same_bytes(tmp_path):
    for i in range(6):
        write_parquet(tmp_path / "source" / f"{i}.parquet", make_documents(4000, i))
    run(tmp_path / "source", tmp_path / "whole", tokenizer="bpe:300", processes=1)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "source"), str(tmp_path / "killed"), "bpe:300", "3", "0"]
    pauses, killed = np.random.default_rng(0).uniform(0, 0.6, size=5), 0
    for pause in pauses:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and not list(tmp_path.glob("killed/*.bin.new")):
            time.sleep(0.01)
        time.sleep(pause)
        process.kill()
        process.communicate(timeout=60)  # returns when every worker has closed the pipe
        killed += process.returncode != 0
    assert killed >= 3
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)] if os.name != "nt"
                         else [])
def test_workers_end_with_the_process_that_started_them(tmp_path, number, status):
    os.mkfifo(tmp_path / "0.jsonl")  # a reader waits for ever
    script = ("import sys, pathlib\nfrom configurator import one_line_errors\nfrom sources import documents\n"
              "path, out = map(pathlib.Path, sys.argv[1:])\nwith one_line_errors():"
              " documents.prepare(documents.local_source('', [path]), out, 'byte')")
    command = [sys.executable, "-c", script, str(tmp_path / "0.jsonl"), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not list(tmp_path.glob("out/*.bin.new")):
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status and b"Traceback" not in said, said


def test_a_killed_worker_is_reported(tmp_path):
    write_parquet(tmp_path / "source" / "0.parquet", make_documents(3000, 0))

    def kill():
        while not list(tmp_path.glob("out/*.bin.new")):
            time.sleep(0.01)
        for child in multiprocessing.active_children():
            child.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(UserError, match="a process was killed.*run again to resume, with fewer --processes"):
        run(tmp_path / "source", tmp_path / "out", tokenizer="bpe:300", processes=1)
    thread.join()
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.fixture
def files(tmp_path):
    """A folder with three files of documents."""
    (tmp_path / "source").mkdir()
    for name in "abc":
        texts = make_documents(60, ord(name))
        lines = [json.dumps({"text": text, "other": f"{name} {i}"}) for i, text in enumerate(texts)]
        (tmp_path / "source" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "source"


def rewrite(path, old, new):
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def swap(folder):
    (folder / "a.jsonl").rename(folder / "spare")
    (folder / "b.jsonl").rename(folder / "a.jsonl")
    (folder / "spare").rename(folder / "b.jsonl")


CHANGES = {  # with the tokenizer byte: (the change, how many shards are rewritten, how many are new)
    "the same size": (lambda folder: rewrite(folder / "b.jsonl", "98.", "97."), 1, 0),
    "longer": (lambda folder: rewrite(folder / "c.jsonl", "night", "knight"), 1, 0),
    "one less": (lambda folder: (folder / "a.jsonl").unlink(), 2, 0),
    "one more": (lambda folder: rewrite_as(folder / "c.jsonl", folder / "d.jsonl", "fool", "wise"), 0, 1),
    "other names": (swap, 2, 0),
}


def rewrite_as(path, other, old, new):
    other.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("change, tokenizer", [*((change, "byte") for change in CHANGES), ("the same size", "bpe:300"),
                                               ("one more", "bpe:300"), ("other names", "bpe:300"), ("longer", "char")])
def test_after_a_change_the_result_is_that_of_a_first_run(files, in_process, tmp_path, capsys, tokenizer, change):
    run(files, tmp_path / "again", tokenizer=tokenizer)
    edit, stale, new = CHANGES[change]
    edit(files)
    capsys.readouterr()
    run(files, tmp_path / "again", tokenizer=tokenizer)
    said = capsys.readouterr().out
    run(files, tmp_path / "fresh", tokenizer=tokenizer)
    for left in tmp_path.glob("again/*_00002.*") if change == "one less" else ():
        left.unlink()
    assert same(tmp_path / "again", tmp_path / "fresh")
    assert f", to write: {stale + new} (stale: {stale})" in said or tokenizer != "byte"
    assert "(stale: 3)" in said or tokenizer != "bpe:300" or change not in ("the same size", "one more")


def test_a_run_with_fewer_files_keeps_the_other_shards(files, in_process, tmp_path, capsys):
    whole = run(files, tmp_path / "out", tokenizer="byte").meta
    fewer = run(files, tmp_path / "out", tokenizer="byte", max_files=1).meta
    assert fewer["documents"] == 60 and fewer["shards"]["train"] == whole["shards"]["train"][:1]
    capsys.readouterr()
    assert run(files, tmp_path / "out", tokenizer="byte").meta == whole
    assert "shards: 3, to write: 0" in capsys.readouterr().out
    run(files, tmp_path / "fresh", tokenizer="byte")
    for name, content in (("shard_00000.json", b"{"), ("train_00000.bin", b""), ("shard_00000.json", b"{}")):
        (tmp_path / "out" / name).write_bytes(content)
        run(files, tmp_path / "out", tokenizer="byte")
        assert same(tmp_path / "out", tmp_path / "fresh")


def test_another_setting_rewrites_all_shards_and_a_wrong_one_loses_none(files, in_process, tmp_path, capsys):
    with pytest.raises(UserError, match="a.jsonl, line 1: no column is named body, only text, other: .*--column=NAME"):
        run(files, tmp_path / "out", tokenizer="byte", column="body")
    run(files, tmp_path / "out", tokenizer="bpe:300", column="other", val_fraction=0.3)
    run(files, tmp_path / "out", tokenizer="byte")
    run(files, tmp_path / "fresh", tokenizer="byte")
    assert same(tmp_path / "out", tmp_path / "fresh")
    with pytest.raises(UserError, match="no column is named body"):
        run(files, tmp_path / "out", tokenizer="byte", column="body")
    capsys.readouterr()
    run(files, tmp_path / "out", tokenizer="byte")
    assert "shards: 3, to write: 0" in capsys.readouterr().out and same(tmp_path / "out", tmp_path / "fresh")


def test_another_corpus_is_refused(files, in_process, tmp_path):
    with pytest.raises(UserError, match="no column is named body"):
        run(files, tmp_path / "out", tokenizer="byte", column="body")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "z.jsonl").write_text('{"text": "fox"}\n' * 60)
    with pytest.raises(UserError, match="holds another data set, of .*source: delete it, or choose another name"):
        run(tmp_path / "other", tmp_path / "out", tokenizer="byte")


def test_two_processes_do_not_write_to_one_folder(files, in_process, tmp_path):
    code = "import sys; from run.lock import owned\nwith owned(sys.argv[1]): print('has it', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match="name = .*out: process .* has been preparing a data set there since .*--name"):
        run(files, tmp_path / "out", tokenizer="byte")
    other.communicate(b"\n")
    run(files, tmp_path / "out", tokenizer="byte")


def test_a_file_that_changes_while_it_is_read_leaves_no_finished_shard(files, in_process, tmp_path, monkeypatch):
    real, path = documents.read, files / "b.jsonl"

    def read(*arguments):
        yield from real(*arguments)
        rewrite(path, "ghost", "guest")

    with monkeypatch.context() as patch:
        patch.setattr(documents, "read", read)
        with pytest.raises(UserError, match="b.jsonl was changed while it was read: run again"):
            run(files, tmp_path / "out", tokenizer="byte")
    run(files, tmp_path / "out", tokenizer="byte")
    run(files, tmp_path / "fresh", tokenizer="byte")
    assert same(tmp_path / "out", tmp_path / "fresh")


def write_rows(path, texts):
    """Writes a table with the texts in the column `body`, in the format of the path's suffix."""
    rows = [{"id": str(i), "body": text} for i, text in enumerate(texts)]
    if path.suffix.lower() == ".parquet":
        parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "body": texts}), path, row_group_size=9)
    elif path.suffix.lower() == ".jsonl":
        path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, rows[0], dialect="excel-tab" if path.suffix.lower() == ".tsv" else "excel")
            table.writeheader()
            table.writerows(rows)


@pytest.mark.parametrize("name", ["a.PARQUET", "a.JSONL", "a.CSV", "a.tsv"])
def test_rows_come_from_a_column_of_any_table(name, in_process, tmp_path):
    texts = make_documents(80, 5) + ['a "quoted", one\nin two\tlines', "x" * 200_000]
    write_rows(tmp_path / name, texts)
    data = run(tmp_path / name, tmp_path / "out", column="body")
    tokenizer = tokenizers.load(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.kind == "char" and set(tokenizer.characters) == set("".join(texts)) | {"\n"}
    found = [tokenizer.decode(data.splits[split][0:len(data.splits[split])].tolist()) for split in ("train", "val")]
    expected = "".join(text + "\n" * (1 + ("\n" in text)) for text in texts)
    assert sorted("".join(found)) == sorted(expected) and texts[-2] in "".join(found)


def test_unusable_documents_give_the_reason(in_process, tmp_path, monkeypatch):
    def check(message, tokenizer="byte", **files):
        folder = tmp_path / f"source{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_bytes(content)
        with pytest.raises(UserError, match=message):
            run(folder, folder / "out", tokenizer=tokenizer, processes=1)
        assert not (folder / "out" / "meta.json").exists()

    write_parquet(tmp_path / "good.parquet", make_documents(30, 0))
    good = (tmp_path / "good.parquet").read_bytes()
    parquet.write_table(pyarrow.table({"content": ["x"], "id": [1]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    check("a.parquet: no column is named text, only content, id", a_parquet=(tmp_path / "other.parquet").read_bytes())
    check("row 1: 1 is not valid text", a_parquet=(tmp_path / "numbers.parquet").read_bytes())
    check("is not a complete parquet file", a_parquet=good[:-50])
    check("a.jsonl, line 2: no column is named text, only txt", a_jsonl=b'{"text": "x"}\n{"txt": "y"}')
    check("a.jsonl, line 1: .* is not valid text", a_jsonl=b'{"text": "x \\ud800"}')
    check("a.jsonl, line 1: is not a JSON object: 'list'; write one per line", a_jsonl=b'["text"]')
    check("a.csv: several columns are named b: rename", a_csv=b"text,b,b,,\na,b,c,,")
    for depth in (500, 200_000):
        check("line 1: .*(is not valid text|recursion)", a_jsonl=b'{"text": %s}' % (b"[" * depth + b"]" * depth))
    check("a.csv, line 2: has 3 fields, but the first line names 2: put double quotes", a_csv=b"text,b\na,b,c")
    check("a.csv, the row that begins in line 4: has a double quote that is not closed, .*unexpected end",
          a_csv=b'text,b\nc,d\n\n"a,b\ne,f')
    check("a.csv: is not a table in UTF-8 .* byte 0xff .* lines before that: 0.: convert it, .*iconv",
          a_csv=b"text,b\n\xff,c")
    check("a.jsonl is UTF-16, .*: run iconv", a_jsonl='{"text": "x"}'.encode("utf-16"))
    check("no column is named text, only a, b: choose one", a_tsv=b"a\tb\nc\td")
    check("no column is named text, only a, b: choose one", a_csv=b"\n\na, b \nc,d")
    check("has 1 documents, of which none is for", a_jsonl=b'{"text": "x"}')
    with pytest.raises(UserError, match=r"'.*caf.udce9.jsonl': this path is not UTF-8; rename"):
        documents.local_source("", [tmp_path / "caf\udce9.jsonl"])
    check("there are documents .*a.parquet. and texts .*b.txt.: choose one kind", a_parquet=good, b_txt=b"words")
    with pytest.raises(UserError, match="make it first with python prepare.py openwebtext"):
        known.ensure("openwebtext")
    with pytest.raises(UserError, match="fineweb always has tokenizer = gpt2: add --name=NEW"):
        prepare.main(prepare.Settings(tokenizer="byte"), ["fineweb"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    check("parquet files need pyarrow: pip install pyarrow", a_parquet=good)


@pytest.fixture
def hub(corpus, tmp_path):
    """A server that answers like the Hugging Face Hub, with the corpus' parquet files: (address, requests).

    requests: a list of (path, names of the parquet files in tmp_path at that moment)."""
    files, requests = {f"sample/10BT/{path.name}": path.read_bytes() for path in corpus[0].rglob("*.parquet")}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            path = urllib.parse.unquote(self.path.partition("?")[0])
            requests.append((path, [file.name for file in tmp_path.rglob("*.parquet")]))
            name = path.partition("/resolve/")[2].partition("/")[2]
            if "/tree/" in path:
                content = json.dumps([dict(type="file", oid="0" * 40, size=len(content), path=name)
                                      for name, content in files.items()]).encode()
            else:
                content = files.get(name, b"")
            self.send_response(200 if content else 404)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "9" * 40)
            self.send_header("Content-Type", "application/json" if "/tree/" in path else "application/octet-stream")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def test_files_are_downloaded_from_the_hub_and_deleted_after_use(hub, corpus, in_process, tmp_path, monkeypatch):
    address, requests = hub
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (("ENDPOINT", address), ("HUGGINGFACE_CO_URL_TEMPLATE", template), ("HF_HUB_OFFLINE", False),
                        ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)

    def prepare_web(max_files):
        prepare.main(prepare.Settings(name=str(tmp_path / "web"), tokenizer="byte", max_files=max_files), ["fineweb"])
        return json.loads((tmp_path / "web" / "meta.json").read_text())

    assert prepare_web(1)["documents"] == 301
    for finished in (tmp_path / "web").glob("shard_*.json"):
        finished.unlink()
    meta, commit = prepare_web(0), known.CORPORA["fineweb"][2]
    assert meta["source"] == "HuggingFaceFW/fineweb" and meta["revision"] == commit and meta["documents"] == 311
    assert all(f"/{commit}/" in path for path, _ in requests if "fineweb" in path)
    second = [there for path, there in requests if path.endswith("1.parquet")]
    assert second and not any("0.parquet" in there for there in second)  # deleted before the next came
    assert not (tmp_path / "web" / "download").exists()
    local = run(corpus[0] / "a", tmp_path / "local", tokenizer="byte")
    ids = np.concatenate([np.fromfile(path, np.uint16) for path in sorted((tmp_path / "web").glob("train_*.bin"))])
    assert np.array_equal(ids, local.splits["train"][0:len(ids)])
