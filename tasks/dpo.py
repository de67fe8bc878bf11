"""The DPO task: a chat model learns from preferences, without a reward model (Rafailov et al. 2023).

    python train.py config/chat/dpo.py
    python sample.py --out_dir=out/chat/dpo --prompt="3 12 17=53"

The model that the run starts from is its reference, and stays as it is. What an answer gains is the logarithm of how
much likelier the model makes it than the reference does. The chosen answer of a pair shall gain more:

    loss = -log sigmoid(beta * (gain of chosen - gain of rejected)) + sft * (mean nats of chosen)

The reference's log-probabilities of all pairs are computed once. If the data set comes from a world (worlds.py), its
validation problems are answered too, and checked.

Axes: B pairs, T tokens of an answer with its prompt, but the last.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tasks.chat import GREEDY, share
from tasks.reference import keep, recall
from tasks.reward import PairsTask
from worlds import SIZES, WORLDS


class DPOTask(PairsTask):
    def open(self, folder, world):
        super().open(folder, world)
        self.judge = self.judging = WORLDS.get(self.dataset.meta["world"])
        if self.judge:
            self.best = ("exact", max)

    def shape(self, model):
        return {}  # the model brings its own

    def fit(self, model):
        super().fit(model)
        self.reference = {}  # split: the reference's nats of both answers, (2, n) float64

    def begin(self, step, model, world, dtype):
        if not step:
            keep(self, model)
        if not self.reference:
            self.ask(recall(self)[1], world, dtype)

    def ask(self, reference, world, dtype):
        """Keeps the nats that the reference gives to the answers of all pairs."""
        self.reference = {split: self.measure(reference, split, world, dtype)[1] for split in self.pairs}

    # ------------------------------------------------------------------------------------------------------------------
    # The loss

    def arguments(self, split, pairs):
        found = self.both(split, pairs)
        known = self.reference.get(split, np.zeros(self.pairs[split]["ends"].shape))  # zeros: it was not asked yet
        found["reference"] = torch.from_numpy(known[:, pairs].reshape(-1).astype(np.float32)).to(self.world.device)
        return found

    def loss(self, model, arguments, weights):
        nats, written = self.numbers(model, arguments), arguments["written"]
        chosen, rejected = (arguments["reference"] - nats).chunk(2)  # what each answer gains
        margins = self.settings.beta * (chosen - rejected)
        mean = nats.chunk(2)[0] / written.chunk(2)[0].sum(1)
        right = (margins > 0) + 0.5 * (margins == 0)
        return ((F.softplus(-margins) + self.settings.sft * mean) * weights).sum(), {
            "agreement": (right * weights).sum(), "nats": (mean * weights).sum()}

    def numbers(self, model, arguments):
        """The nats of each answer, (2B,)."""
        return (model(arguments["tokens"], arguments["targets"]) * arguments["written"]).sum(1)

    def margins(self, split, pairs, nats):
        gains = self.reference[split][:, pairs] - nats
        return self.settings.beta * (gains[0] - gains[1])

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss", "agreement"} of the pairs; in a world also "exact": the share of right answers.

        The loss is without its term sft. "agreement": the share of pairs whose chosen answer gains more; ties count
        half.
        """
        if not self.reference:  # in evaluate.py: the run's folder holds its checkpoint and its reference
            self.ask(recall(self, out_dir=Path(self.source).parent)[1], world, dtype)
        found = super().evaluate(model, split, world, dtype, limit)
        if self.judging:
            problems = self.problems(split)[:max(1, limit // self.pairs[split]["ids"].shape[2]) if limit else None]
            found["exact"] = share(self.answer(model, problems, 1, GREEDY), 1.0)
        return found

    def problems(self, split):
        """The world's own problems of the split: pairs exist only for those that a model has answered in two ways."""
        return [prompt for prompt, _ in self.judge.problems(split, SIZES.get(split, SIZES["val"]))]

    def first_question(self):
        return self.dataset.rows["val"][self.pairs["val"]["rows"][0]]["messages"]
