"""Published BERTs: their config.json, the names of their tensors, and their tokenizer; in and out.

    python sample.py --init_from=bert-base-uncased --prompt="Click the [MASK] to save."

A BertForMaskedLM or BertForPreTraining is a MaskedLM here, a BertForQuestionAnswering an Answerer, a BertModel without
such a head a SentenceEncoder.
"""

import dataclasses

import tokenizer as tokenizers
from configurator import UserError, say
from encoder import Answerer, AnswererConfig, EncoderConfig, MaskedLM, SentenceConfig, SentenceEncoder
from published.files import HEAD, KINDS, SIZE, Source, require
from run.files import write_json

# (ours, theirs), applied in this order
NAMES = (("encoder.transformer.blocks.", "encoder.layer."), ("encoder.wte.", "embeddings.word_embeddings."),
         ("encoder.wpe.", "embeddings.position_embeddings."), ("encoder.types.", "embeddings.token_type_embeddings."),
         ("encoder.ln_e.", "embeddings.LayerNorm."), (".ln_1.", ".attention.output.LayerNorm."),
         (".ln_2.", ".output.LayerNorm."), (".attn.o_proj.", ".attention.output.dense."),
         (".attn.q_proj.", ".attention.self.query."), (".attn.k_proj.", ".attention.self.key."),
         (".attn.v_proj.", ".attention.self.value."), (".mlp.up_proj.", ".intermediate.dense."),
         (".mlp.down_proj.", ".output.dense."))
HEADS = {"pooler.": "pooler.dense.", "dense.": "cls.predictions.transform.dense.",
         "ln.": "cls.predictions.transform.LayerNorm.", "bias": "cls.predictions.bias",
         "head.": "qa_outputs."}  # what begins with these
BIAS_TWICE = "cls.predictions.decoder.bias"  # some files have the head's bias under this name too
POOLED = ("pooler.", "cls.seq_relationship.")  # BERT's second task, the next sentence: only a BertModel may keep it

ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}  # theirs: ours
REMEDY = "--block=post --mlp=gelu"  # and with the defaults: what can be published
MASKED = ("BertForMaskedLM", "BertForPreTraining")
ANSWERER = "BertForQuestionAnswering"  # config.json must name it: without that, it is the task of another model
CLASSES = ("BertModel", *MASKED, ANSWERER)

SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
         "n_hidden": "intermediate_size", "vocab_size": "vocab_size", "block_size": "max_position_embeddings",
         "n_types": "type_vocab_size", "norm_eps": "layer_norm_eps"}  # our field: their key
DEFAULTS = {"layer_norm_eps": 1e-12}  # of a key that config.json may lack, as in 2018
# {their key: the only values that can be loaded}; a key that is missing has one of them
ONLY = {"position_embedding_type": ("absolute", None), "is_decoder": (False, None),
        "add_cross_attention": (False, None), "tie_word_embeddings": (True,), "pruned_heads": ({}, None),
        "quantization_config": (None,), "auto_map": (None,), "hidden_act": ACTIVATIONS}


# ----------------------------------------------------------------------------------------------------------------------
# In

def MODEL(config):
    return {SentenceConfig: SentenceEncoder, AnswererConfig: Answerer}.get(type(config), MaskedLM)(config)


def to_config(theirs, name, block_size=0, dropout=0.0):
    """The EncoderConfig of a config.json.

    block_size: positions to keep; 0 or None: all. Raises UserError for what our encoder can't compute, for a missing
    size, and for a block_size beyond the model's.
    """
    for key, known in ONLY.items():
        if key in theirs and theirs[key] not in known:
            raise UserError(f"{name}: {key} = {theirs[key]!r:.60}, but only {' or '.join(map(repr, known))} can be"
                            " loaded")
    for cls in theirs.get("architectures") or ():
        if cls not in CLASSES:
            raise UserError(f"{name} is a {cls}, but only {', '.join(CLASSES)} can be loaded")
    full = {**DEFAULTS, **theirs}
    if missing := [key for key in SIZES.values() if key not in full]:
        raise UserError(f"the config.json of {name} lacks {', '.join(missing)}: add what the model was trained with")
    require(full, {key: KINDS.get(ours, SIZE) for ours, key in SIZES.items()}, name)
    sizes = {ours: full[key] for ours, key in SIZES.items()}
    if block_size and block_size > sizes["block_size"]:
        raise UserError(f"block_size = {block_size}: {name} has learned only {sizes['block_size']} positions")
    sizes["block_size"] = block_size or sizes["block_size"]
    return EncoderConfig(**sizes, mlp=ACTIVATIONS[theirs.get("hidden_act", "gelu")], block="post", final_norm=False,
                         embed_norm=True, dropout=dropout)


def choose(config, theirs, stored, name):
    """The config of the model that these tensors make. What only BERT's second task needs is taken out of `stored`.

    config.json names the class of the model; if it does not, the names of the tensors tell it. stored: see
    `files.read_tensors`. Raises UserError if the two biases of a head differ.
    """
    classes = theirs.get("architectures") or [MASKED[0] if HEADS["bias"] in stored else "BertModel"]
    if classes[0] == "BertModel":
        return SentenceConfig(**dataclasses.asdict(config), pooler=HEADS["pooler."] + "weight" in stored)
    unused = [key for key in stored if key.startswith(POOLED)]
    for key in unused:
        del stored[key]
    if unused:
        say(f"{name}: left out, as only next-sentence prediction needs it: {', '.join(sorted(unused))}")
    if BIAS_TWICE in stored:
        key, bias = stored.pop(BIAS_TWICE)
        _, other = stored.setdefault(HEADS["bias"], (key, bias))
        if not bias.equal(other):
            raise UserError(f"{name}: {key} is not {HEADS['bias']}, but a head has one bias: take one of them out")
    if classes[0] != ANSWERER:
        return config
    if len(outputs := theirs.get("id2label", "01")) != 2:
        raise UserError(f"{name}: id2label names {len(outputs)} outputs, and an answer has two, its start and its end")
    return AnswererConfig(**dataclasses.asdict(config), dense=False)


def load_tokenizer(path):
    """The tokenizer at `path`: a tokenizer.json, or BERT's vocab.txt. Raises UserError without [CLS] and [MASK]."""
    tokenizer = tokenizers.load(path)
    if tokenizers.marks_of(tokenizer).size > tokenizer.vocab_size:
        raise UserError(f"{path} lacks [CLS] or [MASK]: only tokenizers with BERT's control tokens can be loaded")
    return tokenizer


def first_name(name):
    """The name without "bert.", as transformers names it today; None for the numbers of the positions."""
    name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    if name == "cls.predictions.decoder.weight":
        return HEAD
    return None if name == "embeddings.position_ids" else name


def source(ours, theirs):
    """The Source of our parameter: where the published files have it. theirs: the config.json."""
    if not ours.startswith("encoder."):
        start = next(start for start in HEADS if ours.startswith(start))
        return Source(HEADS[start] + ours.removeprefix(start))
    name = ours
    for our_part, their_part in NAMES:
        name = name.replace(our_part, their_part)
    return Source(name, rows=theirs.get(SIZES["block_size"], 0) if ours == "encoder.wpe.weight" else 0)


# ----------------------------------------------------------------------------------------------------------------------
# Out

def misfit(config):
    """The settings of an EncoderConfig that BERT's layout can't hold, as text such as "block = 'pre'"; "": it can."""
    fitting = {"block": ("post",), "embed_norm": (True,), "final_norm": (False,), "norm": ("layernorm",),
               "mlp": tuple(ACTIVATIONS.values()), "positions": ("learned",), "bias": (True,),
               "n_kv_head": (0, config.n_head), "head_dim": (0, config.n_embd / config.n_head), "qk_norm": (False,)}
    if isinstance(config, AnswererConfig):
        fitting["dense"] = (False,)
    found = {name: getattr(config, name) for name, values in fitting.items() if getattr(config, name) not in values}
    return ", ".join(f"{name} = {value!r}" for name, value in found.items())


def save(model, tokenizer, folder, shard_size):
    """Writes a model without `misfit` into `folder`, as one of CLASSES, which transformers can load.

    Its tokenizer frames texts as the model was trained: see `library`. shard_size: most bytes per weight file.
    """
    from huggingface_hub import save_torch_state_dict
    frames = library(tokenizer, model)
    names = {f"{role}_token": f"[{role.upper()}]" for role in ("cls", "sep", "mask", "pad", "unk")}
    names = {role: token for role, token in names.items() if frames.token_to_id(token) is not None}
    pad = frames.token_to_id("[PAD]")  # None: no row of the embedding is only for padding
    save_torch_state_dict(to_published(model), folder, max_shard_size=shard_size)
    frames.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json",
               {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "model_max_length": model.config.block_size,
                "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
                "pad_token": "[CLS]", **names})  # [CLS], because nobody looks for a second one
    write_json(folder / "config.json", {**to_published_config(model), "pad_token_id": pad})


def library(tokenizer, model):
    """A tokenizers.Tokenizer with the control tokens of `marks_of`, which it puts around texts as the tasks do.

    Raises UserError for a tokenizer that can't be one, or in which [CLS] and [MASK] would have other ids; and if an
    Answerer has read texts by another one than BERT's, word by word: the library would cut them otherwise.
    """
    from tokenizers import Tokenizer, processors
    marks = tokenizers.marks_of(tokenizer)
    if isinstance(model, Answerer) and marks.sep is None:
        raise UserError(f"an Answerer with {tokenizer!r} can't be published: it needs BERT's tokenizer; start from a"
                        " published BERT, or prepare the data with --tokenizer=FOLDER of one")
    made = Tokenizer.from_str(tokenizer.as_library().to_str())
    made.add_special_tokens([token for token in ("[CLS]", "[MASK]") if made.token_to_id(token) is None])
    if (made.token_to_id("[CLS]"), made.token_to_id("[MASK]")) != (marks.cls, marks.mask):
        raise UserError(f"{tokenizer!r} can't be published for an encoder: [CLS] and [MASK] can't have the ids"
                        f" {marks.cls} and {marks.mask} in it; train with another, such as bpe:SIZE")
    ids, single, pair = [("[CLS]", marks.cls)], "[CLS] $A", "[CLS] $A $B:1"
    if marks.sep is not None:
        ids, single, pair = [*ids, ("[SEP]", marks.sep)], "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return made


def to_published(model):
    """{published name: tensor} of a model without `misfit`. A table of token types that it lacks is 0."""
    prefix, heads = "bert." if isinstance(model, (MaskedLM, Answerer)) else "", ("cls.", "qa_outputs.")
    named = {source(ours, {}).name: tensor for ours, tensor in model.state_dict().items()}
    state = {name if name.startswith(heads) else prefix + name: tensor for name, tensor in named.items()}
    table = f"{prefix}embeddings.token_type_embeddings.weight"
    if table not in state:
        state[table] = model.encoder.wte.weight.new_zeros(2, model.config.n_embd)
    return state


def to_published_config(model):
    """The dict for the config.json of a model without `misfit`."""
    c = model.config
    sizes = {their: getattr(c, ours) for ours, their in SIZES.items()}
    sizes |= {"intermediate_size": c.n_hidden or 4 * c.n_embd, "type_vocab_size": c.n_types or 2}
    cls = {MaskedLM: MASKED[0], Answerer: ANSWERER}.get(type(model), "BertModel")
    return {"architectures": [cls], "model_type": "bert", **sizes,
            "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.mlp),
            "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.dropout,
            "position_embedding_type": "absolute", "is_decoder": False, "tie_word_embeddings": True,
            "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
