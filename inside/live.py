"""The live page: a small web server that writes with a model, looks inside it, and follows a run that is learning.

    python look.py --live --out_dir=out          then open the address that it prints; Ctrl-C ends it

One model writes for all tabs, and they take turns request by request. A closed tab, or its Stop button, ends its text
at the next token. On a run in progress the newest save is loaded as soon as it is complete; a text that is being
written goes on with the model that began it. The run's folder is only read.

The requests, all answered to this machine alone unless --host says otherwise:

    GET  /                   the page
    GET  /run?since=STEP     JSON: the model, its inputs, and of the run: rows of log.jsonl after STEP, newest sample,
                             and the error if its newest save can't be loaded
    POST /write              JSON in; lines of JSON out: "model", "text" for each piece of the text, and "done"
    POST /inside             the same JSON in; the record of that text (inside/record.py)

A POST has "prompt" or, for a chat model, "messages"; "image" (base64) for a model that sees; the settings in NAMES; and
for /inside the "model" that wrote. A refusal is a status from 400 on, and {"error": one line}.
"""

import base64
import binascii
import contextlib
import errno
import io
import ipaddress
import itertools
import json
import os
import re
import secrets
import select
import socket
import socketserver
import threading
import traceback
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import NoneType
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from chat import check_messages
from configurator import Layer, UserError, convert, flat_fields, say, users_fault
from inside.page import escaped, page, part
from model import all_blocks
from run import checkpoint
from run.cost import size_in_words
from run.files import read_json, to_json
from run.pictures import FORMATS

NAMES = ("temperature", "top_p", "top_k", "beam", "max_new_tokens", "top", "seed")  # settings that a request may have
MOST = {"max_new_tokens": 100_000, "beam": 64, "top": 1000}  # the largest values that the page may ask for
TEXT_BYTES = 2**18  # of a request
IMAGE_BYTES = 12 * 2**20  # of a request with an image: base64 of a file of 9 MB
IMAGE_PIXELS = 50_000_000
ROWS = 2000  # most rows of the log in one answer
SECONDS = 0.5  # between two looks at the run's checkpoints
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Content-Security-Policy": "frame-ancestors 'none'"}  # the page itself holds the rest of this policy


class Refusal(UserError):
    """An error of who sent a request, with its HTTP status."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


class Gone(Exception):
    """The browser has closed the connection: nobody reads the answer."""


def serve(settings, open_model):
    """Serves the live page until Ctrl-C. Raises UserError if the model can't be loaded or the port can't be opened.

    settings: look.py's, with `host`, `port` and the sampling settings of the task, which are the page's first values.
    open_model(which): returns (task, model, config) of the checkpoint `which`, best or last.
    """
    with Server(settings, open_model) as server:
        server.load_or_wait()
        print(f"{server.address}   (Ctrl-C ends it)", flush=True)
        threading.Thread(target=server.watch, daemon=True).start()
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            os._exit(130)  # Python's own end would crash threads that still compute


# ----------------------------------------------------------------------------------------------------------------------
# The model, and the run that it is from

class Loaded(NamedTuple):
    task: object
    model: object
    number: int  # 1, 2, ... in the order of loading
    step: int  # updates that it has learned from; None if unknown
    name: str  # the folder of its checkpoint, or the model's name


class Server(ThreadingHTTPServer):
    """The server with all that its requests share. See `serve`."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, settings, open_model):
        self.settings, self.open_model = settings, open_model
        self.turn = threading.Lock()  # held by the request that uses a model
        self.waiting = set()  # the requests that wait for it
        self.stopping = threading.Event()
        self.start = secrets.token_hex(4)  # a tab may have been opened on an earlier server at this address
        self.loaded, self.wrote, self.mark = None, None, None  # wrote: the Loaded of the newest text
        self.error = None  # why the newest save can't be loaded
        self.folder = Path(settings.out_dir)
        self.log = Rows(self.folder / "log.jsonl")
        self.follows = not (settings.init_from or (self.folder / "config.json").exists()
                            or checkpoint.is_checkpoint(self.folder))
        host, port = settings.host, settings.port
        try:
            self.address_family = socket.getaddrinfo(host, None)[0][0]
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            why = str(getattr(error, "strerror", None) or error).rstrip(".")
            if isinstance(error, socket.gaierror) or getattr(error, "errno", 0) == errno.EADDRNOTAVAIL:
                raise UserError(f"host = {host}: {why}; leave it out for this machine alone, or --host=0.0.0.0 for all"
                                " that can reach it") from None
            raise UserError(f"port = {port}: can't be opened on {host}: {why}; name another, such as --port="
                            f"{max(1024, port % 65535 + 1)}, or --port=0 for any free one") from None

    def server_bind(self):
        """Binds the port without asking the network for this machine's name, as HTTPServer would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def address(self):
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "") else self.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def load_or_wait(self):
        """Loads the model, or says that the run's first save is waited for. Raises UserError if there is no run."""
        if not is_loopback(self.settings.host):
            say(f"host = {self.settings.host}: everyone who can reach this machine can write with the model")
        if self.follows and not checkpoint.is_run(self.folder) and (self.folder / "run.lock").exists():
            say(f"{self.folder} has no checkpoint yet: waiting for the run's first save")
            return
        while self.follows and not self.loaded and self.newest()[1]:
            self.refresh()
        self.loaded = self.loaded or self.load(self.settings.checkpoint)

    def load(self, which):
        """The Loaded of the checkpoint `which`. Raises UserError if it can't be loaded."""
        task, model, config = self.open_model(which)
        number = self.loaded.number + 1 if self.loaded else 1
        name = str(getattr(task, "source", "") or self.settings.init_from or self.settings.out_dir)
        return Loaded(task, model, number, config.get("step"), name)

    def refresh(self):
        """Loads the newest save, unless it is loaded. Raises UserError if it can't be, and then tries no more.

        A save that comes meanwhile renames the folder that is read. Then what was read does not count.
        """
        which, mark = self.newest()
        if mark in (None, self.mark):
            return
        try:
            found = self.load(which)
        except Exception:
            if self.newest()[1] == mark:
                self.mark = mark
                raise
        else:
            if self.newest()[1] == mark:
                self.loaded, self.mark, self.error = found, mark, None

    def newest(self):
        """(best or last, a mark that every save changes; None: there is no checkpoint).

        While the run goes on, the newest save is `last`. After its end it is the one that --checkpoint names.
        """
        which = "last" if self.learning() else self.settings.checkpoint
        for folder in checkpoint.candidates(self.folder, *dict.fromkeys((which, "best", "last"))):
            with contextlib.suppress(OSError):
                found = (folder / "config.json").stat()
                return which, (folder.name.partition(".")[0], found.st_ino, found.st_mtime_ns)
        return which, None

    def learning(self):
        """Whether the run goes on, or was killed: run.json does not say that it has ended."""
        with contextlib.suppress(UserError, LookupError, TypeError):
            return "ended" not in read_json(self.folder / "run.json")["starts"][-1]
        return False

    def watch(self):
        """Loads each new save of the run, until the server stops."""
        while self.follows and not self.stopping.wait(SECONDS):
            try:
                self.refresh()
            except Exception as error:
                why = users_fault(error) or repr(error)
                self.error = f"{self.folder}: the new save can't be loaded: {why}"
                say(self.error)

    def name(self, loaded):
        """How requests name a Loaded. No other start of the server gives the same name."""
        return f"{self.start}-{loaded.number}"

    def model(self, name=None):
        """The Loaded of this name; None: the newest. Raises UserError if there is none."""
        found = [each for each in (self.loaded, self.wrote) if each and name in (None, self.name(each))]
        if found:
            return found[0]
        if self.loaded:
            raise UserError("the model that wrote this is no longer loaded: write again")
        raise UserError("the run has not saved yet: wait for its first save")

    def about(self):
        """What the page must know of the model: {name: plain value}; None before the first save."""
        if not (loaded := self.loaded):
            return None
        s, words = self.settings, size_in_words(loaded.model)
        inputs = {name: getattr(s, name) for name in NAMES if hasattr(s, name)}
        return {"start": self.start, "number": loaded.number, "step": loaded.step, "name": loaded.name, "size": words,
                "task": loaded.task.settings.task, "chats": chats(loaded.task, s), "sees": hasattr(s, "image"),
                "looks": can_be_looked_into(loaded), "inputs": inputs | fitting(loaded, s)}


def can_be_looked_into(loaded):
    return type(loaded.task).inside.__qualname__ != "Task.inside" and bool(all_blocks(loaded.model))


def fitting(loaded, settings):
    """{"max_new_tokens": as many as leave a quarter of a text model's window to the prompt}, unless that was set."""
    default = {field.name: field.default for field in fields(settings)}.get("max_new_tokens")
    if loaded.task.settings.task != "text" or settings.max_new_tokens != default:
        return {}
    return {"max_new_tokens": min(default, max(1, loaded.model.config.block_size * 3 // 4))}


def chats(task, settings):
    return hasattr(settings, "chat") and hasattr(type(task), "chat")


# ----------------------------------------------------------------------------------------------------------------------
# What a run has written

class Rows:
    """The rows of a log.jsonl. Each `read` parses only what was written since the last one."""

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        self.last, self.end, self.rows = b"", 0, []  # the last line that is parsed, the bytes up to its end

    def read(self):
        """All rows so far, [{name: number; None: NaN}]; no half-written one, and none that is damaged."""
        with self.lock, contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self.end - len(self.last))
            if file.read(len(self.last)) != self.last:  # of another run, or cut off by a resumed one
                self.last, self.end, self.rows = b"", 0, []
                file.seek(0)
            for line in iter(file.readline, b""):
                if not line.endswith(b"\n"):
                    break
                self.last, self.end = line, self.end + len(line)
                with contextlib.suppress(ValueError, AttributeError, RecursionError):
                    row = {name: value for name, value in json.loads(line).items()
                           if type(value) in (int, float, NoneType)}
                    self.rows += [row] * (type(row.get("step")) is int and "loss" in row)
        return list(self.rows)


def newest_sample(path):
    """The last section of a samples.md as {"heading", "text"}; None if there is none."""
    text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    sections = re.findall(r"^## ([^\n]*)\n\n(`{3,})\n(.*?)\n\2\n", text, re.MULTILINE | re.DOTALL)
    return {"heading": sections[-1][0], "text": sections[-1][2]} if sections else None


def run_state(server, since):
    """The answer to GET /run: the model and its inputs, and the run's new rows. since: the last step that is known."""
    state = {"model": server.about(), "follows": server.follows, "rows": [], "sample": None, "run": None,
             "error": server.error, "waits": bool(server.waiting)}
    if server.follows:
        with contextlib.suppress(UserError, LookupError, TypeError, AttributeError):
            record = read_json(server.folder / "run.json")
            state |= {"run": record["starts"][0]["id"], "max_iters": record["settings"].get("max_iters"),
                      "learning": "ended" not in record["starts"][-1]}
        log = server.log.read()
        state["rows"] = thinned([row for row in log if row["step"] > since])
        state["step"] = log[-1]["step"] if log else 0
        state["sample"] = newest_sample(server.folder / "samples.md")
    return state


def thinned(rows):
    """The rows; of very many, those with a validation loss, every n-th and the last one."""
    n = -(-len(rows) // ROWS)
    return [row for i, row in enumerate(rows) if i % n == 0 or "val_loss" in row or i == len(rows) - 1]


# ----------------------------------------------------------------------------------------------------------------------
# Requests

class Handler(BaseHTTPRequestHandler):
    """Answers one request. Each has a connection of its own, and a thread."""

    server_version, sys_version = "quill", ""
    timeout = 20  # seconds that a browser may stay silent, or not read

    def do_GET(self):
        self.answer({"/": self.home, "/run": self.run})

    def do_POST(self):
        self.answer({"/write": self.write, "/inside": self.inside})

    def log_message(self, *args):
        """Prints nothing."""

    def answer(self, table):
        """Does what the table has for the path, and turns every error into a status and a line of JSON."""
        self.begun = False
        try:
            self.check_sender()
            path = self.path.partition("?")[0]
            if path not in table:
                raise Refusal(404, f"there is nothing at {self.command} {path[:80]}")
            table[path]()
        except (Gone, ConnectionError, TimeoutError):  # nobody reads
            self.close_connection = True
        except Exception as error:
            line = users_fault(error)
            if not line:
                traceback.print_exc()
                line = f"a bug: {type(error).__name__}: {error}"
            self.refuse(getattr(error, "status", 400 if users_fault(error) else 500), line)

    def check_sender(self):
        """Raises Refusal unless the request is to this server by a name of its own, and from its own page or none."""
        host, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(host) != 1:
            raise Refusal(400, "a request needs one Host header")
        if not is_ours(host[0], self.server.settings.host):
            raise Refusal(403, f"Host: {host[0][:80]} is not a name of this server; if it is, name it with --host")
        if origin is not None and origin != f"http://{host[0]}":
            raise Refusal(403, f"Origin: {origin[:80]} is another page: only this server's own may ask")

    def refuse(self, status, line):
        with contextlib.suppress(Gone, OSError):
            if self.begun:
                self.line({"error": line})
            else:
                self.reply(status, {"error": line})
                self.drain()

    def drain(self):
        """Reads what is left of a body that was refused, within limits: else the browser may not see the answer."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        for _ in range(2 * IMAGE_BYTES // 2**16):
            if not self.connection.recv(2**16):
                return

    def send_error(self, code, message=None, explain=None):
        """Called by http.server for a request that is not HTTP, or has an unknown method."""
        self.begun = False
        self.refuse(code, str(message or self.responses.get(code, ("refused",))[0]))

    def reply(self, status, content, kind="application/json; charset=utf-8"):
        """Sends a whole answer. content: text, or a value to send as JSON."""
        data = (content if isinstance(content, str) else to_json(content)).encode()
        self.begin(status, kind, {"Content-Length": len(data)})
        self.wfile.write(data)

    def begin(self, status, kind, more=()):
        self.close_connection = True
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Connection": "close", **HEADERS, **dict(more)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.begun = True

    def line(self, value):
        """Sends a line of JSON. Raises Gone if the browser has closed the connection."""
        self.check_there()
        self.wfile.write(json.dumps(value).encode() + b"\n")

    def check_there(self):
        """Raises Gone if the browser has closed the connection or the server ends."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if self.server.stopping.is_set() or readable and not self.connection.recv(2**16):
            raise Gone

    # ------------------------------------------------------------------------------------------------------------------
    # The four answers

    def home(self):
        self.reply(200, page(None, [part("live.js")], [part("live.css")]), "text/html; charset=utf-8")

    def run(self):
        since = parse_qs(self.path.partition("?")[2]).get("since", ["0"])[-1]
        if not re.fullmatch(r"\d{1,15}", since, re.ASCII):
            raise UserError(f"since = {since[:80]!r}: must be a step, such as 100")
        self.reply(200, run_state(self.server, int(since)))

    def write(self):
        """Streams a text: {"model"}, {"text"} for each piece, {"done"}. An error before the first piece is a status."""
        body = self.body()
        loaded, request, sampling = self.wish(body)
        with self.turn(), contextlib.closing(loaded.task.sample(loaded.model, [request], sampling)) as pieces:
            first, written = next(pieces, (0, "")), []  # the first piece raises the errors of what was asked
            self.server.wrote = loaded
            self.begin(200, "application/x-ndjson; charset=utf-8")
            self.line({"model": self.server.name(loaded), "step": loaded.step})
            for _, piece in itertools.chain([first], pieces):
                self.line({"text": piece})
                written.append(piece)
        done = {"done": True}
        if "messages" in request:
            done["answer"] = loaded.task.chat.without_controls("".join(written))
            done["forgotten"] = len(request["messages"]) < len(body.get("messages", ()))
        self.line(done)

    def inside(self):
        loaded, request, sampling = self.wish(self.body())
        with self.turn():
            record = loaded.task.inside(loaded.model, request, sampling)
        self.reply(200, escaped(record))

    @contextlib.contextmanager
    def turn(self):
        """Waits until no other request uses a model. Raises Gone if the browser does not wait as long."""
        try:
            while not self.server.turn.acquire(timeout=0.2):
                self.server.waiting.add(self)
                self.check_there()
        finally:
            self.server.waiting.discard(self)
        try:
            self.check_there()
            yield
        finally:
            self.server.turn.release()

    # ------------------------------------------------------------------------------------------------------------------
    # What a body asks for

    def body(self):
        """The JSON object in the request's body. Raises UserError if it is too long, or is something else."""
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else "nothing"
        if kind != "application/json":
            raise UserError(f"Content-Type: is {kind[:80]}, and must be application/json")
        length, most = self.headers.get("Content-Length", ""), TEXT_BYTES
        if hasattr(self.server.settings, "image"):
            most = IMAGE_BYTES
        if not re.fullmatch(r"\d{1,15}", length, re.ASCII) or "Transfer-Encoding" in self.headers:
            raise UserError("a request needs a Content-Length")
        if int(length) > most:
            raise UserError(f"the request has {int(length):,} bytes, and at most {most:,} are taken")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise Gone
        try:
            found = json.loads(data.decode(), parse_constant=not_a_number)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the request is not JSON: {' '.join(str(error).split()):.200}") from None
        if not isinstance(found, dict):
            raise UserError("the request must be a JSON object, such as {\"prompt\": \"ROMEO:\"}")
        return found

    def wish(self, body):
        """(Loaded, the task's request, sampling settings) that a body names. Raises UserError for what it can't mean.

        A setting that is not named has the default of sample.py.
        """
        server, base = self.server, self.server.settings
        inputs = [name for name in NAMES if hasattr(base, name)]
        name = body.get("model")
        if name is not None and not isinstance(name, str):
            raise UserError("model: must be a name that /write told")
        loaded = server.model(name)
        more = {"messages": chats(loaded.task, base), "image": hasattr(base, "image")}
        known = ["prompt", *(each for each in more if more[each]), "model", *inputs]
        if unknown := [name for name in body if name not in (*known, "messages")]:
            raise UserError(f"unknown name {unknown[0]!r:.80}: this model takes {', '.join(known)}")
        values = {name: value for name, value in body.items() if name in inputs}
        return loaded, asked(body, loaded, base), sampling_of(base, values)


def not_a_number(name):
    raise ValueError(f"{name} is no number of JSON")


def sampling_of(base, values):
    """Sampling settings with these values, the defaults for the others in NAMES, and the rest of `base`, checked."""
    types = flat_fields(type(base))
    for name, value in values.items():
        values[name] = convert(Layer(name, value, "the request"), *types[name])
        if values[name] > MOST.get(name, values[name]):
            raise UserError(f"{name} = {value}: must be at most {MOST[name]:,}")
    defaults = {field.name: field.default for field in fields(base) if field.name in (*NAMES, "num_samples", "chat")}
    return replace(base, **defaults | values)


def asked(body, loaded, settings):
    """The task's request that a body makes: {"text", "image"}, or {"messages"} for a model that chats."""
    if not isinstance(text := body.get("prompt", ""), str):
        raise UserError("prompt: must be a text")
    check_characters(text, "prompt")
    if chats(loaded.task, settings):
        return {"messages": dialogue(body, text, loaded, settings)}
    if "messages" in body:
        raise UserError("messages: this model does not chat: send a prompt")
    return {"text": text, **({"image": picture(body.get("image"))} if hasattr(settings, "image") else {})}


def dialogue(body, text, loaded, settings):
    """The messages of a body, the system message that was set before them, and only the newest that the model can read.

    A body with a prompt instead has one message.
    """
    task, messages = loaded.task, body.get("messages", [{"role": "user", "content": text}])
    check_messages(messages, "messages", answered=False)
    for each in messages:
        check_characters(each["content"], "messages")
    if messages[-1]["role"] != "user":
        raise UserError("messages: the last one must be the user's, which the model answers")
    if messages[0]["role"] != "system":
        messages = [*task.opening(settings), *messages]
    return task.recent([{name: each[name] for name in ("role", "content")} for each in messages],
                       loaded.model.config.block_size)[0]


def check_characters(text, name):
    """Raises UserError for half a character, and for one that would steer the terminal in which a task names words."""
    if found := re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", text):
        raise UserError(f"{name}: has {found[0]!r}, which is no character of a text")


class Picture(io.BytesIO):
    """An image from a request, which Pillow opens as it opens a file. Its name in messages:"""

    def __str__(self):
        return "the picture"


def picture(text):
    """The Picture of a base64 text, with or without "data:image/...;base64," before it. Raises UserError if none is."""
    if not isinstance(text, str) or not text:
        raise UserError("image: this model needs a picture: choose a file")
    try:
        data = base64.b64decode(re.sub(r"^data:[\w/+.-]{1,80};base64,", "", text), validate=True)
    except (binascii.Error, ValueError):
        raise UserError("image: is not base64") from None
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as found:
            width, height = found.size
    except Exception:  # Pillow's decoders raise many different errors
        raise UserError("image: is no picture that Pillow can read") from None
    if width * height > IMAGE_PIXELS:
        raise UserError(f"image: has {width:,} x {height:,} pixels, and at most {IMAGE_PIXELS:,} are taken")
    return Picture(data)


# ----------------------------------------------------------------------------------------------------------------------
# Names

def is_loopback(host):
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def is_ours(named, host):
    """Whether a Host header may name the server that listens on `host`.

    A foreign page can give its own name this machine's address (DNS rebinding), but can't make that name a number or
    localhost. So a server on this machine alone is localhost or a loopback address. One that others reach is any
    address in numbers, the machine's name, or the name that the user gave it. The port may be a tunnel's.
    """
    try:
        name = urlsplit(f"//{named}").hostname or ""
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?", named, re.ASCII):
            return False
    except ValueError:
        return False
    if is_loopback(name):
        return True
    if is_loopback(host):
        return False
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in (host.lower(), socket.gethostname().lower())
