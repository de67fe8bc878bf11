from dataclasses import dataclass, fields
from typing import Literal

import pytest

import evaluate
import prepare
import sample
import train
from configurator import UserError, check_ranges, comments, differences, help_text, parse


@dataclass(frozen=True)
class Example:
    # a heading
    batch_size: int = 12  # sequences per update
    learning_rate: float = 1e-3  # the peak
    out_dir: str = "out"  # where
    compile: Literal["auto", True, False] = "auto"  # or not
    resume: bool = False  # go on
    device: str = "auto"  # which


def settings(*argv, **kwargs):
    return parse(Example, argv, **kwargs)[0]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_text_is_parsed_by_the_declared_type():
    s = settings("--batch_size=32", "--learning_rate=1", "--out_dir=a=b", "--compile=False", "--resume")
    assert (s.batch_size, s.learning_rate, s.out_dir, s.compile, s.resume) == (32, 1.0, "a=b", False, True)
    assert type(s.learning_rate) is float and type(s.compile) is bool
    assert settings("--compile=true").compile is True and settings("--compile=auto").compile == "auto"
    assert settings("--compile").compile is True
    assert settings("--resume=no").resume is False and settings("--out_dir=3").out_dir == "3"


@pytest.mark.parametrize("argument, message", [
    ("--batchsize=32", "unknown setting --batchsize on the command line; did you mean --batch_size?"),
    ("--zzz=1", "unknown setting --zzz on the command line; --help lists all settings"),
    ("--batch_size=3.5", "--batch_size=3.5: batch_size must be a whole number"),
    ("--batch_size", "--batch_size needs a value: write --batch_size=VALUE, where VALUE is a whole number"),
    ("--learning_rate=fast", "--learning_rate=fast: learning_rate must be a number"),
    ("--compile=maybe", "--compile=maybe: compile must be one of auto, True, False"),
    ("--resume=perhaps", "--resume=perhaps: resume must be True or False"),
    ("no/such.py", "can't read the config file 'no/such.py': No such file or directory (settings are written"
                   " --name=value)"),
])
def test_bad_arguments_say_what_and_how(argument, message):
    with pytest.raises(UserError) as error:
        settings(argument)
    assert str(error.value) == message


@pytest.mark.parametrize("source, message", [
    ("batchsize = 1", "unknown setting batchsize in {path}; did you mean batch_size?"),
    ("batch_size = '64'", "batch_size = '64' in {path}: batch_size must be a whole number"),
    ("batch_size = True", "batch_size = True in {path}: batch_size must be a whole number"),
    ("resume = 1", "resume = 1 in {path}: resume must be True or False"),
    ("compile = 1", "compile = 1 in {path}: compile must be one of auto, True, False"),
    ("x = 1\nbatch_size = 1 / 0", "{path}, line 2: ZeroDivisionError: division by zero"),
    ("batch_size = = 1", "{path}, line 1: SyntaxError: invalid syntax ({name}, line 1)"),
    ("on_cpu = dict(batchsize=1)", "unknown setting batchsize in {path}, on_cpu; did you mean batch_size?"),
    ("on_cpu = 3", "{path}: on_cpu must be a dict(name=value, ...), not 3"),
])
def test_bad_files_say_what_and_where(tmp_path, source, message):
    path = write(tmp_path / "bad.py", source)
    with pytest.raises(UserError) as error:
        settings(path)
    assert str(error.value) == message.format(path=path, name="bad.py")


def test_later_wins_and_files_are_python(tmp_path):
    one = write(tmp_path / "one.py", "import math\n_half = 8\nbatch_size = 2 * _half\nlearning_rate = 1\nout_dir = 'x'")
    two = write(tmp_path / "two.py", "batch_size = 5")
    s, given = parse(Example, [one, "--out_dir=y", two])
    assert (s.batch_size, s.learning_rate, s.out_dir) == (5, 1.0, "y")
    assert given == differences(s) == {"batch_size": 5, "learning_rate": 1.0, "out_dir": "y"}
    assert settings(two, "--batch_size=6", one).batch_size == 16


def test_on_cpu_replaces_the_files_values_but_not_the_command_lines(tmp_path):
    path = write(tmp_path / "recipe.py", "batch_size = 64\non_cpu = dict(batch_size=8, out_dir='small')")
    asked = []

    def has_accelerator(device):
        asked.append(device)
        return device == "cuda"

    assert settings(path, has_accelerator=has_accelerator).batch_size == 8
    assert settings(path, "--device=cuda", has_accelerator=has_accelerator).batch_size == 64
    assert settings(path, "--batch_size=3", has_accelerator=has_accelerator).batch_size == 3
    assert asked == ["auto", "cuda", "auto"]
    settings("--batch_size=3", has_accelerator=has_accelerator)
    assert len(asked) == 3  # not asked where no file has on_cpu: finding out may be slow


def test_base_is_older_than_everything_given():
    s = settings("--resume", "--batch_size=7", base=lambda given: {"batch_size": 1, "out_dir": "old"})
    assert (s.batch_size, s.out_dir) == (7, "old")


@dataclass(frozen=True)
class Inner:
    size: int = 4  # how large
    name: str = "x"  # what it is called


@dataclass(frozen=True)
class Outer:
    batch_size: int = 1  # rows
    inner: Inner = Inner()  # a part of its own


def test_settings_inside_settings_are_dicts_in_files_and_dotted_on_the_command_line(tmp_path):
    path = write(tmp_path / "c.py", "inner = dict(size=5)\non_cpu = dict(inner=dict(name='small'))")
    s, given = parse(Outer, [path, "--inner.size=6"], has_accelerator=lambda device: False)
    assert s == Outer(inner=Inner(6, "small")) and given == differences(s) == {"inner.size": 6, "inner.name": "small"}
    assert parse(Outer, [], base=lambda given: {"batch_size": 2, "inner": {"size": 7}})[0] == Outer(2, Inner(7))
    assert "--inner.size=4 " in help_text(Outer, "") and "a part of its own" in help_text(Outer, "")
    for argument, message in (("--inner.sise=3", "did you mean --inner.size?"),
                              ("--inner=3", "unknown setting --inner"),
                              (write(tmp_path / "d.py", "inner = 3"), "unknown setting inner in"),
                              (write(tmp_path / "e.py", "inner = dict(size='a')"), "inner.size = 'a' in")):
        with pytest.raises(UserError, match=message):
            parse(Outer, [argument])


def test_help_documents_every_setting():
    text = help_text(Example, "What it does.")
    assert "What it does." in text and "a heading" in text
    assert "--batch_size=12 " in text and "sequences per update" in text
    for script in (train, sample, evaluate, prepare):
        documented = {name: comment for name, comment in comments(script.Settings) if name}
        assert all(documented[field.name] for field in fields(script.Settings)), script


def test_ranges_reject_what_is_too_small_too_large_and_nan():
    check_ranges(Example(), batch_size=1)
    for bad, message in ((dict(batch_size=0), "at least 1"), (dict(learning_rate=float("nan")), "at least 0.0"),
                         (dict(batch_size=2**63), "must be below")):
        with pytest.raises(UserError, match=message):
            check_ranges(Example(**bad), batch_size=1, learning_rate=0.0)
