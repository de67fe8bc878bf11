"""Bidirectional encoders, made of model.py's blocks: they read a whole text at once, in both directions.

    python train.py config/tag_flights.py           trains one that labels words, also on a laptop's CPU

The same encoder serves five models, which differ in what stands on top of it:

    MaskedLM           the hidden tokens of a text, as BERT is pre-trained (Devlin et al. 2019)
    Classifier         one class of a text, or several
    Tagger             a label for each word, and one for the sentence
    Answerer           where in a text the answer to a question begins and ends
    SentenceEncoder    one vector for a text (Reimers and Gurevych 2019)

With block = "post" and embed_norm it is BERT; the default, block = "pre", has the norms before attention and MLP, and
trains with less care. What belongs to a task is not here: [CLS], [MASK] and padding are in tasks/encoding.py.

Axes: B texts, S tokens of a text, C channels (n_embd), V vocabulary, A predicted positions, W words, N labels.
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, check_choices, check_ranges
from machine.attention import Dropout
from model import MLP, MLPS, NORMS, POSITIONS, Transformer, TransformerConfig, predict
from seq2seq import ReLUMLP


class ErfMLP(MLP):
    """down(gelu(up(x))), with the exact GELU, as in BERT."""

    def inner(self, x):
        return F.gelu(self.up_proj(x))


MLPS |= {"gelu_erf": ErfMLP, "relu": ReLUMLP}


@dataclass(frozen=True)
class EncoderConfig(TransformerConfig):
    bias: bool = True
    vocab_size: int = 65  # with [CLS] and [MASK]
    block_size: int = 64  # the most tokens of a text, [CLS] included
    positions: str = "learned"  # a key of POSITIONS
    rope_theta: float = 10000.0  # of rotary positions
    rope_scaling: dict = field(default_factory=dict)
    embed_norm: bool = False  # a norm after the embeddings, as in BERT
    n_types: int = 0  # token types with an embedding each (BERT has 2: first and second sentence); 0: none

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, vocab_size=1, block_size=2, n_types=0)
        check_choices(self, positions=POSITIONS)


@dataclass(frozen=True)
class SentenceConfig(EncoderConfig):
    pooler: bool = False  # BERT's layer on [CLS], which a sentence's mean vector does not use


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    labels: tuple = ()  # the names of the classes
    several: bool = False  # a text may have several of them, or none
    pool: str = "mean"  # mean of all tokens, or "first": the output at [CLS]

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, pool=("mean", "first"))
        if len(self.labels) < 2 - self.several:
            raise UserError(f"labels = {list(self.labels)}: a classifier needs at least two")


@dataclass(frozen=True)
class TaggerConfig(EncoderConfig):
    tags: tuple = ()  # the names of the words' labels; (): it labels no words
    intents: tuple = ()  # the names of the sentences' labels; (): it labels no sentences

    def __post_init__(self):
        super().__post_init__()
        for name in ("tags", "intents"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON makes lists of them
        if not self.tags and not self.intents:
            raise UserError("tags = (), intents = (): a tagger needs labels for words, for sentences, or both")


@dataclass(frozen=True)
class AnswererConfig(EncoderConfig):
    dense: bool = True  # a layer with ReLU before the logits; False: none, as in BERT

    def __post_init__(self):
        super().__post_init__()
        if self.n_types == 1:
            raise UserError("n_types = 1: a question and its text have a token type each; use 2, or 0 for none")


class Encoder(nn.Module):
    """Token, position and type embeddings, and a trunk in which every token sees every other one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = POSITIONS[config.positions](config)
        self.types = nn.Embedding(config.n_types, config.n_embd) if config.n_types else None
        self.ln_e = NORMS[config.norm](config) if config.embed_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.transformer = Transformer(config)

    def forward(self, tokens, lengths=None, types=None):
        """The output at each token, (B, S, C).

        tokens: (B, S), padded on the right; ValueError if S exceeds block_size. lengths: (B,), the tokens of each text
        without padding, which nothing sees; None: no text is padded. types: (B, S), below n_types; None: all 0.
        """
        S = tokens.size(1)
        if S > self.config.block_size:
            raise ValueError(f"a text of {S} tokens exceeds block_size = {self.config.block_size}")
        x, rope = self.wpe(self.wte(tokens), slice(0, S))
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        mask = None if lengths is None else is_real(S, lengths)[:, None, None]  # (B, 1, 1, S)
        return self.transformer(self.dropout(self.ln_e(x)), mask=mask, rope=rope)


def is_real(S, lengths):
    """(B, S): True for the tokens of texts that are padded on the right to S tokens, False for the padding."""
    return torch.arange(S, device=lengths.device) < lengths[:, None]


def mean(x, lengths=None):
    """The mean output over each text, without its padding: (B, S, C) -> (B, C)."""
    if lengths is None:
        return x.mean(1)
    real = is_real(x.size(1), lengths)[..., None]
    return (x * real).sum(1) / lengths[:, None]


def vectors(encoder, tokens, lengths=None):
    """The vectors of texts, of length 1: (B, C). The product of two is the cosine of their angle. See `Encoder`."""
    return F.normalize(mean(encoder(tokens, lengths), lengths), dim=-1)


class Head(nn.Module):
    """out(dropout(relu(dense(x)))): (..., C) -> (..., N), the logits of N labels, in float32. more: inputs beside C."""

    def __init__(self, config, n_labels, more=0):
        super().__init__()
        self.dense = nn.Linear(config.n_embd + more, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.out = nn.Linear(config.n_embd, n_labels)

    def forward(self, x):
        return self.out(self.dropout(F.relu(self.dense(x)))).float()


class MaskedLM(nn.Module):
    """An encoder that predicts tokens from those on both sides. Its head is BERT's: the output matrix is wte."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.dense = nn.Linear(config.n_embd, config.n_embd)
        gelu = nn.GELU("none" if config.mlp == "gelu_erf" else "tanh")
        self.activation = nn.ReLU() if config.mlp == "relu" else gelu  # the blocks' own, as in BERT
        self.ln = NORMS[config.norm](config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, tokens, targets=None, places=None, lengths=None):
        """tokens: (B, S), some replaced by [MASK]. For targets (B, A), places and the result see `model.predict`."""
        return predict(self.logits, self.encoder(tokens, lengths), targets, places)

    def logits(self, x):
        """Float32 logits, (..., C) -> (..., V)."""
        x = self.ln(self.activation(self.dense(x)))
        return F.linear(x, self.encoder.wte.weight, self.bias).float()


class Classifier(nn.Module):
    """An encoder, the mean of its outputs or the one at [CLS], and a head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = Head(config, len(config.labels))

    def forward(self, tokens, lengths, targets=None):
        """The logits of the labels, (B, N); or, given targets, the nats of each text, (B,).

        tokens, lengths: see `Encoder`. targets: (B,), each text's label; or, if several labels are allowed, (B, N), 1
        for those that it has and else 0: then the nats are the mean over the labels.
        """
        x = self.encoder(tokens, lengths)
        logits = self.head(mean(x, lengths) if self.config.pool == "mean" else x[:, 0])
        return logits if targets is None else self.nats(logits, targets)

    def nats(self, logits, targets):
        """The nats of each text, (B,), from its logits (B, N)."""
        if self.config.several:
            return F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").mean(-1)
        return F.cross_entropy(logits, targets, reduction="none")


class Tagger(nn.Module):
    """An encoder, a head on each word's first token, and a head on [CLS] for the whole sentence."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.tags = Head(config, len(config.tags)) if config.tags else None
        self.intents = Head(config, len(config.intents)) if config.intents else None

    def forward(self, tokens, lengths, places, tags=None, intents=None):
        """(logits of the words' tags (B, W, N) or None, logits of the sentences' intents (B, N) or None); or, given
        tags (B, W) and intents (B,), the nats (2, B, W): first of all tags, then of the intents, which stand at W = 0.

        tokens, lengths: see `Encoder`. places: (B, W), the position of each word's first token; padded with 0.
        """
        x = self.encoder(tokens, lengths)
        words = x.gather(1, places[..., None].expand(-1, -1, x.size(-1)))  # (B, S, C) -> (B, W, C)
        of_tags = None if self.tags is None else self.tags(words)
        of_intents = None if self.intents is None else self.intents(x[:, 0])
        return (of_tags, of_intents) if tags is None else self.nats(of_tags, of_intents, tags, intents)

    def nats(self, of_tags, of_intents, tags, intents):
        """The nats (2, B, W) from the logits of tags and intents. A label below 0 is none: its nats mean nothing."""
        nats = torch.zeros((2, *tags.shape), device=tags.device)
        if of_tags is not None:
            flat = F.cross_entropy(of_tags.flatten(0, 1), tags.clamp(min=0).flatten(), reduction="none")
            nats[0] = flat.view(tags.shape)
        if of_intents is not None:
            nats[1, :, 0] = F.cross_entropy(of_intents, intents.clamp(min=0), reduction="none")
        return nats


class Answerer(nn.Module):
    """An encoder, and a head with two logits for each token: an answer begins here, an answer ends here."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = Head(config, 2) if config.dense else nn.Linear(config.n_embd, 2)

    def forward(self, tokens, lengths, types, places, counts, targets=None):
        """The logits of W words, at which an answer may begin and end, (B, W, 2); -inf for padding. Or, given targets,
        the nats of each text, (B,): the mean of those of its answer's first and last word.

        tokens, lengths, types: see `Encoder`. places: (B, W, 2), each word's first and last token. counts: (B,), the
        words of each text without padding. targets: (B, 2), numbers of words. "No answer" is a word too: [CLS].
        """
        logits = self.head(self.encoder(tokens, lengths, types)).float().gather(1, places)  # (B, S, 2) -> (B, W, 2)
        logits = logits.masked_fill(~is_real(places.size(1), counts)[..., None], -torch.inf)
        return logits if targets is None else F.cross_entropy(logits, targets, reduction="none").mean(1)


class SentenceEncoder(nn.Module):
    """An encoder whose mean output is a text's vector. It holds BERT's pooler, if that was published with it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.pooler = nn.Linear(config.n_embd, config.n_embd) if config.pooler else None

    def forward(self, tokens, lengths=None):
        return vectors(self.encoder, tokens, lengths)
