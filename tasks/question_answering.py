"""The question-answering task: an encoder reads a question and a text, and marks the answer in the text.

    python train.py config/answer_facts.py
    python sample.py --out_dir=out/answer_facts --prompt="Who built the Orvik Bridge?" --context=FILE:page.txt
    python evaluate.py --out_dir=out/answer_facts

The model reads [CLS], the question, [SEP], the text and [SEP]; where a tokenizer has no [SEP], [MASK] stands for it.
Two logits for each word say whether an answer begins and ends there (Devlin et al. 2019): their sum over its first and
last word is an answer's score. [CLS] stands for "no answer". A text that is too long is cut into windows that overlap.
As in transformers' run_qa, the best answer has the greatest score in any window, the score of "no answer" is its least
in any, and there is no answer if it exceeds the best one's by more than a threshold.

Question and text have a token type each, as in BERT. An encoder from scratch has a third one, which marks the words of
the text that are in the question (Chen et al. 2017): to learn which they are takes an encoder long. With --block=post
the model is BERT's altogether, two types and no layer before the logits, and can be published.

Axes: B windows, W words of a window, [CLS] in front of them.
"""

import collections
import itertools
import re
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from batches import fixed_rows, length_batches, padded, to_device
from configurator import UserError, say
from encoder import Answerer, AnswererConfig
from inside.picture import check_chosen
from inside.record import answers
from machine.device import autocast
from machine.terminal import watched
from run.cost import size_in_words
from sources.questions import WORD
from sources.texts import read_file
from tasks.encoding import AT_ONCE, LabelledTask
from tasks.labels import averaged, reports, write_rows
from tasks.settings import QuestionAnswering

ON_A_CPU = 2048  # tokens per batch of answers: a CPU gains nothing by more, and loses time to padding
SHOWN = 500  # characters of a text that a run's last lines show
END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
NAME = re.compile(r"(?:[^\W\d_]*[A-Z]\w*|\d+)(?: [A-Z]\w*)*")  # a number, or words with a capital


class Window(NamedTuple):
    """What the model reads at once: a question and words of a text."""
    ids: list
    types: list  # of each id: 0 for the question, 1 for the text, and 2 for words of the text that the question has
    places: np.ndarray  # (W, 2): first and last token of [CLS] and of each word
    start: int  # the number of the first word in the text


class Span(NamedTuple):
    """The likeliest answer in a window, and none."""
    score: float  # the sum of two logits
    first: int  # word of the window
    last: int
    p: float
    null: float  # the score of no answer
    p_null: float


class Found(NamedTuple):
    """The likeliest answer in a text, text[start:end], and none."""
    start: int
    end: int
    p: float
    lead: float  # of no answer: by how much its score exceeds that of the answer
    p_null: float


class QuestionAnsweringTask(LabelledTask):
    best = ("f1", max)
    models = {"answerer": (Answerer, AnswererConfig)}
    asked = ("no_answer_threshold",)
    rows_label = "the windows"

    def new(self, generator, shape):
        of_bert = shape["block"] == "post"  # the encoder of another model keeps its types
        return super().new(generator, {"n_types": 2 if of_bert else 3, **shape, "dense": not of_bert})

    # ------------------------------------------------------------------------------------------------------------------
    # From texts to tensors

    def pieces(self, text):
        """The ids of each word of a text: a list of lists."""
        return [self.word_ids(" " * (match.start() == 0 or text[match.start() - 1].isspace()) + match[0])
                for match in WORD.finditer(text)]

    def read_for(self, model):
        """From now on, texts are cut into windows for this model. Raises UserError for a stride that is too long."""
        size, self.marked = model.config.block_size, model.config.dense and model.config.n_types > 2
        if size < 8:
            raise UserError(f"block_size = {size}: a question and a text need at least 8")
        stride = getattr(self.settings, "stride", 0)  # a published model has no settings
        if stride > size // 2:
            raise UserError(f"stride = {stride}: windows of {size} tokens can share at most half of them, {size // 2}")
        self.block_size, self.stride = size, stride or size // 3

    def windows(self, question, context):
        """The Windows of a text, at least one. A question that fills more than half of a window loses its end."""
        marks, asked, words = self.marks, self.pieces(question), self.pieces(context)
        shared = {word.lower() for word in WORD.findall(question)} if self.marked else ()
        types = [1 + (word.lower() in shared) for word in WORD.findall(context)]
        sep = marks.mask if marks.sep is None else marks.sep
        head = [marks.cls, *itertools.chain(*asked)][:max(1, self.block_size // 2)] + [sep]
        room = self.block_size - len(head) - 1
        words = [ids[:room] for ids in words]
        ends, found, start = np.cumsum([0, *map(len, words)]), [], 0
        while True:
            stop = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
            at = len(head) + ends[start:stop + 1] - ends[start]
            places = np.array([[0, *at[:-1]], [0, *at[1:] - 1]], np.int32).T
            own = [each for ids, each in zip(words[start:stop], types[start:stop]) for _ in ids]
            found.append(Window([*head, *itertools.chain(*words[start:stop]), sep], [0] * len(head) + own + [1], places,
                                start))
            if stop >= len(words):
                return found
            start = max(start + 1, int(np.searchsorted(ends, ends[stop] - min(self.stride, room // 2))))

    def fit(self, model):
        """Cuts the texts of all rows into windows, and chooses the rows to learn from.

        windows_of[split]: a list of Windows; asked_of[split]: the row of each; rows: the windows to learn from.
        """
        rows, self.windows_of, self.asked_of, self.labels = self.dataset.rows, {}, {}, {}
        super().fit(model)
        self.read_for(model)
        self.chosen = {*self.rows.tolist()}
        for split in self.texts:
            cut = [self.windows(row["question"], row["context"]) for row in rows[split]]
            self.windows_of[split] = [*itertools.chain(*cut)]
            self.asked_of[split] = np.repeat(np.arange(len(cut)), [len(found) for found in cut])
            self.texts[split] = [window.ids for window in self.windows_of[split]]
            places = [words_of_answer(row) for row in rows[split]]
            self.labels[split] = [label(places[row], window)
                                  for row, window in zip(self.asked_of[split], self.windows_of[split])]
        self.rows = np.flatnonzero(np.isin(self.asked_of["train"], [*self.chosen]))

    def read(self, row):
        return []  # `fit` reads it

    def targets(self, split, rows):
        found = self.arrays([self.windows_of[split][row] for row in rows])
        return {**found, "targets": np.array([self.labels[split][row] for row in rows])}, np.ones(len(rows), np.float32)

    def arrays(self, windows):
        """{"types": (B, S), "places": (B, W, 2), "counts": (B,)} for the model: see `Answerer`."""
        types, _ = padded([window.types for window in windows], 0)
        counts = np.array([len(window.places) for window in windows])
        places = np.zeros((len(windows), counts.max(), 2), np.int64)
        for line, window in zip(places, windows):
            line[:len(window.places)] = window.places
        return {"types": types, "places": places, "counts": counts}

    def summary(self, model):
        s, n, questions = self.settings, len(self.rows), len(self.chosen)
        without = sum(not self.dataset.rows["train"][row]["answers"]["text"] for row in self.chosen)
        return (f"model: {size_in_words(model)}; data: {questions:,} questions of {s.dataset}, {without:,} without an"
                f" answer, in {n:,} windows; {s.max_iters} updates = {s.max_iters * s.batch_size / n:.1f} epochs")

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    def parts(self, split, limit=0):
        """Windows in batches of like length, those of a row in one. limit: see `LabelledTask`."""
        lengths = np.array([len(ids) for ids in self.texts[split]])
        starts = np.flatnonzero(np.diff(self.asked_of[split], prepend=-1))
        counts = np.diff([*starts, len(lengths)])
        tokens = counts * np.maximum.reduceat(lengths, starts)
        rows, = fixed_rows(len(starts), len(starts), limit and max(1, int(limit / tokens.mean())))
        batches = length_batches(tokens[rows], AT_ONCE)
        return [np.concatenate([starts[row] + np.arange(counts[row]) for row in rows[batch]]) for batch in batches]

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": nats of a window, "exact_match", "f1": means over the questions}."""
        def score_part(part):
            arguments, _ = self.gather(split, part)
            targets = arguments.pop("targets")
            with autocast(world.device, dtype):
                logits = model(**arguments)
            nats, scores = F.cross_entropy(logits, targets, reduction="none").mean(1).sum().item(), []
            rows = self.asked_of[split][part]
            for row, group in itertools.groupby(zip(rows, part, self.spans(logits)), key=lambda each: each[0]):
                wanted = self.dataset.rows[split][row]
                group = [(self.windows_of[split][place], span) for _, place, span in group]
                scores.append(score(answer_in(wanted["context"], best_of(wanted["context"], group)), wanted))
            exact, overlap = map(sum, zip(*scores))
            return {"loss": (nats, len(part)), "exact_match": (exact, len(scores)), "f1": (overlap, len(scores))}

        return averaged(world, self.parts(split, limit), score_part)

    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: `report` of the split; with settings.test also measures and `report` of the part "test".

        The best threshold is that of the split, and the part "test" is scored with it too.
        """
        asked = {name: getattr(settings, name) for name in self.asked}
        return asked | reports(self, model, split, world, dtype, settings)

    def report(self, model, part, dtype, settings):
        """{name: value} of a part: scores of the questions with and without an answer, beside what needs no model.

        Writes the answers to answers.jsonl (answers_test.jsonl for the part "test") in settings.out_dir.
        """
        rows = self.dataset.rows[part]
        with autocast(self.world.device, dtype):
            found = self.answer(model, [(row["question"], row["context"]) for row in rows])
        result, has = {}, np.array([bool(row["answers"]["text"]) for row in rows])
        if part != "test":
            self.best_threshold = result["best threshold"] = best_threshold(rows, found)
        texts, scores = scored(rows, found, settings.no_answer_threshold)
        groups = {"": scores, ", with an answer": scores[has], ", without one": scores[~has],
                  ", best threshold": scored(rows, found, self.best_threshold)[1]}
        for name, guess in FLOORS.items():
            groups[f", {name}"] = scores_of([guess(row["question"], row["context"]) for row in rows], rows)
        result |= {"questions": len(rows), "without an answer": int((~has).sum())}
        for name, each in groups.items():
            if len(each):
                result |= {f"exact_match{name}": float(each[:, 0].mean()), f"f1{name}": float(each[:, 1].mean())}
        lines = ({**row, "found": text, "start": one.start, "p": round(one.p, 4), "lead": round(one.lead, 4)}
                 for row, text, one in zip(rows, texts, found))
        write_rows(settings, "answers", part, lines)
        return result

    # ------------------------------------------------------------------------------------------------------------------
    # Answers

    def spans(self, logits):
        """The Span of each window, of at most answer_words, from logits (B, W, 2)."""
        starts, ends = logits.float().unbind(-1)
        null, total, count = starts[:, 0] + ends[:, 0], logits.float().logsumexp(1).sum(-1), logits.size(1) - 1
        legal = torch.ones(count, count, dtype=torch.bool, device=logits.device).triu()
        legal = legal.tril(getattr(self.settings, "answer_words", QuestionAnswering.answer_words) - 1)
        both = (starts[:, 1:, None] + ends[:, None, 1:]).masked_fill(~legal, -torch.inf)  # (B, W, W)
        best, place = both.flatten(1).max(1)
        columns = (best, place // count, place % count, (best - total).exp(), null, (null - total).exp())
        return [Span(*each) for each in zip(*(column.tolist() for column in columns))]

    def answer(self, model, pairs):
        """The Found for each (question, text)."""
        return [best_of(text, found) for (_, text), found in zip(pairs, self.ask(model, pairs))]

    @torch.inference_mode()
    def ask(self, model, pairs):
        """[(Window, its Span)] for each (question, text)."""
        self.read_for(model)
        device = next(model.parameters()).device
        cut = [self.windows(*pair) for pair in pairs]
        windows = [*itertools.chain(*cut)]
        spans, most = [None] * len(windows), AT_ONCE if device.type == "cuda" else ON_A_CPU
        for part in watched(length_batches(np.array([len(each.ids) for each in windows]), most), "answering"):
            tokens, lengths = padded([windows[i].ids for i in part], self.marks.pad)
            arrays = {"tokens": tokens, "lengths": lengths, **self.arrays([windows[i] for i in part])}
            arguments = {name: to_device(array, device) for name, array in arrays.items()}
            if lengths.min() == lengths.max():
                arguments["lengths"] = None  # without padding there is nothing to hide, which is faster
            logits = model(**arguments)
            for i, span in zip(part, self.spans(logits)):
                spans[i] = span
        every = iter(zip(windows, spans))
        return [[*itertools.islice(every, len(own))] for own in cut]

    def sample(self, model, requests, sampling):
        """Yields (index of a request, piece): for each line, a question, its answer with its place in the text."""
        check_chosen(model, sampling)
        for index, request in enumerate(requests):
            questions, text = self.questions_of(model, request, sampling)
            if sampling.attention and len(questions) > 1:
                raise UserError("attention: needs a --prompt of one question")
            every = self.ask(model, [(question, text) for question in questions])
            for number, (question, found) in enumerate(zip(questions, every)):
                answer = shown(text, best_of(text, found), sampling.no_answer_threshold)
                yield index, "\n" * (number > 0) + f"{question}\n" * (len(questions) > 1) + answer
            if sampling.attention:
                window, _ = max(found, key=score_of)
                yield index, "\n"
                yield index, self.draw(model, window.ids, sampling, window.types)

    def questions_of(self, model, request, sampling):
        """(questions, the text with the answers) of a request. Raises UserError if there is nothing to read."""
        text, questions = sampling.context, [line.strip() for line in request["text"].split("\n") if line.strip()]
        if text.startswith("FILE:"):
            text = "".join(read_file(Path(text.removeprefix("FILE:")), keep=True))
        if not re.search(r"\w", text):
            raise UserError(f"context = {sampling.context:.60}: there is no word in this text")
        if not questions or not all(re.search(r"\w", question) for question in questions):
            raise UserError(f"prompt = {request['text'].strip()!r:.60}: is no question: add --prompt with one, or"
                            " --prompt=FILE:path with one on each line")
        self.read_for(model)
        self.check_words(questions, text)
        return questions, text

    def inside(self, model, request, sampling):
        """The record of a question and the window of the text that has the likeliest answer.

        Two distributions over its words: at [CLS] that of the answer's first one, at the last token that of its last.
        """
        (question, *others), text = self.questions_of(model, request, sampling)
        if others:
            raise UserError("prompt: the page shows one question")
        (found,) = self.ask(model, [(question, text)])
        (window, span), answer, threshold = max(found, key=score_of), best_of(text, found), sampling.no_answer_threshold
        notes, names = self.notes(model, window.ids, window.types), names_in(text, window)
        places = to_device(window.places.astype(np.int64), notes.stream[0].device)
        parts = answers(notes, lambda x: model.head(x).float().gather(0, places).T, lambda x: x, [0, notes.count - 1],
                        "likeliest", names.__getitem__)
        marked = range(window.places[span.first + 1][0], window.places[span.last + 1][1] + 1)
        labels = ["answer" * (i in marked and answer.lead <= threshold) for i in range(notes.count)]
        for each in parts[0]:
            labels[each["at"]] = each["top"][0][0]
        record = self.record("answers", model, window.ids, notes, labels, parts)
        record["notes"] += [shown(text, answer, threshold),
                            "the first token says where the answer begins, the last one where it ends"]
        if len(found) > 1:
            record["notes"].append(f"the text has {len(found)} windows; this one has the likeliest answer")
        return record

    def check_words(self, questions, text):
        """Names words that the model does not know, and counts questions that are cut, on stderr."""
        if cut := sum(sum(map(len, self.pieces(question))) >= self.block_size // 2 for question in questions):
            say(f"questions that fill half of the model's {self.block_size} tokens, and lose their end: {cut} of"
                f" {len(questions)}")
        if hasattr(self.tokenizer, "unknown") and (unknown := self.tokenizer.unknown(" ".join([*questions, text]))):
            say(f"words that the model does not know, {len(unknown)}: {', '.join(unknown):.200}")

    def show(self, model, short=False):
        """Questions of the validation part with the answers found: ten, or if short three."""
        rows, count = self.dataset.rows["val"], 3 if short else 10
        rows = rows[::max(1, len(rows) // count)][:count]
        found, lines = self.answer(model, [(row["question"], row["context"]) for row in rows]), []
        for row, one in zip(rows, found):
            text, right = answer_in(row["context"], one), row["answers"]["text"] or [""]
            wrong = f"  (right: {right[0] or 'no answer'})" * (normal(text) not in map(normal, right))
            lines.append(f"{row['question']} -> {text or 'no answer'}{wrong}")
        return "\n".join(lines)

    def command(self, out_dir):
        row = min(self.dataset.rows["val"], key=lambda row: len(row["context"]))
        context = row["context"] if len(row["context"]) <= SHOWN else "FILE:page.txt"
        return super().command(out_dir, f"--prompt={row['question']}", f"--context={context}")


def words_of_answer(row):
    """The numbers of the first and last word of a row's first answer in its text; None if there is no answer."""
    if not row["answers"]["text"]:
        return None
    start = row["answers"]["answer_start"][0]
    end = start + len(row["answers"]["text"][0])
    spans = [match.span() for match in WORD.finditer(row["context"])]
    inside = [i for i, (one, other) in enumerate(spans) if one < end and start < other]
    if not inside:
        raise UserError(f"the answer {row['answers']['text'][0]!r:.60} is not in its text at answer_start = {start}:"
                        " prepare the data set again")
    return inside[0], inside[-1]


def label(place, window):
    """The numbers of an answer's first and last word in a window; (0, 0) if it is not there. place: in its text."""
    if place is None:
        return 0, 0
    first, last = (word - window.start + 1 for word in place)
    return (first, last) if 0 < first and last < len(window.places) else (0, 0)


def score_of(pair):
    """The score of a (Window, Span)."""
    return pair[1].score


def names_in(text, window):
    """What stands for [CLS] and each word of a window in a record; a word that has occurred is counted."""
    counts, names = collections.Counter(), ["no answer"]
    for word in itertools.islice(WORD.findall(text), window.start, window.start + len(window.places) - 1):
        counts[word] += 1
        names.append(word if counts[word] == 1 else f"{word} ({counts[word]})")
    return names


def best_of(text, found):
    """The Found of a text, from the (Window, Span) of all its windows."""
    window, best = max(found, key=score_of)
    none = min((span for _, span in found), key=lambda span: span.null)
    words = [match.span() for match in WORD.finditer(text)]
    start, end = words[window.start + best.first][0], words[window.start + best.last][1]
    return Found(start, end, best.p, none.null - best.score, none.p_null)


def answer_in(text, found, threshold=0.0):
    """The answer; "" if the lead of no answer is above the threshold."""
    return "" if found.lead > threshold else text[found.start:found.end]


def shown(text, found, threshold):
    """An answer with its place and probability, and below it its sentence, in which it is marked."""
    answer = answer_in(text, found, threshold)
    if not answer:
        return f"no answer  (probability {found.p_null:.2f})"
    before = [match.end() for match in END_OF_SENTENCE.finditer(text, 0, found.start)]
    after = END_OF_SENTENCE.search(text, found.end)
    start, end = before[-1] if before else 0, after.start() if after else len(text)
    return (f"{answer}  (characters {found.start} to {found.end}, probability {found.p:.2f})\n"
            f"  {' '.join(f'{text[start:found.start]}[{answer}]{text[found.end:end]}'.split())}")


# ----------------------------------------------------------------------------------------------------------------------
# Measures and floors

def normal(text):
    """The text as SQuAD compares it: lower case, without punctuation and articles, with single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(found, right):
    """The harmonic mean of precision and recall of the words of an answer; if one has no words: are they equal?"""
    found, right = normal(found).split(), normal(right).split()
    same = sum((collections.Counter(found) & collections.Counter(right)).values())
    return 2 * same / (len(found) + len(right)) if found and right else float(found == right)


def score(text, row):
    """(exact match, F1) of an answer, "" for none: the best over the row's right answers."""
    right = [each for each in row["answers"]["text"] if normal(each)] or [""]
    return max(float(normal(text) == normal(each)) for each in right), max(f1(text, each) for each in right)


def scores_of(texts, rows):
    """(n, 2): exact match and F1 of each answer."""
    return np.array([score(text, row) for text, row in zip(texts, rows)])


def scored(rows, found, threshold):
    """([the answer to each row, "" for none], `scores_of` them)."""
    texts = [answer_in(row["context"], one, threshold) for row, one in zip(rows, found)]
    return texts, scores_of(texts, rows)


def best_threshold(rows, found):
    """The threshold at which the mean F1 of the answers is greatest; of equals, the least.

    It is the lead of one of them, as in SQuAD's script (Rajpurkar et al. 2018), or below all: no question is answered.
    """
    leads = np.array([one.lead for one in found])
    gains = scored(rows, found, np.inf)[1][:, 1] - scored(rows, found, -np.inf)[1][:, 1]
    order = np.argsort(leads)
    candidates, totals = np.r_[leads.min() - 1, leads[order]], np.r_[0, gains[order].cumsum()]
    last = np.r_[np.diff(candidates) > 0, True]  # of equal leads: one threshold answers them all
    return float(candidates[last][totals[last].argmax()])


def first_name(question, text):
    """The first word of the text with a capital, but the one at its start; "" if there is none."""
    return next((match[0] for match in re.finditer(r"\b[A-Z]\w*", text) if match.start()), "")


def likest_sentence(question, text):
    """The sentence of the text that shares most words with the question; of equals, the first."""
    asked = {*normal(question).split()}
    return max(END_OF_SENTENCE.split(text), key=lambda sentence: len(asked & {*normal(sentence).split()}))


def new_name(question, text):
    """The first name or number in the likest sentence, after its first word, that is not in the question; or ""."""
    sentence = likest_sentence(question, text)
    names = (match[0] for match in NAME.finditer(sentence) if match.start() or " " in match[0])
    return next((name for name in names if name not in question), "")


FLOORS = {"no answer": lambda question, text: "", "first capital": first_name, "likest sentence": likest_sentence,
          "new name in it": new_name}
