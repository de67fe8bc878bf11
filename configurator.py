"""Settings from config files and the command line, into one typed dataclass.

    python train.py config/a.py config/b.py --batch_size=32 --out_dir=x

Any number of files and overrides, read from left to right: later wins. A config file is plain Python
assignments, run in a namespace of its own; names that start with an underscore, modules and functions are
ignored. Text from the command line is parsed by the field's declared type, never guessed; a bare `--flag`
sets a bool to True. A file may carry `on_cpu = dict(...)`: values that replace the file's own where there is
no accelerator; the command line still wins. A field that is a dataclass itself is a dict in a file,
`vision = dict(n_layer=2)`, and dotted on the command line, `--vision.n_layer=2`; so is a field that is a dict of names
that the settings can't know, `--rates.head=0.1`.

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

# Old names of settings and recipes, and what they are called now.
RENAMED = {"gradient_accumulation_steps": "micro_batch_size (the rows in memory at a time)", "architecture": "model",
           "config/gpt2_124m.py": "config/gpt2.py", "config/gpt2_350m.py": "config/gpt2.py config/gpt2/350m.py",
           "config/gpt2_774m.py": "config/gpt2.py config/gpt2/774m.py",
           "config/gpt2_1.5b.py": "config/gpt2.py config/gpt2/1.5b.py"}
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


def from_command_line(cls, doc, **how):
    """`parse` for a script: answers --help, and exits with one line on an error. how: the arguments of `parse`."""
    for stream in (sys.stdout, sys.stderr):  # Windows' consoles may have another encoding
        stream.reconfigure(encoding="utf-8", errors="replace")
    argv = sys.argv[1:]
    with one_line_errors():
        if "--help" in argv or "-h" in argv:
            layers = read_arguments([arg for arg in argv if arg not in ("--help", "-h")])
            values = named(cls, layers)
            with contextlib.suppress(UserError):  # of a run that isn't there: nobody knows its task's settings
                cls = widened(cls, values, how.get("more"))
            print(help_text(cls, doc))
            raise SystemExit(0)
        return parse(cls, argv, **how)


def parse(cls, argv, more=None, has_accelerator=None, base=None, check=None, elsewhere=None):
    """(settings, given): an instance of the dataclass `cls`, and {name: value} of what was named in `argv`.

    more(values), where passed, returns a second dataclass whose fields are settings too: it depends on the values of cls.
    has_accelerator(device) decides whether the files' `on_cpu` values apply; it is asked only if there are any.
    base(given), where passed, returns values that are older than all of these (of a run that is resumed, say).
    check(settings, given) may raise a UserError. elsewhere(name) may say where else an unknown setting belongs.
    Raises UserError for an unknown name, a value of the wrong type, or a file that can't be read.
    """
    layers = read_arguments(argv)
    older = flat_values(base(named(cls, layers))) if base else {}
    cls = widened(cls, {**older, **named(cls, layers)}, more)
    fields = flat_fields(cls)
    layers = [layer._replace(value=typed(layer, fields, elsewhere)) for layer in layers]
    plain = {layer.name: layer.value for layer in layers if not layer.on_cpu}
    if any(layer.on_cpu for layer in layers):
        check_either(cls, plain, {layer.name: layer.value for layer in layers})
        device = plain.get("device", fields["device"].default if "device" in fields else "auto")
        if has_accelerator is None or has_accelerator(device):
            layers = [layer for layer in layers if not layer.on_cpu]
    given = {layer.name: layer.value for layer in layers}
    settings = build(cls, {**older, **given})
    if check:
        check(settings, given)
    return settings, given


class Layer(typing.NamedTuple):
    """One setting as it was named: `text` on the command line (None: a bare --flag), or a value in the file `path`."""
    name: str
    value: object
    path: str = ""
    on_cpu: bool = False


def read_arguments(argv):
    """The layers of a command line, oldest first. Names and types are not looked at yet."""
    layers = []
    for arg in argv:
        if arg.startswith("-"):
            name, equals, text = arg.lstrip("-").partition("=")
            layers.append(Layer(name, text if equals else None))
        else:
            layers += read_file(arg)
    return layers


def named(cls, layers):
    """{name: value} of the layers that name fields of cls, on_cpu values apart."""
    fields = flat_fields(cls)
    return {layer.name: typed(layer, fields) for layer in layers if not layer.on_cpu and find_field(layer.name, fields)}


def widened(cls, values, more):
    """`cls`, or a dataclass with the fields and the checks of cls and of more(values)."""
    if more is None:
        return cls
    defaults = {name: field.default for name, field in flat_fields(cls).items()}
    return joined(cls, more({**defaults, **values}))


def joined(*classes):
    """A dataclass with the fields and the checks of them all."""
    def check(self):
        for cls in classes:
            getattr(cls, "__post_init__", lambda _: None)(self)

    return dataclasses.make_dataclass("Settings", (), bases=classes[::-1], frozen=True,
                                      namespace={"__post_init__": check})


def check_either(cls, *variants):
    """Checks that at least one of the variants is valid, before PyTorch is imported to find out which one applies."""
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
    """{name: Field} of a dataclass; the fields of one inside it are named outer.inner, and those of a dict outer.*"""
    hints, fields = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            fields |= flat_fields(hint, name + ".")
        elif typing.get_origin(hint) is dict:
            fields[name + ".*"] = Field(typing.get_args(hint)[1], None)
        else:
            fields[name] = Field(hint, field.default)
    return fields


def find_field(name, fields):
    """The Field of a setting, or None."""
    return fields.get(name) or fields.get(name.partition(".")[0] + ".*" if "." in name else None)


def flat_values(values):
    """{"a": 1, "b": {"c": 2}} -> {"a": 1, "b.c": 2}, as deep as it goes."""
    flat = {}
    for name, value in values.items():
        inner = flat_values(value) if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": item for key, item in inner.items()} or {name: value}
    return flat


def build(cls, values, prefix=""):
    """The dataclass `cls` with these flat values; defaults for the rest. Values that it has no field for are left out."""
    hints, arguments = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = build(hints[field.name], values, name + ".")
        elif typing.get_origin(hints[field.name]) is dict:
            start = name + "."
            arguments[field.name] = {key[len(start):]: value for key, value in values.items() if key.startswith(start)}
        elif name in values:
            arguments[field.name] = values[name]
    return cls(**arguments)


def read_file(path):
    """The assignments of one config file as layers, in order, its on_cpu values last."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except (OSError, UnicodeDecodeError) as error:
        if new := RENAMED.get(os.path.normpath(path).replace(os.sep, "/")):
            raise UserError(f"{path} has a new name: {new}") from None
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
        layers += [Layer(name, value, path, is_on_cpu) for name, value in flat_values(values).items()]
    return layers


def typed(layer, fields, elsewhere=None):
    """The value of a layer in its field's type. Raises UserError for an unknown name or another type."""
    name, field = layer.name, find_field(layer.name, fields)
    if field is None:
        dashes = "" if layer.path else "--"
        where = f"in {layer.path}" + ", on_cpu" * layer.on_cpu if layer.path else "on the command line"
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists all settings"
        if name in RENAMED:
            hint = f"it is {dashes}{RENAMED[name]} now"
        elif elsewhere and (place := elsewhere(name)):
            hint = place
        raise UserError(f"unknown setting {dashes}{name} {where}; {hint}")
    if layer.path:
        return check_value(name, layer.value, field.type, layer.path)
    return parse_text(name, layer.value, field.type)


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


def parse_text(name, text, hint):
    """A value from the command line, read as the declared type; text None: a bare --flag."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
    if text is None:
        if hint is bool or any(choice is True for choice in choices or ()):
            return True
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
        raise UserError(f"there is no checkpoint in {out_dir}: train one first, python train.py --out_dir={out_dir}")


def check_idle(settings, why, *names):
    """Raises UserError for the first named field that is not at its default: `why` says when it would do something."""
    for name in names:
        default = type(settings).__dataclass_fields__[name].default
        if (value := getattr(settings, name)) != default:
            raise UserError(f"{name} = {value!r}: {why}; leave it out, or write {name} = {default!r}")


def comments(cls):
    """[(field or None, text)] in source order: each field's trailing comment; None marks a heading."""
    rows = []
    for part in [base for base in cls.__mro__[::-1] if dataclasses.is_dataclass(base)]:
        try:
            lines = inspect.getsource(part).splitlines()
        except (OSError, TypeError):  # a class that `joined` has made
            continue
        for line in lines:
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
        elif typing.get_origin(hints.get(name)) is dict:
            yield f"  {f'--{prefix}{name}.NAME=VALUE':40} {text}"
        elif name in fields:
            yield f"  {f'--{prefix}{name}={fields[name].default}':40} {text}"


def differences(settings):
    """What differs from the defaults: {name: value}, in the order of the fields."""
    fields, values = flat_fields(type(settings)), flat_values(dataclasses.asdict(settings))
    return {name: value for name, value in values.items()
            if value != {} and (field := find_field(name, fields)) and value != field.default}
