"""Checkpoints: saved atomically, loaded strictly; and published GPT-2 weights, converted at the door.

A checkpoint is a folder of its own, with all that sampling needs:

    model.safetensors    the weights, float32
    tokenizer.json       text to ids and back
    config.json          the model's shape, the run's settings, step and losses, where the data came from
    trainer.pt           what resuming needs besides (only in `last`); loads without running code

An out directory holds two: `last`, and `best` by validation loss. A save writes `last.new`, then renames: at any
instant there is one complete checkpoint that `find` finds.
"""

import dataclasses
import json
import os
import platform
import shutil
from pathlib import Path

import numpy
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import tokenizer as tokenizers
from configurator import UserError
from model import GPT, GPTConfig
from tokenizer import write_json

MODELS = {"gpt": (GPT, GPTConfig)}
GPT2 = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


# ----------------------------------------------------------------------------------------------------------------------
# Our own

def save(out_dir, name, model, tokenizer, info, trainer=None):
    """Writes the checkpoint out_dir/name in one step, as seen from outside.

    info: plain values for config.json, beside the model's shape. trainer: tensors and plain values, or None.
    """
    out_dir = Path(out_dir)
    new, old, final = (out_dir / (name + suffix) for suffix in (".new", ".old", ""))
    if not final.exists() and (found := find(out_dir, name)):
        found.rename(final)  # an earlier save was killed between its two renames
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    save_file(state, new / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(new / "tokenizer.json")
    if trainer is not None:
        torch.save(trainer, new / "trainer.pt")
    kind = next(kind for kind, (cls, _) in MODELS.items() if type(model) is cls)
    config = {"model_type": kind, "model": dataclasses.asdict(model.config), **info, "versions": versions()}
    flush_to_disk(new)
    write_json(new / "config.json", config)  # last: a folder that has it is complete
    flush_to_disk(new)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def flush_to_disk(folder):
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
            "platform": platform.platform()}


def find(out_dir, name):
    """The folder of the checkpoint `name` in out_dir, or None. A save that was killed leaves one of the three."""
    for folder in (Path(out_dir) / (name + suffix) for suffix in ("", ".new", ".old")):
        if (folder / "config.json").is_file():
            return folder
    return None


def find_any(out_dir, preferred="best"):
    """The folder to sample or evaluate: `preferred`, or else the other of best and last, or out_dir itself.

    Raises UserError where there is no checkpoint.
    """
    out_dir = Path(out_dir)
    if (out_dir / "model.safetensors").is_file():
        return out_dir
    for name in sorted(("best", "last"), key=lambda name: name != preferred):
        if folder := find(out_dir, name):
            return folder
    raise UserError(f"there is no checkpoint in {out_dir}: train one first, python train.py"
                    f" config/shakespeare_char.py --out_dir={out_dir}")


def read_config(folder):
    try:
        with open(Path(folder) / "config.json", encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(folder) / 'config.json'} can't be read: {error}") from None


def load(folder, device="cpu", dropout=0.0):
    """(model, tokenizer, config) of a checkpoint, the model in float32 and in eval mode.

    Raises UserError for a damaged or foreign folder.
    """
    folder, config = Path(folder), read_config(folder)
    if config.get("model_type") not in MODELS:
        raise UserError(f"{folder} is not a Quill checkpoint (model_type {config.get('model_type')!r}); for a published"
                        f" model use --init_from={folder}")
    cls, config_cls = MODELS[config["model_type"]]
    shape = config_cls(**{**config["model"], "dropout": dropout})
    model = build(cls, shape, read_weights([folder / "model.safetensors"]), device, folder)
    return model, tokenizers.load(folder / "tokenizer.json"), config


def load_trainer(folder):
    """What `save` got as trainer. Nothing in the file is executed. Raises UserError if it is damaged."""
    try:
        return torch.load(Path(folder) / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{Path(folder) / 'trainer.pt'} can't be read ({type(error).__name__});"
                        " to go on from the weights alone, start a new run") from None


def read_weights(paths):
    state = {}
    for path in paths:
        try:
            state.update(load_file(path))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be read: {error}") from None
    return state


def build(cls, config, state, device, source):
    """A model with the weights of `state`, which must match name by name and shape by shape."""
    model = unfilled(cls, config, device)
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    reshaped = [name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape]
    if missing or unexpected or reshaped:
        raise UserError(f"the weights of {source} do not fit: missing {missing}, unexpected {unexpected},"
                        f" of another shape {sorted(reshaped)}")
    model.load_state_dict(state)
    return model.eval()


def unfilled(cls, config, device, dtype=torch.float32):
    """A model whose parameters are allocated, once and in their place, but hold no values yet."""
    with torch.device("meta"), NoInitialisation():
        model = cls(config)
    return model.to(dtype).to_empty(device=device)


class NoInitialisation(TorchFunctionMode):
    """Modules made in this context do not draw the values that a checkpoint is about to replace."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------------------------------------------------
# Published GPT-2

def load_initial(name, device="cpu", block_size=0, dropout=0.0):
    """(model, tokenizer) to start a run from: a Quill run's or checkpoint's folder, or what `load_published` takes."""
    if any(find(name, which) for which in ("best", "last")) or (Path(name) / "trainer.pt").exists():
        model, tokenizer, _ = load(find_any(name), device, dropout)
        if block_size not in (0, model.config.block_size):
            raise UserError(f"block_size = {block_size}: the model of {name} has {model.config.block_size}")
        return model, tokenizer
    return load_published(name, device, block_size, dropout)


def load_published(name, device="cpu", block_size=0, dropout=0.0):
    """(model, tokenizer) of a published GPT-2: gpt2, gpt2-medium, -large, -xl, a hub id, or a local folder.

    The folder has the published layout: config.json, model.safetensors or shards with their index, tokenizer.json.
    block_size: fewer positions than the model has (0: all). Raises UserError for anything that is not a GPT-2.
    """
    folder = Path(name) if Path(name).is_dir() else download(GPT2.get(name, name))
    theirs = read_config(folder)
    expected = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for key, value in expected.items():
        if theirs.get(key, value) != value:
            raise UserError(f"{name}: {key} = {theirs[key]!r}, but only {value!r} can be loaded")
    config = GPTConfig(
        n_layer=theirs["n_layer"], n_head=theirs["n_head"], n_embd=theirs["n_embd"],
        n_hidden=theirs.get("n_inner") or 0, vocab_size=theirs["vocab_size"],
        block_size=block_size or theirs["n_positions"], norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
        bias=True, dropout=dropout)
    if config.block_size > theirs["n_positions"]:
        raise UserError(f"block_size = {block_size}: {name} has learned only {theirs['n_positions']} positions")
    state = from_gpt2(read_weights(weight_files(folder)), config.block_size)
    model = build(GPT, config, state, device, name)
    if (folder / "tokenizer.json").exists() or name not in GPT2:
        return model, tokenizers.load(folder / "tokenizer.json")
    return model, tokenizers.GPT2Tokenizer()


def weight_files(folder):
    """The model's files: one, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def download(repo):
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(repo, allow_patterns=[
            "config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json"]))
    except errors.HFValidationError:
        raise UserError(f"init_from = {repo}: no folder of that name, and not a model's name on the hub") from None
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"init_from = {repo}: could not be downloaded ({reason});"
                        " with a copy on disk use --init_from=FOLDER") from None


def from_gpt2(theirs, block_size):
    """GPT-2's parameters under our names. Its linear layers are stored (in, out); q, k and v are one matrix."""
    renames = (("h.", "transformer.blocks."), ("ln_f.", "transformer.ln_f."), ("attn.c_proj.", "attn.o_proj."),
               ("mlp.c_fc.", "mlp.up_proj."), ("mlp.c_proj.", "mlp.down_proj."))
    state = {}
    for name, tensor in theirs.items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the head is the embedding; the rest is a stored causal mask
        tensor = tensor.float()
        if name.startswith("h.") and name.endswith("weight") and ".ln_" not in name:
            tensor = tensor.T
        if name == "wpe.weight":
            tensor = tensor[:block_size]
        for old, new in renames:
            if name.startswith(old) or f".{old}" in name:
                name = name.replace(old, new, 1)
        if ".c_attn." in name:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                state[name.replace("c_attn", part)] = piece
        else:
            state[name] = tensor
    return state
