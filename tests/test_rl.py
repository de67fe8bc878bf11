"""Learning from rewards: advantages, losses against formulas, rounds that resume exactly, a reference that stays."""

import dataclasses
import json
import math
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import settings_for
from test_distributed import ROOT, torchrun
from test_train import as_arguments

import machine.distributed
import train
from chat import chat_tokenizer
from configurator import UserError, differences
from critic import Critic, RewardModel, as_kind
from model import GPT, GPTConfig, init_weights
from run import checkpoint
from sources import dialogues
from tasks.chat import said
from tasks.loading import load
from tasks.rl import RLTask, clipped, group_advantages, joined, standardized, unexpected
from tokenizer import CharTokenizer
from worlds import WORLDS, World

ALONE = machine.distributed.World(0, 1, torch.device("cpu"))
SMALL = dict(pack=False, sample_tokens=0, device="cpu", dtype="float32")
SHAPE = dict(n_layer=1, n_head=2, n_embd=32, block_size=24)


# ----------------------------------------------------------------------------------------------------------------------
# Advantages

def test_equal_rewards_are_no_advantage():
    group = np.repeat(np.arange(3), 3)
    rewards = np.float32([0.1] * 3 + [1.0] * 3 + [0, 0, 1])
    for divide in (True, False):
        found = group_advantages(rewards, group, divide)
        assert (found[:6] == 0).all() and found[6] < 0 < found[8]
        assert found.sum() == pytest.approx(0, abs=1e-6)
    assert group_advantages(rewards, group, False)[8] == pytest.approx(2 / 3)
    assert group_advantages(rewards, group, True)[6:].std() == pytest.approx(1)


def test_what_was_not_expected_is_the_sum_of_what_came_minus_the_value():
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=(2, 4, 7)).astype(np.float32)
    written = np.zeros((4, 7), np.float32)
    for row, (begin, end) in enumerate([(0, 7), (2, 5), (3, 4), (1, 7)]):
        written[row, begin:end] = 1
    one = unexpected(rewards * written, values, written, 1.0)
    none = unexpected(rewards * written, values, written, 0.0)
    for row in range(4):
        places = np.flatnonzero(written[row])
        for t in range(7):
            if t not in places:
                assert one[row, t] == none[row, t] == 0
                continue
            later = [u for u in places if u >= t]
            assert one[row, t] == pytest.approx(rewards[row, later].sum() - values[row, t], abs=1e-5)
            after = values[row, t + 1] if t + 1 in places else 0
            assert none[row, t] == pytest.approx(rewards[row, t] + after - values[row, t], abs=1e-6)
    some = standardized(one, written)
    assert (some * written).sum() == pytest.approx(0, abs=1e-5) and (some == some * written).all()
    assert (some[written > 0] ** 2).mean() == pytest.approx(1, rel=1e-4)


def test_prompts_and_answers_are_joined_and_only_answers_count():
    ids, written = joined([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
    assert ids.tolist() == [[1, 2, 3, 5, 6], [4, 7, 8, 9, 0]]
    assert (ids[:, 1:] * written).tolist() == [[0, 0, 5, 6], [7, 8, 9, 0]]


# ----------------------------------------------------------------------------------------------------------------------
# Losses

def task_with(**values):
    settings = settings_for("rl", **SMALL, init_from="x", **values)
    return RLTask(settings, {"tokenizer": chat_tokenizer(CharTokenizer("12"))}, "x")


def said_all(*contents):
    return [said(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]


def test_the_gradient_of_the_policy_is_that_of_a_hand_written_example():
    """Two answers of one token, over a vocabulary of two: right (advantage 1) and wrong (advantage -1)."""
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    task = task_with(clip=0.2)

    class Policy(torch.nn.Module):
        def forward(self, tokens):
            return logits.expand(2, 1, 2)

    p = logits.detach().softmax(-1)
    old = p.log()[:, None]  # the first answer is token 0, the second token 1
    arguments = {"tokens": torch.zeros(2, 1, dtype=torch.long), "targets": torch.tensor([[0], [1]]), "old": old,
                 "advantages": torch.tensor([[1.0], [-1.0]])}
    task.shown = {}
    loss, shown = task.loss(Policy(), arguments, torch.full((2, 1), 0.5))
    loss.backward()
    # d/dz of -(1/2)(log p0 - log p1) = -(1/2)(z0 - z1)
    assert logits.grad.tolist() == pytest.approx([-0.5, 0.5])
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert shown["entropy"].item() == pytest.approx(-(p * p.log()).sum().item())
    arguments["old"] = old - math.log(1.5)  # the ratio is 1.5 now: the right answer gains nothing more
    logits.grad = None
    task.loss(Policy(), arguments, torch.full((2, 1), 0.5))[0].backward()
    wrong = 0.5 * 1.5 * torch.stack((-p[0], 1 - p[1]))  # what is wrong still loses, at the ratio's rate
    assert logits.grad.tolist() == pytest.approx(wrong.tolist())


def test_a_question_that_the_model_would_never_have_asked_spoils_no_loss():
    task = task_with(kl=0.1)
    task.shown = {}
    logits = torch.tensor([[[0.0, -300.0], [0.0, 0.0]]], requires_grad=True)  # the first target is the question's
    zero = torch.zeros(1, 2)
    arguments = {"tokens": torch.zeros(1, 2, dtype=torch.long), "targets": torch.tensor([[1, 0]]), "old": zero,
                 "reference": zero, "advantages": zero}
    loss, _ = task.loss(lambda tokens: logits, arguments, torch.tensor([[0.0, 1.0]]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and (logits.grad[0, 0] == 0).all()


def test_clipping_bounds_what_can_be_gained_and_not_what_can_be_lost():
    ratio, advantages = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert clipped(ratio, advantages, 0.2).tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])


class Digits(World):
    """An easy world: name one of the digits. A model is half right after a second."""
    name, characters, longest = "digits", "0123456789 ", (5, 1)

    def draw(self, generator):
        digits = [str(digit) for digit in generator.integers(0, 10, 3)]
        return " ".join(digits), digits[0], digits

    def check(self, prompt, answer):
        return float(answer in prompt.split()) if answer.isdigit() else None


@pytest.fixture(scope="module", autouse=True)
def known():
    with mock.patch.dict(WORLDS, digits=Digits()):
        yield


@pytest.fixture(scope="module")
def world(known, tmp_path_factory):
    """A prepared folder with problems of that world."""
    folder = tmp_path_factory.mktemp("rl") / "digits"
    rows = [{"messages": said_all(*problem), "split": split} for split, count in (("train", 400), ("val", 60))
            for problem in WORLDS["digits"].problems(split, count)]
    dialogues.prepare(rows, folder, "char", 0.1, "made up", "digits")
    return folder


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """A chat run that has learned the form of answers."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    train.main(settings_for("chat", **SMALL, **SHAPE, dataset=str(world), out_dir=str(out), batch_size=32, max_iters=40,
                            learning_rate=1e-2, min_lr=1e-3, warmup_iters=5, eval_interval=40), {})
    return out


def small(world, tuned, **values):
    """Settings of rounds of 8 questions with 4 answers each, and 2 updates."""
    return settings_for("rl", **dict(SMALL, dataset=str(world), init_from=str(tuned), batch_size=16, samples=4, round=2,
                                     max_iters=8, eval_interval=4, log_interval=1, warmup_iters=1, min_lr=1e-4,
                                     learning_rate=1e-3, eval_tokens=1000) | values)


def opened(world, tuned, **values):
    _, model, _ = load(tuned)
    task = RLTask(small(world, tuned, **values), load(tuned)[0].tokenizers, str(tuned))
    task.open(world, ALONE)
    model = task.adopt(model, torch.Generator().manual_seed(0))
    task.fit(model)
    return task, model


@pytest.mark.parametrize("method", ["group", "ppo"])
def test_without_clipping_and_in_one_update_it_is_the_policy_gradient(method, world, tuned, tmp_path):
    task, model = opened(world, tuned, method=method, round=1, batch_size=32, max_iters=4, clip=1e9, value_weight=0.5,
                         out_dir=str(tmp_path))
    task.begin(0, model, ALONE, torch.float32)
    rows = task.pick(0)
    arguments, weights = task.batch(rows, None)
    weights = weights / task.weight(rows)
    loss, shown = task.loss(model, arguments, weights)
    if method == "ppo":
        loss = loss - 0.5 * shown["value_loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logp = -model(arguments["tokens"], arguments["targets"])
    (-(logp * arguments["advantages"] * weights).sum()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


def test_only_answers_that_differ_from_others_are_learned_from_once_an_epoch(world, tuned, tmp_path):
    task, model = opened(world, tuned, out_dir=str(tmp_path), round=4, epochs=2, eval_interval=4)
    drawn = task.roll_out(model, task.questions(0), 4, (1337, 0, 0))
    assert len(drawn.ids) == 32 and (np.bincount(drawn.group) == 4).all()
    mixed = [0 < drawn.right[drawn.group == group].mean() < 1 for group in drawn.group]
    task.begin(0, model, ALONE, torch.float32)
    assert (task.answers.ids == drawn.ids[mixed]).all() and 0 < sum(mixed) < 32
    rows = np.concatenate([task.pick(step) for step in range(4)])
    assert (np.bincount(rows) == 2).all() and len(np.unique(rows)) == sum(mixed)


# ----------------------------------------------------------------------------------------------------------------------
# Runs

def log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def states(*folders):
    return [checkpoint.load(folder).state for folder in folders]


@pytest.mark.parametrize("method", ["group", "ppo"])
def test_a_resumed_run_is_the_whole_run_and_its_reference_stays(method, world, tuned, tmp_path):
    how = dict(method=method, kl=0.05, entropy=0.01)
    train.main(small(world, tuned, out_dir=str(tmp_path / "whole"), **how), {})
    with pytest.raises(SystemExit):
        train.main(small(world, tuned, out_dir=str(tmp_path / "parts"), max_minutes=1e-9, **how), {})
    assert checkpoint.read_config(tmp_path / "parts" / "last")["step"] == 2  # a round's end
    train.main(small(world, tuned, out_dir=str(tmp_path / "parts"), resume=True, **how), {})
    whole, parts = states(tmp_path / "whole" / "last", tmp_path / "parts" / "last")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    start, reference, other = states(tuned / "best", tmp_path / "whole" / "reference", tmp_path / "parts" / "reference")
    assert all(torch.equal(start[name], reference[name]) and torch.equal(start[name], other[name]) for name in start)
    assert not torch.equal(whole["wte.weight"], start["wte.weight"])
    row = log(tmp_path / "whole")[-1]
    assert {"val_exact", "val_pass@1", "val_pass@8", "val_reward", "val_kl", "val_length", "val_malformed", "entropy",
            "clipped", "kl", "reward", "learned"} <= row.keys()


def test_a_policy_with_a_value_head_writes_and_is_learned_from_as_any_chat_model(world, tuned, tmp_path):
    train.main(small(world, tuned, out_dir=str(tmp_path / "ppo"), method="ppo"), {})
    task, model, _ = load(tmp_path / "ppo")
    assert isinstance(model, Critic) and task.write(model, "1 2 3")
    train.main(small(world, tmp_path / "ppo", out_dir=str(tmp_path / "group"), max_iters=2, eval_interval=2), {})
    assert type(load(tmp_path / "group")[1]) is GPT


def test_two_ranks_draw_what_one_draws(world, tuned, tmp_path):
    task, model = opened(world, tuned, out_dir=str(tmp_path))

    def drawn(rank, size, others=()):
        mine = []
        task.world = mock.Mock(rank=rank, size=size, device=torch.device("cpu"),
                               gather=lambda items: mine.extend(items) or [*items, *others])
        return mine, task.roll_out(model, [*task.questions(0), [said("user", "1")]], 4, (1, 2))

    part, _ = drawn(1, 2)
    _, together = drawn(0, 2, part)
    _, alone = drawn(0, 1)
    assert part and all((one == other).all() for one, other in zip(together, alone))


# ----------------------------------------------------------------------------------------------------------------------
# Refused

@pytest.mark.parametrize("values, error", [
    (dict(samples=1), "samples = 1: an answer has no other answers"),
    (dict(samples=5), "samples = 5: must divide the answers of a round"),
    (dict(epochs=3), "epochs = 3: must divide batch_size \\* round = 32"),
    (dict(round=3), "max_iters = 8: must be a multiple of round = 3"),
    (dict(eval_interval=3), "eval_interval = 3: must be a multiple of round = 2"),
    (dict(dropout=0.1), "dropout = 0.1: an answer must be"), (dict(lam=0.9), "lam = 0.9: is for --method=ppo"),
    (dict(method="ppo", divide=False), "divide = False: is for --method=group"),
    (dict(method="ppo", lam=1.5), "lam = 1.5: must be at most 1")])
def test_settings_that_can_not_be_are_refused(values, error, world, tuned):
    with pytest.raises(UserError, match=error):
        small(world, tuned, **values)


def test_a_model_that_is_never_right_has_nothing_to_learn_from(world, tmp_path):
    train.main(settings_for("chat", **SMALL, **SHAPE, dataset=str(world), out_dir=str(tmp_path / "new"), batch_size=32,
                            max_iters=1), {})
    with pytest.raises(UserError, match="all 32 answers of the first round have the reward 0: there is nothing to"):
        train.main(small(world, tmp_path / "new", out_dir=str(tmp_path / "rl")), {})


def test_answers_that_nobody_checks_need_a_reward_model(tuned, tmp_path):
    rows = [{"messages": said_all(f"{a} {b}", f"{a}"), "split": split}
            for a, split in ((3, "train"), (4, "val")) for b in range(9)]
    dialogues.prepare(rows, tmp_path / "talks", str(tuned), 0.1, "made up")
    with pytest.raises(UserError, match="nobody checks its answers: name the run of a reward model, --reward=FOLDER"):
        train.main(small(tmp_path / "talks", tuned, out_dir=str(tmp_path / "out")), {})


def test_the_weights_of_a_gpt_fit_a_critic_and_a_reward_model_and_back():
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=16, tied=False))
    init_weights(model, torch.Generator().manual_seed(0))
    tokens = torch.arange(8)[None]
    critic = as_kind(Critic, model)
    logits, scores = critic(tokens, scored=True)
    assert torch.equal(logits, model(tokens)) and torch.equal(critic(tokens), logits) and (scores == 0).all()
    assert torch.equal(as_kind(GPT, critic)(tokens), logits)
    judge = as_kind(RewardModel, model)
    torch.nn.init.normal_(judge.score.weight)
    long, short = judge(tokens, torch.tensor([7])), judge(tokens[:, :4], torch.tensor([3]))
    assert torch.allclose(judge(torch.cat((tokens, tokens)), torch.tensor([7, 3])), torch.cat((long, short)))
    assert dataclasses.asdict(judge.config)["tied"]


# ----------------------------------------------------------------------------------------------------------------------
# A reward model, and several workers

@pytest.fixture(scope="module")
def judge(world, tuned, tmp_path_factory):
    """A reward model's run: it has learned that large digits are better."""
    folder = tmp_path_factory.mktemp("judge")
    rows = [{"messages": [said("user", f"{a} {b} {c}")], "chosen": max(a, b), "rejected": min(a, b), "split": split}
            for split, digits in (("train", "02468"), ("val", "13579")) for a in digits for b in digits for c in digits
            if a != b]
    dialogues.prepare(rows, folder / "pairs", str(tuned), 0.1, "made up")
    train.main(settings_for("reward", sample_tokens=0, device="cpu", dtype="float32", dataset=str(folder / "pairs"),
                            init_from=str(tuned), out_dir=str(folder / "run"), batch_size=16, max_iters=30,
                            eval_interval=30, learning_rate=1e-2, min_lr=1e-3, warmup_iters=3), {})
    return folder / "run"


@pytest.mark.slow
def test_a_reward_model_gives_the_rewards_and_its_copy_resumes_the_run(judge, world, tuned, tmp_path):
    how = dict(reward=str(judge), kl=0.01, max_iters=60, eval_interval=20, round=2, learning_rate=3e-3)
    train.main(small(world, tuned, out_dir=str(tmp_path / "whole"), **how), {})
    rows = log(tmp_path / "whole")
    found = [row["val_reward"] for row in rows if "val_reward" in row]
    assert found[-1] > found[0] and rows[-1]["val_kl"] > 0
    with pytest.raises(SystemExit):
        train.main(small(world, tuned, out_dir=str(tmp_path / "parts"), max_minutes=1e-9, **how), {})
    away = judge.rename(judge.with_name("away"))
    train.main(small(world, tuned, out_dir=str(tmp_path / "parts"), resume=True, **how), {})
    away.rename(judge)
    whole, parts = states(tmp_path / "whole" / "last", tmp_path / "parts" / "last")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_reward_model_judges_answers_that_nobody_checks(judge, world, tuned, tmp_path):
    rows = [{"messages": [said("system", "1"), *said_all(f"{a} {b}", f"{a}")], "split": split}
            for a, split in ((3, "train"), (4, "train"), (5, "val")) for b in range(9)]
    dialogues.prepare(rows, tmp_path / "talks", str(tuned), 0.1, "made up")
    how = dict(reward=str(judge), answer_tokens=3, out_dir=str(tmp_path / "out"), max_iters=4)
    train.main(small(tmp_path / "talks", tuned, **how), {})
    row = log(tmp_path / "out")[-1]
    assert {"val_loss", "val_reward", "val_kl"} <= row.keys() and "val_pass@1" not in row and row["val_length"] <= 3
    with pytest.raises(UserError, match="a round asks 40 questions, and only 18 training rows leave room"):
        train.main(small(tmp_path / "talks", tuned, **how | dict(batch_size=80)), {})
    with pytest.raises(UserError, match="block_size = 24: a question has .* tokens, and an answer up to 20"):
        train.main(small(world, tuned, **how | dict(answer_tokens=20)), {})


def test_a_reward_model_that_does_not_fit_is_refused_before_anything_moves(judge, world, tuned, tmp_path):
    with pytest.raises(UserError, match=f"reward = {judge}: lies in out_dir = {judge.parent}"):
        small(world, tuned, reward=str(judge), out_dir=str(judge.parent))
    train.main(small(world, tuned, out_dir=str(tmp_path / "run"), max_iters=4), {})
    other = tmp_path / "other"
    shutil.copytree(judge, other)
    for path in other.glob("*/tokenizer.json"):
        chat_tokenizer(CharTokenizer("0123456789 x")).save(path)
        (path.parent / "SHA256SUMS").write_text("".join(
            f"{checkpoint.digest(file)}  {file.name}\n" for file in sorted(path.parent.glob("*"), reverse=True)
            if file.name != "SHA256SUMS"))
    with pytest.raises(UserError, match="reward = .*other: has another tokenizer than the model that answers"):
        train.main(small(world, tuned, reward=str(other), out_dir=str(tmp_path / "run")), {})
    assert not (tmp_path / "run" / "earlier.1").exists()


def test_a_lost_reward_model_ends_a_resumed_run_without_a_false_hint(judge, world, tuned, tmp_path):
    with pytest.raises(SystemExit):
        train.main(small(world, tuned, reward=str(judge), out_dir=str(tmp_path), max_minutes=1e-9), {})
    (tmp_path / "reward" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged .*: the run needs this model. .*--out_dir=NEW$"):
        train.main(small(world, tuned, reward=str(judge), out_dir=str(tmp_path), resume=True), {})


def test_an_answer_without_an_end_gets_the_lowest_score(judge, world, tuned, tmp_path):
    task, model = opened(world, tuned, reward=str(judge), out_dir=str(tmp_path), answer_tokens=1)
    task.meet(model, 0)
    task.continuations = lambda model, prompts, pick: [[token, task.tokenizer.eos][:1 + i % 2]
                                                       for i, token in enumerate(range(3, 3 + len(prompts)))]
    found = task.roll_out(model, [[said("user", "1 2 3")]], 4, (1, 2))
    assert (found.rewards[0::2] == found.rewards.min()).all() and found.rewards[1::2].max() > found.rewards.min()


def test_what_is_no_reward_model_is_refused(tuned, world, tmp_path):
    with pytest.raises(UserError, match="reward = .* is of the class GPT, and scores nothing"):
        train.main(small(world, tuned, reward=str(tuned), out_dir=str(tmp_path)), {})


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(tmp_path):
    dialogues.prepare(dialogues.of_world("countdown"), tmp_path / "data", "char", 0.1, "made up", "countdown")
    train.main(settings_for("chat", **SMALL, n_layer=2, n_head=2, n_embd=64, block_size=32, zero_init=True,
                            optimizer="muon", dataset=str(tmp_path / "data"), out_dir=str(tmp_path / "sft"),
                            batch_size=64, max_iters=250, learning_rate=1e-3, min_lr=1e-4, eval_interval=250), {})
    one = small(tmp_path / "data", tmp_path / "sft", out_dir=str(tmp_path / "1"), batch_size=32, micro_batch_size=8)
    train.main(one, {})
    two = differences(dataclasses.replace(one, out_dir=str(tmp_path / "2")))
    done = torchrun(ROOT / "train.py", *as_arguments(two))
    assert done.returncode == 0, done.stderr
    for row, other in zip(*(log(tmp_path / name) for name in "12"), strict=True):
        for name in ("loss", "grad_norm", "reward", "learned"):
            assert row[name] == pytest.approx(other[name], abs=1e-4, rel=1e-3)
