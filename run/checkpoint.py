"""Checkpoints: saved atomically, checked and loaded strictly.

    with Writer(out_dir, background=True) as writer:
        writer.save(["best", "last"], model, {"tokenizer": tokenizer}, config, trainer)
    saved = load(find_any(out_dir))

A checkpoint is a folder with all that sampling needs:

    model.safetensors    the weights, float32
    tokenizer.json       text to ids and back; a model with several tokenizers has more files, tokenizer_NAME.json
    config.json          the model's shape, the run's settings, step and losses, where the data came from
    trainer.pt           what resuming needs besides (only in `last`); loads without running code
    SHA256SUMS           the checksums of these files, as `sha256sum -c SHA256SUMS` reads them

The `last` of a sharded run has the folders `model` and `optimizer` instead (run/shards.py). If such a run is on several
machines, they must share out_dir.

An out directory holds two checkpoints: `last`, and `best` by validation. A save writes `last.new`, config.json at the
end, then renames `last` to `last.old` and `last.new` to `last`. So `find` finds a complete checkpoint at any instant,
and if the files of `last` are damaged, it finds the one before.
"""

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy
import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_with_path

import tokenizer as tokenizers
from configurator import UserError
from machine.device import synchronize
from run import shards
from run.files import sync_folder, to_json, write_text
from run.shards import is_sharded


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
            "platform": platform.platform()}


# ----------------------------------------------------------------------------------------------------------------------
# Saving

class Writer:
    """Saves a run's checkpoints, in the background if wanted: the caller then waits for a copy in host memory only.

    A save waits for the one before. If a write fails, its UserError comes up in the next call or at the end of the
    `with` block, which waits for the last write. A UserError that leaves the block says which checkpoint is kept.
    sharded: the model is, and all ranks save together; they write `last` in shards, and the main rank `best` whole.
    """

    def __init__(self, out_dir, background, sharded=False):
        self.out_dir, self.job, self.buffers = out_dir, None, {}
        self.pool = ThreadPoolExecutor(1) if background else None
        self.group = dist.new_group(backend="gloo") if sharded else None  # the loop's messages go through another

    def save(self, names, model, tokenizers, config, trainer):
        """Writes the checkpoints `names` in this order, all of the same state.

        tokenizers: by name; each name begins with "tokenizer". config: plain values for config.json.
        trainer: tensors and plain values for trainer.pt, which only `last` gets.
        """
        assert all(name.startswith("tokenizer") for name in tokenizers)
        self.wait()
        state = model.state_dict()
        whole = shards.gathered(state) if self.group and "best" in names else None
        if self.pool:
            state, trainer = host_copy((state, trainer), next(model.parameters()).device, self.buffers)

        def work():
            for name in names:
                if name == "last":
                    write(self.out_dir, name, state, tokenizers, config, trainer, self.group)
                elif not self.group or whole:  # only the main rank has the whole of a sharded model
                    write(self.out_dir, name, whole or state, tokenizers, config, None)

        if self.pool:
            self.job = self.pool.submit(work)
        else:
            work()

    def raise_pending(self):
        """Raises the error of a finished write."""
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


def write(out_dir, name, state, tokenizers, config, trainer, group=None):
    """Writes the checkpoint out_dir/name. Whoever looks finds the old one or the new one, complete.

    state: the model's tensors. trainer: None if there is to be no trainer.pt; then the old one is not kept either.
    group: the ranks that share the tensors of state and of trainer's optimizer; all of them call this.
    Raises UserError if it can't be written; then the old one stays.
    """
    final, new, old = (Path(out_dir) / (name + suffix) for suffix in ("", ".new", ".old"))
    is_main = group is None or dist.get_rank() == 0
    try:
        if is_main:
            settle(out_dir, name)
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        if group:
            trainer, moments = shards.without_moments(trainer)
            shards.write(new / "model", state, group)
            shards.write(new / "optimizer", moments, group)
        else:
            state = {key: value.detach().contiguous().cpu() for key, value in state.items()}
            save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        if not is_main:
            return
        for key, tokenizer in tokenizers.items():
            tokenizer.save(new / f"{key}.json")
        if trainer is not None:
            with open(new / "trainer.pt", "wb") as file:
                torch.save(trainer, file)
        seal(new, config)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        settle(out_dir, name)
        if trainer is None:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if is_main:
            shutil.rmtree(new, ignore_errors=True)  # a full disk needs the room
        raise UserError(f"{final} can't be written: {reason(error)}") from error


def seal(folder, config):
    """Completes a checkpoint: has its files reach the disk, adds their checksums, and config.json as the very last."""
    text, sums = to_json(config), {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sums[path.relative_to(folder).as_posix()] = digest(path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sums["config.json"] = hashlib.sha256(text.encode()).hexdigest()  # the last line: it shows that none is missing
    write_text(folder / "SHA256SUMS", "".join(f"{value}  {name}\n" for name, value in sums.items()))
    sync_folder(folder)
    write_text(folder / "config.json", text)
    sync_folder(folder)


def settle(out_dir, name):
    """Renames a complete name.new to `name` if that is free: the end of every save, also of one that was killed."""
    final, new = Path(out_dir) / name, Path(out_dir) / f"{name}.new"
    if (new / "config.json").is_file() and not final.exists():
        os.rename(new, final)
        sync_folder(final.parent)


def reason(error):
    """Why a write failed, in the system's words if they can be found: torch and safetensors bury them."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror + (f": {error.filename}" if error.filename else "")
        if match := re.search(r"os error (\d+)", str(error)):
            return os.strerror(int(match[1]))
        error = error.__context__
    return first


def host_copy(tree, device, buffers):
    """A copy, in host memory, of all tensors in a nest of dicts, lists and tuples.

    buffers: holds the copies, an empty dict at first. Reusing memory takes a third of the time of allocating it.
    """
    def copy(path, value):
        if not isinstance(value, torch.Tensor):
            return value
        source = value.detach()
        if path not in buffers and is_sharded(source):
            buffers[path] = source.to("cpu", copy=True)
        elif path not in buffers:  # copies into pinned memory run while the host goes on
            buffers[path] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.device.type == "cuda")
        if is_sharded(source):
            buffers[path].to_local().copy_(source.to_local())
        else:
            buffers[path].copy_(source, non_blocking=True)
        return buffers[path]

    result = tree_map_with_path(copy, tree)
    synchronize(device)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Finding

def is_run(path):
    """True for the folder of a run that has saved, and for a checkpoint's own folder, whatever its name."""
    return bool(candidates(path, ("best", "last")))


def find_any(out_dir, preferred="best"):
    """The folder to sample or evaluate: `preferred`, or else the other of best and last; out_dir itself if it is one.

    Raises UserError if there is no checkpoint, or only damaged ones.
    """
    names = sorted(("best", "last"), key=lambda name: name != preferred)
    if folder := first_intact(candidates(out_dir, names), sampling=True):
        return folder
    raise UserError(f"there is no checkpoint in {out_dir}: train one first, python train.py"
                    f" config/shakespeare_char.py --out_dir={out_dir}, or name a published model with --init_from")


def find(out_dir, name):
    """The folder of the checkpoint `name`, or None. Raises UserError if there are only damaged ones."""
    return first_intact(present(out_dir, name))


def candidates(path, names):
    """[path] if it is a checkpoint's folder, else the checkpoints of these names in it, the one to prefer first."""
    path = Path(path)
    weights = path / "model.safetensors", path / "model"
    if (path / "SHA256SUMS").is_file() and any(place.exists() for place in weights):
        return [path]
    return [folder for name in names for folder in present(path, name)]


def present(out_dir, name):
    """The checkpoints of this name in out_dir, the one to prefer first. A save that is killed may leave all three.

    A folder without config.json is an unfinished save and not listed, unless it has the final name: then it is damaged.
    """
    folders = [Path(out_dir) / (name + suffix) for suffix in ("", ".new", ".old")]
    return [folder for folder in folders
            if (folder / "config.json").is_file() or folder.name == name and folder.exists()]


def first_intact(folders, sampling=False):
    """The first of the checkpoints without damage; a line on stderr names the damage of those before it.

    Returns None for an empty list. Raises UserError if all are damaged. sampling: as in `damage`.
    """
    damaged = []
    for folder in folders:
        found = damage(folder, sampling)
        if not found:
            if damaged and os.environ.get("RANK", "0") == "0":
                print(f"{'; '.join(damaged)}: using {folder} instead, of step {read_config(folder).get('step')}",
                      file=sys.stderr, flush=True)
            return folder
        damaged.append(found)
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; there is no other checkpoint to use instead")
    return None


def damage(folder, sampling=False):
    """What is wrong with a checkpoint's files, in words that name the first bad file; "" if nothing is.

    sampling: trainer.pt and the optimizer's shards may be missing or damaged.
    """
    path = folder / "SHA256SUMS"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        sums = {name: value for value, name in (line.split("  ", 1) for line in lines)}
        if "config.json" not in sums:
            raise ValueError("its end is missing")
        for name, value in sums.items():
            path = folder / name
            needed = not (sampling and name.startswith(("trainer.pt", "optimizer/")))
            if needed and digest(path) != value:
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
    """In words, what a run that ends here leaves to go on from."""
    for folder in present(out_dir, "last"):
        with suppress(UserError):
            return f"{folder} holds step {read_config(folder)['step']}: python train.py --resume --out_dir={out_dir}" \
                   " replays what came after"
    return "nothing was saved yet"


# ----------------------------------------------------------------------------------------------------------------------
# Loading

class Saved(NamedTuple):
    folder: Path
    config: dict  # config.json
    state: dict  # the model's tensors by name, float32
    tokenizers: dict  # by name


def load(folder):
    """The Saved of a checkpoint's folder. Raises UserError if its files are damaged, or if it is no checkpoint."""
    folder = Path(folder)
    if found := damage(folder, sampling=True):
        raise UserError(found)
    whole = folder / "model.safetensors"
    state = load_file(whole) if whole.exists() else shards.read(folder / "model")
    paths = sorted(folder.glob("tokenizer*.json"))
    return Saved(folder, read_config(folder), state, {path.stem: tokenizers.load(path) for path in paths})


def read_config(folder):
    return read_json(Path(folder) / "config.json")


def read_json(path):
    """Raises UserError if the file can't be read or is no JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def unfilled(cls, config, device, dtype=torch.float32):
    """A model whose parameters are allocated, once and in their place, but hold no values yet.

    A buffer that the model itself computed on the CPU keeps its values and its dtype, and moves to the device.
    """
    with torch.device("meta"), NoInitialisation():
        model = cls(config)

    def allocate(tensor):
        if not tensor.is_meta:
            return tensor.to(device)
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind, device=device)

    return model._apply(allocate)  # to_empty would import sympy


class NoInitialisation(TorchFunctionMode):
    """Modules made in this context do not draw initial values, which a checkpoint is about to replace."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def fill(model, state, source):
    """Copies the tensors of `state` into the model, and puts it into eval mode.

    Raises UserError that names every missing, unexpected and reshaped parameter of the weights of `source`.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        _, _, found = str(error).partition(":")  # the first of several lines names the class
        raise UserError(f"the weights of {source} do not fit: {' '.join(found.split())}") from None
    model.eval()


def load_trainer(folder):
    """What `Writer.save` got as trainer; nothing in the file is executed. Raises UserError if it is damaged."""
    path = Path(folder) / "trainer.pt"
    if found := damage(path.parent):
        raise UserError(found)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that it rejects
        raise UserError(f"{path} can't be read ({type(error).__name__}); to go on from the weights alone, start a new"
                        " run") from None


def load_optimizer(optimizer, saved, folder):
    """Fills the optimizer with the state `saved` in a checkpoint's trainer, and in the folder's shards if it has any.

    Either of the two may be sharded or not. The optimizer keeps its own options: weight decay and the like.
    Raises UserError if the state is that of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if [len(group["params"]) for group in saved["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        raise UserError(f"{folder / 'trainer.pt'} holds the optimizer of other parameters: resume with the --optimizer,"
                        " --rates and --lora_rank that the run had")
    state = {number: dict(entry) for number, entry in saved["state"].items()}
    for number, entry in state.items():
        p = parameters[number]
        for name, value in entry.items():
            if is_sharded(p) and value.shape == p.shape:
                entry[name] = shards.distribute(value, p)
    if (folder / "optimizer").is_dir():
        moments = shards.read(folder / "optimizer", like=lambda key: parameters[int(key.partition(".")[0])])
        for key, value in moments.items():
            number, _, name = key.partition(".")
            state[int(number)][name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
