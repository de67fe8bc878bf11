"""The text task: the next token of a text, by a GPT or another language model, new or published.

    python train.py config/shakespeare_char.py

A language model is a row in MODELS. Its class has `config`, forward(tokens, targets=None, places=None) as
`model.predict` has it, hidden(tokens, caches, start), logits(x), and make_caches(rows, size) or none.

Axes: B batch, T tokens of a window.
"""

import dataclasses
import itertools
import math
from shlex import quote

import numpy as np
import torch

import tokenizer as tokenizers
from batches import Dataset, fixed_windows, random_offsets, read_windows
from configurator import UserError, check_choices, check_idle
from generate import generate, picker
from machine.device import autocast
from machine.terminal import watched
from model import GPT, GPTConfig, all_blocks, init_weights
from run.cost import count_parameters, flops_per_token
from tasks.task import Task, kind_of
from vlm import Gemma, GemmaConfig

MODELS = {  # model_type: (class, class of its configuration)
    "gpt": (GPT, GPTConfig),
    "gemma": (Gemma, GemmaConfig),
}
SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "bias", "mlp", "positions", "tied", "bigrams")
EVAL_TOKENS = 16384  # tokens per batch of an evaluation: memory, not a result, depends on it


class TextTask(Task):
    models = MODELS
    rows_are = "the windows at the training tokens"

    def open(self, folder, world):
        self.dataset, self.world = Dataset(folder), world
        found = self.open_tokenizer(folder)
        if not tokenizers.same_vocabulary(self.tokenizer, found):
            raise UserError(f"the data set {folder} was made with another tokenizer than the model's: prepare its text"
                            f" with that, python prepare.py SOURCE {quote(f'--tokenizer={self.source}')} --name=NEW")

    def build(self, generator):
        s = self.settings
        check_choices(s, model=MODELS)
        cls, config_cls = MODELS[s.model]
        known = {field.name for field in dataclasses.fields(config_cls)}
        shape = {name: getattr(s, name) for name in (*SHAPE, "dropout") if name in known and getattr(s, name) != ""}
        torch.manual_seed(s.seed)  # for a model that keeps PyTorch's own initialisation
        model = cls(config_cls(**shape, vocab_size=self.tokenizer.vocab_size))
        if all_blocks(model):
            init_weights(model, generator, zero=s.zero_init)
        else:
            check_idle(s, f"a {s.model} has no blocks", "zero_init")
        return model

    def fit(self, model):
        self.block_size = model.config.block_size
        for split in ("train", "val"):
            self.dataset.tokens(split, self.block_size)

    def shape(self, model):
        kind, known = kind_of(model, MODELS), {field.name for field in dataclasses.fields(model.config)}
        lacking = [name for name in (*SHAPE, "dropout") if name not in known]
        check_idle(self.settings, f"a {kind} has no such setting", *lacking)
        return {"model": kind, **{name: getattr(model.config, name) for name in SHAPE if name in known}}

    def pick(self, step):
        s, n = self.settings, len(self.dataset.splits["train"])
        return random_offsets(n, self.block_size, s.batch_size, s.seed, step)

    def weight(self, rows):
        return len(rows) * self.block_size

    def batch(self, rows, generator):
        windows = read_windows(self.dataset.splits["train"], rows, self.block_size, self.world.device)
        return windows, torch.ones(windows["targets"].shape, device=self.world.device)

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """Every token but the first is scored once, in windows side by side."""
        tokens, T = self.dataset.tokens(split, self.block_size), self.block_size
        totals, count = [torch.zeros(())], 0
        for (offsets, length), counts in world.share(fixed_windows(len(tokens), T, max(1, EVAL_TOKENS // T), limit)):
            windows = read_windows(tokens, offsets, length, world.device)
            with autocast(world.device, dtype):
                totals.append(counts * model(**windows).sum().cpu())
            count += counts * windows["targets"].numel()
        total, count = world.sum(torch.stack(totals).double().sum(), count)
        return {"loss": total / count}

    @torch.no_grad()
    def details(self, model, split, world, dtype, settings, found):
        """Beside the loss: perplexity, bits per character, and nanoGPT's estimate, the mean loss of random windows."""
        tokens, total = self.dataset.tokens(split, self.block_size), 0.0
        for i in watched(range(world.rank, settings.random_windows, world.size), "random windows"):
            offsets = random_offsets(len(tokens), self.block_size, settings.batch_size, settings.seed, i)
            with autocast(world.device, dtype):
                total += model(**read_windows(tokens, offsets, self.block_size, world.device)).mean().item()
        estimate = world.sum(total)[0] / settings.random_windows if settings.random_windows else None
        characters = self.dataset.meta[f"{split}_characters"]
        return {"tokens": len(tokens) - 1, "perplexity": math.exp(found["loss"]),
                "bits_per_char": found["loss"] / math.log(2) * len(tokens) / characters,
                "random_window_loss": estimate}

    def sample(self, model, requests, sampling):
        """Each prompt, and what continues it. Requests with the same prompt are one batch."""
        device = next(model.parameters()).device
        pick, batches = picker(sampling, device), {}
        for index, request in enumerate(requests):
            batches.setdefault(request["text"], []).append(index)
        for text, rows in batches.items():
            tokens = torch.from_numpy(prompt_tokens(self.tokenizer, text)).to(device).expand(len(rows), -1)  # (B, T)
            steps = generate(model, tokens, sampling.max_new_tokens, pick, self.tokenizer.eos)
            first = next(steps)  # what it says on stderr comes before the prompt
            yield from ((row, text) for row in rows)
            texts = [tokenizers.Transcript(self.tokenizer, sampling.stop) for _ in rows]
            for i, piece in tokenizers.transcribe(itertools.chain([first], steps), texts):
                yield rows[i], piece

    def summary(self, model):
        s, n, (tokens, _) = self.settings, len(self.dataset.splits["train"]), self.cost(model)
        return (f"model: {count_parameters(model) / 1e6:.2f}M parameters; data: {n:,} tokens of {s.dataset};"
                f" {tokens:,} tokens per update, {s.max_iters} updates = {tokens * s.max_iters / n:.1f} epochs\n"
                f"a loss of {math.log(model.config.vocab_size):.4f} is guessing")

    def cost(self, model):
        tokens = self.settings.batch_size * self.block_size
        return tokens, tokens * flops_per_token(model, self.block_size)


def prompt_tokens(tokenizer, prompt):
    """The prompt's ids; for an empty one what a text starts with: the end of another, a new line, or id 0."""
    if prompt:
        try:
            return tokenizer.encode(prompt)
        except UserError as error:
            raise UserError(f"prompt: {error}") from None
    if tokenizer.eos is not None:
        return np.array([tokenizer.eos])
    try:
        return tokenizer.encode("\n")
    except UserError:
        return np.zeros(1, dtype=np.int64)
