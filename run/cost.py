"""Counts a model's parameters and the FLOPs of training it."""

from model import all_blocks


def count_parameters(model):
    """Returns the number of parameters, position embeddings included."""
    return sum(p.numel() for p in model.parameters())


def size_in_words(model):
    """Returns text such as "10.75M parameters", or "4,225 parameters" of a small model. Names how many are trained."""
    n, trained = count_parameters(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = f"{n / 1e6:.2f}M parameters" if n >= 1e5 else f"{n:,} parameters"
    return f"{text}, of which {trained / 1e6:.2f}M learn" if trained < n else text


def flops_per_token(model, block_size):
    """Returns the FLOPs of one training token, forward and backward; 0 (unknown) for a model without blocks.

    6 per parameter, plus 12 * blocks * attention width * block_size (Chowdhery et al. 2022, PaLM, appendix B). Lookup
    tables cost nothing: positions, bigrams, and token embeddings that are not also the output head.
    """
    untied = getattr(model, "head", None) is not None
    names = ("wpe", "bigrams", "wte") if untied else ("wpe", "bigrams")
    tables = [getattr(model, name, None) for name in names]
    n = count_parameters(model) - sum(count_parameters(table) for table in tables if table is not None)
    width = sum(block.attn.n_head * block.attn.head_dim for block in all_blocks(model))
    return 6 * n + 12 * width * block_size if width else 0
