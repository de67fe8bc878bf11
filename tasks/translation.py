"""The translation task: an encoder-decoder reads a sentence and writes its translation (Vaswani et al. 2017).

    python train.py config/translate_en_it.py
    python sample.py --out_dir=out/translate_en_it --prompt="Click the button to save the document."
    python evaluate.py --out_dir=out/translate_en_it --beam=4

The encoder reads the source and its <eos>. The decoder reads <bos> and the target, and predicts the target and <eos>.
A batch holds sentences of like length, and --batch_size counts its tokens: of both languages, padding included.

Axes: B sentences, S source tokens, T target tokens, L decoder blocks, H heads, V vocabulary.
"""

import collections
import functools
import itertools
import math
import re
import shlex
from typing import NamedTuple

import numpy as np
import torch

import tokenizer as tokenizers
from batches import PairsDataset, batches_per_epoch, fixed_rows, length_batches, padded, to_device, token_batches
from beam import beam_search
from configurator import UserError, say
from generate import generate, picker
from inside import record
from inside.attention import cross_attention
from inside.picture import check_chosen, draw
from machine.device import autocast
from machine.terminal import watched
from model import init_weights
from run.cost import size_in_words
from seq2seq import Seq2Seq, Seq2SeqConfig
from tasks.labels import mean_nats, write_rows
from tasks.settings import Translating
from tasks.task import Task
from tokenizer import same_vocabulary

SHAPE = ("n_layer", "n_encoder_layer", "n_head", "n_embd", "n_hidden", "block_size", "bias", "norm", "mlp", "block",
         "positions", "tied")
AT_ONCE = 8192  # tokens per batch of an evaluation or a translation: it limits memory
CHUNK = 2048  # lines of a text that are sorted by length and translated before their translations are shown
BUCKETS = ((1, 5), (6, 10), (11, 20), (21, 40), (41, math.inf))  # words of a source sentence


class Translated(NamedTuple):
    text: str
    ids: list  # of the tokens, without eos
    score: float = 0.0  # see `beam_search`; 0 without a beam


class TranslationTask(Task):
    models = {"seq2seq": (Seq2Seq, Seq2SeqConfig)}
    asked = ("beam", "length_penalty")
    rows_label = "the sentence pairs"

    @property
    def source_tokenizer(self):
        return self.tokenizers.get("tokenizer_source", self.tokenizer)

    def open(self, folder, world):
        self.dataset, self.world = PairsDataset(folder), world
        names = ["tokenizer"] if self.dataset.meta["shared"] else ["tokenizer", "tokenizer_source"]
        found = {name: tokenizers.load(folder / f"{name}.json") for name in names}
        self.tokenizers = self.tokenizers or found
        if self.tokenizers.keys() != found.keys() or not all(
                same_vocabulary(self.tokenizers[name], found[name]) for name in names):
            raise UserError(f"the data set {folder} was made with other tokenizers than the model's: prepare it with"
                            f" them, python prepare.py SOURCE {shlex.quote(f'--tokenizer={self.source}')} --name=NEW")

    def build(self, generator):
        s = self.settings
        shape = {name: getattr(s, name) for name in (*SHAPE, "dropout") if getattr(s, name) != ""}
        config = Seq2SeqConfig(**shape, shared=self.dataset.meta["shared"], vocab_size=self.tokenizer.vocab_size,
                               source_vocab_size=self.source_tokenizer.vocab_size)
        model = Seq2Seq(config)
        init_weights(model, generator, std=config.n_embd**-0.5)
        return model

    def fit(self, model):
        """Finds the pairs that fit the model's block_size. The others are left out, and `summary` counts them."""
        most, self.lengths, self.rows = model.config.block_size, {}, {}
        for split, lengths in self.dataset.lengths.items():
            self.lengths[split] = np.asarray(lengths) + 1  # with <eos>, or <bos>
            self.rows[split] = np.flatnonzero((self.lengths[split] <= most).all(1))
            if not len(self.rows[split]):
                raise UserError(f"block_size = {most}: no pair of the {split} split is that short; the shortest needs"
                                f" {self.lengths[split].max(1).min()}")

    def shape(self, model):
        return {name: getattr(model.config, name) for name in SHAPE}

    def pick(self, step):
        s, rows = self.settings, self.rows["train"]
        return rows[token_batches(self.lengths["train"][rows], s.batch_size, s.seed, step)]

    def piece(self, rows):
        s = self.settings
        return -(-len(rows) * s.micro_batch_size // s.batch_size)

    def weight(self, rows):
        return int(self.lengths["train"][rows, 1].sum())

    def batch(self, rows, generator):
        return self.gather("train", rows)

    def gather(self, split, rows):
        """(the model's arguments, the targets' weights (B, T): 0 at padding) for some rows of a split.

        Arguments: source (B, S), lengths (B,), tokens (B, T), targets (B, T).
        """
        sources, targets = zip(*(self.dataset.ids(split, row) for row in rows))
        bos, eos, pad = self.tokenizer.bos, self.tokenizer.eos, self.tokenizer.pad
        source, lengths = padded([[*ids, self.source_tokenizer.eos] for ids in sources], self.source_tokenizer.pad)
        tokens, _ = padded([[bos, *ids] for ids in targets], pad)
        wanted, counts = padded([[*ids, eos] for ids in targets], pad)
        weights = (np.arange(wanted.shape[1]) < counts[:, None]).astype(np.float32)
        arrays = {"source": source, "lengths": lengths, "tokens": tokens, "targets": wanted}
        device = self.world.device
        return {name: to_device(array, device) for name, array in arrays.items()}, to_device(weights, device)

    def loss(self, model, arguments, weights):
        """(the smoothed loss, {"plain_loss": the loss without smoothing}); smoothing: Szegedy et al. 2016."""
        e = self.settings.smoothing
        nats, uniform = model(**arguments, smoothing=True)
        plain = (nats * weights).sum()
        return (1 - e) * plain + e * (uniform * weights).sum(), {"plain_loss": plain}

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats of a target token}, without smoothing. limit: in target tokens; 0: all."""
        rows, lengths = self.rows[split], self.lengths[split]
        chosen, = fixed_rows(len(rows), len(rows), limit and max(1, int(limit / lengths[rows, 1].mean())))
        rows = rows[chosen]
        batches = [rows[part] for part in length_batches(lengths[rows].max(1), AT_ONCE)]
        return mean_nats(model, world, dtype, batches, functools.partial(self.gather, split))

    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: perplexity and `report` of the split; with settings.test also of the part "test".

        Writes the translations to translations.jsonl (and translations_test.jsonl) in settings.out_dir.
        """
        result = {"beam": settings.beam, "length_penalty": settings.length_penalty,
                  "perplexity": math.exp(min(found["loss"], 700))}
        for part in [split, *["test"] * settings.test]:
            start = "" if part == split else "test "
            if start:
                loss = self.evaluate(model, part, world, dtype)["loss"]
                result |= {"test loss": loss, "test perplexity": math.exp(min(loss, 700))}
            report = world.from_main(functools.partial(self.report, model, part, dtype, settings))
            result |= {start + name: value for name, value in report.items()}
        return result

    def report(self, model, part, dtype, settings):
        """{name: value}: BLEU, chrF and exact matches of a part's translations, beside what needs no model."""
        rows = self.dataset.rows[part]
        sources, wanted = ([row[side] for row in rows] for side in ("source", "target"))
        texts = self.tokens_of(sources, model.config.block_size, cut=True)
        with autocast(self.world.device, dtype):
            how = Translating(beam=settings.beam, length_penalty=settings.length_penalty)
            written = [best[0].text for best in self.translate(model, texts, how)]
        lines = ({"source": a, "target": b, "translation": c} for a, b, c in zip(sources, wanted, written))
        write_rows(settings, "translations", part, lines)
        train = self.dataset.rows["train"]
        near = nearest([row["source"] for row in train], sources)
        bleu, chrf, signature = measures(written, wanted)
        result = {"sentences": len(rows), "bleu": bleu, "chrf": chrf,
                  "exact": sum(map(str.__eq__, written, wanted)) / len(rows)}
        floors = {"source copied": sources, "nearest sentence": [train[i]["target"] for i in near]}
        if part == "train":  # each sentence would be its own nearest
            del floors["nearest sentence"]
        for name, texts in floors.items():
            result |= dict(zip((f"bleu, {name}", f"chrf, {name}"), measures(texts, wanted)))
        for low, high in BUCKETS:
            chosen = [i for i, text in enumerate(sources) if low <= len(text.split()) <= high]
            if chosen:
                name = f"{low} to {high} words" if high < math.inf else f"{low} words or more"
                result[f"bleu, {name} ({len(chosen)})"] = measures(*([texts[i] for i in chosen]
                                                                     for texts in (written, wanted)))[0]
        return {**result, "signature": signature}

    def show(self, model, short=False):
        """Sentences of the validation split with the model's translations, as text: ten, or if short three."""
        rows, count = self.dataset.rows["val"], 3 if short else 10
        rows = [rows[i] for i in self.rows["val"][::max(1, len(self.rows["val"]) // count)][:count]]
        sources = self.tokens_of([row["source"] for row in rows], model.config.block_size, cut=True)
        written = self.translate(model, sources, Translating())
        return "\n".join(f"{row['source']}\n  {best.text}"
                         + f"\n  (right: {row['target']})" * (best.text != row["target"])
                         for row, (best,) in zip(rows, written))

    def command(self, out_dir):
        prompt = self.dataset.rows["val"][int(self.rows["val"][0])]["source"]
        return super().command(out_dir, f"--prompt={prompt}")

    def summary(self, model):
        s, kept, total = self.settings, self.rows["train"], len(self.lengths["train"])
        epochs = s.max_iters / self.updates_per_epoch()
        return (f"model: {size_in_words(model)}; data: {len(kept):,} sentence pairs of {s.dataset}"
                + f", {total - len(kept):,} others are longer than block_size" * (total > len(kept))
                + f"; {self.cost(model)[0]:,} target tokens per update, {s.max_iters} updates = {epochs:.1f} epochs\n"
                f"a model that guesses has a loss of {math.log(model.config.vocab_size):.4f}")

    def cost(self, model):
        """(mean target tokens of an update, 0: its FLOPs are not counted)."""
        return round(self.weight(self.rows["train"]) / self.updates_per_epoch()), 0

    def updates_per_epoch(self):
        return batches_per_epoch(self.lengths["train"][self.rows["train"]], self.settings.batch_size)

    # ------------------------------------------------------------------------------------------------------------------
    # Translating

    def tokens_of(self, texts, most, cut=False):
        """The ids of source texts, each with its eos. most: the model's block_size. cut: shorten a longer text.

        Raises UserError for a text longer than that. Unknown words are named on stderr.
        """
        tokenizer, found, unknown = self.source_tokenizer, [], {}
        for text in texts:
            ids = tokenizer.encode(text)
            if len(ids) >= most and not cut:
                raise UserError(f"the sentence {text!r:.60} has {len(ids)} tokens, and the model reads at most"
                                f" {most - 1}: split it")
            if hasattr(tokenizer, "unknown"):
                unknown |= dict.fromkeys(tokenizer.unknown(text))
            found.append([*ids[:most - 1], tokenizer.eos])
        if unknown:
            say(f"words that the model does not know, {len(unknown)}: {', '.join(unknown):.200}")
        return found

    @torch.inference_mode()
    def translate(self, model, sources, sampling):
        """For each source, the list of its translations, best first, as Translated. Without a beam there is one.

        sources: lists of ids, from `tokens_of`. They are translated in batches of like length.
        """
        found, eos, beam = [None] * len(sources), self.tokenizer.eos, sampling.beam
        if beam > model.config.vocab_size:
            raise UserError(f"beam = {beam}: is wider than the vocabulary of {model.config.vocab_size} tokens")
        pick = picker(sampling, next(model.parameters()).device)
        batches = length_batches(np.array([len(ids) for ids in sources]), AT_ONCE // beam)
        for rows in watched(batches, "translating"):
            start, count, context = self.prepare(model, [sources[row] for row in rows], sampling.max_new_tokens)
            if beam > 1:
                several = beam_search(model, start, count, beam, eos, sampling.length_penalty, **context)
            else:
                steps = torch.stack(list(generate(model, start, count, pick, eos, **context)), dim=1)  # (B, T)
                several = [[(ids, 0.0)] for ids in steps.tolist()]
            for row, hypotheses in zip(rows, several):
                found[row] = [self.translated(ids, score) for ids, score, *_ in hypotheses]
        return found

    def translated(self, ids, score):
        """The Translated of a hypothesis. ids: of the target; what follows its eos is left out."""
        ids = list(itertools.takewhile(lambda i: i != self.tokenizer.eos, map(int, ids)))
        special = (self.tokenizer.pad, self.tokenizer.bos)
        return Translated(self.tokenizer.decode([i for i in ids if i not in special]).strip(), ids, float(score))

    def prepare(self, model, sources, count):
        """(<bos> for each source (B, 1), most tokens of a translation, the context for `generate`)."""
        device = next(model.parameters()).device
        source, lengths = (torch.from_numpy(array).to(device) for array in padded(sources, self.source_tokenizer.pad))
        start = torch.full((len(sources), 1), self.tokenizer.bos, device=device)
        return start, min(count, model.config.block_size), model.encode(source, lengths)

    def sample(self, model, requests, sampling):
        """Yields (index of a request, piece): the translation of each line of its text; an empty line stays empty.

        With n_best above 1, a line gets that many, each after its score, and then an empty line. show_steps and
        attention need a text of one line; see `steps` and `draw`.
        """
        most = model.config.block_size
        for index, request in enumerate(requests):
            lines = sentences_of(request["text"])
            for name in ("show_steps", "attention"):
                if getattr(sampling, name) and (len(lines) > 1 or not lines[0]):
                    raise UserError(f"{name}: needs a --prompt of one sentence")
            check_chosen(model, sampling)
            tokens = iter(self.tokens_of(filter(None, lines), most))  # all of them, so that errors come first
            for start in range(0, len(lines), CHUNK):
                chunk = lines[start:start + CHUNK]
                sources = list(itertools.islice(tokens, sum(map(bool, chunk))))
                if sampling.show_steps:
                    yield from ((index, line) for line in self.steps(model, sources[0], sampling))
                written = iter(self.translate(model, sources, sampling))
                shown = [shown_best(next(written), sampling.n_best) if line else "" for line in chunk]
                yield index, "\n" * (start > 0) + "\n".join(shown)
            if sampling.attention:
                yield index, "\n"
                yield index, self.draw(model, sources[0], sampling)

    @torch.inference_mode()
    def steps(self, model, source, sampling):
        """Yields a line for each token of a translation as it comes: its probability, and the likeliest tokens."""
        pick, seen = picker(sampling, next(model.parameters()).device), []

        def spy(logits):
            chosen = pick(logits)
            seen.append(logits[0].softmax(-1))
            return chosen

        start, count, context = self.prepare(model, [source], sampling.max_new_tokens)
        for number, chosen in enumerate(generate(model, start, count, spy, self.tokenizer.eos, **context), start=1):
            p, ids = seen[-1].topk(min(3, len(seen[-1])))
            others = ", ".join(f"{self.name(i)} {share:.3f}" for i, share in zip(ids.tolist(), p.tolist()))
            i = chosen.item()
            yield f"{number:4}  {self.name(i):20} {seen[-1][i].item():.3f}   likeliest: {others}\n"

    def name(self, i, tokenizer=None):
        """A token of the target as text, its spaces as middle dots; a special one by its name."""
        tokenizer = tokenizer or self.tokenizer
        special = {getattr(tokenizer, name): f"<{name}>" for name in ("pad", "bos", "eos")}
        return special.get(i) or tokenizer.decode([i]).replace(" ", "\u00b7") or repr(i)

    def best_ids(self, model, source, sampling):
        """The ids of the best translation, with its eos unless it was cut off. source: ids."""
        ids = self.translate(model, [source], sampling)[0][0].ids
        cut = len(ids) == min(sampling.max_new_tokens, model.config.block_size)
        return ids if cut else [*ids, self.tokenizer.eos]

    def inside(self, model, request, sampling):
        """The record of a sentence and its best translation, with three kinds of attention: cross, self and encoder."""
        lines, most = sentences_of(request["text"]), model.config.block_size
        if len(lines) > 1 or not lines[0]:
            raise UserError("the prompt has more or less than one line: a look inside needs one sentence")
        source, = self.tokens_of(lines, most)
        ids, device = [self.tokenizer.bos, *self.best_ids(model, source, sampling)], next(model.parameters()).device
        with record.notes_of(model.encoder, len(source), both_ways=True) as reading:
            context = model.encode(*(torch.tensor(row, device=device) for row in ([source], [len(source)])))
        with record.notes_of(model.decoder, len(ids[:most])) as notes:
            model.hidden(torch.tensor([ids[:most]], device=device), **context)
        unread = ids[most] if len(ids) > most else None
        tokens, written, parts = record.next_tokens(self, notes, model.logits, ids[:most], 1, unread)
        sources = list(map(record.namer(self.source_tokenizer), source))
        read = sources[:reading.count]
        return record.make("translation", self, model, tokens, written, **parts, source=sources,
                           embedding=record.embedding(model.wte, ids, record.namer(self.tokenizer)),
                           attention=[record.packed("cross", notes.cross, tokens, sources[:notes.cross[0].size(-1)]),
                                      record.packed("self", notes.own, tokens, tokens),
                                      record.packed("encoder", reading.own, read, read)])

    def draw(self, model, source, sampling):
        """Writes a picture of where each token of the best translation looks in the source. Returns a line about it.

        source: ids. For the blocks and heads that are drawn, see `inside.attention.draw`.
        """
        target = self.best_ids(model, source, sampling)
        rows = ([source], [len(source)], [[self.tokenizer.bos, *target[:-1]]])
        rows = (torch.tensor(row, device=next(model.parameters()).device) for row in rows)
        weights = cross_attention(model, *rows)[:, 0]  # (L, H, T, S)
        names = [self.name(i) for i in target], [self.name(i, self.source_tokenizer) for i in source]
        return draw(weights.cpu(), *names, sampling)


def sentences_of(text):
    """The lines of a prompt, their spaces single. Raises UserError for no text."""
    if not text:
        raise UserError("this model translates: add --prompt with a sentence, or --prompt=FILE:path")
    return [" ".join(line.split()) for line in text.removesuffix("\n").split("\n")]


def shown_best(hypotheses, n_best):
    """The text of the best translation. With n_best above 1: a line with score and text for each, and an empty line."""
    if n_best == 1:
        return hypotheses[0].text
    return "".join(f"{each.score:.4f}\t{each.text}\n" for each in hypotheses[:n_best])


# ----------------------------------------------------------------------------------------------------------------------
# Measures

def measures(written, wanted):
    """(BLEU, chrF, signature of BLEU) of translations, by sacrebleu (Post 2018), cased. written, wanted: texts."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError("BLEU and chrF need sacrebleu: pip install sacrebleu") from None
    bleu = BLEU()
    score = bleu.corpus_score(written, [wanted]).score
    return score, CHRF().corpus_score(written, [wanted]).score, f"BLEU {bleu.get_signature()}"


def nearest(texts, queries):
    """For each query, the index of the text with the largest cosine of their tf-idf vectors: a list."""
    postings = collections.defaultdict(list)  # word: [(text, how often it is there)]
    for i, text in enumerate(texts):
        for word, count in words(text).items():
            postings[word].append((i, count))
    table, squares = {}, np.zeros(len(texts))
    for word, found in postings.items():
        rows, counts = np.array(found).T
        idf = 1 + math.log((1 + len(texts)) / (1 + len(rows)))
        table[word] = rows, counts * idf**2
        squares[rows] += (counts * idf)**2
    lengths, result = np.sqrt(np.maximum(squares, 1e-9)), []
    for query in watched(queries, "finding the nearest sentences"):
        scores = np.zeros(len(texts))
        for word, count in words(query).items():
            if word in table:
                rows, weights = table[word]
                scores[rows] += count * weights
        result.append(int((scores / lengths).argmax()))
    return result


def words(text):
    return collections.Counter(re.findall(r"\w+", text.lower()))
