"""Published PaliGemma (version 1): its config.json, tensor names and tokenizer; loading and saving.

    python sample.py --init_from=google/paligemma-3b-pt-224 --image=photo.jpg --prompt="caption en" --temperature=0
"""

import re
from dataclasses import replace
from pathlib import Path

import tokenizer as tokenizers
from configurator import UserError
from published.files import KINDS, NUMBER, SIZE, Source, require
from run.files import write_json
from run.pictures import LOCATIONS, SEGMENTS
from vit import ViTConfig
from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig

MODEL = PaliGemma

# (ours, theirs in the first layout), applied in this order
NAMES = (
    ("vision.patches.", "vision_tower.vision_model.embeddings.patch_embedding."),
    ("vision.wpe.", "vision_tower.vision_model.embeddings.position_embedding."),
    ("vision.transformer.ln_f.", "vision_tower.vision_model.post_layernorm."),
    ("vision.transformer.blocks.", "vision_tower.vision_model.encoder.layers."),
    ("projector.", "multi_modal_projector.linear."),
    ("decoder.wte.", "language_model.model.embed_tokens."),
    ("decoder.transformer.ln_f.", "language_model.model.norm."),
    ("decoder.transformer.blocks.", "language_model.model.layers."))
BLOCKS = {
    "vision_tower": ((".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".attn.o_proj.", ".attn.out_proj."),
                     (".attn.", ".self_attn."), (".up_proj.", ".fc1."), (".down_proj.", ".fc2.")),
    "language_model": ((".ln_1.", ".input_layernorm."), (".ln_2.", ".post_attention_layernorm."),
                       (".attn.", ".self_attn."))}

# our field: (their key, the value if config.json lacks it)
SIZES = {
    "vision_config": {
        "n_layer": ("num_hidden_layers", 12), "n_head": ("num_attention_heads", 12), "n_embd": ("hidden_size", 768),
        "n_hidden": ("intermediate_size", 3072), "norm_eps": ("layer_norm_eps", 1e-6),
        "image_size": ("image_size", 224), "patch_size": ("patch_size", 16)},
    "text_config": {
        "n_layer": ("num_hidden_layers", 28), "n_head": ("num_attention_heads", 16), "n_embd": ("hidden_size", 3072),
        "n_kv_head": ("num_key_value_heads", 16), "head_dim": ("head_dim", 256),
        "n_hidden": ("intermediate_size", 24576), "norm_eps": ("rms_norm_eps", 1e-6),
        "vocab_size": ("vocab_size", 256000), "block_size": ("max_position_embeddings", 8192)}}


def to_config(theirs, name, block_size=0, dropout=0.0):
    """The PaliGemmaConfig of a config.json; a key that it lacks has transformers' default.

    Raises UserError for a PaliGemma 2, for what Quill can't compute, and for a block_size that is not the model's.
    """
    vision, text = theirs.get("vision_config") or {}, theirs.get("text_config") or {}
    if text.get("model_type", "gemma") != "gemma":
        raise UserError(f"{name} is a PaliGemma 2 (its decoder is a {text['model_type']}), which Quill can't compute;"
                        " use a PaliGemma 1, such as google/paligemma-3b-pt-224")
    rope = {"rope_type": "default", "rope_theta": text.get("rope_theta", 10000.0)} | (text.get("rope_parameters") or {})
    tanh = "gelu_pytorch_tanh"  # some of Gemma's config.json call it gelu
    expected = {"text hidden_act": (text.get("hidden_act", tanh).replace(tanh, "gelu"), "gelu"),
                "vision hidden_act": (vision.get("hidden_act", tanh), tanh),
                "attention_bias": (text.get("attention_bias", False), False),
                "rope_scaling": (text.get("rope_scaling"), None), "rope_type": (rope["rope_type"], "default"),
                "tie_word_embeddings": (theirs.get("tie_word_embeddings", True), True)}
    for key, (value, only) in expected.items():
        if value != only:
            raise UserError(f"{name}: {key} = {value!r}, but only {only!r} can be loaded")
    sizes = []
    for table, part in zip(SIZES.values(), (vision, text)):
        part = {**dict(table.values()), **part}
        require(part, {key: KINDS.get(ours, SIZE) for ours, (key, _) in table.items()}, name)
        sizes.append({ours: part[key] for ours, (key, _) in table.items()})
    require(rope, {"rope_theta": NUMBER}, name)
    config = PaliGemmaConfig(ViTConfig(**sizes[0]), GemmaConfig(**sizes[1], rope_theta=rope["rope_theta"]), dropout)
    if block_size not in (0, None, config.text.block_size):
        raise UserError(f"block_size = {block_size}: {name} has {config.text.block_size}; leave it out")
    return config


def load_tokenizer(path):
    """The tokenizer at `path`; <image>, <loc0000>.. and <seg000>.. are added to one that lacks them."""
    bpe = tokenizers.load(path).bpe
    bpe.add_special_tokens(["<image>"])
    bpe.add_tokens(LOCATIONS + SEGMENTS)
    return tokenizers.BPETokenizer(bpe)


def source(name, _=None):
    """The Source (where it is in the published files) of our parameter. The second argument, config.json, is unused."""
    for ours, theirs in NAMES:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    for ours, theirs in BLOCKS.get(name.partition(".")[0], ()):
        name = name.replace(ours, theirs)
    return Source(name)


def first_name(theirs):
    """A published tensor's name in the layout of NAMES; None for the unused pooling head."""
    name = theirs.removeprefix("model.")
    name = re.sub(r"^vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name)
    name = re.sub(r"^language_model\.(model\.)?", "language_model.model.", name)
    name = name.replace("language_model.model.lm_head.", "lm_head.")
    return None if name.startswith("vision_tower.vision_model.head.") else name


def save(model, tokenizer, folder, shard_size=5 * 10**9):
    """Writes a PaliGemma into `folder` in the published layout, in its own dtype; transformers can load it.

    AutoProcessor.from_pretrained(folder) prepares images and prompts as we do. shard_size: most bytes per weight file.
    """
    from huggingface_hub import save_torch_state_dict
    folder, vision = Path(folder), model.config.vision
    folder.mkdir(parents=True, exist_ok=True)
    state = {source(name).name: tensor for name, tensor in model.state_dict().items()}
    save_torch_state_dict(state, folder, max_shard_size=shard_size)
    tokenizer.save(folder / "tokenizer.json")
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    special = {name: token for name, token in special.items() if tokenizer.bpe.token_to_id(token) is not None}
    write_json(folder / "tokenizer_config.json",
               {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **special})
    write_json(folder / "preprocessor_config.json", {  # the rest is SiglipImageProcessor's default
        "processor_class": "PaliGemmaProcessor", "image_processor_type": "SiglipImageProcessor", "do_convert_rgb": True,
        "image_seq_length": vision.n_patches, "size": {"height": vision.image_size, "width": vision.image_size}})
    write_json(folder / "config.json", to_published_config(model, tokenizer))


def to_published_config(model, tokenizer):
    """The dict for the config.json of a PaliGemma, with every size spelt out."""
    vision, text, width = model.config.vision, model.config.text, model.config.text.n_embd
    vision = replace(vision, n_hidden=vision.n_hidden or 4 * vision.n_embd)
    text = replace(text, n_hidden=text.n_hidden or 4 * width, n_kv_head=text.n_kv_head or text.n_head,
                   head_dim=text.head_dim or width // text.n_head)
    sections = {section: {key: getattr(part, ours) for ours, (key, _) in SIZES[section].items()}
                for section, part in (("vision_config", vision), ("text_config", text))}
    sections["vision_config"] |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    sections["text_config"] |= {"model_type": "gemma", "rope_theta": text.rope_theta}
    ids = {f"{name}_token_id": tokenizer.bpe.token_to_id(f"<{name}>") for name in ("bos", "eos", "pad")}
    return {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", **ids,
            "image_token_index": tokenizer.bpe.token_to_id("<image>"), "hidden_size": width, "projection_dim": width,
            "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."), **sections}
