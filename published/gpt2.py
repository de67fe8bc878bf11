"""Published GPT-2: its config.json and the names of its tensors, in and out. The rest is in files.py.

GPT-2's linear layers are stored (in, out), and its queries, keys and values are one layer, c_attn.
"""

import torch

import tokenizer as tokenizers
from configurator import UserError
from model import GPT, GPTConfig
from published.files import FLAG, NUMBER, SIZE, Source, require

MODEL = GPT
load_tokenizer = tokenizers.load

# (ours, theirs), applied in this order
NAMES = (("transformer.", ""), ("blocks.", "h."), (".o_proj.", ".c_proj."), (".up_proj.", ".c_fc."),
         (".down_proj.", ".c_proj."), ("head.", "lm_head."))
ACTIVATIONS = {"gelu_new": "gelu", "relu2": "relu2"}  # their name: a key of MLPS


def to_config(theirs, name, block_size, dropout):
    """The GPTConfig of a config.json. Raises UserError for what our GPT can't compute, or a block_size too large."""
    activation = theirs.get("activation_function", "gelu_new")
    expected = {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
                "activation_function": ACTIVATIONS}
    for key, known in expected.items():
        if key in theirs and theirs[key] not in known:
            raise UserError(f"{name}: {key} = {theirs[key]!r}, but only {' or '.join(map(repr, known))} can be loaded")
    theirs = {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, **theirs}
    sizes = ["n_layer", "n_head", "n_embd", "vocab_size", "n_positions", *["n_inner"] * (theirs["n_inner"] is not None)]
    require(theirs, {**dict.fromkeys(sizes, SIZE), "layer_norm_epsilon": NUMBER, "tie_word_embeddings": FLAG}, name)
    if block_size and block_size > theirs["n_positions"]:
        raise UserError(f"block_size = {block_size}: {name} has learned only {theirs['n_positions']} positions")
    return GPTConfig(
        n_layer=theirs["n_layer"], n_head=theirs["n_head"], n_embd=theirs["n_embd"],
        n_hidden=theirs["n_inner"] or 0, vocab_size=theirs["vocab_size"],
        block_size=block_size or theirs["n_positions"], norm_eps=theirs["layer_norm_epsilon"],
        bias=True, dropout=dropout, mlp=ACTIVATIONS[activation], tied=theirs["tie_word_embeddings"])


def first_name(name):
    """The name without "transformer."; None for causal masks (bias, masked_bias)."""
    return None if name.endswith((".attn.bias", ".attn.masked_bias")) else name.removeprefix("transformer.")


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


def misfit(config):
    """The settings of a GPTConfig that GPT-2's layout can't hold, as text such as "bigrams = True"; "": it can."""
    fitting = {"positions": ("learned",), "norm": ("layernorm",), "mlp": tuple(ACTIVATIONS.values()),
               "n_kv_head": (0, config.n_head), "head_dim": (0, config.n_embd / config.n_head), "bigrams": (False,),
               "block": ("pre",), "final_norm": (True,), "qk_norm": (False,)}
    found = {name: getattr(config, name) for name, values in fitting.items() if getattr(config, name) not in values}
    return ", ".join(f"{name} = {value!r}" for name, value in found.items())


def to_published(model):
    """(config.json as a dict, {published name: tensor}) of a GPT that has no `misfit`. Biases that it lacks are 0."""
    config = model.config
    theirs = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "n_inner": config.n_hidden or 4 * config.n_embd, "layer_norm_epsilon": config.norm_eps,
        "activation_function": next(name for name, ours in ACTIVATIONS.items() if ours == config.mlp),
        "tie_word_embeddings": config.tied, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout}
    parts = {}  # {published name: {first row: tensor}}
    for ours, tensor in with_biases(model.state_dict()):
        name, turned, _, first = source(ours, theirs)
        prefix = "" if name.startswith("lm_head.") else "transformer."
        parts.setdefault(prefix + name, {})[first] = tensor.T if turned else tensor
    state = {name: torch.cat([tensors[first] for first in sorted(tensors)], -1) for name, tensors in parts.items()}
    return theirs, state


def with_biases(state):
    """Yields (name, tensor) of a GPT's state dict, and zeros for each bias that its linear layers and norms lack."""
    for name, tensor in state.items():
        yield name, tensor
        bias = name.removesuffix("weight") + "bias"
        if name.startswith("transformer.") and name.endswith("weight") and bias not in state:
            yield bias, tensor.new_zeros(len(tensor))
