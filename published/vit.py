"""Published vision transformers that classify images: their config.json and the names of their tensors; in only.

    python sample.py --init_from=google/vit-base-patch16-224 --image=cat.jpg

Images are stretched to a square by bicubic interpolation, where transformers may take another one: probabilities differ
a little. A model whose images were normalised otherwise than to -1 .. 1 is refused.
"""

import math

from configurator import UserError
from published.bert import ACTIVATIONS
from published.files import KINDS, SIZE, Source, locate, require
from run.files import read_json
from vit import ImageClassifier, ImageClassifierConfig, ViTConfig

MODEL = ImageClassifier

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
        "architectures": (["ViTForImageClassification"],)}  # {their key: the only values that can be loaded}


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
