"""Short steps through a trunk in compiled C (decode.c), on a CPU where there is a C compiler, in float32.

In bfloat16 too, for all prompts, where the CPU only emulates it.

The first sample compiles decode.c, in about a second, into this folder's __pycache__; later ones find it there.
Everything else is left to PyTorch, see model.py's Decoder. QUILL_COMPILER names another compiler than cc; an empty one
turns this off.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int, c_int32, c_void_p
from pathlib import Path

import torch

from device import emulates_bfloat16

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-shared", "-fPIC"]
DTYPES = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}
WIDTH = 16  # all widths must be multiples of it
MLPS = ("gelu", "geglu", "relu2")  # in the order of decode.c's numbers
PROMPT_TOKENS = 128  # more at once are a matter for PyTorch, whose products of large matrices are quicker
THREADS_FROM = 2**19  # multiplications in a step that are worth a second thread


@functools.cache
def library(dtype=torch.float32):
    """The compiled decode.c, or None where it can't be compiled. dtype: of weights and caches; sums are in float32."""
    compiler, numbers = shutil.which(os.environ.get("QUILL_COMPILER", "cc")), DTYPES[dtype]
    for more in (["-march=native", "-fopenmp"], ["-march=native"], []) if compiler else ():
        command = [compiler, *FLAGS, *numbers, *more]
        key = hashlib.sha256(SOURCE.read_bytes() + repr((command, processor())).encode()).hexdigest()
        path = Path(importlib.util.cache_from_source(__file__)).with_name(f"decode-{key[:16]}.so")
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # a compiler without OpenMP, a folder that is
            if not path.exists():                                          # not ours to write to
                compile_to(path, command)
            return ctypes.CDLL(str(path))
    return None


def compile_to(path, command):
    """Runs the compiler; the file gets its name when it is whole, for others may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([*command, str(SOURCE), "-o", str(built), "-lm"], capture_output=True, check=True)
        built.replace(path)


def processor():
    """What -march=native depends on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return sorted({line for line in file if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
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


class CompiledDecoder:
    """As model.py's Decoder, whose place it takes in steps without a mask.

    It takes short prompts too, and in bfloat16 prompts of any length, in pieces.
    """

    def __init__(self, trunk, caches, decoder):
        config, (B, K, slots, D) = trunk.config, caches[0].k.shape
        C, H, F = config.n_embd, config.n_head, trunk.blocks[0].mlp.up_proj.out_features
        self.rows, self.slots, self.most = B, slots, max(PROMPT_TOKENS, 2 * B)  # most tokens at once
        widths = dict(x=C, y=max(C, H * D), q=H * D, k=K * D, v=K * D, hidden=F, gates=F,
                      scores=H * (-(-slots // WIDTH) * WIDTH))
        buffers = {name: torch.zeros(self.most * widths[name]) for name in Trunk.BUFFERS}
        blocks = (Block * config.n_layer)(*map(block, trunk.blocks, caches))
        sizes = (config.n_layer, C, H, K, D, F, slots, config.norm == "rmsnorm", MLPS.index(config.mlp))
        struct = Trunk(blocks, layer(trunk.ln_f), *(b.data_ptr() for b in buffers.values()), *sizes, config.norm_eps)
        self.trunk, self.kept = ctypes.byref(struct), (trunk, caches, blocks, buffers)  # what the pointers point to
        self.x, self.y = buffers["x"], buffers["y"]
        self.any_prompt = caches[0].k.dtype == torch.bfloat16
        self.weights = sum(p.numel() for p in trunk.parameters())
        self.decode, self.decoder = library(caches[0].k.dtype).decode, decoder
        self.decode.argtypes, self.decode.restype = [c_void_p] * 3 + [c_int] * 5, None

    def takes(self, x, mask):
        return x.size(1) == 1 or isinstance(mask, str) and (self.any_prompt or x.size(0) * x.size(1) <= self.most)

    def __call__(self, x, mask=None, rope=None, start=0):
        """(B, T, C) -> (B, T, C) as the trunk itself; arguments as Attention's. Raises ValueError where caches end."""
        if x.size(0) != self.rows or start + x.size(1) > self.slots:
            raise ValueError(f"{x.size(0)} rows up to position {start + x.size(1)}: the caches have {self.rows} rows of"
                             f" {self.slots}")
        if mask is not None and not isinstance(mask, str):
            return self.decoder(x, mask, rope, start)
        step = self.most // x.size(0)  # positions at once
        if x.size(1) > step:
            parts = [slice(t, t + step) for t in range(0, x.size(1), step)]
            return torch.cat([self(x[:, part], mask, rope and [turn[..., part, :] for turn in rope], start + part.start)
                              for part in parts], dim=1)
        cos, sin = (turn.contiguous() for turn in rope) if rope else (None, None)  # (1, D), (T, D) or (B, 1, T, D)
        pointers = (cos.data_ptr(), sin.data_ptr(), cos.numel() // cos.size(-1)) if rope else (None, None, 0)
        threads = torch.get_num_threads() if self.weights * x.size(0) * x.size(1) >= THREADS_FROM else 1
        self.x[:x.numel()].view(x.shape).copy_(x)
        self.decode(self.trunk, *pointers, x.size(0), x.size(1), start, threads)
        return self.y[:x.numel()].view(x.shape).to(x.dtype, copy=True)


def layer(module):
    parts = (getattr(module, name, None) for name in ("weight", "bias"))  # of a part that isn't there, neither is
    return Layer(*(None if part is None else part.data_ptr() for part in parts))


def block(module, cache):
    layers = dict(child for part in (module, module.attn, module.mlp) for child in part.named_children())
    return Block(*(layer(layers.get(name)) for name in Block.LAYERS), cache.k.data_ptr(), cache.v.data_ptr())


def compiled(trunk, caches, decoder):
    """A CompiledDecoder if there is a compiler and it knows such a trunk, else None."""
    tensors, dtype = [*trunk.parameters(), caches[0].k], caches[0].k.dtype
    known = dtype == torch.float32 or dtype == torch.bfloat16 and emulates_bfloat16()
    plain = known and all(t.device.type == "cpu" and t.dtype == dtype and t.is_contiguous() for t in tensors)
    alike = len({tuple(p.shape for p in block.parameters()) for block in trunk.blocks}) == 1
    widths = (trunk.config.n_embd, caches[0].k.size(3), trunk.blocks[0].mlp.up_proj.out_features)
    if not plain or not alike or any(width % WIDTH for width in widths) or trunk.config.mlp not in MLPS:
        return None
    return CompiledDecoder(trunk, caches, decoder) if library(dtype) else None
