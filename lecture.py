"""From a bigram model to a GPT, rung by rung: the road of the lecture "Let's build GPT: from scratch, in code".

    python lecture.py                                               tells the steps in between, with their numbers
    python train.py config/ladder.py                                trains the first rung, the bigram model
    python train.py config/ladder/one_head.py                       trains another rung
    python -m tools.ladder                                          trains all of them, and compares their losses

Each rung is a language model that adds one thing to the rung before it. Beside the rungs stand the parts that they are
made of: a head of attention, a feed-forward layer, a block. Weights start as PyTorch starts them. The last rung, scaled
up and with dropout, is the GPT of model.py.

Axes: B batch, T positions of a window, S positions of a second sequence, C channels (n_embd), H heads, D head size,
V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from configurator import UserError, check_ranges
from model import predict


@dataclass(frozen=True)
class BigramConfig:
    vocab_size: int = 65
    block_size: int = 8  # positions of a window

    def __post_init__(self):
        check_ranges(self, **{name: 1 for name in vars(self)})


@dataclass(frozen=True)
class EmbeddingsConfig(BigramConfig):
    n_embd: int = 32  # channels of a token's vector


@dataclass(frozen=True)
class HeadsConfig(EmbeddingsConfig):
    n_head: int = 4  # heads of attention; each gets n_embd / n_head channels

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd = {self.n_embd}: must be a multiple of n_head = {self.n_head}")


@dataclass(frozen=True)
class BlocksConfig(HeadsConfig):
    n_layer: int = 3  # blocks, one after the other


class LanguageModel(nn.Module):
    """A rung: `hidden` turns tokens into a vector per position, and `logits` scores every token that may come next."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, tokens, targets=None, places=None):
        """tokens: (B, T). Returns the logits (B, T, V); with targets (B, T), the loss of each in nats, (B, T)."""
        return predict(self.logits, self.hidden(tokens), targets, places)


# ----------------------------------------------------------------------------------------------------------------------
# Rung 1: the next token from the last one alone.

class Bigram(LanguageModel):
    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)  # row i: the logits of what follows token i

    def hidden(self, tokens, caches=None, start=0):
        return self.table(tokens)  # (B, T) -> (B, T, V)

    def logits(self, x):
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Rung 2: a vector for what a token is, and one for where it stands. Their sum predicts no better than the bigram model,
# because a position still does not see any other.

class Embeddings(LanguageModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.body = nn.Identity()  # what stands between embeddings and logits: later rungs fill it
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def hidden(self, tokens, caches=None, start=0):
        what = self.wte(tokens)  # (B, T) -> (B, T, C)
        where = self.wpe(torch.arange(tokens.size(1), device=tokens.device))  # (T, C)
        return self.body(what + where)  # (B, T, C) + (T, C): every row has the same positions

    def logits(self, x):
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ----------------------------------------------------------------------------------------------------------------------
# Rung 3: one head of self-attention. Each position gathers what it looks for from the positions before it.

class Head(nn.Module):
    """One head of attention (Vaswani et al. 2017). A query says what a position looks for, a key what it holds, a value
    what it passes on. causal=False drops the mask, so that every position sees all others, as in an encoder."""

    def __init__(self, n_embd, head_size, causal=True):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.causal = causal

    def forward(self, x, memory=None):
        """x: (B, T, C) -> (B, T, D). memory: (B, S, C), the source of keys and values if not x: cross-attention."""
        source = x if memory is None else memory
        q = self.query(x)  # (B, T, C) -> (B, T, D)
        k = self.key(source)  # (B, S, C) -> (B, S, D)
        v = self.value(source)  # (B, S, C) -> (B, S, D)
        scores = q @ k.transpose(-2, -1)  # (B, T, D) @ (B, D, S) -> (B, T, S)
        scores = scores * k.size(-1) ** -0.5  # variance 1 again, so that softmax starts out diffuse
        if self.causal:
            past = torch.ones_like(scores, dtype=torch.bool).tril()  # True up to a position's own column
            scores = scores.masked_fill(~past, -math.inf)
        weights = scores.softmax(dim=-1)  # (B, T, S), each row sums to 1
        return weights @ v  # (B, T, S) @ (B, S, D) -> (B, T, D)


class OneHead(Embeddings):
    def __init__(self, config):
        super().__init__(config)
        self.body = Head(config.n_embd, config.n_embd)


# ----------------------------------------------------------------------------------------------------------------------
# Rung 4: four heads side by side, each with a quarter of the channels, so a position can look for four things at once.

class Heads(nn.Module):
    """Several heads, concatenated: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        head_size = config.n_embd // config.n_head
        self.heads = nn.ModuleList(Head(config.n_embd, head_size) for _ in range(config.n_head))

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)  # n_head times (B, T, D) -> (B, T, C)


class FourHeads(Embeddings):
    def __init__(self, config):
        super().__init__(config)
        self.body = Heads(config)


# ----------------------------------------------------------------------------------------------------------------------
# Rung 5: a feed-forward layer. Attention gathers; now each position computes with what it has gathered.

class FeedForward(Embeddings):
    def __init__(self, config):
        super().__init__(config)
        think = nn.Sequential(nn.Linear(config.n_embd, config.n_embd), nn.ReLU())
        self.body = nn.Sequential(Heads(config), think)


# ----------------------------------------------------------------------------------------------------------------------
# Rung 6: blocks with residual connections. Several layers of both make the model deep, and deep models train badly. So
# each layer adds to the stream x that runs past it, through a projection. The feed-forward layer is 4 C wide inside.

class ResidualBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.attend = nn.Sequential(Heads(config), nn.Linear(C, C))
        self.think = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))

    def forward(self, x):
        x = x + self.attend(x)
        return x + self.think(x)


class Residual(Embeddings):
    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Sequential(*(ResidualBlock(config) for _ in range(config.n_layer)))


# ----------------------------------------------------------------------------------------------------------------------
# Rung 7: LayerNorm before each layer and before the logits. Every vector gets mean 0 and variance 1 over its channels.

class NormBlock(ResidualBlock):
    def __init__(self, config):
        super().__init__(config)
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.ln_2 = nn.LayerNorm(config.n_embd)

    def forward(self, x):
        x = x + self.attend(self.ln_1(x))
        return x + self.think(self.ln_2(x))


class Normed(Embeddings):
    def __init__(self, config):
        super().__init__(config)
        blocks = (NormBlock(config) for _ in range(config.n_layer))
        self.body = nn.Sequential(*blocks, nn.LayerNorm(config.n_embd))


RUNGS = {  # model_type: (class, class of its configuration); the last rung is "gpt"
    "bigram": (Bigram, BigramConfig),
    "embeddings": (Embeddings, EmbeddingsConfig),
    "one-head": (OneHead, EmbeddingsConfig),
    "four-heads": (FourHeads, HeadsConfig),
    "feed-forward": (FeedForward, HeadsConfig),
    "residual": (Residual, BlocksConfig),
    "normed": (Normed, BlocksConfig),
}


# ----------------------------------------------------------------------------------------------------------------------
# The mathematical trick: a mean over the past, in three ways that agree. x: (B, T, C); all return (B, T, C).

def means_by_loop(x):
    means = torch.zeros_like(x)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            means[b, t] = x[b, :t + 1].mean(dim=0)  # (t + 1, C) -> (C,)
    return means


def means_by_product(x):
    weights = torch.ones(x.size(1), x.size(1)).tril()  # (T, T): row t has ones up to column t
    weights = weights / weights.sum(dim=1, keepdim=True)  # each row sums to 1
    return weights @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def means_by_softmax(x):
    past = torch.ones(x.size(1), x.size(1)).tril().bool()
    scores = torch.zeros(x.size(1), x.size(1)).masked_fill(~past, -math.inf)  # a head computes these from the data
    return scores.softmax(dim=-1) @ x


def merged(heads, x):
    """What `heads` (a list of causal Heads of one size) return for x (B, T, C), concatenated, by one product each for
    all queries, keys and values: (B, T, H * D). The heads are one more batch dimension, as in model.py."""
    q, k, v = (x @ torch.cat([getattr(head, name).weight for head in heads]).T for name in ("query", "key", "value"))
    q, k, v = (y.unflatten(-1, (len(heads), -1)).transpose(1, 2) for y in (q, k, v))  # (B, T, H * D) -> (B, H, T, D)
    scores = q @ k.transpose(-2, -1) * k.size(-1) ** -0.5  # (B, H, T, T)
    past = torch.ones_like(scores, dtype=torch.bool).tril()
    y = scores.masked_fill(~past, -math.inf).softmax(dim=-1) @ v  # (B, H, T, D)
    return y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H * D)


class BatchNorm(nn.Module):
    """Normalises each column (channel) over the rows of a batch, x: (B, C) (Ioffe and Szegedy 2015).

    Training uses the batch's own mean and variance and keeps running ones, which evaluation uses.
    """

    def __init__(self, n_embd, eps=1e-5, momentum=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))
        self.register_buffer("running_mean", torch.zeros(n_embd))
        self.register_buffer("running_var", torch.ones(n_embd))
        self.eps, self.momentum = eps, momentum

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(dim=0), x.var(dim=0, correction=0)  # (C,)
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(x.detach().var(dim=0), self.momentum)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class LayerNorm(nn.Module):
    """Normalises each row (vector) over its channels, x: (..., C) (Ba et al. 2016): no batch, so no running means."""

    def __init__(self, n_embd, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))
        self.eps = eps

    def forward(self, x):
        mean, var = x.mean(dim=-1, keepdim=True), x.var(dim=-1, correction=0, keepdim=True)  # (..., 1)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


# ----------------------------------------------------------------------------------------------------------------------
# The telling

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"  # of the corpus


def print_examples(tokens, decode):
    """Prints every (context -> target) pair of a batch of windows, (B, T + 1). decode(ids) returns their text."""
    for row in tokens.tolist():
        for t in range(1, len(row)):
            print(f"    {decode(row[:t])!r:12} -> {decode(row[t:t + 1])!r}")


def tell_batches(generator):
    alphabet = sorted(set(TEXT))
    ids = torch.tensor([alphabet.index(character) for character in TEXT])
    starts = torch.randint(len(ids) - 8, (4,), generator=generator)
    windows = torch.stack([ids[start:start + 9] for start in starts])
    print("A batch: 4 windows of 8 + 1 characters hold 32 examples, with contexts of 1 to 8 characters.")
    print_examples(windows, lambda row: "".join(alphabet[i] for i in row))


def tell_first_loss(generator):
    losses = []
    for _ in range(20):
        table = torch.randn(65, 65, generator=generator)  # as nn.Embedding starts
        tokens = torch.randint(65, (2, 256), generator=generator)
        losses.append(nn.functional.cross_entropy(table[tokens[0]], tokens[1]).item())
    print(f"\nA bigram model's first loss: {sum(losses) / 20:.2f} on average, {min(losses):.2f} to {max(losses):.2f} in"
          f" 20 draws. A uniform guess has ln 65 = {math.log(65):.2f}; the lecture's draw had 4.87.")


def tell_trick(generator):
    b = torch.tensor([[2.0, 7], [6, 4], [6, 5]])
    x = torch.randn(4, 8, 2, generator=generator)  # (B, T, C)
    loop, product, softmax = means_by_loop(x), means_by_product(x), means_by_softmax(x)
    print(f"\nThe trick: a triangle of ones times {b.int().tolist()} sums the rows so far,"
          f" {(torch.ones(3, 3).tril() @ b).int().tolist()};\nwith rows that sum to 1 it is their mean,"
          f" {[[round(number, 2) for number in row] for row in means_by_product(b[None])[0].tolist()]}."
          f"\nLoop, product and softmax agree to {max((loop - y).abs().max() for y in (product, softmax)):.0e}.")


def tell_scaling(generator):
    q, k = (torch.randn(4, 8, 16, generator=generator) for _ in range(2))  # (B, T, D)
    raw = q @ k.transpose(-2, -1)
    example = torch.tensor([0.1, -0.2, 0.3, -0.2, 0.5])
    print(f"\nScaling: q @ k has variance {raw.var():.1f} for heads of 16, divided by sqrt(16) {(raw / 4).var():.1f}.\n"
          f"Large scores make softmax pick one: {rounded(example.softmax(0))}, 8 times larger"
          f" {rounded((8 * example).softmax(0))}.")


def tell_heads(generator):
    torch.manual_seed(0)  # of the heads' weights
    heads = [Head(32, 8) for _ in range(4)]
    x = torch.randn(4, 8, 32, generator=generator)
    apart = torch.cat([head(x) for head in heads], dim=-1)
    print(f"\nFour heads, one by one and as one product, agree to {(apart - merged(heads, x)).abs().max():.0e}.")
    changed = x.clone()
    changed[:, -1] += 1  # the last position
    for name, causal in (("A decoder's head", True), ("An encoder's head, without the mask,", False)):
        head = Head(32, 8, causal)
        moved = (head(changed) - head(x))[:, :-1].abs().max() > 0
        print(f"{name} lets a change of the last position reach those before it: {moved}.")
    memory = torch.randn(4, 5, 32, generator=generator)  # (B, S, C)
    print(f"Cross-attention: queries {tuple(x.shape)}, keys and values from {tuple(memory.shape)},"
          f" result {tuple(Head(32, 8, causal=False)(x, memory).shape)}.")


def tell_norms(generator):
    x = 3 + 2 * torch.randn(32, 100, generator=generator)
    print("\nNorms of (32, 100), mean and standard deviation of the first column and of the first row:")
    for ours, theirs in ((BatchNorm(100), nn.BatchNorm1d(100)), (LayerNorm(100), nn.LayerNorm(100))):
        y = ours(x)
        of_each = ", ".join(f"{one.mean().abs():.2f} and {one.std(correction=0):.2f}" for one in (y[:, 0], y[0]))
        print(f"    {type(ours).__name__:9}  {of_each}; differs from PyTorch's by {(y - theirs(x)).abs().max():.0e}")


def rounded(numbers):
    return [round(number, 2) for number in numbers.tolist()]


@torch.no_grad()
def main():
    generator = torch.Generator().manual_seed(1337)
    for tell in (tell_batches, tell_first_loss, tell_trick, tell_scaling, tell_heads, tell_norms):
        tell(generator)
    print("\nThe parameters of each rung, with 65 characters:")
    for name, (cls, config_cls) in RUNGS.items():
        print(f"    {name:14} {sum(p.numel() for p in cls(config_cls()).parameters()):6,}")


if __name__ == "__main__":
    main()
