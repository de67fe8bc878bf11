"""Pages, docstrings, recipes and figures.json are right: every command parses, every file that they name is there."""

import ast
import functools
import json
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import look
import prepare
import sample
import train
from configurator import parse, read_file
from tasks import TASKS
from tasks import settings as task_settings
from tools import alignments, answers, bench, compare, figures, ladder, publish, scaling, stages, transfer, versus

ROOT = Path(train.__file__).parent
README, *PAGES = ((ROOT / name).read_text(encoding="utf-8") for name in
                  ("README.md", "EXPERIMENTS.md", "CONTRIBUTING.md"))
FIGURES = [entry for entry in json.loads((ROOT / "figures.json").read_text(encoding="utf-8"))["figures"].values()
           if entry["command"]]
FOLDERS = sorted(path.parent for path in ROOT.glob("*/__init__.py")) + [ROOT / "config", ROOT / "data", ROOT / "tests"]
OUT = {"translate": "out/translate_en_it", "config/chat/": "out/chat/countdown", "fashion": "out/fashion_mnist",
       "large_scans": "out/digit_scans",
       **{name: f"out/{name}" for name in ("answer_facts", "digit_scans", "titanic", "breast_cancer", "ledger",
                                             "diabetes", "diamonds")}}
RECIPES = sorted((ROOT / "config").rglob("*.py"))
DOCUMENTED = [path for folder in (ROOT, *FOLDERS[:-2]) for path in folder.glob("*.py") if path.stem != "configurator"]
DOCUMENTED += (ROOT / "config").glob("*/*.py")
OTHERS = [*ROOT.glob("data/*/README.md"), *ROOT.glob("config/ladder/*.md"), ROOT / "ideas" / "README.md"]
TEXTS = [README, *PAGES, *(path.read_text(encoding="utf-8") for path in OTHERS),
         *(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in DOCUMENTED),
         *(figures.filled(entry, row, 1, next((out for part, out in OUT.items()
                                               if part in entry["command"] + row.get("with", "")), "."))
           .replace("&&", "\n") for entry in FIGURES for row in entry["rows"].values())]
TOOLS = ("bench", "scaling", "compare", "versus", "figures", "ladder", "publish", "alignments", "transfer", "answers",
         "stages")
COMMAND = (r"(?:python|torchrun(?: --\S+)+) ((?:(?:train|sample|evaluate|prepare|look)\.py|-m tools\.(?:" +
           "|".join(TOOLS) + r"))\b"
           r"(?:\"[^\"\n]*\"|[^|`\"\n])*)")  # a | between quotes belongs to it
COMMANDS = sorted({re.split("  +", line)[0].strip() for text in TEXTS
                   for line in re.findall(COMMAND, re.sub(r"\\\n\s*", "", text))})


def base_of(recipe):
    """The recipe that this one goes on from, as a list: config/gpt2.py for those in config/gpt2/."""
    base = re.search('^_base = "(.*)"', recipe.read_text(encoding="utf-8"), re.MULTILINE)
    return [recipe.parent / base[1]] if base else []


def read(files, on_gpu):
    """(settings, given) of recipes."""
    how = {"more": train.HOW["more"], "has_accelerator": lambda device: on_gpu}
    return parse(train.Settings, [str(file) for file in files], **how)


def task_of(arguments):
    """The task of the model that a command for sample, evaluate or look names: its recipe has the same out_dir."""
    named = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
    if "init_from" in named:
        is_bert = "rank" in named or "bert" in named["init_from"]
        return "image-text" if "image" in named else "masked" if is_bert else "text"
    return runs().get(named.get("out_dir"), "text")


@functools.cache
def runs():
    """{out_dir: task} of all recipes."""
    return {s.out_dir: s.task for s, _ in (read([path], True) for path in RECIPES)}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *arguments = shlex.split(line.replace("-m tools.", "tools."), comments=True)
    if "--batchsize=32" in arguments:  # the README's example of a mistake
        arguments.remove("--batchsize=32")
    if "--help" in arguments and any(argument.startswith("--task=") for argument in arguments):
        assert {argument.removeprefix("--task=") for argument in arguments} - {"--help"} <= TASKS.keys()
        return
    arguments = [argument for argument in arguments if argument != "--help"]
    if script == "prepare.py":
        arguments = [argument for argument in arguments if argument.startswith("-")]
    if script == "tools.scaling":
        scaling.read(arguments)
        return
    if script == "tools.versus":
        own = ("--seeds=", "--out=", "--patch=")
        shared = [text for text in arguments if text.startswith("-") and not text.startswith(own)]
        for recipe in (text for text in arguments if not text.startswith("-")):
            versus.settings_of(recipe, shared)
        assert all((ROOT / text.partition("=")[2]).is_file() for text in arguments if text.startswith("--patch="))
        return
    if script == "tools.figures":
        known = json.loads((ROOT / "figures.json").read_text(encoding="utf-8"))["figures"]
        assert all(name in known for name in arguments if not name.startswith("-") and name != "NAME")
    if script in ("tools.compare", "tools.figures"):
        arguments = [argument for argument in arguments if argument.startswith("-")]
    command = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate, "prepare.py": prepare, "look.py": look,
               "tools.bench": bench, "tools.compare": compare, "tools.figures": figures, "tools.ladder": ladder,
               "tools.publish": publish, "tools.alignments": alignments, "tools.transfer": transfer,
               "tools.answers": answers, "tools.stages": stages}[script]
    if command in (sample, evaluate, look):  # the run or the model isn't there
        monkeypatch.setattr(command, "find_task", lambda name: task_of(arguments))
    for module in (command, task_settings):
        if hasattr(module, "check_run"):
            monkeypatch.setattr(module, "check_run", lambda out_dir: None)
    if command in (publish, answers):
        monkeypatch.setattr(command, "check_model", lambda settings: None)
    if command is publish:
        arguments = arguments or ["--to=somewhere"]  # the command is only named
    how = getattr(command, "HOW", {}) | {"has_accelerator": lambda device: False}
    parse(command.Settings, arguments, **{**how, "base": None, "check": None})


def test_the_commands_were_found():
    assert len(COMMANDS) > 40
    scripts = {re.match(r"-m [\w.]+|\w+", line)[0] for line in COMMANDS}
    assert scripts == {"train", "sample", "evaluate", "prepare", "look", *(f"-m tools.{name}" for name in TOOLS)}


def test_the_readme_is_a_newcomers_page():
    assert len(README.splitlines()) <= 434  # 300; sections on a GPU, dialogues, rewards, look.py, answers, tables


def test_the_file_tree_is_complete():
    tree = README.split("## What is where")[1].split("```")[1]
    lines = [re.split("  +", line, maxsplit=1) for line in tree.strip().splitlines()]
    named = {name for names, _ in lines for name in names.split(", ")}
    assert all((ROOT / name).exists() for name in named)
    assert {path.name for path in ROOT.glob("*.py")} <= named
    assert {f"{folder.name}/" for folder in FOLDERS} <= named
    tools = dict(lines)["tools/"]
    assert all(path.stem in tools for path in (ROOT / "tools").glob("*.*") if path.stem != "__init__")


def test_what_is_named_is_there():
    links = re.findall(r"\]\(([^):#]+)\)", README)
    assert links and all((ROOT / link).is_file() for link in links)
    folders = "|".join(folder.name for folder in FOLDERS)
    paths = {path for text in TEXTS for path in re.findall(rf"\b(?:{folders})/[\w./]*\w\.(?:py|c|sh|md|json)\b", text)}
    assert len(paths) > 10 and all((ROOT / path).is_file() for path in paths)


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z_]+@", README)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_name_their_command(path):
    settings, given = read([path], True)
    _, given_on_cpu = read([path], False)
    command = f"python train.py {path.relative_to(ROOT).as_posix()}\n"
    assert command in path.read_text(encoding="utf-8")
    assert (settings.out_dir == "out") == (path.stem == "shakespeare_char")
    if base := base_of(path):  # it has only what differs, and on a CPU the base's small model is trained
        (_, given_by_base), (_, base_on_cpu) = read(base, True), read(base, False)
        own = [layer for layer in read_file(path, set()) if layer.origin == path]
        assert own and all(layer.value != given_by_base.get(layer.name) for layer in own)
        changed = {name for name, value in given_on_cpu.items() if value != base_on_cpu.get(name)}
        sizes = {"model", "n_layer", "n_head", "n_embd"} if path.parent.name == "ladder" else set()
        parts = {"positions", "norm", "mlp", "n_kv_head", "n_hidden"} if path.parent.name == "config" else set()
        data = {"dataset"} if settings.task == "translation" else set()
        modern = {"positions", "norm", "mlp", "qk_norm", "zero_init", "optimizer", "muon_lr", "lr_schedule",
                  "weight_decay", "grad_clip"} if path.stem == "124m_fast" else set()
        longer = {"max_iters", "eval_interval", "weight_decay"} if path.stem == "shakespeare_char_long" else set()
        masked = {"task", "shift", "max_iters", "eval_interval"} if path.stem == "fashion_mnist_masked" else set()
        ppo = {"method", "samples", "divide", "rates.score"} if path.stem == "ppo" else set()
        assert changed <= {"out_dir", "learning_rate", "min_lr"} | sizes | parts | data | modern | longer | masked | ppo
