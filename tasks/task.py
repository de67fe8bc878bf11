"""The contract of a task: it brings data, batches, loss, measures and samples; train.py brings the one loop.

    task, model, config = load("out")                any run, checkpoint or published model, ready to be used
    print(task.write(model, "ROMEO:", max_new_tokens=100))
"""

import dataclasses
import shlex
from pathlib import Path
from types import SimpleNamespace

import torch

import tokenizer as tokenizers
from configurator import UserError, build, flat_values, say
from lora import add_lora, merge_lora
from machine.digest import code_of
from optimizer import freeze
from published.files import load as load_published
from run import checkpoint
from run.cost import count_parameters
from tasks import TASKS, task_class, task_of


class Task:
    """rows are what a batch is made of, everywhere: positions of windows, or numbers of examples."""

    best = ("loss", min)  # the measure of `evaluate` that picks the checkpoint `best`
    whole = False  # True: each row is scored against all others, so a worker's share of an update is one piece
    models = {}  # model_type: (class, class of its configuration)
    rows_are = "the rows"  # what `where` calls them

    def __init__(self, settings, tokenizers=None, source=""):
        """Opens no data. tokenizers: of the model `source` to go on from, by name; None: the data set's."""
        self.settings, self.tokenizers, self.source = settings, tokenizers, source

    def __repr__(self):
        return f"<{type(self).__name__} of {self.source or 'a new model'}>"

    @property
    def tokenizer(self):
        return self.tokenizers["tokenizer"]

    def open(self, folder, world):
        """Opens the data set in `folder`. Raises UserError unless it fits the task and its tokenizers."""

    def build(self, generator):
        """A new model of the settings' shape."""

    def fit(self, model):
        """Called with the model before the first batch. Raises UserError unless model and data belong together."""

    def shape(self, model):
        """{setting: value} of what the model decides: these settings can't differ from it.

        Raises UserError for a setting that does nothing for this model.
        """
        return {}

    def pick(self, step):
        """The rows of the update after `step` updates: a pure function of (seed, step)."""

    def weight(self, rows):
        """The total weight of these rows' targets: known without drawing, and the same on all ranks."""
        return len(rows)

    def batch(self, rows, generator):
        """(the model's arguments by name, each target's weight), on the device. The generator draws masks and crops."""

    def loss(self, model, arguments, weights):
        """(the weighted sum of the nats of all targets, {name: another such sum, for the log})."""
        return (model(**arguments) * weights).sum(), {}

    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": ...} of a split, shared among the ranks. limit: most tokens to score; 0: all of them."""

    def details(self, model, split, world, dtype, settings, found):
        """What evaluate.py tells besides. settings: the task's own for evaluating; found: what `evaluate` returned."""
        return {}

    def sample(self, model, requests, sampling):
        """Yields (number of a request, a piece of what is shown for it). Never needs the data.

        requests: [{"text": prompt, "image": path}]. sampling: the task's settings for sampling.
        """

    def write(self, model, text="", image="", **sampling):
        """What is shown for one prompt, and one picture's file. sampling: settings such as temperature=0."""
        if sampling.get("num_samples", 1) != 1:
            raise UserError(f"num_samples = {sampling['num_samples']}: write gives one; call it with other seeds")
        sampling = TASKS[self.settings.task].sampling(**sampling, **({"image": str(image)} if image else {}))
        return "".join(piece for _, piece in self.sample(model, [{"text": text, "image": str(image)}], sampling))

    def show(self, model, short=False):
        """What a run shows at its end: an unconditioned sample. short: of at most 100 tokens, for an evaluation."""
        s = self.settings
        count = min(100, s.sample_tokens) if short else s.sample_tokens
        sampling = build(TASKS[s.task].sampling, {"max_new_tokens": count, "seed": s.seed})
        return "".join(piece for _, piece in self.sample(model, [{"text": ""}], sampling))

    def command(self, out_dir):
        """The command that tries what was trained."""
        return shlex.join(["python", "sample.py", f"--out_dir={out_dir}"])

    def finish(self):
        """Called on the main rank after the last save."""

    def where(self, rows):
        """Which rows these are, in words."""
        return f"{self.rows_are} {', '.join(map(str, rows))}"

    def summary(self, model):
        """The model and the data, in words."""
        return f"model: {count_parameters(model) / 1e6:.2f}M parameters"

    def cost(self, model):
        """(tokens, FLOPs) of an update; 0 FLOPs: unknown."""
        return self.settings.batch_size, 0

    def fingerprint(self):
        """What tells the data set from others: checksum and sizes, of its meta.json."""
        meta = self.dataset.meta if hasattr(self, "dataset") else {}
        marks = ("sha256", "train_tokens", "val_tokens", "train_rows", "val_rows")
        return {name: meta[name] for name in marks if name in meta}

    def open_tokenizer(self, folder):
        """Takes the data set's tokenizer, unless the model has one already; returns the data set's."""
        found, n_ids = tokenizers.load(folder / "tokenizer.json"), self.dataset.meta.get("vocab_size")
        if n_ids not in (None, found.vocab_size):
            raise UserError(f"{folder / 'tokenizer.json'} has {found.vocab_size} tokens, and the data set was made with"
                            f" {n_ids}: prepare it again")
        if self.tokenizers is None:
            self.tokenizers = {"tokenizer": found}
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Where models come from

def load(name, device="cpu", dtype=torch.float32, which="best", settings=None, dropout=0.0, block_size=0):
    """(task, model, config) of a run's folder, a checkpoint's, or a published model's; or of a published one's name.

    The model is in eval mode; config is config.json's. which: of a run's checkpoints, best or last. settings: None: the
    run's. block_size: fewer positions than a published GPT-2 has (0: all). Raises UserError for a bad folder.
    """
    if which not in ("best", "last"):
        raise UserError(f"which = {which}: must be best or last")
    if not Path(name).is_dir() or (Path(name) / "config.json").exists() and not checkpoint.is_run(name):
        model, found = load_published(name, device, dtype, block_size, dropout)
        s = SimpleNamespace(task=next(row for row in TASKS if kind_of(model, task_class(row).models)))
        return task_class(s.task)(s, found, name), model, {"model": dataclasses.asdict(model.config)}
    folder = checkpoint.find_any(name, which)
    saved = checkpoint.load(folder)
    config, cls = saved.config, task_class(task_of(saved.config, folder))
    if config.get("model_type") not in cls.models:
        raise UserError(f"{folder}: no {cls.__name__} has the model_type {config.get('model_type')!r}")
    task = cls(settings or SimpleNamespace(**config["settings"]), saved.tokenizers, folder)
    model_cls, config_cls = cls.models[config["model_type"]]
    shape = {key: dropout if key == "dropout" else value for key, value in config["model"].items()}
    model = checkpoint.unfilled(model_cls, config_cls(**shape), device, dtype)
    if rank := config.get("lora_rank"):
        add_lora(model, rank)
    checkpoint.fill(model, saved.state, folder)
    found = code_of(model)
    if changed := [name for name, value in config.get("code", {}).items() if found.get(name, value) != value]:
        say(f"{folder} was trained with other code of {', '.join(sorted(changed))}: it may compute something else")
    return task, model, config


def start(settings, given, folder, data, world):
    """(task, model) of a run: from its checkpoint `folder`, from init_from, or new.

    given: the settings that the user named. data: the data set's folder. task.settings are then what the run does.
    Raises UserError where data, settings and model don't belong together.
    """
    s, generator = settings, torch.Generator().manual_seed(settings.seed)
    device = "cpu" if s.shard else world.device  # a rank moves only its part of what is sharded
    if folder:
        task, model, config = load(folder, device, settings=s, dropout=s.dropout)
        task.open(data, world)
        if config.get("data", task.fingerprint()) != task.fingerprint():
            raise UserError(f"{folder} was trained on other data than the data set {s.dataset} holds now: prepare it as"
                            f" it was, or start a new run: {shlex.quote(f'--init_from={s.out_dir}')} --out_dir=NEW")
    elif s.init_from != "scratch":
        model, its_tokenizers = initial(s, device, given.get("block_size", 0))
        task = task_class(s.task)(s, its_tokenizers, s.init_from)
        task.open(data, world)
    else:
        task = task_class(s.task)(s)
        task.open(data, world)
        model = task.build(generator).to(device)
    if s.lora_rank and not folder:
        add_lora(model, s.lora_rank, generator)
    freeze(model, s.rates)
    decided = task.shape(model)
    for name in decided.keys() & given.keys():
        if given[name] not in (decided[name], ""):  # "": whatever the model has
            raise UserError(f"{name} = {given[name]!r}, but {s.init_from} has {decided[name]!r}: leave it out")
    task.settings = build(type(s), {**flat_values(dataclasses.asdict(s)), **decided})
    task.fit(model)
    task.pick(0)  # raises what is wrong with batch_size, before an earlier run is moved
    task.about = {"model_type": kind_of(model, task.models), "model": dataclasses.asdict(model.config),
                  "code": code_of(model)}  # asked before the model is sharded, which changes its classes
    return task, model


def initial(settings, device, block_size=0):
    """(model, tokenizers) that init_from names: a run's or a checkpoint's folder, or a published model."""
    name, models = settings.init_from, task_class(settings.task).models
    task, model, _ = load(name, device, dropout=settings.dropout, block_size=block_size)
    merge_lora(model)
    model.requires_grad_(True)
    if kind_of(model, models) is None:
        raise UserError(f"init_from = {name}: is a {type(model).__name__}, and --task={settings.task} trains"
                        f" {' or '.join(cls.__name__ for cls, _ in models.values())}")
    return model, task.tokenizers


def kind_of(model, models):
    """The model_type of a model, or None."""
    return next((kind for kind, (cls, _) in models.items() if type(model) is cls), None)
