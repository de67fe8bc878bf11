"""Loads and saves published weights. The names that others gave to tensors and settings occur only here."""

import contextlib
import json
import os
import re

from configurator import UserError

GPT2 = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}  # on the hub

# The files of a published model. A checkpoint has others too.
PUBLISHED = (r"(generation_|tokenizer_|preprocessor_)?config\.json|tokenizer\.json|chat_template\.jinja|"
             r"model\b.*\.(safetensors|index\.json)")


def check_publish(folder, out_dir="", init_from="", setting="publish"):
    """Raises UserError unless the folder is "", missing or empty, or holds only a published model, to be replaced.

    It must not be a folder that the run in out_dir, or its init_from, needs either. setting: the one that names the
    folder, for messages.
    """
    if not folder:
        return
    path = os.path.realpath(folder)
    inside = os.path.relpath(path, os.path.realpath(out_dir)) if out_dir else ""
    needed = [os.path.realpath(each) for each in [out_dir] * bool(out_dir) + [init_from] * os.path.exists(init_from)]
    # The pattern: what a run has in its folder, which is checkpoints, files and earlier runs.
    inner = r"best|last|reference|reward|[^/.]+\."
    if re.match(inner, inside) or any(f"{each}/".startswith(f"{path}/") for each in needed):
        raise UserError(f"{setting} = {folder}: the run in {out_dir} needs that folder; name another")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"{setting} = {folder}: is not a folder; name a new one")
    above = os.path.dirname(path)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK) or os.path.ismount(path):  # it will be renamed
        raise UserError(f"{setting} = {folder}: no folder can be made or replaced there; name another")
    for beside in (f"{path}.unfinished", f"{path}.replaced"):  # a killed save may have left them
        if os.path.lexists(beside) and (not os.path.isdir(beside) or others(beside)):
            raise UserError(f"{setting} = {folder}: needs the name {beside} for a while; rename what is there")
    names, config = os.listdir(path) if os.path.isdir(path) else [], None
    with contextlib.suppress(OSError, ValueError, RecursionError), \
            open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    if names and (others(path) or not (isinstance(config, dict) and "architectures" in config)):  # ours lacks it
        strange = (others(path) or sorted(names))[0]
        raise UserError(f"{setting} = {folder}: holds {strange}, so it is not just a published model, which could be"
                        " replaced; name a new folder")


def others(folder):
    """The names in a folder that no published model has, sorted. A killed save leaves names that end in .new."""
    return [name for name in sorted(os.listdir(folder)) if not re.fullmatch(PUBLISHED, name.removesuffix(".new"))]


def download(name, files, setting):
    """The local folder of a model on the Hugging Face hub, with those of its files that fit the patterns `files`.

    setting: the one that names the model, for messages. Raises UserError if there is no such model, or no network.
    """
    from huggingface_hub import errors, snapshot_download
    try:
        return snapshot_download(GPT2.get(name, name), allow_patterns=files)
    except errors.HFValidationError:
        raise UserError(f"{setting} = {name}: no folder of that name, and not a model's name on the hub") from None
    except (OSError, errors.HfHubHTTPError) as error:
        offline = isinstance(error, errors.LocalEntryNotFoundError)
        reason = "the hub can't be reached" if offline else str(error).strip().partition("\n")[0]
        raise UserError(f"{setting} = {name}: no folder of that name, and it could not be downloaded ({reason}); with a"
                        f" copy on disk use --{setting}=FOLDER") from None
