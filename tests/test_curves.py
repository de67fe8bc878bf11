"""run/curves.py: the pictures are XML, show the values of the log, and tolerate damaged logs."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from run import curves

SVG = "{http://www.w3.org/2000/svg}"


def rows_of(n, every=10, **more):
    return [{"step": i * every, "lr": 1e-3, "loss": 2 + 2 / i, "mean_loss": 2.1 + 2 / i, "grad_norm": 1.0, "ms": 10.0,
             **({"val_loss": 2.2 + abs(i - 30) / 100} if i % 5 == 0 else {}), **more} for i in range(1, n + 1)]


def picture(folder, rows, extra=""):
    """Returns (all texts, XML root) of the picture of a log. rows: of the log; extra: more lines, as text."""
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + extra, encoding="utf-8")
    curves.draw(folder)
    root = ElementTree.parse(folder / "curves.svg").getroot()
    return [text.text or "" for text in root.iter(f"{SVG}text")], root


def points(root, number=0):
    """Returns the points of a curve, in pixels of its panel. number: which curve of the picture."""
    line = list(root.iter(f"{SVG}polyline"))[number]
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def test_a_picture_shows_the_log(tmp_path):
    words, root = picture(tmp_path, rows_of(40))
    assert str(tmp_path) in words and "400 updates" in words
    assert curves.read_log(tmp_path)[-1]["seconds"] == pytest.approx(4.0)  # 400 updates of 10 ms
    assert "validation (best 2.2000 at step 300)" in words and "training (mean of each interval)" in words
    assert {"0", "100", "400", "updates", "Learning rate", "Gradient norm"} <= set(words)
    (x, y), (x_last, y_last) = points(root, 1)[5], points(root, 1)[-1]  # validation: the best and the last
    ring = next(circle for circle in root.iter(f"{SVG}circle") if circle.get("fill") == "none")
    assert (float(ring.get("cx")), float(ring.get("cy"))) == (x, y) and y > y_last and x == 0.75 * x_last
    heights = [float(label.get("y")) for label in root.iter(f"{SVG}text") if label.text in ("2.20", "2.30", "2.40")]
    assert heights == sorted(heights, reverse=True) and len(heights) == 3


def test_damaged_and_unusual_logs_are_drawn(tmp_path):
    rows = rows_of(3)
    garbage = '[1]\n"x"\nnull\n{"step": 5}\n{"step": "9", "loss": 1}\n{"step": 40, "loss": NaN}\ncut {"st'
    assert "30 updates" in picture(tmp_path, rows, garbage)[0]
    beyond_range = [{"step": 31, "loss": 10**400}, {"step": 32, "loss": 2.0, "val_loss": 1e308},
                  {"step": 33, "loss": 2.0, "val_loss": -1e308, "ms": -1e9}, {"step": 9, "loss": 2.0, "ms": 50}]
    assert "9 updates" in picture(tmp_path, rows + beyond_range)[0]
    seconds = [row["seconds"] for row in curves.read_log(tmp_path)]
    assert len(seconds) == 6 and seconds == sorted(seconds)
    assert not [word for word in picture(tmp_path, rows_of(1))[0] if "nan" in word or "inf" in word]
    without = [{name: value for name, value in row.items() if name != "mean_loss"} for row in rows]
    assert "training (last batch of each interval)" in picture(tmp_path, without)[0]
    assert "Validation bleu" in picture(tmp_path, rows_of(5, val_bleu=20.0))[0]
    (tmp_path / "curves.svg").unlink()
    for text in ("", "no rows\n"):
        (tmp_path / "log.jsonl").write_text(text)
        assert curves.draw(tmp_path) is None and not (tmp_path / "curves.svg").exists()
    odd = tmp_path / "a & <b>\x1b"
    odd.mkdir()
    assert str(odd).replace("\x1b", "?") in picture(odd, rows)[0]


def test_a_curve_of_many_points_keeps_its_extremes(tmp_path):
    rows = rows_of(5000)
    rows[3000]["grad_norm"] = 900.0
    words, root = picture(tmp_path, rows)
    assert max(map(len, (points(root, i) for i in range(4)))) < 400  # of 5,000
    bands = [shape.get("points").split() for shape in root.iter(f"{SVG}polygon")]
    norms = [float(point.split(",")[1]) for point in bands[-1]]
    assert min(norms) < 10 < 100 < max(norms)  # pixels: one at the upper edge, all others near the lower one
    assert "100" in words  # a logarithmic axis


def test_the_steep_start_does_not_flatten_the_rest():
    def shown(losses):
        return curves.loss_range([curves.Curve([(i + 1, y) for i, y in enumerate(losses)], "")])

    cliff = [11 * math.exp(-i / 3) + 3 - i / 1000 for i in range(200)]
    low, high = shown(cliff)
    assert low == min(cliff) and high < 3.2
    low, high = shown([4 - i / 100 for i in range(100)] + [1e6] * 20)  # it diverges
    assert low == 3.01 and 4 <= high < 6
    assert shown([2.5, 2.4, 2.3]) == (2.3, 2.5) and shown([2.0]) == (2.0, 2.0)


def test_ticks_are_round():
    assert [text for _, text in curves.ticks(0, 20_000, 8)] == ["0", "5,000", "10,000", "15,000", "20,000"]
    assert [text for _, text in curves.ticks(1.43, 1.87, 5)] == ["1.5", "1.6", "1.7", "1.8"]
    assert [text for _, text in curves.ticks(0, 6e-5, 3)] == ["0", "2e-5", "4e-5", "6e-5"]
    assert [text for _, text in curves.ticks(-0.5, 2.2, 4, logged=True)] == ["1", "10", "100"]


def test_pictures_do_not_import_torch():
    code = "import sys, run.curves, tools.compare, tools.paired; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=curves.__file__.rsplit("/run/")[0]).returncode == 0
