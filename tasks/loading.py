"""Where models come from, and go: any run, checkpoint or published model, ready to be used, trained on or published.

    task, model, config = load("out")
    print(task.write(model, "ROMEO:", max_new_tokens=100))
"""

import dataclasses
import shlex
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import UserError, build, flat_values, say
from lora import add_lora, merge_lora
from machine.digest import code_of
from optimizer import freeze
from published import files
from run import checkpoint
from run.cost import size_in_words
from tasks import TASKS, task_class, task_of


def load(name, device="cpu", dtype=torch.float32, which="best", settings=None, dropout=0.0, block_size=0):
    """(task, model in eval mode, config). Raises UserError if the model is missing or damaged.

    name: the folder of a run, a checkpoint or a published model, or a published model's name. which: a run's
    checkpoint, best or last. settings: the task's; None: those of the run. block_size: how many positions a published
    model of text keeps; 0: all; None: a training window. config: what config.json holds; if published, only `model`.
    """
    if which not in ("best", "last"):
        raise UserError(f"which = {which}: must be best or last")
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # texts differ in length: see machine.device.cudnn_attention
    if not Path(name).is_dir() or (Path(name) / "config.json").exists() and not checkpoint.is_run(name):
        model, found = files.load(name, device, dtype, block_size, dropout)
        s = SimpleNamespace(task=next(task for task in TASKS if model_type_of(model, task_class(task).models)))
        return task_class(s.task)(s, found, name), model, {"model": dataclasses.asdict(model.config)}
    folder = checkpoint.find_any(name, which)
    saved = checkpoint.load(folder)
    config, cls = saved.config, task_class(task_of(saved.config, folder))
    if config.get("model_type") not in cls.models:
        raise UserError(f"{folder}: no {cls.__name__} has the model_type {config.get('model_type')!r}")
    task = cls(settings or SimpleNamespace(**config["settings"]), saved.tokenizers, folder)
    task.step = config.get("step")
    model_cls, config_cls = cls.models[config["model_type"]]
    shape = {key: dropout if key == "dropout" else value for key, value in config["model"].items()}
    try:
        model = checkpoint.unfilled(model_cls, config_cls(**shape), device, dtype)
    except (TypeError, UserError) as error:  # a field, or a part that it names, is gone
        raise UserError(f"{folder / 'config.json'} does not fit the code of {model_cls.__name__}: {error}; put back the"
                        " code of that run") from None
    if rank := config.get("lora_rank"):
        add_lora(model, rank, None, config["settings"].get("lora_alpha", 0), config["settings"].get("lora_targets", ""))
    found = code_of(model)
    changed = sorted(name for name, value in config.get("code", {}).items() if found.get(name, value) != value)
    since = f"the code of {', '.join(changed)} has changed since {folder} was trained" if changed else ""
    checkpoint.fill(model, saved.state, f"{folder} ({since}: put it back to load them)" if since else folder)
    if since:
        say(f"{since}: results may differ")
    return task, model, config


def publish(name, folder, which="best", dtype=torch.float32):
    """Writes a model, LoRA merged, into `folder` for transformers: see `files.save`. name, which: see `load`."""
    task, model, _ = load(name, which=which)
    merge_lora(model)
    model.requires_grad_(True)
    kind = files.save(model.to(dtype), task.tokenizers.get("tokenizer"), folder)
    print(f"published in {folder} as a {kind}, {size_in_words(model)} in {str(dtype).removeprefix('torch.')}")


def start(settings, given, folder, data, world):
    """(task, model) for a run: from its checkpoint `folder` if there is one, else from init_from, else new.

    given: {name: value} of the settings that the user named. data: the data set's folder. task.settings then have the
    model's shape, and task.about is its part of config.json. Raises UserError where data, settings and model disagree.
    """
    s, generator = settings, torch.Generator().manual_seed(settings.seed)
    device = "cpu" if s.shard else world.device  # sharding moves to the device only the rank's own part
    if folder:
        task, model, config = load(folder, device, settings=s, dropout=s.dropout)
        task.open(data, world)
        if config.get("data", task.fingerprint()) != task.fingerprint():
            raise UserError(f"{folder} was trained on other data than the data set {s.dataset} holds now: restore the"
                            f" old data, or start a new run: {shlex.quote(f'--init_from={s.out_dir}')} --out_dir=NEW")
    elif s.init_from != "scratch":
        model, its_tokenizers = initial(s, device, given.get("block_size"))
        task = task_class(s.task)(s, its_tokenizers, s.init_from)
        task.open(data, world)
        model = task.adopt(model, generator).to(device)
    else:
        task = task_class(s.task)(s)
        task.open(data, world)
        model = task.build(generator).to(device)
    task.tokenizers = task.tokenizers or {}  # None: the task has opened none
    if s.lora_rank and not folder:
        add_lora(model, s.lora_rank, generator, s.lora_alpha, s.lora_targets)
    freeze(model, s.rates)
    decided = task.shape(model)
    check_given(given, decided, s)
    task.settings = build(type(s), {**flat_values(dataclasses.asdict(s)), **decided})
    task.fit(model)
    if getattr(s, "publish", ""):
        files.layout(model, task.tokenizer)  # raises UserError for a model that can't be published
    task.pick(0)  # raises UserError for a bad batch_size, before an earlier run is moved away
    task.about = {"model_type": model_type_of(model, task.models), "model": dataclasses.asdict(model.config),
                  "code": code_of(model)}  # found before sharding, which changes the model's classes
    return task, model


def check_given(given, decided, s):
    """Raises UserError if the settings that the user named differ from those of the model, `decided`, of s.init_from.

    given, decided: {name: value}.
    """
    clashes = [name for name in given if name in decided and given[name] not in (decided[name], "")]  # "": the model's
    if clashes:
        values = ", ".join(f"{name} = {given[name]!r}" for name in clashes)
        its = ", ".join(repr(decided[name]) for name in clashes)
        instead = shlex.join(f"--{name}={decided[name]}" for name in clashes)
        start = shlex.join([f"--task={s.task}", f"--dataset={s.dataset}"])
        raise UserError(f"{values}, but {s.init_from} has {its}: leave it out (if a recipe names it, {instead} undoes"
                        f" that; or start without the recipe, with {start})")


def initial(settings, device, block_size=0):
    """(model, tokenizers) from init_from, LoRA merged, all of it to be trained. block_size: see `load`."""
    task, model, _ = load(settings.init_from, device, dropout=settings.dropout, block_size=block_size)
    merge_lora(model)
    model.requires_grad_(True)
    return model, task.tokenizers


def model_type_of(model, models):
    """The model_type of a model: the key in `models`, which is Task.models, whose class the model has; else None."""
    return next((name for name, (cls, _) in models.items() if type(model) is cls), None)
