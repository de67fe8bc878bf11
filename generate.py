"""Sampling: how to choose a token from logits, the loop that generates token after token, and beam search.

    for tokens in generate(model, prompt, 100, picker(settings, device)):      prompt: (B, T), tokens: (B,)
    best = beam_search(model, prompt, 100, beam=4, eos=2)[0][0].ids            of the first row of the prompt

While they run, short steps of the model are compiled code where possible (machine/decode.py).

Axes: B batch, T tokens of the prompt, C channels, V vocabulary, N rows of the prompt that beam search still continues,
K width of the beam.
"""

import functools
import math
from typing import NamedTuple

import torch

from machine.decode import fast_steps


def pick_tokens(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token per row, (B,), drawn from softmax(logits / temperature); at temperature 0 the likeliest.

    logits: (B, V). top_k: keep only the k likeliest tokens; 0: keep all. top_p: of these, keep only the smallest set of
    likeliest tokens whose probabilities sum to at least top_p (Holtzman et al. 2019).
    """
    if temperature < 1e-30:  # logits / temperature would be infinite
        return logits.argmax(-1)
    logits, order = logits.float(), None
    if 0 < top_k < logits.size(-1) or top_p < 1:
        logits, order = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # likeliest first
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # keeps the token that crosses top_p
    # With e ~ Exp(1), argmax(p / e) is a draw from p. p need not sum to 1, and the CPU need not wait for the device.
    e = torch.empty_like(p).exponential_(generator=generator).clamp_min_(1e-37)  # MPS also draws 0, and 0 / 0 wins
    choice = (p / e).argmax(-1, keepdim=True)  # (B, 1)
    return (choice if order is None else order.gather(-1, choice)).squeeze(-1)


def picker(settings, device):
    """A function from logits (B, V) to tokens (B,): `pick_tokens` with the options and seed of sampling settings."""
    return functools.partial(pick_tokens, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
                             generator=torch.Generator(device).manual_seed(settings.seed))


@torch.inference_mode()
def generate(model, tokens, count, pick, eos=None, **context):
    """Continues tokens (B, T): yields the next token of every row, (B,), at most `count` times.

    pick(logits): returns tokens (B,) chosen from logits (B, V). Or it returns (tokens, rows), both (B,), where token i
    continues row rows[i], as in beam search. eos: the end token. A row that has chosen eos repeats it, and generation
    stops once all rows have. context: further arguments for every call of model.hidden, such as an image.

    Positions end at block_size. When the window is full, its last half is encoded again from position 0, and generation
    goes on from there. So each token sees at least the block_size / 2 tokens before it, and the cost per token stays
    flat. A model without `make_caches` computes the whole window for each token.
    """
    block_size = model.config.block_size
    window, start = tokens[:, -block_size:], 0  # the caches hold the first `start` tokens of the window
    size = min(block_size, window.size(1) + count)
    caches = model.make_caches(len(tokens), size) if hasattr(model, "make_caches") else None
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with fast_steps(model):
        for _ in range(count):
            x = model.hidden(window[:, start:], caches, start, **context)[:, -1]  # (B, C)
            chosen = pick(model.logits(x))
            if isinstance(chosen, tuple):
                chosen, rows = chosen
                window, ended = window[rows], ended[rows]
                if caches is not None:
                    caches.reorder(rows)
            if eos is not None:
                chosen = chosen.masked_fill(ended, eos)
                ended = chosen == eos
            yield chosen
            if eos is not None and ended.all():
                return
            start = window.size(1)
            window = torch.cat((window, chosen[:, None]), dim=1)
            if caches is None:
                window, start = window[:, -block_size:], 0
            elif start == block_size:
                window, start = window[:, -max(1, block_size // 2):], 0


# ----------------------------------------------------------------------------------------------------------------------
# Beam search

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
                caches = copied(caches, rows, model.make_caches(len(rows), caches.size))
            else:
                caches.reorder(rows)


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


def copied(caches, rows, fewer):
    """Returns `fewer`, new caches, with copies of these rows of `caches`."""
    fewer.last.copy_(caches.last[rows])
    for new, old in zip(fewer, caches):
        new.k.copy_(old.k[rows])
        new.v.copy_(old.v[rows])
    return fewer
