"""What a model weighs and an update costs, in parameters and FLOPs."""

from model import all_blocks


def count_parameters(model):
    """All parameters, those of positions included."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model, block_size):
    """FLOPs of one training token, forward and backward: 6 per weight in a matrix product, 12 L H D T of attention.

    Source: Chowdhery et al. 2022 (PaLM), appendix B. Lookup tables cost nothing and are not counted: positions,
    bigrams, and the token embedding unless it is also the output head. 0 for a model without blocks, which is unknown.
    """
    tables = ["wpe", "bigrams"] + ["wte"] * (getattr(model, "head", None) is not None)
    n = count_parameters(model)
    n -= sum(count_parameters(part) for name in tables if (part := getattr(model, name, None)) is not None)
    width = sum(block.attn.n_head * block.attn.head_dim for block in all_blocks(model))
    return 6 * n + 12 * width * block_size if width else 0
