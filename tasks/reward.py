"""The reward task: a model learns from preferences to say how good an answer is (Ouyang et al. 2022, InstructGPT).

    python train.py config/chat/reward.py
    python sample.py --out_dir=out/chat/reward --prompt="3 12 17=53" --answer="3*12+17"

A pair is a prompt with two answers, of which somebody prefers one. The model gives each answer a number, its score, at
its end token, and learns by the model of Bradley and Terry (1952): the chosen answer is the better one with the
probability sigmoid(score of chosen - score of rejected). Only differences of scores of one prompt have a meaning.
With `sft`, it also goes on learning to write the chosen answers, and then judges unseen ones better (Yang et al. 2024,
"Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs"):

    loss = -log sigmoid(score of chosen - score of rejected) + sft * (mean nats of chosen)

Axes: B pairs, T tokens.
"""


import numpy as np
import torch
import torch.nn.functional as F

from batches import DialogueDataset, fixed_rows, padded, shuffled_rows, to_device
from configurator import UserError
from critic import Critic, RewardModel, as_kind
from machine.device import autocast
from model import GPT, GPTConfig
from run.cost import flops_per_token, size_in_words
from tasks.chat import ChatTask, said, widen
from tasks.scores import answer_ids, scores
from tasks.task import Task
from tasks.text import EVAL_TOKENS, SHAPE, TextTask

SIDES = ("chosen", "rejected")


class PairsTask(ChatTask):
    """The base class of tasks that learn from preferences. It adds `numbers` and `margins`."""

    best = ("agreement", max)
    rows_label = "the pairs"

    def open(self, folder, world):
        self.dataset, self.world = DialogueDataset(folder, "preferences"), world
        self.open_tokenizer(folder)

    def fit(self, model):
        self.block_size = model.config.block_size
        self.pairs = {split: self.read(split) for split in ("train", "val")}

    # ------------------------------------------------------------------------------------------------------------------
    # Rows

    def read(self, split):
        """{"ids" (2, n, T) int32, "starts" (n,), "ends" (2, n), "rows" (n,)} of the split's n pairs that fit.

        [0] is chosen, [1] rejected. starts: where the answers begin. ends: where their end tokens are. rows: which row
        of the data set each pair is.
        """
        fitting, known = [], self.dataset.rows[split]
        for row, pair in enumerate(known):
            found = [answer_ids(self.chat, pair["messages"], pair[side]) for side in SIDES]
            if max(map(len, found)) <= self.block_size:
                fitting.append((row, len(self.chat.prompt(pair["messages"])), *found))
        if len(fitting) < len(known) and self.world.is_main:
            print(f"{len(known) - len(fitting):,} of {len(known):,} {split} pairs are left out: an answer ends after"
                  f" block_size = {self.block_size} tokens")
        if not fitting:
            raise UserError(f"block_size = {self.block_size}: no {split} pair of {self.dataset.folder} fits; use a"
                            " model with a larger one")
        rows, starts, chosen, rejected = zip(*fitting)
        ids, lengths = padded(chosen + rejected, 0)
        return {"ids": ids.reshape(2, len(rows), -1).astype(np.int32), "starts": np.array(starts),
                "ends": lengths.reshape(2, -1) - 1, "rows": np.array(rows)}

    def pick(self, step):
        s = self.settings
        return shuffled_rows(len(self.pairs["train"]["rows"]), s.batch_size, s.seed, step)

    def weight(self, rows):
        return len(rows)

    def batch(self, rows, generator):
        return self.arguments("train", rows), torch.ones(len(rows), device=self.world.device)

    def both(self, split, pairs):
        """{"tokens", "targets", "written" (2B, T), "ends" (2B,)}: first the chosen answers, then the rejected ones.

        targets: the token after each. written: 1 where that is of the answer, or its end token, else 0.
        """
        found = self.pairs[split]
        ids, ends = found["ids"][:, pairs], found["ends"][:, pairs]  # (2, B, T) and (2, B)
        places = np.arange(ids.shape[2]) + 1
        written = (places >= found["starts"][pairs][:, None]) & (places <= ends[..., None])
        made = {"tokens": ids, "targets": np.roll(ids, -1, axis=2), "written": written, "ends": ends}
        return {name: to_device(array.reshape(2 * len(pairs), *array.shape[2:]).astype(np.int64), self.world.device)
                for name, array in made.items()}

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    @torch.no_grad()
    def measure(self, model, split, world, dtype, limit=0):
        """(pairs (m,), numbers (2, m) float64): what `numbers` says of both answers. limit: in tokens; 0: all pairs."""
        count, T = self.pairs[split]["ids"].shape[1:]
        found = []
        for rows, counts in world.share(fixed_rows(count, max(1, EVAL_TOKENS // (2 * T)), -(-limit // (2 * T)))):
            with autocast(world.device, dtype):
                numbers = self.numbers(model, self.arguments(split, rows)).float().cpu().numpy()
            found += [(rows, numbers.reshape(2, -1))] * counts
        rows, numbers = zip(*world.gather(found))
        return np.concatenate(rows), np.concatenate(numbers, axis=1).astype(np.float64)

    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats per pair, "agreement": the share of pairs that the model ranks right; ties count half}."""
        margins = self.margins(split, *self.measure(model, split, world, dtype, limit))
        return {"loss": np.logaddexp(0, -margins).mean().item(), "agreement": agreement(margins)}

    def floors(self, split):
        """{name: the agreement of a judge who looks at the length of the answers alone}."""
        rows = (self.dataset.rows[split][row] for row in self.pairs[split]["rows"])
        longer = agreement(np.array([len(row["chosen"]) - len(row["rejected"]) for row in rows]))
        return {"pairs": len(self.pairs[split]["rows"]), "agreement of the longer answer": longer,
                "agreement of the shorter answer": 1 - longer}

    def summary(self, model):
        s, (_, count, T) = self.settings, self.pairs["train"]["ids"].shape
        return (f"model: {size_in_words(model)}; data: {count:,} pairs of {s.dataset}, of at most {T} tokens;"
                f" {s.max_iters} updates = {s.max_iters * s.batch_size / count:.1f} epochs")

    def cost(self, model):
        T = self.pairs["train"]["ids"].shape[2]
        tokens = 2 * self.settings.batch_size * T
        return tokens, tokens * flops_per_token(model, T)


class RewardTask(PairsTask):
    models = {"reward": (RewardModel, GPTConfig)}

    def build(self, generator):
        return as_kind(RewardModel, TextTask.build(self, generator))

    def adopt(self, model, generator):
        if type(model) not in (GPT, Critic, RewardModel):
            raise UserError(f"init_from = {self.source}: is of the class {type(model).__name__}, and"
                            " --task=reward starts from a GPT or a reward model")
        return as_kind(RewardModel, widen(model, self.tokenizer.vocab_size, generator, self.source))

    def shape(self, model):
        return {name: getattr(model.config, name) for name in SHAPE}

    def arguments(self, split, pairs):
        found = self.both(split, pairs)
        learned = ("targets", "written") if self.settings.sft else ()  # of the chosen answers
        return {"tokens": found["tokens"], "ends": found["ends"], **{name: found[name].chunk(2)[0] for name in learned}}

    def loss(self, model, arguments, weights):
        found, total = dict(arguments), 0.0
        if self.settings.sft:
            written = found.pop("written")
            scores, nats = model(**found)
            total = self.settings.sft * (nats * written).sum(1) / written.sum(1)
        else:
            scores = model(**found)
        chosen, rejected = scores.chunk(2)
        total = total + F.softplus(rejected - chosen)
        return (total * weights).sum(), {"agreement": ((chosen > rejected) * weights).sum()}

    def numbers(self, model, arguments):
        return model(arguments["tokens"], arguments["ends"])

    def margins(self, split, pairs, scores):
        return scores[0] - scores[1]

    @torch.no_grad()
    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: the agreement of judges that look at the length alone, and the mean score of each side.

        With settings.test all of it, and loss and agreement, for the part "test" too.
        """
        result = self.about(model, split, world, dtype)
        if not settings.test:
            return result
        if not self.dataset.rows["test"]:
            raise UserError(f"test = True: the data set {self.dataset.folder} has no such part; leave it out")
        self.pairs["test"] = self.read("test")
        tested = self.evaluate(model, "test", world, dtype) | self.about(model, "test", world, dtype)
        return result | {f"test {name}": value for name, value in tested.items()}

    def about(self, model, split, world, dtype):
        _, scores = self.measure(model, split, world, dtype)
        return self.floors(split) | {f"mean score of {side}": each.mean().item() for side, each in zip(SIDES, scores)}

    # ------------------------------------------------------------------------------------------------------------------
    # Scores

    def sample(self, model, requests, sampling):
        """Yields (index of a request, the score of sampling.answer to its text)."""
        for index, request in enumerate(requests):
            score = scores(model, self.chat, [[said("user", request["text"])]], [sampling.answer])
            yield index, f"{score.item():.4f}"

    inside = Task.inside  # it only scores: raises UserError

    def show(self, model, short=False):
        """Some held-out pairs with their scores, the better answer first."""
        pairs = [self.dataset.rows["val"][row] for row in self.pairs["val"]["rows"][:3 if short else 10]]
        found = [scores(model, self.chat, [pair["messages"] for pair in pairs], [pair[side] for pair in pairs])
                 for side in SIDES]
        return "\n".join(f"{pair['messages'][-1]['content']}  {pair['chosen']} ({good:.2f}) above {pair['rejected']}"
                         f" ({bad:.2f}): {'right' if good > bad else 'wrong'}"
                         for pair, good, bad in zip(pairs, *found))

    def command(self, out_dir):
        pair = self.dataset.rows["val"][0]
        return Task.command(self, out_dir, f"--prompt={pair['messages'][-1]['content']}", f"--answer={pair['chosen']}")


def agreement(margins):
    """The share of margins above 0, where 0 counts half."""
    return ((margins > 0).mean() + (margins == 0).mean() / 2).item()
