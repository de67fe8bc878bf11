"""Fast generation on a CPU: while tokens are generated, compiled C (decode.c) takes the short steps of a model's trunk.

It needs a C compiler, and float32 weights, or bfloat16 where the CPU only emulates it. The first sample compiles it
into __pycache__, in about a second. QUILL_COMPILER names a compiler other than cc; if it is empty, none is used.

decode.c replaces only code that it was tested against: the digests (digest.py) of the trunk's classes must be those in
decode.json, and no module may have hooks or methods of its own. Otherwise PyTorch takes the steps. After a change to
these classes, and to decode.c if needed, the test below accepts their new digests if the logits are equal.

    QUILL_ACCEPT=1 python -m pytest tests/test_decode.py         writes decode.json
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
from machine.device import cudnn_attention, emulates_bfloat16
from machine.digest import NoSource, digests, full_name

SOURCE = Path(__file__).with_suffix(".c")
KNOWN = json.loads(Path(__file__).with_suffix(".json").read_text())  # {"model.Block": its digest, ...}
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-shared", "-fPIC"]
DTYPES = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}
WIDTH = 16  # n_embd, head_dim and n_hidden must be multiples of it
NORMS = {"model.LayerNorm": 0, "model.RMSNorm": 1, "model.PlainRMSNorm": 2}  # the numbers that decode.c gives them
MLPS = {"model.MLP": 0, "model.GatedMLP": 1, "model.SwiGLUMLP": 2, "model.SquaredReLUMLP": 3,
        "seq2seq.ReLUMLP": 4}
PYTORCH = {"torch.nn.modules.linear.Linear", "torch.nn.modules.linear.Identity",
           "torch.nn.modules.container.ModuleList"}
PROMPT_TOKENS = 128  # for more tokens at once, PyTorch's matrix products are faster
THREADS_FROM = 2**19  # steps of at least so many multiplications use several threads


@contextlib.contextmanager
def fast_steps(model):
    """A context in which decode.c computes the model's trunks for a few tokens at a time, where it can.

    On CUDA it only turns off cuDNN's attention, because the cache has a new length at each step.
    """
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    trunks = [m for m in model.modules() if full_name(type(m)) == "model.Transformer" and "forward" not in vars(m)
              and on_cpu]
    for trunk in trunks:
        trunk.forward = Steps(trunk)
    try:
        with cudnn_attention(False):
            yield
    finally:
        for trunk in trunks:
            vars(trunk).pop("forward", None)


def can_step(trunk):
    """Returns True if decode.c can take steps of this trunk.

    Prints a line if the only obstacle is that the source code of the trunk's classes was edited or can't be read.
    """
    first, dtype = trunk.blocks[0], next(trunk.parameters()).dtype
    known = dtype == torch.float32 or dtype == torch.bfloat16 and emulates_bfloat16()
    if trunk.training or not known or not untouched(trunk):
        return False
    if any(p.device.type != "cpu" or p.dtype != dtype or not p.is_contiguous() for p in trunk.parameters()):
        return False
    widths = (first.attn.o_proj.out_features, first.attn.head_dim, first.mlp.up_proj.out_features)
    if any(width % WIDTH for width in widths) or not library(dtype):
        return False
    try:
        edited = sorted(name for name, found in digests(trunk).items() if KNOWN.get(name) != found)
        problem = f"the code of {', '.join(edited)} was edited" if edited else ""
    except NoSource as error:
        problem = f"the source of {error} can't be read"
    if problem:
        say(f"{problem}, so PyTorch takes the steps instead of decode.c, more slowly")
    return not problem


def untouched(trunk):
    """True if the blocks are alike, and all modules are of known classes, without hooks or patches."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    modules = list(trunk.modules())
    for module in modules:
        name = full_name(type(module))
        known = name in KNOWN or name in PYTORCH and type(module).forward.__module__.startswith("torch.")
        if not known or has_methods(module) or module._forward_hooks or module._forward_pre_hooks:
            return False
    blocks = {(*(type(module) for module in b.modules()), *(p.shape for p in b.parameters())) for b in trunk.blocks}
    attentions = [m for m in modules if "head_dim" in vars(m)]
    if any(type(norm) is not torch.nn.Identity for m in attentions for norm in (m.q_norm, m.k_norm)):
        return False  # decode.c has no QK-norm
    heads = {(m.n_head, m.n_kv_head, m.head_dim) for m in attentions}
    norms = {(type(m), m.eps) for m in modules if "eps" in vars(m)}  # an edited block may have other norms
    return len(blocks) == len(heads) == len(norms) == 1


def has_methods(module):
    """Whether a module has functions of its own, beside those of its class and a trunk's Steps."""
    return any(callable(value) and not isinstance(value, Steps) for value in vars(module).values())


@functools.cache
def library(dtype=torch.float32):
    """decode.c as a ctypes library, for weights and caches of this dtype, or None if it can't be compiled."""
    compiler = shutil.which(os.environ.get("QUILL_COMPILER", "cc"))
    if not compiler:
        return None
    for more in (["-march=native", "-fopenmp"], ["-march=native"], []):
        command = [compiler, *FLAGS, *DTYPES[dtype], *more, str(SOURCE), "-lm"]
        key = hashlib.sha256(SOURCE.read_bytes() + repr((command, processor())).encode()).hexdigest()
        path = Path(importlib.util.cache_from_source(__file__)).with_name(f"decode-{key[:16]}.so")
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # an unknown flag, or a read-only folder
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # another process may compile it too
                    built = Path(folder) / path.name
                    subprocess.run([*command, "-o", str(built)], capture_output=True, check=True)
                    built.replace(path)
            return ctypes.CDLL(str(path))
    return None


def processor():
    """Lines or a text that name the CPU's model and features, on which the result of -march=native depends."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return sorted({line for line in file if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return platform.processor()


class Layer(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class Block(ctypes.Structure):
    LAYERS = ("ln_1", "q_proj", "k_proj", "v_proj", "o_proj", "ln_x", "cross_q_proj", "cross_o_proj", "ln_2", "up_proj",
              "gate_proj", "down_proj")
    TENSORS = ("keys", "values", "memory_keys", "memory_values")
    _fields_ = [*((name, Layer) for name in LAYERS), *((name, c_void_p) for name in TENSORS)]


class Trunk(ctypes.Structure):
    BUFFERS = ("x", "y", "q", "k", "v", "hidden", "gates", "scores")
    SIZES = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "slots", "n_memory", "n_scores",
             "norm", "mlp", "post_norm")
    _fields_ = [("blocks", POINTER(Block)), ("ln_f", Layer), ("visible", c_void_p),
                *((name, c_void_p) for name in BUFFERS), *((name, c_int32) for name in SIZES), ("eps", c_float)]


class Steps:
    """Replaces a trunk's `forward`, with the same arguments.

    decode.c takes steps of one token, short prompts, and in bfloat16 prompts of any length. PyTorch takes the others.
    """

    def __init__(self, trunk):
        self.trunk, self.places, self.dtype = trunk, None, next(trunk.parameters()).dtype
        self.weights = sum(p.numel() for p in trunk.parameters())

    @functools.cached_property
    def able(self):
        return can_step(self.trunk)

    def __call__(self, x, caches=None, memory=None, mask=None, rope=None, start=0, memory_mask=None, **more):
        if caches is not None and isinstance(start, int) and not more and self.takes(x, mask) and self.able \
                and self.reads(memory, memory_mask, x):
            places = [(part.data_ptr(), part.shape) for layer in caches for part in (layer.k, layer.v)]
            places += [(part.data_ptr(), part.shape) for layer in memory or () for part in layer]
            if places != self.places:  # they are other tensors, or moved in memory
                self.point_at(caches, memory)
                self.places = places
            self.struct.visible = None if memory_mask is None else memory_mask.data_ptr()
            return self.step(x, rope, start)
        own = type(self.trunk).forward
        return own(self.trunk, x, caches, memory, mask=mask, rope=rope, start=start, memory_mask=memory_mask, **more)

    def takes(self, x, mask):
        if x.size(1) == 1:
            return mask is None
        short = x.size(0) * x.size(1) <= max(PROMPT_TOKENS, 2 * x.size(0))
        return isinstance(mask, str) and (short or x.dtype == torch.bfloat16)

    def reads(self, memory, mask, x):
        """Whether memory and its mask are as decode.c reads them: from `remember`, and a mask (B, 1, 1, S) or None."""
        blocks = self.trunk.blocks
        cross = blocks[0].cross_attn
        if cross is None or memory is None:
            return cross is None and memory is None and mask is None
        if not isinstance(memory, list) or len(memory) != len(blocks):
            return False
        shape = (x.size(0), cross.n_kv_head, memory[0][0].size(2), cross.head_dim)
        known = all(part.shape == shape and part.dtype == self.dtype and part.is_contiguous()
                    for keys_values in memory for part in keys_values)
        return known and (mask is None or mask.shape == (shape[0], 1, 1, shape[2]) and mask.dtype == torch.bool
                          and mask.is_contiguous())

    def point_at(self, caches, memory):
        """Gives decode.c the addresses of weights, caches and memory, and allocates its buffers."""
        trunk, (B, K, slots, D) = self.trunk, caches[0].k.shape
        assert len(caches) == len(trunk.blocks), f"{len(caches)} caches for {len(trunk.blocks)} blocks"
        first, n_memory = trunk.blocks[0], memory[0][0].size(2) if memory else 0
        C, H, F = first.attn.q_proj.in_features, first.attn.n_head, first.mlp.up_proj.out_features
        n_scores = -(-max(slots, n_memory) // WIDTH) * WIDTH
        widths = dict(x=C, y=max(C, H * D), q=H * D, k=K * D, v=K * D, hidden=F, gates=F, scores=H * n_scores)
        self.max_tokens = max(PROMPT_TOKENS, 2 * B)  # in one call of decode.c, over all rows
        self.buffers = {name: torch.zeros(self.max_tokens * widths[name]) for name in Trunk.BUFFERS}
        self.blocks = (Block * len(trunk.blocks))(*map(block, trunk.blocks, caches, memory or [()] * len(caches)))
        norm, mlp, kind = (full_name(type(module)) for module in (first.ln_1, first.mlp, first))
        sizes = (len(trunk.blocks), C, H, K, D, F, slots, n_memory, n_scores, NORMS[norm], MLPS[mlp],
                 kind == "model.PostNormBlock")
        pointers = [buffer.data_ptr() for buffer in self.buffers.values()]
        self.struct = Trunk(self.blocks, layer(trunk.ln_f), None, *pointers, *sizes, first.ln_1.eps)
        self.rows, self.slots = B, slots
        self.decode = library(self.dtype).decode
        self.decode.argtypes, self.decode.restype = [c_void_p] * 5 + [c_int] * 5, None

    def step(self, x, rope, start):
        """Returns the trunk's output for x, both (B, T, C). Writes keys and values into the caches from slot `start`.

        rope: (cos, sin), each (1, D), (T, D) or (B, 1, T, D); or None.
        """
        assert x.size(0) == self.rows and start + x.size(1) <= self.slots, \
            f"{x.size(0)} rows up to position {start + x.size(1)}: the caches have {self.rows} rows of {self.slots}"
        length = self.max_tokens // x.size(0)
        if x.size(1) > length:
            outputs = []
            for t in range(0, x.size(1), length):
                part_rope = rope and [table[..., t:t + length, :] for table in rope]
                outputs.append(self.step(x[:, t:t + length], part_rope, start + t))
            return torch.cat(outputs, dim=1)
        pointers = (None, None, 0)
        if rope:
            cos, sin = (table.float().contiguous() for table in rope)
            pointers = (cos.data_ptr(), sin.data_ptr(), cos.numel() // cos.size(-1))
        threads = torch.get_num_threads() if self.weights * x.size(0) * x.size(1) >= THREADS_FROM else 1
        given = x.to(self.dtype).contiguous()
        output = torch.empty_like(given)
        self.decode(ctypes.byref(self.struct), output.data_ptr(), given.data_ptr(), *pointers, *x.shape[:2], start,
                    threads)
        return output.to(x.dtype)


def layer(module):
    """The addresses of a module's weight and bias, NULL if missing. module may be None."""
    parts = (getattr(module, name, None) for name in ("weight", "bias"))
    return Layer(*(None if part is None else part.data_ptr() for part in parts))


def block(module, cache, memory):
    """The addresses of a block's layers, its cache, and its keys and values of the memory, () without one."""
    layers = dict(child for part in (module, module.attn, module.mlp) for child in part.named_children())
    if memory:
        layers |= {f"cross_{name}": child for name, child in module.cross_attn.named_children()}
    tensors = (cache.k, cache.v, *memory)
    return Block(*(layer(layers.get(name)) for name in Block.LAYERS), *(part.data_ptr() for part in tensors))
