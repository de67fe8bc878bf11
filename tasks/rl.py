"""The rl task: a chat model learns from rewards for its answers. A world checks them, or a reward model scores them.

    python train.py config/chat/rl.py             group-relative advantages, from the run of config/chat/countdown.py
    python train.py config/chat/ppo.py            PPO with a value head
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

from batches import padded, shuffled_rows, to_device
from configurator import UserError
from critic import Critic, as_kind
from generate import pick_tokens
from machine.device import autocast
from model import GPTConfig
from run.cost import size_in_words
from tasks.chat import ChatTask, alike, said
from tasks.reference import keep, keep_copy, recall
from tasks.scores import load_reward, scores_of
from tasks.text import EVAL_TOKENS
from tokenizer import same_vocabulary

EVAL_QUESTIONS, EVAL_SAMPLES = 256, 8  # of an evaluation: so many questions get so many answers each


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
    fixed_shapes = False
    reference = None  # the model that the run started from; known when the first round begins
    scorer = None  # the reward model, if it gives the rewards
    answers = None  # of the round
    columns = None  # {argument of `loss`: (n, T) float32} of the round
    order = None  # rows of the round's updates, one update after the other

    def open(self, folder, world):
        super().open(folder, world)
        self.round = self.settings.round
        if not (self.judge or self.settings.reward):
            raise UserError(f"dataset = {self.settings.dataset}: nobody checks its answers: name the run of a reward"
                            " model, --reward=FOLDER")

    def adopt(self, model, generator):
        if source := self.settings.reward:
            if not same_vocabulary(load_reward(source, "cpu")[0].tokenizer, self.tokenizer):
                raise UserError(f"reward = {source}: has another tokenizer than the model that answers: train one from"
                                f" that model, --init_from={self.settings.init_from}")
        model = super().adopt(model, generator)
        return as_kind(Critic, model) if self.settings.method == "ppo" else model

    def shape(self, model):
        return {}  # the model brings its own

    # ------------------------------------------------------------------------------------------------------------------
    # A round

    def begin(self, step, model, world, dtype):
        if step % self.round:
            return
        s = self.settings
        if self.reference is None:
            self.meet(model, step)
        model.eval()
        drawn = self.roll_out(model, self.questions(step), s.samples, (s.seed, 0, step))
        if step == 0 and drawn.rewards.min() == drawn.rewards.max():
            raise UserError(f"all {len(drawn.ids)} answers of the first round have the reward {drawn.rewards[0]:g}:"
                            " there is nothing to learn from them; start from a model that is sometimes right, and"
                            " sometimes wrong")
        self.answers, self.columns = self.compared(drawn) if s.method == "group" else (drawn, {})
        self.add_logp(model, dtype)
        model.train()
        generator = np.random.Generator(np.random.Philox(key=np.array((s.seed, step), dtype=np.uint64)))
        self.order = np.concatenate([generator.permutation(len(self.answers.ids)) for _ in range(s.epochs)])
        self.shown = {**drawn.measures(), "learned": len(self.answers.ids) / len(drawn.ids)}

    def meet(self, model, step):
        """Loads the reference and the reward model. Before the first update, puts copies into the run's folder."""
        source = self.settings.reward
        if step == 0:
            keep(self, model)
            if source:
                keep_copy(self, "reward", source)
        self.reference = recall(self)[1]
        if source:
            self.scorer = recall(self, "reward")[1]

    def questions(self, step):
        """The messages of each of the G questions of a round that begins after `step` updates."""
        s, number = self.settings, step // self.round
        count = s.batch_size * s.round // (s.epochs * s.samples)
        if self.judge:
            return [[said("user", self.judge.problem(s.seed, number * count + i)[0])] for i in range(count)]
        known = self.asked("train")
        if count > len(known):
            raise UserError(f"batch_size = {s.batch_size}: a round asks {count} questions, and only {len(known)}"
                            f" training rows leave room for an answer of {self.longest} tokens: use a smaller one, more"
                            " --samples, or fewer --answer_tokens")
        return [known[i] for i in shuffled_rows(len(known), count, s.seed, number)]

    def asked(self, split):
        """The messages of all questions of a split: problems of the world, or dialogues without their last answer."""
        if self.judge:
            return [[said("user", prompt)] for prompt in self.problems(split)]
        found = [messages[:-1] for messages in self.dataset.rows[split]]
        return [each for each in found if len(self.chat.prompt(each)) + self.longest <= self.block_size]

    @property
    def longest(self):
        return self.settings.answer_tokens or (super().longest if self.judge else 64)

    def roll_out(self, model, questions, count, key):
        """`Answers` to questions, a list of messages: `count` to each. key: integers that decide what is drawn.

        The ranks take the batches in turn. What is drawn does not depend on how many ranks there are.
        """
        prompts = [self.chat.prompt(messages) for messages in questions]
        if (length := max(map(len, prompts))) + self.longest > self.block_size:
            raise UserError(f"block_size = {self.block_size}: a question has {length} tokens, and an answer up to"
                            f" {self.longest}: use a model with a larger one, or fewer --answer_tokens")
        batches, found = alike(prompts, count), []
        for number in range(self.world.rank, len(batches), self.world.size):
            seed = int(np.random.SeedSequence((*key, number)).generate_state(1, np.uint64)[0])
            pick = functools.partial(pick_tokens, generator=torch.Generator(self.world.device).manual_seed(seed))
            rows = batches[number]
            found += zip(rows, self.continuations(model, [prompts[i] for i in rows], pick))
        group, answers = zip(*sorted(self.world.gather(found)))
        prompts, answers = [prompts[i] for i in group], [self.until_end(answer) for answer in answers]
        verdicts = [self.verdict(questions[i], answer) for i, answer in zip(group, answers)]
        right = np.array([verdict == 1.0 for verdict in verdicts], np.float32)
        malformed = np.array([verdict is None for verdict in verdicts], np.float32)
        rewards = right
        if self.scorer:
            rewards = scores_of(self.scorer, [[*one, *other] for one, other in zip(prompts, answers)]).cpu().numpy()
            endless = [answer[-1] not in self.tokenizer.ends for answer in answers]
            rewards[endless] = rewards.min()  # the reward model has never seen one
        return Answers(*joined(prompts, answers), np.array(group), right, malformed, rewards)

    def verdict(self, messages, answer):
        """1.0: right, 0.0: wrong, None: malformed. An answer that nobody checks is well-formed if it has an end."""
        if self.judge:
            return self.judge.check(messages[-1]["content"], self.text_of(answer))
        return 0.0 if answer[-1] in self.tokenizer.ends else None

    def compared(self, drawn):
        """(the answers that are better or worse than others to their question, {"advantages": (n, T)} of these)."""
        advantages = group_advantages(drawn.rewards, drawn.group, self.settings.divide)
        kept = np.flatnonzero(advantages) if advantages.any() else np.arange(len(advantages))
        answers = Answers(*(each[kept] for each in drawn))
        return answers, {"advantages": advantages[kept, None] * answers.written}

    def add_logp(self, model, dtype):
        """Adds what `loss` needs of the round's answers to self.columns: (n, T) float32 each, 0 where unwritten."""
        s, found, columns = self.settings, self.answers, self.columns
        if s.kl:
            columns["reference"], = self.per_token(lambda ids: (-self.reference(ids[:, :-1], ids[:, 1:]),), dtype)
        if s.method == "group":
            columns["old"], = self.per_token(lambda ids: (-model(ids[:, :-1], ids[:, 1:]),), dtype)
            return
        columns["old"], values = self.per_token(lambda ids: scored_logp(model, ids), dtype)
        rewards = at_the_end(standardized(found.rewards) if self.scorer else found.rewards, found.written)
        if s.kl:
            rewards -= s.kl * (columns["old"] - columns["reference"])
        advantages = unexpected(rewards, values, found.written, s.lam)
        columns |= {"returns": advantages + values, "advantages": standardized(advantages, found.written)}

    @torch.no_grad()
    def per_token(self, compute, dtype, answers=None):
        """What compute(ids (B, T + 1)) returns, a tuple of (B, T), of all answers: (n, T), 0 where unwritten."""
        answers, found = answers or self.answers, []
        at_once = max(1, EVAL_TOKENS // answers.written.shape[1])
        for start in range(0, len(answers.ids), at_once):
            with autocast(self.world.device, dtype):
                some = compute(to_device(answers.ids[start:start + at_once], self.world.device))
            found.append([value.float().cpu().numpy() for value in some])
        return [np.concatenate(parts) * answers.written for parts in zip(*found)]

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
        new = logp.gather(-1, targets[..., None]).squeeze(-1) * (weights > 0)  # (B, T), 0 where unwritten, as the old
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
        """As ChatTask's, and of drawn answers: pass@1, pass@8, mean reward, share of malformed ones, length, KL."""
        found = super().evaluate(model, split, world, dtype, limit)
        if self.reference is None:
            return found
        questions = self.asked(split)[:EVAL_QUESTIONS]
        drawn = self.roll_out(model, questions, EVAL_SAMPLES, (self.settings.seed, 1))
        new, = self.per_token(lambda ids: (-model(ids[:, :-1], ids[:, 1:]),), dtype, drawn)
        old, = self.per_token(lambda ids: (-self.reference(ids[:, :-1], ids[:, 1:]),), dtype, drawn)
        found |= {name: float(value) for name, value in drawn.measures().items()}
        found["kl"] = float((np.exp(old - new) - 1 - old + new).sum() / drawn.written.sum())
        solved = np.bincount(drawn.group, drawn.right) > 0
        if self.judge:
            found |= {"pass@1": float(drawn.right.mean()), f"pass@{EVAL_SAMPLES}": float(solved.mean())}
        return found

    def summary(self, model):
        s = self.settings
        rounds, count = s.max_iters // s.round, s.batch_size * s.round // s.epochs
        return (f"model: {size_in_words(model)}; {rounds} rounds of {count // s.samples} questions with {s.samples}"
                f" answers each, and {s.round} updates of {s.batch_size} answers; rewards from"
                f" {s.reward or 'the world ' + self.judge.name}")

    def cost(self, model):
        return self.settings.batch_size * (model.config.block_size), 0


# ----------------------------------------------------------------------------------------------------------------------
# Advantages

def joined(prompts, answers):
    """(ids (n, T + 1) int64, written (n, T) float32) of n prompts and answers, lists of ids: see `Answers`."""
    ids, lengths = padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers)], 0)
    places, starts = np.arange(1, ids.shape[1]), np.array(list(map(len, prompts)))
    written = (places >= starts[:, None]) & (places < lengths[:, None])
    return ids, written.astype(np.float32)


def at_the_end(rewards, written):
    """Rewards (n,) at the last written position of each row, 0 elsewhere: (n, T)."""
    found = np.zeros_like(written)
    last = written.shape[1] - 1 - written[:, ::-1].argmax(1)
    found[np.arange(len(found)), last] = rewards
    return found


def group_advantages(rewards, group, divide):
    """Advantages (n,): each reward minus the mean of its group; if `divide`, in units of the group's deviation."""
    counts = np.bincount(group)
    advantages = rewards - (np.bincount(group, rewards) / counts)[group]
    deviation = np.sqrt(np.bincount(group, advantages ** 2) / counts)[group]
    advantages[deviation < 1e-6] = 0  # equal rewards, but for rounding
    return (advantages / np.maximum(deviation, 1e-6) if divide else advantages).astype(np.float32)


def unexpected(rewards, values, written, lam):
    """Advantages (n, T): generalized advantage estimation with gamma = 1. All arrays: (n, T)."""
    advantages, later, value = np.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        later = (rewards[:, t] + value - values[:, t] + lam * later) * written[:, t]
        value = values[:, t] * written[:, t]
        advantages[:, t] = later
    return advantages


def standardized(values, written=1.0):
    """Values with mean 0 and deviation 1 where `written` is 1; 0 elsewhere. Scores have no scale of their own."""
    written = written * np.ones_like(values)
    values = (values - (values * written).sum() / written.sum()) * written
    return values / (np.sqrt((values ** 2).sum() / written.sum()) + 1e-8)


def clipped(ratio, advantages, clip):
    """PPO's loss of each token: nothing is gained by a ratio further than `clip` from 1."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def scored_logp(critic, ids):
    """(log-probability of each target, the critic's number before it), each (B, T), of ids (B, T + 1)."""
    logits, values = critic(ids[:, :-1], scored=True)
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1), values
