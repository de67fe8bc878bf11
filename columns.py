"""A model of the rows of a table: numbers, categories, texts and pictures are tokens of one list.

    python train.py config/titanic.py               trains one, also on a laptop's CPU

The list is [CLS], a token for each category, a token for each number, the tokens of each text, the patches of each
picture. An embedding of its column is added to each token, and the label is read at [CLS], as in the FT-Transformer
(Gorishniy et al. 2021). With numbers = "head" the numbers skip the trunk: they go into the head beside [CLS], as in the
Tab Transformer (Huang et al. 2020). The label is a class, or a quantity such as a price.

Axes: B rows, c columns of categories, m of numbers, t of texts, p of pictures, K of those with tokens, S tokens of a
text, N patches of a picture, L tokens of the list, C channels (n_embd), H and W height and width in pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, check_choices, check_ranges
from encoder import Head
from machine.attention import Dropout
from model import Transformer, TransformerConfig, init_weights
from vit import ViTConfig, patch_embedding, sincos_2d

KINDS = ("category", "number", "text", "picture")  # of columns, in the order of the list


@dataclass(frozen=True)
class ColumnsConfig(TransformerConfig):
    bias: bool = True
    columns: tuple = ()  # dicts with name and kind; of numbers also mean and std, of categories also values
    label: str = ""  # the name of the column that is predicted
    labels: tuple = ()  # the names of the classes; (): the label is a quantity
    mean: float = 0.0  # of a quantity, in the training rows
    std: float = 1.0  # likewise
    numbers: str = "tokens"  # where numbers go: into the list as tokens, or into the head
    vocab_size: int = 0  # of the texts
    block_size: int = 32  # the most tokens of a text
    image_size: int = 0  # side of the square pictures, in pixels
    patch_size: int = 4  # side of a square patch, in pixels

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, block_size=1, patch_size=1)
        check_choices(self, numbers=("tokens", "head"))
        for name in ("columns", "labels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON makes lists of them
        if len(self.labels) == 1:
            raise UserError(f"labels = {list(self.labels)}: a classifier needs at least two")

    def places(self, kind):
        """The indices in `columns` of the columns of a kind."""
        return [i for i, column in enumerate(self.columns) if column["kind"] == kind]

    @property
    def listed(self):
        """The indices of the columns with tokens, in the order of the list."""
        return [i for kind in KINDS if kind != "number" or self.numbers == "tokens" for i in self.places(kind)]

    def owners(self, S):
        """Whose each token of the list is, (L,): 0 for [CLS], else 1 + the place of its column in `listed`."""
        sizes = {"category": 1, "number": 1, "text": S, "picture": self.n_patches}
        counts = [1, *(sizes[self.columns[i]["kind"]] for i in self.listed)]
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    @property
    def n_patches(self):
        return (self.image_size // self.patch_size)**2

    @property
    def vision(self):
        """The shape of the pictures and their patches: a ViTConfig."""
        return ViTConfig(n_head=1, n_embd=self.n_embd, image_size=self.image_size, patch_size=self.patch_size)


class ColumnsModel(nn.Module):
    """Embeddings of each kind of column, a trunk, and a head. `init_columns` sets its weights."""

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        count = {kind: len(config.places(kind)) for kind in KINDS}
        sizes = [1 + len(config.columns[i]["values"]) for i in config.places("category")]
        tokens, m = config.numbers == "tokens", count["number"]
        self.columns = nn.Embedding(1 + len(config.listed), C)  # of [CLS], and of each column
        self.categories = nn.ModuleList(nn.Embedding(size, C) for size in sizes)
        self.numbers = nn.Embedding(m, C) if m and tokens else None  # of 1.0 in each column
        self.missing = nn.Embedding(m, C) if m and tokens else None  # of a missing number in each column
        self.wte = nn.Embedding(config.vocab_size, C) if count["text"] else None
        self.wpe = nn.Embedding(config.block_size, C) if count["text"] else None
        self.patches = patch_embedding(config.vision) if count["picture"] else None
        self.patch_positions = nn.Embedding(config.n_patches, C) if count["picture"] else None
        self.dropout = Dropout(config.dropout)
        self.transformer = Transformer(config)
        self.head = Head(config, len(config.labels) or 1, 0 if tokens else 2 * m)
        self.errors = F.cross_entropy if config.labels else F.mse_loss

    def forward(self, categories, numbers, missing, tokens=None, lengths=None, images=None, seen=None, targets=None):
        """The logits of the classes, (B, number of classes), or the standardised quantity (B, 1), in float32.

        Given targets, the nats of each, (B,); or of standardised quantities (B, 1) the squared error of each, (B, 1).
        categories: ids (B, c), 0 for a missing or unknown one. numbers: (B, m), standardised, and 0 where `missing`
        (B, m) is True. tokens: ids (B, t, S), padded on the right, and lengths (B, t), 0 for a missing text. images:
        (B, p, 3, H, W) in [-1, 1], and seen (B, p), False for a missing picture. None where there are no such columns.
        """
        x, there = self.embed(categories, numbers, missing, tokens, lengths, images, seen)
        mask = None if tokens is None and images is None else there[:, None, None]  # (B, 1, 1, L)
        x = self.transformer(self.dropout(x), mask=mask)[:, 0]  # (B, C)
        if self.config.numbers == "head":
            x = torch.cat((x, numbers.to(x.dtype), missing.to(x.dtype)), dim=1)
        outputs = self.head(x)
        return outputs if targets is None else self.errors(outputs, targets, reduction="none")

    def embed(self, categories, numbers, missing, tokens, lengths, images, seen):
        """(the list (B, L, C), which of its tokens are there (B, L)). Arguments: see `forward`."""
        B, weight = len(categories), self.columns.weight
        parts = [weight.new_zeros(B, 1, weight.size(1))]  # [CLS] is the embedding of column 0 alone
        parts += [table(ids)[:, None] for table, ids in zip(self.categories, categories.unbind(1))]
        if self.numbers is not None:
            scaled = numbers[..., None].to(weight.dtype) * self.numbers.weight  # (B, m, C)
            parts.append(torch.where(missing[..., None], self.missing.weight, scaled))
        there = [categories.new_ones(B, sum(part.size(1) for part in parts), dtype=torch.bool)]
        if tokens is not None:
            S = tokens.size(2)
            parts.append((self.wte(tokens) + self.wpe.weight[:S]).flatten(1, 2))  # (B, t, S, C) -> (B, t S, C)
            there.append((torch.arange(S, device=tokens.device) < lengths[..., None]).flatten(1))
        if images is not None:
            patches = self.patches(images.flatten(0, 1).to(weight.dtype)).flatten(2).mT  # (B p, N, C)
            parts.append((patches + self.patch_positions.weight).unflatten(0, seen.shape).flatten(1, 2))
            there.append(seen.repeat_interleave(patches.size(1), dim=1))
        owners = self.config.owners(0 if tokens is None else tokens.size(2)).to(weight.device)
        return torch.cat(parts, dim=1) + self.columns(owners), torch.cat(there, dim=1)


@torch.no_grad()
def init_columns(model, generator=None):
    """Initialises a ColumnsModel in place by `init_weights`; patches start with sines and cosines as positions."""
    init_weights(model, generator, std=model.config.n_embd**-0.5)
    if model.patches is not None:
        model.patch_positions.weight.copy_(sincos_2d(model.config.vision))
