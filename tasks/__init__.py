"""TASKS, the table of everything that can be trained. Importing this module does not import torch.

A new task is a file of its name with a subclass of `task.Task`, its settings in settings.py, and a row here.
"""

import contextlib
import importlib
import json
from pathlib import Path
from typing import NamedTuple

from configurator import UserError, flat_fields
from tasks import settings


class Row(NamedTuple):
    cls: str  # the Task in the file of the task's name: tasks/image_text.py for image-text
    training: type  # the settings that the task adds to train.py's
    sampling: type  # to sample.py's
    evaluating: type  # to evaluate.py's
    kinds: tuple | None = ()  # of data sets that it learns from; (): any; None: the task makes its own data
    published: tuple = ()  # values of model_type, or of architectures, in the config.json of published models


TASKS = {
    "text": Row("TextTask", settings.Text, settings.Chatting, settings.Windows, ("text",),
                ("gpt2", "llama", "mistral", "qwen2", "gemma")),
    "contrastive": Row("ContrastiveTask", settings.Contrastive, settings.Matching, settings.Nothing, ("image-text",)),
    "image-text": Row("ImageTextTask", settings.ImageText, settings.Answering, settings.Nothing, ("image-text",),
                      ("paligemma",)),
    "arithmetic": Row("ArithmeticTask", settings.Arithmetic, settings.Nothing, settings.Tested, None),
    "translation": Row("TranslationTask", settings.Translation, settings.Translating, settings.Translations,
                       ("pairs",)),
    "masked": Row("MaskedTask", settings.Masked, settings.Filling, settings.Nothing, ("text",), ("bert",)),
    "classification": Row("ClassificationTask", settings.Classification, settings.Classifying, settings.Labels,
                          ("labels",)),
    "image-classification": Row("ImageClassificationTask", settings.ImageClassification, settings.Recognising,
                                settings.Labels, ("image-labels",), ("vit",)),
    "columns": Row("ColumnsTask", settings.Columns, settings.Predicting, settings.Labels, ("columns",)),
    "masked-patches": Row("MaskedPatchesTask", settings.MaskedPatches, settings.Guessing, settings.Nothing,
                          ("images", "image-labels", "image-text")),
    "chat": Row("ChatTask", settings.Chat, settings.Chatting, settings.Answers, ("chat",)),
    "reward": Row("RewardTask", settings.Reward, settings.Scoring, settings.Tested, ("preferences",)),
    "dpo": Row("DPOTask", settings.DPO, settings.Chatting, settings.Answers, ("preferences",)),
    "rl": Row("RLTask", settings.RL, settings.Chatting, settings.Answers, ("chat",)),
    "tagging": Row("TaggingTask", settings.Tagging, settings.Looking, settings.Labels, ("tags",)),
    "question-answering": Row("QuestionAnsweringTask", settings.QuestionAnswering, settings.Asking, settings.Questions,
                              ("answers",), ("BertForQuestionAnswering",)),
}


def task_class(name):
    module = importlib.import_module(f"tasks.{name.replace('-', '_')}")
    return getattr(module, TASKS[name].cls)


def own_data(task, given):
    """The name of the data that a task makes: its own; "" for others. Raises UserError if the user gave another."""
    makes = TASKS[task].kinds is None
    if makes and given.get("dataset", task) not in ("", task):
        raise UserError(f"dataset = {given['dataset']}: --task={task} makes its own data; leave it out")
    return task if makes else ""


def task_of(config, folder):
    """The name of the task for a config.json, ours or a published one, in `folder`. Raises UserError if none fits."""
    saved, model_type = config.get("settings"), config.get("model_type")
    if isinstance(saved, dict) and "task" in saved:
        if saved["task"] not in TASKS:
            raise UserError(f"{folder}: task = {saved['task']!r}: the code has no such task now; put it back")
        return saved["task"]
    for kind in (*(config.get("architectures") or ()), model_type):  # one architecture may have a task of its own
        for name, row in TASKS.items():
            if kind in row.published:
                return name
    known = ", ".join(each for row in TASKS.values() for each in row.published if each.islower())
    raise UserError(f"{folder}: model_type = {model_type!r}, but only {known} can be loaded")


def find_task(name):
    """The name of a model's task. name: the folder of a run, a checkpoint or a published model, or a hub name."""
    checkpoints = [which + suffix for which in ("best", "last") for suffix in ("", ".new", ".old")]
    for folder in (Path(name), *(Path(name) / checkpoint for checkpoint in checkpoints)):
        with contextlib.suppress(OSError, ValueError, TypeError):  # the file is missing or damaged: try the next one
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return task_of(dict(config), folder)
    if not Path(name).is_dir():
        from published import GPT2
        from published.files import locate, read_config
        return "text" if name in GPT2 else task_of(read_config(locate(name)), name)
    return "text"  # the run is damaged: loading it will say how


def elsewhere(settings_of, trained=False):
    """Returns a function for configurator.parse: from an unknown setting's name to a hint for the user, or "".

    The hint names the tasks that have the setting, as --task=NAME, or as models of these tasks if `trained`: then the
    command loads a model, which decides the task. settings_of(row): the Row's class of settings for the command.
    """
    def tasks_with(name):
        tasks = [task for task, row in TASKS.items()
                 if any(field == name or field.startswith(f"{name}.") for field in flat_fields(settings_of(row)))]
        if not tasks:
            return ""
        if trained and name == "image":
            return "this model reads no images"
        if name == "publish":
            return f"only models of --task={', '.join(tasks)} can be published: other programs know no others of ours"
        names = tasks if trained else [f"--task={task}" for task in tasks]
        return f"it is only for {'models of the task ' * trained}{' and '.join(names)}"

    return tasks_with
