"""The Llama layout: Llama, Mistral, Qwen 2 and Gemma, and what they call our settings and tensors. Loading, publishing.

    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M --prompt="Once upon"
    python train.py --init_from=Qwen/Qwen2.5-0.5B --block_size=512 --dataset=my --lora_rank=8

They are GPTs with other parts: rotary positions, an RMSNorm, a gated MLP. A family that differs in more than that has
another model_type, or keys in its config.json that no Llama has, and is refused.
"""

import math
import re

import tokenizer as tokenizers
from configurator import UserError, say
from model import GPT, GPTConfig
from published.files import KINDS, NUMBER, SIZE, Source, require
from vlm import Gemma, GemmaConfig

load_tokenizer = tokenizers.load

WINDOW = 1024  # positions that training keeps if the user names no block_size: the context may be 131,072
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}  # theirs: ours
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gemma": "GemmaForCausalLM"}  # what we publish

# our field: their key
SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
         "n_embd": "hidden_size", "head_dim": "head_dim", "n_hidden": "intermediate_size", "norm_eps": "rms_norm_eps",
         "vocab_size": "vocab_size", "tied": "tie_word_embeddings", "block_size": "max_position_embeddings"}

# transformers' values of keys that config.json lacks
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
         "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "silu"}
DEFAULTS = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                "sliding_window": 4096},
    "qwen2": {**LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
              "max_position_embeddings": 32768, "sliding_window": 4096},
    "gemma": {**LLAMA, "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
              "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
              "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}}

# Keys that to_config reads, or that change nothing here; FURTHER: those of one family. Any other key that is set, and
# whose name has a word of TELLING, may change what the model computes.
KNOWN = {*LLAMA, "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "attention_dropout",
         "attn_implementation"}
FURTHER = {"llama": {"attention_bias", "mlp_bias"}, "mistral": {"sliding_window"}, "gemma": set(),
           "qwen2": {"sliding_window", "use_sliding_window", "max_window_layers"}}
TELLING = re.compile("attention|attn|bias|cap|chunk|clip|expert|interleave|moe|mrope|multiplier|norm|original|quant"
                     "|pretraining|rope|rotary|scal|sliding|sparse|window")

# their rope_type: {argument of rotary.slower: their key}
SCALINGS = {"default": {}, "linear": {"factor": "factor"},
            "llama3": {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor",
                       "context": "original_max_position_embeddings"}}

# (ours, theirs), applied in this order
NAMES = (("transformer.blocks.", "layers."), ("transformer.ln_f.", "norm."), ("wte.", "embed_tokens."),
         (".ln_1.", ".input_layernorm."), (".ln_2.", ".post_attention_layernorm."), (".attn.", ".self_attn."))


# ----------------------------------------------------------------------------------------------------------------------
# In

def MODEL(config):
    return Gemma(config) if isinstance(config, GemmaConfig) else GPT(config)


def to_config(theirs, name, block_size, dropout):
    """The GPTConfig or GemmaConfig of a config.json; a key that it lacks has transformers' default.

    block_size: positions to keep; 0: all; None: WINDOW at most, for training. Raises UserError for what our GPT can't
    compute, and for a block_size beyond the model's.
    """
    kind = theirs["model_type"]
    require_known(theirs, name)
    full = {**DEFAULTS[kind], **theirs}
    unset = [key for key in ("num_key_value_heads", "head_dim") if full[key] is None]
    require(full, {key: KINDS.get(ours, SIZE) for ours, key in SIZES.items() if key not in unset}, name)
    most = full["max_position_embeddings"]
    if block_size is None and most > WINDOW:
        say(f"{name} has {most:,} positions: a run keeps {WINDOW:,}, its window of training; --block_size=N keeps N")
    kept = min(most, WINDOW) if block_size is None else block_size or most
    if kept > most:
        raise UserError(f"block_size = {kept}: {name} has only {most} positions")
    reach = min(most, require_no_window(full, name, kept))
    act = "gelu_pytorch_tanh" if (kind, full["hidden_act"]) == ("gemma", "gelu") else full["hidden_act"]  # so meant
    if act not in ACTIVATIONS:
        raise UserError(f"{name}: hidden_act = {act!r}, but only {' and '.join(ACTIVATIONS)} can be loaded")
    biases = bool(full.get("attention_bias")), bool(full.get("mlp_bias"))
    if biases[0] != biases[1]:
        raise UserError(f"{name}: attention_bias = {biases[0]} and mlp_bias = {biases[1]}, but only equal ones can be"
                        " loaded")
    theta, scaling = rope_of(theirs, name, most)
    sizes = {ours: 0 if full[key] is None else full[key] for ours, key in SIZES.items()}
    cls, norm = (GemmaConfig, "rmsnorm") if kind == "gemma" else (GPTConfig, "plain_rmsnorm")
    sizes |= {"block_size": kept, "context": reach if kept < reach else 0}
    return cls(**sizes, norm=norm, mlp=ACTIVATIONS[act], positions="rotary", rope_theta=theta, rope_scaling=scaling,
               bias=biases[0], qkv_bias=kind == "qwen2", dropout=dropout)


def require_known(theirs, name):
    """Raises UserError for a key that may change what the model computes and that no model of its family has."""
    kind = theirs["model_type"]
    for key, value in theirs.items():
        off = not value or type(value) in (int, float) and value == 1  # 1: a factor that changes nothing
        if key not in KNOWN | FURTHER[kind] and not key.startswith("_") and TELLING.search(key) and not off:
            raise UserError(f"{name}: {key} = {value!r:.60}, which no {kind} of Quill's has: it can't be loaded")
    if theirs.get("is_causal") is False:
        raise UserError(f"{name}: is_causal = False, but only causal models can be loaded")


def require_no_window(full, name, kept):
    """How many positions attend to all earlier ones; math.inf: any. Raises UserError if it is fewer than `kept`."""
    slides = full["model_type"] == "mistral" or bool(full.get("use_sliding_window"))
    for layer in full.get("layer_types") or ():
        if layer not in ("full_attention", "sliding_attention"):
            raise UserError(f"{name}: layer_types has {layer!r}, but only full attention can be loaded")
        slides = slides or layer == "sliding_attention"
    window = full.get("sliding_window")
    if not slides or window is None:
        return math.inf
    require(full, {"sliding_window": SIZE}, name)
    if window < kept:
        raise UserError(f"{name}: sliding_window = {window}, but only attention to all positions can be loaded; fewer"
                        f" positions are all within the window: train.py keeps them with --block_size={window}")
    return window


def rope_of(theirs, name, most):
    """(rope_theta, rope_scaling) of our config, from the keys of transformers 5 or the older ones. most: positions."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor")) or 1
    if kind not in SCALINGS:
        raise UserError(f"{name}: rope_type = {kind!r}, but only {', '.join(SCALINGS)} can be loaded: use a model"
                        " without that scaling, or take it out of config.json and keep to the original context")
    if partial != 1:
        raise UserError(f"{name}: partial_rotary_factor = {partial}, but only 1 can be loaded")
    keys = SCALINGS[kind]
    if unknown := rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *keys.values()}:
        raise UserError(f"{name}: rope_parameters has {sorted(unknown)[0]!r}, which a rope_type {kind!r} has not")
    rope = {"original_max_position_embeddings": most, "rope_theta": theirs.get("rope_theta", 10000.0), **rope}
    require(rope, dict.fromkeys(("rope_theta", *keys.values()), NUMBER), name)
    return float(rope["rope_theta"]), {ours: rope[key] for ours, key in keys.items()}


def first_name(name):
    """The name without "model."; None for the tables of old files."""
    return None if name.endswith(".rotary_emb.inv_freq") else name.removeprefix("model.")


def source(ours, _=None):
    """The Source of our parameter: where the published files have it. The second argument, config.json, is unused."""
    for our_part, their_part in NAMES:
        ours = ours.replace(our_part, their_part)
    return Source("lm_head.weight" if ours == "head.weight" else ours)


# ----------------------------------------------------------------------------------------------------------------------
# Out

def misfit(config):
    """Text that names the settings of a GPTConfig that the Llama layout can't hold; "" if it holds them all."""
    gemma = isinstance(config, GemmaConfig)
    wrong = {
        "positions": config.positions != "rotary",
        "norm": config.norm not in (("rmsnorm",) if gemma else ("rmsnorm", "plain_rmsnorm")),
        "mlp": config.mlp not in ACTIVATIONS.values(),
        "bigrams": config.bigrams, "cross": config.cross, "qk_norm": config.qk_norm,
        "block": config.block != "pre", "final_norm": not config.final_norm,
        "bias": gemma and config.bias, "qkv_bias": gemma and config.qkv_bias,
        "n_embd": config.n_embd % config.n_head != 0}  # transformers asks for a multiple of n_head
    return ", ".join(f"{name} = {getattr(config, name)!r}" for name, is_wrong in wrong.items() if is_wrong)


def to_published(model):
    """(config.json as a dict, {their name: tensor}) of a GPT or Gemma with no `misfit`. The ids of tokens are None."""
    c = model.config
    kind = "gemma" if isinstance(c, GemmaConfig) else "qwen2" if c.qkv_bias and not c.bias else "llama"
    state = {}
    for ours, tensor in model.state_dict().items():
        name = source(ours).name
        is_gain = c.norm == "rmsnorm" and kind != "gemma" and name.endswith("norm.weight")
        state[name if name == "lm_head.weight" else f"model.{name}"] = 1 + tensor if is_gain else tensor
    sizes = {their: getattr(c, ours) for ours, their in SIZES.items()}
    sizes["max_position_embeddings"] = c.context or c.block_size  # rotary positions lose nothing by training on fewer
    sizes["num_key_value_heads"] = c.n_kv_head or c.n_head
    sizes["head_dim"] = c.head_dim or c.n_embd // c.n_head
    sizes["intermediate_size"] = c.n_hidden or 4 * c.n_embd
    form = "llama3" if "low" in c.rope_scaling else "linear" if c.rope_scaling else "default"
    scaling = {"rope_type": form, **{key: c.rope_scaling[ours] for ours, key in SCALINGS[form].items()}}
    return {
        "architectures": [CLASSES[kind]], "model_type": kind, **sizes,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.mlp),
        **({"attention_bias": c.bias, "mlp_bias": c.bias} if kind == "llama" else {}),
        "rope_theta": c.rope_theta, "rope_scaling": scaling if c.rope_scaling else None,  # transformers 4, llama.cpp
        "rope_parameters": {**scaling, "rope_theta": c.rope_theta},  # transformers 5
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,  # else Llama's defaults would be meant
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}, state
