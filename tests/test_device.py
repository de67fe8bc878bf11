"""Device, dtype and compilation are chosen for the machine, and its peak speed is known."""

import pytest
import torch

from configurator import UserError
from machine import device as devices

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_picks_a_gpu_if_there_is_one(monkeypatch):
    assert devices.pick_device() == CPU and not devices.has_accelerator()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.pick_device() == CUDA and devices.has_accelerator()


@pytest.mark.parametrize("name", ["cuda:7", "gpu", ""])
def test_a_missing_device_is_named(name):
    with pytest.raises(UserError, match=f"device = {name}: this machine has no such device"):
        devices.pick_device(name)


def test_auto_picks_the_best_dtype_that_the_hardware_supports(monkeypatch):
    for amx, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        assert devices.pick_dtype("auto", CPU)[0] == expected
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, bf16=bf16: bf16)
        assert devices.pick_dtype("auto", CUDA)[0] == expected
    assert devices.pick_dtype("auto", torch.device("mps"))[0] == torch.float32
    for avx, expected in ((True, "as set"), (False, "as set; this CPU is many times slower at it than at float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx, raising=False)
        assert devices.pick_dtype("bfloat16", CPU) == (torch.bfloat16, expected)
    with pytest.raises(UserError, match="dtype = float16 needs a CUDA device, not cpu"):
        devices.pick_dtype("float16", CPU)


def test_auto_compiles_only_if_that_pays_off(monkeypatch):
    monkeypatch.setattr(devices, "has_triton", lambda: True)
    assert devices.pick_compile("auto", CUDA, 2e16)[0] and not devices.pick_compile("auto", CUDA, 5e15)[0]
    monkeypatch.setattr(devices, "has_triton", lambda: False)
    assert devices.pick_compile("auto", CUDA, 2e16) == (False, "Triton is not installed")
    assert not devices.pick_compile("auto", CPU, 1e20)[0] and devices.pick_compile(True, CPU, 1)[0]


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA A10G", 70e12), ("NVIDIA A10", 125e12), ("NVIDIA RTX A4000", None), ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)])
def test_a_gpus_peak_is_found_by_its_whole_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert devices.peak_flops(CUDA, torch.bfloat16) == peak
    assert devices.peak_flops(CUDA, torch.float32) is None


def test_the_cpus_peak_is_measured():
    assert 1e9 < devices.peak_flops(CPU, torch.float32) < 1e14
