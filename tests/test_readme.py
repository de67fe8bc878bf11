"""The README's commands and file tree are right: every file is there, and every setting exists."""

import re
import shlex
from pathlib import Path

import pytest

import evaluate
import prepare
import sample
import train
from configurator import parse

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate, "prepare.py": prepare}
COMMAND = r"(?:python|torchrun --nproc_per_node=\d) ((?:train|sample|evaluate|prepare)\.py[^|`\n]*)"
COMMANDS = sorted(set(re.findall(COMMAND, README)))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *arguments = shlex.split(line, comments=True)
    if "--batchsize=32" in arguments:  # the README's example of a mistake
        arguments.remove("--batchsize=32")
    if script == "prepare.py":
        arguments = [argument for argument in arguments if argument.startswith("-")]
    parse(SCRIPTS[script].Settings, [argument for argument in arguments if argument != "--help"],
          has_accelerator=lambda device: False)


def test_the_commands_were_found():
    assert len(COMMANDS) > 15


def test_the_file_tree_is_complete():
    tree = README.split("## What is where")[1].split("```")[1]
    named = {name for line in tree.strip().splitlines() for name in re.split("  +", line)[0].split(", ")}
    assert all((ROOT / name).exists() for name in named)
    assert {path.name for path in ROOT.glob("*.py")} <= named


def test_what_is_linked_is_there():
    links = re.findall(r"\]\(([^):#]+)\)", README)
    assert links and all((ROOT / link).is_file() for link in links)


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z_]+@", README)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_recipes_parse_and_name_their_command(path):
    for accelerator in (True, False):
        parse(train.Settings, [str(path)], has_accelerator=lambda device, found=accelerator: found)
    assert f"python train.py config/{path.name}" in path.read_text(encoding="utf-8")
