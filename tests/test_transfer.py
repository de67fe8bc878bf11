"""tools/transfer.py: which runs it makes, and its table and picture."""

import pytest

from tools import transfer
from tools.versus import settings_of


def test_each_start_is_trained_with_each_number_of_labels_and_shown(tmp_path, monkeypatch, capsys):
    runs, known = [], {50: 0.4, 200: 0.5, 1000: 0.6, 0: 0.7}

    def spied(words, seed, folder, updates):
        s = settings_of(" ".join(words[1:]), [])
        assert s["max_iters"] == updates == s["eval_interval"]
        runs.append((s["init_from"], s["rates.encoder"] if "rates.encoder" in s else 1.0, s["train_rows"], str(folder)))

    def score(folder):
        init, rate, rows, _ = runs[-1]
        accuracy = known[rows] + 0.1 * (init != "scratch") + 0.05 * (rate > 0)
        return {"accuracy": accuracy, "test accuracy": accuracy - 0.1, "accuracy, bag of words": 0.3,
                "test accuracy, bag of words": 0.2}

    monkeypatch.setattr(transfer, "train", spied)
    monkeypatch.setattr(transfer, "score", score)
    monkeypatch.setattr(transfer, "read_json", lambda path: {"train_rows": 2000})
    transfer.main(transfer.Settings(masked="out/m", sentences="bert", out=str(tmp_path)))
    assert [run[:3] for run in runs] == [(init, rate, rows) for init, rate in (
        ("scratch", 1.0), ("out/m", 0.5), ("out/m", 0.0), ("bert", 0.1), ("bert", 0.0)) for rows in transfer.ROWS]
    assert len({run[3] for run in runs}) == 20
    said = capsys.readouterr().out
    assert "| validation / test | 50 labels | 200 labels | 1,000 labels | all |" in said
    assert "| published BERT, frozen | 50.0 / 40.0 | 60.0 / 50.0 | 70.0 / 60.0 | 80.0 / 70.0 |" in said
    assert "| bag of words | 30.0 / 20.0 |" in said
    picture = (tmp_path / "transfer.svg").read_text()
    assert all(f">{name}<" in picture for name in ("from scratch", "masked model, frozen", "bag of words"))
    runs.clear()
    transfer.main(transfer.Settings(masked="", out=str(tmp_path)))
    assert [run[0] for run in runs] == ["scratch"] * 4


def test_a_run_that_has_a_score_keeps_it(tmp_path, monkeypatch):
    (tmp_path / "evaluation.json").write_text('{"accuracy": 0.5}')
    monkeypatch.setattr("subprocess.run", lambda *about, **how: pytest.fail("scored again"))
    assert transfer.score(tmp_path) == {"accuracy": 0.5}
