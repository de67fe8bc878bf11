"""Loads and saves published models. A missing or unexpected tensor is an error.

    python sample.py --init_from=gpt2 --prompt="Once upon"

A published folder holds config.json, tokenizer.json, and model.safetensors (or pytorch_model.bin) or its shards, with
their index. gpt2.py, llama.py, paligemma.py, bert.py and vit.py each have MODEL (from our config to the model),
to_config and, for models that read text, load_tokenizer.
Published files differ in how they name tensors. first_name gives the name in the layout that came first (None: unused);
source finds our parameter in it. bert.py and vit.py have choose, too: the tensors tell which model they make.
"""

import importlib
import math
import os
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configurator import UserError, say
from critic import Critic, as_kind
from encoder import Answerer, MaskedLM, SentenceEncoder
from machine.decode import KNOWN
from machine.digest import code_of
from model import GPT, Block
from published import check_publish, download
from run.checkpoint import clear, fill, read_config, unfilled
from run.files import read_json, reason, rename, write_json
from tokenizer import Tokenizer, find
from vit import ImageClassifier
from vlm import Gemma, PaliGemma

# {file of the weights: pattern of it, its shards and their index}. The first that exists; loading either runs no code.
WEIGHTS = {"model.safetensors": "model*.safetensors*", "pytorch_model.bin": "pytorch_model*.bin*"}
FAMILIES = {  # by the model_type in config.json
    "gpt2": "published.gpt2", **dict.fromkeys(("llama", "mistral", "qwen2", "gemma"), "published.llama"),
    "paligemma": "published.paligemma", "bert": "published.bert", "vit": "published.vit"}
HEAD = "lm_head.weight"  # the output head in every first layout; a tied model has none
LAYOUTS = {GPT: ("gpt2", "llama"), Gemma: ("llama",), PaliGemma: ("paligemma",), MaskedLM: ("bert",),
           SentenceEncoder: ("bert",), Answerer: ("bert",), ImageClassifier: ("vit",),
           Critic: ("gpt2", "llama")}  # that may hold a class of ours

BLOCK = {"ln_1", "ln_2", *(f"attn.{part}_proj" for part in "qkvo"), "mlp.up_proj", "mlp.down_proj"}  # in all layouts
FITS = {  # {what a value of config.json must be: whether it is}
    "a whole number from 1 to 2^31 - 1": lambda value: type(value) is int and 0 < value < 2**31,
    "a finite number above 0": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "true or false": lambda value: type(value) is bool}
SIZE, NUMBER, FLAG = FITS
KINDS = {"norm_eps": NUMBER, "tied": FLAG}  # of fields of ours that are no SIZE


class Source(NamedTuple):
    """Which published tensor, or which rows of it, hold one parameter of ours."""
    name: str  # of the tensor, in the first layout
    turned: bool = False  # True if it is stored as (in, out), the transpose of ours
    rows: int = 0  # of the tensor (once it is turned), if ours is only a slice of it
    first: int = 0  # row of that slice


def load(name, device="cpu", dtype=torch.float32, block_size=0, dropout=0.0):
    """(model in eval mode, {"tokenizer": its tokenizer}) of a published model; {} for one of images alone.

    name: gpt2, gpt2-medium, -large, -xl, a hub id, or a folder. block_size: how many positions a model of text keeps;
    0: all; None: as many as a window of training should have. Raises UserError for a model that Quill can't compute,
    and for weights or a tokenizer that do not fit.
    """
    folder = locate(name)
    theirs = read_config(folder)
    kind = theirs.get("model_type") if isinstance(theirs, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{name}: model_type = {kind!r}, but only {', '.join(FAMILIES)} can be loaded")
    family, tokenizer_file = importlib.import_module(FAMILIES[kind]), find(folder)
    reads_text = hasattr(family, "load_tokenizer")
    if reads_text and tokenizer_file is None:
        raise UserError(f"{name} has no tokenizer.json: transformers writes it, in Python:"
                        f" AutoTokenizer.from_pretrained({str(name)!r}).save_pretrained({str(folder)!r})")
    try:
        config = family.to_config(theirs, name, block_size, dropout)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} can't be used: {type(error).__name__}: {error}") from None
    tokenizers = {"tokenizer": family.load_tokenizer(tokenizer_file)} if reads_text else {}
    for tokenizer in tokenizers.values():
        vocab_size = getattr(config, "text", config).vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise UserError(f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, the model only {vocab_size}")
    stored = read_tensors(folder, family)
    if hasattr(family, "choose"):
        config = family.choose(config, theirs, stored, name)
    model = unfilled(family.MODEL, config, device, dtype)
    fill(model, arrange(stored, model, family, theirs, folder), name)
    return model, tokenizers


def require(values, kinds, name):
    """Raises UserError for the first value that is not of its kind, or missing. kinds: {key: SIZE, NUMBER or FLAG}."""
    for key, kind in kinds.items():
        if not FITS[kind](values.get(key)):
            raise UserError(f"{name}: {key} = {values.get(key)!r:.60}, but it must be {kind}")


def locate(name):
    """The path of folder `name`, or of the hub's model, downloaded if needed. Raises UserError if there is neither."""
    if Path(name).is_dir():
        return Path(name)
    new, old = (Path(f"{Path(name)}{ending}") for ending in (".unfinished", ".replaced"))  # see `save`
    if new.is_dir() and old.is_dir():
        raise UserError(f"{name} was being replaced when its program was killed: {new} is the new model, {old} the old"
                        f" one, both complete; rename one of them to {name}")
    for weights in WEIGHTS.values():
        files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
                 "chat_template.jinja", "preprocessor_config.json"]
        folder = Path(download(name, [*files, weights], "init_from"))
        if any(folder.glob(weights)):
            break
    return folder


def weight_files(folder):
    """The paths of the weights: one file, or the files that an index names. Raises UserError if there is neither."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                return [folder / part for part in sorted(set(read_json(index)["weight_map"].values()))]
            except (AttributeError, KeyError, TypeError):
                raise UserError(f"{index} is damaged: it has no weight_map from tensors to files") from None
    raise UserError(f"{folder} has no weights: {' or '.join(WEIGHTS)}, or the .index.json that names its shards")


def read_tensors(folder, family):
    """{name in the first layout: (name in the file, tensor)} of a folder. family: gpt2.py, ...

    Safetensors are memory-mapped. Raises UserError for unreadable files, and for a tensor that occurs twice.
    """
    stored = {}
    for path in weight_files(folder):
        try:
            safe = path.suffix == ".safetensors"
            tensors = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} can't be read: {error}") from None
        except (RuntimeError, UnpicklingError):
            raise UserError(f"{path} is damaged, or holds more than tensors") from None
        for key, tensor in tensors.items():
            first = family.first_name(key)
            if first in stored:
                raise UserError(f"{path} has {key}, but {stored[first][0]} was the same tensor: take one of them out")
            if first is not None:
                stored[first] = key, tensor
    return stored


def arrange(stored, model, family, theirs, folder):
    """A state dict for the model. stored: from `read_tensors`. theirs: content of config.json. folder: for messages.

    It also holds tensors that the model does not know, under their names in the file: `fill` then raises an error.
    Raises UserError for an output head that a tied model has no place for.
    """
    parameters = model.state_dict()
    sources = {ours: family.source(ours, theirs) for ours in parameters}
    wanted = {source.name for source in sources.values()}
    if HEAD in stored and HEAD not in wanted:
        name = next(source.name for ours, source in sources.items() if ours.endswith("wte.weight"))
        key, head = stored.pop(HEAD)
        _, embedding = stored.get(name, (name, head))  # `fill` names a missing one
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise UserError(f"{folder}: tie_word_embeddings is on, but {key} is not the embedding: turn it off in"
                            " config.json, or take the tensor out of the file")
    state = {key: tensor for first, (key, tensor) in stored.items() if first not in wanted}
    for ours, (name, turned, rows, first) in sources.items():
        if name in stored:
            _, tensor = stored[name]
            tensor = tensor.T if turned else tensor
            state[ours] = tensor[first:first + len(parameters[ours])] if len(tensor) == rows else tensor
    return state


# ----------------------------------------------------------------------------------------------------------------------
# Saving

def layout(model, tokenizer):
    """The module of the first layout that can hold the model. Raises UserError that says why no layout can.

    tokenizer: None of a model of images alone.
    """
    if type(model) not in LAYOUTS:
        known = ", ".join(cls.__name__ for cls in LAYOUTS)
        raise UserError(f"no published layout holds the model {type(model).__name__}, only {known}")
    if tokenizer and type(tokenizer).as_library is Tokenizer.as_library:
        tokenizer.as_library()  # raises
    reasons = []
    for name in LAYOUTS[type(model)]:
        family = importlib.import_module(f"published.{name}")
        found = family.misfit(model.config) if hasattr(family, "misfit") else ""
        if not found:
            if odd := sorted(odd_parts(model)):
                raise UserError(f"the model {type(model).__name__} was edited, so it can't be published: no layout has"
                                f" one {odd[0]}")
            if edited := [name for name, code in code_of(model).items() if KNOWN.get(name, code) != code]:
                say(f"the code of {', '.join(sorted(edited))} was edited: other programs compute what it was before")
            if hasattr(family, "library"):
                family.library(tokenizer, model)  # raises
            return family
        reasons.append(f"the layout of {name} can't hold {found}")
    remedy = getattr(family, "REMEDY", "the settings of config/shakespeare_char.py or config/shakespeare_llama.py")
    raise UserError(f"the {type(model).__name__} can't be published: {'; '.join(reasons)}. Train one with {remedy}")


def odd_parts(model):
    """Yields "with NAME" for each part with weights that no layout has, and "without NAME" for what a block lacks."""
    for name, module in model.named_modules():
        parts = {re.sub(r"\.(weight|bias|lora_[ab])$", "", key) for key in module.state_dict()}
        if isinstance(module, Block):
            yield from (f"with{'out' * (part in BLOCK)} {name}.{part}" for part in parts - {"mlp.gate_proj"} ^ BLOCK)
        elif type(module) in (GPT, Gemma):
            own = {part for part in parts if ".blocks." not in part} - {"wte", "wpe", "head", "transformer.ln_f"}
            yield from (f"with {part}" for part in own)


def save(model, tokenizer, folder, shard_size=5 * 10**9):
    """Writes a model in the layout that holds it, in its own dtype. transformers can load it, and so can `load`.

    Returns the model_type. All is written to FOLDER.unfinished, which is then renamed. What was in the folder is
    FOLDER.replaced until then, and is deleted after that. shard_size: most bytes per weight file. Raises UserError for
    a model that no layout holds, for a folder with anything but a published model, and if a file can't be written.
    """
    check_publish(folder)
    if type(model) is Critic:  # its score is for training alone
        model = as_kind(GPT, model)
    family, folder = layout(model, tokenizer), Path(folder).resolve()
    new, old = (folder.with_name(folder.name + ending) for ending in (".unfinished", ".replaced"))
    try:
        clear(new)
        new.mkdir(parents=True)
        if hasattr(family, "save"):
            family.save(model, tokenizer, new, shard_size)
        else:
            write(family, model, tokenizer, new, shard_size)
        for path in new.iterdir():
            path.chmod((new / "config.json").stat().st_mode)  # safetensors' files are readable by their owner only
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            clear(old)
            rename(folder, old)
        rename(new, folder)
        clear(old)
        return read_config(folder)["model_type"]
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)  # frees space on a full disk
        raise UserError(f"{folder} can't be written: {reason(error)}") from error


def write(family, model, tokenizer, folder, shard_size):
    """Writes the files of a language model into `folder`, without a chat template. family: gpt2.py or llama.py."""
    from huggingface_hub import save_torch_state_dict
    config, state = family.to_published(model)
    context = model.config.context or model.config.block_size
    library, eos = tokenizer.as_library(), tokenizer.eos
    begin, ends = (list(getattr(tokenizer, name, ())) for name in ("start", "ends"))
    ids = {"bos": begin[0] if begin else eos, "eos": eos, **getattr(tokenizer, "roles", {})}
    names = {f"{name}_token": library.id_to_token(token) for name, token in ids.items() if token is not None}
    # None is written too: without it, transformers takes GPT-2's 50256.
    numbers = {f"{name}_token_id": token for name, token in ids.items()}
    numbers["eos_token_id"] = ends if len(ends) > 1 else eos
    save_torch_state_dict(state, folder, max_shard_size=shard_size)
    library.save(str(folder / "tokenizer.json"))
    tokenizer.save_template(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json",
               {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "model_max_length": context, **names})
    # A GPT-2 stops with an error at its last position, and programs often ask for 256 new tokens without being told.
    limit = {"max_length": context} if context <= 512 else {}
    write_json(folder / "generation_config.json", {**numbers, **limit})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**config, **numbers, "torch_dtype": dtype})
