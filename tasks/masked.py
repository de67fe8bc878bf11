"""The masked task: an encoder predicts hidden tokens of a text from those on both sides (Devlin et al. 2019, BERT).

    python train.py config/masked_shakespeare.py
    python sample.py --out_dir=out/masked_shakespeare --prompt="What, ho! Who calls so l[MASK]ud?"
    python sample.py --init_from=bert-base-uncased --prompt="Click the [MASK] to save."
    python sample.py --init_from=FOLDER --prompt="How do I print?" --rank=FILE:questions.txt    the likest texts

A row is a window of the text after [CLS]. A fixed share of its tokens is chosen, and predicted: 80 % of these are
replaced by [MASK], 10 % by a random token, and 10 % stay, so that the model can't tell which tokens are right.

Axes: B rows, S tokens of a row with [CLS], A chosen ones, V vocabulary.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from batches import fixed_windows, length_batches, padded, random_offsets, to_device
from configurator import UserError, say
from encoder import EncoderConfig, MaskedLM, SentenceConfig, SentenceEncoder, vectors
from inside.picture import check_chosen
from inside.record import answers
from machine.device import autocast
from run.cost import size_in_words
from sources.texts import read_file
from tasks.encoding import AT_ONCE, EncoderTask
from tasks.labels import averaged
from tasks.text import TextTask

MASK = "[MASK]"
SHOWN = 24  # tokens of a window that `show` and `command` print


class MaskedTask(EncoderTask):
    models = {"masked": (MaskedLM, EncoderConfig), "sentences": (SentenceEncoder, SentenceConfig)}
    fixed_shapes = True
    rows_label = TextTask.rows_label
    counted = "the share of hidden tokens that the model finds likeliest"
    open = TextTask.open

    def fit(self, model):
        super().fit(model)
        self.window = self.block_size - len(self.framed([]))  # tokens of the text in a row
        for split in ("train", "val"):
            self.dataset.tokens(split, self.window)

    def pick(self, step):
        s, n = self.settings, len(self.dataset.splits["train"])
        return random_offsets(n, self.window, s.batch_size, s.seed, step)

    def weight(self, rows):
        return len(rows) * self.chosen(self.window)

    def chosen(self, length):
        """How many of `length` tokens are predicted."""
        return max(1, round(self.settings.mask_rate * length))

    def batch(self, rows, generator):
        tokens = self.read("train", rows, self.window)
        arguments = self.hide(tokens, self.chosen(self.window), generator)
        arguments = {name: to_device(tensor.numpy(), self.world.device) for name, tensor in arguments.items()}
        return arguments, torch.ones(arguments["targets"].shape, device=self.world.device)

    def read(self, split, offsets, length):
        """Windows of a split, framed: int64 (B, S). offsets: where in the split each one starts."""
        tokens = self.dataset.splits[split]
        return torch.tensor(np.stack([self.framed(tokens[offset:offset + length].tolist()) for offset in offsets]))

    def hide(self, tokens, count, generator):
        """Chooses `count` tokens of each row, and hides most of them: a dict of tokens (B, S), targets, places (B, A).

        tokens: (B, S), framed. All draws come from the generator.
        """
        B, S = tokens.shape
        last = S - len(self.framed([])) + 1  # one beyond the last token of the text
        places = torch.rand(B, last - 1, generator=generator).argsort(1)[:, :count].sort(1).values + 1  # not [CLS]
        targets = tokens.gather(1, places)
        fate = torch.rand(B, count, generator=generator)
        drawn = torch.randint(self.tokenizer.vocab_size, (B, count), generator=generator)
        seen = torch.where(fate < 0.9, drawn, targets).masked_fill(fate < 0.8, self.marks.mask)
        return {"tokens": tokens.scatter(1, places, seen), "targets": targets, "places": places}

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats of the hidden tokens, "accuracy": how many are the likeliest} in adjacent windows.

        The first window of a batch seeds the draws, so evaluations with the same limit hide the same tokens.
        """
        def score(batch):
            offsets, length = batch
            generator = torch.Generator().manual_seed(int(offsets[0]))
            hidden = self.hide(self.read(split, offsets, length), self.chosen(length), generator)
            hidden = {name: tensor.to(world.device) for name, tensor in hidden.items()}
            targets = hidden.pop("targets")
            with autocast(world.device, dtype):
                logits = model(**hidden)  # (B, A, V)
            nats, right = F.cross_entropy(logits.mT, targets, reduction="sum"), logits.argmax(-1) == targets
            return {"loss": (nats.item(), targets.numel()), "accuracy": (right.sum().item(), targets.numel())}

        n = len(self.dataset.tokens(split, self.window))
        return averaged(world, fixed_windows(n, self.window, max(1, AT_ONCE // self.block_size), limit), score)

    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: perplexity, and what knowing how often each token occurs in training would reach."""
        say(f"accuracy: {self.counted}")
        V = self.tokenizer.vocab_size
        counts = np.bincount(self.dataset.splits["train"][:10**8], minlength=V) + 1.0  # 1: for those that never occur
        shares = np.bincount(self.dataset.splits[split][:10**8], minlength=V) / len(self.dataset.splits[split][:10**8])
        return {"perplexity": math.exp(min(found["loss"], 700)),
                "loss, frequencies alone": float(-(shares * np.log(counts / counts.sum())).sum()),
                "accuracy, most frequent token": float(shares[counts.argmax()])}

    def summary(self, model):
        s, n = self.settings, len(self.dataset.splits["train"])
        tokens = s.batch_size * self.window
        return (f"model: {size_in_words(model)}; data: {n:,} tokens of {s.dataset}; {tokens:,} tokens per update,"
                f" {self.chosen(self.window)} of {self.window} hidden in each row, {s.max_iters} updates ="
                f" {tokens * s.max_iters / n:.1f} epochs\n"
                f"a model that guesses has a loss of {math.log(model.config.vocab_size):.4f}; accuracy: {self.counted}")

    def cost(self, model):
        """(tokens of an update, 0: its FLOPs are not counted)."""
        return self.settings.batch_size * self.block_size, 0

    # ------------------------------------------------------------------------------------------------------------------
    # Filling blanks, and ranking texts

    def sample(self, model, requests, sampling):
        """Yields (index of a request, text): the likeliest tokens for each [MASK], or with `rank` the likest texts."""
        self.block_size = model.config.block_size
        for index, request in enumerate(requests):
            if not request["text"]:
                raise UserError(f"the prompt is empty: add --prompt with a text that has a {MASK}, or with --rank")
            check_chosen(model, sampling)
            yield index, (self.rank if sampling.rank else self.fill)(model, request["text"], sampling)
            if sampling.attention:
                yield index, "\n"
                yield index, self.draw(model, self.read_prompt(request["text"]), sampling)

    def inside(self, model, request, sampling):
        """The record of a text, with what the model says of each of its tokens, hidden or not."""
        self.block_size = model.config.block_size
        ids = self.read_prompt(request["text"])
        notes, marks, found = self.notes(model, ids), self.marks, []
        at = [i for i, token in enumerate(ids[:notes.count]) if token not in (marks.cls, marks.sep)]
        if isinstance(model, MaskedLM) and at:
            there = [None if ids[i] == marks.mask else ids[i] for i in at]
            found.append(answers(notes, lambda x: x[at], lambda x: self.of_texts(model.logits(x)), at, there,
                                 self.namer()))
        return self.record("masked", model, ids, notes, [], *found)

    def read_prompt(self, text):
        """The ids of a text, framed, in which [MASK] may stand for tokens. Raises UserError for too long a one."""
        ids, most = self.ids_of(text), self.block_size - len(self.framed([]))
        if len(ids) > most:
            raise UserError(f"the prompt has {len(ids)} tokens, and the model reads at most {most}: shorten it")
        return self.framed(ids)

    def fill(self, model, text, sampling):
        """The text with the likeliest token at each [MASK]; then, for each [MASK], a line for each likely token."""
        if not isinstance(model, MaskedLM):
            raise UserError("this model has no head that predicts tokens: use --rank=FILE:path, which compares texts")
        if MASK not in text:
            raise UserError(f"the prompt has no {MASK}: write {MASK} for each token that the model shall find")
        ids = self.read_prompt(text)
        places = [place for place, i in enumerate(ids) if i == self.marks.mask]
        p = self.probabilities(model, ids, places)  # (A, V)
        ids = np.array(ids)
        ids[places] = p.argmax(-1).cpu()
        lines = [self.text_of(ids)]
        for number, row in enumerate(p, start=1):
            lines.append(f"{MASK} {number}" if len(places) > 1 else MASK)
            shares, tokens = row.topk(min(sampling.top or len(row), self.tokenizer.vocab_size))
            lines += [f"  {share:.3f}  {self.name(i)}" for share, i in zip(shares.tolist(), tokens.tolist())]
        return "\n".join(lines)

    @torch.no_grad()
    def probabilities(self, model, ids, places):
        """The probabilities of the tokens at some places of a text, (A, V). ids: framed, with [MASK] at the places."""
        device = next(model.parameters()).device
        logits = model(torch.tensor([ids], device=device), places=torch.tensor([places], device=device))[0]
        return self.of_texts(logits).softmax(-1)

    def of_texts(self, logits):
        """The logits (A, V), in place, without the marks that no text holds."""
        marks = self.marks
        for mark in (marks.cls, marks.mask, marks.sep, marks.pad if marks.sep is not None else None):
            if mark is not None:
                logits[:, mark] = -math.inf
        return logits

    def ids_of(self, text):
        """The ids of a text in which [MASK] may stand for tokens: a list, without what `framed` adds."""
        joined = len(self.tokenizer.encode("a a")) == 2  # a word's token brings the space before it along
        *before, last = text.split(MASK)
        ids = []
        for part in before:
            ids += [*self.tokenizer.encode(part.removesuffix(" ") if joined else part).tolist(), self.marks.mask]
        return ids + self.tokenizer.encode(last).tolist()

    def text_of(self, ids):
        """The text of framed ids, without the marks around it."""
        return self.tokenizer.decode([i for i in map(int, ids) if i not in self.marks[:3]])

    def text_after(self, before, ids):
        """The text that ids add to that of the ids before them: a part of a word continues it, without BERT's ##."""
        start, whole = self.tokenizer.decode(before), self.tokenizer.decode([*before, *ids])
        return whole[len(start):] if whole.startswith(start) else self.tokenizer.decode(ids)  # else: half a character

    def name(self, i, before=()):
        """A token as text, its spaces as middle dots; one that is no character, or a line end, as Python writes it.

        before: ids before it, see `text_after`.
        """
        text = self.text_after(before, [i])
        return text.replace(" ", "\u00b7") if text.isprintable() and text else repr(text)

    def rank(self, model, text, sampling):
        """Lines with the texts of a file that are most like `text`, each after the cosine of their vectors."""
        whole = "".join(read_file(Path(sampling.rank.removeprefix("FILE:"))))
        lines = [line.strip() for line in whole.split("\n") if line.strip()]
        if not lines:
            raise UserError(f"rank = {sampling.rank}: has no text")
        found = self.vectors(model, [text, *lines])
        cosines = found[1:] @ found[0]
        shares, rows = cosines.topk(min(sampling.top or len(lines), len(lines)))
        return "\n".join(f"{share:6.3f}  {lines[row]}" for share, row in zip(shares.tolist(), rows.tolist()))

    @torch.no_grad()
    def vectors(self, model, texts):
        """The vectors of texts, (n, C), on the CPU. Texts longer than the model reads are cut, which is said."""
        device, ids = next(model.parameters()).device, list(map(self.ids_of, texts))
        framed = [self.framed(row) for row in ids]
        if cut := sum(len(row) < len(its) + len(self.framed([])) for row, its in zip(framed, ids)):
            say(f"{cut} of {len(texts)} texts are longer than {self.block_size} tokens: their ends were not read")
        found = torch.zeros(len(texts), model.config.n_embd)
        at_once = 512 if device.type == "cpu" else AT_ONCE  # a CPU gains nothing from more, and small batches pad less
        for rows in length_batches(np.array(list(map(len, framed))), at_once):
            tokens, lengths = (torch.from_numpy(array).to(device) for array in
                               padded([framed[row] for row in rows], self.marks.pad))
            found[rows] = vectors(model.encoder, tokens, lengths).float().cpu()
        return found

    def show(self, model, short=False):
        """The beginnings of windows of the validation split, with hidden tokens: {predicted} or {predicted|right}."""
        count, size = 1 if short else 3, min(SHOWN, self.window)
        offsets = np.arange(count) * (len(self.dataset.splits["val"]) - size) // count
        rows, texts = self.read("val", offsets, size), []
        generator = torch.Generator().manual_seed(0)
        for tokens in rows:
            places = (torch.randperm(size, generator=generator)[:self.chosen(size)] + 1).sort().values
            hidden = tokens.scatter(0, places, self.marks.mask)
            found = self.probabilities(model, hidden.tolist(), places.tolist()).argmax(-1).tolist()
            ids, pieces, start = tokens[1:size + 1].tolist(), [], 0
            for place, i in zip((places - 1).tolist(), found):
                names = [self.name(each, ids[:place]) for each in dict.fromkeys((i, ids[place]))]
                pieces += [self.text_after(ids[:start], ids[start:place]), f"{{{'|'.join(names)}}}"]
                start = place + 1
            texts.append("".join([*pieces, self.text_after(ids[:start], ids[start:])]))
        return "\n".join(["hidden tokens as {found} or {found|right}:", *texts])

    def command(self, out_dir):
        ids = self.dataset.splits["val"][:min(SHOWN, self.window)].tolist()
        half = len(ids) // 2
        text = f"{self.tokenizer.decode(ids[:half])}{MASK}{self.text_after(ids[:half + 1], ids[half + 1:])}"
        text = " ".join(text.split())
        return super().command(out_dir, f"--prompt={text}")
