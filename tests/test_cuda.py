"""On a GPU, cached steps, resumed runs and compiled runs give the same numbers, up to rounding. Skipped without one.

They run in processes of their own, because conftest.py hides the GPUs from this one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GPUS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no NVIDIA GPU")]

CACHES = """
import torch
from generate import generate, pick_tokens
from model import GPT, GPTConfig, init_weights
for changes in ({}, dict(positions="rotary", mlp="relu2", bigrams=True, tied=False, n_kv_head=2)):
    model = GPT(GPTConfig(block_size=64, **changes))
    init_weights(model, torch.Generator().manual_seed(0), std=0.1)
    model.cuda().eval()
    tokens = torch.randint(65, (3, 64), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        expected, caches = model(tokens), model.make_caches(3)
        found = [model.logits(model.hidden(tokens[:, :40], caches, 0))]
        for t in range(40, 64):
            start = t if t < 50 else torch.tensor([t], device="cuda")
            found.append(model.logits(model.hidden(tokens[:, t:t + 1], caches, start)))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-3, rtol=2e-3)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    assert len(list(generate(model, tokens[:, :40], 30, pick_tokens))) == 30
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
"""


def on_gpu(*arguments, folder=ROOT):
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if GPUS is not None:
        environment["CUDA_VISIBLE_DEVICES"] = GPUS
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cached_logits_equal_uncached_ones_with_positions_as_ints_and_as_tensors():
    on_gpu("-c", CACHES)


def test_a_run_resumes_and_compiles_to_the_same_losses(tmp_path, tiny):
    """Up to rounding: the fused kernels add up gradients in no fixed order."""
    values = {**tiny, "device": "cuda", "dropout": 0.0, "log_interval": 1}
    arguments = [f"--{name}={value}" for name, value in values.items()]

    def losses(name):
        rows = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows]

    on_gpu("train.py", *arguments, f"--out_dir={tmp_path / 'whole'}")
    on_gpu("train.py", *arguments, "--max_iters=20", "--lr_decay_iters=40", f"--out_dir={tmp_path / 'parts'}")
    on_gpu("train.py", "--resume", "--max_iters=40", f"--out_dir={tmp_path / 'parts'}")
    on_gpu("train.py", *arguments, "--compile=True", f"--out_dir={tmp_path / 'compiled'}")
    for other in ("parts", "compiled"):
        assert losses(other) == pytest.approx(losses("whole"), abs=2e-3)
