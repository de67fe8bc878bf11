"""batches.py, and the batches that the tasks with images make."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from batches import (
    Dataset,
    ImageTextDataset,
    Joined,
    batch_cuts,
    batches_per_epoch,
    epoch_of_batches,
    fixed_rows,
    fixed_windows,
    random_offsets,
    read_windows,
    shuffled_rows,
    token_batches,
)
from configurator import UserError
from machine.distributed import World
from run.pictures import pixels
from sources import images
from tasks.contrastive import ContrastiveTask
from tasks.image_text import ImageTextTask
from tokenizer import ByteTokenizer
from vit import ViTConfig
from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig

CPU = torch.device("cpu")


def test_offsets_are_a_pure_function_of_seed_and_step():
    one = random_offsets(1000, 10, 64, 7, 3)
    assert np.array_equal(one, random_offsets(1000, 10, 64, 7, 3))
    assert not np.array_equal(one, random_offsets(1000, 10, 64, 7, 4))
    assert not np.array_equal(one, random_offsets(1000, 10, 64, 8, 3))
    many = random_offsets(13, 10, 2000, 0, 0)
    assert set(many.tolist()) == {0, 1, 2}  # every window of 11 tokens that fits into 13, and no other


def test_the_target_of_each_token_is_the_next_token():
    tokens = np.arange(100, dtype=np.uint16)
    batch = read_windows(tokens, np.array([0, 40, 95]), 4, CPU)
    assert batch["tokens"].tolist() == [[0, 1, 2, 3], [40, 41, 42, 43], [95, 96, 97, 98]]
    assert torch.equal(batch["targets"], batch["tokens"] + 1) and batch["tokens"].dtype == torch.int64


def test_joined_arrays_are_sliced_like_one_array():
    whole = np.arange(50, dtype=np.uint16)
    joined = Joined([whole[:7], whole[7:8], whole[8:31], whole[31:]])
    assert len(joined) == 50
    for offsets in (np.arange(45), np.array([3]), random_offsets(50, 5, 20, 1, 2)):  # windows in up to three arrays
        one, other = (read_windows(tokens, offsets, 5, CPU) for tokens in (whole, joined))
        assert all(torch.equal(one[name], other[name]) for name in ("tokens", "targets"))
    with pytest.raises(IndexError):
        joined[48:51]


@pytest.mark.parametrize("n_tokens, block_size, batch_size", [(100, 10, 4), (101, 10, 3), (102, 10, 100), (11, 10, 1),
                                                              (110, 10, 2), (5, 10, 2), (2, 1, 1)])
def test_fixed_windows_score_every_token_but_the_first_once(n_tokens, block_size, batch_size):
    tokens, seen = np.arange(n_tokens), []
    for offsets, length in fixed_windows(n_tokens, block_size, batch_size):
        assert 0 < len(offsets) <= batch_size and 0 < length <= block_size
        seen += read_windows(tokens, offsets, length, CPU)["targets"].flatten().tolist()
    assert sorted(seen) == list(range(1, n_tokens))


def test_a_limit_keeps_an_even_spread_of_windows():
    windows = fixed_windows(100_001, 10, 8, limit=1000)
    offsets = np.concatenate([offsets for offsets, _ in windows])
    assert len(offsets) == 100 and (np.diff(offsets) == 1000).all() and len(windows) == 13
    assert sum(len(o) * n for o, n in fixed_windows(95, 10, 8, limit=94)) == 94  # the limit leaves nothing out


def test_a_split_that_is_too_short_or_damaged_is_named(dataset, tmp_path):
    data = Dataset(dataset)
    assert data.meta["val_tokens"] == len(data.splits["val"])
    n = data.meta["val_tokens"]
    assert len(data.tokens("val", n - 1)) == n
    with pytest.raises(UserError, match=f"val split of .* has {n} tokens, and block_size = {n} needs {n + 1}"):
        data.tokens("val", n)
    shutil.copytree(dataset, tmp_path / "torn")
    meta = json.loads((dataset / "meta.json").read_text())
    (tmp_path / "torn" / "val.bin").write_bytes(b"xx")
    with pytest.raises(UserError, match=f"val.bin does not hold the {meta['val_tokens']:,} tokens"):
        Dataset(tmp_path / "torn")
    tokens = np.fromfile(dataset / "val.bin", meta["dtype"])
    tokens[-1] = meta["vocab_size"]
    tokens.tofile(tmp_path / "torn" / "val.bin")
    with pytest.raises(UserError, match="val.bin has numbers that are no tokens: prepare it again"):
        Dataset(tmp_path / "torn")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of ten images with one to three rows each, of different lengths. Its folder `out` is the data set."""
    source, rows = tmp_path_factory.mktemp("pairs"), []
    for i in range(10):
        noise = np.random.default_rng(i).integers(0, 256, size=(9, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).save(source / f"{i}.png")
        asked = (("count it", "7"), ("caption", "one " * i + "cat"), ("caption", "again"))[:i + 1]
        rows += [{"image": f"{i}.png", "prompt": prompt, "answer": answer} for prompt, answer in asked]
    (source / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images.prepare(source, source / "out", val_fraction=0.2, image_size=8)
    return source


def opened(task, source):
    task = task(None)
    task.open(source / "out", World(0, 1, CPU))
    return task


def test_only_the_answer_and_its_eos_are_scored(pairs):
    task, indices = opened(ImageTextTask, pairs), np.array([20, 3, 0])
    rows = [task.dataset.rows["train"][i] for i in indices]
    batch, weights = task.batch(indices, None)
    T, A = max(len(row["prompt"] + row["answer"]) + 2 for row in rows), max(len(row["answer"]) + 1 for row in rows)
    assert batch["tokens"].shape == (3, T) and batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert batch["targets"].shape == batch["places"].shape == weights.shape == (3, A)
    assert task.weight(indices) == weights.sum()
    for i, row in enumerate(rows):
        tokens, prefix, scored = batch["tokens"][i], batch["prefix"][i], weights[i] == 1
        places, targets, n = batch["places"][i, scored], batch["targets"][i, scored], len(row["answer"]) + 1
        assert task.tokenizer.decode(tokens[:prefix]) == f"<bos>{row['prompt']}\n"
        assert task.tokenizer.decode(targets) == f"{row['answer']}<eos>" and weights[i].sum() == n
        assert places.tolist() == list(range(prefix - 1, prefix - 1 + n))  # each target is predicted a place before it
        assert torch.equal(tokens[places[1:]], targets[:-1]) and not tokens[prefix + n:].any()
        with Image.open(pairs / f"{row['image']}.png") as picture:
            assert torch.equal(batch["images"][i], pixels(picture, 8))


def test_padding_changes_no_loss(pairs):
    task = opened(ImageTextTask, pairs)
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=2, n_embd=16)
    model = PaliGemma(PaliGemmaConfig(ViTConfig(**shape, image_size=8, patch_size=4),
                                      GemmaConfig(**shape, vocab_size=task.tokenizer.vocab_size, block_size=64)))
    longest = int(task.data["train"].lengths.argmax())
    (both, _), (one, _), (other, _) = batches = [task.batch(np.array(rows), None) for rows in
                                                 ([0, longest], [0], [longest])]
    assert both["tokens"].size(1) == other["tokens"].size(1) > one["tokens"].size(1)
    whole, *parts = (task.loss(model, *batch)[0] for batch in batches)
    torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=0)


def test_captions_are_padded_on_the_left_and_each_image_has_one(pairs):
    task = opened(ContrastiveTask, pairs)
    assert task.data["train"].images.tolist() == [1, 2, 3, 4, 5, 6, 7]  # image 0 has no caption
    batch, weights = task.batch(np.array([6, 0]), None)
    assert set(batch) == {"images", "tokens", "padding"} and batch["images"].shape == (2, 3, 8, 8)
    texts = [task.tokenizer.decode(tokens[padding:]) for tokens, padding in zip(batch["tokens"], batch["padding"])]
    assert texts == ["one " * 7 + "cat<eos>", "one cat<eos>"] and batch["padding"].tolist() == [0, 24]
    assert weights.tolist() == [1, 1] and task.weight(np.array([6, 0])) == 2
    with pytest.raises(UserError, match="no rows of kind \"caption\""):
        task.encode(task.dataset.rows["train"][:1])
    task.tokenizers = {"tokenizer": ByteTokenizer()}
    with pytest.raises(UserError, match="a byte tokenizer has no token to end an answer with"):
        task.encode(task.dataset.rows["train"])


def test_an_epoch_has_no_row_twice_and_an_order_of_its_own():
    steps = [shuffled_rows(23, 4, 7, step) for step in range(15)]
    for step, rows in enumerate(steps):
        assert np.array_equal(rows, shuffled_rows(23, 4, 7, step)) and len(rows) == 4
    epochs = [np.concatenate(steps[i:i + 5]) for i in (0, 5, 10)]
    assert all(len(set(epoch)) == 20 and set(epoch) <= set(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(steps[0], shuffled_rows(23, 4, 8, 0))
    assert sorted(shuffled_rows(23, 23, 0, 5)) == list(range(23))  # ranks split this one array between them
    for count in (0, 24):
        with pytest.raises(UserError, match=f"batch_size = {count}: must be from 1 to 23"):
            shuffled_rows(23, count, 0, 0)


@pytest.fixture(scope="module")
def lengths():
    """The tokens of 3,000 sources and targets, as in a real text: targets are a little longer."""
    rng = np.random.default_rng(0)
    source = np.clip(rng.lognormal(2.7, 0.6, 3000), 1, 90)
    return np.stack((source, np.clip(source * rng.normal(1.1, 0.2, 3000), 1, 99)), axis=1).astype(np.int32)


def test_batches_of_tokens_keep_the_limit_and_hold_little_padding(lengths):
    for limit in (500, 1000, 4000):
        batches = [token_batches(lengths, limit, 7, step) for step in range(batches_per_epoch(lengths, limit))]
        assert np.sort(np.concatenate(batches)).tolist() == list(range(3000))  # every row once
        sizes = np.array([len(rows) * lengths[rows].max(0).sum() for rows in batches])
        assert sizes.max() <= limit and sizes.mean() > 0.85 * limit
        assert lengths.sum() > (0.9 if limit == 500 else 0.8) * sizes.sum()  # the rest is padding
    with pytest.raises(UserError, match=r"batch_size = 100: counts tokens here, and the longest pair has 1\d\d: "):
        token_batches(lengths, 100, 7, 0)
    one = np.array([[3, 4]])
    assert batches_per_epoch(one, 7) == 1 and token_batches(one, 7, 0, 9).tolist() == [0]


def test_batches_of_tokens_are_a_pure_function_of_seed_and_step(lengths):
    n = batches_per_epoch(lengths, 500)
    steps = [token_batches(lengths, 500, 7, step) for step in range(3 * n)]
    for cache in (batch_cuts, epoch_of_batches):
        cache.cache_clear()  # a resumed run starts anew
    assert np.array_equal(token_batches(lengths.astype(np.int64), 500, 7, 2 * n + 3), steps[2 * n + 3])
    assert np.array_equal(token_batches(lengths, 500, 7, 5), steps[5])
    epochs = [steps[i:i + n] for i in (0, n, 2 * n)]
    assert all(np.sort(np.concatenate(epoch)).tolist() == list(range(3000)) for epoch in epochs)
    some = (*steps[:3], *steps[n:n + 3], token_batches(lengths, 500, 8, 0))
    longest = {tuple(lengths[rows].max(0)) for rows in some}
    assert len(longest) > 4  # short and long batches are mixed, in an order of the epoch's and the seed's
    together = [{frozenset(rows.tolist()) for rows in epoch} for epoch in epochs]
    assert len(together[0] & together[1]) < n / 2  # rows of equal lengths change places


def test_evaluation_goes_over_all_rows_once_in_order():
    assert np.concatenate(fixed_rows(10, 4)).tolist() == list(range(10)) and len(fixed_rows(10, 4)) == 3
    assert np.concatenate(fixed_rows(1000, 64, limit=100)).tolist() == list(range(0, 1000, 10))
    assert np.concatenate(fixed_rows(10, 4, limit=20)).tolist() == list(range(10))


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"null", b"3", b"\xff", b"", b'{"kind": "image-text"}', None])
def test_a_damaged_meta_json_is_named(pairs, dataset, tmp_path, content):
    for source, cls in ((dataset, Dataset), (pairs / "out", ImageTextDataset)):
        folder = tmp_path / cls.__name__
        shutil.copytree(source, folder)
        (folder / "meta.json").unlink()
        if content is not None:
            (folder / "meta.json").write_bytes(content)
        with pytest.raises(UserError, match="meta.json is damaged: prepare the data set again"):
            cls(folder)


def test_the_repr_of_a_data_set_has_its_folder_and_sizes(pairs, dataset):
    data = Dataset(dataset)
    n, m = (len(data.splits[split]) for split in ("train", "val"))
    assert repr(data) == f"Dataset({dataset}: {n:,} train tokens and {m:,} val tokens)"
    assert repr(ImageTextDataset(pairs / "out")) == (
        f"ImageTextDataset({pairs / 'out'}: 21 train rows and 6 val rows, 10 images of 8 pixels)")


def test_missing_and_damaged_files_of_a_data_set_of_images_are_named(pairs, dataset, tmp_path):
    data = ImageTextDataset(pairs / "out")
    for name, content, message in (("images.bin", b"xx", "images.bin does not hold the 10 images"),
                                   ("val.jsonl", b"{}\n" * 6, "val.jsonl does not hold the 6 rows"),
                                   ("train.jsonl", None, "train.jsonl does not hold the 21 rows")):
        shutil.copytree(data.folder, tmp_path / name)
        (tmp_path / name / name).unlink()
        if content:
            (tmp_path / name / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            ImageTextDataset(tmp_path / name)
    data.meta["images"] -= 1
    with pytest.raises(UserError, match="val.jsonl does not hold the 6 rows"):
        data.read_rows("val")
    data.meta["images"] += 1
    with pytest.raises(UserError, match="kind image-text, and this model needs one of kind text"):
        Dataset(data.folder)
    with pytest.raises(UserError, match="kind text, and this model needs one of kind image-text"):
        ImageTextDataset(dataset)
