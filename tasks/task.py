"""Task, the interface of train.py's one loop to data, batches, loss, measures and samples; and `load`, for a model.

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
from run.cost import size_in_words
from tasks import TASKS, task_class, task_of


class Task:
    """Base class of all tasks. Rows, given by number, make a batch: offsets of text windows, or indices of examples."""

    best = ("loss", min)  # the measure of `evaluate` that picks the checkpoint `best`, and whether less is better
    whole = False  # True: each row is scored against all others of the update, so a worker can't cut its share further
    models = {}  # model_type: (class, class of its configuration)
    rows_label = "the rows"  # begins the text that `where` returns

    def __init__(self, settings, tokenizers=None, source=""):
        """tokenizers: {name: tokenizer} of the model loaded from `source`; None: `open` takes the data set's own."""
        self.settings, self.tokenizers, self.source = settings, tokenizers, source

    def __repr__(self):
        return f"<{type(self).__name__} of {self.source or 'a new model'}>"

    @property
    def tokenizer(self):
        return self.tokenizers["tokenizer"]

    def open(self, folder, world):
        """Opens the data set in `folder`. Raises UserError unless it fits the task and its tokenizers."""

    def build(self, generator):
        """Returns a new model of the shape that the settings name. generator: for its initial weights."""

    def fit(self, model):
        """Called before the first batch. Raises UserError unless the model and the open data set fit together."""

    def shape(self, model):
        """{setting: value} as the model's configuration has them. Raises UserError for a setting that it lacks."""
        return {}

    def pick(self, step):
        """The rows of an update, as a pure function of (seed, step). step: how many updates were made before it."""

    def piece(self, rows):
        """How many of an update's rows make a micro-batch."""
        return self.settings.micro_batch_size or len(rows) // self.world.size

    def weight(self, rows):
        """The sum of the weights that `batch` would give these rows' targets, found without making the batch."""
        return len(rows)

    def batch(self, rows, generator):
        """({argument of the model: tensor}, weight of each target), on the device. generator: for masks or crops."""

    def loss(self, model, arguments, weights):
        """(the weighted sum of the nats of all targets, {name: another such sum, for the log})."""
        return (model(**arguments) * weights).sum(), {}

    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats, name: other measure} of a split, the same on every rank. limit: in tokens; 0: all."""

    def details(self, model, split, world, dtype, settings, found):
        """{name: value} that evaluate.py adds to `found`, the result of `evaluate`. settings: evaluate.py's."""
        return {}

    def sample(self, model, requests, sampling):
        """Yields (index of a request, next piece of its sample), without the data set.

        requests: [{"text": prompt, "image": path}]. sampling: the task's settings for sampling.
        """

    def write(self, model, text="", image="", **sampling):
        """Returns one sample. text: the prompt. image: a file, if the task has images. sampling: temperature=0, ..."""
        if sampling.get("num_samples", 1) != 1:
            raise UserError(f"num_samples = {sampling['num_samples']}: write returns one sample; call it for each seed")
        sampling = TASKS[self.settings.task].sampling(**sampling, **({"image": str(image)} if image else {}))
        return "".join(piece for _, piece in self.sample(model, [{"text": text, "image": str(image)}], sampling))

    def show(self, model, short=False):
        """Text that a run shows at its end: a sample without prompt. short: at most 100 tokens, for an evaluation."""
        s = self.settings
        count = min(100, s.sample_tokens) if short else s.sample_tokens
        sampling = build(TASKS[s.task].sampling, {"max_new_tokens": count, "seed": s.seed})
        return "".join(piece for _, piece in self.sample(model, [{"text": ""}], sampling))

    def command(self, out_dir):
        """The shell command that samples from the run in out_dir."""
        return shlex.join(["python", "sample.py", f"--out_dir={out_dir}"])

    def finish(self):
        """Called on the main rank when the run has made all updates and is saved. A task may publish its model here."""

    def where(self, rows):
        """Text that names these rows, such as "the rows 3, 5"."""
        return f"{self.rows_label} {', '.join(map(str, rows))}"

    def summary(self, model):
        """Text that sums up the model and the data, shown when a run starts."""
        return f"model: {size_in_words(model)}"

    def cost(self, model):
        """(tokens, FLOPs) of an update, over all workers. FLOPs are 0 if unknown."""
        return self.settings.batch_size, 0

    def fingerprint(self):
        """{name: value} by which a resumed run knows its data set: the checksum and sizes in meta.json."""
        meta = self.dataset.meta if hasattr(self, "dataset") else {}
        marks = ("sha256", "train_tokens", "val_tokens", "train_rows", "val_rows")
        return {name: meta[name] for name in marks if name in meta}

    def open_tokenizer(self, folder):
        """Returns the data set's tokenizer, and makes it the task's unless a loaded model has brought its own."""
        found, size = tokenizers.load(folder / "tokenizer.json"), self.dataset.meta.get("vocab_size")
        if size not in (None, found.vocab_size):
            raise UserError(f"{folder / 'tokenizer.json'} has {found.vocab_size} tokens, and the data set was made with"
                            f" {size}: prepare the data set again")
        if self.tokenizers is None:
            self.tokenizers = {"tokenizer": found}
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Where models come from

def load(name, device="cpu", dtype=torch.float32, which="best", settings=None, dropout=0.0, block_size=0):
    """(task, model in eval mode, config). Raises UserError if the model is missing or damaged.

    name: the folder of a run, a checkpoint or a published model, or a published model's name. which: a run's
    checkpoint, best or last. settings: the task's; None: those of the run. block_size: how many positions to keep of a
    published GPT-2; 0: all. config is what config.json holds; of a published model it has only the entry `model`.
    """
    if which not in ("best", "last"):
        raise UserError(f"which = {which}: must be best or last")
    if not Path(name).is_dir() or (Path(name) / "config.json").exists() and not checkpoint.is_run(name):
        model, found = load_published(name, device, dtype, block_size, dropout)
        s = SimpleNamespace(task=next(task for task in TASKS if model_type_of(model, task_class(task).models)))
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
        say(f"the code of {', '.join(sorted(changed))} has changed since {folder} was trained: results may differ")
    return task, model, config


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
    task.pick(0)  # raises UserError for a bad batch_size, before an earlier run is moved away
    task.about = {"model_type": model_type_of(model, task.models), "model": dataclasses.asdict(model.config),
                  "code": code_of(model)}  # found before sharding, which changes the model's classes
    return task, model


def initial(settings, device, block_size=0):
    """(model, tokenizers) from init_from, LoRA merged. block_size: see `load`. UserError if the task can't train it."""
    name, models = settings.init_from, task_class(settings.task).models
    task, model, _ = load(name, device, dropout=settings.dropout, block_size=block_size)
    merge_lora(model)
    model.requires_grad_(True)
    if model_type_of(model, models) is None:
        raise UserError(f"init_from = {name}: is a {type(model).__name__}, and --task={settings.task} trains"
                        f" {' or '.join(cls.__name__ for cls, _ in models.values())}")
    return model, task.tokenizers


def model_type_of(model, models):
    """The model_type of a model: the key in `models`, which is Task.models, whose class the model has; else None."""
    return next((name for name, (cls, _) in models.items() if type(model) is cls), None)
