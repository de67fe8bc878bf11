"""The tagging task: an encoder gives each word of a sentence a label, and the sentence itself one.

    python train.py config/tag_flights.py
    python sample.py --out_dir=out/tag_flights --prompt="show me flights to mars on tuesday"
    python evaluate.py --out_dir=out/tag_flights --picture=out/tag_flights/intents.png

A word's label is its tag: B-city begins a span of words that name a city, I-city continues it, and O is in no span. A
sentence's label is its intent. The tag of a word that has several tokens is predicted at the first of them.

Axes: B sentences, W words of a sentence.
"""

import collections
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from batches import length_batches, padded, to_device
from configurator import UserError, say
from encoder import Tagger, TaggerConfig
from inside.picture import check_chosen
from inside.record import answers
from machine.device import autocast
from machine.terminal import watched
from run.files import write_text
from run.pictures import draw_map, save_picture
from sources.labelled import WORD
from tasks.classification import bag_of
from tasks.encoding import AT_ONCE, LabelledTask
from tasks.labels import averages, decide, installed, of_part, reports, write_rows

NONE, UNKNOWN = -1, -2  # instead of a label's id: the word or sentence has no label, or one that the model lacks
WORST = 10  # labels that an evaluation shows; it writes all of them to a file


class Found(NamedTuple):
    """The likeliest labels of a sentence, and their probabilities. What the model does not label is empty."""
    tags: list  # of the words
    p_tags: list
    intent: str
    p_intent: float


class TaggingTask(LabelledTask):
    best = ("accuracy", max)  # not the loss: that of the intents rises when the model is ever surer of its few errors
    models = {"tagger": (Tagger, TaggerConfig)}
    rows_label = "the sentences"

    def own(self):
        """{"tags": names, "intents": names} of what the model learns: all that the data set has, or what --learn names.

        Raises UserError if the data set has no such labels.
        """
        s, meta = self.settings, self.dataset.meta
        found = {name: tuple(meta[name]) if s.learn in ("both", name) else () for name in ("tags", "intents")}
        if not any(found.values()):
            raise UserError(f"learn = {s.learn}: the data set {s.dataset} has no {s.learn}; leave it out")
        if s.hide_rate and not found["tags"]:
            raise UserError(f"hide_rate = {s.hide_rate}: is for words with tags, and there are none; leave it out")
        return found

    # ------------------------------------------------------------------------------------------------------------------
    # From words to tensors

    def pieces(self, words):
        """The ids of each word: a list of lists."""
        return [self.word_ids(" " * (i > 0) + word) for i, word in enumerate(words)]

    def places(self, words):
        """The position of each word's first token, as far as the model sees them: a list, perhaps shorter."""
        starts = itertools.accumulate(map(len, self.pieces(words)), initial=1)  # [CLS] is at 0
        return [start for start, _ in zip(starts, words) if start <= self.room]

    def ids_of(self, words):
        return self.framed(list(itertools.chain.from_iterable(self.pieces(words))))

    def read(self, row):
        return self.ids_of(row["words"])

    def fit(self, model):
        super().fit(model)
        names = {name: getattr(model.config, name) for name in ("tags", "intents")}
        self.ids = {name: {label: i for i, label in enumerate(labels)} for name, labels in names.items()}
        if not any(self.ids[name].keys() & set(self.dataset.meta[name]) for name in names):
            raise UserError(f"the data set {self.dataset.folder} has none of the labels that the model has learned,"
                            f" such as {', '.join(itertools.chain(*names.values())):.60}: name another --dataset")
        kinds = [name for name, ids in zip(("words", "sentences"), self.ids.values()) if ids]
        what = "mean of the shares" if len(kinds) > 1 else "share"
        self.counted = f"the {what} of {' and of '.join(kinds)} with the right label"
        self.labels = {split: list(map(self.labels_of, self.dataset.rows[split])) for split in self.texts}
        self.counts = np.array([(sum(i >= 0 for i in tags), intent >= 0) for _, tags, intent in self.labels["train"]])

    def labels_of(self, row):
        """(places, tag ids, intent id) of a row. A word that is cut off has the place 0 and an UNKNOWN tag."""
        places, count = self.places(row["words"]), len(row["words"])
        cut = count - len(places)
        tags, intent = [NONE] * count, NONE
        if self.ids["tags"] and row["tags"]:
            tags = [self.ids["tags"].get(tag, UNKNOWN) for tag in row["tags"]]
            tags[count - cut:] = [UNKNOWN] * cut
        if self.ids["intents"] and row["intent"]:
            intent = self.ids["intents"].get(row["intent"], UNKNOWN)
        return places + [0] * cut, tags, intent

    def targets(self, split, rows):
        """({"places": (B, W), "tags": (B, W), "intents": (B,)}, weights (2, B, W)): see `Tagger`."""
        places, tags, intents = zip(*(self.labels[split][row] for row in rows))
        (places, _), (tags, _), intents = padded(places, 0), padded(tags, NONE), np.array(intents)
        weights = np.zeros((2, *tags.shape), np.float32)
        weights[0], weights[1, :, 0] = tags >= 0, intents >= 0
        return {"places": places, "tags": tags, "intents": intents}, weights

    def batch(self, rows, generator):
        """See `gather`. A share of the words in spans, hide_rate, becomes <unk>, or [MASK] if there is none.

        New words are mostly names, in spans. So the model learns what an unknown word is from the words around it.
        """
        arguments, weights = super().batch(rows, generator)
        if rate := self.settings.hide_rate:
            tokens, tags = arguments["tokens"], arguments["tags"]
            drawn = torch.rand(tags.shape, generator=generator).to(tags.device) < rate
            hidden = drawn & (tags >= 0) & (tags != self.ids["tags"].get("O", NONE))  # (B, W)
            hidden = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, arguments["places"], hidden)  # (B, S)
            unknown = self.marks.mask if self.tokenizer.unk is None else self.tokenizer.unk
            arguments["tokens"] = tokens.masked_fill(hidden, unknown)
        return arguments, weights

    def weight(self, rows):
        """(2, 1, 1): the number of the rows' tags, and of their intents. Each has a mean of its own in the loss."""
        total = self.counts[rows].sum(0).clip(min=1)  # 1: there is nothing to divide
        return to_device(total.astype(np.float32).reshape(2, 1, 1), self.world.device)

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": nats of a tag plus those of an intent, "accuracy": the mean of both, and what `score` names}."""
        found = super().evaluate(model, split, world, dtype, limit)
        losses, shares = ([found[name] for name in (f"tag_{kind}", f"intent_{kind}") if name in found]
                          for kind in ("loss", "accuracy"))
        return {"loss": sum(losses), "accuracy": sum(shares) / len(shares), **found}

    def score(self, model, arguments, weights):
        """{name: (total, count)}: nats and right answers of tags, of those that are not O in truth, and of intents."""
        tags, intents = arguments["tags"], arguments["intents"]
        of_tags, of_intents = model(**{name: arguments[name] for name in ("tokens", "lengths", "places")})
        nats = (model.nats(of_tags, of_intents, tags, intents) * weights).sum((1, 2)).tolist()
        counts, found = weights.sum((1, 2)).tolist(), {}
        if of_tags is not None:
            right, labelled = of_tags.argmax(-1) == tags, tags != NONE
            in_span = labelled & (tags != self.ids["tags"].get("O", NONE))
            found |= {"tag_loss": (nats[0], counts[0]), "tag_accuracy": share(right, labelled),
                      "non_o_accuracy": share(right, in_span)}
        if of_intents is not None:
            found |= {"intent_loss": (nats[1], counts[1]),
                      "intent_accuracy": share(of_intents.argmax(-1) == intents, intents != NONE)}
        return found

    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: `report` of the split; with settings.test also measures and `report` of the part "test"."""
        if settings.picture and not model.config.intents:
            raise UserError(f"picture = {settings.picture}: shows intents, and this model labels words only: leave it"
                            " out")
        say(f"accuracy: {self.counted}")
        return reports(self, model, split, world, dtype, settings)

    def report(self, model, part, dtype, settings):
        """{name: value} of a part: sentences without an error, span F1, the worst labels, and what needs no model.

        Writes labels.jsonl and labels.md in settings.out_dir: the labels found in each sentence, and the precision,
        recall and F1 of each label; and settings.picture. See `of_part` for their names.
        """
        rows, train = self.dataset.rows[part], [self.dataset.rows["train"][row] for row in self.rows]
        with autocast(self.world.device, dtype):
            found = self.label(model, [row["words"] for row in rows])
        right = [row["tags"] in ([], one.tags) and row["intent"] in ("", one.intent) for row, one in zip(rows, found)]
        result, scores = {"sentences": len(rows), "sentences_right": sum(right) / len(rows)}, {}
        known = {"tags": model.config.tags, "intent": model.config.intents}
        for name, report in (("tags", tag_report), ("intent", intent_report)):
            if known[name] and any(row[name] for row in rows):
                values, of_labels = report(train, rows, found)
                result, scores = result | values, scores | of_labels
        if settings.picture:
            path = save_picture(confusion(rows, found, model.config.intents), of_part(settings.picture, part))
            say(f"{path}: a row for each right intent, a column for each found one")
        lines = ({**row, "found_tags": one.tags, "found_intent": one.intent} for row, one in zip(rows, found))
        write_rows(settings, "labels", part, lines)
        if not settings.init_from:  # else there is no folder of a run
            write_text(of_part(Path(settings.out_dir) / "labels.md", part), table_of(scores))
        worst = sorted((score["f1-score"], label, score["support"]) for label, score in scores.items())
        worst = [each for each in worst if each[2]][:WORST]  # without labels that were found and are in no row
        return result | {f"f1, {label} ({count})": f1 for f1, label, count in worst}

    # ------------------------------------------------------------------------------------------------------------------
    # Labelling

    @torch.inference_mode()
    def label(self, model, sentences):
        """The likeliest labels of sentences, which are lists of words: a list of Found.

        A word that does not fit into the model's block_size gets O, with probability 0.
        """
        config, device, found = model.config, next(model.parameters()).device, [None] * len(sentences)
        self.block_size = config.block_size
        texts, places = ([read(words) for words in sentences] for read in (self.ids_of, self.places))
        for rows in watched(length_batches(np.array(list(map(len, texts))), AT_ONCE), "labelling"):
            tokens, lengths = padded([texts[row] for row in rows], self.marks.pad)
            firsts, _ = padded([places[row] for row in rows], 0)
            of_tags, of_intents = model(*(torch.from_numpy(array).to(device) for array in (tokens, lengths, firsts)))
            tags, p_tags = likeliest(of_tags, config.tags)
            intents, p_intents = likeliest(of_intents, config.intents)
            for i, row in enumerate(rows):
                seen, cut = len(places[row]), len(sentences[row]) - len(places[row])
                words = (tags[i][:seen] + ["O"] * cut, p_tags[i][:seen] + [0.0] * cut) if config.tags else ([], [])
                found[row] = Found(*words, *((intents[i], p_intents[i]) if config.intents else ("", 0.0)))
        return found

    def sample(self, model, requests, sampling):
        """Yields (index of a request, piece): the labels of each line of its text; an empty line stays empty.

        If there are several lines, an empty one follows the labels of each. Raises UserError for a line that is longer
        than the model reads.
        """
        for index, request in enumerate(requests):
            if not request["text"].strip():
                raise UserError("this model labels sentences: add --prompt with one, or --prompt=FILE:path")
            lines = request["text"].removesuffix("\n").split("\n")
            sentences = [WORD.findall(line) for line in lines]
            check_chosen(model, sampling)
            if sampling.attention and len(lines) > 1:
                raise UserError("attention: needs a --prompt of one sentence")
            self.check_words(model, sentences)
            found = iter(self.label(model, list(filter(None, sentences))))
            for number, words in enumerate(sentences):
                text = in_columns(words, next(found)) if words else ""
                yield index, "\n" * (number > 0) + text + "\n" * (len(lines) > 1 and bool(words))
            if sampling.attention:
                yield index, "\n"
                yield index, self.draw(model, self.ids_of(sentences[0]), sampling)

    def inside(self, model, request, sampling):
        """The record of a sentence, with the likeliest label of each word at its first token, and the intent at [CLS].
        """
        words, config = WORD.findall(request["text"]), model.config
        if not words:
            raise UserError("this model labels sentences: add --prompt with one")
        self.check_words(model, [words])
        ids = self.ids_of(words)
        notes, labels, found = self.notes(model, ids), [""] * len(ids), []
        places = [place for place in self.places(words) if place < notes.count]
        for head, names, at in ((model.intents, config.intents, [0]), (model.tags, config.tags, places)):
            if head is not None:
                found.append(answers(notes, lambda x, at=at: x[at], head, at, "likeliest", names.__getitem__))
                for each in found[-1][0]:
                    labels[each["at"]] = each["top"][0][0]
        return self.record("tagging", model, ids, notes, labels[:notes.count], *found)

    def check_words(self, model, sentences):
        """Names unknown words on stderr. Raises UserError for a sentence of which the model can't see every word."""
        self.block_size = model.config.block_size
        for words in sentences:
            if len(self.places(words)) < len(words):
                count = sum(map(len, self.pieces(words)))
                raise UserError(f"the sentence {' '.join(words)!r:.60} has {count} tokens, and the model reads"
                                f" {self.room}: split it")
        unk, words = self.tokenizer.unk, dict.fromkeys(itertools.chain(*sentences))
        if unknown := [word for word in words if unk is not None and unk in self.tokenizer.encode(word)]:
            say(f"words that the model does not know, {len(unknown)}: {', '.join(unknown):.200}")

    def show(self, model, short=False):
        """Sentences of the validation split with the labels found, as text: ten, or if short three."""
        rows, count = self.dataset.rows["val"], 3 if short else 10
        rows = rows[::max(1, len(rows) // count)][:count]
        found = self.label(model, [row["words"] for row in rows])
        return "\n".join(shown(row, one) for row, one in zip(rows, found))

    def command(self, out_dir):
        prompt = " ".join(self.dataset.rows["val"][0]["words"])
        return super().command(out_dir, f"--prompt={prompt}")

    def summary(self, model):
        config = model.config
        return f"{super().summary(model)}\nlabels: {len(config.tags)} of words, {len(config.intents)} of sentences"


def likeliest(logits, names):
    """(names, probabilities) of the likeliest labels: nested lists (...) for logits (..., N); Nones for None."""
    if logits is None:
        return None, None
    p, ids = logits.softmax(-1).max(-1)
    return np.array(names, dtype=object)[ids.cpu().numpy()].tolist(), p.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Labels as text

def in_columns(words, found):
    """A line for each word: the word, its tag and the tag's probability; and a line for the intent."""
    lines, wide, long = [], max(map(len, words)), max(map(len, found.tags), default=0)
    for word, tag, p in zip(words, found.tags, found.p_tags):
        lines.append(f"{word:{wide}}  {tag:{long}}  {p:.2f}")
    if found.intent:
        lines.append(f"intent: {found.intent}  {found.p_intent:.2f}")
    return "\n".join(lines)


def in_brackets(words, tags):
    """The words as a text in which spans are in brackets: "flights to [salt lake city | toloc.city_name]"."""
    groups = []  # (words, name of their span)
    for word, tag in zip(words, tags):
        name = "" if tag == "O" else re.sub("^[BI]-", "", tag)
        if name and groups and groups[-1][1] == name and not tag.startswith("B-"):
            groups[-1][0].append(word)
        else:
            groups.append(([word], name))
    return " ".join(f"[{' '.join(inside)} | {name}]" if name else inside[0] for inside, name in groups)


def shown(row, found):
    """A row's sentence with the labels found, as text. If one is wrong, the right ones follow."""
    words, text = row["words"], in_brackets(row["words"], found.tags) if found.tags else " ".join(row["words"])
    right = in_brackets(words, row["tags"]) if found.tags and row["tags"] else text
    intent = row["intent"] if found.intent and row["intent"] else found.intent
    wrong = ([right] if right != text else []) + ([intent] if intent != found.intent else [])
    return text + f" -> {found.intent}" * bool(found.intent) + f"\n  (right: {' -> '.join(wrong)})" * bool(wrong)


def table_of(scores):
    """A Markdown table of each label's precision, recall, F1 and count."""
    table = ["| label | precision | recall | F1 | count |", "| --- | --- | --- | --- | --- |"]
    for label, score in scores.items():
        shares = " | ".join(f"{score[key]:.3f}" for key in ("precision", "recall", "f1-score"))
        table.append(f"| {label} | {shares} | {score['support']} |")
    return "\n".join(table) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Measures

def share(right, asked):
    """(how many of those asked are right, how many are asked) of two boolean tensors, as numbers."""
    return (right & asked).sum().item(), asked.sum().item()


def tag_report(train, rows, found):
    """({name: value}, {span: scores}) of the tags found in rows, beside what needs no model but the rows `train`."""
    rows, found = zip(*((row, one.tags) for row, one in zip(rows, found) if row["tags"]))
    usual, wanted = usual_tags(train, rows), [row["tags"] for row in rows]
    all_wanted, all_usual, all_found = ([*itertools.chain(*tags)] for tags in (wanted, usual, found))
    seen = {word for row in train for word in row["words"]}
    new = [pair for pair, word in zip(zip(all_wanted, all_found), (word for row in rows for word in row["words"]))
           if word not in seen]
    result = {f"tag_accuracy, new words ({len(new)})": accuracy(*zip(*new))} if new else {}
    result |= {"tag_accuracy, all O": all_wanted.count("O") / len(all_wanted),
               "tag_accuracy, usual tags": accuracy(all_wanted, all_usual),
               "non_o_accuracy, usual tags": accuracy(all_wanted, all_usual, but="O")}
    if not all(re.match("O$|[BI]-", tag) for tag in all_wanted):
        return result, {}  # parts of speech, say, make no spans
    if not installed("F1 of spans", "seqeval", "scikit-learn"):
        return result, {}
    scores, floor = span_scores(wanted, found), span_scores(wanted, usual)
    result = {"span_f1": scores.pop("micro avg")["f1-score"], **result}
    return {**result, "span_f1, usual tags": floor["micro avg"]["f1-score"]}, scores


def intent_report(train, rows, found):
    """({name: value}, {intent: scores}) of the intents found in rows, beside what needs no model, as `tag_report`."""
    rows, found = zip(*((row, one.intent) for row, one in zip(rows, found) if row["intent"]))
    train, floors = [row for row in train if row["intent"]], {}
    names, counts = np.unique([row["intent"] for row in train], return_counts=True)
    if len(names) > 1:
        known, wanted = (np.array([row["intent"] for row in part])[:, None] == names for part in (train, rows))
        wanted = np.c_[wanted, ~wanted.any(1)]  # the last column: none of the names
        texts, others = ([" ".join(row["words"]) for row in part] for part in (train, rows))
        floors = {"intent_accuracy, most frequent": float(wanted[:, counts.argmax()].mean())}
        if installed("bag of words", "scikit-learn"):
            guessed = decide(bag_of("words", texts, known, others))
            floors["intent_accuracy, bag of words"] = averages(guessed, wanted)["accuracy"]
    return floors, label_scores([row["intent"] for row in rows], found)


def accuracy(right, found, but=None):
    """The share of labels that are equal, among those that are not `but` in truth."""
    pairs = [(one, other) for one, other in zip(right, found) if one != but]
    return sum(one == other for one, other in pairs) / max(1, len(pairs))


def usual_tags(train, rows):
    """The tag that each word of rows has most often in `train`; O for a word that is not there: a list of lists."""
    counts = collections.defaultdict(collections.Counter)
    for row in train:
        for word, tag in zip(row["words"], row["tags"]):
            counts[word][tag] += 1
    table = {word: found.most_common(1)[0][0] for word, found in counts.items()}
    return [[table.get(word, "O") for word in row["words"]] for row in rows]


def span_scores(right, found):
    """{span, or "micro avg": {"precision", "recall", "f1-score", "support"}}, by seqeval, of lists of tags."""
    from seqeval.metrics import classification_report
    report = classification_report(right, found, output_dict=True, zero_division=0)
    return {name: {**score, "support": int(score["support"])} for name, score in report.items()
            if name not in ("macro avg", "weighted avg")}


def label_scores(right, found):
    """The same of labels, {label: scores}."""
    both = collections.Counter(one for one, other in zip(right, found) if one == other)
    wanted, given = collections.Counter(right), collections.Counter(found)
    return {label: {"precision": both[label] / max(1, given[label]), "recall": both[label] / max(1, wanted[label]),
                    "f1-score": 2 * both[label] / (wanted[label] + given[label]), "support": wanted[label]}
            for label in sorted({*right, *found})}


def confusion(rows, found, names):
    """A picture: for each intent of rows, a line with the shares of the intents, `names`, that were found."""
    pairs = collections.Counter((row["intent"], one.intent) for row, one in zip(rows, found) if row["intent"])
    right = sorted({intent for intent, _ in pairs})
    counts = torch.tensor([[float(pairs[one, other]) for other in names] for one in right])
    return draw_map(counts / counts.sum(1, keepdim=True), right, names)
