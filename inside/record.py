"""A record: what one pass of a model shows, as a dict that JSON can hold. A task's `inside` makes it, page.py draws it.

    {"kind": "text", "chat", "translation", "image-text", "masked", "tagging", "classification" or "answers",
     "title": "gpt, 10.65M parameters, step 5000",
     "tokens": the text of each of the T tokens that the model read,
     "written": the index of the first token that the model wrote itself; T: none,
     "notes": lines about what is not shown,
     "predictions": [{"at": the index of the token that was predicted, from what stands before it (an encoder: around
                            it); T: the one after the last,
                      "entropy": of the distribution, in bits,
                      "rank", "p": of the token or label that is there, from 0; None if there is none,
                      "top": [[text, probability] of the likeliest]}],
     "lens": {"layers": ["embedding", "block 1", ...], "top": [prediction][layer] -> [[text, probability] of three]},
     "attention": [{"name": "self", "cross", "encoder" or "image", "layers": L, "heads": H, "rows": T, "columns": S,
                    "row_tokens", "column_tokens": texts, "grid": [rows, columns] of patches instead of column_tokens,
                    "data": base64 of the deflated weights, bytes from 0 to 255, as (L, H, T, S)}],
     "embedding": {"names": [...], "xy": [[x, y], ...], "explained": [share of x, share of y]} or None,
     "source": tokens of what is translated, "labels": of each token, or of the text, "image": a data URL or None}

A picture that gets a class is a "classification" whose tokens are its patches, named by row and column.

A lens reads the residual stream after each block as if it were the last: through the final norm and the head
(nostalgebraist 2020). Row t of the attention is that of token t: it made the prediction at t + 1, or an encoder's at t.

Axes: T tokens, S tokens that they look at, C channels, V vocabulary, A predictions, L layers, H heads.
"""

import base64
import contextlib
import functools
import math
import zlib
from typing import NamedTuple

import torch

from configurator import UserError
from generate import generate, picker
from inside.attention import noted
from model import all_blocks
from run.cost import size_in_words
from tokenizer import Transcript

MOST_TOKENS = 256  # of a record; of a longer text, the last ones
MOST_WEIGHTS = 2**24  # of all heads together, a byte each
MOST_NAMES = 512  # with a larger vocabulary, the embedding shows the text's tokens only
TOP = 20  # likeliest tokens of a prediction
LENS_TOP = 3
AT_ONCE = 2**24  # logits at once: it limits memory


class Notes(NamedTuple):
    """What a trunk computes in a pass over one row of T tokens."""
    count: int  # how many of the tokens are shown: the first ones of a text that an encoder reads, else the last ones
    stream: list  # the residual before the first block and after each one, through the final norm: L + 1 times (T, C)
    own: list  # the weights (H, count, count) of each block's self-attention, float32, on the CPU
    cross: list  # likewise those of its cross-attention, (H, count, S), for the first S tokens of the source

    @property
    def layers(self):
        return ["embedding", *(f"block {i}" for i in range(1, len(self.stream)))]


@contextlib.contextmanager
def notes_of(trunk, T, before=0, both_ways=False):
    """The Notes of a trunk, filled by the pass over T tokens that runs inside the context.

    before: N positions of an image before the text, to which the attention is kept too: own is (H, count, N + count).
    both_ways: the trunk is an encoder, so the first tokens are shown.
    """
    most = min(MOST_TOKENS, max(1, math.isqrt(MOST_WEIGHTS // sum(block.attn.n_head for block in trunk.blocks))))
    shown = slice(most) if both_ways else slice(-min(T, most), None)

    def keep(weights):  # (1, H, N + T, N + T) -> (H, count, N + count)
        weights = weights[0, :, before:][:, shown]
        return torch.cat((weights[..., :before], weights[..., before:][..., shown]), dim=-1).cpu()

    crosses, stream = [block.cross_attn for block in trunk.blocks if block.cross_attn is not None], []
    hooks = [trunk.blocks[0].register_forward_pre_hook(lambda block, inputs: stream.append(trunk.ln_f(inputs[0][0])))]
    hooks += [block.register_forward_hook(lambda block, inputs, y: stream.append(trunk.ln_f(y[0])))
              for block in trunk.blocks]
    with torch.inference_mode(), noted((block.attn for block in trunk.blocks), keep) as own, \
            noted(crosses, lambda weights: weights[0, :, shown, :most].cpu()) as cross:
        try:
            yield Notes(min(T, most), stream, own, cross)
        finally:
            for hook in hooks:
                hook.remove()


def trunk_of(model):
    """The trunk that answers: the decoder of a model that has one. Raises UserError for one of lecture.py's models."""
    if not all_blocks(model):
        raise UserError(f"the model {type(model).__name__} has no blocks of model.py, so it can't be looked into: train"
                        " a GPT, the last rung of the ladder")
    part = getattr(model, "decoder", getattr(model, "encoder", model))
    return getattr(part, "transformer", part)


def of_text(kind, task, model, prompt, sampling, most=math.inf):
    """The record of a language model (tasks/text.py) that continues prompt (T,), ids, by at most `most` tokens.

    A text that gets longer than block_size is read as the last window before its last token.
    """
    trunk, device, name = trunk_of(model), next(model.parameters()).device, namer(task.tokenizer)
    tokens, count = torch.from_numpy(prompt)[None].to(device), min(most, sampling.max_new_tokens)
    steps = generate(model, tokens, count, picker(sampling, device), task.tokenizer.eos)
    ids = [*prompt.tolist(), *written_ids(task.tokenizer, steps, sampling.stop)]
    ids, unread = (ids[:-1], ids[-1]) if len(ids) > model.config.block_size else (ids, None)
    window = ids[-model.config.block_size:]
    with notes_of(trunk, len(window)) as notes:
        model.hidden(torch.tensor([window], device=device))
    tokens, written, parts = next_tokens(task, notes, model.logits, ids, len(prompt), unread)
    return make(kind, task, model, tokens, written, **parts, attention=[packed("self", notes.own, tokens, tokens)],
                embedding=embedding(model.wte, ids, name))


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a record

def make(kind, task, model, tokens, written, **parts):
    """A record. parts: its other fields; those left out are empty."""
    empty = {"notes": [], "predictions": [], "lens": None, "attention": [], "embedding": None, "source": [],
             "labels": [], "image": None}
    assert parts.keys() <= empty.keys()
    name = next(name for name, (cls, _) in task.models.items() if type(model) is cls)
    title = [name, size_in_words(model), *([] if task.step is None else [f"step {task.step:,}"])]
    return {"kind": kind, "title": ", ".join(title), "tokens": tokens, "written": written, **empty, **parts}


def next_tokens(task, notes, logits, ids, written, unread=None, first=1):
    """(tokens, written, {field: value}) of a record of a model that predicts each next token, all but `attention`.

    notes: of the pass over ids (T,), or over the last of them. logits: from vectors (A, C) to logits (A, V). written:
    an index in ids. unread: the id after them, if there is one. first: the first index that was predicted.
    """
    T, cut = len(ids), len(ids) - notes.count
    start = T - len(notes.stream[0])  # the index at position 0
    name, ended = namer(task.tokenizer), ids[-1] in (task.tokenizer.eos, *task.tokenizer.ends)
    at, there = range(max(first, cut + 1), T + (not ended)), [*ids, unread]
    predictions, lens = answers(notes, lambda x: x[at.start - 1 - start:at.stop - 1 - start], logits,
                                [i - cut for i in at], [there[i] for i in at], name)
    tokens, said = [name(i) for i in ids[cut:]], [f"only the last {notes.count} of {T} tokens are shown"] * (cut > 0)
    if start > 0:
        said.append(f"the model reads the last {T - start} of them here; when it wrote, its windows began elsewhere")
    return tokens, max(0, written - cut), {"notes": said, "predictions": predictions, "lens": lens}


@torch.no_grad()
def answers(notes, read, logits, at, there, name, several=False):
    """(predictions, lens) of a record, A predictions each.

    read: from a trunk's output (T, C) to the A vectors (A, C) that a head reads. logits: the head, (A, C) -> (A, V).
    at: A indices. there: the id of the token or label that is there, or None, A times; or "likeliest": the labels are
    the likeliest ones. name: from an id to its text.
    several: the labels don't exclude each other, so that each has a probability of its own.
    """
    shares = torch.sigmoid if several else functools.partial(torch.softmax, dim=-1)
    layers, predictions, tops = [read(x) for x in notes.stream], [], []
    V = logits(layers[-1][:1]).size(-1)
    for rows in torch.arange(len(at)).split(max(1, AT_ONCE // V)):
        p = shares(logits(layers[-1][rows]).float()).cpu()  # (rows, V)
        labels = p.argmax(-1).tolist() if there == "likeliest" else [there[i] for i in rows]
        predictions += [prediction(*each, name, several) for each in zip(p, [at[i] for i in rows], labels)]
        of_layers = [top(shares(logits(x[rows]).float()).cpu(), LENS_TOP, name) for x in layers]
        tops += map(list, zip(*of_layers))
    return predictions, {"layers": notes.layers, "top": tops}


def prediction(p, at, there, name, several=False):
    """One of the record's predictions. p: (V,). The other arguments: see `answers`."""
    bits = torch.special.entr(p).sum() + (torch.special.entr(1 - p).sum() if several else 0)
    known = there is not None
    return {"at": at, "entropy": short(bits / math.log(2)), "rank": int((p > p[there]).sum()) if known else None,
            "p": short(p[there]) if known else None, "top": top(p[None], TOP, name)[0]}


def top(p, count, name):
    """The `count` likeliest of each row of p (A, V): [[text, probability], ...] for each."""
    shares, ids = p.topk(min(count, p.size(-1)))
    return [[[name(i), short(share)] for i, share in zip(*row)] for row in zip(ids.tolist(), shares)]


def short(number):
    """A number with four digits, for JSON."""
    return float(f"{float(number):.4g}")


def packed(kind, weights, row_tokens, column_tokens=(), grid=None):
    """One of the record's kinds of attention. weights: of each block, (H, T, S). grid: [rows, columns] of patches."""
    weights = torch.stack(list(weights))
    layers, heads, rows, columns = weights.shape
    data = zlib.compress((weights * 255).round().byte().numpy().tobytes(), 9)
    return {"name": kind, "layers": layers, "heads": heads, "rows": rows, "columns": columns, "row_tokens": row_tokens,
            "column_tokens": list(column_tokens), **({"grid": grid} if grid else {}),
            "data": base64.b64encode(data).decode()}


@torch.inference_mode()
def embedding(table, ids, name):
    """The token embeddings in two dimensions, by PCA (Pearson 1901); of ids only if there are too many; None below 3.

    table: an nn.Embedding.
    """
    V = table.weight.size(0)
    chosen = list(range(V)) if V <= MOST_NAMES else sorted(set(ids))
    if len(chosen) < 3:
        return None
    x = table.weight[chosen].float().cpu()
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)  # u s: the coordinates along the main axes
    xy, variance = u[:, :2] * s[:2], s.square()
    xy = xy * xy.gather(0, xy.abs().argmax(0, keepdim=True)).sign()  # the sign of an axis is nobody's: fix it
    return {"names": [name(i) for i in chosen], "xy": [[short(number) for number in point] for point in xy.tolist()],
            "explained": [short(share) for share in variance[:2] / variance.sum()]}


# ----------------------------------------------------------------------------------------------------------------------
# Tokens

def namer(tokenizer, marks=None):
    """A function from an id to the token's text, as it reads after another word. marks: {id: name} of further tokens.

    Alone, some tokens would lose the space before them, and parts of words would look like whole ones.
    """
    try:
        before = tokenizer.encode("a").tolist()
    except UserError:  # of a character that it does not know
        before = []

    @functools.cache
    def name(i):
        if i in (marks or {}):
            return marks[i]
        if i >= tokenizer.vocab_size:  # of a published model, whose table is padded
            return f"<{i}>"
        start, text = tokenizer.decode(before), tokenizer.decode([*before, i])
        text = text[len(start):] if text.startswith(start) else tokenizer.decode([i])
        return f"\\x{i:02x}" if tokenizer.kind == "byte" and text == "\ufffd" else text

    return name


def written_ids(tokenizer, steps, stop=""):
    """The ids that a model writes, with the end token, or the token in which the text `stop` is complete: a list.

    steps: from `generate`, of one row.
    """
    transcript, ids = Transcript(tokenizer, stop), []
    for token in steps:
        ids.append(token.item())
        transcript.append(ids[-1])
        if transcript.ended:
            break
    return ids
