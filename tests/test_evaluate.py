import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings_for

import evaluate
import train
from batches import Dataset
from configurator import UserError, parse
from machine import terminal
from run import checkpoint
from sources import texts
from tasks.loading import load, publish
from tasks.text import TextTask
from tokenizer import CharTokenizer


def run(out_dir, **settings):
    settings = {"random_windows": 4, "dtype": "float32", **settings}
    evaluate.main(settings_for("text", "evaluating", out_dir=str(out_dir), device="cpu", **settings))
    return json.loads((Path(out_dir) / "evaluation.json").read_text())


def test_the_loss_is_the_mean_over_all_tokens_of_the_split(trained, dataset):
    found = run(trained)
    model = load(Path(trained) / "best")[1]
    ids = torch.from_numpy(np.array(Dataset(dataset).splits["val"], dtype=np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, 32):  # one window at a time, the last one shorter
        window = ids[start:start + 33]
        total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert found["bits_per_char"] == pytest.approx(found["loss"] / math.log(2))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["step"], found["split"], found["checkpoint"]) == (40, "val", "best")


def test_data_that_were_prepared_anew_are_told(trained, dataset, monkeypatch, capsys):
    run(trained)
    assert "anew" not in capsys.readouterr().err
    monkeypatch.setattr(TextTask, "fingerprint", lambda task: {"sha256": "another"})
    run(trained)
    assert f"{dataset} has been prepared anew since {trained}" in capsys.readouterr().err


def test_an_evaluation_repeats_its_digits_and_those_of_training(trained):
    assert run(trained) == run(trained)
    assert run(trained)["loss"] == pytest.approx(checkpoint.read_config(Path(trained) / "best")["val_loss"], abs=1e-9)


def test_the_random_window_estimate_is_another_measure_with_its_own_seed(trained):
    one, other = run(trained), run(trained, seed=1)
    assert one["loss"] == other["loss"] and one["random_window_loss"] != other["random_window_loss"]
    assert one["random_window_loss"] == pytest.approx(one["loss"], abs=0.05)
    assert run(trained, random_windows=0)["random_window_loss"] is None


def test_a_diverged_model_and_a_folder_without_write_permission_are_scored(trained, monkeypatch, capsys):
    """The perplexity would overflow and is None. The folder gets no evaluation.json."""
    def refuse(path, value):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(TextTask, "evaluate", lambda *arguments, **named: {"loss": 7165.0})
    assert run(trained)["perplexity"] is None
    monkeypatch.setattr(evaluate, "write_json", refuse)
    run(trained)
    assert "evaluation.json can't be written: Permission denied" in capsys.readouterr().out


def test_the_random_windows_are_the_same_however_many_are_scored_at_once(trained, monkeypatch):
    whole = run(trained)
    monkeypatch.setattr("tasks.text.EVAL_TOKENS", 70)
    parts = run(trained)
    for name in ("loss", "random_window_loss"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6)


def test_bits_per_character_count_characters_not_tokens(trained, dataset, tmp_path, text, tiny):
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    texts.prepare([tmp_path / "words.txt"], tmp_path / "bpe", "bpe:300")
    settings = {**tiny, "dataset": str(tmp_path / "bpe"), "max_iters": 3}
    train.main(settings_for("text", **settings, out_dir=str(tmp_path / "out")), {})
    found, meta = run(tmp_path / "out"), Dataset(tmp_path / "bpe").meta
    assert meta["val_characters"] > 1.5 * meta["val_tokens"]
    bits = found["loss"] * meta["val_tokens"] / math.log(2)
    assert found["bits_per_char"] == pytest.approx(bits / meta["val_characters"])
    with pytest.raises(UserError, match="was made with another tokenizer .* prepare.py SOURCE --tokenizer=.*best"):
        run(trained, dataset=str(tmp_path / "bpe"))


def test_an_evaluation_shows_its_progress_but_only_on_a_terminal(trained, monkeypatch):
    seen, real = [], terminal.progress

    def progress(total, what, unit=""):
        line = real(total, what, unit)
        seen.append((what, total, line))
        return line

    monkeypatch.setattr(terminal, "progress", progress)
    run(trained)
    assert [what for what, _, _ in seen] == ["evaluating", "random windows"] and seen[1][1] == 4
    assert all(line.disable and line.disable is not None for _, _, line in seen)  # stderr is no terminal here


def test_a_tokenizer_json_that_does_not_fit_its_data_is_refused(trained, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    CharTokenizer("abc").save(tmp_path / "data" / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json has 3 tokens, and the data set was made with"):
        run(trained, dataset=str(tmp_path / "data"))


def test_a_published_model_scores_as_its_run_does(trained, dataset, tmp_path, capsys):
    publish(trained, tmp_path / "model")
    expected = run(trained)["loss"]
    capsys.readouterr()
    evaluate.main(settings_for("text", "evaluating", init_from=str(tmp_path / "model"), dataset=str(dataset),
                               random_windows=0, device="cpu", dtype="float32"))
    shown = capsys.readouterr().out
    assert float(re.search(r"\bloss +([\d.]+)", shown)[1]) == pytest.approx(expected, abs=2e-6)
    assert "written to" not in shown and not (tmp_path / "model" / "evaluation.json").exists()
    with pytest.raises(UserError, match="init_from = .*: say on which data, --dataset=NAME"):
        parse(evaluate.Settings, [f"--init_from={tmp_path / 'model'}"], **evaluate.HOW)


def test_a_published_model_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is a published model, not a run: name it with --init_from"):
        run(tmp_path)
