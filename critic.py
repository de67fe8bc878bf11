"""A GPT with a second head: one number for each position. It is a reward model, and the critic of PPO.

A reward model's number where an answer ends says how good the answer is (Ouyang et al. 2022, InstructGPT). A critic's
number at a position says what reward is to be expected from there on.

Axes: B batch, T positions, C channels, V vocabulary.
"""

import dataclasses

import torch
import torch.nn as nn

from model import GPT, predict


class Critic(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    def forward(self, tokens, targets=None, places=None, scored=False):
        """As a GPT's. scored: returns (logits (B, T, V), `scores` (B, T)) instead."""
        if not scored:
            return super().forward(tokens, targets, places)
        x = self.hidden(tokens)
        return self.logits(x), self.scores(x)

    def scores(self, x):
        """Float32 numbers, (..., C) -> (...)."""
        return self.score(x).squeeze(-1).float()


class RewardModel(Critic):
    """A Critic whose head, if any, is the token embedding: it scores whole sequences."""

    def __init__(self, config):
        super().__init__(dataclasses.replace(config, tied=True))

    def forward(self, tokens, ends, targets=None):
        """Scores (B,) of tokens (B, T), each read at the position of its last token, ends (B,).

        Given targets of the first N rows, (N, T): (scores, the nats of each target), because it still can write.
        """
        x = self.hidden(tokens)
        scores = self.scores(x[torch.arange(len(ends), device=x.device), ends])  # (B, T, C) -> (B, C) -> (B,)
        return scores if targets is None else (scores, predict(self.logits, x[:len(targets)], targets))


def as_kind(kind, model):
    """The model's weights in a model of the class `kind`: GPT, Critic or RewardModel. A new score head is zero."""
    if type(model) is kind:
        return model
    made = kind(model.config).to(next(model.parameters()).device)
    known = model.state_dict()
    if hasattr(made, "score"):
        nn.init.zeros_(made.score.weight)
        known = {"score.weight": made.score.weight.detach(), **known}
    made.load_state_dict({name: known[name] for name in made.state_dict()})
    return made.train(model.training)
