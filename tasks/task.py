"""Task: what train.py, evaluate.py and sample.py ask of a task. Each file beside this one has a subclass of it."""

import shlex

import tokenizer as tokenizers
from configurator import UserError, build
from run.cost import size_in_words
from tasks import TASKS
from tasks.loading import publish


class Task:
    """Base class of all tasks. Rows, given by number, make a batch: offsets of text windows, or indices of examples."""

    best = ("loss", min)  # the measure of `evaluate` that picks the checkpoint `best`, and whether less is better
    whole = False  # True: each row is scored against all others of the update, so a worker can't cut its share further
    round = 1  # updates that share what `begin` draws: a run evaluates, saves and stops only after the last of them
    fixed_shapes = False  # True: all micro-batches have the same shapes, and `loss` depends on its arguments alone
    models = {}  # model_type: (class, class of its configuration)
    asked = ()  # settings of evaluate.py that change the figures of `details`, which has them under their names
    rows_label = "the rows"  # begins the text that `where` returns

    def __init__(self, settings, tokenizers=None, source=""):
        """tokenizers: {name: tokenizer} of the model loaded from `source`; None: `open` takes the data set's own."""
        self.settings, self.tokenizers, self.source = settings, tokenizers, source
        self.step = None  # the updates that a loaded checkpoint had made

    def __repr__(self):
        return f"<{type(self).__name__} of {self.source or 'a new model'}>"

    @property
    def tokenizer(self):
        return self.tokenizers["tokenizer"]

    def open(self, folder, world):
        """Opens the data set in `folder`. Raises UserError unless it fits the task and its tokenizers."""
        self.world = world

    def build(self, generator):
        """Returns a new model of the shape that the settings name. generator: for its initial weights."""

    def adopt(self, model, generator):
        """The model to start from: init_from's, or one made of its parts. Raises UserError if nothing of it fits."""
        known = {cls: cls.__name__ for cls, _ in self.models.values()}
        if type(model) not in known:
            raise UserError(f"init_from = {self.source}: is of the class {type(model).__name__}, and"
                            f" --task={self.settings.task} trains {' or '.join(known.values())}")
        return model

    def fit(self, model):
        """Called before the first batch. Raises UserError unless the model and the open data set fit together."""

    def shape(self, model):
        """{setting: value} as the model's configuration has them. Raises UserError for a setting that it lacks."""
        return {}

    def pick(self, step):
        """The rows of an update, as a pure function of (seed, step). step: how many updates were made before it."""

    def begin(self, step, model, world, dtype):
        """Called before each update, after `step` others. At a round's start the model may write what it learns of."""

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
        """Yields (index of a request, next piece of its sample). requests: [{"text": prompt, "image": path}]."""

    def inside(self, model, request, sampling):
        """The record (inside/record.py) of one pass over a request and what the model writes after it."""
        raise UserError(f"no {type(model).__name__} can be looked into yet")

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

    def command(self, out_dir, *more):
        """The shell command that samples from the run in out_dir. more: arguments that a subclass adds."""
        return shlex.join(["python", "sample.py", f"--out_dir={out_dir}", *more])

    def finish(self):
        """Called on the main rank when the run has made all updates and is saved. Publishes the best model if asked."""
        if getattr(self.settings, "publish", ""):
            publish(self.settings.out_dir, self.settings.publish)

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
        self.tokenizers = self.tokenizers or {"tokenizer": found}
        return found
