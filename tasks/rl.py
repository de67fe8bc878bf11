"""The rl task: a chat model learns from rewards for its own answers. A world checks them, or a reward model scores them.

    python train.py config/chat/rl.py                 group-relative advantages, from the run of config/chat/countdown.py
    python train.py config/chat/ppo.py                PPO with a value head
    python sample.py --out_dir=out/chat/rl --prompt="3 12 17=53" --temperature=0

A round is one roll-out and the updates that learn from it. In a roll-out the model writes `samples` answers to each of
some questions, at temperature 1. A world has problems without end; other dialogues ask what their training rows ask.

method=group: an answer's advantage is its reward minus the mean over all answers to its question (Shao et al. 2024,
GRPO). Answers without advantage are left out. method=ppo: a value head learns which reward to expect, and the advantage
is what was not expected (Schulman et al. 2017; with lambda, 2016). Both clip the ratio of new and old probabilities.

The model that the run starts from is its reference: `kl` is the price of leaving it. The run's folder keeps copies of
the reference and of the reward model.

Axes: n answers of a round, G questions, B rows of a batch, T tokens of a row but the last, V vocabulary.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from batches import shuffled_rows, to_device
from configurator import UserError
from critic import Critic, as_kind
from generate import pick_tokens
from machine.device import autocast
from model import GPT, GPTConfig
from run.cost import size_in_words
from tasks.chat import ChatTask, alike, said
from tasks.reference import keep, recall
from tasks.text import EVAL_TOKENS

EVAL_QUESTIONS = 256  # of an evaluation, that get several answers each


class Answers(NamedTuple):
    """n answers with their questions. On the CPU."""
    ids: np.ndarray  # (n, T + 1) int64, filled with id 0
    written: np.ndarray  # (n, T) float32: 1 for the targets that the model wrote, its end token included; else 0
    group: np.ndarray  # (n,) which question each one answers
    right: np.ndarray  # (n,) float32: 1 if the world says so, else 0
    malformed: np.ndarray  # (n,) float32: 1 if it has no end, or not the world's form; else 0
    rewards: np.ndarray  # (n,) float32

    def measures(self):
        """{name: mean over the answers}."""
        return {"reward": self.rewards.mean(), "malformed": self.malformed.mean(),
                "length": self.written.sum(1).mean()}


class RLTask(ChatTask):
    models = {**ChatTask.models, "critic": (Critic, GPTConfig)}
    rows_label = "the answers"
    reference = None  # the model that the run started from; known when the first round begins
    answers = None  # of the round
    columns = None  # {argument of `loss`: (n, T) float32} of the round
    order = None  # rows of the round's updates, one update after the other

    def open(self, folder, world):
        super().open(folder, world)
        self.round = self.settings.round
        if not (self.judge or self.settings.reward):
            raise UserError(f"dataset = {self.settings.dataset}: nobody checks its answers: name the run of a reward"
                            " model, --reward=FOLDER")

    def build(self, generator):
        return self.with_head(super().build(generator))

    def adopt(self, model, generator):
        return self.with_head(super().adopt(model, generator))

    def with_head(self, model):
        return as_kind(Critic if self.settings.method == "ppo" else GPT, model)

    # ------------------------------------------------------------------------------------------------------------------
    # A round

    def begin(self, step, model, world, dtype):
        s = self.settings
        if self.reference is None:
            if step == 0:
                keep(self, model)
            self.reference = recall(self)
        model.eval()
        self.answers = found = self.roll_out(model, self.questions(step), s.samples, (s.seed, 0, step))
        self.columns = {"old": self.logp(model, found, dtype)}
        if s.kl:
            self.columns["reference"] = self.logp(self.reference, found, dtype)
        self.add_advantages(model, dtype)
        model.train()
        kept = np.flatnonzero(self.columns["advantages"].any(1))
        if not len(kept) and step == 0:
            raise UserError(f"all {len(found.ids)} answers of the first round have the reward {found.rewards[0]:g}:"
                            " there is nothing to learn from them; start from a model that is sometimes right, and"
                            " sometimes wrong")
        rows = kept if len(kept) else np.arange(len(found.ids))
        generator = np.random.Generator(np.random.Philox(key=np.array((s.seed, step), dtype=np.uint64)))
        self.order = np.concatenate([generator.permutation(rows) for _ in range(s.epochs)])
        self.shown = {**found.measures(), "learned": len(kept) / len(found.ids)}

    def questions(self, step):
        """The messages of the G questions of a round that begins after `step` updates."""
        s = self.settings
        count = s.batch_size * s.round // (s.epochs * s.samples)
        if self.judge:
            first = step // self.round * count
            return [[said("user", self.judge.problem(s.seed, first + i)[0])] for i in range(count)]
        rows = self.dataset.rows["train"]
        return [rows[i][:-1] for i in shuffled_rows(len(rows), count, s.seed, step // self.round)]

    def roll_out(self, model, questions, count, key):
        """`Answers` to questions, a list of messages: `count` for each. key: integers that decide what is drawn.

        The ranks take the batches in turn. What is drawn does not depend on how many ranks there are.
        """
        prompts = [self.chat.prompt(messages) for messages in questions]
        batches, found = alike(prompts, count), []
        for number in range(self.world.rank, len(batches), self.world.size):
            seed = int(np.random.SeedSequence((*key, number)).generate_state(1, np.uint64)[0])
            pick = functools.partial(pick_tokens, generator=torch.Generator(self.world.device).manual_seed(seed))
            rows = batches[number]
            found += zip(rows, self.continuations(model, [prompts[i] for i in rows], pick))
        found = sorted(self.world.gather(found), key=lambda each: each[0])
        ends, longest = self.tokenizer.ends, max(map(len, prompts)) + self.longest
        ids, written = np.zeros((len(found), longest), np.int64), np.zeros((len(found), longest - 1), np.float32)
        lengths = []
        for row, (i, answer) in enumerate(found):
            length = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
            begin, end = len(prompts[i]), len(prompts[i]) + length
            ids[row, :begin], ids[row, begin:end] = prompts[i], answer[:length]
            written[row, begin - 1:end - 1] = 1
            lengths.append(end)
        group = np.array([i for i, _ in found])
        verdicts = [self.verdict(questions[i], answer) for i, answer in found]
        right = np.array([verdict == 1.0 for verdict in verdicts], np.float32)
        malformed = np.array([verdict is None for verdict in verdicts], np.float32)
        return Answers(ids, written, group, right, malformed, right)

    def verdict(self, messages, answer):
        """1.0: right, 0.0: wrong, None: malformed."""
        return self.judge.check(messages[-1]["content"], self.text_of(answer))

    @torch.no_grad()
    def logp(self, model, answers, dtype, scored=False):
        """The log-probability (n, T) float32 of each target. scored: (that, the value head's numbers (n, T))."""
        found, T = [], answers.written.shape[1]
        at_once = max(1, EVAL_TOKENS // T)
        for start in range(0, len(answers.ids), at_once):
            ids = to_device(answers.ids[start:start + at_once], self.world.device)
            with autocast(self.world.device, dtype):
                found.append(-model(ids[:, :-1], ids[:, 1:]).cpu())
        return torch.cat(found).numpy()

    def add_advantages(self, model, dtype):
        """Adds "advantages" to self.columns, and for PPO "returns"."""
        s, found = self.settings, self.answers
        if s.method == "group":
            self.columns["advantages"] = group_advantages(found.rewards, found.group, s.divide)[:, None] * found.written
            return
        rewards = np.zeros_like(found.written)
        last = found.written.shape[1] - 1 - found.written[:, ::-1].argmax(1)
        rewards[np.arange(len(last)), last] = found.rewards
        if s.kl:
            rewards -= s.kl * (self.columns["old"] - self.columns["reference"]) * found.written
        values = self.values(model, found, dtype) * found.written
        advantages = unexpected(rewards, values, found.written, s.lam)
        self.columns["returns"] = advantages + values
        count = found.written.sum()
        mean = advantages.sum() / count
        deviation = np.sqrt((((advantages - mean) * found.written) ** 2).sum() / count)
        self.columns["advantages"] = (advantages - mean) / (deviation + 1e-8) * found.written

    @torch.no_grad()
    def values(self, model, answers, dtype):
        found, T = [], answers.written.shape[1]
        at_once = max(1, EVAL_TOKENS // T)
        for start in range(0, len(answers.ids), at_once):
            ids = to_device(answers.ids[start:start + at_once], self.world.device)
            with autocast(self.world.device, dtype):
                found.append(model(ids[:, :-1], scored=True)[1].cpu())
        return torch.cat(found).numpy()

    # ------------------------------------------------------------------------------------------------------------------
    # An update

    def pick(self, step):
        if self.order is None:
            return np.arange(self.settings.batch_size)
        return np.array_split(self.order, self.round)[step % self.round]

    def weight(self, rows):
        return float(self.answers.written[rows].sum())

    def batch(self, rows, generator):
        ids = to_device(self.answers.ids[rows], self.world.device)
        columns = {name: to_device(column[rows], self.world.device) for name, column in self.columns.items()}
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:], **columns}, to_device(self.answers.written[rows],
                                                                                  self.world.device)

    def loss(self, model, arguments, weights):
        s, tokens, targets = self.settings, arguments["tokens"], arguments["targets"]
        logits, values = model(tokens, scored=True) if s.method == "ppo" else (model(tokens), None)
        logp = logits.log_softmax(-1)  # (B, T, V)
        new = logp.gather(-1, targets[..., None]).squeeze(-1)  # (B, T)
        entropy = -(logp.exp() * logp).sum(-1)
        ratio = (new - arguments["old"]).exp()
        loss = clipped(ratio, arguments["advantages"], s.clip) - s.entropy * entropy
        shown = {"entropy": entropy, "clipped": ((ratio - 1).abs() > s.clip).float()}
        if "reference" in arguments:
            difference = arguments["reference"] - new
            shown["kl"] = difference.exp() - 1 - difference  # estimates the KL, and is never negative (Schulman 2020)
            if s.method == "group":
                loss = loss + s.kl * shown["kl"]
        if values is not None:
            shown["value_loss"] = (values - arguments["returns"]).square()
            loss = loss + s.value_weight * shown["value_loss"]
        shown = {name: (value * weights).sum() for name, value in shown.items()}
        return (loss * weights).sum(), shown | {name: value * weights.sum() for name, value in self.shown.items()}

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    def evaluate(self, model, split, world, dtype, limit=0):
        found = super().evaluate(model, split, world, dtype, limit)
        if self.reference is None:
            return found
        questions = [[said("user", prompt)] for prompt in self.problems(split)[:EVAL_QUESTIONS]]
        drawn = self.roll_out(model, questions, self.settings.samples, (self.settings.seed, 1))
        difference = self.logp(self.reference, drawn, dtype) - self.logp(model, drawn, dtype)
        kl = ((np.exp(difference) - 1 - difference) * drawn.written).sum() / drawn.written.sum()
        solved = [drawn.right[drawn.group == i].any() for i in range(len(questions))]
        return found | {"pass@1": float(drawn.right.mean()), f"pass@{self.settings.samples}": float(np.mean(solved)),
                        "kl": float(kl), **{name: float(value) for name, value in drawn.measures().items()}}

    def summary(self, model):
        s = self.settings
        rounds, count = s.max_iters // s.round, s.batch_size * s.round // s.epochs
        return (f"model: {size_in_words(model)}; {rounds} rounds of {count // s.samples} questions with {s.samples}"
                f" answers each, and {s.round} updates of {s.batch_size} answers; rewards from"
                f" {s.reward or 'the world ' + self.judge.name}")

    def cost(self, model):
        return self.settings.batch_size * (model.config.block_size), 0


def group_advantages(rewards, group, divide):
    """The advantages (n,): each reward minus the mean of its group, divided by the group's deviation if `divide`."""
    counts = np.bincount(group)
    mean = np.bincount(group, rewards) / counts
    advantages = rewards - mean[group]
    deviation = np.sqrt(np.bincount(group, advantages ** 2) / counts)
    advantages[deviation[group] < 1e-6] = 0
    if divide:
        advantages = advantages / np.maximum(deviation, 1e-6)[group]
    return advantages.astype(np.float32)


def unexpected(rewards, values, written, lam):
    """The advantages (n, T) by generalized advantage estimation with gamma 1. All arrays: (n, T)."""
    advantages, later, value_after = np.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        later = (rewards[:, t] + value_after - values[:, t] + lam * later) * written[:, t]
        value_after = values[:, t] * written[:, t]
        advantages[:, t] = later
    return advantages


def clipped(ratio, advantages, clip):
    """PPO's loss of each token: nothing is gained by a ratio further than `clip` from 1."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
