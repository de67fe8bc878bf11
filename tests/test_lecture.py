"""The lecture's steps are right: ways to one result agree, norms are PyTorch's, and rungs are models like any other."""

import math
import re

import pytest
import torch
import torch.nn as nn
from conftest import settings_for

import lecture
import train
from lecture import RUNGS, Head
from tasks.loading import load
from tools import ladder


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_three_ways_to_the_mean_of_the_past_agree(generator):
    x = torch.randn(4, 8, 2, generator=generator)
    means = x.cumsum(dim=1) / torch.arange(1, 9)[:, None]
    for way in (lecture.means_by_loop, lecture.means_by_product, lecture.means_by_softmax):
        torch.testing.assert_close(way(x), means)


def test_a_head_is_pytorchs_attention_and_heads_merge(generator):
    torch.manual_seed(0)
    heads, x = [Head(32, 8) for _ in range(4)], torch.randn(3, 8, 32, generator=generator)
    q, k, v = (getattr(heads[0], name)(x) for name in ("query", "key", "value"))
    torch.testing.assert_close(heads[0](x), nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(lecture.merged(heads, x), torch.cat([head(x) for head in heads], dim=-1))
    memory = torch.randn(3, 5, 32, generator=generator)
    head = Head(32, 8, causal=False)
    k, v = head.key(memory), head.value(memory)
    expected = nn.functional.scaled_dot_product_attention(head.query(x), k, v)
    torch.testing.assert_close(head(x, memory), expected)


def test_norms_by_hand_are_pytorchs(generator):
    ours, theirs = lecture.BatchNorm(10), nn.BatchNorm1d(10)
    for _ in range(3):
        x = 3 + 2 * torch.randn(32, 10, generator=generator)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))  # by the running means
    torch.testing.assert_close(lecture.LayerNorm(10)(x), nn.LayerNorm(10)(x))


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_sees_the_past_alone_and_starts_near_a_uniform_guess(name):
    torch.manual_seed(0)
    cls, config_cls = RUNGS[name]
    model, tokens = cls(config_cls()), torch.randint(65, (2, 8))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 65
    logits = model(tokens)
    assert logits.shape == (2, 8, 65)
    assert torch.equal(logits[:, :-1], model(changed)[:, :-1]) and not torch.equal(logits, model(changed))
    assert model(tokens, tokens).mean() < math.log(65) + (1.5 if name == "bigram" else 1.0)
    earlier = tokens.clone()
    earlier[:, 0] = (earlier[:, 0] + 1) % 65
    sees_it = not torch.equal(logits[:, -1], model(earlier)[:, -1])
    assert sees_it == (name not in ("bigram", "embeddings"))


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_is_trained_and_sampled_as_any_model(name, tiny, tmp_path):
    fields = RUNGS[name][1].__dataclass_fields__
    sizes = {key: value for key, value in tiny.items() if key in fields or not key.startswith("n_")}
    settings = settings_for("text", **sizes | dict(model=name, block_size=8, max_iters=2), out_dir=str(tmp_path))
    train.main(settings, {})
    task, model, config = load(tmp_path)
    assert type(model) is RUNGS[name][0] and config["step"] == 2
    assert len(task.write(model, "t", max_new_tokens=20)) == 21  # longer than a window


def test_the_telling_has_the_lectures_numbers(capsys):
    lecture.main()
    told = capsys.readouterr().out
    assert told.count("->") == 32
    assert "[[2, 7], [8, 11], [14, 16]]" in told and "[4.67, 5.33]" in told
    assert "has variance 15" in told and "[0.19, 0.14, 0.24, 0.14, 0.29]" in told
    assert re.search(r"first loss: 4\.6\d on average.* ln 65 = 4\.17", told)


@pytest.mark.slow
def test_the_ladder_is_climbed_and_written_down(tmp_path, monkeypatch, capsys):
    short = " --max_iters=20 --eval_interval=10 --eval_tokens=1000"
    rungs = {name: ladder.LADDER[name] for name in ("bigram", "one-head")}
    rungs = {name: rung._replace(recipe=rung.recipe + short) for name, rung in rungs.items()}
    monkeypatch.setattr(ladder, "LADDER", rungs)
    monkeypatch.setattr(ladder, "PAGE", tmp_path / "README.md")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets it, and changes the folder: for this test alone
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second climb finds the runs
        ladder.main(ladder.Settings(seeds=2, out=str(tmp_path / "runs")))
    page = (tmp_path / "README.md").read_text()
    row = r"\| one-head \| a head of self-attention \| [5-8],\d+ \| \d\.\d+ \(.* to .*\) \| 2.4 \| \d+ s \|"
    assert re.search(row, page)
    assert (tmp_path / "curves.svg").exists() and page.count("\nbigram  ") == 1
