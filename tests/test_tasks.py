"""The tasks with images, on a small data set of shapes: they learn, resume, divide their batches, start from parts."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import prepare
import tasks
import train
from batches import ImageTextDataset, encode_captions, encode_rows
from configurator import UserError
from distributed import World
from tokenizer import BPETokenizer

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The folder of a small prepared set of shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    runpy.run_path(str(ROOT / "data" / "shapes" / "generate.py"))["generate"](folder / "source", images=60)
    prepare.prepare_pairs(folder / "source", folder / "ready", "char", image_size=32)
    return folder / "ready"


@pytest.fixture(scope="module")
def small(shapes):
    return dict(dataset=str(shapes), vision=train.Vision(n_layer=1, n_head=2, n_embd=32, patch_size=16), n_layer=1,
                n_head=2, n_embd=32, block_size=128, batch_size=8, max_iters=12, warmup_iters=2, learning_rate=3e-3,
                eval_interval=6, log_interval=3, device="cpu", dtype="float32",
                sample_tokens=1)


KINDS = {"contrastive": dict(learning_rate=1e-3), "image-text": dict(n_kv_head=1)}


def run(out_dir, small, task, **changes):
    train.main(train.Settings(**{**small, **KINDS[task], **changes}, task=task, out_dir=str(out_dir)), changes)
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def losses(rows):
    return [(row["step"], row["loss"], row.get("val_loss")) for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small):
    """{task: out directory of a finished run}."""
    folders = {task: tmp_path_factory.mktemp("runs") / task for task in KINDS}
    for task, folder in folders.items():
        run(folder, small, task)
    return folders


@pytest.mark.parametrize("task", KINDS)
def test_a_resumed_run_equals_an_undisturbed_one(task, runs, small, tmp_path, monkeypatch):
    real, calls = train.update, 0

    def dies(*args):
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update", dies)
        run(tmp_path, small, task)
    found = run(tmp_path, small, task, resume=True)
    whole = [json.loads(line) for line in (runs[task] / "log.jsonl").read_text().splitlines()]
    assert losses(found) == losses(whole) and whole[-1]["loss"] < whole[0]["loss"]
    one, other = (checkpoint.load(folder / "last")[0].state_dict() for folder in (tmp_path, runs[task]))
    torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_answers_of_different_length_weigh_alike_however_the_batch_is_divided(runs, small, tmp_path):
    found = run(tmp_path, small, "image-text", gradient_accumulation_steps=4)
    whole = [json.loads(line) for line in (runs["image-text"] / "log.jsonl").read_text().splitlines()]
    assert [a for _, a, _ in losses(found)] == pytest.approx([a for _, a, _ in losses(whole)], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task", KINDS)
def test_two_workers_give_the_curve_of_one(task, runs, small, tmp_path):
    values = {**small, **KINDS[task], "task": task, "out_dir": str(tmp_path)}
    vision = values.pop("vision")
    arguments = [f"--{name}={value}" for name, value in values.items()]
    arguments += [f"--vision.{name}={value}" for name, value in vars(vision).items()]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    str(ROOT / "train.py"), *arguments], check=True, capture_output=True, timeout=120)
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (runs[task] / "log.jsonl").read_text().splitlines()]
    for a, b in zip(losses(found), losses(whole), strict=True):
        assert a == pytest.approx(b, abs=1e-4) if None not in a else a[:2] == pytest.approx(b[:2], abs=1e-4)


def test_the_val_loss_is_the_mean_over_all_scored_tokens(runs, shapes):
    model, tokenizer, config = checkpoint.load(runs["image-text"] / "last")
    dataset = ImageTextDataset(shapes)
    data = encode_rows(dataset.rows["val"], tokenizer)
    total = count = 0
    for i in range(len(data.images)):
        batch = evaluate.gather_rows(dataset.images, data, np.array([i]), CPU)
        n = (batch["targets"] >= 0).sum().item()
        total, count = total + model(**batch).item() * n, count + n
    assert config["val_loss"] == pytest.approx(total / count, abs=1e-4)
    assert evaluate.answer_loss(model, dataset, data, 5, ALONE, torch.float32) == pytest.approx(total / count, abs=1e-4)


def test_evaluation_counts_exact_answers_with_and_without_the_image(runs, monkeypatch):
    def scripted(model, tokenizer, dataset, rows, device, blank=False):
        return [row["answer"] if not blank and row["kind"] != "count" else "no" for row in rows]

    monkeypatch.setattr(evaluate, "answers", scripted)
    evaluate.main(evaluate.Settings(out_dir=str(runs["image-text"]), device="cpu"))
    found = json.loads((runs["image-text"] / "evaluation.json").read_text())
    assert found["exact colour"] == found["box IoU detect"] == 1 and found["exact count"] == 0
    assert found["exact colour (image blanked)"] == 0 and 0 < found["exact"] < 1


def test_greedy_answers_are_those_of_one_row_at_a_time(runs, shapes):
    model, tokenizer, _ = checkpoint.load(runs["image-text"] / "last")
    dataset = ImageTextDataset(shapes)
    rows = dataset.rows["val"][:6]
    together = evaluate.answers(model, tokenizer, dataset, rows, CPU)
    assert together == [evaluate.answers(model, tokenizer, dataset, [row], CPU)[0][:len(a)]
                        for row, a in zip(rows, together)]


def test_box_overlap():
    box, half = "<loc0000><loc0000><loc0512><loc0512> cat", "<loc0000><loc0000><loc0512><loc0256> cat"
    assert evaluate.box_iou(box, box) == 1 and evaluate.box_iou(half, box) == 0.5
    assert evaluate.box_iou(box.replace("cat", "dog"), box) == 0 and evaluate.box_iou("", box) == 0
    assert evaluate.box_iou(f"{box} ; {half}", box) == pytest.approx((1 + 0.5 + 1) / 3)  # a box too many costs


def test_retrieval_counts_a_caption_that_says_the_same(shapes):
    dataset = ImageTextDataset(shapes)
    tokenizer = prepare.tokenizers.load(shapes / "tokenizer.json")
    data = encode_captions(dataset.rows["train"], tokenizer)
    n, same = len(data.images), {}
    ids = [same.setdefault(tuple(row), len(same)) for row in data.ids]

    class Knowing(torch.nn.Module):  # an oracle: one dimension per caption
        def forward(self, **batch):
            return torch.zeros(())

        def encode_images(self, images):
            start = self.seen = getattr(self, "seen", 0)
            self.seen += len(images)
            return torch.eye(n)[ids[start:start + len(images)]]

        def text(self, tokens, padding):
            return torch.eye(n)[[same[tuple(row)] for row in tokens.tolist()]]

    found = evaluate.pair_accuracy(Knowing(), dataset, data, 16, CPU, torch.float32)
    assert found["retrieval image to text"] == found["retrieval text to image"] == 1
    shared = {i for i in ids if ids.count(i) > 1}
    assert found.get("zero-shot classes", 0) == len(shared) and found.get("zero-shot", 1) == 1


def test_parts_come_from_other_runs_and_can_be_frozen(runs, small, tmp_path, dataset):
    text = {**{name: small[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "device")},
            "dataset": str(dataset), "max_iters": 2, "sample_tokens": 0, "n_kv_head": 1}
    train.main(train.Settings(**text, architecture="gemma", out_dir=str(tmp_path / "text")), {})
    run(tmp_path / "out", small, "image-text", init_vision=str(runs["contrastive"]), max_iters=2,
        init_decoder=str(tmp_path / "text"), rates=train.Rates(vision=0.0, decoder=0.0))
    found = checkpoint.load(tmp_path / "out" / "last")[0]
    vision = checkpoint.load(runs["contrastive"] / "best")[0].vision
    decoder, characters, _ = checkpoint.load(tmp_path / "text" / "best")
    torch.testing.assert_close(found.vision.state_dict(), vision.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(found.decoder.transformer.state_dict(), decoder.transformer.state_dict(), atol=0, rtol=0)
    tokenizer = prepare.tokenizers.load(Path(small["dataset"]) / "tokenizer.json")
    i, j = tokenizer.encode("k")[0], characters.encode("k")[0]
    assert torch.equal(found.decoder.wte.weight[i], decoder.wte.weight[j])
    with pytest.raises(UserError, match="init_vision = .*: its model has another shape"):
        run(tmp_path / "bad", small, "image-text", init_vision=str(runs["contrastive"]),
            vision=train.Vision(n_layer=1, n_head=2, n_embd=64, patch_size=16))


def test_fine_tuning_by_lora_publishes_a_model_that_transformers_computes_alike(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = prepare.tokenizers.load(Path(small["dataset"]) / "tokenizer.json")
    model = tasks.PaliGemma(tasks.PaliGemmaConfig(
        tasks.ViTConfig(n_layer=1, n_head=2, n_embd=16, image_size=32, patch_size=16),
        tasks.GemmaConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, vocab_size=tokenizer.vocab_size)))
    tasks.init_parts(model, torch.Generator().manual_seed(0))
    checkpoint.save_published(model, tokenizer, tmp_path / "base")
    settings = {name: small[name] for name in ("dataset", "batch_size", "max_iters", "device", "sample_tokens")}
    settings |= dict(task="image-text", init_from=str(tmp_path / "base"), lora_rank=3, rates=train.Rates(vision=0.0),
                     out_dir=str(tmp_path / "out"), publish=str(tmp_path / "tuned"), learning_rate=1e-2)
    train.main(train.Settings(**settings), {})
    tuned = checkpoint.load(tmp_path / "out" / "best")[0]
    frozen = {name for name, p in tuned.named_parameters() if "lora" not in name and "projector" not in name}
    for name, p in model.named_parameters():
        assert torch.equal(tuned.get_parameter(name), p) == (name in frozen), name
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "tuned").eval()
    images, ids = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), tokenizer.encode("<bos>read\n")
    image_token = tokenizer.bpe.token_to_id("<image>")
    with torch.no_grad():
        expected = theirs(pixel_values=images, input_ids=torch.tensor([[image_token] * 4 + ids.tolist()])).logits[:, 4:]
        found, before = (part(images, torch.from_numpy(ids)[None]) for part in (tuned, model))
    assert (found - expected).abs().max() < 1e-5 < 1e-3 < (found - before).abs().max()


def test_parts_have_their_own_rates():
    model = tasks.PaliGemma(tasks.PaliGemmaConfig(
        tasks.ViTConfig(n_layer=1, n_head=1, n_embd=8, image_size=8, patch_size=8),
        tasks.GemmaConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9)))
    optimizer = train.make_optimizer(model, train.Settings(rates=train.Rates(vision=0.0, projector=2.0, decoder=0.5)))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: scale.get(id(p), 0.0) for name, p in model.named_parameters()}
    expected = {"vision": 0.0, "projector": 2.0, "decoder": 0.5}
    assert all(value == expected[name.split(".")[0]] for name, value in found.items())
    assert [p.requires_grad for p in model.vision.parameters()] == [False] * len(list(model.vision.parameters()))


@pytest.mark.parametrize("task, changes, message", [
    ("image-text", dict(block_size=8), "block_size = 8: 4 image tokens and rows of up to .* need at least"),
    ("contrastive", dict(block_size=8), "block_size = 8: the longest caption of .* has"),
    ("contrastive", dict(gradient_accumulation_steps=2), "a batch can't be divided"),
    ("image-text", dict(init_from="out/nothing"), "init_from = out/nothing"),
])
def test_what_does_not_fit_is_named(task, changes, message, small, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        run(tmp_path, small, task, **changes)


def test_a_text_data_set_is_refused(small, dataset, tmp_path):
    with pytest.raises(UserError, match="is a data set of kind text, and this model needs one of kind image-text"):
        run(tmp_path, small, "image-text", dataset=str(dataset))
    assert isinstance(prepare.tokenizers.load(Path(small["dataset"]) / "tokenizer.json"), BPETokenizer)
