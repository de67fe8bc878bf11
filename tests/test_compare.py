"""tools/compare.py and tools/versus.py: groups of seeds, and what their differences show."""

import json
import math
import random
import shutil
import subprocess

import pytest

from configurator import UserError
from run.curves import series
from tools import compare, ladder, paired, stages, transfer, versus


def make_run(folder, seed, loss, task="text", n=10, ms=10.0, **settings):
    """A run of n * 10 updates whose validation loss falls to `loss`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 10 * i, "loss": loss, "ms": ms, "val_loss": loss + (n - i) / 10} for i in range(1, n + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": task, "seed": seed, "out_dir": str(folder), "learning_rate": 0.1, **settings}
    (folder / "run.json").write_text(json.dumps({"settings": settings, "starts": []}))
    return folder


def mark(folder, data, code="1"):
    """Writes the data and code that a run's last checkpoint records."""
    (folder / "last").mkdir(exist_ok=True)
    (folder / "last" / "config.json").write_text(json.dumps({"data": {"sha256": data}, "code": {"model.GPT": code}}))


def test_runs_are_grouped_over_seeds(tmp_path, capsys):
    for seed, loss in enumerate((2.0, 2.1, 2.2), 1):
        make_run(tmp_path / f"a{seed}", seed, loss)
    make_run(tmp_path / "b", 1, 1.5, learning_rate=0.2, vision={"n_layer": 3})
    make_run(tmp_path / "pairs", 1, 0.1, task="contrastive")
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "damaged", 1, 1.0)
    (tmp_path / "damaged" / "run.json").write_text("{")
    folders = sorted(map(str, tmp_path.iterdir()))
    compare.main([*folders, folders[0]], compare.Settings())
    out, err = capsys.readouterr()
    heading, first, second, where = out.splitlines()
    assert heading.split() == ["learning_rate", "vision.n_layer", "best", "s.d.", "seeds", "last", "updates", "time",
                               "folder"]
    assert first.split() == ["0.2", "3", "1.5000", "-", "1", "1.5000", "100", "1", "s", str(tmp_path / "b")]
    assert second.split()[:8] == ["0.1", "-", "2.1000", "0.1000", "3", "2.1000", "100", "1"]
    assert where == f"curves: {tmp_path / 'compare.svg'}" and (tmp_path / "compare.svg").exists()
    assert [line.split(": ")[0] for line in err.splitlines()] == [str(tmp_path / name)
                                                                  for name in ("damaged", "empty", "pairs")]
    compare.main(folders[:1], compare.Settings(markdown=True, out=str(tmp_path / "one.svg")))
    assert capsys.readouterr().out.startswith("| best | last | updates | time | folder |\n| --- |")
    with pytest.raises(UserError, match="none of these"):
        compare.main([str(tmp_path / "empty"), str(tmp_path / "nothere")], compare.Settings())
    assert "nothere: left out: there is no such folder\n" in capsys.readouterr().err


def test_runs_with_other_data_or_code_are_other_groups(tmp_path, capsys):
    runs = [make_run(tmp_path / f"r{seed}", seed, 2 + seed / 10) for seed in range(1, 5)]
    for run, marks in zip(runs, (("x", "1"), ("x", "1"), ("y", "1"), ("x", "2"))):
        mark(run, *marks)
    compare.main(list(map(str, runs)), compare.Settings())
    heading, *lines = capsys.readouterr().out.splitlines()[:-1]
    assert heading.split()[:5] == ["data", "code", "best", "s.d.", "seeds"]
    assert [line.split()[4] for line in lines] == ["2", "1", "1"]
    make_run(runs[2], 3, 2.3, dataset="other")  # tells the groups apart, so the marks are not shown
    compare.main(list(map(str, runs[:3])), compare.Settings())
    assert capsys.readouterr().out.split()[:2] == ["dataset", "best"]


def test_damaged_records_and_odd_names_are_no_obstacle(tmp_path, capsys):
    a, b = make_run(tmp_path / "a", 1, 2.0, note="x|y\nz"), make_run(tmp_path / "b", 1, 3.0)
    odd, deep = make_run(tmp_path / "odd", 1, 1.0, task=["x"]), make_run(tmp_path / "deep", 1, 1.0)
    (deep / "run.json").write_text('{"settings":' + '{"a":' * 3000 + "1" + "}" * 3001)
    mark(a, {})
    (a / "last" / "config.json").write_text("[]")
    compare.main(list(map(str, (a, b, odd, deep))), compare.Settings(markdown=True))
    out, err = capsys.readouterr()
    assert out.splitlines()[2].startswith(r"| x\|y z | 2.0000 |") and len(out.splitlines()) == 5
    assert "its task is ['x']" in err and "deep: left out" in err
    for path in (tmp_path, tmp_path / "none" / "x.svg"):
        with pytest.raises(UserError, match="out = "):
            compare.Settings(out=str(path))


def test_the_t_quantile_is_that_of_the_tables():
    tables = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 10: 2.2281, 30: 2.0423, 1000: 1.9623}
    assert {freedom: round(paired.t_quantile(freedom), 4) for freedom in tables} == tables


@pytest.mark.slow  # scipy takes seconds to import
def test_the_t_quantile_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 7, 8, 29, 100):
        assert paired.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)
    values = [0.3, -0.1, 0.25, 0.4, 0.1]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = paired.interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def log(losses, ms):
    return [{"step": 10 * i, "seconds": 10 * i * ms / 1000, "val_loss": y} for i, y in enumerate(losses, 1)]


def test_equal_updates_and_equal_time():
    a, b = [log([4, 3, 2], 10), log([4.5, 3.5, 2.5], 10)], [log([4, 3, 2.1, 2], 15), log([4.5, 3.5, 2.4, 2], 15)]
    pairs = paired.at_equal_updates(a, b)
    assert [pair[:2] for pair in pairs] == [(1, 30), (2, 30)]
    assert [pair.b - pair.a for pair in pairs] == pytest.approx([0.1, -0.1])
    pairs = paired.at_equal_time(a, b)  # a ends after 0.3 s, where b has made 20 updates
    assert [pair.b - pair.a for pair in pairs] == pytest.approx([1.0, 1.0]) and pairs[0].at == pytest.approx(0.3)
    half_way = paired.at_equal_time([log([4, 3, 2], 10)], [log([4, 3, 2], 12)])[0]
    assert half_way.b == pytest.approx(2.5)
    assert paired.at_equal_updates([log([4], 10)], [[]]) == []
    assert paired.at_equal_time([log([4, 3], 10)], [log([4, 3], 30)]) == []  # b was not evaluated before a's end


def test_the_verdict_is_in_words():
    def said(differences):
        return paired.verdict([paired.Pair(i, 1, 2.0, 2.0 + one) for i, one in enumerate(differences)])

    assert said([-0.1, -0.12, -0.11]) == "b is better by 0.1100 \u00b1 0.0248"
    assert said([0.1, 0.12, 0.11]).startswith("a is better")
    assert said([0.1, -0.12, 0.01]).startswith("no difference is shown: b - a is -0.0033 \u00b1")
    assert said([0.0, 0.0]).startswith("no difference at all")
    assert "--seeds" in said([0.1])


class Ended:
    """A process that has ended."""
    returncode = 0
    __enter__ = poll = lambda self: self
    __exit__ = wait = lambda self, *error: None


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """(names of the runs that were trained, what the next one finds): {"data": its digest, "code": `code_in`}."""
    trained, now = [], {"data": "x", "code": {"optimizer.py": "1", "model.py": "1"}}

    def train(command, **_):
        values = dict(text.lstrip("-").split("=") for text in command[2:] if "=" in text)
        trained.append(values["out_dir"][-7:])
        rate = float(values.get("learning_rate", 1))
        noise = random.Random(values["seed"]).random()
        mark(make_run(tmp_path / values["out_dir"], 1, rate + noise, ms=rate), now["data"])
        return Ended()

    monkeypatch.setattr(versus.subprocess, "Popen", train)
    monkeypatch.setattr(versus, "code_in", lambda root: now["code"])
    return trained, now


def test_a_comparison_trains_each_run_once_and_refuses_other_recipes(trainings, tmp_path, capsys):
    trained, now = trainings
    out = tmp_path / "out"
    recipes, shared = ["", "--learning_rate=0.9"], ["--max_iters=100"]
    versus.main(recipes, shared, versus.Settings(seeds=2, out=str(out)))
    assert trained == ["a/seed1", "b/seed1", "b/seed2", "a/seed2"]
    versus.main(recipes, shared, versus.Settings(seeds=3, out=str(out)))
    said = capsys.readouterr().out
    assert trained[4:] == ["a/seed3", "b/seed3"] and "b is better by 0.1000 \u00b1 0.0000" in said
    assert "(on a quiet machine only: a's runs took 0.1 to 0.1 s, b's runs took 0.1 to 0.1 s)" in said
    found = json.loads((out / "versus.json").read_text())
    assert found["at equal updates"]["b - a"] == pytest.approx(-0.1) and (out / "versus.svg").exists()
    assert math.isclose(found["at equal time"]["pairs"][0]["at"], 0.09)
    with pytest.raises(UserError, match="recipe b has another dropout: write .*--out=NEW, or delete .*b "):
        versus.main(["", "--learning_rate=0.9 --dropout=0.1"], shared, versus.Settings(out=str(out)))
    for given, match in (("--seed=3", "seed: is chosen"), ("--no=1", "unknown setting"), ("x '", "no closing quot"),
                         (" --help", "within a recipe")):
        with pytest.raises(UserError, match=match):
            versus.main(["", given], shared, versus.Settings(out=str(out)))
    with pytest.raises(UserError, match="1 recipes; name two"):
        versus.main([""], shared, versus.Settings(out=str(out)))
    with pytest.raises(UserError, match="out = .*: is the folder of a training run; name a new folder, --out="):
        versus.main(recipes, shared, versus.Settings(out=str(out / "a" / "seed1")))
    new = tmp_path / "new"
    with pytest.raises(UserError, match="a and b have the same settings"):
        versus.main(["", " --dropout=0.0"], shared, versus.Settings(out=str(new)))
    with pytest.raises(UserError, match=f"{out}: is a folder, and .* python -m tools.compare {out} {out / 'a'}$"):
        versus.main([str(out), f"{out / 'a'} --dropout=0.1"], [], versus.Settings(out=str(new)))
    assert not new.exists()
    now["data"] = "y"
    with pytest.raises(UserError, match="seed4 was trained with other data than .*seed1"):
        versus.main(recipes, shared, versus.Settings(seeds=4, out=str(out)))
    for text in ("{}", "[]", "{", '{"settings": {"a": 1}}', "[" * 100_000):
        (out / "versus.json").write_text(text)
        with pytest.raises(UserError, match="does not say what it compares"):
            versus.main(recipes, shared, versus.Settings(out=str(out)))


def test_runs_of_other_code_are_refused_before_anything_is_shown(trainings, tmp_path, monkeypatch, capsys):
    trained, now = trainings
    out, code = tmp_path / "out", now["code"]

    def compare(seeds):
        versus.main(["", "--learning_rate=0.9"], ["--max_iters=100"], versus.Settings(seeds=seeds, out=str(out)))

    compare(1)
    capsys.readouterr()
    now["code"] = {**code, "optimizer.py": "2"}
    for seeds in (1, 2):
        with pytest.raises(UserError, match=r"changed since .*out were trained \(optimizer.py\): undo that, "
                                            "choose a new folder, --out=NEW, or delete a, b in .*out$"):
            compare(seeds)
    assert len(trained) == 2 and not capsys.readouterr().out
    now["code"] = code
    compare(2)
    assert trained[2:] == ["b/seed2", "a/seed2"]
    monkeypatch.setattr(versus, "series", lambda *about: now.update(code={}) or series(*about))  # edited meanwhile
    with pytest.raises(UserError, match="model.py, optimizer.py"):
        compare(3)
    (out / "code.json").unlink()
    with pytest.raises(UserError, match="no code.json"):
        compare(2)
    for name in "ab":
        shutil.rmtree(out / name)
    now["code"] = {"x.py": "1"}
    monkeypatch.setattr(versus, "series", series)
    compare(1)
    assert json.loads((out / "code.json").read_text()) == now["code"]


def test_the_code_is_what_trains(tmp_path):
    files = {"train.py": "import os\nimport model\n\ndef f():\n    from tasks import NAMES\n", "model.py": "x = 1\n",
             "tasks/__init__.py": '"""Tasks."""\n', "tasks/one.py": "y = f\"{1}\"\n", "tasks/fast.c": "int z;\n",
             "tools/__init__.py": "", "look.py": "import model\n", "config/model.py": "", "tasks/README.md": "look"}

    def code(**edited):
        for name, text in (files | edited).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return versus.code_in(tmp_path)

    first = code()
    assert first.keys() == {"train.py", "model.py", "tasks/__init__.py", "tasks/one.py", "tasks/fast.c"}
    same = {"model.py": '# why\n"""What\nit is."""\n\nx = 1  # one', "look.py": "x", "tasks/README.md": "x"}
    assert code(**same) == first
    for name, text in (("model.py", "x = 2\n"), ("tasks/one.py", 'y = f"{2}"\n'), ("tasks/fast.c", "int y;\n"),
                       ("tasks/__init__.py", "(")):
        now = code(**{name: text})
        assert [other for other in first if now[other] != first[other]] == [name]
    ours = versus.code_in(versus.ROOT)
    assert {"optimizer.py", "sources/known.py", "tasks/chat.py", "lecture.py", "machine/decode.c"} <= ours.keys()
    assert not [name for name in ours if name.startswith(("tools", "tests", "config/", "look", "sample", "ideas"))]


def test_progress_is_that_of_the_log(tmp_path, monkeypatch):
    class Running(Ended):
        steps = [0, 10, 20]

        def poll(self):
            return None if self.steps else 0

        def wait(self, seconds):
            assert seconds  # else nothing would be shown until the end
            make_run(tmp_path / "a" / "seed1", 1, 2.0, n=self.steps.pop(0) // 10)
            raise subprocess.TimeoutExpired("train.py", seconds)

    class Line(Ended):
        disable, n, shown = False, 0, []

        def update(self, more):
            self.n += more
            self.shown.append(self.n)

    monkeypatch.setattr(versus.subprocess, "Popen", lambda *about, **how: Running())
    monkeypatch.setattr(versus, "progress", lambda total, what, unit: Line())
    versus.train(["train.py"], 1, tmp_path / "a" / "seed1", 30)
    assert Line.shown == [10, 20]


@pytest.mark.parametrize("tool, folder", [(ladder, ""), (stages, "countdown"), (transfer, "topics")])
def test_tools_that_keep_finished_runs_refuse_those_of_other_code(tool, folder, tmp_path, monkeypatch):
    make_run(tmp_path / folder / "one" / "two", 1, 2.0)
    (tmp_path / folder / "code.json").write_text('{"model.py": "as it was"}')
    monkeypatch.setattr(tool, "train", lambda *about: pytest.fail("trained"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets it, and changes the folder: for this test alone
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the code has changed since .* or delete one in"):
        tool.main(tool.Settings(out=str(tmp_path)))
