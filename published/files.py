"""Published models: found on the disk or the hub, and loaded strictly.

    python sample.py --init_from=gpt2 --prompt="Once upon"

A published folder holds config.json, tokenizer.json and model.safetensors, or shards and their index. The module of a
family of models has MODEL, our class, and to_config, load_tokenizer, first_name (of a tensor: in the layout that was
published first, or None if it is unused) and source (of our parameter, in that layout).
"""

import importlib
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors import safe_open

from configurator import UserError
from run.checkpoint import read_config, read_json, unfilled

FAMILIES = {"gpt2": "published.gpt2", "paligemma": "published.paligemma"}  # by the model_type in config.json
GPT2 = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
MAPPED_BYTES = 2**25  # most of a file that is in memory at a time while its tensors are copied


class Source(NamedTuple):
    """Where the values of our parameter are: rows first, first + 1, ... of a tensor."""
    name: str
    first: int = 0
    rows: int = 0  # of the whole tensor; 0: as many as ours
    turned: bool = False  # True if the tensor is stored as (in, out)


def load(name, device="cpu", dtype=torch.float32, block_size=0, dropout=0.0):
    """(model in eval mode, {"tokenizer": its tokenizer}) of a published model.

    name: gpt2, gpt2-medium, -large, -xl, a hub id, or a folder. block_size: fewer positions than a GPT-2 has (0: all).
    Raises UserError for a model that Quill can't compute, and for weights or a tokenizer that do not fit.
    """
    folder = locate(name)
    theirs = read_config(folder)
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{name}: model_type = {kind!r}, but only {' and '.join(FAMILIES)} can be loaded")
    family = importlib.import_module(FAMILIES[kind])
    config = family.to_config(theirs, name, block_size, dropout)
    tokenizer = family.load_tokenizer(folder, name)
    vocab_size = getattr(config, "text", config).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, the model only {vocab_size}")
    model = unfilled(family.MODEL, config, device, dtype)
    sources = {ours: family.source(ours, theirs) for ours in model.state_dict()}
    copy_weights(model, sources, weight_files(folder), family.first_name, name)
    return model.eval(), {"tokenizer": tokenizer}


def locate(name):
    """The folder of that name, or a download of the model of that name from the hub. Raises UserError without one."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(GPT2.get(name, name), allow_patterns=[
            "config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json"]))
    except errors.HFValidationError:
        raise UserError(f"init_from = {name}: no folder of that name, and not a model's name on the hub") from None
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"init_from = {name}: could not be downloaded ({reason});"
                        " with a copy on disk use --init_from=FOLDER") from None


def weight_files(folder):
    """The model's files: one, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def copy_weights(model, sources, paths, first_name, name):
    """Fills the model from published files, tensor by tensor, in the precision and on the device that it has.

    sources: {parameter of the model: its Source}. Raises UserError that names every tensor that is missing, unexpected
    or of another shape, under its published name.
    """
    wanted, unexpected, reshaped = {}, [], []  # wanted: {published name: [(Source, parameter)]}
    for ours, parameter in model.state_dict().items():
        wanted.setdefault(sources[ours].name, []).append((sources[ours], parameter))
    missing = set(wanted)
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                shapes = {theirs: file.get_slice(theirs).get_shape() for theirs in file.keys()}
            for theirs, shape in shapes.items():
                first = first_name(theirs)
                missing.discard(first)
                if first and first not in wanted:
                    unexpected.append(theirs)
                for source, parameter in wanted.get(first, ()):
                    expected = [source.rows or len(parameter), *parameter.shape[1:]]
                    expected = expected[::-1] if source.turned else expected
                    if shape == expected:
                        copy_tensor(path, theirs, source, parameter)
                    else:
                        reshaped.append(f"{theirs} {shape} instead of {expected}")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be read: {error}") from None
    if missing or unexpected or reshaped:
        raise UserError(f"the weights of {name} do not fit: missing {sorted(missing)}, unexpected"
                        f" {sorted(unexpected)}, of another shape {sorted(reshaped)}")


def copy_tensor(path, name, source, target):
    """Copies a tensor of a file in pieces of rows. Each is mapped into memory anew: what was read does not pile up."""
    rows = max(1, MAPPED_BYTES // target[0].nbytes)
    for start in range(0, len(target), rows):
        piece = target[start:start + rows]
        first = source.first + start
        with safe_open(path, "pt") as file:
            stored = file.get_slice(name)
            if source.turned:
                piece.copy_(stored[:, first:first + len(piece)].T)
            else:
                piece.copy_(stored[first:first + len(piece)])
