"""Each setting of each command and task changes what happens, or is refused in a line that names it.

A setting without an entry in the tables below fails the test: add one with a value that changes something. Places that
only repeat the setting (config.json, the printed settings) don't count.
"""

import io
import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import test_classification
import test_columns
import test_image_classification
import test_question_answering
import torch
from conftest import make_text
from PIL import Image
from test_tagging import make_rows
from test_translation import make_pairs

import evaluate
import prepare
import sample
import train
from configurator import UserError, flat_fields, joined, parse
from machine import distributed
from run import checkpoint
from sources import dialogues, documents, images, labelled, labelled_images, pairs, texts
from tasks import TASKS, find_task, task_class

ROOT = Path(train.__file__).parent


class Change(SimpleNamespace):
    """A value for the setting: a run with it and with the settings `beside` is compared with a run with `beside` alone.

    refused: the value must instead raise a UserError that names the setting. In `beside`, a__b stands for a.b.
    """

    def __init__(self, value, refused=False, **beside):
        super().__init__(value=value, refused=refused, beside={k.replace("__", "."): v for k, v in beside.items()})


def refused(value, **beside):
    return Change(value, refused=True, **beside)


# ----------------------------------------------------------------------------------------------------------------------
# What a command does

def arguments(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


VOLATILE = ("ms", "tokens_per_s", "mfu", "seconds", "started", "ended")  # what differs between two equal runs


class Lab:
    """Runs commands in this process, each in a new folder, and remembers what they did: none runs twice."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}

    def outcome(self, command, settings):
        """All that the command did, as values that can be compared; or the UserError that it raised."""
        key = (command.__name__, *sorted(settings.items()))
        if key not in self.known:
            out = Path(tempfile.mkdtemp(dir=self.folder)) / "out"
            try:
                self.known[key] = command(settings, out)
            except UserError as error:
                self.known[key] = error
        return self.known[key]

    def compare(self, command, base, name, change):
        """Asserts that the change of the setting `name` makes a difference to the command, or is refused."""
        base = {**base, **change.beside}
        after = self.outcome(command, {**base, name: change.value})
        if change.refused:
            assert isinstance(after, UserError), f"{name} = {change.value!r} was not refused"
            assert name.partition(".")[0] in str(after), f"{name} is not named: {after}"
            return
        before = self.outcome(command, base)
        for found in (before, after):
            assert not isinstance(found, UserError), f"{name} = {change.value!r}: {found}"
        assert after != before, f"{name} = {change.value!r} changes nothing"


def train_run(settings, out):
    """What a training run computes, shows and leaves on disk."""
    calls, wandb = [], mock.MagicMock()
    sys.modules["wandb"] = wandb  # the fixture `lab` removes it
    out = Path(settings.get("out_dir", out))
    settings, given = parse(train.Settings, arguments({"out_dir": out, **settings}), **train.HOW)
    cls, open_writer, save = task_class(settings.task), checkpoint.Writer.__init__, checkpoint.Writer.save

    def spy(name, function):
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append((name, result if isinstance(result, str) else ""))
            return result
        return called

    def run_again(work, *args, use_reentrant, **how):
        return work(*args, **how)

    def new_writer(self, out_dir, background, sharded=False):
        calls.append(("in the background", background))
        open_writer(self, out_dir, background, sharded)

    def new_save(self, names, *what):
        calls.append(("save", names))
        save(self, names, *what)

    with mock.patch.object(cls, "show", spy("show", cls.show)), \
            mock.patch.multiple(checkpoint.Writer, __init__=new_writer, save=new_save), \
            mock.patch.object(torch, "compile", lambda model: calls.append("compile") or model), \
            mock.patch.object(train, "obstacle_to_capture", spy("capture", train.obstacle_to_capture)), \
            mock.patch.object(distributed, "checkpoint", spy("recompute", run_again)), \
            mock.patch.object(train, "peak_flops", lambda *about: None):
        status = 0
        try:
            train.main(settings, given)
        except SystemExit as error:
            status = error.code
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]
    config = json.loads((out / "last" / "config.json").read_text())
    charts = [call.kwargs[key] for call in wandb.init.mock_calls for key in ("project", "name") if key in call.kwargs]
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    if settings.out_dir == "elsewhere":
        calls.append("elsewhere")
    published = os.path.exists(getattr(settings, "publish", "") or "nowhere")
    return rows, config["model"], files, calls, charts, status, published


def sample_run(settings, out):
    """What sample.py prints, the precision of its weights, and the pictures it writes."""
    said = []
    settings, _ = parse(sample.Settings, arguments(settings), **sample.HOW)
    cls = task_class(find_task(settings.out_dir))
    write = cls.sample

    def spied(self, model, *about):
        said.append(str(next(model.parameters()).dtype))
        return write(self, model, *about)

    with mock.patch("builtins.print", lambda *args, **kwargs: said.extend(args)), \
            mock.patch.object(cls, "sample", spied), mock.patch.object(sys, "stdin", io.StringIO("1+1\n")):
        sample.main(settings)
    drawn = [Path(getattr(settings, name, "") or "nowhere") for name in ("draw", "attention")]
    return "".join(said).replace(str(settings.out_dir), ""), [path.is_file() and path.read_bytes() for path in drawn]


def evaluate_run(settings, out):
    """The measures in the evaluation.json of the out directory."""
    settings, _ = parse(evaluate.Settings, arguments(settings), **evaluate.HOW)
    path = Path(settings.out_dir) / "evaluation.json"
    path.unlink(missing_ok=True)
    evaluate.main(settings)
    found = json.loads(path.read_text())
    return {key: value for key, value in found.items() if isinstance(value, float) or key == "tokens"}


# ----------------------------------------------------------------------------------------------------------------------
# Data sets and runs to start from

CPU = dict(device="cpu", dtype="float32")
BASES = {
    "text": dict(CPU, n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, max_iters=6, warmup_iters=1,
                 learning_rate=0.01, min_lr=0.001, eval_interval=3, log_interval=2, sample_tokens=4),
}
BASES["contrastive"] = BASES["image-text"] = {
    **BASES["text"], "block_size": 128, "vision.n_layer": 1, "vision.n_head": 2, "vision.n_embd": 16,
    "vision.patch_size": 16, "learning_rate": 0.003, "sample_tokens": 300}
BASES["arithmetic"] = {**BASES["text"], "operations": "+-*", "digits": 1, "sample_tokens": 300}
BASES["translation"] = {**BASES["text"], "batch_size": 200, "learning_rate": 0.003, "sample_tokens": 300}
BASES["masked"] = {**BASES["text"], "learning_rate": 0.003, "block": "post", "mlp": "gelu_erf", "sample_tokens": 300}
BASES["classification"] = {**BASES["text"], "block_size": 64, "learning_rate": 0.003, "sample_tokens": 300}
BASES["image-classification"] = {
    **{name: value for name, value in BASES["text"].items() if name != "block_size"}, "patch_size": 8,
    "learning_rate": 0.003, "sample_tokens": 300}
BASES["masked-patches"] = BASES["image-classification"]
BASES["chat"] = {**BASES["text"], "block_size": 64, "learning_rate": 0.003, "pack": False}
BASES["reward"] = {name: value for name, value in BASES["chat"].items() if name != "pack"}
BASES["dpo"] = {**{name: value for name, value in BASES["reward"].items() if name not in ("n_layer", "n_head", "n_embd",
                                                                                         "block_size")},
                "init_from": "one_chat"}
BASES["rl"] = {**BASES["dpo"], "reward": "one_reward", "pack": False, "kl": 0.1,
               "samples": 2, "round": 2, "eval_interval": 2, "log_interval": 1, "answer_tokens": 24, "eval_tokens": 400}
BASES["tagging"] = {**BASES["text"], "block_size": 64, "learning_rate": 0.003, "sample_tokens": 300}
BASES["question-answering"] = {**BASES["classification"], "block_size": 24}
BASES["columns"] = {**BASES["text"], "patch_size": 8, "learning_rate": 0.003, "sample_tokens": 300}
DATA = {  # of other tasks: data/shapes
    "chat": "data/calculator", "reward": "data/preferences", "dpo": "data/preferences",
    "question-answering": "data/answers",
    "rl": "data/calculator", "tagging": "data/tags", "classification": "data/labels",
    "image-classification": "data/classes", "masked-patches": "data/classes", "columns": "data/columns",
    "text": "data/words", "masked": "data/words", "arithmetic": "arithmetic", "translation": "data/pairs"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A Lab with two data sets each of most kinds in its folder, which is the current one."""
    folder = tmp_path_factory.mktemp("lab")
    for name, seed in (("words", 0), ("others", 1)):
        (folder / f"{name}.txt").write_text(make_text(600, seed), encoding="utf-8")
        texts.prepare([folder / f"{name}.txt"], folder / "data" / name, "char")
    for name, seed, tokenizer in (("pairs", 0, "word:1"), ("more_pairs", 1, str(folder / "data" / "pairs"))):
        how = pairs.How(languages="en,xx", tokenizer=tokenizer)
        pairs.prepare(make_pairs(100, seed), folder / "data" / name, how, "made up")
    for name, seed in (("tags", 0), ("more_tags", 1)):
        how = labelled.How(tokenizer="byte")
        labelled.prepare(make_rows(100, seed), folder / "data" / name, "tags", how, "made up")
    for name, seed in (("labels", 0), ("more_labels", 1)):
        rows = test_classification.make_rows(100, seed=seed)
        labelled.prepare(rows, folder / "data" / name, "labels", labelled.How(tokenizer="byte"), "made up")
    for name, seed in (("classes", 0), ("more_classes", 1)):
        rows = labelled_images.find(test_image_classification.make_pictures(folder / f"{name}_source", seed=seed))
        labelled_images.prepare(rows, folder / "data" / name, labelled_images.How(image_size=16), "made up")
    for name, seed in (("columns", 0), ("more_columns", 1)):
        test_columns.write_set(folder / "data" / name, seed=seed)
    for name, seed in (("answers", 0), ("more_answers", 1)):
        rows = test_question_answering.make_rows(100, seed)
        labelled.prepare(rows, folder / "data" / name, "answers", labelled.How(tokenizer="word:1"), "made up")
    for name, tokenizer in (("countdown", "char"), ("calculator", str(folder / "data" / "countdown"))):
        rows = [row for i, row in enumerate(dialogues.of_world(name)) if i % 40 == 0]
        dialogues.prepare(rows, folder / "data" / name, tokenizer, 0.1, "made up", name)
    for name, wrong in (("preferences", "1"), ("more_preferences", "2")):
        pairs_of = [{"messages": row["messages"][:1], "chosen": (answer := row["messages"][1]["content"]),
                     "rejected": answer + wrong, "split": row["split"]} for row in rows]
        dialogues.prepare(pairs_of, folder / "data" / name, str(folder / "data" / "countdown"), 0.1, "made up",
                          "calculator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        patch.chdir(folder)
        yield Lab(folder)


@pytest.fixture(scope="module")
def with_images(lab):
    """Adds two data sets of images, and their sources, to the lab's folder."""
    generate = runpy.run_path(str(ROOT / "data" / "shapes" / "generate.py"))["generate"]
    for name, count in (("shapes", 60), ("more", 70)):
        generate(lab.folder / f"{name}_source", images=count)
        images.prepare(lab.folder / f"{name}_source", lab.folder / "data" / name, "char", image_size=32)


@pytest.fixture
def base(lab, task, request):
    """The settings of a small run of the task."""
    if task not in DATA:
        request.getfixturevalue("with_images")
    return {**BASES[task], "task": task, "dataset": DATA.get(task, "data/shapes")}


def make_runs(task, base):
    """Makes the runs one_TASK and two_TASK, and run_TASK, a copy of one_TASK with the checkpoint `best` of two_TASK."""
    if os.path.exists(f"run_{task}"):
        return
    for name, seed in (("one", 1), ("two", 2)):
        train_run({**base, "seed": seed, "out_dir": f"{name}_{task}"}, None)
    shutil.copytree(f"one_{task}", f"run_{task}")
    shutil.rmtree(f"run_{task}/best")
    shutil.copytree(f"two_{task}/best", f"run_{task}/best")


@pytest.fixture
def run(lab, task, base):
    """The folder of a run of the task, whose checkpoints best and last differ."""
    if task == "image-text":  # its parts may come from other runs
        make_runs("contrastive", {**base, "task": "contrastive"})
        make_runs("gemma", {**BASES["text"], "dataset": "data/words", "model": "gemma"})
    for kind in {"dpo": ["chat"], "rl": ["chat", "reward"]}.get(task, ()):  # it goes on from a chat run
        make_runs(kind, {**BASES[kind], "task": kind, "dataset": DATA[kind]})
    make_runs(task, base)
    return f"run_{task}"


# ----------------------------------------------------------------------------------------------------------------------
# Training

TRAINING = {
    "task": refused("nonsense"), "out_dir": Change("elsewhere"), "dataset": Change("data/others"),
    "init_from": Change("one_text"),
    "resume": refused(True),
    "optimizer": Change("muon"), "batch_size": Change(5), "micro_batch_size": Change(3, dropout=0.5),
    "max_iters": Change(7), "learning_rate": Change(0.02), "muon_lr": Change(0.03, optimizer="muon"),
    "lr_schedule": Change("noam", min_lr=3e-4), "min_lr": Change(0.002), "warmup_iters": Change(2),
    "lr_decay_iters": Change(4),
    "weight_decay": Change(0.5), "beta1": Change(0.5), "beta2": Change(0.5), "grad_clip": Change(0.01),
    "dropout": Change(0.5),
    "lora_rank": Change(2, init_from="one_text"), "lora_alpha": Change(1.0, init_from="one_text", lora_rank=2),
    "lora_targets": Change("v_proj", init_from="one_text", lora_rank=2),
    "rates.*": Change(0.1), "eval_interval": Change(2), "eval_tokens": Change(40), "log_interval": Change(1),
    "async_save": Change(False), "max_minutes": Change(1e-9), "save_minutes": Change(1e-9),
    "max_grad_norm": refused(1e-9), "max_loss_rise": refused(1e-9, learning_rate=3.0), "sample_tokens": Change(0),
    "wandb": Change(True), "wandb_project": Change("other", wandb=True), "wandb_name": Change("other", wandb=True),
    "seed": Change(1), "device": refused("cuda"), "dtype": Change("bfloat16"), "compile": Change(True),
    "capture": Change(False), "shard": refused(True), "recompute": Change(True),
    # the model
    "model": Change("gemma"), "n_layer": Change(2), "n_head": Change(1), "n_kv_head": Change(1), "n_embd": Change(32),
    "block_size": Change(12), "bias": Change(True), "norm": Change("rmsnorm"), "mlp": Change("relu2"),
    "n_hidden": Change(40), "positions": Change("rotary"),
    "qk_norm": Change(True), "tied": Change(False), "bigrams": Change(True), "zero_init": Change(True),
    # of tasks with images
    "pair_loss": Change("softmax"), "init_vision": Change("one_contrastive"), "init_decoder": Change("one_gemma"),
    "publish": Change("published"), "vision.n_layer": Change(2), "vision.n_head": Change(1),
    "vision.n_embd": Change(32), "vision.patch_size": Change(8),
    "patch_size": Change(4), "stem": Change(True), "shift": Change(2), "flip": Change(True),
    "normalise": Change(False),
    # of arithmetic
    "operations": Change("+*"), "digits": Change(2),
    "working": Change(True),
    # of translation
    "n_encoder_layer": Change(2), "block": Change("post"), "smoothing": Change(0.3),
    # of dialogues
    "pack": Change(True),
    # of preferences
    "beta": Change(2.0), "sft": Change(1.0),
    # of rewards
    "method": Change("ppo"), "reward": Change("two_reward"), "samples": Change(4), "round": Change(1),
    "epochs": Change(2), "answer_tokens": Change(16), "clip": Change(1e-6), "kl": Change(0.9), "entropy": Change(0.1),
    "divide": Change(False), "lam": Change(0.5, method="ppo"), "value_weight": Change(2.0, method="ppo"),
    # of the encoders
    "mask_rate": Change(0.5),
    "learn": Change("tags"), "train_rows": Change(30), "pool": Change("first"), "hide_rate": Change(0.5),
    "numbers": Change("head"), "answer_words": Change(1, max_iters=60, batch_size=16),
}
WITH_IMAGES = {
    "dataset": Change("data/more"), "block_size": Change(120), "eval_tokens": Change(200), "sample_tokens": Change(0)}
OF_TASK = {  # entries that differ for one task
    "text": {},
    "contrastive": {**WITH_IMAGES, "micro_batch_size": refused(2), "init_from": Change("one_contrastive"),
                    "lora_rank": Change(2, init_from="one_contrastive")},
    "image-text": {**WITH_IMAGES, "init_from": Change("one_image-text"),
                   "lora_rank": Change(2, init_from="one_image-text")},
    "arithmetic": {"dataset": refused("data/words"), "init_from": Change("one_arithmetic"), "sample_tokens": Change(0),
                   "lora_rank": Change(2, init_from="one_arithmetic")},
    "translation": {"dataset": Change("data/more_pairs"), "batch_size": Change(180), "bias": Change(False),
                    "micro_batch_size": Change(60, dropout=0.5), "eval_tokens": Change(40), "sample_tokens": Change(0),
                    "init_from": Change("one_translation"), "lora_rank": Change(2, init_from="one_translation")},
    "chat": {"dataset": Change("data/countdown"), "init_from": Change("one_chat"), "block_size": Change(48, pack=True),
             "lora_rank": Change(2, init_from="one_chat")},
    "reward": {"dataset": Change("data/more_preferences"), "init_from": Change("one_reward"), "model": refused("gemma"),
               "tied": refused(False), "lora_rank": Change(2, init_from="one_reward")},
    "rl": {"dataset": Change("data/countdown"), "init_from": Change("two_chat"), "lora_rank": Change(2),
           "dropout": refused(0.5), "batch_size": Change(8), "micro_batch_size": Change(3)},
    "dpo": {"dataset": Change("data/more_preferences"), "init_from": Change("two_chat"), "lora_rank": Change(2)},
    "masked": {"init_from": Change("one_masked"), "lora_rank": Change(2, init_from="one_masked"),
               "block": Change("pre"), "sample_tokens": Change(0)},
    "tagging": {"dataset": Change("data/more_tags"), "block_size": Change(12), "eval_tokens": Change(40),
                "sample_tokens": Change(0), "init_from": Change("one_tagging"),
                "lora_rank": Change(2, init_from="one_tagging")},
    "classification": {"dataset": Change("data/more_labels"), "block_size": Change(12), "eval_tokens": Change(40),
                       "sample_tokens": Change(0), "init_from": Change("one_classification"),
                       "lora_rank": Change(2, init_from="one_classification")},
    "image-classification": {"dataset": Change("data/more_classes"), "eval_tokens": Change(8),
                             "sample_tokens": Change(0), "init_from": Change("one_image-classification"),
                             "lora_rank": Change(2, init_from="one_image-classification"), "train_rows": Change(9),
                             "publish": Change("published", pool="first")},
    "masked-patches": {"dataset": Change("data/more_classes"), "eval_tokens": Change(8), "sample_tokens": Change(0),
                       "mask_rate": Change(0.8),
                       "init_from": Change("one_masked-patches"),
                       "lora_rank": Change(2, init_from="one_masked-patches")},
    "columns": {"dataset": Change("data/more_columns"), "block_size": Change(2), "eval_tokens": Change(40),
                "sample_tokens": Change(0), "init_from": Change("one_columns"),
                "lora_rank": Change(2, init_from="one_columns")},
    "question-answering": {"dataset": Change("data/more_answers"), "block_size": Change(12), "eval_tokens": Change(40),
                           "publish": refused("data"), "stride": Change(4),
                           "sample_tokens": Change(0), "init_from": Change("one_question-answering"),
                           "lora_rank": Change(2, init_from="one_question-answering")},
}
# The part of the model that --rates names.
PART = {"text": "wte", "chat": "wte", "reward": "wte", "dpo": "wte", "rl": "wte",
        "contrastive": "text", "image-text": "decoder", "arithmetic": "wte",
        "translation": "encoder", "masked": "encoder", "tagging": "encoder",
        "classification": "encoder", "image-classification": "vision", "masked-patches": "vision",
        "columns": "transformer",
        "question-answering": "encoder"}


# Settings of every task that the task's own code reads.
READ_BY_TASKS = ("batch_size", "micro_batch_size", "dropout", "lora_rank", "rates.*", "eval_tokens", "sample_tokens",
                 "init_from", "recompute", "shard", "dataset", "split", "prompt")


def settings_of(command, kind):
    """[(task, setting)]: every setting that the command has for text; for other tasks, marked as slow, only those that
    the task adds or reads."""
    found = []
    for task, row in TASKS.items():
        own = {*flat_fields(getattr(row, kind)), *READ_BY_TASKS}
        for name in flat_fields(joined(command.Settings, getattr(row, kind))):
            if task == "text":
                found.append((task, name))
            elif name in own:
                found.append(pytest.param(task, name, marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize("task, name", settings_of(train, "training"))
def test_each_setting_of_training_changes_the_run_or_is_refused(lab, base, run, task, name):
    change = {**TRAINING, **OF_TASK[task]}[name]  # KeyError: a new setting needs an entry
    lab.compare(train_run, base, name.replace("*", PART[task]), change)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling and evaluating

SAMPLING = {
    "out_dir": Change("one_{task}"), "checkpoint": Change("last"), "init_from": refused("gpt2"),
    "task": refused("columns"),
    "prompt": Change("the "), "num_samples": Change(2), "device": refused("meta"), "compile": refused(True),
    "dtype": Change("bfloat16"),
    "max_new_tokens": Change(7), "temperature": Change(0.1), "top_k": Change(1), "top_p": Change(0.1),
    "stop": Change("a"), "seed": Change(1),
    "image": Change("b.png"), "draw": Change("boxes.png"), "attention": Change("map.png"),
    "chat": Change(True), "system": Change("4"),
    "beam": Change(3), "length_penalty": Change(0.0, beam=4, n_best=4), "n_best": Change(2, beam=3),
    "answer": Change("7"),
    "context": Change("a king sees Berno ."), "no_answer_threshold": Change(-1000.0),
    "row": Change('{"age": 900, "sex": "male"}'),
    "show_steps": Change(True), "attention_layer": refused(2, attention="map.png"),
    "attention_head": refused(3, attention="map.png"), "attention_each": Change(True, attention="map.png"),
}
SAMPLING_OF_TASK = {
    "text": {"chat": refused(True), "system": refused("x")},
    "image-text": {"prompt": Change("count"), "stop": Change("<"), "init_from": refused("one_image-text")},
    "contrastive": {"prompt": Change("a red star|a green circle"), "num_samples": refused(2),
                    "init_from": refused("one_contrastive")},
    "chat": {"prompt": Change("8-3 8-3 8-3 8-3"), "init_from": refused("one_chat"), "stop": Change("7")},
    "reward": {"prompt": Change("9-3"), "init_from": refused("one_reward")},
    "rl": {"prompt": Change("9*9*9*9*9*9*9*9*9*9*9*9"), "init_from": refused("one_rl"), "stop": Change("7"),
           "system": Change("9*9*9*9*9*9*9*9*9*9*9*9")},
    "dpo": {"prompt": Change("9*9*9*9*9*9*9*9*9*9*9*9"), "init_from": refused("one_dpo"), "stop": Change("7")},
    "arithmetic": {"prompt": Change("2+3="), "init_from": refused("one_arithmetic")},
    "translation": {"prompt": Change("the old\nlady fears ."), "init_from": refused("one_translation"),
                    "temperature": Change(1.0), "top_k": Change(1, temperature=2.0),
                    "top_p": Change(0.1, temperature=2.0), "seed": Change(1, temperature=2.0),
                    "max_new_tokens": Change(2)},
    "masked": {"prompt": Change("the ma[MASK] king"), "init_from": refused("one_masked"), "top": Change(2),
               "rank": Change("FILE:words.txt")},
    "tagging": {"prompt": Change("send alma to dorex"), "init_from": refused("one_tagging")},
    "classification": {"prompt": Change("a night"), "init_from": refused("one_classification"), "top": Change(1)},
    "image-classification": {"prompt": refused("a night"), "init_from": refused("one_image-classification"),
                             "top": Change(1)},
    "columns": {"prompt": refused("a night"), "init_from": refused("one_columns"), "top": Change(1)},
    "masked-patches": {"prompt": refused("a night"), "init_from": refused("one_masked-patches")},
    "question-answering": {"prompt": Change("when was it?\nwho?"), "init_from": refused("one_question-answering")}}
EVALUATING = {
    "init_from": refused("one_text"), "out_dir": Change("one_{task}"), "checkpoint": Change("last"),
    "task": refused("columns"), "dataset": Change("data/others"),
    "split": Change("train"), "device": refused("meta"), "dtype": Change("bfloat16"),
    "samples": Change(3), "random_windows": Change(3), "batch_size": Change(5), "seed": Change(1), "test": Change(True),
    "reward": refused("nowhere"),
    "beam": Change(4), "length_penalty": Change(3.0, beam=8), "picture": refused("picture.txt"),
    "no_answer_threshold": Change(1000.0),
}
EVALUATING_OF_TASK = {"text": {}, "masked": {},
                      **dict.fromkeys(("chat", "rl"), {"dataset": Change("data/countdown")}),
                      **dict.fromkeys(("reward", "dpo"), {"dataset": Change("data/more_preferences")}),
                      "arithmetic": {"dataset": refused("data/others")},
                      "translation": {"dataset": Change("data/more_pairs")},
                      "tagging": {"dataset": Change("data/more_tags")},
                      "classification": {"dataset": Change("data/more_labels")},
                      "columns": {"dataset": Change("data/more_columns")},
                      **dict.fromkeys(("image-classification", "masked-patches"),
                                      {"dataset": Change("data/more_classes")}),
                      "question-answering": {"dataset": Change("data/more_answers")},
                      **dict.fromkeys(("contrastive", "image-text"), {"dataset": Change("data/more")})}


def at(task, change):
    """The change, with the task in place of {task} in its value."""
    value = change.value.replace("{task}", task) if isinstance(change.value, str) else change.value
    return Change(value, change.refused, **change.beside)


@pytest.mark.parametrize("task, name", settings_of(sample, "sampling"))
def test_each_setting_of_sampling_changes_the_sample_or_is_refused(lab, run, task, name):
    asked = dict(CPU, out_dir=run)
    if task not in ("contrastive", "arithmetic", "masked", "tagging", "classification", "reward",
                    "image-classification", "masked-patches", "question-answering", "columns"):
        asked |= {"max_new_tokens": 40}
    if task == "arithmetic":
        asked["prompt"] = "7*8="
    elif task == "translation":
        asked["prompt"] = "the mad king loves ."
    elif task == "tagging":
        asked["prompt"] = "who is in alma ?"
    elif task == "classification":
        asked["prompt"] = "the mad king"
    elif task in ("image-classification", "masked-patches"):
        for letter, colour in (("a", "red"), ("b", "blue")):
            shutil.copy(f"classes_source/{colour}/0.png", f"{letter}.png")
        asked["image"] = "a.png"
    elif task == "columns":
        asked["row"] = '{"age": 20, "sex": "female"}'
    elif task == "question-answering":
        asked |= {"prompt": "who was it?", "context": "the mad king sees Alma ."}
    elif task == "reward":
        asked |= {"prompt": "8-3", "answer": "5"}
    elif task in ("chat", "dpo", "rl"):
        asked |= {"prompt": "8-3", "temperature": 2.0, "seed": 1342}
    elif task == "masked":
        asked["prompt"] = "the m[MASK]d king"
    elif task != "text":
        for letter, number in (("a", 0), ("b", 1)):
            shutil.copy(f"shapes_source/images/{number:05}.png", f"{letter}.png")
        asked |= {"image": "a.png", "prompt": "caption" if task == "image-text" else "a red star|a blue circle"}
    lab.compare(sample_run, asked, name, at(task, {**SAMPLING, **SAMPLING_OF_TASK[task]}[name]))


@pytest.mark.parametrize("task, name", settings_of(evaluate, "evaluating"))
def test_each_setting_of_an_evaluation_changes_its_numbers_or_is_refused(lab, run, task, name):
    change = {**EVALUATING, **EVALUATING_OF_TASK[task]}[name]
    asked = {"random_windows": 2, "batch_size": 4} if task == "text" else {}
    lab.compare(evaluate_run, {**CPU, "out_dir": run, **asked}, name, at(task, change))


# ----------------------------------------------------------------------------------------------------------------------
# Preparing

PREPARING = {
    "tokenizer": Change("bpe:300"), "name": Change("data/named_{task}"), "files": Change("a*"),
    "val_fraction": Change(0.3), "newlines": Change("keep"), "image_size": Change(24),
    "column": Change("other"), "processes": Change(1), "max_files": Change(1), "languages": Change("it,en"),
    "columns": Change("other,it"), "shared": Change(False, tokenizer="word:1"), "min_words": Change(4),
    "max_words": Change(5), "labels": Change("topic"), "tags": Change(False),
    "unreadable": Change("skip")}
PREPARING_KIND = {("images", "tokenizer"): Change("bpe:1500"), ("columns", "columns"): Change("text,photo,count"),
                  ("columns", "unreadable"): refused("refuse", source="damaged_columns", unreadable="skip"),
                  ("classes", "unreadable"): refused("refuse", source="damaged", unreadable="skip"),
                  ("loose", "unreadable"): refused("refuse", source="damaged_loose", unreadable="skip")}
FOR_PAIRS = ("languages", "columns", "shared", "min_words", "max_words")
IDLE = {  # settings that do nothing for a kind of source
    "texts": ("image_size", "column", "processes", "max_files", "labels", "tags", "unreadable", *FOR_PAIRS),
    "documents": ("newlines", "image_size", "labels", "tags", "unreadable", *FOR_PAIRS),
    "images": ("files", "newlines", "column", "processes", "max_files", "labels", "tags", "unreadable", *FOR_PAIRS),
    **dict.fromkeys(("classes", "loose"), ("tokenizer", "newlines", "column", "processes", "max_files", "labels",
                                           "tags", *FOR_PAIRS)),
    "pairs.tsv": ("files", "newlines", "image_size", "column", "processes", "max_files", "labels", "tags",
                  "unreadable"),
    "labels": ("newlines", "image_size", "processes", "max_files", "tags", "unreadable", *FOR_PAIRS),
    "columns": ("newlines", "column", "processes", "max_files", "tags", "languages", "shared", "min_words",
                "max_words"),
    "questions.jsonl": ("files", "newlines", "image_size", "column", "processes", "max_files", "labels", "tags",
                        "unreadable", *FOR_PAIRS),
    "tags": ("newlines", "image_size", "column", "processes", "max_files", "labels", "unreadable", *FOR_PAIRS)}


def make_sources(folder):
    """Makes a folder of each kind of source, which has the kind's name."""
    (folder / "texts").mkdir()
    (folder / "documents").mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        rows = make_text(400, seed).splitlines()
        (folder / "texts" / f"{name}.txt").write_bytes("\r\n".join(rows).encode())
        documents = [json.dumps({"text": row, "other": row.upper()}) + "\n" for row in rows]
        (folder / "documents" / f"{name}.jsonl").write_text("".join(documents))
        make_labelled(folder, name, rows)
        make_columns(folder / "columns", name, rows)
    words = [row.split()[:2 + number % 6] for number, row in enumerate(rows)]
    table = [f"{' '.join(row)}\t{' '.join(row[::-1]).upper()}\t{'-'.join(row)}\n" for row in words]
    (folder / "pairs.tsv").write_text("en\tit\tother\n" + "".join(table))
    asked = [{**row, "split": None} for row in test_question_answering.make_rows(60)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    generate = runpy.run_path(str(ROOT / "data" / "shapes" / "generate.py"))["generate"]
    generate(folder / "images", images=20)
    for path in test_image_classification.make_pictures(folder / "classes").rglob("*[02468].png"):
        path.rename(path.with_name(f"a{path.name}"))
    shutil.copytree(folder / "classes", folder / "damaged")
    (folder / "damaged" / "red" / "1.png").write_bytes(b"no picture")
    for kind, source in (("loose", "classes"), ("damaged_loose", "damaged")):
        (folder / kind).mkdir()
        for path in (folder / source).rglob("*.png"):
            shutil.copy(path, folder / kind / f"{path.stem}_{path.parent.name}.png")
    shutil.copytree(folder / "columns", folder / "damaged_columns")
    (folder / "damaged_columns" / "1.png").write_bytes(b"no picture")
    captions = folder / "images" / "captions.jsonl"
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    captions.write_text("".join(json.dumps({**row, "split": ""}) + "\n" for row in rows))


def make_labelled(folder, name, rows):
    """Makes labels/NAME.csv, where each text has a label, and tags/NAME.jsonl, where its first word has one."""
    labels = ["label,topic,text,other"] + [f"{len(row) % 2},{len(row) % 3},{row},{row.upper()}" for row in rows]
    spans = [{"text": row, "spans": [{"start": 0, "end": row.find(" "), "label": "first"}]} for row in rows]
    for kind, suffix, lines in (("labels", "csv", labels), ("tags", "jsonl", map(json.dumps, spans))):
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / f"{name}.{suffix}").write_text("\n".join(lines))


def make_columns(folder, name, rows):
    """Makes NAME.csv, a table of texts, numbers, categories and pictures; and the pictures."""
    folder.mkdir(exist_ok=True)
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (9, 9), colour).save(folder / f"{i}.png")
    table = [f"{len(row) % 2},{len(row) % 3},{row},{i},{'ab'[i % 2]},{i % 3}.png" for i, row in enumerate(rows)]
    (folder / f"{name}.csv").write_text("\n".join(["label,topic,text,count,letter,photo", *table]))


def prepare_run(settings, out):
    """(files of the data set but its records, how many processes wrote documents, whether --name was obeyed)."""
    settings = {"name": str(out), **settings}
    source, found = settings.pop("source"), []
    settings, _ = parse(prepare.Settings, arguments(settings))

    def in_processes(processes, jobs):
        found.append(processes)
        for job in jobs:
            documents.write_shard(*job)

    with mock.patch.object(documents, "in_processes", in_processes), mock.patch.object(documents, "SHARD_BYTES", 10):
        prepare.main(settings, [source])
    files = {path.name: path.read_bytes() for path in Path(settings.name).iterdir()
             if path.name == "tokenizer.json" or path.suffix != ".json"}
    return files, found, settings.name.startswith("data/named")


@pytest.mark.parametrize("kind", IDLE)
@pytest.mark.parametrize("name", flat_fields(prepare.Settings))
def test_each_setting_of_prepare_changes_the_data_or_is_refused(lab, kind, name):
    if not os.path.exists(kind):
        make_sources(lab.folder)
    change = PREPARING_KIND.get((kind, name), PREPARING[name])
    base = {"source": kind, "tokenizer": "char" if kind in ("texts", "images", "classes", "loose") else "byte"}
    base |= {"pairs.tsv": {"languages": "en,it"}, "labels": {"labels": "label"}, "tags": {"tags": True},
             "columns": {"labels": "label", "columns": "all"}}.get(kind, {})
    idle = refused(True if name == "tags" else change.value)
    lab.compare(prepare_run, base, name, idle if name in IDLE[kind] else at(kind, change))


def test_val_fraction_is_refused_where_the_rows_name_their_split():
    rows = [{"where": "line", "image": split, "split": split} for split in ("train", "val")]
    images.split_images(rows, 0.1, "x")
    with pytest.raises(UserError, match="val_fraction = 0.3: the rows of x name their split; leave it out"):
        images.split_images(rows, 0.3, "x")
