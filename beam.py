"""Beam search: the likeliest continuations of a prompt, not just the likeliest next token.

    best = beam_search(model, prompt, 100, beam=4, eos=2)[0][0].ids            of the first row of the prompt (B, T)

While it runs, short steps of the model are compiled code where possible (machine/decode.py).

Axes: B batch, T tokens of the prompt, C channels, V vocabulary, N rows of the prompt that are still continued,
K width of the beam.
"""

import math
from typing import NamedTuple

import torch

from machine.decode import fast_steps


class Hypothesis(NamedTuple):
    """One continuation of a row, found by beam search."""

    ids: list  # its tokens, without the end token
    score: float  # log-probability / penalty of its length: what the hypotheses are ranked by
    nats: float  # log-probability of all its tokens, the end token included
    length: int  # how many tokens that are, the end token included


@torch.inference_mode()
def beam_search(model, tokens, count, beam, eos, length_penalty=0.0, **context):
    """For each row of tokens (B, T), its `beam` best continuations: a list of `Hypothesis`, the best one first.

    At each step, every hypothesis of a row is continued by every token, and the `beam` likeliest results are kept. What
    ends with the token eos is finished. With beam = 1 this is greedy search. A row leaves the batch when `beam` of its
    hypotheses are finished, and no other one, if it ended now, would score better than the worst of them. At most
    `count` tokens are added, and no more than the model has positions for.

    length_penalty: a score is the log-probability / ((5 + length) / 6)^length_penalty (Wu et al. 2016, equation 14), so
    above 0 it favours long hypotheses. context: see `generate`; its tensors have one row for each row of tokens.
    """
    B, T = tokens.shape
    count = min(count, model.config.block_size + 1 - T)
    left, found = range(B), [[] for _ in range(B)]  # left: the rows of tokens that are still in the batch
    rows = torch.arange(B, device=tokens.device).repeat_interleave(beam)
    window, context, start = tokens[rows], taken(context, rows), 0  # window: (N K, T)
    caches = model.make_caches(B * beam, T + count - 1)
    before = caches.size - (T + count - 1)  # slots of what stands before the tokens, such as an image
    nats = torch.tensor([[0.0] + [-math.inf] * (beam - 1)] * B, device=tokens.device)  # at first, one hypothesis each
    with fast_steps(model):
        for length in range(1, count + 1):
            x = model.hidden(window[:, start:], caches, start, **context)[:, -1]  # (N K, C)
            best, penalty = continued(nats, model.logits(x)), ((5 + length) / 6) ** length_penalty
            kept, staying = [], []  # kept: K hypotheses of each row that stays
            for row, hypotheses in zip(left, best):
                for total, origin, token in hypotheses[:beam]:
                    if (token == eos or length == count) and total > -math.inf:
                        ids = window[origin, T:].tolist() + [token] * (token != eos)
                        found[row].append(Hypothesis(ids, total / penalty, total, length))
                found[row] = sorted(found[row], key=lambda hypothesis: -hypothesis.score)[:beam]
                going = [each for each in hypotheses if each[2] != eos][:beam]
                if len(found[row]) < beam or found[row][-1].score < going[0][0] / penalty:
                    kept += going
                    staying.append(row)
            if length == count or not kept:
                return found
            nats, rows, chosen = (torch.tensor(values, device=tokens.device) for values in zip(*kept))
            nats, start = nats.view(-1, beam), window.size(1)
            window = torch.cat((window[rows], chosen[:, None]), dim=1)
            if len(staying) < len(left):
                context, left = taken(context, rows), staying
                caches = copied(caches, rows, before + start, model.make_caches(len(rows), T + count - 1))
            else:
                caches.reorder(rows, before + start)


def continued(nats, logits):
    """The 2 K likeliest continuations of each row by one token: N lists of (log-probability, origin, token).

    nats: (N, K), the log-probabilities of the hypotheses. logits: (N K, V). origin: which of the N K is continued. Each
    hypothesis has one continuation that ends, so at least K of the 2 K go on.
    """
    (N, K), V = nats.shape, logits.size(-1)
    totals, index = (nats[..., None] + logits.log_softmax(-1).view(N, K, V)).view(N, K * V).topk(2 * K)
    return [[(total, n * K + i // V, i % V) for total, i in zip(*row)]
            for n, row in enumerate(zip(totals.tolist(), index.tolist()))]


def taken(value, rows):
    """The rows of all tensors in a dict, list or tuple, or of one tensor; None stays None."""
    if isinstance(value, dict):
        return {name: taken(part, rows) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(taken(part, rows) for part in value)
    return None if value is None else value[rows]


def copied(caches, rows, end, fewer):
    """Returns `fewer`, new caches, with copies of these rows of `caches`, up to slot `end`."""
    fewer.last.copy_(caches.last[rows])
    for new, old in zip(fewer, caches):
        new.k[:, :, :end] = old.k[rows, :, :end]
        new.v[:, :, :end] = old.v[rows, :, :end]
    return fewer
