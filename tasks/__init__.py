"""What can be trained: TASKS, the only table. Nothing here imports torch before it is needed.

A new task is a file with a subclass of `task.Task`, its settings in settings.py, and a row here.
"""

import contextlib
import importlib
import json
from pathlib import Path
from typing import NamedTuple

from configurator import UserError, flat_fields, joined
from tasks import settings


class Row(NamedTuple):
    module: str
    cls: str
    training: type  # its settings for train.py
    sampling: type  # for sample.py
    evaluating: type  # for evaluate.py
    published: tuple  # the model_type of published models that it samples and fine-tunes


TASKS = {
    "text": Row("tasks.text", "TextTask", settings.Text, settings.Writing, settings.Windows, ("gpt2",)),
    "contrastive": Row("tasks.contrastive", "ContrastiveTask", settings.Contrastive, settings.Matching,
                       settings.Nothing, ()),
    "image-text": Row("tasks.image_text", "ImageTextTask", settings.ImageText, settings.Answering, settings.Nothing,
                      ("paligemma",)),
}


def task_class(name):
    row = TASKS[name]
    return getattr(importlib.import_module(row.module), row.cls)


def asked(task, **values):
    """The settings for sampling of a task with these values, for who asks in Python and not by sample.py."""
    return joined(settings.Once, TASKS[task].sampling)(**values)


def task_of(config, folder):
    """The task that a config.json belongs to, our own or a published model's. Raises UserError if none does."""
    settings, kind = config.get("settings"), config.get("model_type")
    if isinstance(settings, dict) and settings.get("task") in TASKS:
        return settings["task"]
    for name, row in TASKS.items():
        if kind in row.published:
            return name
    known = ", ".join(kind for row in TASKS.values() for kind in row.published)
    raise UserError(f"{folder}: model_type = {kind!r}, but only {known} can be loaded")


def find_task(name):
    """The task of a run's folder, a checkpoint's, or a published model's folder or name."""
    names = [which + suffix for which in ("best", "last") for suffix in ("", ".new", ".old")]
    for folder in (Path(name), *(Path(name) / which for which in names)):
        with contextlib.suppress(OSError, ValueError, TypeError):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return task_of(dict(config), folder)
    if not Path(name).is_dir():
        from published.files import GPT2, locate, read_config
        return "text" if name in GPT2 else task_of(read_config(locate(name)), name)
    return "text"  # a damaged run: what is wrong is said when it is loaded


def elsewhere(settings_of, trained=False):
    """A function for configurator.parse: which tasks an unknown setting belongs to. settings_of: of a Row.

    trained: the command uses a trained model, which decides the task.
    """
    def place(name):
        tasks = [task for task, row in TASKS.items() if name in flat_fields(settings_of(row))]
        if trained and tasks and TASKS.keys() - tasks == {"text"}:
            return "this model reads text only"
        if trained and tasks:
            return f"it is for models of the task {' and '.join(tasks)} alone"
        return f"it is for {' and '.join(f'--task={task}' for task in tasks)} alone" if tasks else ""

    return place
