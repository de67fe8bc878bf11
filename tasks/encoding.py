"""What the tasks of a bidirectional encoder share: its control tokens, its making, and a start from another model.

    EncoderTask     builds a model of encoder.py, or puts a new head on the encoder of another one
    LabelledTask    is one whose data set is a LabelledDataset, with a text and its labels in each row

A text is read as [CLS], its tokens, and [SEP] where the tokenizer was made for BERT.
"""

import dataclasses

import numpy as np
import torch

from batches import LabelledDataset, fixed_rows, length_batches, padded, shuffled_rows, to_device
from configurator import UserError, say
from encoder import Encoder, EncoderConfig
from inside.picture import draw_own
from inside.record import embedding, make, namer, notes_of, packed
from machine.device import autocast
from model import init_weights
from run.cost import size_in_words
from tasks import TASKS
from tasks.labels import averaged
from tasks.task import Task
from tokenizer import marks_of

SHAPE = ("n_layer", "n_head", "n_embd", "n_hidden", "block_size", "norm", "mlp", "block", "positions")
AT_ONCE = 8192  # tokens per batch of an evaluation: it limits memory and changes no result


class EncoderTask(Task):
    """Base class. models: the first one is trained, and its class has an `encoder`."""

    counted = "the share of texts whose labels are all right"  # what the measure "accuracy" is, as text

    def __init__(self, settings, tokenizers=None, source=""):
        super().__init__(settings, tokenizers, source)
        self.known = {}  # the ids of each word that `word_ids` has read

    @property
    def marks(self):
        return marks_of(self.tokenizer)

    def own(self):
        """{name: value} of the fields that the configuration of the task's model has beside an encoder's."""
        return {}

    def build(self, generator):
        s = self.settings
        shape = {name: getattr(s, name) for name in (*SHAPE, "dropout")}
        post = s.block == "post"
        return self.new(generator, shape | {"vocab_size": self.marks.size, "embed_norm": post, "final_norm": not post})

    def new(self, generator, shape):
        """A new model. shape: {name: value} of the fields of EncoderConfig."""
        cls, config_cls = next(iter(self.models.values()))
        model = cls(config_cls(**shape, **self.own()))
        init_weights(model, generator, std=model.config.n_embd**-0.5)
        return model

    def adopt(self, model, generator):
        """The model of init_from, if it has the class and the labels; else its encoder under a new head."""
        cls, _ = next(iter(self.models.values()))
        if type(model) is cls and all(getattr(model.config, name) == value for name, value in self.own().items()):
            return model
        if not isinstance(getattr(model, "encoder", None), Encoder):
            raise UserError(f"init_from = {self.source}: is of the class {type(model).__name__}, and"
                            f" --task={self.settings.task} starts from an encoder: name a run of --task=masked,"
                            " classification or tagging, or a BERT, such as bert-base-uncased; or leave it out")
        shape = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(EncoderConfig)}
        say(f"{self.source}: its encoder gets a new head, which starts from random weights")
        new = self.new(generator, shape).to(next(model.parameters()).device)
        new.encoder.load_state_dict(model.encoder.state_dict())
        return new

    def shape(self, model):
        return {name: getattr(model.config, name) for name in SHAPE}

    def namer(self):
        """A function from an id to its text, the marks' ids among them."""
        marks = self.marks
        return namer(self.tokenizer, {marks.cls: "[CLS]", marks.sep: "[SEP]", marks.mask: "[MASK]"})

    def read_alone(self, model, ids, types):
        """Runs a model's encoder over one text. ids: framed. types: of each id, or None."""
        device = next(model.parameters()).device
        model.encoder(torch.tensor([ids], device=device), types=types and torch.tensor([types], device=device))

    def notes(self, model, ids, types=None):
        """The Notes of an encoder that reads a text. ids: framed. types: of each id, or None."""
        with notes_of(model.encoder.transformer, len(ids), both_ways=True) as notes:
            self.read_alone(model, ids, types)
        return notes

    def record(self, kind, model, ids, notes, labels, *answers):
        """A record (inside/record.py) of a text. answers: pairs of predictions and their lens, see `record.answers`."""
        name, shown = self.namer(), ids[:notes.count]
        tokens, cut = list(map(name, shown)), len(ids) - len(shown)
        tops = [tops for _, lens in answers for tops in lens["top"]]
        return make(kind, self, model, tokens, len(tokens), labels=labels,
                    notes=[f"only the first {len(tokens)} of {len(ids)} tokens are shown"] * (cut > 0),
                    predictions=[each for predictions, _ in answers for each in predictions],
                    lens={"layers": notes.layers, "top": tops} if tops else None,
                    attention=[packed("self", notes.own, tokens, tokens)],
                    embedding=embedding(model.encoder.wte, ids, name))

    def draw(self, model, ids, sampling, types=None):
        """Writes the picture sampling.attention of a text. Returns a line about it. ids: framed. types: see `notes`."""
        return draw_own(model, list(map(self.namer(), ids)), lambda: self.read_alone(model, ids, types), sampling)

    def word_ids(self, word):
        """The ids of a word, with the space before it: a list. One without ids, such as a control character, is [MASK].
        """
        if word not in self.known:
            self.known[word] = self.tokenizer.encode(word).tolist() or [self.marks.mask]
        return self.known[word]

    def framed(self, ids):
        """A text's ids with what stands around them, at most block_size: a list. A longer text loses its end."""
        marks = self.marks
        return [marks.cls, *ids[:self.room], *([] if marks.sep is None else [marks.sep])]

    @property
    def room(self):
        """The most tokens of a text, without what stands around them."""
        return self.block_size - 1 - (self.marks.sep is not None)

    def fit(self, model):
        self.block_size = model.config.block_size


class LabelledTask(EncoderTask):
    """Base class of tasks with rows of texts and labels. A subclass has

    read(row)                         the ids of a row's text, framed. row: a dict of the data set
    targets(split, rows)              ({argument of the model beside tokens and lengths: array}, weights of the targets)
    score(model, arguments, weights)  {name: (total, count)} of a batch, for `averaged`, "loss" among the names
    """

    def open(self, folder, world):
        self.dataset, self.world = LabelledDataset(folder, *TASKS[self.settings.task].kinds), world
        self.open_tokenizer(folder)

    def fit(self, model):
        """Tokenizes all rows, and chooses those to learn from."""
        super().fit(model)
        self.texts = {split: [self.read(row) for row in self.dataset.rows[split]] for split in ("train", "val", "test")}
        n, s = len(self.texts["train"]), self.settings
        wanted = getattr(s, "train_rows", 0)
        if wanted > n:
            raise UserError(f"train_rows = {wanted}: the data set {s.dataset} has only {n} training rows")
        self.rows = np.arange(n)
        if wanted:  # settings that lack it, of a published model, lack the seed too
            order = np.random.Generator(np.random.Philox(key=s.seed)).permutation(n)
            self.rows = np.sort(order[:wanted])

    def pick(self, step):
        s = self.settings
        return self.rows[shuffled_rows(len(self.rows), s.batch_size, s.seed, step)]

    def batch(self, rows, generator):
        return self.gather("train", rows)

    def gather(self, split, rows):
        """(the model's arguments, the weight of each target) for some rows of a split, on the device."""
        tokens, lengths = padded([self.texts[split][row] for row in rows], self.marks.pad)
        more, weights = self.targets(split, rows)
        arrays = {"tokens": tokens, "lengths": lengths, **more}
        device = self.world.device
        return {name: to_device(array, device) for name, array in arrays.items()}, to_device(weights, device)

    def parts(self, split, limit=0):
        """The rows of a split in batches of like length. limit: at most so many tokens, evenly spread; 0: all."""
        lengths = np.array([len(ids) for ids in self.texts[split]])
        rows, = fixed_rows(len(lengths), len(lengths), limit and max(1, int(limit / lengths.mean())))
        return [rows[part] for part in length_batches(lengths[rows], AT_ONCE)]

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": ..., "accuracy": ...}: what `score` adds up over the split, divided by what it counts."""
        def score(rows):
            arguments, weights = self.gather(split, rows)
            with autocast(world.device, dtype):
                return self.score(model, arguments, weights)

        return averaged(world, self.parts(split, limit), score)

    def summary(self, model):
        s, n = self.settings, len(self.rows)
        full = sum(len(self.texts["train"][row]) == self.block_size for row in self.rows)
        return (f"model: {size_in_words(model)}; data: {n:,} rows of {s.dataset}"
                + f", {full:,} of which fill the model's {self.block_size} tokens (a longer one is cut)" * (full > 0)
                + f"; {s.max_iters} updates = {s.max_iters * s.batch_size / n:.1f} epochs\naccuracy: {self.counted}")

    def cost(self, model):
        """(mean tokens of an update, 0: its FLOPs are not counted)."""
        return round(self.settings.batch_size * np.mean([len(self.texts["train"][row]) for row in self.rows])), 0
