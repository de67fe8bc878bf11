"""Pictures of attention, for --attention=map.png: one map of the mean, or a small one of each head.

Axes: T tokens, S tokens that they look at, L layers, H heads.
"""

import torch

from configurator import UserError
from inside.record import namer, notes_of, trunk_of
from run.pictures import draw_map, draw_maps, save_picture


def check_chosen(model, sampling):
    """Raises UserError if sampling wants a picture of a layer or head that the model doesn't have."""
    if not sampling.attention:
        return
    blocks = trunk_of(model).blocks
    for name, most in (("layer", len(blocks)), ("head", blocks[0].attn.n_head)):
        value = getattr(sampling, f"attention_{name}")
        if value > most:
            part = "decoder" if hasattr(model, "decoder") else "model"
            raise UserError(f"attention_{name} = {value}: the {part} has {most}; 0 takes the mean of all")


def draw(weights, rows, columns, sampling):
    """Writes the picture sampling.attention of weights (L, H, T, S). Returns a line about it. rows, columns: names.

    It shows the mean over all layers and heads, or over those that sampling names; with attention_each, each by itself.
    The shade is the root of the weight: a causal model's first token looks at itself alone, with a weight of 1, beside
    which the others' would hardly be seen.
    """
    layer, head = sampling.attention_layer, sampling.attention_head
    layers = [layer - 1] if layer else list(range(len(weights)))
    heads = [head - 1] if head else list(range(weights.size(1)))
    if sampling.attention_each:
        maps = {f"block {i + 1}, head {j + 1}": weights[i, j].sqrt() for i in layers for j in heads}
        picture = draw_maps(maps, rows, columns, across=len(heads) if len(layers) > 1 else 0)
    else:
        picture = draw_map(weights[layers][:, heads].mean((0, 1)).sqrt(), rows, columns)
    return save_picture(picture, sampling.attention)


def draw_own(model, names, read, sampling, unread=0):
    """Writes a picture of where each token of a text looks in that text. Returns a line about it.

    names: the text of each of T tokens. read(): runs the model over them. unread: how many more came before them.
    """
    both_ways = hasattr(model, "encoder")
    with notes_of(trunk_of(model), len(names), both_ways=both_ways) as notes:
        read()
    shown = [visible(name) for name in (names[:notes.count] if both_ways else names[-notes.count:])]
    said, which = draw(torch.stack(notes.own), shown, shown, sampling), "first" if both_ways else "last"
    count = unread + len(names)
    return said + f": the {which} {notes.count} of {count} tokens" * (notes.count < count)


def draw_text(task, model, ids, sampling):
    """`draw_own` of a language model that reads ids, or their last window."""
    window = ids[-model.config.block_size:]
    tokens = torch.tensor([window], device=next(model.parameters()).device)
    names, unread = list(map(namer(task.tokenizer), window)), len(ids) - len(window)
    return draw_own(model, names, lambda: model.hidden(tokens), sampling, unread)


def visible(text):
    """A token's text in a picture: its spaces as middle dots; what is no character as Python writes it."""
    return text.replace(" ", "\u00b7") if text.isprintable() and text else repr(text)
