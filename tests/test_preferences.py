"""Preferences: their data, reward models, DPO and its reference, and answers that are checked to make them."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings_for

import evaluate
import prepare
import train
from batches import DialogueDataset
from configurator import UserError, parse
from critic import RewardModel
from machine.distributed import World
from run.files import read_json
from sources import dialogues
from tasks import task_class
from tasks.loading import load
from tasks.scores import answer_ids, best_of, scores, scores_of
from tools import answers
from worlds import WORLDS

HERE = World(0, 1, torch.device("cpu"))
SMALL = dict(batch_size=4, warmup_iters=1, learning_rate=3e-3, eval_interval=4, log_interval=2, sample_tokens=4,
             device="cpu", dtype="float32")
SHAPE = dict(n_layer=1, n_head=2, n_embd=32, block_size=32)


def user(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def wrong_rows():
    """A right answer of each of some sums above a wrong one, which is sometimes longer."""
    for i, row in enumerate(dialogues.of_world("calculator")):
        if i % 40 == 0:
            prompt, answer = (each["content"] for each in row["messages"])
            rejected = f"{int(answer) + 1}" + "0" * (i % 80 > 0)
            yield {"messages": user(prompt), "chosen": answer, "rejected": rejected, "split": row["split"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folders of preferences between answers of calculator, and of its dialogues."""
    folder = tmp_path_factory.mktemp("data")
    dialogues.prepare(dialogues.of_world("calculator"), folder / "chat", "char", 0.1, "x", "calculator")
    dialogues.prepare(wrong_rows(), folder / "pairs", str(folder / "chat"), 0.1, "x", "calculator")
    return folder


@pytest.fixture(scope="module")
def chat(data):
    """A chat run that has learned a little."""
    out = data / "run"
    train.main(settings_for("chat", **SMALL, **SHAPE, dataset=str(data / "chat"), out_dir=str(out), max_iters=30,
                            pack=False), {})
    return out


def opened(kind, data, chat, **settings):
    """(task, model) of a run that starts from the chat run, in eval mode."""
    source, model, _ = load(chat)
    settings = settings_for(kind, **SMALL | dict(init_from=str(chat), **settings))
    task = task_class(kind)(settings, source.tokenizers, chat)
    task.open(data / "pairs", HERE)
    model = task.adopt(model, torch.Generator().manual_seed(0))
    task.fit(model)
    return task, model.eval()


def run_of(kind, data, chat, out, **settings):
    """Trains from the chat run on the pairs."""
    how = SMALL | dict(dataset=str(data / "pairs"), init_from=str(chat), out_dir=str(out), max_iters=8) | settings
    train.main(settings_for(kind, **how), {})


def weights_of(folder):
    return load(folder, which="last")[1].state_dict()


# ----------------------------------------------------------------------------------------------------------------------
# Data

def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(folder, rows):
    source = lines(folder / "pairs.jsonl", rows)
    settings, given = parse(prepare.Settings, [f"--name={folder / 'data'}", "--val_fraction=0.3"])
    prepare.main(settings, [str(source)], given)
    return DialogueDataset(folder / "data", "preferences").rows


def test_preferences_in_each_form_of_the_world_are_the_same_data(tmp_path, capsys):
    said = [("hello", "hi", "no"), ("who?", "me", "you"), ("why?", "so", "but"), ("how?", "thus", "as"),
            ("a", "b", "c")]
    forms = [  # the last one is UltraFeedback's
        [dict(prompt=p, chosen=c, rejected=r) for p, c, r in said],
        [dict(prompt=user(p), chosen=user(p, c)[1:], rejected=user(p, r)[1:]) for p, c, r in said],  # TRL, explicit
        [dict(chosen=user(p, c), rejected=user(p, r)) for p, c, r in said],  # HH: the prompt is in both
        [dict(prompt=p, chosen=user(p, c), rejected=user(p, r), messages=user(p, c)) for p, c, r in said],
    ]
    found = []
    for i, rows in enumerate(forms):
        (tmp_path / str(i)).mkdir()
        found.append(prepared(tmp_path / str(i), rows))
    assert found[0] == found[1] == found[2] == found[3]
    rows = sorted(map(json.dumps, found[0]["train"] + found[0]["val"]))
    assert rows == sorted(json.dumps({"messages": user(p), "chosen": c, "rejected": r}) for p, c, r in said)
    assert "train on it: python train.py config/chat/dpo.py" in capsys.readouterr().out


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("row, error", [
    (GOOD | {"prompt": user("a", "b")}, "prompt: ends with the assistant: its last message must be the user's"),
    (GOOD | {"prompt": [{"role": "bot", "content": "a"}]}, "prompt, message 1: the role 'bot' is unknown"),
    (GOOD | {"chosen": " "}, "chosen: the answer is empty: leave the line out"),
    (GOOD | {"rejected": "b"}, "chosen and rejected are equal: leave the line out"),
    (GOOD | {"prompt": ""}, "chosen: is a text without a prompt"),
    (GOOD | {"chosen": 3}, "chosen: messages must be a list"),
    ({"chosen": user("a", "b", "x", "y"), "rejected": user("a", "c", "x", "z")}, "differ before the last answer"),
    ({"messages": user("a", "b")}, "is a dialogue, and the first line is preferences: prepare the two kinds apart")])
def test_a_bad_preference_is_named_in_a_line(tmp_path, row, error):
    path = lines(tmp_path / "pairs.jsonl", [GOOD, row])
    with pytest.raises(UserError, match="pairs.jsonl, line 2.*") as found:
        list(dialogues.read([path]))
    assert error in str(found.value) and "\n" not in str(found.value)


def test_dialogues_are_not_taken_for_preferences(data):
    with pytest.raises(UserError, match="is a data set of kind chat, and this model needs one of kind preferences"):
        DialogueDataset(data / "chat", "preferences")


# ----------------------------------------------------------------------------------------------------------------------
# Reward models

def test_the_loss_of_bradley_and_terry_pulls_the_scores_of_a_pair_apart(data, chat):
    task, _ = opened("reward", data, chat)
    found = torch.tensor([1.0, -2.0, 0.5, 1.5], requires_grad=True)  # chosen, chosen, rejected, rejected
    weights = torch.tensor([0.25, 2.0])
    loss, shown = task.loss(lambda: found, {}, weights)
    surely = [1 / (1 + math.exp(-margin)) for margin in (0.5, -3.5)]  # the probability that chosen is preferred
    assert loss.item() == pytest.approx(-0.25 * math.log(surely[0]) - 2.0 * math.log(surely[1]))
    loss.backward()
    pull = [0.25 * (1 - surely[0]), 2.0 * (1 - surely[1])]
    assert found.grad.tolist() == pytest.approx([-pull[0], -pull[1], *pull])
    assert shown["agreement"] == 0.25


def test_a_reward_model_may_go_on_learning_to_write_the_chosen_answers(data, chat):
    task, model = opened("reward", data, chat, sft=0.5)
    arguments, weights = task.batch(np.array([0, 5]), None)
    plain, _ = opened("reward", data, chat)
    rows = [task.dataset.rows["train"][i] for i in (0, 5)]
    nats = []
    for row in rows:
        ids, start = (answer_ids(task.chat, row["messages"], row["chosen"]), len(task.chat.prompt(row["messages"])))
        logp = load(chat)[1](torch.from_numpy(ids)[None]).log_softmax(-1)[0]
        nats.append(-sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids))) / (len(ids) - start))
    without = plain.loss(model, plain.batch(np.array([0, 5]), None)[0], weights)[0].item()
    assert task.loss(model, arguments, weights)[0].item() == pytest.approx(without + 0.5 * sum(nats), rel=1e-5)


def test_a_new_reward_model_scores_all_alike(data, chat):
    task, model = opened("reward", data, chat)
    assert type(model) is RewardModel
    assert task.evaluate(model, "val", HERE, torch.float32) == {"loss": pytest.approx(math.log(2)), "agreement": 0.5}


@pytest.fixture(scope="module")
def reward(data, chat):
    out = data / "reward"
    run_of("reward", data, chat, out, max_iters=60)
    return out


def test_a_score_is_read_at_the_end_token_and_does_not_depend_on_its_batch(reward):
    task, model, _ = load(reward)
    asked = ("1+2", "3"), ("61-70", "-9"), ("1+2", "12345678")
    rows = [answer_ids(task.chat, user(prompt), answer) for prompt, answer in asked]
    assert all(ids[-1] == task.tokenizer.eos for ids in rows)
    together = scores_of(model.train(), rows)
    assert model.training and len(set(together.tolist())) == 3
    for ids, score in zip(rows, together):
        hidden = model.eval().hidden(torch.from_numpy(ids)[None])
        assert torch.allclose(model.scores(hidden)[0, -1], score, atol=1e-6)
    assert torch.allclose(scores_of(model, [list(ids) for ids in rows[::-1]]).flip(0), together, atol=1e-6)
    assert task.write(model, "1+2", answer="3") == f"{together[0]:.4f}"
    with pytest.raises(UserError, match="prompt and answer have 45 tokens, and the reward model reads 32"):
        task.write(model, "1" * 40, answer="2")


def test_agreement_is_counted_over_the_held_out_pairs(data, reward):
    evaluate.main(settings_for("reward", "evaluating", out_dir=str(reward), dataset=str(data / "pairs"), test=True,
                               device="cpu", dtype="float32"))
    found, (task, model, _) = read_json(reward / "evaluation.json"), load(reward)
    for split, name in (("val", ""), ("test", "test ")):
        rows = DialogueDataset(data / "pairs", "preferences").rows[split]
        each = [scores(model, task.chat, [row["messages"] for row in rows], [row[side] for row in rows])
                for side in ("chosen", "rejected")]
        assert found[f"{name}agreement"] == pytest.approx((each[0] > each[1]).float().mean().item())
        assert found[f"{name}loss"] == pytest.approx(-F.logsigmoid(each[0] - each[1]).mean().item(), abs=1e-5)
        lengths = np.array([len(row["chosen"]) - len(row["rejected"]) for row in rows])
        longer = (np.sign(lengths) + 1).mean() / 2
        assert found[f"{name}agreement of the longer answer"] == pytest.approx(longer)
        assert found[f"{name}agreement of the shorter answer"] == pytest.approx(1 - longer)
        assert found[f"{name}mean score of chosen"] == pytest.approx(each[0].mean().item(), abs=1e-5)
    assert found["agreement"] > 0.75  # half of the rejected answers have a digit too many


def test_the_best_of_several_answers_is_the_one_with_the_highest_score(reward, chat):
    task, model, _ = load(reward)
    prompts, texts = ["1+2", "61-70"], [["4", "3", "3<|end|>"], ["-9", "-90", "9", "-9"]]  # control tokens: no score
    found = [[scores(model, task.chat, [user(prompt)], [text]).item() for text in some if "<" not in text]
             for prompt, some in zip(prompts, texts)]
    for verdict in (1.0, 0.0, None):
        verdicts = [[verdict if each.index(max(each)) == i else 1.0 for i in range(len(some))]
                    for each, some in zip(found, texts)]
        assert best_of(reward, "cpu", prompts, texts, verdicts) == (verdict == 1.0)
    with pytest.raises(UserError, match="is of the class GPT, and scores nothing: name the run of a --task=reward"):
        best_of(chat, "cpu", prompts, texts, verdicts)


@pytest.mark.slow
def test_an_evaluation_counts_the_problems_whose_best_sample_is_right(data, reward, chat):
    def figures(**more):
        asked = dict(out_dir=str(chat), dataset=str(data / "chat"), device="cpu", dtype="float32", samples=3)
        evaluate.main(settings_for("chat", "evaluating", **asked | more))
        return read_json(chat / "evaluation.json")

    found = figures(reward=str(reward))
    assert found["reward"] == str(reward)
    assert 0 < found["best of 3"] <= found["pass@3"]
    alone = figures(reward=str(reward), samples=1)
    assert alone["best of 1"] == alone["pass@1"] == pytest.approx(alone["exact of samples"])


def test_a_pair_that_does_not_fit_is_left_out_and_said(data, chat, capsys):
    task = task_class("reward")(settings_for("reward", **SMALL, **SHAPE), load(chat)[0].tokenizers)
    task.open(data / "pairs", HERE)
    task.settings = settings_for("reward", **SMALL, **SHAPE | {"block_size": 11})
    task.fit(task.build(torch.Generator().manual_seed(0)))
    rows = [row for row in task.dataset.rows["train"]
            if len(row["messages"][0]["content"]) + max(len(row["chosen"]), len(row["rejected"])) + 4 <= 11]
    assert len(task.pairs["train"]["rows"]) == len(rows) < len(task.dataset.rows["train"])
    assert "train pairs are left out: an answer ends after block_size = 11 tokens" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# DPO

def test_the_loss_of_dpo_is_its_formula_and_so_is_its_gradient(data, chat):
    task, _ = opened("dpo", data, chat, beta=0.3, sft=0.7)
    logits = torch.tensor([[[0.1, 1.0], [2.0, -1.0]], [[0.3, 0.2], [0.5, 0.9]]]).double().requires_grad_()
    ids, written = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1, 1], [0, 1]])  # one token of the second answer
    reference = torch.tensor([1.5, 0.4]).double()  # nats

    def loss(logits):
        def model(tokens, targets):
            return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        found = dict(tokens=ids, targets=ids, written=written, reference=reference)
        return task.loss(model, found, torch.tensor([0.5], dtype=torch.float64))[0]

    p = logits.softmax(-1).tolist()
    chosen = math.log(p[0][0][0]) + math.log(p[0][1][1])
    rejected = math.log(p[1][1][0])
    margin = 0.3 * ((chosen + 1.5) - (rejected + 0.4))
    assert loss(logits).item() == pytest.approx(0.5 * (math.log(1 + math.exp(-margin)) - 0.7 * chosen / 2))
    assert torch.autograd.gradcheck(loss, logits)


def test_the_written_tokens_are_the_answers_and_their_ends(data, chat):
    task, _ = opened("dpo", data, chat)
    found = task.both("train", np.array([3, 0]))
    rows = [task.dataset.rows["train"][i] for i in (3, 0)]
    texts = [task.tokenizer.decode(ids[written > 0].numpy())
             for ids, written in zip(found["targets"], found["written"])]
    assert texts == [f"{row[side]}<|end|>" for side in ("chosen", "rejected") for row in rows]


def test_the_reference_itself_has_learned_nothing(data, chat):
    task, model = opened("dpo", data, chat)
    task.ask(model, HERE, torch.float32)
    found = task.evaluate(model, "val", HERE, torch.float32)
    assert found["loss"] == pytest.approx(math.log(2)) and found["agreement"] == 0.5
    problems = dict(WORLDS["calculator"].problems("val", 500))
    assert task.problems("val") == list(problems)  # not only those that have pairs
    right = [WORLDS["calculator"].check(prompt, task.write(model, prompt, temperature=0.0, max_new_tokens=4))
             for prompt in list(problems)[:40]]
    some = task.evaluate(model, "val", HERE, torch.float32, limit=40 * task.pairs["val"]["ids"].shape[2])
    assert some["exact"] == pytest.approx(right.count(1.0) / 40)


@pytest.mark.parametrize("more", [{}, pytest.param({"lora_rank": 2}, marks=pytest.mark.slow)], ids=["all", "lora"])
def test_a_resumed_run_has_the_same_reference_and_the_same_numbers(data, chat, tmp_path, more):
    more |= dict(dropout=0.1, sft=0.1)
    run_of("dpo", data, chat, tmp_path / "whole", **more)
    with pytest.raises(SystemExit):
        run_of("dpo", data, chat, tmp_path / "parts", **more, max_minutes=1e-9)
    run_of("dpo", data, chat, tmp_path / "parts", **more, resume=True)
    whole, parts, kept = (weights_of(tmp_path / name) for name in ("whole", "parts", "parts/reference"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    started = load(chat)[1].state_dict()
    assert all(torch.equal(kept[key], started[key]) for key in started)
    assert any(not torch.equal(kept[key], whole[key]) for key in whole)
    evaluate.main(settings_for("dpo", "evaluating", out_dir=str(tmp_path / "parts"), checkpoint="last", device="cpu",
                               dtype="float32"))
    last = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()][-1]
    found = read_json(tmp_path / "parts" / "evaluation.json")
    assert {name: found[name] for name in ("loss", "agreement", "exact")} == pytest.approx(
        {name: last[f"val_{name}"] for name in ("loss", "agreement", "exact")})


def test_a_run_without_its_reference_or_with_another_says_so(data, chat, reward, tmp_path):
    with pytest.raises(SystemExit):
        run_of("dpo", data, chat, tmp_path / "run", max_minutes=1e-9)
    with pytest.raises(UserError, match="out_dir = .*reference: is a copy of another model that the run in .* needs"):
        parse(evaluate.Settings, [f"--out_dir={tmp_path / 'run' / 'reference'}"], **evaluate.HOW)
    shutil.rmtree(tmp_path / "run" / "reference")
    shutil.copytree(reward / "best", tmp_path / "run" / "reference")
    with pytest.raises(UserError, match="run/reference has another model, RewardModel: the run needs this model"):
        run_of("dpo", data, chat, tmp_path / "run", resume=True)
    shutil.rmtree(tmp_path / "run" / "reference")
    with pytest.raises(UserError, match="run/reference is missing: the run needs this model"):
        run_of("dpo", data, chat, tmp_path / "run", resume=True)


# ----------------------------------------------------------------------------------------------------------------------
# Answers that are checked

@pytest.mark.parametrize("pairs", [True, False])
def test_checked_answers_become_data_and_no_problem_changes_its_part(chat, tmp_path, pairs, capsys):
    answers.main(answers.Settings(out_dir=str(chat), name=str(tmp_path / "data"), pairs=pairs, problems=100, most=2,
                                  temperature=0.5))
    rows, world = DialogueDataset(tmp_path / "data", "preferences" if pairs else "chat").rows, WORLDS["calculator"]
    asked = {split: [(row["messages"] if pairs else row)[0]["content"] for row in found]
             for split, found in rows.items()}
    assert set(asked["train"]) <= set(dict(world.problems("train", 100, 1)))
    assert set(asked["val"]) <= set(dict(world.problems("val", 500)))
    assert set(asked["test"]) <= set(dict(world.problems("test", 800)))
    assert all(asked["train"].count(prompt) <= 2 for prompt in asked["train"])
    for prompt, row in zip(asked["train"], rows["train"]):
        assert world.check(prompt, row["chosen"] if pairs else row[1]["content"]) == 1.0
        assert not pairs or world.check(prompt, row["rejected"]) != 1.0
    assert "train: 8 answers to each of 100 problems: " in capsys.readouterr().out


def test_who_has_no_judge_or_asks_for_too_much_is_told(trained, chat, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nobody can check its answers"):
        answers.main(answers.Settings(out_dir=trained, name=str(tmp_path / "data")))
    monkeypatch.setattr(WORLDS["calculator"], "problem", lambda *which: ("1+2", "3"))
    with pytest.raises(UserError, match="problems = 2: calculator has only 1 problems for train"):
        answers.main(answers.Settings(out_dir=str(chat), name=str(tmp_path / "data"), problems=2))
