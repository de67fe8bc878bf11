"""What this machine has, and what to make of it: device, precision, compilation, peak speed.

Every setting that may be "auto" is resolved here, once, with the reason in words for the run to print.
"""

import contextlib
import ctypes
import importlib.util
import platform
import re
import sys
import time

import torch

from configurator import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense 16-bit tensor-core peaks in FLOP/s, without sparsity, from the makers' data sheets.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A40": 150e12,
              "A10": 125e12, "A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}

CUDA_COMPILE_MIN_UPDATES = 1000  # about a minute of compiling to repay: an estimate, not measured


def has_accelerator(name="auto"):
    return pick_device(name).type != "cpu"


def pick_device(name="auto"):
    """torch.device for "auto" (CUDA, else MPS, else CPU) or for an explicit name such as "cpu" or "cuda:1".

    Raises UserError where this machine lacks the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else
                            "mps" if torch.backends.mps.is_available() else "cpu")
    with contextlib.suppress(RuntimeError, AssertionError, ImportError):
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type in ("cuda", "mps") or name == "cpu":  # what else PyTorch knows is untried
            return device
    raise UserError(f"device = {name}: this machine has no such device; use --device=auto or cpu")


def pick_dtype(name, device):
    """(dtype, why) for "auto", "float32", "bfloat16" or "float16".

    Raises UserError for float16 anywhere but on CUDA: only there are its gradients scaled.
    """
    if name == "float16" and device.type != "cuda":
        raise UserError(f"dtype = float16 needs a CUDA device, not {device.type}: use --dtype=float32 or bfloat16")
    if name != "auto":
        slow = name == "bfloat16" and device.type == "cpu" and emulates_bfloat16()
        return DTYPES[name], "as set" + "; this CPU is many times slower at it than at float32" * slow
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has it"
        return torch.float16, "with gradient scaling: this GPU lacks bfloat16"
    if device.type == "cpu" and has_amx():
        return torch.bfloat16, "this CPU has AMX"
    return torch.float32, f"the safe choice on {device.type}"


def weights_dtype(name, device):
    """The dtype that a trained model is loaded in; "auto": bfloat16 where a GPU has it, else float32."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return DTYPES[name if name != "auto" else "bfloat16" if has_it else "float32"]


def has_amx(probe="_is_amx_tile_supported"):
    """Whether this CPU has AMX, or what another of torch.cpu's probes finds."""
    probe = getattr(torch.cpu, probe, None)
    return bool(probe and probe())


def emulates_bfloat16():
    """Whether this CPU has no instructions for products in bfloat16."""
    return not (has_amx() or has_amx("_is_avx512_bf16_supported"))


def pick_compile(choice, device, updates):
    """(compile?, why) for "auto", True or False; updates: how many the run has to repay the start-up."""
    if choice != "auto":
        return choice, "as set"
    if device.type == "cuda" and has_triton():
        return updates >= CUDA_COMPILE_MIN_UPDATES, f"it pays from {CUDA_COMPILE_MIN_UPDATES} updates on"
    return False, {"cpu": "no faster on a CPU", "cuda": "Triton is not installed"}.get(device.type, "unproven here")


def has_triton():
    return importlib.util.find_spec("triton") is not None


def autocast(device, dtype):
    """Matrix products in a 16-bit dtype, all else in float32; nothing at all for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return re.search(r"model name\s*: (.*)|$", file.read())[1] or platform.processor()
    return platform.processor()


def keep_freed_memory():
    """Has the C library keep what is freed for the next update, on Linux with glibc; elsewhere nothing happens.

    Otherwise large tensors go back to the system and come again page by page, 6 to 8 % of a small model's update.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what may be free at the top of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: tensors with a mapping of their own


def synchronize(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def peak_flops(device, dtype):
    """Peak matrix-multiply speed in FLOP/s: from the table for a known GPU, measured on a CPU, else None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = (peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b(?! Laptop)", name))
        return next(known, None) if dtype != torch.float32 else None
    if device.type != "cpu":
        return None
    small = mm_flops(256, dtype)
    return small if small < 1e10 else mm_flops(1024, dtype)  # which would take a CPU slow at this dtype ten seconds


def mm_flops(n, dtype):
    """FLOP/s of a product of two n x n matrices on the CPU, the best of a few."""
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    best = float("inf")
    for _ in range(6):  # the first is a warm-up
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(device):
    """Most bytes this process has held so far: of the GPU's memory on CUDA, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
