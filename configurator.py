"""Settings from config files and the command line, into one typed dataclass.

    python train.py config/a.py config/b.py --batch_size=32 --out_dir=x

Files and overrides are read from left to right: later wins. A config file is plain Python assignments, run in a
namespace of its own; modules, functions, classes and names that start with an underscore are ignored, statements that
look like a setting and set nothing are refused. Text from the command line is parsed by the field's declared type,
never guessed; a bare `--flag` sets a bool to True; ~ is the home folder where a path begins, in files too. A file may
carry `on_cpu = dict(...)`: where there is no accelerator, these values win over those of all files, and the command
line over both. A field that is a dataclass is a dict in a file, `vision = dict(n_layer=2)`, and dotted on the command
line, `--vision.n_layer=2`; so is a field that is a dict of names that the settings can't know, `--rates.head=0.1`.
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
import types
import typing
from pathlib import Path

# What other programs and earlier versions call a setting.
RENAMED = {"gradient_accumulation_steps": "micro_batch_size (the rows in memory at a time)", "architecture": "model"}
# Errors of a file that is open already, which the system therefore does not name: the disk is full, broken, or gone.
USERS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENODEV, errno.ESTALE)
OUT_OF_MEMORY = "OutOfMemoryError|MemoryError|allocate memory|not enough memory|calculation overflowed|array is too big"
FREE_TEXT = ("prompt", "stop")  # settings that are no path, whatever they begin with
PYTHON = "a config is Python: write max_iters = 100 and the like"
WORDS = {True: ("true", "yes", "on", "1"), False: ("false", "no", "off", "0")}


class UserError(ValueError):
    """Something the user can put right: shown as one line, without a traceback."""


@functools.cache
def say(line):
    """Prints a line on stderr, once, and not from every rank."""
    if os.environ.get("RANK", "0") == "0":
        complain(line)


def complain(line):
    """Prints a line on stderr, if there is anybody to read it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors():
    """Turns what the user can put right into one line on stderr and exit status 2; bugs keep their traceback.

    Where nobody reads the output any more (`| head`), the command ends with status 141 and says nothing, as others do.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        if printed("\n"):  # another pipe broke
            raise
        raise SystemExit(141) from None
    except Exception as error:
        if not (line := users_fault(error)):
            raise
        printed("")
        rank = os.environ.get("RANK", "0")
        complain(f"error{'' if rank == '0' else f' on rank {rank}'}: {line}")
        raise SystemExit(2) from None


def printed(text):
    """Prints the text; False if nothing leaves the process any more. Then the rest is dropped, which Python's end would
    trip over."""
    try:
        print(text, end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def users_fault(error):
    """The line for an error that the user or the machine's owner can put right; "" for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # a bug's has no file's name, as a rule
        known = error.filename is not None or error.errno in USERS_ERRORS
        return f"{error.filename or 'the output'}: {error.strerror}" if known and error.strerror else ""
    if re.search(OUT_OF_MEMORY, f"{type(error).__name__}: {error}"):
        return ("not enough memory: lower --micro_batch_size (in sampling --num_samples), or the model's sizes"
                f" ({str(error).partition(chr(10))[0]:.200})")
    return ""


def from_command_line(cls, doc, usual=None, **how):
    """`parse` for a script: answers --help, and exits with one line on an error. how: the arguments of `parse`.

    usual: the dataclass that --help shows beside cls where there is no run to decide it.
    """
    # Ctrl-C outside `one_line_errors`, while slow modules are imported, ends quietly too.
    sys.excepthook = lambda kind, *rest: sys.exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):  # a notebook's has no encoding
            getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")  # Windows' consoles may have another
    argv = [arg for arg in sys.argv[1:] if arg not in ("--help", "-h")]
    with one_line_errors():
        if len(argv) == len(sys.argv) - 1:
            return parse(cls, argv, **how)
        try:
            cls, _ = widened(cls, read_arguments(argv), how.get("more"))
        except UserError:
            cls = joined(cls, usual) if usual else cls
        print(help_text(cls, doc), flush=True)
        raise SystemExit(0)


def parse(cls, argv, more=None, has_accelerator=None, base=None, refuse=None, check=None, elsewhere=None):
    """(settings, given): an instance of the dataclass `cls`, and {name: value} of what was named in `argv`.

    more(values) returns a second dataclass, by the values of the first, whose fields are settings too.
    has_accelerator(device) decides whether the files' `on_cpu` values apply; it is asked only if there are any.
    base(given) returns values that are older than all of these (of a run that is resumed, say); if there are any,
    refuse(older, given) may raise a UserError.
    check(settings, given) may raise a UserError. elsewhere(name) may say where else an unknown setting belongs.
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
    """A setting as it was named: text on the command line (None: a bare --flag), or a value in the file `origin`."""
    name: str
    value: object
    origin: str = ""
    on_cpu: bool = False


def read_arguments(argv):
    """Yields the layers of a command line, oldest first. Names and types are not looked at yet."""
    before = ""
    for arg in argv:
        if arg.startswith("-"):
            name, equals, text = arg.lstrip("-").partition("=")
            yield Layer(name, text if equals else None)
        elif before.startswith("-") and "=" not in before and not os.path.isfile(arg):
            raise UserError(f"{before} {arg}: a setting is one word, write {before}={arg}")
        else:
            yield from read_file(arg)
        before = arg


def read_file(path):
    """Yields the assignments of one config file as layers, in order, its on_cpu values last."""
    try:
        source = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors put a mark at the start
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
    try:
        layers = [Layer(name, value, origin, values is on_cpu)
                  for origin, values in ((path, namespace), (f"{path}, on_cpu", on_cpu))
                  for name, value in flat_values(values).items() if not name.startswith("_")]
    except RecursionError:
        raise UserError(f"{path}: a dict holds itself") from None
    if not layers:
        say(f"{path} sets nothing")
    return layers


def refuse_idle(path, tree):
    """Raises UserError for a statement that may be meant as a setting and sets none, as YAML, JSON and a == b are."""
    for node in ast.walk(tree):
        idle = isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Call, ast.Constant, ast.NamedExpr))
        if idle or isinstance(node, ast.AnnAssign) and not node.value:
            shown = ast.unparse(node).partition("\n")[0]
            raise UserError(f"{path}, line {node.lineno}: {shown:.60} sets nothing; {PYTHON}")


def widened(cls, layers, more=None, base=None):
    """(`cls` joined with what `more` returns, the values that `base` returns), for `parse`."""
    fields = flat_fields(cls)
    named = {layer.name: layer.value for layer in typed(layers, fields, strict=False) if not layer.on_cpu}
    older = flat_values(base(named)) if base else {}
    if more:
        defaults = {name: default for name, (_, default) in fields.items()}
        cls = joined(cls, more({**defaults, **older, **named}))
    return cls, older


def joined(*classes):
    """A dataclass with the fields and the checks of them all."""
    def check(self):
        for cls in classes:
            getattr(cls, "__post_init__", lambda _: None)(self)

    return dataclasses.make_dataclass("Settings", (), bases=classes[::-1], frozen=True,
                                      namespace={"__post_init__": check})


def flat_fields(cls):
    """{name: (type, default)}; the fields of a dataclass inside it are named outer.inner, those of a dict outer.*"""
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
    """{"a": 1, "b": {"c": 2}} -> {"a": 1, "b.c": 2}, as deep as it goes."""
    flat = {}
    for name, value in values.items():
        inner = flat_values(value) if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": item for key, item in inner.items()} or {str(name): value}
    return flat


def build(cls, values):
    """The dataclass `cls` with these flat values, and defaults for the rest. Values without a field are left out."""
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
    """Yields the layers with values in their fields' types. Unknown names are left out, or if strict an error."""
    for layer in layers:
        name = layer.name if layer.name in fields else re.sub(r"\..*", ".*", layer.name)
        if name in fields:
            yield layer._replace(value=convert(layer, *fields[name]))
        elif strict and not callable(layer.value) and not isinstance(layer.value, types.ModuleType):
            dashes, where = ("", f"in {layer.origin}") if layer.origin else ("--", "on the command line")
            hint = elsewhere and elsewhere(layer.name) or advice(layer.name, fields, dashes)
            raise UserError(f"unknown setting {dashes}{layer.name} {where}; {hint}")


def advice(name, fields, dashes):
    """What may be meant by a name that is no setting. dashes: those that a setting is written with where it stands."""
    if name in RENAMED:
        return f"it is {dashes}{RENAMED[name]} now"
    if inner := [field.rpartition(".")[2] for field in fields if field.startswith(f"{name}.")]:
        how = f"write --{name}.NAME=VALUE" if dashes else f"write {name} = dict(NAME=VALUE)"
        return how + f", where NAME is one of {', '.join(inner)}" * (inner != ["*"])
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    own = "" if dashes else "; begin a name of your own with an underscore"
    return f"did you mean {dashes}{near[0]}?" if near else f"--help lists all settings{own}"


def convert(layer, kind, default):
    """`read_value`, with ~ as the home folder. Raises UserError for no number, and for no text where some is needed."""
    value = read_value(layer, kind)
    shown = f"{layer.name} = {value!r}" + (f" in {layer.origin}" if layer.origin else "")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{shown}: must be a number")
    if kind is str and default and not value:
        raise UserError(f"{shown}: must not be empty; leave it out, or write {default}")
    if kind is str and "\0" in value:
        raise UserError(f"{shown}: must not hold a null character")
    return with_home(value, "^FILE:" if layer.name in FREE_TEXT else "^|,") if kind is str else value


def read_value(layer, kind):
    """A value from a file as it is, if it has the declared type or is an int for a float; text read as that type."""
    name, value = layer.name, layer.value
    if isinstance(value, numbers.Number) and hasattr(value, "item"):
        value = value.item()  # numpy's
    choices = typing.get_args(kind) or ((True, False) if kind is bool else ())
    what = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}.get(kind)
    what = what or "one of " + ", ".join(map(str, choices))
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
    """The text with the home folder for ~ where a path begins. Raises UserError for what can't be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{text.encode(errors='replace').decode()}: is not UTF-8; write it in UTF-8") from None
    return re.sub(f"({start})(~[^/,]*)", lambda match: match[1] + os.path.expanduser(match[2]), text)


def check_ranges(settings, **least):
    """Raises UserError for the first named field that is below its least value, no number, or beyond 64 bits."""
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
    """Raises UserError unless a width divides into heads, these into groups with a key-value head each, and so on."""
    if n_embd % n_head:
        raise UserError(f"n_embd = {n_embd} does not divide into n_head = {n_head} heads:"
                        f" try n_embd = {n_head * max(1, round(n_embd / n_head))}")
    if n_kv_head and n_head % n_kv_head:
        raise UserError(f"n_head = {n_head} does not divide into n_kv_head = {n_kv_head} groups")
    if dropout >= 1:
        raise UserError(f"dropout = {dropout}: must be below 1")


def check_run(out_dir):
    """Raises UserError for an out directory that isn't there: before PyTorch is imported to look for a checkpoint."""
    if not os.path.isdir(out_dir):
        raise UserError(f"there is no checkpoint in {out_dir}: train one first, python train.py"
                        f" {shlex.quote(f'--out_dir={out_dir}')}")


def check_idle(settings, why, *names):
    """Raises UserError for named fields that are not at their defaults: `why` says when they would do something."""
    defaults = {name: type(settings).__dataclass_fields__[name].default for name in names}
    idle = {name: default for name, default in defaults.items() if getattr(settings, name) != default}
    if idle:
        values = ", ".join(f"{name} = {getattr(settings, name)!r}" for name in idle)
        instead = " ".join(f"--{name}={default}" for name, default in idle.items())
        raise UserError(f"{values}: {why}; leave it out, or write {instead}")


def help_text(cls, doc):
    """The script's docstring and every setting with its default and its comment in the source."""
    title = "settings (--name=value; config files are Python assignments of the same names):"
    width = max(40, shutil.get_terminal_size((120, 24)).columns)
    doc = re.sub(r"(?<=\S)\n(?=\S)", " ", (doc or "").strip())  # a paragraph is a line, until it is folded
    lines = "\n".join([doc, "", title, *help_lines(cls)]).split("\n")
    return "\n".join(folded(line, width) for line in lines)


def folded(line, width):
    """A line that is too wide as several, those of a setting indented to where its text begins."""
    start = re.match(r"  --\S* +| *", line).end()
    indent = " " * (start if not start or 6 < start < width - 30 else 8)
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False) or line


def help_lines(cls, prefix=""):
    """Yields the headings in the source of a dataclass, and its fields."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for part in reversed(cls.__mro__):
        source = inspect.getsource(part) if inspect.get_annotations(part) else ""  # what `joined` has made has none
        body = re.split(r"\n    (?:def|@)", source)[0]
        for name, text, heading in re.findall(r"^    (?:(\w+): .*?(?:  # (.*))?|# (.*))$", body, re.MULTILINE):
            field = fields.get(name)
            if heading:
                yield f"\n  {heading}"
            elif field and dataclasses.is_dataclass(field.type):
                yield f"\n  {text}"
                yield from help_lines(field.type, f"{prefix}{name}.")
            elif field:
                value = ".NAME=VALUE" if typing.get_origin(field.type) is dict else f"={field.default}"
                yield f"  {f'--{prefix}{name}{value}':40} {text}"


def differences(settings):
    """What differs from the defaults: {name: value}, in the order of the fields."""
    fields, values = flat_fields(type(settings)), flat_values(dataclasses.asdict(settings))
    return {name: value for name, value in values.items() if value not in ({}, fields.get(name, (None, None))[1])}
