"""The live page: what the server refuses, that it writes what sample.py writes, tabs, saves, Ctrl-C, and a browser."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import browser
import pytest
from conftest import settings_for

import look
import prepare
import sample
import train
from configurator import UserError, joined, parse
from inside import live
from sources import texts
from tasks import TASKS
from tasks.task import Task

ROOT = Path(look.__file__).parent
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">&lt;b&gt;\u202e"
needs_browser = pytest.mark.skipif(not browser.PATH, reason=browser.WHY)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(live, "SECONDS", 0.02)


@contextlib.contextmanager
def served(out_dir, task="text", **values):
    """The Server of a run, which answers in threads of its own."""
    cls = joined(look.Settings, TASKS[task].sampling)
    settings = cls(**{"out_dir": str(out_dir), "device": "cpu", "live": True, "port": 0, **values})
    with live.Server(settings, lambda which: look.open_model(settings, which)) as server:
        server.load_or_wait()
        threads = [threading.Thread(target=server.serve_forever, args=(0.02,)), threading.Thread(target=server.watch)]
        for thread in threads:
            thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            for thread in threads:
                thread.join()


@pytest.fixture(scope="module")
def server(trained):
    with served(trained) as found:
        yield found


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory, text, tiny):
    """A run of a model that reads any text, byte by byte; it has learned nothing."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "words.txt").write_text(text, encoding="utf-8")
    texts.prepare([folder / "words.txt"], folder / "data", "byte")
    values = {**tiny, "max_iters": 2, "eval_interval": 2, "sample_tokens": 0, "dataset": str(folder / "data"),
              "block_size": 128}
    train.main(settings_for("text", **values, out_dir=str(folder / "run")), {})
    return folder / "run"


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """A run that has learned a little to repeat what it is told."""
    folder, names = tmp_path_factory.mktemp("talks"), ["alpha", "beta", "gamma", "delta"]
    rows = [[{"role": "user", "content": f"{a} {b}"}, {"role": "assistant", "content": f"{a} {b}"}]
            for a in names for b in names]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    settings, given = parse(prepare.Settings, [f"--name={folder / 'data'}", "--val_fraction=0.2"])
    prepare.main(settings, [str(folder / "talks.jsonl")], given)
    train.main(settings_for("chat", dataset=str(folder / "data"), out_dir=str(folder / "run"), n_layer=1, n_embd=32,
                            batch_size=4, max_iters=60, eval_interval=60, sample_tokens=0, device="cpu"), {})
    return folder / "run"


# ----------------------------------------------------------------------------------------------------------------------
# Asking

def ask(server, path, body=None, headers=(), method=None):
    """(status, text) of an answer. body: a value to send as JSON, or bytes."""
    with asking(server, path, body, headers, method) as response:
        return response.status, response.read().decode()


@contextlib.contextmanager
def asking(server, path, body=None, headers=(), method=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {**({"Content-Type": "application/json"} if data is not None else {}), **dict(headers)}
    connection.request(method or ("GET" if data is None else "POST"), path, data,
                       {name: value for name, value in headers.items() if value is not None})
    try:
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def written(server, **body):
    """(the text, the lines) of a POST /write."""
    status, text = ask(server, "/write", body)
    assert status == 200, text
    lines = [json.loads(line) for line in text.splitlines()]
    return "".join(line.get("text", "") for line in lines), lines


def state(server, since=0):
    status, text = ask(server, f"/run?since={since}")
    assert status == 200
    return json.loads(text)


def by_sample(run, capsys, task="text", **values):
    """What sample.py prints."""
    capsys.readouterr()
    sample.main(settings_for(task, "sampling", out_dir=str(run), device="cpu", **values))
    return capsys.readouterr().out.removesuffix("\n")


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals

@pytest.mark.parametrize("path, body, headers, status, line", [
    ("/write", b"{", {}, 400, "is not JSON"),
    ("/write", b"\xff", {}, 400, "is not JSON"),
    ("/write", b"[" * 100_000, {}, 400, "is not JSON"),
    ("/write", b'{"temperature": NaN}', {}, 400, "is not JSON"),
    ("/write", b"[]", {}, 400, "must be a JSON object"),
    ("/write", b'{"prompt": "the"}', {"Content-Type": "text/plain"}, 400, "must be application/json"),
    ("/write", b'{"prompt": "the"}', {"Content-Type": None}, 400, "must be application/json"),
    ("/write", {"promt": "the"}, {}, 400, "unknown name 'promt'"),
    ("/write", {"out_dir": "/etc"}, {}, 400, "unknown name 'out_dir'"),
    ("/write", {"image": "/etc/passwd"}, {}, 400, "unknown name 'image': this model takes prompt, model, temperature"),
    ("/write", {"prompt": 7}, {}, 400, "prompt: must be a text"),
    ("/write", {"prompt": "the \ud800"}, {}, 400, "has '\\ud800', which is no character"),
    ("/write", {"prompt": "\x1b[2J"}, {}, 400, "has '\\x1b', which is no character"),
    ("/write", {"prompt": "the<script>"}, {}, 400, "prompt: "),
    ("/write", {"messages": []}, {}, 400, "does not chat"),
    ("/write", {"temperature": "hot"}, {}, 400, "temperature must be a number"),
    ("/write", {"temperature": True}, {}, 400, "temperature must be a number"),
    ("/write", {"temperature": -1}, {}, 400, "temperature = -1.0: must be at least 0"),
    ("/write", {"temperature": 0, "top_k": 3}, {}, 400, "always takes the likeliest token"),
    ("/write", {"top_p": 1.5}, {}, 400, "top_p = 1.5: must be above 0"),
    ("/write", {"max_new_tokens": 10**6}, {}, 400, "must be at most 100,000"),
    ("/write", {"seed": 2**70}, {}, 400, "below 2^63"),
    ("/write", {"model": "1a2b3c4d-1"}, {}, 400, "no longer loaded"),  # of another start
    ("/inside", {"model": "1a2b3c4d-1"}, {}, 400, "no longer loaded"),
    ("/write", {"model": 1}, {}, 400, "model: must be a name"),
    ("/inside", {"prompt": "the<script>"}, {}, 400, "prompt: "),
    ("/write", b"x" * 300_000, {}, 400, "at most 262,144 are taken"),
    ("/write", b"x" * 5_000_000, {}, 400, "at most 262,144 are taken"),
    ("/write", {"prompt": "the"}, {"Content-Length": "-1"}, 400, "needs a Content-Length"),
    ("/write", {"prompt": "the"}, {"Transfer-Encoding": "chunked", "Content-Length": "20"}, 400, "Content-Length"),
    ("/write", {"prompt": "the"}, {"Origin": "http://evil.example"}, 403, "Origin: http://evil.example is another"),
    ("/write", {"prompt": "the"}, {"Origin": "null"}, 403, "Origin: null"),
    ("/write", {"prompt": "the"}, {"Host": "evil.example"}, 403, "Host: evil.example is not a name"),
    ("/run", None, {"Host": "evil.example"}, 403, "Host: evil.example is not a name"),
    ("/", None, {"Host": "127.0.0.1.evil.example"}, 403, "is not a name"),
    ("/run?since=-1", None, {}, 400, "since = '-1': must be a step"),
    ("/../run.json", None, {}, 404, "there is nothing at"),
    ("/live.py", None, {}, 404, "there is nothing at"),
    ("/%2e%2e/etc/passwd", None, {}, 404, "there is nothing at"),
    ("/write", None, {}, 404, "there is nothing at GET /write"),
    ("/run", {}, {}, 404, "there is nothing at POST /run"),
])
def test_what_can_not_be_answered_gets_a_status_and_a_line(server, path, body, headers, status, line, capfd):
    found, text = ask(server, path, body, headers)
    assert found == status and line in json.loads(text)["error"] and "\n" not in json.loads(text)["error"]
    assert json.loads(text).keys() == {"error"} and not capfd.readouterr().err


def test_other_methods_and_what_is_no_http_get_a_line_too(server, capfd):
    assert "Unsupported method" in json.loads(ask(server, "/write", method="OPTIONS")[1])["error"]
    for sent, line in ((b"\x16\x03\x01 hello\r\n\r\n", b"error"),
                       (b"GET http://[ HTTP/1.1\r\n\r\n", b"one Host"),
                       (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"nothing at GET http://["),
                       (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"one Host")):
        with socket.create_connection(("127.0.0.1", server.server_port), 5) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            assert line in b"".join(iter(lambda: raw.recv(2000), b""))
    assert not capfd.readouterr().err


def test_who_listens_to_others_is_known_by_numbers_and_by_its_own_names_only():
    assert all(live.is_ours(name, "127.0.0.1") for name in ("127.0.0.1:80", "localhost", "[::1]:9", "LOCALHOST"))
    assert not any(live.is_ours(name, "127.0.0.1") for name in (
        "evil.example", "192.168.1.7:80", "localhost.evil.example", "localhost@evil.example", "127.0.0.1/@evil.example",
        "", "a b", socket.gethostname() + ".", "[::1", "evil.example#localhost"))
    assert all(live.is_ours(name, "0.0.0.0") for name in ("192.168.1.7:8000", "localhost:8000", socket.gethostname()))
    assert not live.is_ours("evil.example", "0.0.0.0") and live.is_ours("quill.example:80", "quill.example")


def test_a_port_that_is_taken_or_an_address_that_is_not_here_is_refused_with_the_remedy(server, trained):
    port = server.server_port
    taken = rf"port = {port}: can't be opened on 127.0.0.1: .*; name another, such as --port={port + 1}, "
    for values, line in (({"port": port}, taken),
                         ({"port": 70_000}, r"port = 70000: .* must be 0-65535.*; name another"),
                         ({"host": "203.0.113.9"}, "host = 203.0.113.9: .*; leave it out for this machine alone"),
                         ({"host": "nowhere.invalid"}, "host = nowhere.invalid: .*; leave it out")):
        with pytest.raises(UserError, match=line):
            with served(trained, **values):
                pass


# ----------------------------------------------------------------------------------------------------------------------
# Writing

@pytest.mark.parametrize("values", [{}, {"temperature": 1.3, "top_p": 0.7, "top_k": 9, "seed": 5}, {"temperature": 0}])
def test_it_writes_what_sample_py_writes_and_looks_into_that(server, trained, values, capsys):
    values = {"prompt": "the king", "max_new_tokens": 20, **values}  # a record is of at most 32 tokens
    assert written(server, **values | {"max_new_tokens": 99})[0] == by_sample(
        trained, capsys, **values | {"max_new_tokens": 99})
    text, lines = written(server, **values)
    assert text == by_sample(trained, capsys, **values)
    assert len(lines) > 20 and "text" in lines[1] and lines[-1] == {"done": True}  # it came in pieces
    status, record = ask(server, "/inside", {**values, "model": lines[0]["model"]})
    record = json.loads(record)
    assert status == 200 and "".join(record["tokens"]) == text and record["written"] == len("the king")


def test_what_a_request_leaves_out_has_its_default_whatever_the_page_began_with(trained, capsys):
    with served(trained, seed=7, top_k=5, max_new_tokens=9) as server:
        assert state(server)["model"]["inputs"] == {"temperature": 0.8, "top_p": 1.0, "top_k": 5, "max_new_tokens": 9,
                                                    "seed": 7}
        greedy = {"prompt": "the", "temperature": 0}
        assert written(server, **greedy)[0] == by_sample(trained, capsys, **greedy)


def test_the_first_length_leaves_room_for_the_prompt_in_the_window(trained):
    for values, length in (({}, 24), ({"max_new_tokens": 99}, 99)):  # block_size is 32; what was set stays
        with served(trained, **values) as server:
            assert state(server)["model"]["inputs"]["max_new_tokens"] == length


@pytest.mark.parametrize("kind", ["text", "no inside", "no blocks"])
def test_a_model_that_can_not_be_looked_into_is_told(trained, kind, monkeypatch):
    with served(trained) as server:
        if kind == "no inside":
            monkeypatch.setattr(type(server.loaded.task), "inside", Task.inside)
        elif kind == "no blocks":
            monkeypatch.setattr(live, "all_blocks", lambda model: [])
        assert state(server)["model"]["looks"] == (kind == "text")


def test_a_closed_tab_ends_its_text_and_the_next_one_writes(server, capfd):
    with asking(server, "/write", {"prompt": "the", "max_new_tokens": 100_000}) as response:
        assert [json.loads(response.readline()) for _ in range(3)][1]["text"] == "the"
        assert server.turn.locked()
    began = time.monotonic()
    assert written(server, prompt="the", max_new_tokens=5)[0].startswith("the")
    assert time.monotonic() - began < 5 and not capfd.readouterr().err  # 100,000 tokens take a minute


def test_a_tab_that_does_not_wait_for_its_turn_is_forgotten(server):
    with server.turn:
        with pytest.raises(TimeoutError):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=0.3)
            connection.request("POST", "/write", b'{"max_new_tokens": 9}', {"Content-Type": "application/json"})
            connection.getresponse()
        connection.close()
        until(lambda: not any("process_request_thread" in thread.name for thread in threading.enumerate()))


def test_two_tabs_write_what_each_would_write_alone(server, trained, capsys):
    jobs = [{"prompt": "the king", "seed": seed, "max_new_tokens": 300} for seed in range(4)]
    found = {}
    threads = [threading.Thread(target=lambda job=job: found.update({job["seed"]: written(server, **job)[0]}))
               for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {job["seed"]: by_sample(trained, capsys, **job) for job in jobs}


def test_it_chats_and_forgets_the_oldest_turns_and_looks_inside(chat_run, capsys):
    with served(chat_run, "chat") as server:
        assert state(server)["model"]["chats"]
        text, lines = written(server, prompt="alpha beta", temperature=0)
        assert text == by_sample(chat_run, capsys, "chat", prompt="alpha beta", temperature=0)
        first = [{"role": "user", "content": "alpha beta"}]
        assert written(server, messages=first, temperature=0)[1] == lines
        assert lines[-1]["done"] and "<|" not in lines[-1]["answer"] and not lines[-1]["forgotten"]
        talk = [*first, {"role": "assistant", "content": "alpha beta"}] * 20 + first
        assert written(server, messages=talk, temperature=0)[1][-1]["forgotten"]
        record = json.loads(ask(server, "/inside", {"messages": talk, "temperature": 0})[1])
        assert record["kind"] == "chat" and record["tokens"][0] == "<|user|>"
        for bad, line in ((talk[:-1], "the last one must be the user's"), (talk[1:], "must take turns"),
                          ([{"role": "root", "content": ""}], "role 'root' is unknown"), ("x", "must be a list"),
                          ([{"role": "user", "content": "\x1b"}], "no character of a text")):
            status, answer = ask(server, "/write", {"messages": bad})
            assert status == 400 and line in json.loads(answer)["error"]


def test_a_picture_is_taken_as_base64_within_limits(monkeypatch):
    from PIL import Image
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "png")
    for text in (base64.b64encode(file.getvalue()).decode(),) * 2:
        found = live.picture(f"data:image/png;base64,{text}")
        assert Image.open(found).size == (30, 20) and f"{found}" == "the picture"
    monkeypatch.setattr(live, "IMAGE_PIXELS", 599)
    for bad, line in ((text, "30 x 20 pixels, and at most 599"), ("/etc/passwd", "not base64"), ("?", "not base64"),
                      ("", "choose a file"), (None, "choose a file"),
                      (base64.b64encode(b"<svg/>").decode(), "no picture")):
        with pytest.raises(UserError, match=line):
            live.picture(bad)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_and_silently_while_it_writes(trained):
    command = [sys.executable, ROOT / "look.py", "--live", f"--out_dir={trained}", "--port=0", "--device=cpu"]
    environment = {**os.environ, "QUILL_COMPILER": ""}  # PyTorch's threads, unlike C's, crash if Python ends first
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    port = int(re.match(r"http://127.0.0.1:(\d+)/", process.stdout.readline())[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/write", b'{"max_new_tokens": 100000}', {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert "model" in json.loads(response.readline()) and "text" in json.loads(response.readline())
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # an impatient user
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "") and time.monotonic() - began < 3
    connection.close()


# ----------------------------------------------------------------------------------------------------------------------
# While it learns

def test_a_run_is_followed_from_before_its_first_save_to_its_end(tiny, tmp_path, capsys):
    """The run trains in this thread. Another one looks at it all the while, as a page does."""
    out, seen = tmp_path / "run", []
    out.mkdir()
    (out / "run.lock").touch()
    with served(out) as server:
        assert f"{out} has no checkpoint yet: waiting for the run's first save" in capsys.readouterr().err
        first = state(server)
        assert first["model"] is None and first["rows"] == [] and first["sample"] is None and first["follows"]
        assert "the run has not saved yet" in json.loads(ask(server, "/write", {"prompt": "the"})[1])["error"]
        over = threading.Event()

        def look_on():
            while not over.wait(0.03):
                seen.append(state(server, max([0, *(row["step"] for found in seen for row in found["rows"])])))

        looking = threading.Thread(target=look_on)
        looking.start()
        train.main(settings_for("text", **{**tiny, "max_iters": 120, "eval_interval": 20}, out_dir=str(out)), {})
        files = sorted(path.name for path in out.iterdir())
        until(lambda: not state(server)["learning"] and server.newest()[1] == server.mark)
        over.set()
        looking.join()
        shown = [each["model"]["step"] for each in seen if each["model"] and each["learning"]]
        assert len(set(shown)) >= 3 and shown == sorted(shown)  # it was loaded anew as the run saved
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        rows = [row for each in seen for row in each["rows"]]
        assert [row["step"] for row in rows] == [row["step"] for row in log]  # each row once
        assert [row.get("val_loss") for row in rows] == [row.get("val_loss") for row in log]
        end = state(server, 120)
        best = json.loads((out / "best" / "config.json").read_text())["step"]
        assert end["model"]["step"] == best and end["rows"] == [] and end["max_iters"] == 120
        assert end["sample"]["text"] in (out / "samples.md").read_text() and "the end" in end["sample"]["heading"]
        assert written(server, prompt="the", max_new_tokens=40)[0] == by_sample(
            out, capsys, prompt="the", max_new_tokens=40)
        assert sorted(path.name for path in out.iterdir()) == files  # nothing was left in the run's folder


def test_the_newest_save_is_last_while_the_run_goes_on_and_then_the_best(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    record = json.loads((run / "run.json").read_text())
    ended = record["starts"][-1].pop("ended")
    (run / "run.json").write_text(json.dumps(record))
    with served(run) as server:
        assert server.loaded.name == str(run / "last") and state(server)["learning"]
        record["starts"][-1]["ended"] = ended
        (run / "run.json").write_text(json.dumps(record))
        until(lambda: state(server)["model"]["name"] == str(run / "best"))
        assert not state(server)["learning"]


def test_a_text_goes_on_with_the_model_that_began_it(trained, bytes_run, tmp_path, capsys):
    """A save comes while a text is being written: the text is that of the old model, and the next one of the new."""
    run, gate = tmp_path / "run", threading.Event()
    shutil.copytree(Path(trained) / "best", run / "best")
    with served(run) as server:
        old = server.loaded
        sampled = old.task.sample

        def slow(*arguments):
            for piece in sampled(*arguments):
                yield piece
                gate.wait(10)

        old.task.sample = slow
        with asking(server, "/write", {"prompt": "the", "max_new_tokens": 30}) as response:
            lines = [json.loads(response.readline()) for _ in range(2)]
            shutil.copytree(bytes_run / "best", run / "best.new")
            os.rename(run / "best", run / "best.old")
            os.rename(run / "best.new", run / "best")
            until(lambda: state(server)["model"]["number"] == 2)
            gate.set()
            lines += [json.loads(line) for line in response.read().splitlines()]
        text = "".join(line.get("text", "") for line in lines)
        assert lines[-1] == {"done": True} and text == by_sample(trained, capsys, prompt="the", max_new_tokens=30)
        first = lines[0]["model"]
        record = json.loads(ask(server, "/inside", {"prompt": "the", "max_new_tokens": 30, "model": first})[1])
        assert "".join(record["tokens"]) == text[-33:-1] and "step 40" in record["title"]
        new, lines = written(server, prompt="the", max_new_tokens=30)
        assert lines[0] == {"model": f"{server.start}-2", "step": 2}
        assert new == by_sample(run, capsys, prompt="the", max_new_tokens=30)
        error = json.loads(ask(server, "/inside", {"prompt": "the", "model": first})[1])["error"]
        assert "no longer loaded" in error


def test_a_damaged_save_is_said_and_the_old_model_stays(trained, tmp_path, capsys):
    shutil.copytree(Path(trained) / "best", tmp_path / "run" / "best")
    with served(tmp_path / "run") as server:
        weights = tmp_path / "run" / "best" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        os.utime(tmp_path / "run" / "best" / "config.json")
        said = []
        until(lambda: said.append(capsys.readouterr().err) or "the new save can't be loaded" in "".join(said))
        assert "model.safetensors is damaged" in "".join(said) and "is damaged" in state(server)["error"]
        assert state(server)["model"]["number"] == 1 and written(server, prompt="the", max_new_tokens=3)[0]


def test_a_log_that_another_run_wrote_over_does_not_mix_with_the_old_one(tmp_path):
    log = live.Rows(tmp_path / "log.jsonl")
    for loss in (1.5, 2.5):
        for end in (3, 9):  # the second log is as long as the first one before it is read, in the same file
            (tmp_path / "log.jsonl").write_text("".join(f'{{"step": {i}, "loss": {loss}}}\n' for i in range(end)))
            assert [(row["step"], row["loss"]) for row in log.read()] == [(i, loss) for i in range(end)]


def test_the_newest_sample_is_the_last_section_whatever_the_texts_are(tmp_path):
    tricky = "## step 9, no heading\n\n```\ninner\n```\n"
    first = "## step 1, loss 2\n\n```\na\n```\n\n"
    (tmp_path / "samples.md").write_text(f"{first}## step 2, loss 1\n\n````\n{tricky}\n````\n\n")
    assert live.newest_sample(tmp_path / "samples.md") == {"heading": "step 2, loss 1", "text": tricky}
    assert live.newest_sample(tmp_path / "none.md") is None


def test_a_long_log_is_thinned_but_keeps_evaluations_and_its_end():
    rows = [{"step": i, "loss": 1.0, **({"val_loss": 2.0} if i % 997 == 0 else {})} for i in range(1, 60_001)]
    kept = live.thinned(rows)
    assert len(kept) < 2 * live.ROWS and kept[-1] is rows[-1]
    assert sum("val_loss" in row for row in kept) == 60_000 // 997


def test_rows_with_nan_or_infinity_stay_and_those_without_a_step_do_not(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": NaN, "loss": 1}\n{"step": 1.5, "loss": 1}\n{"loss": 1}\n[]\n'
                                        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1e400}\n'
                                        '{"step": 3, "loss": null, "val_loss": 2}\n')
    assert [row["step"] for row in live.Rows(tmp_path / "log.jsonl").read()] == [1, 2, 3]


# ----------------------------------------------------------------------------------------------------------------------
# In a browser

@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


def fill(tab, selector, text):
    """Puts a text into a field as a user's paste does."""
    tab.run(f"document.querySelector('{selector}').focus()")
    tab.run(f"document.querySelector('{selector}').select?.()")
    tab.ask("Input.insertText", text=text)


def press_ctrl_enter(tab):
    for kind in ("keyDown", "keyUp"):
        tab.ask("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=2)


READY = "!document.querySelector('#prompt').disabled"
ERROR = "document.querySelector('#live .asked.error').textContent"
IDLE = "!document.querySelector('.main').disabled"


@needs_browser
def test_a_prompt_is_typed_and_its_text_is_looked_into_and_hostile_ones_stay_text(chromium, bytes_run, capsys):
    with served(bytes_run, max_new_tokens=20) as server:
        tab = chromium.open(server.address)
        tab.until(READY)
        fill(tab, "#prompt", HOSTILE)
        press_ctrl_enter(tab)
        tab.until("!document.querySelector('#page').hidden")
        shown = tab.run("document.querySelector('#live .written').textContent")
        assert shown == by_sample(bytes_run, capsys, prompt=HOSTILE, max_new_tokens=20)
        assert tab.run("document.querySelector('#live .given').textContent") == HOSTILE
        assert tab.run("getComputedStyle(document.querySelector('#live .given')).unicodeBidi") == "isolate"  # U+202E
        tab.click("#text .token:nth-child(2)")
        assert tab.run("document.querySelector('#text [aria-selected=true]').textContent")
        assert tab.run("document.title") != "broken" and tab.run("document.querySelector('img[src=x]') === null")
        assert not tab.problems
        assert {url.removeprefix(server.address).split("?")[0] for url in tab.requests
                if not url.startswith("data:")} == {"", "run", "write", "inside"}


@needs_browser
def test_stop_ends_a_text_and_what_came_of_it_is_looked_into(chromium, trained):
    with served(trained, max_new_tokens=100_000) as server:
        tab = chromium.open(server.address, width=390, dark=True)
        tab.until(READY)
        fill(tab, "#prompt", "the")
        press_ctrl_enter(tab)
        tab.until("document.querySelector('#live .written').textContent.length > 50")
        tab.press("Escape")
        tab.until(IDLE)
        until(lambda: not server.turn.locked(), 2)
        tab.until("!document.querySelector('#page').hidden")
        text = tab.run("document.querySelector('#live .written').textContent")
        assert tab.run("state.record.tokens.join('')") == text[-33:-1]
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_an_error_is_shown_as_text_and_greedy_writing_disables_what_it_ignores(chromium, server):
    tab = chromium.open(server.address)
    tab.until(READY)
    fill(tab, "#prompt", HOSTILE)
    press_ctrl_enter(tab)
    tab.until("document.querySelector('#live .asked.error').textContent")
    assert "prompt: " in tab.run("document.querySelector('#live .asked.error').textContent")
    assert tab.run("document.querySelector('img[src=x]') === null")
    tab.run("temperature.value = 0, temperature.dispatchEvent(new Event('input'))")
    assert tab.run("top_p.disabled && top_k.disabled && seed.disabled && !temperature.disabled")
    for wrong in ("", "0", "1.5", "200000"):
        tab.run(f"max_new_tokens.value = '{wrong}'")
        fill(tab, "#prompt", "the")
        press_ctrl_enter(tab)
        assert tab.run(ERROR) == "Length: must be a whole number from 1 to 100000"
    tab.run("max_new_tokens.value = 200")
    fill(tab, "#prompt", "the")
    press_ctrl_enter(tab)
    tab.until(f"{IDLE} && document.querySelector('#live .written').textContent.length > 50")
    assert not tab.run("document.querySelector('#live .asked.error').textContent")


@needs_browser
def test_a_dialogue_has_bubbles_and_a_fresh_start(chromium, chat_run):
    with served(chat_run, "chat", max_new_tokens=30) as server:
        tab = chromium.open(server.address)
        tab.until(READY)
        for count in (1, 2):
            fill(tab, "#prompt", "alpha beta")
            tab.press("Enter")
            tab.until(f"{IDLE} && document.querySelectorAll('.bubble').length === {2 * count}")
        assert tab.run("document.querySelector('.bubble.user').textContent") == "alpha beta"
        tab.until("!document.querySelector('#page').hidden")
        tab.run("[...document.querySelectorAll('button')].find(each => each.textContent === 'Reset').click()")
        assert tab.run("document.querySelectorAll('.bubble').length") == 0


@pytest.mark.slow
@needs_browser
def test_the_curves_grow_with_the_run(chromium, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    record = json.loads((run / "run.json").read_text())
    del record["starts"][-1]["ended"]
    (run / "run.json").write_text(json.dumps(record))
    (run / "log.jsonl").write_text("".join(log[:4]))
    points = "document.querySelectorAll('.training circle').length"
    with served(run) as server:
        tab = chromium.open(server.address)
        tab.until(f"{points} === 4")
        assert tab.run("document.querySelector('details').open")
        with open(run / "log.jsonl", "a") as file:
            file.write("".join(log[4:-1]) + log[-1][:20])  # a line is half written
        tab.until(f"{points} === {len(log) - 1}")
        with open(run / "log.jsonl", "a") as file:
            file.write(log[-1][20:])
        tab.until(f"{points} === {len(log)}")
        assert "step 40 of 40" in tab.text("summary") and not tab.problems


@needs_browser
def test_a_model_and_a_log_with_nan_are_told_as_such(chromium, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 41, "loss": NaN, "val_loss": 1e400}\n{"step": 42, "loss": null}\n')
    with served(run, max_new_tokens=20) as server:
        server.loaded.model.transformer.ln_f.weight.data.fill_(float("nan"))
        tab = chromium.open(server.address)
        tab.until(READY)
        assert "step 42 of 40" in tab.text("summary") and "training NaN or infinite" in tab.text("summary")
        fill(tab, "#prompt", "the")
        press_ctrl_enter(tab)
        tab.until(ERROR)
        assert "the model computes NaN or infinity" in tab.run(ERROR)
        status, text = ask(server, "/inside", {"prompt": "the"})
        assert status == 400 and "the model computes NaN or infinity" in json.loads(text)["error"]
        tab.run("window.show = () => null.x")
        server.loaded.model.transformer.ln_f.weight.data.fill_(1)
        press_ctrl_enter(tab)
        tab.until(f"{ERROR}.includes('a bug of this page: TypeError')")


@pytest.mark.slow
@needs_browser
def test_a_tab_fits_itself_to_another_model_at_the_same_address(chromium, trained, chat_run):
    with served(trained, seed=7) as server:
        tab = chromium.open(server.address)
        tab.until(READY)
        fill(tab, "#prompt", "the king")
        port = server.server_port
    with served(chat_run, "chat", port=port):
        tab.until("document.querySelector('.main').textContent === 'Send'")
        assert tab.run("seed.value") == "1337"
        assert tab.run("document.querySelector('#prompt').value") == "the king"
        assert tab.run("document.querySelectorAll('#live #seed').length") == 1
        tab.until(f"!{ERROR}")


@pytest.mark.slow
@needs_browser
def test_a_save_that_can_not_be_loaded_is_told_on_the_page(chromium, trained, tmp_path):
    config = tmp_path / "run" / "best" / "config.json"
    shutil.copytree(Path(trained) / "best", config.parent)
    right = config.read_bytes()
    with served(tmp_path / "run") as server:
        tab = chromium.open(server.address)
        tab.until(READY)
        config.write_bytes(b"<")
        tab.until("document.querySelector('#live .error').textContent.includes(\"the new save can't be loaded\")")
        config.write_bytes(right)
        tab.until("!document.querySelector('#live .error').textContent")


@needs_browser
def test_a_model_that_can_not_be_looked_into_is_not_asked_to(chromium, trained, monkeypatch):
    monkeypatch.setattr(live, "all_blocks", lambda model: [])
    with served(trained, max_new_tokens=9) as server:
        tab = chromium.open(server.address)
        tab.until(READY)
        fill(tab, "#prompt", "the")
        press_ctrl_enter(tab)
        tab.until(f"{IDLE} && document.querySelector('#live .written').textContent.length > 9")
        button = "[...document.querySelectorAll('#live button')].find(each => each.textContent === 'Look inside')"
        assert tab.run(f"{button}.hidden") and not tab.run(ERROR)
        assert not any(url.endswith("/inside") for url in tab.requests)


@pytest.mark.slow
@needs_browser
def test_a_tab_that_waits_for_another_one_says_so(chromium, trained):
    with served(trained, max_new_tokens=9) as server:
        tab = chromium.open(server.address)
        tab.until(READY)
        with server.turn:
            fill(tab, "#prompt", "the")
            press_ctrl_enter(tab)
            tab.until("document.querySelector('#live .state').textContent.startsWith('another tab is writing')")
        tab.until(f"{IDLE} && document.querySelector('#live .written').textContent.length > 9")
