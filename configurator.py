"""Settings from config files and the command line, as one typed dataclass.

    python train.py config/a.py config/b.py --batch_size=32 --out_dir=x

Arguments are read from left to right, and the last value wins. A config file is Python, run in a namespace of its own:
its assignments are settings. Modules, functions, classes and names that start with an underscore are ignored. Text on
the command line is parsed as the type of the field, and a bare `--flag` sets a bool to True. A ~ at the start of a path
becomes the home folder, in files too. A file may have `on_cpu = dict(...)`: without an accelerator, these values
override those of all files, and the command line overrides both. A field that is a dataclass is a dict in a file,
`vision = dict(n_layer=2)`, and dotted on the command line, `--vision.n_layer=2`. A field of type dict is written in the
same way, with any names inside: `--rates.head=0.1`. A file with `_base = "../a.py"` goes on from that file: it is read
before it, unless it was read already.
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
import inspect
import math
import numbers
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import types
import typing
from pathlib import Path

# Names from other programs and earlier versions, each with what to write instead.
RENAMED = {"gradient_accumulation_steps": "micro_batch_size (the rows in memory at a time)", "architecture": "model"}
# OSErrors that are not bugs, although they name no file: the disk is full, broken or gone, or too many files are open.
USERS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENODEV, errno.ESTALE)
OUT_OF_MEMORY = "OutOfMemoryError|MemoryError|allocate memory|not enough memory|calculation overflowed|array is too big"
FREE_TEXT = ("prompt", "stop")  # settings that are not paths: ~ is the home folder only after FILE:
PYTHON = "a config is Python: write, for example, max_iters = 100"
WORDS = {True: ("true", "yes", "on", "1"), False: ("false", "no", "off", "0")}
PATIENCE = 10  # seconds: when a worker has ended, torchrun has ended the others by then


class UserError(ValueError):
    """An error that the user can fix: shown as one line, without a traceback."""


class NoResume(UserError):
    """The same, where resuming the run would end in the same error."""


@functools.cache
def say(line):
    """Prints a line on stderr, on rank 0 only. The same line is printed once, however often it is said."""
    if os.environ.get("RANK", "0") == "0":
        to_stderr(line)


def to_stderr(line):
    """Prints a line on stderr; does nothing if stderr is closed."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors():
    """In a `with` block, turns errors that the user can fix into one line on stderr and exit status 2.

    Bugs keep their traceback. Ctrl-C ends the command silently with status 130. If the reader of stdout has gone
    (`| head`), the command ends silently with status 141, as other programs do. Under torchrun, rank 0 tells of an
    error that all workers have: another waits PATIENCE seconds first, and torchrun ends it if rank 0 has ended.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        if try_print("\n"):  # stdout is open, so another pipe broke: a bug
            raise
        raise SystemExit(141) from None
    except Exception as error:
        if not (line := users_fault(error)):
            raise
        try_print("")  # flushes what was printed before the error
        rank = os.environ.get("RANK", "0")
        if rank != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(PATIENCE)  # if this worker ended first, torchrun would end rank 0 before it has said the same
        to_stderr(f"error{'' if rank == '0' else f' on rank {rank}'}: {line}")
        raise SystemExit(2) from None


def try_print(text):
    """Prints the text. Returns False if stdout is broken, and redirects it: Python would fail to flush it at exit."""
    try:
        print(text, end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def users_fault(error):
    """The line to show for an error that the user or the machine's owner can fix; "" for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # one that names no file is most likely a bug
        known = error.filename is not None or error.errno in USERS_ERRORS
        return f"{error.filename or 'the output'}: {error.strerror}" if known and error.strerror else ""
    if re.search(OUT_OF_MEMORY, f"{type(error).__name__}: {error}"):
        reason = str(error).partition("\n")[0][:200]
        return ("not enough memory: lower --micro_batch_size (in sampling --num_samples), or the model's sizes"
                + f" ({reason})" * bool(reason))
    return ""


def from_command_line(cls, doc, usual=None, **how):
    """`parse` for a script: returns the same, but answers --help, and shows an error as one line.

    doc: the script's docstring, for --help, which then ends the program. how: the arguments of `parse` after `argv`.
    usual: a dataclass of settings that --help lists if `more` raises a UserError, as when there is no run to look at.
    """
    # Ctrl-C exits quietly outside `one_line_errors` too, while slow modules are imported.
    sys.excepthook = lambda kind, *rest: sys.exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):  # a notebook's stream can't be reconfigured
            getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")  # a Windows console may not be UTF-8
    argv = [arg for arg in sys.argv[1:] if arg not in ("--help", "-h")]
    with one_line_errors():
        if len(argv) == len(sys.argv) - 1:
            return parse(cls, argv, **how)
        try:
            cls, _ = widened(cls, read_arguments(argv), how.get("more"))
        except UserError:
            if not usual or any(arg.startswith("--task=") for arg in argv):
                raise
            cls = joined(cls, usual)
        print(help_text(cls, doc, files="more" in how), flush=True)  # other commands take no config files
        raise SystemExit(0)


def parse(cls, argv, more=None, has_accelerator=None, base=None, refuse=None, check=None, elsewhere=None):
    """Returns (settings, given): an instance of the dataclass `cls`, and {name: value} of all that `argv` sets.

    more(values) returns a dataclass, whose fields are settings too. values: {name: value} of the fields of `cls`.
    has_accelerator(device): if it returns False, config files' `on_cpu` values apply. Called only if there are any.
    base(given) returns {name: value} of older settings, such as a resumed run's, or {}. `argv` overrides them.
    refuse(older, given), called only if there are older settings, and check(settings, given) may raise a UserError.
    elsewhere(name) returns a hint at where an unknown setting belongs, or "".
    Raises UserError for an unknown name, a value of the wrong type, or a file that can't be read.
    """
    layers = list(read_arguments(argv))
    cls, older = widened(cls, layers, more, base)
    layers = list(typed(layers, flat_fields(cls), elsewhere))
    if any(layer.on_cpu for layer in layers):
        plain = [layer for layer in layers if not layer.on_cpu]
        device = {layer.name: layer.value for layer in plain}.get("device", "auto")
        if has_accelerator is None or has_accelerator(device):
            layers = plain
        else:
            layers.sort(key=lambda layer: (not layer.origin, layer.on_cpu))  # files, on_cpu, the command line
    given = {layer.name: layer.value for layer in layers}
    if refuse and older:
        refuse(older, given)
    settings = build(cls, {**older, **given})
    if check:
        check(settings, given)
    return settings, given


class Layer(typing.NamedTuple):
    """A setting as given: text on the command line (None for a bare --flag), or a value in the file `origin`."""
    name: str
    value: object
    origin: str = ""
    on_cpu: bool = False


def read_arguments(argv):
    """Yields the layers of a command line, in order. Names and types are not checked yet."""
    before, seen = "", set()
    for arg in argv:
        if arg.startswith("-"):
            name, equals, text = arg.lstrip("-").partition("=")
            yield Layer(name, text if equals else None)
        elif before.startswith("-") and "=" not in before and not os.path.isfile(arg):
            raise UserError(f"{before} {arg}: a setting is one word, write {before}={arg}")
        else:
            yield from read_file(arg, seen)
        before = arg


def read_file(path, seen):
    """The assignments of one config file as a list of layers, in order, its on_cpu values last. Its _base comes first.

    seen: the files that were read already, a set of their real paths, to which this one is added.
    """
    seen.add(os.path.realpath(path))
    try:
        source = Path(path).read_text(encoding="utf-8-sig")  # Windows editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the config file {path!r}: {getattr(error, 'strerror', error)}"
                        " (settings are written --name=value)") from None
    namespace = {"__file__": path, "__name__": "config"}
    try:
        tree = ast.parse(source, path)
        refuse_idle(path, tree)
        exec(compile(tree, path, "exec"), namespace)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frame = error.__traceback__.tb_next
        line = getattr(error, "lineno", None) or (frame.tb_lineno if frame else 1)
        hint = f"; {PYTHON}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {getattr(error, 'msg', error)}{hint}") from None
    on_cpu = namespace.pop("on_cpu", {})
    if not isinstance(on_cpu, dict):
        raise UserError(f"{path}: on_cpu must be a dict(name=value, ...), not {on_cpu!r}")
    base, layers = os.path.normpath(os.path.join(os.path.dirname(path), str(namespace.get("_base", "")))), []
    if "_base" in namespace and not os.path.isfile(base):
        raise UserError(f"{path}: _base = {namespace['_base']!r}: there is no such recipe beside it")
    if "_base" in namespace and os.path.realpath(base) not in seen:
        layers = read_file(base, seen)
    try:
        for origin, values in ((path, namespace), (f"{path}, on_cpu", on_cpu)):
            layers += [Layer(name, value, origin, values is on_cpu)
                       for name, value in flat_values(values).items() if not name.startswith("_")]
    except RecursionError:
        raise UserError(f"{path}: a dict contains itself: remove it") from None
    if not layers:
        say(f"{path} sets nothing")
    return layers


def refuse_idle(path, tree):
    """Raises UserError for a statement that looks like a setting but sets nothing: YAML's a: 1, JSON, or a == 1."""
    for node in ast.walk(tree):
        idle = isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Call, ast.Constant, ast.NamedExpr))
        if idle or isinstance(node, ast.AnnAssign) and not node.value:
            shown = ast.unparse(node).partition("\n")[0]
            raise UserError(f"{path}, line {node.lineno}: {shown:.60} sets nothing; {PYTHON}")


def widened(cls, layers, more=None, base=None):
    """Returns (`cls` joined with the dataclass from `more`, the older values from `base` as {name: value}, or {}).

    layers: an iterable of Layer. more, base: the functions that `parse` takes. base gets what the layers set of the
    fields of `cls`; more gets the defaults, overridden by the older values, then by the layers. Neither gets a value
    that is in a config file's `on_cpu`.
    """
    fields = flat_fields(cls)
    named = {layer.name: layer.value for layer in typed(layers, fields, strict=False) if not layer.on_cpu}
    older = flat_values(base(named)) if base else {}
    if more:
        defaults = {name: default for name, (_, default) in fields.items()}
        cls = joined(cls, more({**defaults, **older, **named}))
    return cls, older


def joined(*classes):
    """A frozen dataclass with the fields and the checks (`__post_init__`) of all classes."""
    def check(self):
        for cls in classes:
            getattr(cls, "__post_init__", lambda _: None)(self)

    return dataclasses.make_dataclass("Settings", (), bases=classes[::-1], frozen=True,
                                      namespace={"__post_init__": check})


def flat_fields(cls):
    """{name: (type, default)} of a dataclass. A field inside an inner dataclass is outer.inner, a dict is outer.*"""
    fields = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            fields |= {f"{field.name}.{name}": inner for name, inner in flat_fields(field.type).items()}
        elif typing.get_origin(field.type) is dict:
            fields[f"{field.name}.*"] = typing.get_args(field.type)[1], None
        else:
            fields[field.name] = field.type, field.default
    return fields


def flat_values(values):
    """{"a": 1, "b": {"c": 2}} -> {"a": 1, "b.c": 2}, at any depth. An empty dict stays a value."""
    flat = {}
    for name, value in values.items():
        inner = flat_values(value) if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": item for key, item in inner.items()} or {str(name): value}
    return flat


def build(cls, values):
    """An instance of `cls` from flat values, with defaults for the rest. Values without a field are ignored."""
    arguments = {}
    for field in dataclasses.fields(cls):
        start = field.name + "."
        inner = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = build(field.type, inner)
        elif typing.get_origin(field.type) is dict:
            arguments[field.name] = inner
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return cls(**arguments)


def typed(layers, fields, elsewhere=None, strict=True):
    """Yields the layers whose names are in `fields` (from `flat_fields`), each value converted to its field's type.

    Raises UserError for any other name, except a file's functions, classes and modules; strict=False skips them all.
    elsewhere: as in `parse`.
    """
    for layer in layers:
        name = layer.name if layer.name in fields else re.sub(r"\..*", ".*", layer.name)  # rates.head is in rates.*
        if name in fields:
            yield layer._replace(value=convert(layer, *fields[name]))
        elif strict and not callable(layer.value) and not isinstance(layer.value, types.ModuleType):
            dashes, where = ("", f"in {layer.origin}") if layer.origin else ("--", "on the command line")
            hint = elsewhere and elsewhere(layer.name) or advice(layer.name, fields, dashes)
            raise UserError(f"unknown setting {dashes}{layer.name} {where}; {hint}")


def advice(name, fields, dashes):
    """A hint at what an unknown name may mean. dashes: "--" on the command line, "" in a file."""
    if name in RENAMED:
        return f"it is {dashes}{RENAMED[name]} now"
    if inner := [field.rpartition(".")[2] for field in fields if field.startswith(f"{name}.")]:
        names = "" if inner == ["*"] else f", where NAME is one of {', '.join(inner)}"
        return (f"write --{name}.NAME=VALUE" if dashes else f"write {name} = dict(NAME=VALUE)") + names
    if near := difflib.get_close_matches(name, fields, n=1, cutoff=0.5):
        return f"did you mean {dashes}{near[0]}?"
    return "--help lists all settings" + ("" if dashes else "; begin a name of your own with an underscore")


def convert(layer, kind, default):
    """The layer's value as type `kind`, with ~ as the home folder. Raises UserError for an unfit one, such as NaN.

    default: the field's; if it is a text that isn't empty, the value must not be empty either.
    """
    value = read_value(layer, kind)
    shown = f"{layer.name} = {value!r}" + (f" in {layer.origin}" if layer.origin else "")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{shown}: must be a finite number")
    if kind is str and default and not value:
        raise UserError(f"{shown}: must not be empty; leave it out for the default, {default!r}")
    if kind is str and "\0" in value:
        raise UserError(f"{shown}: must not contain a null character")
    return with_home(value, "^FILE:" if layer.name in FREE_TEXT else "^|,") if kind is str else value


def read_value(layer, kind):
    """Returns the value of a Layer as type `kind`: text is parsed; a file's value must have the type, or be an int for
    a float; a bare --flag is True. Raises UserError for a value that does not fit."""
    name, value = layer.name, layer.value
    if isinstance(value, numbers.Number) and hasattr(value, "item"):
        value = value.item()  # a NumPy scalar
    choices = typing.get_args(kind) or ((True, False) if kind is bool else ())
    what = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}.get(kind)
    what = what or "one of " + ", ".join(filter(None, map(str, choices))) + ", or empty" * ("" in choices)
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{name} in {layer.origin}: must be below 2^63")
    if layer.origin:
        if type(value) is kind or any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise UserError(f"{name} = {value!r} in {layer.origin}: {name} must be {what}")
    if value is None:
        if True in choices:
            return True
        raise UserError(f"--{name} needs a value: write --{name}=VALUE, where VALUE is {what}")
    for choice in choices:
        if value.strip().lower() in WORDS.get(choice, (str(choice).lower(),)):
            return choice
    if not choices:
        with contextlib.suppress(ValueError):
            return kind(value)
    raise UserError(f"--{name}={value}: {name} must be {what}")


def with_home(text, start="^|,"):
    """The text with ~ replaced by the home folder after `start`, a regex. Raises UserError if it is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{text.encode(errors='replace').decode()}: is not UTF-8; write it in UTF-8") from None
    return re.sub(f"({start})(~[^/,]*)", lambda match: match[1] + os.path.expanduser(match[2]), text)


def check_ranges(settings, **least):
    """Raises UserError for the first named field that is below its least value, NaN, or beyond 64 bits."""
    for name, low in least.items():
        value = getattr(settings, name)
        if not value >= low:
            raise UserError(f"{name} = {value}: must be at least {low}")
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"{name} = {value}: must be below 2^63")


def check_choices(settings, **choices):
    """Raises UserError for the first named field whose value is not among its choices."""
    for name, known in choices.items():
        if getattr(settings, name) not in known:
            raise UserError(f"{name} = {getattr(settings, name)!r}: must be one of {', '.join(known)}")


def check_shape(n_embd, n_head, n_kv_head, dropout):
    """Raises UserError unless n_head divides n_embd, n_kv_head (0: unset) divides n_head, and dropout is below 1."""
    if n_embd % n_head:
        raise UserError(f"n_embd = {n_embd} does not divide into n_head = {n_head} heads:"
                        f" try n_embd = {n_head * max(1, round(n_embd / n_head))}")
    if n_kv_head and n_head % n_kv_head:
        raise UserError(f"n_head = {n_head} does not divide into n_kv_head = {n_kv_head} groups")
    if dropout >= 1:
        raise UserError(f"dropout = {dropout}: must be below 1")


def check_run(out_dir):
    """Raises UserError if the folder is missing or has no checkpoint, before PyTorch is imported to look into one."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else ()
    if not any(re.fullmatch(r"config\.json|(best|last)(\.new|\.old)?", name) for name in names):
        raise UserError(f"there is no checkpoint in {out_dir}: train one first, python train.py"
                        f" {shlex.quote(f'--out_dir={out_dir}')}")


def check_idle(settings, why, *names):
    """Raises UserError if named fields, which have no effect, are not at their defaults. why: for the message."""
    defaults = {name: type(settings).__dataclass_fields__[name].default for name in names}
    idle = {name: default for name, default in defaults.items() if getattr(settings, name) != default}
    if idle:
        values = ", ".join(f"{name} = {getattr(settings, name)!r}" for name in idle)
        instead = " ".join(f"--{name}={default}" for name, default in idle.items())
        raise UserError(f"{values}: {why}; leave it out (if a recipe sets it, {instead} undoes that)")


def help_text(cls, doc, files=True):
    """The text of --help: the script's docstring, and every setting with its default and its comment in the source.

    files: whether the command takes config files.
    """
    title = f"settings (--name=value{'; config files are Python assignments of the same names' * files}):"
    width = max(40, shutil.get_terminal_size((120, 24)).columns)
    doc = re.sub(r"(?<=\S)\n(?=\S)", " ", (doc or "").strip())  # joins the lines of a paragraph
    lines = "\n".join([doc, "", title, *help_lines(cls)]).split("\n")
    return "\n".join(wrap(line, width) for line in lines)


def wrap(line, width):
    """Returns the line with newlines that make it fit the width. A setting's comment continues below its own start."""
    start = re.match(r"  --\S* +| *", line).end()
    indent = " " * (start if not start or 6 < start < width - 30 else 8)
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False) or line


def help_lines(cls, prefix=""):
    """Yields a line of --help for each heading and field in a dataclass's source. prefix: goes before each name."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for part in reversed(cls.__mro__):
        source = inspect.getsource(part) if inspect.get_annotations(part) else ""  # a class from `joined` has no source
        body = re.split(r"\n    (?:def|@)", source)[0]
        for name, text, heading in re.findall(r"^    (?:(\w+): .*?(?:  # (.*))?|# (.*))$", body, re.MULTILINE):
            field = fields.pop(name, None)  # of two classes with a field, the first says what it is
            if heading:
                yield f"\n  {heading}"
            elif field and dataclasses.is_dataclass(field.type):
                yield f"\n  {text}"
                yield from help_lines(field.type, f"{prefix}{name}.")
            elif field:
                value = ".NAME=VALUE" if typing.get_origin(field.type) is dict else f"={field.default}"
                choices = [each for each in typing.get_args(field.type) if isinstance(each, str) and each]
                more = f"; one of {', '.join(choices)}" if any(each not in text for each in choices) else ""
                yield f"  {f'--{prefix}{name}{value}':40} {text}{more}"


def differences(settings):
    """{name: value} of the settings that differ from their defaults, in the order of the fields."""
    fields, values = flat_fields(type(settings)), flat_values(dataclasses.asdict(settings))
    return {name: value for name, value in values.items() if value not in ({}, fields.get(name, (None, None))[1])}
