"""Published GPT-2: its config.json and the names of its tensors. The rest of loading is in files.py.

GPT-2's linear layers are stored (in, out), and its queries, keys and values are one layer, c_attn.
"""

import tokenizer as tokenizers
from configurator import UserError
from model import GPT, GPTConfig
from published.files import Source

MODEL = GPT
load_tokenizer = tokenizers.load

# (ours, theirs), applied in this order
NAMES = (("transformer.", ""), ("blocks.", "h."), (".o_proj.", ".c_proj."), (".up_proj.", ".c_fc."),
         (".down_proj.", ".c_proj."))


def to_config(theirs, name, block_size, dropout):
    """The GPTConfig of a config.json. Raises UserError for what our GPT can't compute, or a block_size too large."""
    expected = {"activation_function": "gelu_new", "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for key, value in expected.items():
        if theirs.get(key, value) != value:
            raise UserError(f"{name}: {key} = {theirs[key]!r}, but only {value!r} can be loaded")
    if block_size and block_size > theirs["n_positions"]:
        raise UserError(f"block_size = {block_size}: {name} has learned only {theirs['n_positions']} positions")
    return GPTConfig(
        n_layer=theirs["n_layer"], n_head=theirs["n_head"], n_embd=theirs["n_embd"],
        n_hidden=theirs.get("n_inner") or 0, vocab_size=theirs["vocab_size"],
        block_size=block_size or theirs["n_positions"], norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
        bias=True, dropout=dropout)


def first_name(theirs, _=None):
    """The name without "transformer."; None for the tied output head and the causal masks (bias, masked_bias)."""
    name = theirs.removeprefix("transformer.")
    unused = name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias"))
    return None if unused else name


def source(ours, theirs):
    """The Source of our parameter: where the published files have it. theirs: the config.json."""
    name = ours
    for our_part, their_part in NAMES:
        name = name.replace(our_part, their_part)
    turned = name.startswith("h.") and name.endswith("weight") and ".ln_" not in name
    width = theirs["n_embd"]
    for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
        if part in name:
            return Source(name.replace(part, "c_attn"), turned, 3 * width, i * width)
    return Source(name, turned, theirs["n_positions"] if name == "wpe.weight" else 0)
