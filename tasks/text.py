"""The text task: the next token of a text, by a GPT or another language model, new or published.

    python train.py config/shakespeare_char.py

A language model is a row in MODELS. Its class has `config`, hidden(tokens), logits(x), and forward(tokens,
targets=None, places=None), which ends in `model.predict`. To write faster, see `make_caches` and `hidden` of a GPT.

Axes: B batch, T tokens of a window.
"""

import dataclasses
import itertools
import math
from shlex import quote

import torch

import tokenizer as tokenizers
from batches import Dataset, fixed_windows, random_offsets, read_windows
from configurator import UserError, check_choices, check_idle
from generate import generate, picker
from inside import record
from inside.picture import check_chosen, draw_text
from lecture import RUNGS
from machine.device import autocast
from machine.terminal import watched
from model import GPT, GPTConfig, all_blocks, init_weights
from run.cost import flops_per_token, size_in_words
from tasks.loading import model_type_of
from tasks.task import Task
from vlm import Gemma, GemmaConfig

MODELS = {  # model_type: (class, class of its configuration)
    "gpt": (GPT, GPTConfig),
    "gemma": (Gemma, GemmaConfig),
    **RUNGS,  # the lecture's models
}
SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "bias", "norm", "mlp", "n_hidden", "positions",
         "qk_norm", "tied", "bigrams")
EVAL_TOKENS = 16384  # most tokens per batch of an evaluation: it limits memory and changes no result
EVAL_LOGITS = 2**27  # most logits per batch, for the same reason


class TextTask(Task):
    models = MODELS
    fixed_shapes = True
    rows_label = "the windows at the training tokens"

    def open(self, folder, world):
        self.dataset, self.world = Dataset(folder), world
        found = self.open_tokenizer(folder)
        if not tokenizers.same_vocabulary(self.tokenizer, found):
            raise UserError(f"the data set {folder} was made with another tokenizer than the model's: prepare it with"
                            f" that one, python prepare.py SOURCE {quote(f'--tokenizer={self.source}')} --name=NEW")

    def build(self, generator):
        s = self.settings
        check_choices(s, model=MODELS)
        cls, config_cls = MODELS[s.model]
        known = [field.name for field in dataclasses.fields(config_cls) if field.name in (*SHAPE, "dropout")]
        shape = {name: getattr(s, name) for name in known if getattr(s, name) != ""}
        torch.manual_seed(s.seed)  # for a model that keeps PyTorch's own initialisation
        model = cls(config_cls(**shape, vocab_size=self.tokenizer.vocab_size))
        if all_blocks(model):
            init_weights(model, generator, zero=s.zero_init)
        else:
            check_idle(s, f"--model={s.model} has no blocks", "zero_init")
        return model

    def fit(self, model):
        self.block_size = model.config.block_size
        for split in ("train", "val"):
            self.dataset.tokens(split, self.block_size)

    def shape(self, model):
        model_type, known = model_type_of(model, MODELS), {field.name for field in dataclasses.fields(model.config)}
        check_idle(self.settings, f"--model={model_type} has no such setting", *sorted({*SHAPE, "dropout"} - known))
        return {"model": model_type, **{name: getattr(model.config, name) for name in SHAPE if name in known}}

    def pick(self, step):
        s, n = self.settings, len(self.dataset.splits["train"])
        return random_offsets(n, self.block_size, s.batch_size, s.seed, step)

    def weight(self, rows):
        return len(rows) * self.block_size

    def batch(self, rows, generator):
        windows = read_windows(self.dataset.splits["train"], rows, self.block_size, self.world.device)
        return windows, torch.ones(windows["targets"].shape, device=self.world.device)

    def eval_batch_size(self, model):
        return max(1, min(EVAL_TOKENS, EVAL_LOGITS // model.config.vocab_size) // self.block_size)

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": the mean nats of all tokens but the first}, each scored once, in adjacent windows."""
        tokens = self.dataset.tokens(split, self.block_size)
        batches = fixed_windows(len(tokens), self.block_size, self.eval_batch_size(model), limit)
        totals, count = [torch.zeros((), device=world.device)], 0
        for (offsets, length), weight in world.share(batches):  # weight: 1, or 0 for a batch that another rank counts
            windows = read_windows(tokens, offsets, length, world.device)
            with autocast(world.device, dtype):
                totals.append(weight * model(**windows).sum())
            count += weight * windows["targets"].numel()
        total, count = world.sum(torch.stack(totals).cpu().double().sum(), count)
        return {"loss": total / count}

    @torch.no_grad()
    def details(self, model, split, world, dtype, settings, found):
        """{name: number}: tokens, perplexity (None: too large), bits per character, loss of random windows or None."""
        tokens, at_once = self.dataset.tokens(split, self.block_size), self.eval_batch_size(model)
        totals = [torch.zeros((), device=world.device)]
        for i in watched(range(world.rank, settings.random_windows, world.size), "random windows"):
            offsets = random_offsets(len(tokens), self.block_size, settings.batch_size, settings.seed, i)
            for start in range(0, len(offsets), at_once):
                windows = read_windows(tokens, offsets[start:start + at_once], self.block_size, world.device)
                with autocast(world.device, dtype):
                    totals.append(model(**windows).sum())
        count = settings.random_windows * settings.batch_size * self.block_size
        estimate = world.sum(torch.stack(totals).cpu().double().sum())[0] / count if count else None
        characters = self.dataset.meta[f"{split}_characters"]
        perplexity = math.exp(found["loss"]) if found["loss"] < 700 else None  # beyond that, exp overflows
        return {"tokens": len(tokens) - 1, "perplexity": perplexity,
                "bits_per_char": found["loss"] / math.log(2) * len(tokens) / characters, "random_window_loss": estimate}

    def sample(self, model, requests, sampling):
        """Yields (index of a request, text): its prompt, then its continuation in pieces. Equal prompts are a batch."""
        device = next(model.parameters()).device
        pick, batches = picker(sampling, device), {}
        check_chosen(model, sampling)
        for index, request in enumerate(requests):
            batches.setdefault(request["text"], []).append(index)
        for text, rows in batches.items():
            tokens = torch.from_numpy(tokenizers.prompt_tokens(self.tokenizer, text)).to(device).expand(len(rows), -1)
            steps = generate(model, tokens, sampling.max_new_tokens, pick, self.tokenizer.eos)
            first = next(steps)  # prints its notices before the prompt is shown
            yield from ((row, text) for row in rows)
            texts = [tokenizers.Transcript(self.tokenizer, sampling.stop) for _ in rows]
            yield from ((rows[i], piece) for i, piece in tokenizers.transcribe(itertools.chain([first], steps), texts))
            if sampling.attention:
                yield rows[0], "\n" + draw_text(self, model, [*tokens[0].tolist(), *texts[0].ids], sampling)

    def inside(self, model, request, sampling):
        """The record of a prompt and its continuation."""
        return record.of_text("text", self, model, tokenizers.prompt_tokens(self.tokenizer, request["text"]), sampling)

    def summary(self, model):
        s, n, (tokens, _) = self.settings, len(self.dataset.splits["train"]), self.cost(model)
        return (f"model: {size_in_words(model)}; data: {n:,} tokens of {s.dataset};"
                f" {tokens:,} tokens per update, {s.max_iters} updates = {tokens * s.max_iters / n:.1f} epochs\n"
                f"a model that guesses has a loss of {math.log(model.config.vocab_size):.4f}")

    def cost(self, model):
        tokens = self.settings.batch_size * self.block_size
        return tokens, tokens * flops_per_token(model, self.block_size)
