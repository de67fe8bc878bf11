"""What this machine has: device, precision, compilation, peak speed, peak memory.

The "auto" of --device, --dtype and --compile is resolved here; for the last two with a reason, which the run prints.
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

# Peak FLOP/s of dense 16-bit matrix products, from the vendors' data sheets. The first name that matches counts.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A40": 150e12,
              "A10": 125e12, "A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}

COMPILE_MIN_FLOPS = 1e16  # of a whole run on CUDA: fewer don't repay the 17 s of compiling. It saves 2e-15 s per FLOP


def has_accelerator(name="auto"):
    return pick_device(name).type != "cpu"


def pick_device(name="auto"):
    """The torch.device of a name such as "cpu" or "cuda:1"; "auto" is CUDA, else MPS, else the CPU.

    Raises UserError if this machine lacks the device.
    """
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    with contextlib.suppress(RuntimeError, AssertionError, ImportError):
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs belong to the current one
        if device.type in ("cuda", "mps") or name == "cpu":  # PyTorch's other devices are untested
            return device
    raise UserError(f"device = {name}: this machine has no such device; use --device=auto or cpu")


def pick_dtype(name, device):
    """Returns (torch dtype, reason in words). "auto": bfloat16 where it is fast, else float16 on CUDA, else float32.

    Raises UserError for float16 without CUDA: it needs gradient scaling, which Quill does on CUDA alone.
    """
    if name == "float16" and device.type != "cuda":
        raise UserError(f"dtype = float16 needs a CUDA device, not {device.type}: use --dtype=float32 or bfloat16")
    if name != "auto":
        slow = name == "bfloat16" and device.type == "cpu" and emulates_bfloat16()
        return DTYPES[name], "as set; this CPU is many times slower at it than at float32" if slow else "as set"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU supports it"
        return torch.float16, "with gradient scaling: this GPU lacks bfloat16"
    if device.type == "cpu" and has_amx():
        return torch.bfloat16, "this CPU has AMX"
    return torch.float32, f"the safe choice on {device.type}"


def weights_dtype(name, device):
    """The dtype in which a trained model is loaded; "auto" is bfloat16 on a GPU that supports it, else float32."""
    if name == "auto":
        supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if supported else "float32"
    return DTYPES[name]


def cpu_supports(feature):
    """True if this CPU has an instruction set, such as "amx_tile"; False where PyTorch can't tell."""
    probe = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return bool(probe and probe())


def has_amx():
    return cpu_supports("amx_tile")


def emulates_bfloat16():
    """True unless PyTorch finds AMX or AVX-512 instructions for bfloat16 on this CPU. Thus True on every Arm CPU."""
    return not (has_amx() or cpu_supports("avx512_bf16"))


def pick_compile(choice, device, flops):
    """(whether to compile, reason in words). "auto": on CUDA with Triton, if it repays. flops: of the run; 0: unknown,
    or its shapes vary, for each of which code would be compiled anew."""
    if choice != "auto":
        return choice, "as set"
    if device.type == "cuda" and has_triton():
        return flops >= COMPILE_MIN_FLOPS, f"it pays off from {COMPILE_MIN_FLOPS:.0e} FLOPs on, if shapes repeat"
    return False, {"cpu": "no faster on a CPU", "cuda": "Triton is not installed"}.get(device.type, "untested here")


def has_triton():
    return importlib.util.find_spec("triton") is not None


def autocast(device, dtype):
    """A context in which PyTorch computes matrix products in a 16-bit dtype; for float32, one that does nothing."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def device_name(device):
    """The name of the GPU on CUDA, else that of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return re.search(r"model name\s*: (.*)|$", file.read())[1] or platform.processor()
    return platform.processor()


def prepare_kernels(device, dtype, fixed_shapes):
    """Sets what PyTorch chooses its kernels by, for a run in which all batches have the same shapes, or not."""
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(fixed_shapes)  # see `cudnn_attention`
        if dtype == torch.float32:
            torch.set_float32_matmul_precision("high")  # TF32: products of 11-bit factors, several times as fast


@contextlib.contextmanager
def cudnn_attention(allowed):
    """A context in which attention on CUDA may use cuDNN, or not. It is fast, but must plan each new shape."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def keep_freed_memory():
    """Tells glibc to keep freed memory for the next update; does nothing with another C library.

    By default, glibc returns the memory of large tensors to the system. Every update must then request that memory
    again, page by page, which takes 6 to 8 % of a small model's update.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that stay free at the heap's end
        mallopt(-4, 0)  # M_MMAP_MAX: how many tensors get a memory mapping of their own


def synchronize(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def peak_flops(device, dtype):
    """Peak matrix-multiply speed in FLOP/s: a known GPU's at 16 bits, from the table; measured on a CPU; else None."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAK_FLOPS.items():
            if re.search(rf"\b{key}\b(?! Laptop)", name):
                return peak
    if device.type != "cpu":
        return None
    small = mm_flops(256, dtype)
    return small if small < 1e10 else mm_flops(1024, dtype)  # takes seconds on a CPU that is slow at this dtype


def mm_flops(n, dtype):
    """FLOP/s of a product of two n x n matrices on the CPU, the best of six."""
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    best = float("inf")
    for _ in range(6):  # the first is a warm-up
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(device):
    """The most bytes that this process has held so far: of GPU memory on CUDA, else of main memory; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
