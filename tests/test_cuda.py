"""On a GPU, cached and captured steps, captured, compiled and resumed runs give the same numbers, up to rounding.

    python -m pytest -m gpu                  skipped without an NVIDIA GPU

The tests run in processes of their own, because conftest.py hides the GPUs from this one.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import GPUS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.gpu,
              pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no NVIDIA GPU")]

BEGIN = """
import functools
import torch
from generate import generate, pick_tokens
from machine import capture
from model import GPT, GPTConfig, init_weights

FAST = dict(positions="rotary", mlp="relu2", bigrams=True, tied=False, n_kv_head=2)

def new(**changes):
    model = GPT(GPTConfig(block_size=64, **changes))
    init_weights(model, torch.Generator().manual_seed(0), std=0.1)
    return model.cuda().eval()

def written(model, tokens, count, seed=1, eos=None, **context):
    pick = functools.partial(pick_tokens, generator=torch.Generator("cuda").manual_seed(seed))
    return torch.stack([chosen.cpu() for chosen in generate(model, tokens, count, pick, eos, **context)], dim=1)

def refuse(line):
    raise AssertionError(line)

capture.say = refuse  # no notice that a step can't be captured

def eager(*args, **more):  # the same, but recording fails, so each kernel is launched by itself
    real, notices = capture.record, []
    def fail(*_, **__):
        raise RuntimeError("no capture today")
    capture.record, capture.say = fail, notices.append
    try:
        found = written(*args, **more)
    finally:
        capture.record, capture.say = real, refuse
    assert len(notices) == 1
    return found

tokens = torch.randint(65, (3, 40), generator=torch.Generator().manual_seed(0)).cuda()
"""


def on_gpu(*arguments, folder=ROOT):
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if GPUS != "all":
        environment["CUDA_VISIBLE_DEVICES"] = GPUS
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check(code):
    on_gpu("-c", BEGIN + textwrap.dedent(code))


def test_cached_logits_equal_uncached_ones_with_positions_as_ints_and_as_tensors():
    check("""
        for changes in ({}, FAST):
            model, more = new(**changes), torch.randint(65, (3, 24), generator=torch.Generator().manual_seed(1)).cuda()
            text = torch.cat((tokens, more), dim=1)
            with torch.inference_mode():
                expected, caches = model(text), model.make_caches(3)
                found = [model.logits(model.hidden(text[:, :40], caches, 0))]
                for t in range(40, 64):
                    start = t if t < 50 else torch.tensor([t], device="cuda")
                    found.append(model.logits(model.hidden(text[:, t:t + 1], caches, start)))
            torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-3, rtol=2e-3)
        """)


def test_captured_steps_write_what_eager_ones_write_and_a_seed_decides():
    check("""
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        for changes in ({}, FAST):
            model = new(**changes)
            for eos in (None, 7):
                found = written(model, tokens, 100, eos=eos)  # beyond the end of the window
                assert torch.equal(found, eager(model, tokens, 100, eos=eos)), (changes, eos)
                assert torch.equal(found, written(model, tokens, 100, eos=eos))
                assert not torch.equal(found, written(model, tokens, 100, seed=2, eos=eos))
            assert written(model.bfloat16(), tokens, 100).shape == (3, 100)
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
        """)


def test_a_recorded_step_reads_weights_that_have_changed():
    check("""
        model = new()
        with torch.inference_mode():
            caches, seen = model.make_caches(3), torch.zeros(3, 65, device="cuda")
            model.hidden(tokens, caches, 0)
            def step(tokens, start):
                seen.copy_(model.logits(model.hidden(tokens, caches, start))[:, -1])
                return seen.argmax(-1)
            captured = capture.CapturedStep(step, caches, None, 3)
            for factor in (1.0, 1.5, 0.5):
                model.wte.weight *= factor
                captured.next = None  # as if the window had been encoded again
                captured(tokens[:, :1], 40)
                found = seen.clone()
                step(tokens[:, :1], 40)
                assert captured.graph
                torch.testing.assert_close(found, seen, atol=1e-3, rtol=1e-3)
        """)


def test_compiled_steps_compute_what_others_do_and_are_captured():
    check("""
        for changes in ({}, FAST):
            model = new(**changes)
            expected, plain = written(model, tokens, 20), model.hidden
            capture.compile_steps(model, tokens.device)
            with torch.inference_mode():
                found = []
                for hidden in (model.hidden, plain):
                    caches, start = model.make_caches(3), torch.tensor([40], device="cuda")
                    model.hidden(tokens, caches, 0)
                    found.append(model.logits(hidden(tokens[:, :1], caches, start)))
                torch.testing.assert_close(*found, atol=2e-3, rtol=2e-3)
            assert (written(model, tokens, 20) == expected).float().mean() > 0.9  # rounding may tip a draw
        """)


def test_a_step_that_waits_for_the_gpu_is_not_captured_and_still_right():
    check("""
        notices = []
        capture.say = notices.append
        class Waiting(GPT):
            def hidden(self, *args, **more):
                return super().hidden(*args, **more) * max(1, self.wte.weight.isnan().sum().item())
        model = Waiting(GPTConfig(block_size=64)).cuda().eval()
        init_weights(model, torch.Generator().manual_seed(0), std=0.1)
        found = written(model, tokens, 50)
        assert len(notices) == 1 and "can't be captured" in notices[0], notices
        assert torch.equal(found, eager(model, tokens, 50))
        assert torch.rand(3, device="cuda").shape == (3,)
        """)


def test_captured_steps_after_an_image_and_of_a_translator():
    check("""
        from seq2seq import Seq2Seq, Seq2SeqConfig
        from vit import ViTConfig, init_parts
        from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig
        vision = ViTConfig(n_layer=1, n_head=2, n_embd=32, image_size=28, patch_size=14)
        text = GemmaConfig(n_layer=2, n_head=4, n_kv_head=1, n_embd=32, head_dim=16, n_hidden=64, vocab_size=65,
                           block_size=64)
        model = PaliGemma(PaliGemmaConfig(vision, text))
        init_parts(model, torch.Generator().manual_seed(0))
        model.cuda().eval()
        with torch.inference_mode():
            image = model.encode(torch.rand(3, 3, 28, 28, device="cuda"))
        padding = torch.tensor([0, 3, 5], device="cuda")
        for more in (dict(image=image), dict(image=image, padding=padding)):
            assert torch.equal(written(model, tokens[:, :9], 30, **more), eager(model, tokens[:, :9], 30, **more))
        model = Seq2Seq(Seq2SeqConfig(n_layer=2, n_embd=32, block_size=64))
        init_weights(model, torch.Generator().manual_seed(0), std=0.2)
        model.cuda().eval()
        with torch.inference_mode():
            context = model.encode(tokens, torch.tensor([40, 30, 20], device="cuda"))
        start = torch.ones(3, 1, dtype=torch.long, device="cuda")
        assert torch.equal(written(model, start, 30, **context), eager(model, start, 30, **context))
        """)


@pytest.mark.parametrize("changes", [{}, dict(optimizer="muon", mlp="relu2", positions="rotary")])
def test_captured_compiled_and_resumed_runs_have_the_same_losses(tmp_path, tiny, changes):
    """With dropout, up to rounding: the fused kernels add up gradients in no fixed order. Compiled code draws other
    numbers for dropout and rounds elsewhere, so it is compared without, and less exactly."""
    values = {**tiny, **changes, "device": "cuda", "dropout": 0.2, "log_interval": 1, "micro_batch_size": 4}

    def run(name, **more):
        arguments = [f"--{name}={value}" for name, value in {**values, **more}.items()]
        printed = on_gpu("train.py", *arguments, f"--out_dir={tmp_path / name}")
        assert ("capture: True" in printed) == more.get("capture", True), printed[:2000]

    def losses(name):
        rows = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows]

    run("captured")
    run("plain", capture=False)
    run("parts", max_iters=20, lr_decay_iters=40)
    on_gpu("train.py", "--resume", "--max_iters=40", f"--out_dir={tmp_path / 'parts'}")
    for other in ("plain", "parts"):
        assert losses(other) == pytest.approx(losses("captured"), abs=2e-3)
    run("eager", dropout=0.0, capture=False)
    run("compiled", dropout=0.0, compile=True)
    assert losses("compiled") == pytest.approx(losses("eager"), abs=1e-2)
