"""The arithmetic task: a language model learns to calculate from examples alone. The lecture's second exercise.

    python train.py config/ladder/addition.py
    python sample.py --out_dir=out/ladder/addition --prompt=123+45=

All problems have one length: 123+45=168 is the text "123+045=8610". Operands and answers have zeros in front, and the
answer is reversed: a sum is worked out from its last digit, and a model writes from left to right. With --working, the
rows of a long multiplication come before the answer. No problem is stored: its number gives its operation and operands.
Held-out pairs of operands occur in no problem of training, in neither order.

Axes: B batch, T tokens of a problem and its answer but the last, V vocabulary, n problems.
"""

import functools
import operator
import re

import numpy as np
import torch
import torch.nn.functional as F

from batches import fixed_rows, shuffled_rows, to_device
from configurator import UserError
from generate import generate, pick_tokens
from inside import record
from machine.device import autocast
from run.cost import count_parameters
from tasks.settings import Writing
from tasks.text import TextTask
from tokenizer import CharTokenizer, same_vocabulary

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
TOKENIZER = CharTokenizer("0123456789+-*=")
TENTHS = {"val": [0], "test": [1], "train": range(2, 10)}  # which tenths of all pairs of operands each part has
EVAL_ROWS = 1024  # problems per batch of an evaluation: it changes no result


class ArithmeticTask(TextTask):
    best = ("exact", max)

    def __init__(self, settings, tokenizers=None, source=""):
        super().__init__(settings, tokenizers, source)
        self.digits, self.operations = settings.digits, settings.operations
        largest = 10**self.digits - 1
        extremes = [OPERATIONS[sign](a, largest) for sign in self.operations for a in (0, largest)]
        self.width = max(len(str(answer)) for answer in extremes)  # characters of an answer
        self.working = self.digits * (self.digits + 1) if settings.working else 0  # characters of it
        self.written = self.working + self.width  # characters that the model writes
        self.block_size = 2 * self.digits + 2 + self.written - 1  # T

    def open(self, folder, world):
        self.world, self.tokenizers = world, self.tokenizers or {"tokenizer": TOKENIZER}
        _, a, b, _ = self.solve(np.arange(len(self.operations) * 100**self.digits))
        self.parts = {part: np.flatnonzero(np.isin(tenth(a, b), chosen)) for part, chosen in TENTHS.items()}

    def fit(self, model):
        if not same_vocabulary(self.tokenizer, TOKENIZER):
            raise UserError(f"init_from = {self.source}: its tokens are not the characters {TOKENIZER.characters}")
        if model.config.block_size < self.block_size:
            raise UserError(f"block_size = {model.config.block_size}: {self.operations} with operands of {self.digits}"
                            f" digit{'s' * (self.digits > 1)} needs at least {self.block_size}")

    def solve(self, rows):
        """(index of the operation, a, b, answer) of the problems with the numbers `rows`: four arrays (n,)."""
        size = 10**self.digits
        i, a, b = rows // size**2, rows // size % size, rows % size
        return i, a, b, np.choose(i, [OPERATIONS[sign](a, b) for sign in self.operations])

    def problem(self, a, sign, b):
        return f"{a:0{self.digits}}{sign}{b:0{self.digits}}="

    def rows_of(self, a, sign, b):
        """The rows of a long multiplication, each reversed: a times each digit of b. Zeros for other operations."""
        factors = [int(digit) if sign == "*" else 0 for digit in reversed(f"{b:0{self.digits}}")]
        return "".join(f"{a * factor:0{self.digits + 1}}"[::-1] for factor in factors)

    def problems(self, rows):
        """[(problem, what is written)] as a model reads and writes them: ("123+045=", "8610"), or ("012-045=", "330-").

        With working: ("47*36=", "2821412961"), for 47 * 6 = 282, 47 * 3 = 141 and 1692.
        """
        found = []
        for i, a, b, answer in zip(*(array.tolist() for array in self.solve(rows))):
            working = self.rows_of(a, self.operations[i], b) if self.working else ""
            found.append((self.problem(a, self.operations[i], b), working + f"{answer:0{self.width}}"[::-1]))
        return found

    def pick(self, step):
        train = self.parts["train"]
        return train[shuffled_rows(len(train), self.settings.batch_size, self.settings.seed, step)]

    def weight(self, rows):
        return len(rows) * self.written

    def batch(self, rows, generator):
        """({"tokens", "targets"}, weights), each (B, T). Weights are 1 for what the model writes, 0 for the problem."""
        ids = self.tokenizer.encode("".join(problem + answer for problem, answer in self.problems(rows)))
        ids = to_device(ids.reshape(len(rows), -1), self.world.device)  # (B, T + 1)
        weights = torch.ones(len(rows), self.block_size, device=self.world.device)
        weights[:, :-self.written] = 0.0
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:]}, weights

    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats of a written character, "exact": share of the problems whose characters are all right}."""
        nats, right, count = self.score(model, split, world, dtype, limit).sum(0).tolist()
        return {"loss": nats / (count * self.written), "exact": right / count}

    @torch.no_grad()
    def score(self, model, part, world, dtype, limit=0):
        """For each operation and number of digits: nats, right answers, and problems, (operations * digits, 3).

        An answer is right if each character, those of the working too, is the likeliest after those before it. Just
        then the model writes it by itself, always taking the likeliest character.
        """
        numbers, totals = self.parts[part], np.zeros((len(self.operations) * self.digits, 3))
        for chosen, weight in world.share(fixed_rows(len(numbers), EVAL_ROWS, -(-limit // self.block_size))):
            i, a, b, _ = self.solve(numbers[chosen])
            arguments, weights = self.batch(numbers[chosen], None)
            with autocast(world.device, dtype):
                logits = model(arguments["tokens"]).float()  # (B, T, V)
            nats = F.cross_entropy(logits.mT, arguments["targets"], reduction="none") * weights  # (B, T)
            right = (logits.argmax(-1) == arguments["targets"]) | (weights == 0)  # (B, T)
            found = torch.stack((nats.sum(1), right.all(1), torch.ones_like(nats[:, 0])), dim=1)  # (B, 3)
            digits = np.searchsorted(10 ** np.arange(1, self.digits), np.maximum(a, b), side="right")  # less 1
            np.add.at(totals, i * self.digits + digits, weight * found.cpu().numpy())
        return np.reshape(world.sum(*totals.flat), totals.shape)

    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: `report` of the split, and with settings.test also of the part "test"."""
        parts = {"": split, "test ": "test"} if settings.test else {"": split}
        return {start + name: value for start, part in parts.items()
                for name, value in self.report(model, part, world, dtype).items()}

    def report(self, model, part, world, dtype):
        """{name: value}: right answers by the digits of the larger operand, and what can be had without a model."""
        totals, (_, a, b, answers) = self.score(model, part, world, dtype), self.solve(self.parts[part])
        _, right, count = totals.sum(0).tolist()
        kinds = [f"{sign}, digits: {n + 1}" for sign in self.operations for n in range(self.digits)]
        return {"problems": int(count), "exact": right / count,
                **{f"exact {kind}": right / count for kind, (_, right, count) in zip(kinds, totals.tolist()) if count},
                "exact by copying the larger operand": float((answers == np.maximum(a, b)).mean()),
                "exact by the best constant answer": float(np.unique(answers, return_counts=True)[1].max() / count)}

    def answers(self, model, problems):
        """The model's answers to problems such as "123+045=", with their digits in the usual order: texts."""
        ids = self.tokenizer.encode("".join(problems)).reshape(len(problems), -1)
        tokens = torch.from_numpy(ids).to(next(model.parameters()).device)
        steps = list(generate(model, tokens, self.written, functools.partial(pick_tokens, temperature=0)))
        return [self.answer(self.tokenizer.decode(ids)) for ids in torch.stack(steps, dim=1).tolist()]

    def answer(self, written):
        """The answer in what a model has written, as people write it: 168 for "8610", and -33 for "330-"."""
        return re.sub(r"^(-?)0+(?=\d)", r"\1", written[self.working:][::-1])

    def sample(self, model, requests, sampling):
        """Yields (index of a request, text): its problem, such as "123+45=", with the model's answer."""
        for index, request in enumerate(requests):
            a, sign, b = self.asked_in(request)
            yield index, f"{a}{sign}{b}={self.answers(model, [self.problem(int(a), sign, int(b))])[0]}"

    def inside(self, model, request, sampling):
        """The record of a problem and its answer, as the model reads and writes them."""
        a, sign, b = self.asked_in(request)
        ids = self.tokenizer.encode(self.problem(int(a), sign, int(b)))
        return record.of_text("text", self, model, ids, Writing(temperature=0, max_new_tokens=self.written))

    def asked_in(self, request):
        """(a, sign, b), texts, of a request such as {"text": "123+45="}. Raises UserError for another text."""
        number, text = f"(\\d{{1,{self.digits}}})", request["text"]
        asked = re.fullmatch(f"{number} *([{re.escape(self.operations)}]) *{number} *=?", text.strip())
        if not asked:
            raise UserError(f"prompt = {text!r}: must be a problem such as 7{self.operations[0]}5=, with one of"
                            f" {self.operations} and operands of at most {self.digits} digit{'s' * (self.digits > 1)}")
        return asked.groups()

    def show(self, model, short=False):
        """Held-out problems with the model's answers, as text: ten, or if short three."""
        generator = np.random.default_rng(self.settings.seed)
        held_out = self.problems(generator.choice(self.parts["val"], 3 if short else 10))
        found = self.answers(model, [problem for problem, _ in held_out])
        return "\n".join(problem + answer + f"  (right: {self.answer(right)})" * (answer != self.answer(right))
                         for (problem, right), answer in zip(held_out, found))

    def where(self, rows):
        return f"the problems {' '.join(problem for problem, _ in self.problems(rows))}"

    def command(self, out_dir):
        return super().command(out_dir, f"--prompt=7{self.operations[0]}5=")

    def summary(self, model):
        train, val = (len(self.parts[part]) for part in ("train", "val"))
        return f"model: {count_parameters(model) / 1e6:.2f}M parameters; {train:,} problems, {val:,} others to validate"


def tenth(a, b):
    """A number from 0 to 9 for each pair of operands, (n,), the same in either order: a hash (splitmix64)."""
    x = (np.minimum(a, b) * 2**32 + np.maximum(a, b) + 1).astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    return (x ^ x >> np.uint64(31)) % np.uint64(10)
