"""Checkpoints: saved atomically, loaded strictly; and published GPT-2 and PaliGemma weights, converted at the door.

A checkpoint is a folder of its own, with all that sampling needs:

    model.safetensors    the weights, float32
    tokenizer.json       text to ids and back
    config.json          the model's shape, the run's settings, step and losses, where the data came from
    trainer.pt           what resuming needs besides (only in `last`); loads without running code
    SHA256SUMS           the checksums of these files, as `sha256sum -c SHA256SUMS` reads them

The `last` of a sharded run has folders instead, `model` and `optimizer`, in which each rank writes its part of every
tensor (torch.distributed.checkpoint). Any number of ranks reads them, and so does all that reads checkpoints. The parts
are safetensors, which hold nothing that could be executed: the other format that PyTorch has, its default, describes
the parts in a pickle. On several machines out_dir must be a folder that they share.

An out directory holds two: `last`, and `best` by validation loss. A save writes `last.new`, config.json at its end,
then renames `last` to `last.old` and `last.new` to `last`: at any instant `find` finds a complete checkpoint, and where
the files of `last` are damaged, the one before.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import safetensors
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import tokenizer as tokenizers
from configurator import UserError
from device import synchronize
from model import GPT, GPTConfig
from tokenizer import to_json, write_json, write_text
from vlm import (
    LOCATIONS,
    SEGMENTS,
    Gemma,
    GemmaConfig,
    PaliGemma,
    PaliGemmaConfig,
    SigLIP,
    SigLIPConfig,
    ViTConfig,
)

MODELS = {"gpt": (GPT, GPTConfig), "gemma": (Gemma, GemmaConfig), "siglip": (SigLIP, SigLIPConfig),
          "paligemma": (PaliGemma, PaliGemmaConfig)}
GPT2 = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


# ----------------------------------------------------------------------------------------------------------------------
# Our own

def save(out_dir, name, model, tokenizer, info, trainer=None):
    """Writes the checkpoint out_dir/name in one step, as seen from outside.

    info: plain values for config.json, beside the model's shape. trainer: tensors and plain values, or None.
    Raises UserError, with what was there before intact, if it can't be written.
    """
    write(out_dir, name, model.state_dict(), tokenizer, full_config(model, info), trainer)


def full_config(model, info):
    """What config.json says: `info`, the model's kind and shape, and the versions."""
    kind = next(kind for kind, (cls, _) in MODELS.items() if isinstance(model, cls))
    return {"model_type": kind, "model": dataclasses.asdict(model.config), **info, "versions": versions()}


def write(out_dir, name, state, tokenizer, config, trainer, group=None):
    """`save` of what is taken apart already. state: the model's tensors.

    group: the ranks among which state and trainer's optimizer are sharded: all of them call this.
    """
    final, new = Path(out_dir) / name, Path(out_dir) / f"{name}.new"
    is_main = group is None or dist.get_rank() == 0
    try:
        if is_main:
            settle(out_dir, name)
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        if group:
            trainer, moments = without_moments(trainer)
            write_shards(new / "model", state, group)
            write_shards(new / "optimizer", moments, group)
        else:
            state = {key: value.detach().contiguous().cpu() for key, value in state.items()}
            save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        if not is_main:
            return
        tokenizer.save(new / "tokenizer.json")
        if trainer is not None:
            with open(new / "trainer.pt", "wb") as file:
                torch.save(trainer, file)
        seal(new, config)
        put_in_place(final, new, keep_old=trainer is not None)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if is_main:
            shutil.rmtree(new, ignore_errors=True)  # a full disk needs the room
        raise UserError(f"{final} can't be written: {reason(error)}") from error


def without_moments(trainer):
    """(trainer without the sharded tensors of its optimizer, these tensors by parameter's number and name)."""
    optimizer, moments = trainer["optimizer"], {}
    rest = {number: dict(entry) for number, entry in optimizer["state"].items()}
    for number, entry in optimizer["state"].items():
        for name, value in entry.items():
            if is_sharded(value):
                moments[f"{number}.{name}"] = rest[number].pop(name)
    return trainer | {"optimizer": optimizer | {"state": rest}}, moments


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def write_shards(folder, state, group):
    """Each rank's parts of the tensors into a file of its own; returns when all are written."""
    import torch.distributed.checkpoint as dcp
    try:
        dist.barrier(group)  # the main rank has cleared the place
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True),
                 process_group=group)
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def read_shards(folder, like=None):
    """{name: tensor} of a folder of shards, however many; with `like`, in the layout of the tensor like(name)."""
    import torch.distributed.checkpoint as dcp
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        state = {name: torch.empty_like(like(name)) if like else torch.empty(found.size, dtype=found.properties.dtype)
                 for name, found in reader.read_metadata().state_dict_metadata.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each rank reads for itself
            dcp.load(state, storage_reader=reader, no_dist=True)
        return state
    except (dcp.api.CheckpointException, safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{folder} can't be read: {str(error).strip().splitlines()[-1]}") from None


def seal(folder, config):
    """Completes a checkpoint: checksums of all its files, all of it on the disk, and only then config.json."""
    text = to_json(config)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): digest(path) for path in paths}
    sums["config.json"] = hashlib.sha256(text.encode()).hexdigest()  # the last line, so that a missing end is noticed
    write_text(folder / "SHA256SUMS", "".join(f"{value}  {name}\n" for name, value in sums.items()))
    for path in paths:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    write_text(folder / "config.json", text)
    sync_folder(folder)


def put_in_place(final, new, keep_old=True):
    """Renames the complete checkpoint `new` to `final`, and what was there to final.old."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(new, final)
    sync_folder(final.parent)
    if not keep_old:
        shutil.rmtree(old, ignore_errors=True)


def settle(out_dir, name):
    """Does the second rename of a save that was killed between its two."""
    final, new = Path(out_dir) / name, Path(out_dir) / f"{name}.new"
    if is_complete(new) and not final.exists():
        os.rename(new, final)


def sync_folder(folder):
    """Has the names in a folder reach the disk; Windows has no way to ask for that."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def reason(error):
    """Why a write failed, in the system's words if they can be found: torch and safetensors bury them."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror + (f": {error.filename}" if error.filename else "")
        if match := re.search(r"os error (\d+)", str(error)):
            return os.strerror(int(match[1]))
        error = error.__context__
    return first


class Writer:
    """Saves a run's checkpoints, in the background if wanted: then the caller only waits for a copy in host memory.

    One save is written at a time, and the next one waits for it. What a write raises comes up in the next call or at
    the end of the `with` block, which waits for the last one. Errors that leave the block say what is kept.
    sharded: the model is, and all ranks save together; then `last` is written in shards, and `best` gathered.
    """

    def __init__(self, out_dir, background, sharded=False):
        self.out_dir, self.job, self.buffers = out_dir, None, {}
        self.group = dist.new_group(backend="gloo") if sharded else None  # the writing ranks talk apart from the loop
        self.pool = ThreadPoolExecutor(1) if background else None

    def save(self, names, model, tokenizer, info, trainer):
        """Writes the checkpoints `names` in this order, all of the same state; trainer goes into `last` alone."""
        self.wait()
        state, config = model.state_dict(), full_config(model, info)
        whole = gathered(state) if self.group and "best" in names else None
        if self.pool:
            state, trainer = host_copy((state, trainer), next(model.parameters()).device, self.buffers)
            self.job = self.pool.submit(self.write, names, state, whole, tokenizer, config, trainer)
        else:
            self.write(names, state, whole, tokenizer, config, trainer)

    def write(self, names, state, whole, tokenizer, config, trainer):
        for name in names:
            if name == "last":
                write(self.out_dir, name, state, tokenizer, config, trainer, self.group)
            elif not self.group or whole:
                write(self.out_dir, name, whole or state, tokenizer, config, None)

    def check(self):
        """Raises what a finished write raised."""
        if self.job and self.job.done():
            self.wait()

    def wait(self):
        job, self.job = self.job, None
        if job:
            job.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.wait()
        except UserError as late:
            error = error or late
        finally:
            if self.pool:
                self.pool.shutdown()
        if isinstance(error, UserError):
            raise UserError(f"{error}; {kept(self.out_dir)}") from error


def gathered(state):
    """The whole tensors of a sharded state, in memory of the main rank's host; {} on the others."""
    whole = {}
    for name, value in state.items():
        full = value.full_tensor()  # all ranks take part
        if dist.get_rank() == 0:
            whole[name] = full.cpu()
    return whole


def host_copy(tree, device, buffers):
    """A copy of all tensors in a nest of dicts, lists and tuples, in memory of the host.

    buffers: where the copies lie, an empty dict at first: memory that is used again costs a third of new memory.
    """
    def copy(value, path=()):
        if is_sharded(value):
            if path not in buffers:
                buffers[path] = value.detach().to("cpu", copy=True)
            buffers[path].to_local().copy_(value.detach().to_local())
            return buffers[path]
        if isinstance(value, torch.Tensor):
            pinned = value.device.type == "cuda"  # the copies of all tensors run while the host goes on
            if path not in buffers:
                buffers[path] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            return buffers[path].copy_(value.detach(), non_blocking=pinned)
        if isinstance(value, dict):
            return {key: copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(item, (*path, i)) for i, item in enumerate(value))
        return value

    result = copy(tree)
    synchronize(device)
    return result


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
            "platform": platform.platform()}


def is_complete(folder):
    return (folder / "config.json").is_file()


def present(out_dir, name):
    """The checkpoints of this name in out_dir, the one to prefer first. A save that is killed may leave all three.

    What was killed before it was complete is none; but what was put in place, and is not complete, is damaged.
    """
    folders = [Path(out_dir) / (name + suffix) for suffix in ("", ".new", ".old")]
    return [folder for folder in folders if is_complete(folder) or folder.name == name and folder.exists()]


def find(out_dir, name):
    """The folder of the checkpoint `name` in out_dir, or None. A damaged one is told of, and the one before taken.

    Raises UserError if there are only damaged ones.
    """
    return first_intact(present(out_dir, name))


def find_any(out_dir, preferred="best"):
    """The folder to sample or evaluate: `preferred`, or else the other of best and last, or out_dir itself.

    Raises UserError where there is no checkpoint, or only damaged ones.
    """
    out_dir = Path(out_dir)
    if (out_dir / "model.safetensors").is_file() or (out_dir / "model").is_dir():
        return out_dir
    names = sorted(("best", "last"), key=lambda name: name != preferred)
    if folder := first_intact([folder for name in names for folder in present(out_dir, name)], sampling=True):
        return folder
    raise UserError(f"there is no checkpoint in {out_dir}: train one first, python train.py"
                    f" config/shakespeare_char.py --out_dir={out_dir}")


def first_intact(folders, sampling=False):
    damaged = []
    for folder in folders:
        if not (found := damage(folder, sampling)):
            if damaged:
                tell(f"{'; '.join(damaged)}: using {folder} instead, of step {read_config(folder).get('step')}")
            return folder
        damaged.append(found)
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; there is no other checkpoint to use instead")
    return None


@functools.cache
def tell(line):
    """One line on stderr, once, and not from every rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def damage(folder, sampling=False):
    """What is wrong with a checkpoint's files, in words that name the first such file, or "".

    sampling: trainer.pt and the optimizer's shards do not matter. Without SHA256SUMS, as Quill's first checkpoints
    were, nothing is checked; those were never sharded.
    """
    path = folder / "SHA256SUMS"
    try:
        checked = path.exists() or (folder / "model").is_dir()
        lines = path.read_text(encoding="utf-8").splitlines() if checked else ["  config.json"]
        sums = {name: value for value, name in (line.split("  ", 1) for line in lines)}
        if "config.json" not in sums:
            raise ValueError("its end is missing")
        for name, value in sums.items():
            path = folder / name
            if not (sampling and name.startswith(("trainer.pt", "optimizer/"))) and digest(path) != value != "":
                raise ValueError("its checksum is not the one in SHA256SUMS")
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError) as error:
        return f"{path} is damaged ({getattr(error, 'strerror', error)})"
    return ""


def digest(path):
    """The SHA-256 of a file, computed anew only if the file has changed since."""
    found = os.stat(path)
    return cached_digest(str(path), found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1000)
def cached_digest(path, *_):
    found, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()


def kept(out_dir):
    """What a run that ends here leaves to go on from, in words."""
    for folder in present(out_dir, "last"):
        with contextlib.suppress(UserError):
            return f"{folder} holds step {read_config(folder)['step']}: python train.py --resume --out_dir={out_dir}" \
                   " replays what came after"
    return "nothing was saved yet"


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
    folder = Path(folder)
    if found := damage(folder, sampling=True):
        raise UserError(found)
    config = read_config(folder)
    if config.get("model_type") not in MODELS:
        raise UserError(f"{folder} is not a Quill checkpoint (model_type {config.get('model_type')!r}); for a published"
                        f" model use --init_from={folder}")
    cls, config_cls = MODELS[config["model_type"]]
    shape = config_cls(**{**config["model"], "dropout": dropout})
    shards, whole = folder / "model", folder / "model.safetensors"
    state = read_shards(shards) if shards.is_dir() else read_weights([whole])
    model = build(cls, shape, state, device, folder)
    return model, tokenizers.load(folder / "tokenizer.json"), config


def load_trainer(folder):
    """What `save` got as trainer. Nothing in the file is executed. Raises UserError if it is damaged."""
    if found := damage(Path(folder)):
        raise UserError(found)
    try:
        return torch.load(Path(folder) / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{Path(folder) / 'trainer.pt'} can't be read ({type(error).__name__});"
                        " to go on from the weights alone, start a new run") from None


def load_optimizer(optimizer, saved, folder):
    """Fills the optimizer with that of a checkpoint's trainer and shards; either of the two may be sharded or not.

    Raises ValueError if its parameters are others.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if [len(group["params"]) for group in saved["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        raise ValueError("other groups of parameters")
    state = {number: dict(entry) for number, entry in saved["state"].items()}
    for number, entry in state.items():
        if is_sharded(p := parameters[number]):
            entry |= {name: distribute(value, p) for name, value in entry.items() if value.shape == p.shape}
    if (shards := folder / "optimizer").is_dir():
        for name, value in read_shards(shards, lambda name: parameters[int(name.split(".")[0])]).items():
            number, _, name = name.partition(".")
            state[int(number)][name] = value
    optimizer.load_state_dict(saved | {"state": state})


def distribute(tensor, like):
    """This rank's part of a tensor that every rank has, laid out as `like` is."""
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


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
    # to_empty does the same, and imports sympy to do so
    return model.to(dtype)._apply(lambda p: torch.empty(p.shape, dtype=p.dtype, device=device))


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
    if any(present(name, which) for which in ("best", "last")) or (Path(name) / "trainer.pt").exists():
        model, tokenizer, _ = load(find_any(name), device, dropout)
        if block_size not in (0, model.config.block_size):
            raise UserError(f"block_size = {block_size}: the model of {name} has {model.config.block_size}")
        return model, tokenizer
    return load_published(name, device, block_size, dropout)


def load_published(name, device="cpu", block_size=0, dropout=0.0, dtype=torch.float32):
    """(model, tokenizer) of a published GPT-2 or PaliGemma: gpt2, gpt2-medium, -large, -xl, a hub id, or a folder.

    The folder has the published layout: config.json, model.safetensors or shards with their index, tokenizer.json.
    block_size: fewer positions than a GPT-2 has (0: all). dtype: of a PaliGemma's weights; a GPT-2's are float32.
    Raises UserError for anything else.
    """
    folder = Path(name) if Path(name).is_dir() else download(GPT2.get(name, name))
    theirs = read_config(folder)
    if theirs.get("model_type") == "paligemma":
        return load_paligemma(folder, name, device, dtype, dropout)
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


# ----------------------------------------------------------------------------------------------------------------------
# Published PaliGemma

# (ours, theirs), applied in this order; theirs is the layout of the files as first published
PALIGEMMA = (
    ("vision.patches.", "vision_tower.vision_model.embeddings.patch_embedding."),
    ("vision.wpe.", "vision_tower.vision_model.embeddings.position_embedding."),
    ("vision.transformer.ln_f.", "vision_tower.vision_model.post_layernorm."),
    ("vision.transformer.blocks.", "vision_tower.vision_model.encoder.layers."),
    ("projector.", "multi_modal_projector.linear."),
    ("decoder.wte.", "language_model.model.embed_tokens."),
    ("decoder.transformer.ln_f.", "language_model.model.norm."),
    ("decoder.transformer.blocks.", "language_model.model.layers."))
PALIGEMMA_BLOCKS = {
    "vision_tower.": ((".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".attn.o_proj.", ".attn.out_proj."),
                      (".attn.", ".self_attn."), (".up_proj.", ".fc1."), (".down_proj.", ".fc2.")),
    "language_model.": ((".ln_1.", ".input_layernorm."), (".ln_2.", ".post_attention_layernorm."),
                        (".attn.", ".self_attn."))}

MAPPED_BYTES = 2**25  # most of a file that is in memory at a time while its tensors are copied

# ours: (theirs, what a config.json without it means)
PALIGEMMA_SIZES = {
    "vision_config": {
        "n_layer": ("num_hidden_layers", 12), "n_head": ("num_attention_heads", 12), "n_embd": ("hidden_size", 768),
        "n_hidden": ("intermediate_size", 3072), "norm_eps": ("layer_norm_eps", 1e-6),
        "image_size": ("image_size", 224), "patch_size": ("patch_size", 16)},
    "text_config": {
        "n_layer": ("num_hidden_layers", 28), "n_head": ("num_attention_heads", 16), "n_embd": ("hidden_size", 3072),
        "n_kv_head": ("num_key_value_heads", 16), "head_dim": ("head_dim", 256),
        "n_hidden": ("intermediate_size", 24576), "norm_eps": ("rms_norm_eps", 1e-6),
        "vocab_size": ("vocab_size", 256000), "block_size": ("max_position_embeddings", 8192)}}


def load_paligemma(folder, name, device="cpu", dtype=torch.float32, dropout=0.0):
    """(model, tokenizer) of a PaliGemma 1 in a folder of the published layout; `name` is what errors call it.

    Raises UserError for a PaliGemma 2, for settings that Quill does not compute, and for weights that do not fit.
    """
    folder = Path(folder)
    config = paligemma_config(read_config(folder), name, dropout)
    model = unfilled(PaliGemma, config, device, dtype)
    copy_weights(model, weight_files(folder), name)
    return model.eval(), paligemma_tokenizer(folder, config.text.vocab_size)


def paligemma_config(theirs, name, dropout=0.0):
    """Our shape of a published config.json. Those are sparse: what they leave out has transformers' default."""
    vision, text = theirs.get("vision_config") or {}, theirs.get("text_config") or {}
    if text.get("model_type", "gemma") != "gemma":
        raise UserError(f"{name} is a PaliGemma 2 (its decoder is a {text['model_type']}), which Quill can't compute;"
                        " use a PaliGemma 1, such as google/paligemma-3b-pt-224")
    rope = {"rope_type": "default", "rope_theta": text.get("rope_theta", 10000.0)} | (text.get("rope_parameters") or {})
    tanh = "gelu_pytorch_tanh"  # Gemma's configurations call it gelu, too
    expected = {"text hidden_act": (text.get("hidden_act", tanh).replace("gelu_pytorch_tanh", "gelu"), "gelu"),
                "vision hidden_act": (vision.get("hidden_act", tanh), tanh),
                "attention_bias": (text.get("attention_bias", False), False),
                "rope_scaling": (text.get("rope_scaling"), None), "rope_type": (rope["rope_type"], "default"),
                "tie_word_embeddings": (theirs.get("tie_word_embeddings", True), True)}
    for key, (value, only) in expected.items():
        if value != only:
            raise UserError(f"{name}: {key} = {value!r}, but only {only!r} can be loaded")
    sizes = {section: {ours: (theirs.get(section) or {}).get(key, default) for ours, (key, default) in table.items()}
             for section, table in PALIGEMMA_SIZES.items()}
    return PaliGemmaConfig(ViTConfig(**sizes["vision_config"]),
                           GemmaConfig(**sizes["text_config"], rope_theta=rope["rope_theta"]), dropout)


def paligemma_tokenizer(folder, vocab_size):
    """The folder's tokenizer; <image>, <loc0000>.. and <seg000>.. are added to one that lacks them.

    Raises UserError if it has more tokens than the model.
    """
    bpe = tokenizers.load(folder / "tokenizer.json").bpe
    bpe.add_special_tokens(["<image>"])
    bpe.add_tokens(LOCATIONS + SEGMENTS)
    if bpe.get_vocab_size() > vocab_size:
        raise UserError(f"{folder / 'tokenizer.json'} has {bpe.get_vocab_size()} tokens, the model only {vocab_size}")
    return tokenizers.BPETokenizer(bpe)


def published_name(name):
    """The name of our PaliGemma's parameter in the published files."""
    for ours, theirs in PALIGEMMA:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    for part, renames in PALIGEMMA_BLOCKS.items():
        for ours, theirs in renames if name.startswith(part) else ():
            name = name.replace(ours, theirs)
    return name


def first_published_name(name):
    """The name that a parameter of any later layout had in the first; None for what PaliGemma does not use.

    The output head is the embedding. Layouts differ in where they say "model".
    """
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        name = "vision_tower.vision_model." + name.removeprefix("vision_tower.").removeprefix("vision_model.")
    elif name.startswith("language_model.") and not name.startswith("language_model.lm_head."):
        name = "language_model.model." + name.removeprefix("language_model.").removeprefix("model.")
    unused = ("lm_head.", "language_model.lm_head.", "vision_tower.vision_model.head.")
    return None if name.startswith(unused) else name


def copy_weights(model, paths, source):
    """Fills the model from published files, tensor by tensor, in the precision and on the device that it has.

    Raises UserError that names every parameter that is missing, unexpected or of another shape.
    """
    wanted = {published_name(name): parameter for name, parameter in model.state_dict().items()}
    missing, unexpected, reshaped = set(wanted), [], []
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            for theirs, shape in shapes.items():
                name = first_published_name(theirs)
                missing.discard(name)
                if name and name not in wanted:
                    unexpected.append(theirs)
                elif name and shape != [*wanted[name].shape]:
                    reshaped.append(f"{theirs} {shape} instead of {[*wanted[name].shape]}")
                elif name:
                    copy_tensor(path, theirs, wanted[name])
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be read: {error}") from None
    if missing or unexpected or reshaped:
        raise UserError(f"the weights of {source} do not fit: missing {sorted(missing)}, unexpected"
                        f" {sorted(unexpected)}, of another shape {sorted(reshaped)}")


def copy_tensor(path, name, target):
    """Copies one tensor of a file in pieces of rows, each mapped into memory anew: what was read does not pile up."""
    rows = max(1, MAPPED_BYTES // target[0].nbytes)
    for start in range(0, len(target), rows):
        with safe_open(path, "pt") as file:
            target[start:start + rows].copy_(file.get_slice(name)[start:start + rows])


def save_published(model, tokenizer, folder, shard_size=5 * 10**9):
    """Writes a PaliGemma into `folder` as it is published, in the precision that it has, for transformers to load.

    AutoProcessor.from_pretrained(folder) prepares images and prompts as vlm.py does.
    shard_size: most bytes of one file of weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, sizes = [{}], [0]
    for name, tensor in model.state_dict().items():
        if shards[-1] and sizes[-1] + tensor.nbytes > shard_size:
            shards.append({})
            sizes.append(0)
        shards[-1][published_name(name)] = tensor
        sizes[-1] += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensor.contiguous().cpu() for name, tensor in shard.items()}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", published_tokenizer_config(tokenizer))
    write_json(folder / "preprocessor_config.json", published_preprocessor_config(model.config.vision))
    write_json(folder / "config.json", published_config(model, tokenizer))


def published_tokenizer_config(tokenizer):
    """The tokenizer_config.json: tokenizer.json as it is, of the usual special tokens those that it has."""
    special = {name: f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"} | {
        f"{name}_token": token for name, token in special.items() if tokenizer.bpe.token_to_id(token) is not None}


def published_preprocessor_config(vision):
    """The preprocessor_config.json: `vlm.pixels` in transformers' words."""
    return {"processor_class": "PaliGemmaProcessor", "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": vision.n_patches, "size": {"height": vision.image_size, "width": vision.image_size},
            "resample": 3, "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True,
            "rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def published_config(model, tokenizer):
    """The config.json of a PaliGemma, with every size spelt out."""
    vision, text, width = model.config.vision, model.config.text, model.config.text.n_embd
    vision = dataclasses.replace(vision, n_hidden=vision.n_hidden or 4 * vision.n_embd)
    text = dataclasses.replace(text, n_hidden=text.n_hidden or 4 * width, n_kv_head=text.n_kv_head or text.n_head,
                               head_dim=text.head_dim or width // text.n_head)
    sections = {section: {key: getattr(part, ours) for ours, (key, _) in PALIGEMMA_SIZES[section].items()}
                for section, part in (("vision_config", vision), ("text_config", text))}
    sections["vision_config"] |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    sections["text_config"] |= {"model_type": "gemma", "rope_theta": text.rope_theta}
    ids = {f"{name}_token_id": tokenizer.bpe.token_to_id(f"<{name}>") for name in ("bos", "eos", "pad")}
    return {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", **ids,
            "image_token_index": tokenizer.bpe.token_to_id("<image>"), "hidden_size": width, "projection_dim": width,
            "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."), **sections}
