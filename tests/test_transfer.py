"""tools/transfer.py: which runs it makes, and its table and picture."""

import pytest

from configurator import UserError
from tools import transfer
from tools.versus import settings_of


@pytest.fixture
def runs(monkeypatch):
    """[(init_from, rates.encoder, lora_rank, train_rows, folder)] of the runs that would be trained and scored."""
    runs, known = [], {50: 0.4, 200: 0.5, 1000: 0.6, 0: 0.7}

    def spied(words, seed, folder, updates):
        s = settings_of(" ".join(words[1:]), [])
        assert s["max_iters"] == updates == s["eval_interval"]
        folder.mkdir(parents=True)
        runs.append((s["init_from"], s.get("rates.encoder", 1.0), s["lora_rank"], s["train_rows"], folder))

    def score(folder):
        init, rate, _, rows, _ = runs[-1]
        accuracy = known[rows] + 0.1 * (init != "scratch") + 0.05 * (rate > 0)
        floors = {f"{name}accuracy, bag of words": value for name, value in (
            ("", 0.3), ("test ", 0.2), ("intent_", 0.7), ("test intent_", 0.6))}
        return {"accuracy": accuracy, "test accuracy": accuracy - 0.1, **floors}

    monkeypatch.setattr(transfer, "train", spied)
    monkeypatch.setattr(transfer, "score", score)
    monkeypatch.setattr(transfer, "read_json", lambda path: {"train_rows": 2000})
    return runs


def test_each_start_is_trained_with_each_number_of_labels_and_shown(runs, tmp_path, capsys):
    transfer.main(transfer.Settings(masked="out/m", sentences="bert", out=str(tmp_path)))
    assert [run[:4] for run in runs] == [(*start, rows) for start in (
        ("scratch", 1.0, 0), ("out/m", 0.5, 0), ("out/m", 0.0, 0), ("bert", 0.1, 0), ("bert", 0.0, 0),
        ("bert", 0.5, 8)) for rows in transfer.ROWS]
    assert len({run[-1] for run in runs}) == 24
    said = capsys.readouterr().out
    assert "| validation / test | 50 labels | 200 labels | 1,000 labels | all |" in said
    assert "| published BERT, frozen | 50.0 / 40.0 | 60.0 / 50.0 | 70.0 / 60.0 | 80.0 / 70.0 |" in said
    assert "| bag of words | 30.0 / 20.0 |" in said
    picture = (tmp_path / "topics" / "transfer.svg").read_text()
    assert all(f">{name}<" in picture for name in ("from scratch", "masked model, frozen", "bag of words"))
    runs.clear()
    transfer.main(transfer.Settings(masked="", out=str(tmp_path / "small")))
    assert [run[0] for run in runs] == ["scratch"] * 4


def test_intents_have_starts_a_floor_and_a_folder_of_their_own(runs, tmp_path, capsys):
    transfer.main(transfer.Settings(data="intents", sentences="bert", out=str(tmp_path)))
    assert [run[:3] for run in runs[::4]] == [("scratch", 1.0, 0), ("bert", 0.1, 0), ("bert", 0.0, 0), ("bert", 0.5, 8)]
    assert "| bag of words | 70.0 / 60.0 |" in capsys.readouterr().out
    assert "intents of commands" in (tmp_path / "intents" / "transfer.svg").read_text()
    with pytest.raises(UserError, match="masked = 'out/m': has read help pages"):
        transfer.Settings(data="intents", masked="out/m")


def test_a_run_that_has_a_score_keeps_it(tmp_path, monkeypatch):
    (tmp_path / "evaluation.json").write_text('{"accuracy": 0.5}')
    monkeypatch.setattr("subprocess.run", lambda *about, **how: pytest.fail("scored again"))
    assert transfer.score(tmp_path) == {"accuracy": 0.5}
