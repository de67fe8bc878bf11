import errno
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

import configurator
import evaluate
import prepare
import sample
import train
from configurator import (
    UserError,
    check_ranges,
    differences,
    from_command_line,
    help_text,
    joined,
    one_line_errors,
    parse,
    with_home,
)
from tasks import TASKS

ROOT = Path(train.__file__).parent


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
    ("--learning_rate=nan", "learning_rate = nan: must be a finite number"),
    ("--learning_rate=1e999", "learning_rate = inf: must be a finite number"),
    ("--out_dir=", "out_dir = '': must not be empty; leave it out for the default, 'out'"),
    ("--out_dir=caf\udce9", "caf?: is not UTF-8; write it in UTF-8"),
    ("--compile=maybe", "--compile=maybe: compile must be one of auto, True, False"),
    ("--resume=perhaps", "--resume=perhaps: resume must be True or False"),
    ("--architecture=gpt", "unknown setting --architecture on the command line; it is --model now"),
    ("no/such.py", "can't read the config file 'no/such.py': No such file or directory (settings are written"
                   " --name=value)"),
])
def test_errors_in_arguments_give_the_value_and_the_remedy(argument, message):
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
    ("batch_size = = 1", "{path}, line 1: SyntaxError: invalid syntax; a config is Python: write, for example,"
     " max_iters = 100"),
    ("on_cpu = dict(batchsize=1)", "unknown setting batchsize in {path}, on_cpu; did you mean batch_size?"),
    ("on_cpu = 3", "{path}: on_cpu must be a dict(name=value, ...), not 3"),
    ("import sys\nsys.exit('no')", "{path}, line 2: SystemExit: no"),
    ("learning_rate = 10**400", "learning_rate in {path}: must be below 2^63"),
    ("batch_size = 10**5000", "batch_size in {path}: must be below 2^63"),
    ("learning_rate = float('nan')", "learning_rate = nan in {path}: must be a finite number"),
    ("on_cpu = {1: 2}", "unknown setting 1 in {path}, on_cpu; --help lists all settings; begin a name of your own with"
     " an underscore"),
    ("a = {}; a['b'] = a", "{path}: a dict contains itself: remove it"),
    ("out_dir = 'a\\0b'", "out_dir = 'a\\x00b' in {path}: must not contain a null character"),
    ("out_dir = ''", "out_dir = '' in {path}: must not be empty; leave it out for the default, 'out'"),
])
def test_errors_in_files_give_the_value_and_the_place(tmp_path, source, message):
    path = write(tmp_path / "bad.py", source)
    with pytest.raises(UserError) as error:
        settings(path)
    assert str(error.value) == message.format(path=path)


def test_later_wins_and_files_are_python(tmp_path):
    one = write(tmp_path / "one.py", "import math\n_half = 8\nbatch_size = 2 * _half\nlearning_rate = 1\nout_dir = 'x'")
    two = write(tmp_path / "two.py", "batch_size = 5")
    s, given = parse(Example, [one, "--out_dir=y", two])
    assert (s.batch_size, s.learning_rate, s.out_dir) == (5, 1.0, "y")
    assert given == differences(s) == {"batch_size": 5, "learning_rate": 1.0, "out_dir": "y"}
    assert settings(two, "--batch_size=6", one).batch_size == 16


def test_a_file_goes_on_from_its_base(tmp_path):
    write(tmp_path / "base.py", "batch_size = 2\nout_dir = 'x'\non_cpu = dict(learning_rate=0.5)")
    (tmp_path / "more").mkdir()
    one = write(tmp_path / "more" / "one.py", "_base = '../base.py'\nbatch_size = 3")
    s = settings(one, has_accelerator=lambda device: False)
    assert (s.batch_size, s.out_dir, s.learning_rate) == (3, "x", 0.5)
    mine = write(tmp_path / "mine.py", "out_dir = 'mine'")
    assert settings(str(tmp_path / "base.py"), mine, one).out_dir == "mine"  # the base is not read again
    lost = write(tmp_path / "lost.py", "_base = 'nowhere.py'")
    with pytest.raises(UserError, match="lost.py: _base = 'nowhere.py': there is no such recipe"):
        settings(lost)
    itself = write(tmp_path / "itself.py", "_base = 'itself.py'\nbatch_size = 4")
    assert settings(itself).batch_size == 4


@pytest.mark.parametrize("source, line, shown", [
    ("batch_size: 7\nresume: true", 1, "batch_size: 7"),  # YAML
    ('\n{"batch_size": 7}', 2, "{'batch_size': 7}"),  # JSON
    ("if True:\n  batch_size == 7", 2, "batch_size == 7"),
    ("batch_size", 1, "batch_size"),
])
def test_a_statement_that_sets_nothing_is_an_error(tmp_path, source, line, shown):
    path = write(tmp_path / "config", source)
    with pytest.raises(UserError) as error:
        settings(path)
    assert str(error.value) == (f"{path}, line {line}: {shown} sets nothing; a config is Python: write, for example,"
                                " max_iters = 100")


def test_a_config_is_ordinary_python(tmp_path, capsys):
    source = """\ufeff'A text.'
import numpy as np
from pathlib import Path
from math import sqrt
def half(x): return x // 2
for batch_size in np.arange(4): pass
learning_rate = np.float64(sqrt(4))
out_dir: str = "~/x"
if half(8) == 4:
    print("read")
(learning_rate := 2)
"""
    s = settings(write(tmp_path / "c.py", source))
    assert (s.batch_size, s.learning_rate, s.out_dir) == (3, 2.0, str(Path.home() / "x"))
    assert type(s.batch_size) is int and type(s.learning_rate) is float and capsys.readouterr().out == "read\n"
    path = write(tmp_path / "empty.py", "# nothing")
    assert settings(path) == Example() and capsys.readouterr().err == f"{path} sets nothing\n"
    for source in ("batch_size = lambda: 7", "import math as batch_size"):
        with pytest.raises(UserError, match="batch_size must be a whole number"):
            settings(write(tmp_path / "d.py", source))


def test_a_setting_in_two_words_is_explained(tmp_path):
    with pytest.raises(UserError, match="--batch_size 3: a setting is one word, write --batch_size=3"):
        settings("--batch_size", "3")
    assert settings("--resume", write(tmp_path / "c.py", "batch_size = 3")).batch_size == 3


def test_a_tilde_stands_for_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert settings("--out_dir=~/x").out_dir == "/home/me/x" and settings("--out_dir=a~").out_dir == "a~"
    assert with_home("~/a.png,~/b~,c") == "/home/me/a.png,/home/me/b~,c"
    how = joined(sample.Settings, TASKS["text"].sampling)
    assert parse(how, ["--prompt=~/x", "--stop=~"])[0].prompt == "~/x"
    assert parse(how, ["--prompt=FILE:~/x"])[0].prompt == "FILE:/home/me/x"


def ends(error, capsys):
    """(exit status, text on stderr) of a command that raises the error."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    return end.value.code, capsys.readouterr().err


def test_errors_of_the_machine_are_one_line_and_bugs_are_not(capsys):
    assert ends(OSError(errno.ENAMETOOLONG, "File name too long", "x"), capsys) == (2, "error: x: File name too long\n")
    assert ends(OSError(errno.ENOSPC, "No space left"), capsys) == (2, "error: the output: No space left\n")
    for error in (MemoryError("of 3 GB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 3 GB"),
                  torch.OutOfMemoryError("CUDA: 3 GB")):
        status, said = ends(error, capsys)
        assert status == 2 and said.startswith("error: not enough memory: lower --micro_batch_size") and "3 GB" in said
    for bug in (OSError("broken data stream"), RuntimeError("shapes differ"), ValueError("no"), BrokenPipeError()):
        with pytest.raises(type(bug)), one_line_errors():
            raise bug


@pytest.mark.parametrize("command", ["train.py --help", "-m tools.scaling --help"])
def test_a_closed_pipe_ends_the_command_silently(command):
    """As with `| head`: no traceback, and status 141 (128 + SIGPIPE)."""
    for said in ({"stderr": subprocess.PIPE}, {"stderr": subprocess.STDOUT}):
        process = subprocess.Popen([sys.executable, *command.split()], stdout=subprocess.PIPE, cwd=ROOT, **said)
        process.stdout.close()
        assert process.wait() == 141 and not (process.stderr and process.stderr.read())


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
    assert len(asked) == 3  # not asked if no file has on_cpu, because the answer may be slow


def test_on_cpu_of_an_earlier_file_wins_over_a_later_file_but_not_over_the_command_line(tmp_path):
    recipe = write(tmp_path / "recipe.py", "batch_size = 64\nout_dir = 'a'\non_cpu = dict(batch_size=8)")
    overlay = write(tmp_path / "overlay.py", "batch_size = 32\nout_dir = 'b'")
    for accelerator, sizes in ((True, [32, 3, 32]), (False, [8, 3, 3])):
        found = [settings(*argv, has_accelerator=lambda device, found=accelerator: found) for argv in (
            [recipe, overlay], [recipe, overlay, "--batch_size=3"], ["--batch_size=3", recipe, overlay])]
        assert [each.batch_size for each in found] == sizes and found[0].out_dir == "b"
    later = write(tmp_path / "later.py", "on_cpu = dict(batch_size=4)")
    assert settings(recipe, later, has_accelerator=lambda device: False).batch_size == 4
    assert settings(later, recipe, has_accelerator=lambda device: False).batch_size == 8


def test_all_arguments_override_the_values_of_base():
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
                              ("--inner=3", "write --inner.NAME=VALUE, where NAME is one of size, name"),
                              (write(tmp_path / "d.py", "inner = 3"), r"write inner = dict\(NAME=VALUE\), where"),
                              (write(tmp_path / "e.py", "inner = dict(size='a')"), "inner.size = 'a' in")):
        with pytest.raises(UserError, match=message):
            parse(Outer, [argument])


@dataclass(frozen=True)
class Named:
    batch_size: int = 1  # rows
    rates: dict[str, float] = field(default_factory=dict)  # of parts


def test_a_dict_field_takes_any_names(tmp_path):
    path = write(tmp_path / "c.py", "rates = dict(vision=0, head=2.0)")
    s, given = parse(Named, [path, "--rates.head=0.1"])
    assert s == Named(rates={"vision": 0.0, "head": 0.1}) and type(s.rates["vision"]) is float
    assert given == differences(s) == {"rates.vision": 0.0, "rates.head": 0.1} and differences(Named()) == {}
    assert parse(Named, ["--rates.x=1"], base=lambda given: {"rates": {"y": 2.0}})[0].rates == {"y": 2.0, "x": 1.0}
    assert "--rates.NAME=VALUE " in help_text(Named, "")
    for argument, message in (("--rates.head=high", "--rates.head=high: rates.head must be a number"),
                              ("--rates=1", "unknown setting --rates .* write --rates.NAME=VALUE$")):
        with pytest.raises(UserError, match=message):
            parse(Named, [argument])


@dataclass(frozen=True)
class Large:
    depth: int = 20  # a setting if batch_size is large

    def __post_init__(self):
        check_ranges(self, depth=self.batch_size)


@dataclass(frozen=True)
class Small:
    width: int = 8  # a setting if batch_size is small


def test_a_setting_decides_which_other_settings_exist(tmp_path):
    how = dict(more=lambda values: Large if values["batch_size"] > 5 else Small,
               elsewhere=lambda name: "it is for large ones alone" if name == "depth" else "")
    assert settings("--batch_size=2", "--width=3", **how).width == 3
    large, given = parse(Example, ["--depth=40", "--out_dir=x"], **how)  # the default batch_size is 12
    assert (large.depth, large.out_dir) == (40, "x") and isinstance(large, Example)
    assert given == differences(large) == {"depth": 40, "out_dir": "x"}
    assert settings("--width=3", base=lambda given: {"batch_size": 2}, **how).width == 3
    on_cpu = write(tmp_path / "recipe.py", "batch_size = 7\non_cpu = dict(depth=1)")
    assert settings(on_cpu, "--depth=8", has_accelerator=lambda device: False, **how).depth == 8
    with pytest.raises(UserError, match="depth = 1: must be at least 7"):  # the checks of both hold
        settings(on_cpu, has_accelerator=lambda device: False, **how)
    with pytest.raises(UserError, match="unknown setting --depth on the command line; it is for large ones alone"):
        settings("--batch_size=2", "--depth=3", **how)
    with pytest.raises(UserError, match="no luck with 12"):
        settings(check=lambda s, given: (_ for _ in ()).throw(UserError(f"no luck with {s.batch_size}")), **how)


def test_help_fits_the_terminal(monkeypatch):
    for columns in (50, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = help_text(train.Settings, train.__doc__).splitlines()
        assert max(map(len, lines)) <= max(columns, 4 + max(len(word) for line in lines for word in line.split()))
    assert any(re.match(r" {43}\S", line) for line in lines)  # a comment continues below its start


def test_help_without_a_docstring_and_without_a_real_stdout(monkeypatch, capsys):
    """python -OO removes docstrings, a notebook's stdout is not a file, and a caller may close stdout."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    for stream in (SimpleNamespace(write=lambda text: None, flush=lambda: None), None):
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as end:
            configurator.from_command_line(Example, None)
        assert end.value.code == 0


def test_help_documents_every_setting(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    text = help_text(Example, "What it does.")
    assert "What it does." in text and "a heading" in text
    assert "--batch_size=12 " in text and "sequences per update" in text and "config files" in text
    assert "config files" not in help_text(Example, "", files=False)
    of_tasks = [getattr(row, kind) for row in TASKS.values() for kind in ("training", "sampling", "evaluating")]
    for cls in (*(script.Settings for script in (train, sample, evaluate, prepare)), *of_tasks):
        documented = help_text(cls, "")
        assert all(re.search(rf"  --{each.name}[.=].* +\S", documented) for each in fields(cls)), cls
    assert re.search(r"--optimizer=adamw .*; one of adamw, muon\n", help_text(train.Settings, ""))
    monkeypatch.setattr("sys.argv", ["train.py", "--help", "--task=txt"])
    monkeypatch.setattr("sys.excepthook", None)  # it is set again
    with pytest.raises(SystemExit, match="2"):
        from_command_line(train.Settings, "", **train.HOW)
    assert "task must be one of text, " in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown setting --pair_loss .* it is only for --task=contrastive"):
        parse(train.Settings, ["--pair_loss=softmax"], **train.HOW)
    with pytest.raises(UserError, match="setting --vision .* only for --task=contrastive and --task=image-text"):
        parse(train.Settings, ["--vision=3"], **train.HOW)


def test_ranges_reject_values_that_are_too_small_too_large_or_nan():
    check_ranges(Example(), batch_size=1)
    for bad, message in ((dict(batch_size=0), "at least 1"), (dict(learning_rate=float("nan")), "at least 0.0"),
                         (dict(batch_size=2**63), "must be below")):
        with pytest.raises(UserError, match=message):
            check_ranges(Example(**bad), batch_size=1, learning_rate=0.0)
