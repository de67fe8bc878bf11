"""Checkpoints: saved atomically, verified by checksum, loaded strictly.

    with Writer(out_dir, background=True) as writer:
        writer.save(["best", "last"], model, {"tokenizer": tokenizer}, config, trainer)
    saved = load(find_any(out_dir))

A run's folder holds two checkpoints: `last`, and `best`, which has the best validation measure. Each is a folder:

    model.safetensors    the weights; a sharded run has the folders `model` and `optimizer` instead (run/shards.py)
    tokenizer.json       text to ids and back; a model with several tokenizers also has tokenizer_NAME.json
    config.json          the model's shape, the run's settings, step and losses, the data set's checksum
    trainer.pt           the rest of the state that resuming needs; only in `last`; loading it runs no code
    SHA256SUMS           the checksums of these files, for `sha256sum -c SHA256SUMS`

A save writes `last.new`, with config.json as its last file, then renames `last` to `last.old` and `last.new` to
`last`. Whenever it is killed, one of them is a complete checkpoint.
"""

import functools
import glob
import hashlib
import os
import platform
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
from configurator import NoResume, UserError, say
from machine.device import synchronize
from run import lock, shards
from run.files import read_json, reason, rename, to_json, write_text


def versions():
    """Returns the Python, PyTorch and NumPy versions and the platform, for config.json and run.json: {name: text}."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
            "platform": platform.platform()}


# ----------------------------------------------------------------------------------------------------------------------
# Saving

class Writer(AbstractContextManager):
    """Saves a run's checkpoints. background: `save` waits only until the tensors are copied to host memory.

    A save waits for the previous one, and the end of the `with` block for the last one. A failed write raises its
    UserError in the next call or there. A UserError that leaves the block also says how to resume.
    sharded: True if the model's tensors are sharded; then all ranks make the same calls.
    """

    def __init__(self, out_dir, background, sharded=False):
        self.out_dir, self.background = out_dir, background
        self.pool = ThreadPoolExecutor(1)
        self.job = self.pool.submit(bool)  # does nothing: the job that the first save waits for
        self.group = dist.new_group(backend="gloo") if sharded else None  # training uses the default one meanwhile

    def save(self, names, model, tokenizers, config, trainer):
        """Writes the same state as each of the checkpoints `names`, in this order.

        tokenizers: {name: tokenizer}; each name begins with "tokenizer". config: plain values for config.json.
        trainer: tensors and plain values for trainer.pt, which only `last` gets.
        """
        assert all(name.startswith("tokenizer") for name in tokenizers)
        self.job.result()
        state = model.state_dict()
        if self.background:  # copies to pinned memory, which PyTorch reuses in the next save; waits once for all
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
        """Raises the UserError of the last write if it has failed. Does not wait for one that is still running."""
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
            if isinstance(error, NoResume):
                raise error
            raise UserError(f"{error}; {resume_hint(self.out_dir)}") from error


def write(out_dir, name, state, tokenizers, config, trainer, group=None):
    """Writes the checkpoint out_dir/name. The previous one becomes NAME.old; a failed write leaves it intact.

    state: the model's tensors. trainer: the content of trainer.pt; None: none is written, and NAME.old is deleted.
    group: the ranks of a sharded run, which must all call this. Raises UserError if a file can't be written.
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
            shutil.rmtree(new, ignore_errors=True)  # frees space on a full disk
        raise UserError(f"{final} can't be written: {reason(error)}") from error


def clear(folder):
    """Deletes a folder. If that fails (NFS keeps files that are open), renames it, and a later call deletes it."""
    renamed = folder.parent.glob(f"{glob.escape(folder.name)}.{'[0-9a-f]' * 8}")
    for path in (folder, *renamed):
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)
    if folder.exists():
        os.rename(folder, f"{folder}.{os.urandom(4).hex()}")


def seal(folder, config):
    """Completes a checkpoint: syncs its files to disk, then writes their checksums, and config.json at the very end."""
    text, sums = to_json(config, indent=1), {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sums[path.relative_to(folder).as_posix()] = digest(path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sums["config.json"] = hashlib.sha256(text.encode()).hexdigest()  # always the last line
    write_text(folder / "SHA256SUMS", "".join(f"{value}  {name}\n" for name, value in sums.items()))
    for name in sums.keys() - {"config.json"}:  # safetensors' files are readable by their owner only
        os.chmod(folder / name, (folder / "SHA256SUMS").stat().st_mode)
    write_text(folder / "config.json", text)


# ----------------------------------------------------------------------------------------------------------------------
# Finding

def is_run(path):
    """Returns True for the folder of a run that has saved, and for a single checkpoint's folder."""
    return is_checkpoint(path) or bool(candidates(path, "best", "last"))


def is_checkpoint(folder):
    """Returns True for a checkpoint's folder, not a run's: one with SHA256SUMS, or with "settings" in config.json."""
    with suppress(UserError):
        return (Path(folder) / "SHA256SUMS").is_file() or "settings" in read_config(folder)
    return False


def candidates(out_dir, *names):
    """Returns the folders that exist of these checkpoints, in order of preference: NAME, NAME.new, NAME.old.

    Leaves out an unfinished save: a NAME.new or NAME.old without config.json. Returns NAME even if it is damaged.
    """
    folders = [Path(out_dir) / (name + suffix) for name in names for suffix in ("", ".new", ".old")]
    return [folder for folder in folders
            if (folder / "config.json").is_file() or folder.name in names and folder.exists()]


def find(out_dir, *names, sampling=False):
    """Returns the folder of the first intact checkpoint of these names, or None if none of them exists.

    Says on stderr which damaged ones it skips. Raises UserError if all are damaged. sampling: as in `verify`.
    """
    damaged = []
    for folder in candidates(out_dir, *names):
        try:
            verify(folder, sampling)
        except UserError as error:
            damaged.append(str(error))
        else:
            if damaged:
                say(f"{'; '.join(damaged)}: using {folder} of step {read_config(folder).get('step')} instead")
            return folder
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; there is no other checkpoint to use instead")
    return None


def find_any(out_dir, preferred="best"):
    """Returns the checkpoint to sample or evaluate: `preferred`, or else the other of best and last.

    out_dir: a run's folder; if it is a checkpoint itself, it is returned. Raises UserError if no checkpoint is intact.
    """
    if is_checkpoint(out_dir):
        return Path(out_dir)
    if folder := find(out_dir, *dict.fromkeys((preferred, "best", "last")), sampling=True):
        return folder
    if (Path(out_dir) / "config.json").exists():
        raise UserError(f"{out_dir} is a published model, not a run: name it with --init_from")
    raise UserError(f"there is no checkpoint in {out_dir}, and no published model: train one first, python train.py"
                    f" config/shakespeare_char.py {shlex.quote(f'--out_dir={out_dir}')}")


def verify(folder, sampling=False):
    """Raises UserError if a file of a checkpoint is missing or damaged. sampling: skip what only resuming needs."""
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
                raise ValueError("its checksum differs from SHA256SUMS")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({getattr(error, 'strerror', error)})") from None


def digest(path, *version):
    """Returns the SHA-256 of a file, in hex. version: unused here; a new value makes `cached_digest` read it again."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()


cached_digest = functools.lru_cache(maxsize=1000)(digest)  # `find` and `load` both verify


def resume_hint(out_dir):
    """Returns the end of an error message: the step of the last save, and the command that resumes from it."""
    for folder in candidates(out_dir, "last"):
        with suppress(UserError):
            return (f"{folder} holds step {read_config(folder)['step']}: python train.py --resume"
                    f" {shlex.quote(f'--out_dir={out_dir}')} goes on from there")
    return "nothing was saved yet"


# ----------------------------------------------------------------------------------------------------------------------
# Loading

class Saved(NamedTuple):
    config: dict  # config.json
    state: dict  # the model's tensors by name, float32
    tokenizers: dict  # by name


def load(folder):
    """Returns a checkpoint's folder as a Saved. Raises UserError if it is damaged or is not a checkpoint."""
    folder = Path(folder)
    verify(folder, sampling=True)
    whole = folder / "model.safetensors"
    state = load_file(whole) if whole.exists() else shards.read(folder / "model")
    paths = sorted(folder.glob("tokenizer*.json"))
    return Saved(read_config(folder), state, {path.stem: tokenizers.load(path) for path in paths})


def read_config(folder):
    return read_json(Path(folder) / "config.json")


def unfilled(cls, config, device, dtype=torch.float32):
    """Returns a model of class `cls` on the device, whose parameters have the dtype but no values yet.

    A buffer that the model creates explicitly on the CPU keeps its values and its dtype, and moves to the device.
    """
    with torch.device("meta"), mock.patch.object(torch.nn.init, "normal_"):  # on meta it imports sympy: a second
        model = cls(config)

    def allocate(tensor):
        if not tensor.is_meta:
            return tensor.to(device)
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind, device=device)

    return model._apply(allocate)  # to_empty would import sympy, too


def fill(model, state, source):
    """Copies the tensors of `state` into the model, and puts it into eval mode. source: their origin, for messages.

    Raises UserError that names every tensor that is missing, unexpected or of another shape.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        _, _, found = str(error).partition(":")  # the text before it only names the class
        raise UserError(f"the weights of {source} do not fit: {' '.join(found.split())}") from None
    model.eval()


def load_trainer(folder):
    """Returns the `trainer` that `Writer.save` saved. Runs no code from the file. Raises UserError if it is damaged."""
    verify(folder)
    try:
        return torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many different errors for files that it rejects
        raise UserError(f"{folder / 'trainer.pt'} can't be read ({type(error).__name__}): start a new run from the"
                        f" weights with {shlex.quote(f'--init_from={folder}')}") from None


def load_optimizer(optimizer, saved, folder):
    """Loads an optimizer's state: `saved` from a checkpoint's trainer.pt, and the folder's optimizer shards, if any.

    The saved state and the optimizer may each be sharded or not. The optimizer keeps its options, such as weight decay.
    Raises UserError if the state belongs to other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    error = UserError(f"{folder / 'trainer.pt'} holds the optimizer state of other parameters: resume with the run's"
                      " own --optimizer, --rates and --lora_rank")
    if sizes != [len(group["params"]) for group in saved["param_groups"]]:
        raise error
    state = {}
    for number, entry in saved["state"].items():
        p = parameters[number]
        if any(value.dim() and value.shape != p.shape for value in entry.values()):
            raise error
        state[number] = {name: shards.distribute(value, p) for name, value in entry.items()}
    if (folder / "optimizer").is_dir():
        moments = shards.read(folder / "optimizer", like=lambda key: parameters[int(key.partition(".")[0])])
        for key, value in moments.items():
            number, _, name = key.partition(".")
            state[int(number)][name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
