"""Fast steps: short steps of a trunk in compiled C (decode.c), put on while tokens are written and taken off after.

That is on a CPU where there is a C compiler, in float32; in bfloat16 too where the CPU only emulates it. The first
sample compiles decode.c, in about a second, into this folder's __pycache__. QUILL_COMPILER names another compiler than
cc; an empty one turns this off.

decode.c stands in for blocks whose code it knows: every module must be of a class whose digest (digest.py) is in
decode.json, without hooks, subclasses or methods of its own. Otherwise PyTorch takes the steps, as it takes all others.
After a change to the blocks that decode.c follows, accept their new digests:

    QUILL_ACCEPT=1 python -m pytest tests/test_decode.py         which writes decode.json if the logits are the same
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int, c_int32, c_void_p
from pathlib import Path

import torch
from torch.nn.modules import module as torch_module

from configurator import say
from machine.device import emulates_bfloat16
from machine.digest import NoSource, digests, full_name

SOURCE = Path(__file__).with_suffix(".c")
KNOWN = json.loads(Path(__file__).with_suffix(".json").read_text())  # {"model.Block": digest, ...}
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-shared", "-fPIC"]
DTYPES = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}
WIDTH = 16  # all widths must be multiples of it
MLPS = {"model.MLP": 0, "model.GatedMLP": 1, "model.SquaredReLUMLP": 2}  # decode.c's numbers
PYTORCH = {"torch.nn.modules.linear.Linear", "torch.nn.modules.container.ModuleList"}
PROMPT_TOKENS = 128  # more at once are a matter for PyTorch, whose products of large matrices are quicker
THREADS_FROM = 2**19  # multiplications in a step that are worth a second thread


@contextlib.contextmanager
def fast_steps(model):
    """While this lasts, the model's trunks take short steps in C where that gives the same numbers sooner.

    On CUDA cuDNN's attention is off meanwhile: it plans anew for every length of the cache, 40 to 70 ms each.
    """
    trunks = [module for module in model.modules() if full_name(type(module)) == "model.Transformer"]
    trunks = [trunk for trunk in trunks if stands_for(trunk)]
    for trunk in trunks:
        trunk.forward = Steps(trunk)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for trunk in trunks:
            vars(trunk).pop("forward", None)


def stands_for(trunk):
    """Whether decode.c computes what this trunk does; says so in a line if it doesn't because the code was edited."""
    first, dtype = trunk.blocks[0], trunk.ln_f.weight.dtype
    known = dtype == torch.float32 or dtype == torch.bfloat16 and emulates_bfloat16()
    if trunk.training or not known or not untouched(trunk):
        return False
    if any(p.device.type != "cpu" or p.dtype != dtype or not p.is_contiguous() for p in trunk.parameters()):
        return False
    widths = (trunk.ln_f.weight.numel(), first.attn.head_dim, first.mlp.up_proj.out_features)
    if any(width % WIDTH for width in widths) or not library(dtype):
        return False
    try:
        edited = [name for name, found in digests(trunk).items() if KNOWN.get(name) != found]
    except NoSource as error:
        edited = [f"the source of {error}, which can't be read,"]
    if edited:
        say(f"{', '.join(sorted(edited))} is not the code that decode.c stands for: PyTorch takes the steps")
    return not edited


def untouched(trunk):
    """Whether all modules are of known classes, in blocks that are alike, without a hook or a method of their own."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks or trunk.blocks[0].cross_attn:
        return False
    for module in trunk.modules():
        name = full_name(type(module))
        own = name in KNOWN or name in PYTORCH and type(module).forward.__module__.startswith("torch.")
        if not own or any(map(callable, vars(module).values())) or module._forward_hooks or module._forward_pre_hooks:
            return False
    kinds = {(block.attn.n_head, block.attn.n_kv_head, block.attn.head_dim, block.ln_1.eps, block.ln_2.eps,
              *(full_name(type(module)) for module in block.modules()), *(p.shape for p in block.parameters()))
             for block in trunk.blocks}
    return len(kinds) == 1


@functools.cache
def library(dtype=torch.float32):
    """The compiled decode.c, or None where it can't be compiled. dtype: of weights and caches; sums are in float32."""
    compiler, numbers = shutil.which(os.environ.get("QUILL_COMPILER", "cc")), DTYPES[dtype]
    for more in (["-march=native", "-fopenmp"], ["-march=native"], []) if compiler else ():
        command = [compiler, *FLAGS, *numbers, *more, str(SOURCE), "-lm"]
        key = hashlib.sha256(SOURCE.read_bytes() + repr((command, processor())).encode()).hexdigest()
        path = Path(importlib.util.cache_from_source(__file__)).with_name(f"decode-{key[:16]}.so")
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no OpenMP, or a folder that isn't ours
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # others may be doing the same
                    built = Path(folder) / path.name
                    subprocess.run([*command, "-o", str(built)], capture_output=True, check=True)
                    built.replace(path)
            return ctypes.CDLL(str(path))
    return None


def processor():
    """What -march=native depends on."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return sorted({line for line in file if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return platform.processor()


class Layer(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class Block(ctypes.Structure):
    LAYERS = ("ln_1", "q_proj", "k_proj", "v_proj", "o_proj", "ln_2", "up_proj", "gate_proj", "down_proj")
    _fields_ = [*((name, Layer) for name in LAYERS), ("keys", c_void_p), ("values", c_void_p)]


class Trunk(ctypes.Structure):
    BUFFERS = ("x", "y", "q", "k", "v", "hidden", "gates", "scores")
    SIZES = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "slots", "rms", "mlp")
    _fields_ = [("blocks", POINTER(Block)), ("ln_f", Layer), *((name, c_void_p) for name in BUFFERS),
                *((name, c_int32) for name in SIZES), ("eps", c_float)]


class Steps:
    """The `forward` of a trunk in compiled C: steps of one token, short prompts, and in bfloat16 all prompts.

    The trunk's own forward takes everything else. Arguments as the trunk's.
    """

    def __init__(self, trunk):
        self.trunk, self.caches = trunk, None
        self.weights = sum(p.numel() for p in trunk.parameters())

    def __call__(self, x, caches=None, mask=None, rope=None, start=0, **more):
        if caches is not None and isinstance(start, int) and not more and self.takes(x, mask):
            if caches is not self.caches:
                self.point_at(caches)
            return self.step(x, rope, start)
        own = type(self.trunk).forward
        return own(self.trunk, x, caches, mask=mask, rope=rope, start=start, **more)

    def takes(self, x, mask):
        if x.size(1) == 1:
            return mask is None
        short = x.size(0) * x.size(1) <= max(PROMPT_TOKENS, 2 * x.size(0))
        return isinstance(mask, str) and (short or x.dtype == torch.bfloat16)

    def point_at(self, caches):
        """Tells decode.c where the weights and the caches lie now."""
        trunk, (B, K, slots, D) = self.trunk, caches[0].k.shape
        attention, mlp = trunk.blocks[0].attn, trunk.blocks[0].mlp
        C, H, F = trunk.ln_f.weight.numel(), attention.n_head, mlp.up_proj.out_features
        widths = dict(x=C, y=max(C, H * D), q=H * D, k=K * D, v=K * D, hidden=F, gates=F,
                      scores=H * (-(-slots // WIDTH) * WIDTH))
        self.most = max(PROMPT_TOKENS, 2 * B)  # tokens at once
        self.buffers = {name: torch.zeros(self.most * widths[name]) for name in Trunk.BUFFERS}
        self.blocks = (Block * len(trunk.blocks))(*map(block, trunk.blocks, caches))
        rms, kind = full_name(type(trunk.ln_f)) == "model.RMSNorm", MLPS[full_name(type(mlp))]
        sizes = (len(trunk.blocks), C, H, K, D, F, slots, rms, kind)
        pointers = [buffer.data_ptr() for buffer in self.buffers.values()]
        self.struct = Trunk(self.blocks, layer(trunk.ln_f), *pointers, *sizes, trunk.ln_f.eps)
        self.rows, self.slots, self.caches = B, slots, caches
        self.decode = library(caches[0].k.dtype).decode
        self.decode.argtypes, self.decode.restype = [c_void_p] * 3 + [c_int] * 5, None

    def step(self, x, rope, start):
        """(B, T, C) -> (B, T, C); rope: (cos, sin) of (1, D), (T, D) or (B, 1, T, D), or None."""
        assert x.size(0) == self.rows and start + x.size(1) <= self.slots, \
            f"{x.size(0)} rows up to position {start + x.size(1)}: the caches have {self.rows} rows of {self.slots}"
        at_once = self.most // x.size(0)  # positions
        if x.size(1) > at_once:
            parts = [slice(t, t + at_once) for t in range(0, x.size(1), at_once)]
            return torch.cat([self.step(x[:, part], rope and [turn[..., part, :] for turn in rope], start + part.start)
                              for part in parts], dim=1)
        pointers = (None, None, 0)
        if rope:
            cos, sin = (turn.float().contiguous() for turn in rope)
            pointers = (cos.data_ptr(), sin.data_ptr(), cos.numel() // cos.size(-1))
        threads = torch.get_num_threads() if self.weights * x.size(0) * x.size(1) >= THREADS_FROM else 1
        self.buffers["x"][:x.numel()].view(x.shape).copy_(x)
        self.decode(ctypes.byref(self.struct), *pointers, x.size(0), x.size(1), start, threads)
        return self.buffers["y"][:x.numel()].view(x.shape).to(x.dtype, copy=True)


def layer(module):
    """Where a module's weight and bias lie; a missing module has neither."""
    parts = (getattr(module, name, None) for name in ("weight", "bias"))
    return Layer(*(None if part is None else part.data_ptr() for part in parts))


def block(module, cache):
    layers = dict(child for part in (module, module.attn, module.mlp) for child in part.named_children())
    return Block(*(layer(layers.get(name)) for name in Block.LAYERS), cache.k.data_ptr(), cache.v.data_ptr())
