"""The classification task: an encoder reads a text and names its label, or several.

    python train.py config/classify_topics.py
    python sample.py --out_dir=out/classify_topics --prompt="Sums the numbers in a range of cells."
    python evaluate.py --out_dir=out/classify_topics --picture=confusion.png

Where a text has one label, the likeliest is chosen; where it may have several, those with a probability above 1/2 are.

Axes: B texts, n texts of a split, N labels of the model.
"""

import warnings

import numpy as np
import torch

from batches import fixed_rows, length_batches, padded, to_device
from configurator import UserError, say
from encoder import Classifier, ClassifierConfig
from inside.picture import check_chosen
from inside.record import answers
from machine.device import autocast
from machine.terminal import watched
from tasks.encoding import AT_ONCE, LabelledTask
from tasks.labels import decide, described, graded, indicators, installed, label_report, reports
from tasks.settings import Classifying

SHOWN = 100  # characters of a text that are shown with its labels
MOST_CHARACTERS = 5_000_000  # of the texts: with more, counting their characters would take minutes


class ClassificationTask(LabelledTask):
    best = ("accuracy", max)  # the loss soon rises, for a few wrong texts, while the accuracy still rises too
    models = {"classifier": (Classifier, ClassifierConfig)}
    rows_label = "the texts"

    def own(self):
        return {"labels": self.dataset.meta["labels"], "several": self.dataset.meta["several"]}

    def new(self, generator, shape):
        return super().new(generator, shape | {"pool": self.settings.pool})

    def shape(self, model):
        return super().shape(model) | {"pool": model.config.pool}

    def fit(self, model):
        """Also finds the labels of all rows: labels[split], see `indicators`."""
        config, meta = model.config, self.dataset.meta
        if config.several != meta["several"]:
            has, names = ("several" if several else "one" for several in (meta["several"], config.several))
            raise UserError(f"the texts of {self.dataset.folder} have {has} label{'s' * meta['several']} each, and the"
                            f" model names {names}: name another --dataset")
        if not set(config.labels) & set(meta["labels"]):
            raise UserError(f"the data set {self.dataset.folder} has none of the model's labels, such as"
                            f" {config.labels[0]}: name another --dataset")
        super().fit(model)
        self.names, self.several = config.labels, config.several
        self.labels = {split: indicators([row["labels"] for row in self.dataset.rows[split]], self.names)
                       for split in self.texts}

    def read(self, row):
        return self.framed(self.tokenizer.encode(row["text"]))

    def targets(self, split, rows):
        """A text with a label that the model lacks has weight 0: there is nothing to learn from it."""
        known, others = self.labels[split][rows, :-1], self.labels[split][rows, -1]
        targets = known.astype(np.float32) if self.several else known.argmax(1)
        return {"targets": targets}, (~others).astype(np.float32)

    def score(self, model, arguments, weights):
        """accuracy: the share of texts whose labels are all right. A label that the model lacks is an error."""
        targets = arguments.pop("targets")
        logits = model(**arguments)
        right = (logits > 0).eq(targets).all(-1) if self.several else logits.argmax(-1).eq(targets)
        nats = model.nats(logits, targets)
        return graded(nats, right, weights)

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: `report` of the split; with settings.test also of the part "test".

        Writes what `label_report` says. Raises UserError for a picture of texts with several labels.
        """
        if settings.picture and self.several:
            raise UserError(f"picture = {settings.picture}: shows which label was taken for which, and the texts of"
                            f" {self.dataset.folder} have several; leave it out")
        say(f"accuracy: {self.counted}")
        return reports(self, model, split, world, dtype, settings)

    def report(self, model, part, dtype, settings):
        """{name: value}: see `label_report`."""
        rows, wanted, config = self.dataset.rows[part], self.labels[part], model.config
        with autocast(self.world.device, dtype):
            shares = self.probabilities(model, self.texts[part])
        return {"texts": len(rows), **label_report(rows, shares, config.labels, wanted, self.floors(part), part,
                                                    settings, config.several)}

    def floors(self, part):
        """{name: decisions (n, N)} for the texts of a part, learned from the rows that the model learns from."""
        known = self.labels["train"][self.rows, :-1]
        sets, counts = np.unique(known, axis=0, return_counts=True)
        texts, others = ([row["text"] for row in self.dataset.rows[split]] for split in ("train", part))
        texts, several = [texts[row] for row in self.rows], self.dataset.meta["several"]
        found = {"most frequent": np.tile(sets[counts.argmax()], (len(others), 1))}
        units = ["words"] + ["characters"] * (sum(map(len, texts)) <= MOST_CHARACTERS)
        if installed("bags of words and characters", "scikit-learn"):
            for unit in units:
                found[f"bag of {unit}"] = decide(bag_of(unit, texts, known, others), several)
        return found

    # ------------------------------------------------------------------------------------------------------------------
    # Answers

    @torch.inference_mode()
    def probabilities(self, model, texts):
        """(n, N), float32: the probability of each label for each text. texts: lists of ids, framed."""
        found, device = np.empty((len(texts), len(model.config.labels)), np.float32), next(model.parameters()).device
        for rows in watched(length_batches(np.array([len(ids) for ids in texts]), AT_ONCE), "classifying"):
            tokens, lengths = padded([texts[row] for row in rows], self.marks.pad)
            logits = model(to_device(tokens, device), to_device(lengths, device))
            found[rows] = (logits.sigmoid() if model.config.several else logits.softmax(-1)).cpu().numpy()
        return found

    def sample(self, model, requests, sampling):
        """Yields (index of a request, piece): each line's beginning, and below it the likeliest labels.

        An empty line stays empty. A line longer than the model loses its end. That, and unknown words, are said on
        stderr.
        """
        config = model.config
        self.block_size = config.block_size
        for index, request in enumerate(requests):
            lines = [" ".join(line.split()) for line in request["text"].removesuffix("\n").split("\n")]
            ids = [self.tokenizer.encode(line) for line in lines if line]
            if not ids:
                raise UserError("this model classifies texts: add --prompt with a text, or --prompt=FILE:path with one"
                                " on each line")
            texts = [self.framed(line) for line in ids]
            check_chosen(model, sampling)
            if sampling.attention and len(lines) > 1:
                raise UserError("attention: needs a --prompt of one text")
            cut = sum(len(line) > self.room for line in ids)
            if cut:
                say(f"texts longer than the model's {self.room} tokens, which lose their end: {cut} of {len(ids)}")
            if hasattr(self.tokenizer, "unknown") and (unknown := self.tokenizer.unknown(" ".join(lines))):
                say(f"words that the model does not know, {len(unknown)}: {', '.join(unknown):.200}")
            shown = (described(config.labels, p, sampling.top, config.several)
                     for p in self.probabilities(model, texts))
            yield index, "\n".join(f"{beginning(line)}\n  {next(shown)}" if line else "" for line in lines)
            if sampling.attention:
                yield index, "\n"
                yield index, self.draw(model, texts[0], sampling)

    def inside(self, model, request, sampling):
        """The record of a text, with its labels' distribution at [CLS]."""
        self.block_size, config = model.config.block_size, model.config
        ids = self.framed(self.tokenizer.encode(" ".join(request["text"].split())))
        notes, mean = self.notes(model, ids), config.pool == "mean"
        there = [None] if config.several else "likeliest"
        found = answers(notes, lambda x: x.mean(0, keepdim=True) if mean else x[:1], model.head, [0], there,
                        config.labels.__getitem__, config.several)
        top = found[0][0]["top"]
        labels = [name for name, p in top if p > 0.5] if config.several else [top[0][0]]
        return self.record("classification", model, ids, notes, labels, found)

    def show(self, model, short=False):
        """Texts of the validation part with their likeliest labels: ten, or if short three."""
        rows = self.dataset.rows["val"]
        places, = fixed_rows(len(rows), len(rows), 3 if short else 10)
        shares = self.probabilities(model, [self.texts["val"][place] for place in places])
        decided, config, shown = decide(shares, model.config.several), model.config, []
        for place, p, chosen in zip(places, shares, decided):
            right = not (self.labels["val"][place, :-1] ^ chosen).any()
            answer = described(config.labels, p, Classifying.top, config.several)
            answer += f"  (right: {', '.join(rows[place]['labels']) or 'none'})" * (not right)
            shown.append(f"{beginning(rows[place]['text'])}\n  {answer}")
        return "\n".join(shown)

    def command(self, out_dir):
        text = beginning(self.dataset.rows["val"][0]["text"], "")
        return super().command(out_dir, f"--prompt={text}")


def beginning(text, end=" ..."):
    """The words of a text that fit into SHOWN characters, and `end` if that is not all."""
    found = text if len(text) <= SHOWN else text[:SHOWN + 1].rpartition(" ")[0] or text[:SHOWN]
    return found + end * (len(found) < len(text))


# ----------------------------------------------------------------------------------------------------------------------
# Floors

def bag_of(unit, texts, labels, others):
    """(n, N): the probability of each label for each of the texts `others`, by logistic regression on tf-idf.

    It learns from texts and their labels (B, N). unit: "words", or "characters" (up to three in a row).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    how = {"token_pattern": r"\w+"} if unit == "words" else {"analyzer": "char", "ngram_range": (1, 3)}
    vectors = TfidfVectorizer(sublinear_tf=True, **how)
    model = OneVsRestClassifier(LogisticRegression(C=10, solver="liblinear"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about labels that none of a few texts has
        model.fit(vectors.fit_transform(texts), labels)
    return model.predict_proba(vectors.transform(others))
