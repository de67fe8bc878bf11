"""The arithmetic task: problems are right, held-out operands stay out, and exact answers are what the model writes."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import settings_for
from test_train import resume

import evaluate
import sample
import train
from configurator import UserError, flat_fields, help_text, parse
from machine.distributed import World
from run import checkpoint
from tasks.arithmetic import ArithmeticTask
from tasks.loading import load

ROOT = Path(train.__file__).parent
FOLDER = ROOT / "data" / "arithmetic"
ALONE = World(0, 1, torch.device("cpu"))
TINY = dict(dataset="arithmetic", operations="+-*", digits=1, n_layer=1, n_head=2, n_embd=32, block_size=8,
            batch_size=32, max_iters=60, warmup_iters=5, learning_rate=1e-2, min_lr=1e-3, eval_interval=20,
            log_interval=10, device="cpu", dtype="float32")


def opened(**changes):
    task = ArithmeticTask(settings_for("arithmetic", **{**TINY, **changes}))
    task.open(FOLDER, ALONE)
    return task


def run(out_dir, **changes):
    train.main(settings_for("arithmetic", **{**TINY, **changes}, out_dir=str(out_dir)), changes)
    return log(out_dir)


def log(out_dir):
    rows = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row.get("val_loss"), row.get("val_exact")) for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("runs") / "arithmetic"
    run(out_dir)
    return out_dir


@pytest.mark.parametrize("operations, digits", [("+", 3), ("*-", 2), ("-", 1)])
def test_problems_are_right_and_of_one_length(operations, digits):
    task = opened(operations=operations, digits=digits)
    rows = np.concatenate(list(task.parts.values()))
    assert np.array_equal(np.sort(rows), np.arange(len(operations) * 100**digits))
    found = task.problems(rows[::97 if digits > 1 else 1])
    assert len({problem for problem, _ in found}) == len(found)
    for problem, written in found:
        a, sign, b = problem[:digits], problem[digits], problem[digits + 1:-1]
        assert sign in operations and problem[-1] == "="
        assert int(written[::-1]) == eval(f"int('{a}') {sign} int('{b}')")
        assert task.answer(written) == str(int(written[::-1])) and len(problem + written) == task.block_size + 1


def test_the_working_is_that_of_a_long_multiplication():
    task = opened(digits=2, operations="-*", working=True, block_size=15)
    for problem, written in task.problems(np.arange(2 * 100**2)[::97]):
        a, sign, b = int(problem[:2]), problem[2], int(problem[3:5])
        first, second = (int(part[::-1]) for part in (written[:3], written[3:6]))
        assert len(problem + written) == task.block_size + 1 == 16
        assert (first, second) == ((a * (b % 10), a * (b // 10)) if sign == "*" else (0, 0))
        assert int(task.answer(written)) == (first + 10 * second if sign == "*" else a - b)
    rows = task.pick(3)
    assert task.batch(rows, None)[1].sum() == task.weight(rows) == len(rows) * 10


def test_held_out_operands_are_in_no_problem_of_training_in_neither_order():
    task, larger = opened(digits=2), opened(digits=3, operations="+")
    pairs = {part: {frozenset(pair) for pair in zip(*(x.tolist() for x in task.solve(rows)[1:3]))}
             for part, rows in task.parts.items()}
    assert not pairs["train"] & (pairs["val"] | pairs["test"]) and not pairs["val"] & pairs["test"]
    assert sum(map(len, pairs.values())) == 100 * 101 / 2
    _, a, b, _ = larger.solve(larger.parts["val"])
    among = np.maximum(a, b) < 100  # a larger run's problems keep their part
    assert {frozenset(pair) for pair in zip(a[among].tolist(), b[among].tolist())} == pairs["val"]
    for part, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert len(larger.parts[part]) == pytest.approx(share * 1e6, rel=0.02)
    drawn = np.concatenate([task.pick(step) for step in range(2 * len(task.parts["train"]) // 32)])
    assert set(drawn.tolist()) <= set(task.parts["train"].tolist())
    assert not np.array_equal(task.pick(0), task.pick(1)) and np.array_equal(task.pick(1), opened(digits=2).pick(1))


def test_only_the_answer_is_scored():
    task = opened(digits=2)
    rows = task.pick(3)
    arguments, weights = task.batch(rows, None)
    assert weights.sum() == task.weight(rows)
    for (problem, answer), tokens, targets, scored in zip(task.problems(rows), *arguments.values(), weights):
        assert task.tokenizer.decode(tokens.tolist()) == (problem + answer)[:-1]
        assert task.tokenizer.decode(targets[scored > 0].tolist()) == answer


def test_exact_answers_are_those_that_the_model_writes(trained):
    task, model, _ = load(trained)
    task.open(FOLDER, ALONE)
    rows = task.parts["val"]
    written = task.answers(model, [problem for problem, _ in task.problems(rows)])
    answers = task.solve(rows)[3].tolist()
    right = [text == str(answer) for text, answer in zip(written, answers)]
    found = task.evaluate(model, "val", ALONE, torch.float32)
    assert found["exact"] == np.mean(right) and 0.1 < found["exact"] < 1
    assert found["exact"] == checkpoint.read_config(trained / "best")["val_exact"]
    with torch.no_grad():
        arguments, weights = task.batch(rows, None)
        nats = (model(**arguments) * weights).sum() / weights.sum()
    assert found["loss"] == pytest.approx(nats.item(), abs=1e-5)
    i, a, b, _ = task.solve(rows)
    report = task.report(model, "val", ALONE, torch.float32)
    assert report["exact *, digits: 1"] == np.mean(np.array(right)[i == 2])
    assert report["exact by copying the larger operand"] == np.mean(np.maximum(a, b) == answers)
    assert report["exact by the best constant answer"] == max(map(answers.count, answers)) / len(rows)


def test_problems_are_counted_by_operation_and_by_the_digits_of_the_larger_operand():
    task = opened(digits=2, block_size=9)
    model = task.build(torch.Generator().manual_seed(0))
    kinds = [(i, len(str(max(a, b)))) for i, a, b, _ in zip(*(x.tolist() for x in task.solve(task.parts["test"])))]
    found = task.score(model, "test", ALONE, torch.float32)[:, 2].tolist()
    assert found == [kinds.count((i, digits)) for i in range(3) for digits in (1, 2)] and sum(found) == len(kinds)


def test_a_resumed_run_equals_an_undisturbed_one(trained, tmp_path):
    run(tmp_path, max_iters=20, lr_decay_iters=60)
    resume(tmp_path, "--max_iters=60")
    assert log(tmp_path) == log(trained) and log(trained)[-1][1] < log(trained)[0][1]
    one, other = (checkpoint.load(folder / "last").state for folder in (trained, tmp_path))
    torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_the_commands_evaluate_and_sample(trained, capsys):
    task, model, _ = load(trained)
    line = shlex.split(task.command(trained))
    assert line[:2] == ["python", "sample.py"]
    sample.main(parse(sample.Settings, [*line[2:], "--device=cpu"], **sample.HOW)[0])
    shown = capsys.readouterr().out.strip()
    assert shown == task.write(model, "7+5") and shown.startswith("7+5=")
    assert task.write(model, " 7 + 5 =\n") == shown
    evaluate.main(settings_for("arithmetic", "evaluating", out_dir=str(trained), device="cpu", test=True))
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["test exact"] != found["exact"] and found["problems"] == 39
    settings = settings_for("arithmetic", "evaluating", out_dir=str(trained), device="cpu")
    evaluate.main(settings)
    assert json.loads((trained / "evaluation.json").read_text()) == found  # the test part's figures stay
    (trained / "evaluation.json").write_text(json.dumps(found | {"step": found["step"] + 1}))
    evaluate.main(settings)  # the figures of another step don't
    assert "test exact" not in json.loads((trained / "evaluation.json").read_text())
    for prompt in ("7/5=", "17+5=", "", "7+5=12"):
        with pytest.raises(UserError, match="prompt = .*must be a problem such as 7.5=, with .* at most 1 digit$"):
            task.write(model, prompt)


@pytest.mark.parametrize("changes, message", [
    (dict(block_size=4), r"block_size = 4: .* needs at least 5"), (dict(operations="+/"), "operations = '\\+/'"),
    (dict(operations="++"), "operations = "), (dict(digits=4), "digits = 4"),
    (dict(operations="+-", working=True), "working = True: is for --operations with"),
    (dict(sample_tokens=9), "sample_tokens"),
])
def test_settings_that_do_not_fit_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **changes)


def test_its_problems_are_its_data_set_unless_another_is_named():
    settings, given = parse(train.Settings, ["--task=arithmetic"], **train.HOW)
    assert settings.dataset == "arithmetic" and "dataset" not in given
    assert help_text(type(settings), "").count("--dataset=arithmetic ") == 1


def test_other_data_and_models_with_other_tokens_are_refused(trained, dataset, tiny, tmp_path):
    with pytest.raises(UserError, match="dataset = .*: --task=arithmetic makes its own data; leave it out"):
        run(tmp_path / "a", dataset=str(dataset))
    with pytest.raises(UserError, match="--task=arithmetic makes its own data; leave it out"):
        evaluate.main(settings_for("arithmetic", "evaluating", out_dir=str(trained), dataset=str(dataset)))
    text = {name: value for name, value in tiny.items() if name in flat_fields(type(settings_for("text")))}
    train.main(settings_for("text", **{**text, "max_iters": 1}, out_dir=str(tmp_path / "text")), {})
    with pytest.raises(UserError, match="init_from = .*: its tokens are not the characters 0123456789"):
        run(tmp_path / "b", init_from=str(tmp_path / "text"))
