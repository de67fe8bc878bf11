"""Attention weights of any model made of model.py's blocks, noted while a pass runs.

    with noted(block.attn for block in model.transformer.blocks) as looks:
        model(tokens)                               looks: the weights (B, H, T, S) of each layer, in order

The fast kernels of attention don't return their weights. So each layer's are computed once more, from its own input.

Axes: B batch, T query positions, S key positions, L layers, H query heads, D head_dim, N patches of an image,
A tokens of an answer.
"""

import contextlib
import math

import torch

from model import causal_mask
from positions import rotate


def attention_weights(attention, x, mask=None, rope=None, cache=None, start=0, memory=None):
    """softmax(q k^T / sqrt(D)) of an `Attention`, in float32: (B, H, T, S). Its arguments, but no cache."""
    assert cache is None, "the weights belong to one pass over all tokens"
    q = attention.q_proj(x).unflatten(-1, (attention.n_head, attention.head_dim))
    q = attention.q_norm(q).transpose(1, 2)  # (B, H, T, D)
    k, _ = memory if isinstance(memory, tuple) else attention.keys_values(x if memory is None else memory)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    k = k.repeat_interleave(attention.n_head // attention.n_kv_head, dim=1)  # (B, K, S, D) -> (B, H, S, D)
    scores = q.float() @ k.float().mT / math.sqrt(attention.head_dim)
    if isinstance(mask, str):
        positions = torch.arange(x.size(1), device=x.device)
        mask = causal_mask(positions, positions)
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)


@contextlib.contextmanager
def noted(layers, keep=lambda weights: weights):
    """Yields a list that gets keep(weights) for each pass through one of some Attention layers, inside the context.

    keep: gets weights (B, H, T, S); for what would else fill the memory.
    """
    looks = []

    def look(attention, inputs, named):
        looks.append(keep(attention_weights(attention, *inputs, **named)))

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield looks
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def cross_attention(model, source, lengths, tokens):
    """Where each target position looks in the source: weights (L, B, H, T, S), whose last axis sums to 1.

    model: a Seq2Seq. source, lengths, tokens: see `Seq2Seq.forward`. The weights of position t belong to the prediction
    of the token after tokens[:, t].
    """
    with noted(block.cross_attn for block in model.decoder.blocks) as looks:
        model.hidden(tokens, **model.encode(source, lengths))
    return torch.stack(looks)


@torch.inference_mode()
def image_attention(model, image, prompt, answer):
    """A PaliGemma's attention to the N patches for each of the answer's A tokens: (A, N), on the CPU.

    image: (1, 3, H, W). prompt, answer: token ids. The weights are those of the position that predicts the token, which
    is the one before it, averaged over layers and heads. A row sums to less than 1: the rest is attention to the text.
    """
    N = model.config.vision.n_patches
    first = N + len(prompt) - 1  # predicts the answer's first token
    tokens = torch.tensor([[*prompt, *answer[:-1]]], device=image.device)
    prefix = torch.tensor([len(prompt)], device=image.device)
    with noted((block.attn for block in model.decoder.transformer.blocks),
               lambda weights: weights[0, :, first:, :N].mean(0)) as looks:  # (A, N)
        model.hidden(tokens, image=model.encode(image), prefix=prefix)
    return torch.stack(looks).mean(0).cpu()


@torch.inference_mode()
def rollout(model, image):
    """How much of each patch reaches the head of an `ImageClassifier`, as far as attention tells: (N,), on the CPU.

    Attention rollout (Abnar and Zuidema 2020): the weights' mean over heads, half and half with the identity for the
    residual stream, multiplied from block to block. It sums to 1 less the class token's share. image: (1, 3, H, W).
    """
    vision = model.vision
    with noted((block.attn for block in vision.transformer.blocks),
               lambda weights: weights[0].mean(0).cpu()) as looks:  # (S, S), S = N or 1 + N
        vision(image)
    own = flow = torch.eye(len(looks[0]))
    for weights in looks:
        flow = (weights + own) / 2 @ flow
    return (flow[0] if vision.config.cls else flow.mean(0))[-vision.config.n_patches:]
