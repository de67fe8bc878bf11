"""The one loop that writes: the next token of every row, again and again; and how to choose it.

    for tokens in generate(model, prompt, 100, picker(settings, device)):      prompt: (B, T), tokens: (B,)

`generate` alone puts fast steps on a model (machine/decode.py), and takes them off at its end.

Axes: B batch, T tokens of the prompt, C channels, V vocabulary.
"""

import functools

import torch

from machine.decode import fast_steps


def pick_tokens(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token per row, from softmax(logits / temperature); temperature 0 takes the likeliest.

    logits: (B, V). top_k: only the k likeliest (0: all). top_p: of these, only the fewest likeliest whose
    probabilities reach p together (Holtzman et al. 2019). Returns (B,).
    """
    if temperature < 1e-30:  # logits / temperature would be infinite
        return logits.argmax(-1)
    logits, order = logits.float(), None
    if 0 < top_k < logits.size(-1) or top_p < 1:
        logits, order = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # likeliest first
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the token that crosses top_p stays
    # With e ~ Exp(1), argmax(p / e) is a draw from p: no normalising, no waiting for the device.
    choice = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)  # (B, 1)
    return (choice if order is None else order.gather(-1, choice)).squeeze(-1)


def picker(settings, device):
    """`pick_tokens` as the settings for sampling have it, with the generator that their seed gives."""
    return functools.partial(pick_tokens, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
                             generator=torch.Generator(device).manual_seed(settings.seed))


@torch.inference_mode()
def generate(model, tokens, count, pick, eos=None, **context):
    """Yields up to `count` times the next token of every row, (B,), continuing tokens: (B, T).

    pick(logits): the tokens chosen from (B, V); or (tokens, rows), where rows (B,) says which row each continues, as a
    beam search has it. eos: a row that has chosen it goes on with it, and when all rows have, nothing more is yielded.
    context: what model.hidden gets at every call besides, such as an image.

    Positions end at block_size: whenever the window is full, its last half is encoded anew from position 0 and
    generation goes on from there. So each token sees at least the block_size / 2 tokens before it, and the cost per
    token stays flat. A model without `make_caches` computes the whole window for each token.
    """
    block_size = model.config.block_size
    window = [tokens[:, -block_size:]]  # in pieces, of which the caches hold all but the last: `start` tokens
    size, start = min(block_size, window[0].size(1) + count), 0
    caches = model.make_caches(len(tokens), size) if hasattr(model, "make_caches") else None
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with fast_steps(model):
        for _ in range(count):
            if caches is None:
                window, start = [torch.cat(window, dim=1)[:, -block_size:]], 0
            x = model.hidden(window[-1], caches, start, **context)[:, -1]  # (B, C)
            start += window[-1].size(1)
            chosen = pick(model.logits(x))
            if isinstance(chosen, tuple):
                chosen, rows = chosen
                window, ended = [torch.cat(window, dim=1)[rows]], ended[rows]
                if caches is not None:
                    caches.reorder(rows)
            if eos is not None:
                chosen = chosen.masked_fill(ended, eos)
                ended = chosen == eos
            yield chosen
            if eos is not None and ended.all():
                return
            window.append(chosen[:, None])
            if start == block_size and caches is not None:
                window, start = [torch.cat(window, dim=1)[:, -max(1, block_size // 2):]], 0
