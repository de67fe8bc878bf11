"""Tasks with images on a small data set of shapes: they learn, resume, divide their batches, start from other runs.

At the end, a language model of one class and one row in a table.
"""

import dataclasses
import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import settings_for
from test_train import resume

import evaluate
import sample
import tokenizer as tokenizers
import train
from configurator import UserError, parse
from machine.distributed import World
from model import predict
from optimizer import freeze, make_optimizers
from published import paligemma
from run import checkpoint, pictures
from sources import images
from tasks import text as text_task
from tasks.contrastive import ContrastiveTask
from tasks.image_text import ImageTextTask
from tasks.loading import initial, load
from tasks.settings import Vision
from tokenizer import BPETokenizer
from vit import ViTConfig, init_parts
from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The folder of a small prepared set of shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    runpy.run_path(str(ROOT / "data" / "shapes" / "generate.py"))["generate"](folder / "source", images=60)
    images.prepare(folder / "source", folder / "ready", "char", image_size=32)
    return folder / "ready"


@pytest.fixture(scope="module")
def small(shapes):
    return dict(dataset=str(shapes), vision=Vision(n_layer=1, n_head=2, n_embd=32, patch_size=16), n_layer=1,
                n_head=2, n_embd=32, block_size=128, batch_size=8, max_iters=12, warmup_iters=2, learning_rate=3e-3,
                eval_interval=6, log_interval=3, device="cpu", dtype="float32")


KINDS = {"contrastive": dict(learning_rate=1e-3), "image-text": dict(n_kv_head=1)}  # the settings of one task alone


def run(out_dir, small, task, **changes):
    train.main(settings_for(task, **{**small, **KINDS[task], **changes}, out_dir=str(out_dir)), changes)
    return log(out_dir)


def log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def opened(folder, dataset):
    """(task, model) of a checkpoint, with the data set open for an evaluation."""
    task, model, _ = load(folder)
    task.open(Path(dataset), ALONE)
    task.fit(model)
    return task, model


def losses(rows):
    return [(row["step"], row["loss"], row.get("val_loss")) for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small):
    """{task: out directory of a finished run}."""
    folders = {task: tmp_path_factory.mktemp("runs") / task for task in KINDS}
    for task, folder in folders.items():
        run(folder, small, task)
    return folders


@pytest.mark.parametrize("task, changes", [("contrastive", dict(dropout=0.1)),
                                           ("image-text", dict(dropout=0.1, micro_batch_size=3))])
def test_a_resumed_run_equals_an_undisturbed_one(task, changes, small, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", small, task, **changes)
    real = train.update

    def dies(*args):
        if args[2] == 9:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update", dies)
        run(tmp_path / "parts", small, task, **changes)
    resume(tmp_path / "parts")
    assert losses(log(tmp_path / "parts")) == losses(whole) and whole[-1]["loss"] < whole[0]["loss"]
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_the_micro_batch_size_does_not_change_the_weight_of_an_answer(runs, small, tmp_path):
    found, whole = run(tmp_path, small, "image-text", micro_batch_size=3), log(runs["image-text"])
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in whole], abs=1e-4)


@pytest.mark.slow
def test_two_workers_score_pairs_as_one_worker_does(runs, small, tmp_path):
    """Half of the run is made by two workers; one worker resumes it."""
    values = {**small, **KINDS["contrastive"], "task": "contrastive", "out_dir": str(tmp_path)}
    vision = values.pop("vision")
    arguments = [f"--{name}={value}" for name, value in values.items()]
    arguments += [f"--vision.{name}={value}" for name, value in vars(vision).items()]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    str(ROOT / "train.py"), *arguments, "--max_iters=6", "--lr_decay_iters=12"],
                   check=True, capture_output=True, timeout=120)
    resume(tmp_path, "--max_iters=12")
    for a, b in zip(log(tmp_path), log(runs["contrastive"]), strict=True):
        for name, rounding in (("loss", 1e-4), ("val_loss", 1e-4), ("grad_norm", 1e-3)):
            assert a.get(name) == pytest.approx(b.get(name), abs=rounding)


def test_the_val_loss_is_the_mean_over_all_scored_tokens(runs, shapes):
    task, model = opened(runs["image-text"] / "last", shapes)
    total = count = 0
    for i in range(len(task.data["val"].images)):
        arguments, weights = task.gather(task.data["val"], np.array([i]))
        total, count = total + (model(**arguments) * weights).sum().item(), count + weights.sum().item()
    assert checkpoint.read_config(runs["image-text"] / "last")["val_loss"] == pytest.approx(total / count, abs=1e-4)
    assert task.evaluate(model, "val", ALONE, torch.float32)["loss"] == pytest.approx(total / count, abs=1e-4)


def test_evaluation_counts_exact_answers_with_and_without_the_image(runs, monkeypatch):
    def scripted(self, model, rows, blank=False):
        return [row["answer"] if not blank and row["kind"] != "count" else "no" for row in rows]

    monkeypatch.setattr(ImageTextTask, "answers", scripted)
    evaluate.main(settings_for("image-text", "evaluating", out_dir=str(runs["image-text"]), device="cpu"))
    found = json.loads((runs["image-text"] / "evaluation.json").read_text())
    assert found["exact colour"] == found["box IoU detect"] == 1 and found["exact count"] == 0
    assert found["exact colour (image blanked)"] == 0 and 0 < found["exact"] < 1


def test_greedy_answers_do_not_depend_on_the_other_rows_of_the_batch(runs, shapes):
    task, model = opened(runs["image-text"] / "last", shapes)
    rows = task.dataset.rows["val"][:6]
    together = task.answers(model, rows)
    assert together == [task.answers(model, [row])[0][:len(a)] for row, a in zip(rows, together)]


def test_the_command_that_a_run_suggests_works_and_fits_its_data(runs, shapes, tmp_path, capsys):
    picture = shapes.parent / "source" / "images" / "00000.png"
    for folder in runs.values():
        line = opened(folder / "last", shapes)[0].command(f"{tmp_path}/a b").replace("FILE", str(picture))
        python, script, *arguments = shlex.split(line)
        assert (python, script) == ("python", "sample.py") and arguments[0] == f"--out_dir={tmp_path}/a b"
        arguments[0] = f"--out_dir={folder}"
        sample.main(parse(sample.Settings, arguments, **sample.HOW)[0])
        assert capsys.readouterr().out
    prompts = {row["prompt"] for row in opened(runs["image-text"] / "last", shapes)[0].dataset.rows["val"]}
    assert arguments[2].removeprefix("--prompt=") in prompts


def test_what_is_shown_at_an_evaluation_is_short(runs, shapes, trained):
    shown = {}
    for task, folder in runs.items():
        its_task, model = opened(folder / "last", shapes)
        shown[task] = [its_task.show(model, short) for short in (False, True)]
    assert [text.count("\n") for text in shown["image-text"]] == [9, 2]
    assert "retrieval" in shown["contrastive"][0] and not shown["contrastive"][1]
    task, model, _ = load(trained)
    task.settings.sample_tokens = 150
    assert [len(task.show(model, short)) for short in (False, True)] == [150, 100]


def test_init_from_takes_the_folder_of_a_run_or_of_a_checkpoint(runs, small, trained, tiny):
    for folder, settings in ((trained, settings_for("text", **tiny)),
                             *((folder, settings_for(task, **small)) for task, folder in runs.items())):
        for name in ("", "best", "last"):
            model, found = initial(dataclasses.replace(settings, init_from=str(Path(folder) / name)), "cpu")
            expected = checkpoint.load(Path(folder) / (name or "best")).state
            torch.testing.assert_close(dict(model.state_dict()), expected, atol=0, rtol=0)
            assert found["tokenizer"].vocab_size


def test_a_limit_below_one_row_scores_one_row(runs, shapes):
    for folder in runs.values():
        task, model = opened(folder / "last", shapes)
        one, whole = (task.evaluate(model, "val", ALONE, torch.float32, limit)["loss"] for limit in (1, 0))
        assert one != whole


def test_the_iou_of_boxes_counts_wrong_missing_and_extra_ones():
    box, half = "<loc0000><loc0000><loc0512><loc0512> cat", "<loc0000><loc0000><loc0512><loc0256> cat"
    assert pictures.box_iou(box, box) == 1 and pictures.box_iou(half, box) == 0.5
    assert pictures.box_iou(box.replace("cat", "dog"), box) == 0 and pictures.box_iou("", box) == 0
    assert pictures.box_iou(f"{box} ; {half}", box) == pytest.approx((1 + 0.5 + 1) / 3)  # a box too many costs


def test_retrieval_accepts_an_equal_caption_of_another_image(shapes):
    task = ContrastiveTask(settings_for("contrastive", batch_size=16))
    task.open(shapes, ALONE)
    task.n_patches, data = 4, task.data["train"]
    n, same = len(data.images), {}
    ids = [same.setdefault(tuple(row), len(same)) for row in data.ids]

    class Oracle(nn.Module):  # each distinct caption, and its images, get a dimension of their own
        seen = 0

        def forward(self, images, tokens, padding, across_ranks):
            return torch.zeros(len(images))

        def encode_images(self, images):
            self.seen += len(images)
            return torch.eye(n)[ids[self.seen - len(images):self.seen]]

        def text(self, tokens, padding):
            return torch.eye(n)[[same[tuple(row)] for row in tokens.tolist()]]

    found = task.details(Oracle(), "train", ALONE, torch.float32, None, {})
    assert found["retrieval image to text"] == found["retrieval text to image"] == 1
    shared = {i for i in ids if ids.count(i) > 1}
    assert found.get("zero-shot classes", 0) == len(shared) and found.get("zero-shot", 1) == 1


def test_parts_come_from_other_runs_and_can_be_frozen(runs, small, tmp_path, dataset):
    text = {**{name: small[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "device")},
            "dataset": str(dataset), "max_iters": 2, "sample_tokens": 0, "n_kv_head": 1}
    train.main(settings_for("text", **text, model="gemma", out_dir=str(tmp_path / "text")), {})
    run(tmp_path / "out", small, "image-text", init_vision=str(runs["contrastive"]), max_iters=2,
        init_decoder=str(tmp_path / "text"), rates={"vision": 0.0, "decoder": 0.0})
    found = load(tmp_path / "out" / "last")[1]
    vision = load(runs["contrastive"] / "best")[1].vision
    its_task, decoder, _ = load(tmp_path / "text" / "best")
    torch.testing.assert_close(found.vision.state_dict(), vision.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(found.decoder.transformer.state_dict(), decoder.transformer.state_dict(), atol=0, rtol=0)
    tokenizer = tokenizers.load(Path(small["dataset"]) / "tokenizer.json")
    i, j = tokenizer.encode("k")[0], its_task.tokenizer.encode("k")[0]
    assert torch.equal(found.decoder.wte.weight[i], decoder.wte.weight[j])
    with pytest.raises(UserError, match="init_vision = .*: its SigLIP .*: vision.patches.weight is .32.*, not .64"):
        run(tmp_path / "bad", small, "image-text", init_vision=str(runs["contrastive"]),
            vision=Vision(n_layer=1, n_head=2, n_embd=64, patch_size=16))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, model, tokenizer) of a tiny published PaliGemma. The tokenizer differs from the data set's."""
    folder = tmp_path_factory.mktemp("published")
    special = (*images.CONTROLS, *pictures.LOCATIONS, *pictures.SEGMENTS)
    tokenizer = BPETokenizer.train(["read red circle square blue green"] * 9, 256 + len(special) + 9, special)
    model = PaliGemma(PaliGemmaConfig(
        ViTConfig(n_layer=1, n_head=2, n_embd=16, image_size=32, patch_size=16),
        GemmaConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, vocab_size=tokenizer.vocab_size)))
    init_parts(model, torch.Generator().manual_seed(0))
    paligemma.save(model, tokenizer, folder)
    return folder, model, tokenizer


def tuning(small, published, out_dir, **changes):
    """The settings of a run that fine-tunes the published model."""
    names = ("dataset", "batch_size", "max_iters", "eval_interval", "device")
    return settings_for("image-text", **{**{name: small[name] for name in names}, "init_from": str(published[0]),
                                         "learning_rate": 1e-2, "out_dir": str(out_dir), **changes})


@pytest.mark.slow
def test_a_fine_tuned_model_resumes_and_is_evaluated_with_its_own_tokenizer(small, published, tmp_path):
    train.main(tuning(small, published, tmp_path / "whole"), {})
    train.main(tuning(small, published, tmp_path / "parts", max_iters=6, lr_decay_iters=12), {})
    resume(tmp_path / "parts", "--max_iters=12")
    assert losses(log(tmp_path / "parts")) == losses(log(tmp_path / "whole"))
    one, other = (checkpoint.load(tmp_path / name / "last").state for name in ("whole", "parts"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    evaluate.main(settings_for("image-text", "evaluating", out_dir=str(tmp_path / "parts"), device="cpu"))
    found = json.loads((tmp_path / "parts" / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(checkpoint.read_config(tmp_path / "parts" / "best")["val_loss"], abs=1e-6)
    task = load(tmp_path / "parts" / "best")[0]
    data_sets = tokenizers.load(Path(small["dataset"]) / "tokenizer.json")
    assert tokenizers.same_vocabulary(task.tokenizer, published[2])
    assert not tokenizers.same_vocabulary(task.tokenizer, data_sets)


def test_a_model_tuned_by_lora_and_published_gives_the_same_logits_in_transformers(small, published, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, model, tokenizer = published
    train.main(tuning(small, published, tmp_path / "out", lora_rank=3, rates={"vision": 0.0},
                      publish=str(tmp_path / "tuned")), {})
    tuned = load(tmp_path / "out" / "best")[1]
    frozen = {name for name, p in tuned.named_parameters() if "lora" not in name and "projector" not in name}
    for name, p in model.named_parameters():
        assert torch.equal(tuned.get_parameter(name), p) == (name in frozen), name
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "tuned").eval()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = tokenizer.encode_controls("<bos>read\n")
    image_token = tokenizer.bpe.token_to_id("<image>")
    with torch.no_grad():
        expected = theirs(pixel_values=images, input_ids=torch.tensor([[image_token] * 4 + ids.tolist()])).logits[:, 4:]
        found, before = (part(images, torch.from_numpy(ids)[None]) for part in (tuned, model))
    assert (found - expected).abs().max() < 1e-5 < 1e-3 < (found - before).abs().max()


def test_parts_have_their_own_learning_rates():
    model = PaliGemma(PaliGemmaConfig(ViTConfig(n_layer=1, n_head=1, n_embd=8, image_size=8, patch_size=8),
                                      GemmaConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9)))
    rates = {"vision": 0.0, "projector": 2.0, "decoder": 0.5}
    freeze(model, rates)
    groups = make_optimizers(model, train.Settings(rates=rates))["optimizer"].param_groups
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    found = {name: scale.get(id(p), 0.0) for name, p in model.named_parameters()}
    assert all(value == rates[name.split(".")[0]] for name, value in found.items())
    assert [p.requires_grad for p in model.vision.parameters()] == [False] * len(list(model.vision.parameters()))


@pytest.mark.parametrize("task, changes, message", [
    ("image-text", dict(block_size=8), "block_size = 8: 4 image tokens and rows of up to .* need at least"),
    ("image-text", dict(vision=Vision(n_layer=1, n_head=2, n_embd=32, patch_size=7)),
     "vision.patch_size = 7: does not divide the images' 32 pixels; 2, 4, 8, 16, 32 do"),
    ("image-text", dict(init_vision="nosuch"), "init_vision = nosuch: is not the folder of a run"),
    ("image-text", dict(init_decoder="nosuch"), "init_decoder = nosuch: is not the folder of a run"),
    ("contrastive", dict(block_size=8), "block_size = 8: the longest caption of .* needs"),
    ("contrastive", dict(micro_batch_size=2), "each row against all others, so every worker takes one micro-batch"),
    ("contrastive", dict(shard=True, resume="auto"), "shard = True: the scalar parameters of --task=contrastive"),
    ("image-text", dict(init_from="out/nothing"), "init_from = out/nothing"),
])
def test_settings_that_do_not_fit_are_refused_by_name(task, changes, message, small, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        run(tmp_path, small, task, **changes)


def test_init_from_decides_the_shape_and_must_name_a_model_of_the_task(runs, small, tmp_path):
    for name, asked, value in (("n_embd", 64, 32), ("vision.n_layer", 2, 1)):
        with pytest.raises(UserError, match=f"{name} = {asked}, but .* has {value}: leave it out"):
            train.main(settings_for("image-text", **small, init_from=str(runs["image-text"]),
                                    out_dir=str(tmp_path)), {name: asked})
    with pytest.raises(UserError, match="init_from = .*: is of the class SigLIP, and --task=image-text trains Pali"):
        run(tmp_path, small, "image-text", init_from=str(runs["contrastive"]))


def test_a_text_data_set_is_refused(small, dataset, tmp_path):
    with pytest.raises(UserError, match="is a data set of kind text, and this model needs one of kind image-text"):
        run(tmp_path, small, "image-text", dataset=str(dataset))


# ----------------------------------------------------------------------------------------------------------------------
# A language model is a row of a table

@dataclasses.dataclass(frozen=True)
class BigramConfig:
    vocab_size: int = 65
    block_size: int = 64


class Bigram(nn.Module):
    """Predicts the next token from the last one alone, without blocks and without a cache."""

    def __init__(self, config):
        super().__init__()
        self.config, self.wte = config, nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, tokens, targets=None, places=None):
        return predict(self.logits, self.hidden(tokens), targets, places)

    def hidden(self, tokens, caches=None, start=0):
        return self.wte(tokens)

    def logits(self, x):
        return x


def test_a_language_model_is_a_row_in_the_table(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(text_task.MODELS, "bigram", (Bigram, BigramConfig))
    wanted = {name: value for name, value in tiny.items() if not name.startswith("n_")} | {"learning_rate": 0.1}
    train.main(settings_for("text", **wanted, model="bigram", out_dir=str(tmp_path)), {})
    found = log(tmp_path)
    assert found[-1]["val_loss"] < found[0]["loss"] - 0.5
    resume(tmp_path)
    _, model, config = load(tmp_path / "last")
    assert type(model) is Bigram and config["model_type"] == "bigram" and config["settings"]["block_size"] == 32
    for name, value in (("n_embd", 32), ("positions", "rotary"), ("dropout", 0.1)):
        with pytest.raises(UserError, match=f"{name} = {value!r}: --model=bigram has no such setting"):
            train.main(settings_for("text", **wanted, **{name: value}, model="bigram", out_dir=str(tmp_path)), {})
    with pytest.raises(UserError, match="zero_init = True: --model=bigram has no blocks"):
        train.main(settings_for("text", **wanted, zero_init=True, model="bigram", out_dir=str(tmp_path)), {})
