"""Settings from config files and the command line, into one typed dataclass.

    python train.py config/a.py config/b.py --batch_size=32 --out_dir=x

Any number of files and overrides, read from left to right: later wins. A config file is plain Python
assignments, run in a namespace of its own; names that start with an underscore, modules and functions are
ignored. Text from the command line is parsed by the field's declared type, never guessed; a bare `--flag`
sets a bool to True. A file may carry `on_cpu = dict(...)`: values that replace the file's own where there is
no accelerator; the command line still wins. A field that is a dataclass itself is a dict in a file,
`vision = dict(n_layer=2)`, and dotted on the command line, `--vision.n_layer=2`.

An unknown name or a wrong type stops the run with one line that says what, where and the nearest valid name.
"""

import contextlib
import dataclasses
import difflib
import errno
import inspect
import os
import re
import sys
import types
import typing

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class UserError(ValueError):
    """Something the user can put right: shown as one line, without a traceback."""


# The disk is full, or a folder can't be written to or is a file.
USERS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


@contextlib.contextmanager
def one_line_errors():
    """Turns what the user can put right into one line on stderr and exit status 2; bugs keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in USERS_ERRORS:
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def from_command_line(cls, doc, has_accelerator=None, base=None, check=None):
    """`parse` for a script: answers --help, and exits with one line on an error, as `check`(settings) may raise it."""
    for stream in (sys.stdout, sys.stderr):  # Windows' consoles may have another encoding
        stream.reconfigure(encoding="utf-8", errors="replace")
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, doc))
        raise SystemExit(0)
    with one_line_errors():
        settings, given = parse(cls, argv, has_accelerator, base)
        if check:
            check(settings)
        return settings, given


def parse(cls, argv, has_accelerator=None, base=None):
    """(settings, given): an instance of the dataclass `cls`, and {name: value} of what was named in `argv`.

    has_accelerator(device) decides whether the files' `on_cpu` values apply; it is asked only if there are any.
    base(given), where passed, returns values that are older than all of these (of a run that is resumed, say).
    Raises UserError for an unknown name, a value of the wrong type, or a file that can't be read.
    """
    fields = flat_fields(cls)
    layers = []  # (name, value, on_cpu?), oldest first
    for arg in argv:
        if arg.startswith("-"):
            name, equals, text = arg.lstrip("-").partition("=")
            check_name(name, fields, "on the command line", dashes="--")
            layers.append((name, parse_text(name, text, fields[name].type, bare=not equals), False))
        else:
            layers += read_file(arg, fields)
    plain = {name: value for name, value, on_cpu in layers if not on_cpu}
    if any(on_cpu for *_, on_cpu in layers):
        check_either(cls, plain, {name: value for name, value, _ in layers})
        device = plain.get("device", fields["device"].default if "device" in fields else "auto")
        if has_accelerator is None or has_accelerator(device):
            layers = [layer for layer in layers if not layer[2]]
    given = {name: value for name, value, _ in layers}
    return build(cls, {**(flat_values(base(given)) if base else {}), **given}), given


def check_either(cls, *variants):
    """Raises the UserError of the last if none makes an instance of cls: before PyTorch tells which it shall be."""
    for values in variants:
        try:
            return build(cls, values)
        except UserError as problem:
            error = problem
    raise error


class Field(typing.NamedTuple):
    type: object
    default: object


def flat_fields(cls, prefix=""):
    """{name: Field} of a dataclass; the fields of one inside it are named outer.inner."""
    hints, fields = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        nested = dataclasses.is_dataclass(hint)
        fields |= flat_fields(hint, name + ".") if nested else {name: Field(hint, field.default)}
    return fields


def flat_values(values):
    """{"a": 1, "b": {"c": 2}} -> {"a": 1, "b.c": 2}, as deep as it goes."""
    flat = {}
    for name, value in values.items():
        inner = flat_values(value) if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": item for key, item in inner.items()} or {name: value}
    return flat


def build(cls, values, prefix=""):
    """The dataclass `cls` with these flat values; defaults for the rest."""
    hints, arguments = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = build(hints[field.name], values, name + ".")
        elif name in values:
            arguments[field.name] = values[name]
    return cls(**arguments)


def read_file(path, fields):
    """The assignments of one config file, in order, its on_cpu values last: [(name, value, on_cpu?)]."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the config file {path!r}: {getattr(error, 'strerror', error)}"
                        " (settings are written --name=value)") from None
    namespace = {"__file__": path, "__name__": "config"}
    try:
        exec(compile(source, path, "exec"), namespace)
    except Exception as error:
        frame = error.__traceback__.tb_next
        line = getattr(error, "lineno", None) or (frame.tb_lineno if frame else 1)
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    on_cpu = namespace.pop("on_cpu", {})
    if not isinstance(on_cpu, dict):
        raise UserError(f"{path}: on_cpu must be a dict(name=value, ...), not {on_cpu!r}")
    layers = []
    for values, is_on_cpu in ((namespace, False), (on_cpu, True)):
        values = {name: value for name, value in values.items()
                  if not name.startswith("_") and not isinstance(value, (types.ModuleType, types.FunctionType))}
        for name, value in flat_values(values).items():
            check_name(name, fields, f"in {path}" + (", on_cpu" if is_on_cpu else ""))
            layers.append((name, check_value(name, value, fields[name].type, path), is_on_cpu))
    return layers


def check_name(name, fields, where, dashes=""):
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"; did you mean {dashes}{near[0]}?" if near else "; --help lists all settings"
        raise UserError(f"unknown setting {dashes}{name} {where}{hint}")


def check_value(name, value, hint, where):
    """A value from a config file: it must already have the declared type, save that an int may serve as a float."""
    if typing.get_origin(hint) is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint)):
            return value
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise UserError(f"{name} = {value!r} in {where}: {name} must be {describe(hint)}")


def parse_text(name, text, hint, bare=False):
    """A value from the command line, read as the declared type."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
    if bare and (hint is bool or any(choice is True for choice in choices or ())):
        return True
    if bare:
        raise UserError(f"--{name} needs a value: write --{name}=VALUE, where VALUE is {describe(hint)}")
    if hint is str:
        return text
    low = text.strip().lower()
    if choices:
        for choice in choices:
            if low == str(choice).lower() or (type(choice) is bool and low in (TRUE if choice else FALSE)):
                return choice
    elif hint is bool and low in TRUE + FALSE:
        return low in TRUE
    elif hint in (int, float):
        with contextlib.suppress(ValueError):
            return hint(text)
    raise UserError(f"--{name}={text}: {name} must be {describe(hint)}")


def describe(hint):
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[hint]


def check_ranges(settings, **least):
    """Raises UserError for the first named field that is below its least value, no number, or beyond 64 bits."""
    for name, low in least.items():
        value = getattr(settings, name)
        if not value >= low:
            raise UserError(f"{name} = {value}: must be at least {low}")
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"{name} = {value}: must be below 2^63")


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
        raise UserError(f"there is no checkpoint in {out_dir}: train one first, python train.py --out_dir={out_dir}")


def comments(cls):
    """[(field or None, text)] in source order: each field's trailing comment; None marks a heading."""
    rows = []
    for line in inspect.getsource(cls).splitlines():
        if match := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
            rows.append((match[1], match[2] or ""))
        elif match := re.match(r"    # (.*)", line):
            rows.append((None, match[1]))
        elif line.startswith("    def ") or line.startswith("    @"):
            break
    return rows


def help_text(cls, doc):
    """The script's docstring and every setting with its default and its comment in the source."""
    lines = [doc.strip(), "", "settings (--name=value; config files are Python assignments of the same names):"]
    return "\n".join([*lines, *help_lines(cls)])


def help_lines(cls, prefix=""):
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    for name, text in comments(cls):
        if name is None:
            yield f"\n  {text}"
        elif dataclasses.is_dataclass(hints.get(name)):
            yield from (f"\n  {text}", *help_lines(hints[name], f"{prefix}{name}."))
        elif name in fields:
            yield f"  {f'--{prefix}{name}={fields[name].default}':40} {text}"


def differences(settings):
    """What differs from the defaults: {name: value}, in the order of the fields."""
    values = flat_values(dataclasses.asdict(settings))
    return {name: values[name] for name, field in flat_fields(type(settings)).items() if values[name] != field.default}
