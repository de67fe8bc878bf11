"""Sampling: how to choose a token from logits, and the loop that generates token after token.

    for tokens in generate(model, prompt, 100, picker(settings, device)):      prompt: (B, T), tokens: (B,)

While `generate` runs, short steps of the model are compiled code where possible (machine/decode.py); on a GPU they are
a CUDA graph (machine/capture.py).

Axes: B batch, T tokens of the prompt, C channels, V vocabulary.
"""

import contextlib
import functools

import torch

from machine.capture import CapturedStep, can_capture, read_ahead
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
    stops once all rows have. context: further arguments for every call of model.hidden, such as an image. On a GPU, if
    pick is `pick_tokens`, the steps are a CUDA graph, and the tokens are yielded on the CPU.
    """
    capturing = getattr(pick, "func", pick) is pick_tokens and can_capture(model, tokens.device)
    with contextlib.closing(written(model, tokens, count, pick, eos, context, capturing)) as steps:
        for chosen in read_ahead(steps) if capturing else steps:
            yield chosen
            if eos is not None and (chosen == eos).all():
                return


def written(model, tokens, count, pick, eos, context, capturing):
    """Yields what `generate` yields, but does not stop before `count`. capturing: whether to record the steps.

    Positions end at block_size. When the window is full, its last half is encoded again from position 0, and generation
    goes on from there. So each token sees at least the block_size / 2 tokens before it, and the cost per token stays
    flat. A model without `make_caches` computes the whole window for each token.
    """
    block_size = model.config.block_size
    window, start = tokens[:, -block_size:], 0  # the caches hold the first `start` tokens of the window
    size = min(block_size, -(-(window.size(1) + count) // 64) * 64)  # rounded up: a GPU plans its kernels for each size
    caches = model.make_caches(len(tokens), size) if hasattr(model, "make_caches") else None
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    def step(tokens, start):
        """What pick chooses after tokens (B, T) at the positions from `start` on, an int or a tensor."""
        cached = () if caches is None else (caches, start)
        return pick(model.logits(model.hidden(tokens, *cached, **context)[:, -1]))  # (B, C) -> (B, V) -> (B,)

    if capturing and caches is not None:
        step = CapturedStep(step, caches, getattr(pick, "keywords", {}).get("generator"), count)
    with fast_steps(model):
        for _ in range(count):
            chosen = step(window[:, start:], start)
            if isinstance(chosen, tuple):
                chosen, rows = chosen
                window, ended = window[rows], ended[rows]
                if caches is not None:
                    caches.reorder(rows)
            if eos is not None:
                chosen = chosen.masked_fill(ended, eos)
                ended = chosen == eos
            yield chosen
            start = window.size(1)
            window = torch.cat((window, chosen[:, None]), dim=1)
            if caches is None:
                window, start = window[:, -block_size:], 0
            elif start == block_size:
                window, start = window[:, -max(1, block_size // 2):], 0
