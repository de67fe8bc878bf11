"""Checkpoints: saved atomically, checked and loaded strictly.

    with Writer(out_dir, background=True) as writer:
        writer.save(["best", "last"], model, {"tokenizer": tokenizer}, config, trainer)
    saved = load(find_any(out_dir))

A run's folder holds two checkpoints, `last` and `best` by validation. Each is a folder with all that sampling needs:

    model.safetensors    the weights; a sharded run has the folders `model` and `optimizer` instead (run/shards.py)
    tokenizer.json       text to ids and back; a model with several tokenizers has more files, tokenizer_NAME.json
    config.json          the model's shape, the run's settings, step and losses, where the data came from
    trainer.pt           what resuming needs besides (only in `last`); loads without running code
    SHA256SUMS           the checksums of these files, as `sha256sum -c SHA256SUMS` reads them

A save writes `last.new`, config.json at the end, then renames `last` to `last.old` and `last.new` to `last`. So a
complete checkpoint is found at any instant.
"""

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy
import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map_only

import tokenizer as tokenizers
from configurator import UserError, say
from machine.device import synchronize
from run import lock, shards
from run.files import read_json, rename, to_json, write_text


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
            "platform": platform.platform()}


# ----------------------------------------------------------------------------------------------------------------------
# Saving

class Writer(AbstractContextManager):
    """Saves a run's checkpoints, in the background if wanted: the caller then waits for a copy in host memory only.

    A save waits for the one before. If a write fails, its UserError comes up in the next call or at the end of the
    `with` block, which waits for the last write. A UserError that leaves the block says which checkpoint is kept.
    sharded: the model is, and all ranks save together.
    """

    def __init__(self, out_dir, background, sharded=False):
        self.out_dir, self.background = out_dir, background
        self.pool = ThreadPoolExecutor(1)
        self.job = self.pool.submit(bool)  # a first job, which does nothing
        self.group = dist.new_group(backend="gloo") if sharded else None  # the loop's messages go through another

    def save(self, names, model, tokenizers, config, trainer):
        """Writes the checkpoints `names` in this order, all of the same state.

        tokenizers: by name; each name begins with "tokenizer". config: plain values for config.json.
        trainer: tensors and plain values for trainer.pt, which only `last` gets.
        """
        assert all(name.startswith("tokenizer") for name in tokenizers)
        self.job.result()
        state = model.state_dict()
        if self.background:  # copies into pinned memory, which PyTorch keeps for the next save, while the host goes on
            state, trainer = tree_map_only(
                torch.Tensor, lambda value: value.detach().to("cpu", non_blocking=True, copy=True), (state, trainer))
            synchronize(next(model.parameters()).device)

        def work():
            lock.require_owned(self.out_dir)
            for name in names:
                write(self.out_dir, name, state, tokenizers, config, trainer if name == "last" else None, self.group)

        self.job = self.pool.submit(work)
        if not self.background:
            self.job.result()

    def raise_pending(self):
        """Raises the error of a finished write."""
        if self.job.done():
            self.job.result()

    def __exit__(self, kind, error, traceback):
        try:
            self.job.result()
        except UserError as late:
            error = error or late
        finally:
            self.pool.shutdown()
        if isinstance(error, UserError):
            lock.require_owned(self.out_dir)
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
            clear(new)
            new.mkdir(parents=True)
        if group:
            trainer = shards.write(new, state, trainer, group)
        else:
            state = {key: value.detach().contiguous().cpu() for key, value in state.items()}
            save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        if is_main:
            for key, tokenizer in tokenizers.items():
                tokenizer.save(new / f"{key}.json")
            if trainer is not None:
                with open(new / "trainer.pt", "wb") as file:
                    torch.save(trainer, file)
            seal(new, config)
            if final.exists():
                clear(old)
                rename(final, old)
            rename(new, final)
            if trainer is None:
                clear(old)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if is_main:
            shutil.rmtree(new, ignore_errors=True)  # a full disk needs the room
        raise UserError(f"{final} can't be written: {reason(error)}") from error


def clear(folder):
    """Deletes a folder. What can't be deleted, as NFS keeps what somebody reads, gets a name of its own till later."""
    for path in (folder, *folder.parent.glob(f"{folder.name}.*")):
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)
    if folder.exists():
        os.rename(folder, f"{folder}.{os.urandom(4).hex()}")


def seal(folder, config):
    """Completes a checkpoint: has its files reach the disk, adds their checksums, and config.json as the very last."""
    text, sums = to_json(config, indent=1), {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sums[path.relative_to(folder).as_posix()] = digest(path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sums["config.json"] = hashlib.sha256(text.encode()).hexdigest()  # the last line: it shows that none is missing
    write_text(folder / "SHA256SUMS", "".join(f"{value}  {name}\n" for name, value in sums.items()))
    for name in sums.keys() - {"config.json"}:  # safetensors writes what nobody else may read
        os.chmod(folder / name, (folder / "SHA256SUMS").stat().st_mode)
    write_text(folder / "config.json", text)


def reason(error):
    """Why a write failed, in the system's words if there are any: torch and safetensors bury them."""
    said = re.sub(r".*: (.*) \(os error \d+\)", r"\1", str(error).partition("\n")[0])
    while error and not isinstance(error, OSError):
        error = error.__context__
    return getattr(error, "strerror", None) or said


# ----------------------------------------------------------------------------------------------------------------------
# Finding

def is_run(path):
    """True for the folder of a run that has saved, and for a checkpoint's own folder."""
    return is_checkpoint(path) or bool(candidates(path, "best", "last"))


def is_checkpoint(folder):
    """True for a checkpoint's own folder, whatever its name, and even if its SHA256SUMS is gone."""
    with suppress(UserError):
        return (Path(folder) / "SHA256SUMS").is_file() or "settings" in read_config(folder)
    return False


def candidates(out_dir, *names):
    """The checkpoints of these names, the one to prefer first. A save that is killed may leave three of a name.

    A folder without config.json is an unfinished save and not listed, unless it has the final name: then it is damaged.
    """
    folders = [Path(out_dir) / (name + suffix) for name in names for suffix in ("", ".new", ".old")]
    return [folder for folder in folders
            if (folder / "config.json").is_file() or folder.name in names and folder.exists()]


def find(out_dir, *names, sampling=False):
    """The first intact checkpoint of these names; a line on stderr names the damage of those before it.

    Returns None if there is none. Raises UserError if all are damaged. sampling: as in `verify`.
    """
    damaged = []
    for folder in candidates(out_dir, *names):
        try:
            verify(folder, sampling)
        except UserError as error:
            damaged.append(str(error))
            continue
        if damaged:
            say(f"{'; '.join(damaged)}: using {folder} instead, of step {read_config(folder).get('step')}")
        return folder
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; there is no other checkpoint to use instead")
    return None


def find_any(out_dir, preferred="best"):
    """The folder to sample or evaluate: `preferred`, or else the other of best and last; out_dir itself if it is one.

    Raises UserError if there is no checkpoint, or only damaged ones.
    """
    if is_checkpoint(out_dir):
        return Path(out_dir)
    if folder := find(out_dir, *dict.fromkeys((preferred, "best", "last")), sampling=True):
        return folder
    if (Path(out_dir) / "config.json").exists():
        raise UserError(f"{out_dir} is a published model, and no run: name it with --init_from")
    raise UserError(f"there is no checkpoint in {out_dir}: train one first, python train.py"
                    f" config/shakespeare_char.py {shlex.quote(f'--out_dir={out_dir}')}")


def verify(folder, sampling=False):
    """Raises UserError that names the first file of a checkpoint that is missing or damaged.

    sampling: trainer.pt and the optimizer's shards may be.
    """
    path = folder / "SHA256SUMS"
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines()
        sums = {line[66:]: line[:64] for line in lines}
        if "config.json" not in sums:
            raise ValueError("its end is missing")
        for name, value in sums.items():
            path = folder / name
            if sampling and name.startswith(("trainer.pt", "optimizer/")):
                continue
            found = path.stat()
            if cached_digest(path, found.st_ino, found.st_size, found.st_mtime_ns) != value:
                raise ValueError("its checksum is not the one in SHA256SUMS")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({getattr(error, 'strerror', error)})") from None


def digest(path, *version):
    """The SHA-256 of a file. version: what changes with the file, for the cache."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()


cached_digest = functools.lru_cache(maxsize=1000)(digest)  # whoever finds a checkpoint loads it next


def kept(out_dir):
    """In words, what a run that ends here leaves to go on from."""
    for folder in candidates(out_dir, "last"):
        with suppress(UserError):
            return (f"{folder} holds step {read_config(folder)['step']}: python train.py --resume"
                    f" {shlex.quote(f'--out_dir={out_dir}')} replays what came after")
    return "nothing was saved yet"


# ----------------------------------------------------------------------------------------------------------------------
# Loading

class Saved(NamedTuple):
    config: dict  # config.json
    state: dict  # the model's tensors by name, float32
    tokenizers: dict  # by name


def load(folder):
    """The Saved of a checkpoint's folder. Raises UserError if its files are damaged, or if it is no checkpoint."""
    folder = Path(folder)
    verify(folder, sampling=True)
    whole = folder / "model.safetensors"
    state = load_file(whole) if whole.exists() else shards.read(folder / "model")
    paths = sorted(folder.glob("tokenizer*.json"))
    return Saved(read_config(folder), state, {path.stem: tokenizers.load(path) for path in paths})


def read_config(folder):
    return read_json(Path(folder) / "config.json")


def unfilled(cls, config, device, dtype=torch.float32):
    """A model whose parameters are allocated, once and in their place, but hold no values yet.

    A buffer that the model itself computed on the CPU keeps its values and its dtype, and moves to the device.
    """
    with torch.device("meta"), mock.patch.object(torch.nn.init, "normal_"):  # it imports sympy there: a second
        model = cls(config)

    def allocate(tensor):
        if not tensor.is_meta:
            return tensor.to(device)
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind, device=device)

    return model._apply(allocate)  # to_empty imports sympy, too


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
    verify(folder)
    try:
        return torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that it rejects
        raise UserError(f"{folder / 'trainer.pt'} can't be read ({type(error).__name__}); to go on from the weights"
                        " alone, start a new run") from None


def load_optimizer(optimizer, saved, folder):
    """Fills the optimizer with the state `saved` in a checkpoint's trainer, and in the folder's shards if it has any.

    Either of the two may be sharded or not. The optimizer keeps its own options: weight decay and the like.
    Raises UserError if the state is that of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes, own_sizes = ([len(group["params"]) for group in groups]
                        for groups in (saved["param_groups"], optimizer.param_groups))
    if sizes != own_sizes or any(value.dim() and value.shape != parameters[number].shape
                                 for number, entry in saved["state"].items() for value in entry.values()):
        raise UserError(f"{folder / 'trainer.pt'} holds the optimizer of other parameters: resume with the --optimizer,"
                        " --rates and --lora_rank that the run had")
    state = {number: {name: shards.distribute(value, parameters[number]) for name, value in entry.items()}
             for number, entry in saved["state"].items()}
    if (folder / "optimizer").is_dir():
        moments = shards.read(folder / "optimizer", like=lambda key: parameters[int(key.partition(".")[0])])
        for key, value in moments.items():
            number, _, name = key.partition(".")
            state[int(number)][name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
