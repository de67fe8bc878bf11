"""What can be trained. A task brings its data, its model, its batches and its measure; train.py brings the one loop.

The loop knows of a task: model, tokenizer, micro_batches(step, world), val_loss(world, dtype), its width,
tokens_per_update, flops_per_update(), describe() and show().
"""

import math

import numpy as np
import torch

import checkpoint
import sample
import tokenizer as tokenizers
from batches import Dataset, gather, random_offsets
from configurator import UserError
from evaluate import split_loss
from model import GPT, GPTConfig, count_parameters, flops_per_token, init_weights
from prepare import locate

SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias")  # settings that a checkpoint's model decides


class Task:
    """What all tasks share: where the model comes from, and how a batch is divided.

    Raises UserError where the data, the settings and the model to start from don't belong together.
    """

    def __init__(self, settings, given, device):
        self.settings, self.device = settings, device
        self.load_data(locate(settings.dataset))
        if settings.resume:
            folder = checkpoint.find(settings.out_dir, "last")
            self.model, its_tokenizer, _ = checkpoint.load(folder, device, settings.dropout)
            if not tokenizers.same_vocabulary(self.tokenizer, its_tokenizer):
                raise UserError(f"{folder} has another tokenizer than the data set {settings.dataset} has now")
        else:
            self.model = self.new_model(given, torch.Generator().manual_seed(settings.seed)).to(device)
        self.check()

    def micro_batches(self, step, world):
        """This rank's share of the batch of update step + 1: the model's arguments and the weight of each micro-batch.

        The weights make the mean over ranks of the weighted losses the mean over the batch. Which sequences make up
        the batch, and what dropout does to each micro-batch, follows from (seed, step) alone.
        """
        s, n = self.settings, self.settings.gradient_accumulation_steps
        pieces = np.split(self.batch_rows(step), world.size * n)
        scored = [self.count_scored(rows) for rows in pieces]
        for piece in range(world.rank * n, (world.rank + 1) * n):
            if s.dropout:
                torch.manual_seed(int(np.random.SeedSequence((s.seed, step, piece)).generate_state(1, np.uint64)[0]))
            yield self.gather(pieces[piece]), scored[piece] * world.size / sum(scored)


class Text(Task):
    """Next-token prediction on a text: a GPT, new or published."""

    def load_data(self, folder):
        self.dataset = Dataset(folder)
        self.tokenizer = tokenizers.load(folder / "tokenizer.json")

    def new_model(self, given, generator):
        s = self.settings
        if s.init_from == "scratch":
            shape = {name: getattr(s, name) for name in (*SHAPE, "dropout")}
            model = GPT(GPTConfig(**shape, vocab_size=self.tokenizer.vocab_size))
            init_weights(model, s.n_layer, generator)
            return model
        model, its_tokenizer = checkpoint.load_initial(s.init_from, self.device, given.get("block_size", 0), s.dropout)
        for name in SHAPE:
            if name in given and given[name] != getattr(model.config, name):
                raise UserError(f"{name} = {given[name]!r}, but {s.init_from} has {getattr(model.config, name)!r}:"
                                " leave it out")
        if not tokenizers.same_vocabulary(self.tokenizer, its_tokenizer):
            raise UserError(f"the data set {s.dataset} was not made with the tokenizer of {s.init_from}:"
                            " prepare it with that one")
        return model

    def check(self):
        self.block_size, self.width = self.model.config.block_size, self.model.config.n_embd
        self.tokens = {split: self.dataset.tokens(split, self.block_size) for split in ("train", "val")}
        self.tokens_per_update = self.settings.batch_size * self.block_size

    def batch_rows(self, step):
        return random_offsets(len(self.tokens["train"]), self.block_size, self.settings.batch_size, self.settings.seed,
                              step)

    def count_scored(self, rows):
        return len(rows) * self.block_size

    def gather(self, rows):
        return gather(self.tokens["train"], rows, self.block_size, self.device)

    def val_loss(self, world, dtype):
        return split_loss(self.model, self.tokens["val"], self.block_size, world, dtype, self.settings.eval_tokens)[0]

    def flops_per_update(self):
        return self.tokens_per_update * flops_per_token(self.model, self.block_size)

    def describe(self):
        n, s = len(self.tokens["train"]), self.settings
        return (f"model: {count_parameters(self.model) / 1e6:.2f}M parameters; data: {n:,} tokens of {s.dataset};"
                f" {self.tokens_per_update:,} tokens per update, {s.max_iters} updates ="
                f" {self.tokens_per_update * s.max_iters / n:.1f} epochs\n"
                f"a loss of {math.log(self.model.config.vocab_size):.4f} is guessing")

    def show(self):
        """A sample of what the model writes by now."""
        wanted = sample.Settings(max_new_tokens=self.settings.sample_tokens, seed=self.settings.seed)
        return sample.continuations(self.model.eval(), self.tokenizer, "", wanted)[0]


TASKS = {"text": Text}
