import json
import shutil

import numpy as np
import pytest
import torch

from batches import Dataset, fixed_windows, gather, random_offsets
from configurator import UserError

CPU = torch.device("cpu")


def test_offsets_are_a_pure_function_of_seed_and_step():
    one = random_offsets(1000, 10, 64, 7, 3)
    assert np.array_equal(one, random_offsets(1000, 10, 64, 7, 3))
    assert not np.array_equal(one, random_offsets(1000, 10, 64, 7, 4))
    assert not np.array_equal(one, random_offsets(1000, 10, 64, 8, 3))
    many = random_offsets(13, 10, 2000, 0, 0)
    assert set(many.tolist()) == {0, 1, 2}  # every window of 11 that fits into 13, and no other


def test_targets_are_the_tokens_one_place_on():
    tokens = np.arange(100, dtype=np.uint16)
    batch = gather(tokens, np.array([0, 40, 95]), 4, CPU)
    assert batch["tokens"].tolist() == [[0, 1, 2, 3], [40, 41, 42, 43], [95, 96, 97, 98]]
    assert torch.equal(batch["targets"], batch["tokens"] + 1) and batch["tokens"].dtype == torch.int64


@pytest.mark.parametrize("n_tokens, block_size, batch_size", [(100, 10, 4), (101, 10, 3), (102, 10, 100), (11, 10, 1),
                                                              (110, 10, 2), (5, 10, 2), (2, 1, 1)])
def test_fixed_windows_score_every_token_but_the_first_once(n_tokens, block_size, batch_size):
    tokens, seen = np.arange(n_tokens), []
    for offsets, length in fixed_windows(n_tokens, block_size, batch_size):
        assert 0 < len(offsets) <= batch_size and 0 < length <= block_size
        seen += gather(tokens, offsets, length, CPU)["targets"].flatten().tolist()
    assert sorted(seen) == list(range(1, n_tokens))


def test_a_limit_keeps_an_even_spread_of_windows():
    windows = fixed_windows(100_001, 10, 8, limit=1000)
    offsets = np.concatenate([offsets for offsets, _ in windows])
    assert len(offsets) == 100 and (np.diff(offsets) == 1000).all() and len(windows) == 13
    assert sum(len(o) * n for o, n in fixed_windows(95, 10, 8, limit=94)) == 94  # short enough: whole


def test_a_data_set_that_does_not_fit_is_named(dataset, tmp_path):
    data = Dataset(dataset)
    assert data.meta["val_tokens"] == len(data.splits["val"]) and data.vocab_size == data.meta["vocab_size"]
    n = data.meta["val_tokens"]
    assert len(data.tokens("val", n - 1)) == n
    with pytest.raises(UserError, match=f"val split of .* has {n} tokens, and block_size = {n} needs {n + 1}"):
        data.tokens("val", n)
    shutil.copytree(dataset, tmp_path / "torn")
    meta = json.loads((dataset / "meta.json").read_text())
    (tmp_path / "torn" / "val.bin").write_bytes(b"xx")
    with pytest.raises(UserError, match=f"val.bin does not hold the {meta['val_tokens']:,} tokens"):
        Dataset(tmp_path / "torn")
