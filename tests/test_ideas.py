"""ideas/: every patch is small, applies to the code as it is, and trains; versus compares the code with and without."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import UserError
from tools import versus

FOLDER = versus.ROOT / "ideas"
PATCHES = sorted(FOLDER.glob("*.patch"))
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
# In the folder of a changed code: the gradient is finite, and no cached step differs from the pass without a cache.
CHECK = """
from model import GPT, GPTConfig, init_weights
model = GPT(GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, block_size=12, positions="rotary")).eval()
init_weights(model, torch.Generator().manual_seed(1), std=0.3)
tokens = torch.randint(65, (2, 12), generator=torch.Generator().manual_seed(2))
model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
with torch.no_grad():
    whole, caches = model.hidden(tokens), model.make_caches(2)
    parts = [model.hidden(tokens[:, :5], caches), model.hidden(tokens[:, 5:8], caches, 5)]
    parts += [model.hidden(tokens[:, i:i + 1], caches, i) for i in range(8, 12)]
torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
import train
from configurator import parse
assert train.__file__.startswith(folder)
train.main(*parse(train.Settings, [*words, f"--out_dir={folder}/run"], **train.HOW))
"""
# One process for all folders, as importing PyTorch takes longest: each has modules of its own.
EACH = """
import os, sys, torch
check, words, *folders = sys.argv[1:]
for folder in folders:
    print("changed code in", folder, file=sys.stderr)
    os.chdir(folder)
    sys.path[0] = folder
    exec(check, {"torch": torch, "folder": folder, "words": words.split()})
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]
"""


def changed_lines(patch):
    return [line for line in patch.read_text(encoding="utf-8").splitlines() if re.match(r"[+-](?!\+\+|--)", line)]


def test_there_are_eight_and_the_page_has_each():
    assert len(PATCHES) == 8
    assert re.findall(r"^## `(\w+)`", PAGE, re.MULTILINE) == re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)
    assert set(re.findall(r"^## `(\w+)`", PAGE, re.MULTILINE)) == {path.stem for path in PATCHES}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patch_is_small_and_applies(patch, tmp_path):
    assert 0 < len(changed_lines(patch)) <= 25
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # as out/ lies within a repository
    versus.patched_copy(str(patch), tmp_path / "code")
    assert (tmp_path / "code" / "model.py").read_bytes() != (versus.ROOT / "model.py").read_bytes()
    assert (tmp_path / "code" / "machine" / "decode.c").exists()


@pytest.mark.slow
def test_the_changed_code_trains(tmp_path, tiny):
    folders = [tmp_path / patch.stem / "code" for patch in PATCHES]
    for patch, folder in zip(PATCHES, folders):
        versus.patched_copy(str(patch), folder)
    words = " ".join(f"--{name}={value}" for name, value in (tiny | {"max_iters": 4, "eval_interval": 4}).items())
    subprocess.run([sys.executable, "-c", EACH, CHECK, words, *folders], check=True)
    code = set()
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 4 and rows[-1]["val_loss"] < 5
        code.add(str(json.loads((folder / "run" / "last" / "config.json").read_text())["code"]))
    assert len(code) == len(PATCHES)  # each was trained by code of its own


PATCH = """--- a/model.py
+++ b/model.py
@@ -1,1 +1,1 @@
-{}
+# changed
"""


def test_a_patch_that_does_not_apply_is_one_line(tmp_path):
    patch, code = tmp_path / "x.patch", tmp_path / "code"
    for text, match in ((PATCH.format("not there"), "does not apply to the code as it is: patch failed: model.py:1 "),
                        ("nothing", "does not apply to the code as it is: No valid patches")):
        patch.write_text(text)
        with pytest.raises(UserError, match=match):
            versus.patched_copy(str(patch), code)  # the second time, in place of the first copy
    with pytest.raises(UserError, match="no.patch: can't be read"):
        versus.main([""], [], versus.Settings(out=str(tmp_path / "out"), patch=str(tmp_path / "no.patch")))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine is in the way"):
        versus.patched_copy(str(patch), tmp_path / "mine")
    assert not (tmp_path / "out").exists()


def test_a_patch_that_failed_makes_room_for_the_next(tmp_path, monkeypatch, capsys):
    trained = []

    def train(words, seed, folder, max_iters):
        code = Path(words[0]).with_name("extra.py")
        trained.append(f"{folder.parent.name}, {code.read_text().strip() if code.exists() else 'as it is'}")
        folder.mkdir(parents=True, exist_ok=True)
        if "x = 1" in trained[-1]:
            raise UserError("failed")
        rows = [{"step": step, "ms": 1.0, "loss": 2.0, "val_loss": 2.0 + step / 10} for step in (10, 20)]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def compare(change):
        patch.write_text(f"--- /dev/null\n+++ b/extra.py\n@@ -0,0 +1 @@\n+{change}\n")
        versus.main([" --max_iters=20"], [], versus.Settings(seeds=1, out=str(out), patch=str(patch)))

    monkeypatch.setattr(versus, "train", train)
    patch, out = tmp_path / "x.patch", tmp_path / "out 1"
    with pytest.raises(UserError, match="failed"):
        compare("x = 1")
    compare("x = 2")
    shown = capsys.readouterr().out
    assert trained == ["a, as it is", "b, x = 1", "a, as it is", "b, x = 2"] and "\u00b1" not in shown
    assert f"python '{out}/code/sample.py' '--out_dir={out}/b/seed1'" in shown
    with pytest.raises(UserError, match="with another patch: .* --out=NEW, or delete .*b to train b anew"):
        compare("x = 3")
    shutil.rmtree(out / "b")
    compare("x = 3")
    assert trained[-1] == "b, x = 3"


@pytest.mark.slow
def test_versus_trains_b_with_the_patch_and_goes_on(tmp_path, tiny, capsys):
    patch, out = tmp_path / "x.patch", tmp_path / "out"
    text = (FOLDER / "parallel_blocks.patch").read_text(encoding="utf-8")
    patch.write_text(text, encoding="utf-8")
    recipe = " " + " ".join(f"--{name}={value}" for name, value in (tiny | {"eval_interval": 10}).items())
    versus.main([recipe], ["--max_iters=20"], versus.Settings(seeds=1, out=str(out), patch=str(patch)))
    assert f"with {patch}" in capsys.readouterr().out
    code = {name: json.loads((out / name / "seed1/last/config.json").read_text())["code"] for name in "ab"}
    assert {name for name in code["a"] if code["a"][name] != code["b"][name]} >= {"model.Block"}
    logs = {path: path.stat().st_mtime_ns for path in out.glob("*/seed1/log.jsonl")}
    versus.main([recipe], ["--max_iters=20"], versus.Settings(seeds=1, out=str(out), patch=str(patch)))
    assert len(logs) == 2 and all(path.stat().st_mtime_ns == time for path, time in logs.items())
    for changed, match in ((text.replace("which read", "that read"), "another patch"), ("", "x.patch: is empty")):
        patch.write_text(changed, encoding="utf-8")
        with pytest.raises(UserError, match=match):
            versus.main([recipe], ["--max_iters=20"], versus.Settings(out=str(out), patch=str(patch)))
    patch.write_text(text, encoding="utf-8")
    (out / "code" / "model.py").write_text("# as if the code had been other then\n")
    with pytest.raises(UserError, match="the code has changed since .*code was made"):
        versus.main([recipe], ["--max_iters=20"], versus.Settings(out=str(out), patch=str(patch)))
    assert not (out / "code.new").exists() and (out / "code" / "model.py").read_text().startswith("# as if")
    with pytest.raises(UserError, match="another patch"):
        versus.main([recipe] * 2, ["--max_iters=20"], versus.Settings(out=str(out)))
