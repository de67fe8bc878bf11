"""Vision transformers that classify images: their config.json and the names of their tensors; in and out.

    python sample.py --init_from=google/vit-base-patch16-224 --image=cat.jpg

In: images are stretched to a square by bicubic interpolation, where transformers may take another one: probabilities
differ a little. A model whose images were normalised otherwise than to -1 .. 1 is refused.
Out: by preprocessor_config.json transformers stretches and scales images as run.pictures.pixels does; with torchvision
installed, it rounds some pixels otherwise, by 1 of 255. We scale values of 16 bits, and transformers cuts them off. Its
pipeline shows the hidden colour of transparent pixels, where we show white; its image processor alone does not turn a
photo upright.
"""

import math

from configurator import UserError
from published.bert import ACTIVATIONS
from published.files import KINDS, SIZE, Source, locate, require
from run.files import read_json, write_json
from vit import ImageClassifier, ImageClassifierConfig, ViTConfig

MODEL = ImageClassifier
CLASS = "ViTForImageClassification"
REMEDY = "--pool=first --stem=False"  # and with the defaults: what can be published

# (ours, theirs), applied in this order
NAMES = (("vision.cls.weight", "embeddings.cls_token"), ("vision.wpe.weight", "embeddings.position_embeddings"),
         ("vision.patches.", "embeddings.patch_embeddings.projection."), ("vision.transformer.ln_f.", "layernorm."),
         ("head.", "classifier."), ("vision.transformer.blocks.", "encoder.layer."), (".ln_1.", ".layernorm_before."),
         (".ln_2.", ".layernorm_after."), (".attn.q_proj.", ".attention.attention.query."),
         (".attn.k_proj.", ".attention.attention.key."), (".attn.v_proj.", ".attention.attention.value."),
         (".attn.o_proj.", ".attention.output.dense."), (".mlp.up_proj.", ".intermediate.dense."),
         (".mlp.down_proj.", ".output.dense."))
ROWS_IN_A_BATCH_OF_ONE = ("embeddings.cls_token", "embeddings.position_embeddings")  # theirs have one dimension more

SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
         "n_hidden": "intermediate_size", "norm_eps": "layer_norm_eps", "image_size": "image_size",
         "patch_size": "patch_size"}  # our field: their key
DEFAULTS = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072,
            "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16}  # of a key that config.json lacks
ONLY = {"hidden_act": ACTIVATIONS, "num_channels": (3,), "qkv_bias": (True,), "quantization_config": (None,),
        "architectures": ([CLASS],)}  # {their key: the only values that can be loaded}


# ----------------------------------------------------------------------------------------------------------------------
# In

def to_config(theirs, name, block_size=0, dropout=0.0):
    """The ImageClassifierConfig of a config.json. Raises UserError for what our model can't compute."""
    for key, known in ONLY.items():
        if key in theirs and theirs[key] not in known:
            raise UserError(f"{name}: {key} = {theirs[key]!r:.60}, but only {' or '.join(map(repr, known))} can be"
                            " loaded")
    full = {**DEFAULTS, **theirs}
    require(full, {key: KINDS.get(ours, SIZE) for ours, key in SIZES.items()}, name)
    labels = theirs.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers leaves out these two
    if sorted(labels, key=int) != [str(i) for i in range(len(labels))]:
        raise UserError(f"{name}: id2label = {labels!r:.60}, but it must name the classes from 0 on")
    sizes = {ours: full[key] for ours, key in SIZES.items()}
    vision = ViTConfig(**sizes, mlp=ACTIVATIONS[theirs.get("hidden_act", "gelu")], cls=True)
    return ImageClassifierConfig(vision, tuple(labels[str(i)] for i in range(len(labels))), dropout)


def choose(config, theirs, stored, name):
    """The config, as it is. The tensors in `stored`, see `files.read_tensors`, get our shapes.

    Raises UserError for a model whose images are not normalised as ours.
    """
    path = locate(name) / "preprocessor_config.json"
    found = read_json(path) if path.exists() else {}
    for key in ("image_mean", "image_std"):
        if found.get(key, [0.5] * 3) != [0.5] * 3:
            raise UserError(f"{name}: {key} = {found[key]}, but only [0.5, 0.5, 0.5] can be loaded")
    for key in ("do_rescale", "do_normalize"):
        if not found.get(key, True):
            raise UserError(f"{name}: {key} = {found[key]}, but only True can be loaded")
    if not math.isclose(found.get("rescale_factor", 1 / 255), 1 / 255):
        raise UserError(f"{name}: rescale_factor = {found['rescale_factor']}, but only 1/255 can be loaded")
    for key in ROWS_IN_A_BATCH_OF_ONE:
        if key in stored:
            stored[key] = stored[key][0], stored[key][1].flatten(0, 1)
    return config


def first_name(name):
    """The name without "vit."; None for the pooler, which this model does not use."""
    name = name.removeprefix("vit.")
    return None if name.startswith("pooler.") else name


def source(ours, theirs):
    """The Source of our parameter: where the published files have it."""
    for our_part, their_part in NAMES:
        ours = ours.replace(our_part, their_part)
    return Source(ours)


# ----------------------------------------------------------------------------------------------------------------------
# Out

def misfit(config):
    """The settings of an ImageClassifierConfig that ViT's layout can't hold, such as "pool = 'mean'"; "": it can."""
    c = config.vision
    fitting = {"stem": (False,), "block": ("pre",), "final_norm": (True,), "norm": ("layernorm",), "bias": (True,),
               "mlp": tuple(ACTIVATIONS.values()), "n_kv_head": (0, c.n_head), "head_dim": (0, c.n_embd / c.n_head),
               "qk_norm": (False,)}
    found = {name: getattr(c, name) for name, values in fitting.items() if getattr(c, name) not in values}
    found = found if c.cls else {"pool": "mean", **found}
    return ", ".join(f"{name} = {value!r}" for name, value in found.items())


def save(model, _, folder, shard_size):
    """Writes a model without `misfit` into `folder`, with what its images need, for transformers.

    shard_size: most bytes per weight file.
    """
    from huggingface_hub import save_torch_state_dict
    save_torch_state_dict(to_published(model), folder, max_shard_size=shard_size)
    size = model.config.vision.image_size
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "ViTImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"height": size, "width": size}, "resample": 3,  # bicubic
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3})
    write_json(folder / "config.json", to_published_config(model))


def to_published(model):
    """{published name: tensor} of a model without `misfit`."""
    state = {source(ours, {}).name: tensor for ours, tensor in model.state_dict().items()}
    state |= {name: state[name][None] for name in ROWS_IN_A_BATCH_OF_ONE}
    return {name if name.startswith("classifier.") else f"vit.{name}": tensor for name, tensor in state.items()}


def to_published_config(model):
    """The dict for the config.json of a model without `misfit`."""
    c, labels = model.config.vision, model.config.labels
    sizes = {their: getattr(c, ours) for ours, their in SIZES.items()}
    sizes["intermediate_size"] = c.n_hidden or 4 * c.n_embd
    return {"architectures": [CLASS], "model_type": "vit", **sizes, "num_channels": 3, "qkv_bias": True,
            "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.mlp),
            "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.dropout,
            "id2label": {str(i): name for i, name in enumerate(labels)},
            "label2id": {name: i for i, name in enumerate(labels)},
            "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
