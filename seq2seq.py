"""The encoder-decoder Transformer of "Attention Is All You Need" (Vaswani et al. 2017), made of model.py's blocks.

    python train.py config/translate_en_it.py           trains one that translates, also on a laptop's CPU

The encoder reads the whole source in both directions. The decoder writes the target from left to right: each of its
blocks looks at the target so far, and then, by cross-attention, at the encoder's output, which is called the memory.

    source -> embedding, positions -> encoder blocks -> memory ----+
                                                                   | keys and values of every block
    target -> embedding, positions -> decoder blocks <-------------+ -> output head -> next token

With block = "post" it is the paper's model. The default, block = "pre", has the norms before attention and MLP instead
of after them; it trains without a long warm-up (Xiong et al. 2020). What belongs to the task is not here: special
tokens, padding and smoothing of the loss are in tasks/translation.py, beam search in beam.py.

Axes: B batch, S source positions, T target positions, C channels (n_embd), H heads, K key-value heads, D head_dim,
V target vocabulary, A predicted positions.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, check_ranges
from machine.attention import Dropout
from model import GPT, MLP, MLPS, POSITIONS, GPTConfig, Transformer, predict


class ReLUMLP(MLP):
    """down(relu(up(x))), as in the paper."""

    def inner(self, x):
        return F.relu(self.up_proj(x))


MLPS["relu"] = ReLUMLP


@dataclass(frozen=True)
class Seq2SeqConfig(GPTConfig):
    """n_layer, vocab_size and tied are the decoder's; block_size: the most tokens of a source and of a target."""

    n_encoder_layer: int = 0  # 0: as many as n_layer
    source_vocab_size: int = 0  # 0: as many as vocab_size
    shared: bool = True  # source and target have one vocabulary and one embedding
    positions: str = "sinusoidal"
    mlp: str = "relu"
    bias: bool = True
    cross: bool = True  # of the decoder's blocks; the encoder's have no cross-attention

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, n_encoder_layer=0, source_vocab_size=0)
        if self.bigrams:
            raise UserError("bigrams = True: an encoder-decoder has no table of bigrams; leave it out")
        if self.shared and self.source_vocab_size not in (0, self.vocab_size):
            raise UserError(f"source_vocab_size = {self.source_vocab_size:,}: one shared vocabulary has vocab_size ="
                            f" {self.vocab_size:,}; leave it out, or set shared = False")

    @property
    def encoder(self):
        """The configuration of the encoder's blocks."""
        return replace(self, n_layer=self.n_encoder_layer or self.n_layer, cross=False)


class Seq2Seq(nn.Module):
    """Encoder, decoder, their embeddings, and an output head. `model.init_weights` sets the weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        source_size = config.source_vocab_size or config.vocab_size
        self.source_wte = None if config.shared else nn.Embedding(source_size, config.n_embd)
        self.wpe = POSITIONS[config.positions](config)  # the same positions for source and target
        self.dropout = Dropout(config.dropout)
        self.encoder = Transformer(config.encoder)
        self.decoder = Transformer(config)
        self.head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, source, lengths, tokens, targets=None, places=None, smoothing=False):
        """Predicts each next token of the target from the source and the tokens before it, all positions at once.

        source, lengths: see `read`. tokens: (B, T), the target so far, padded on the right. For targets (B, T), places,
        smoothing and the result see `model.predict`. Padding needs no mask here: it comes after all that is predicted.
        """
        memory, memory_mask = self.read(source, lengths)
        x = self.hidden(tokens, memory=memory, memory_mask=memory_mask)
        return predict(self.logits, x, targets, places, smoothing)

    def read(self, source, lengths):
        """Runs the encoder. Returns the memory (B, S, C), and the mask (B, 1, 1, S) that hides its padding.

        source: (B, S), padded on the right; ValueError if S exceeds block_size. lengths: (B,), the tokens of each row
        without padding, at least 1.
        """
        S = source.size(1)
        if S > self.config.block_size:
            raise ValueError(f"a source of {S} tokens exceeds block_size = {self.config.block_size}")
        real = torch.arange(S, device=source.device) < lengths[:, None]  # (B, S)
        mask = real[:, None, None]  # (B, 1, 1, S): broadcasts over heads and queries
        x = self.embed(source, self.wte if self.source_wte is None else self.source_wte)
        x, rope = self.wpe(x, slice(0, S))
        return self.encoder(self.dropout(x), mask=mask, rope=rope), mask

    def encode(self, source, lengths):
        """All that the decoder needs of the source, as arguments of `hidden`: generate(model, ..., **encode(...)).

        The encoder runs once per translation, and so do the keys and values that each block takes from its memory.
        """
        memory, memory_mask = self.read(source, lengths)
        padded = bool((lengths < source.size(1)).any())  # without a mask, attention is faster
        return {"memory": self.decoder.remember(memory), "memory_mask": memory_mask if padded else None}

    def hidden(self, tokens, caches=None, start=0, memory=None, memory_mask=None):
        """The decoder's output (B, T, C) for target tokens (B, T), each of which sees itself and those before it.

        caches, start: see `GPT.hidden`. memory: (B, S, C) from `read`, or keys and values from `encode`.
        memory_mask: (B, 1, 1, S); None: the memory has no padding.
        """
        positions, mask = self.positions_and_mask(tokens, caches, start)
        x, rope = self.wpe(self.embed(tokens, self.wte), positions)
        return self.decoder(self.dropout(x), caches, memory, mask=mask, rope=rope, start=start,
                            memory_mask=memory_mask)

    def embed(self, tokens, table):
        """Embeddings times sqrt(C), so that positions do not drown them: (B, T) -> (B, T, C)."""
        return table(tokens) * math.sqrt(self.config.n_embd)

    def make_caches(self, batch_size, size=None):
        return self.decoder.make_caches(batch_size, size or self.config.block_size)

    positions_and_mask, logits = GPT.positions_and_mask, GPT.logits  # the decoder is a GPT with a memory
