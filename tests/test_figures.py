"""The pages claim what figures.json has, and tools.figures tells a figure that holds from one that does not."""

import json
import re
import sys

import pytest

from configurator import UserError
from tools import figures

DATA = json.loads((figures.ROOT / "figures.json").read_text(encoding="utf-8"))
ENTRIES = DATA["figures"]
FIELDS = {"page", "section", "says", "machine", "commit", "minutes", "setup", "command", "why", "seeds", "find",
          "within", "rows", "text"}
PAGES = {name: (figures.ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "EXPERIMENTS.md")}
PRINT = f'"{sys.executable}" -c "print({{with}})"'


def table_rows(page):
    """(section, first cell, other cells) of each row of each table of a page; the headings of tables are left out."""
    for part in re.split(r"^##+ ", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE):
        section = part.splitlines()[0]
        for table in re.findall(r"^\|.*\n\|[ |:-]+\n((?:\|.*\n)+)", part, re.MULTILINE):
            for line in table.splitlines():
                first, *others = [cell.strip() for cell in line.strip("|").split("|")]
                yield section, first, others


@pytest.mark.parametrize("name", PAGES)
def test_every_number_in_a_table_has_an_entry_and_every_entry_its_row(name):
    claimed = {(entry["section"], label, *row["shown"]) for entry in ENTRIES.values() if entry["page"] == name
               for label, row in entry["rows"].items() if row.get("shown")}
    on_page = {(section, first, *others) for section, first, others in table_rows(PAGES[name])
               if re.search(r"\d", " ".join(others))}
    assert on_page - claimed == set()
    assert claimed - on_page == set()


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_complete(name):
    entry = ENTRIES[name]
    assert entry.keys() <= FIELDS and entry["machine"] in DATA["machines"]
    assert re.fullmatch("[0-9a-f]{7,}", entry["commit"])
    assert f"\n## {entry['section']}\n" in PAGES[entry["page"]].replace("\n### ", "\n## ")
    page = " ".join(PAGES[entry["page"]].split())
    assert all(phrase in page for phrase in entry.get("text", ()))
    if not entry["command"]:
        assert entry["why"]
        return
    assert entry["minutes"] > 0 and entry.get("within", {}).keys() <= entry["find"].keys()
    seeds = len(entry.get("seeds", [0]))
    for row in entry["rows"].values():
        claimed = [row[what] for what in entry["find"] if what in row]
        assert claimed and all(len(numbers) == seeds for numbers in claimed if isinstance(numbers, list))
    for pattern in entry["find"].values():
        assert all(re.compile(one).groups == 1 for one in ([pattern] if isinstance(pattern, str) else pattern))


def entry_of(output, **changes):
    """An entry whose command prints something."""
    return {"says": "a test", "command": PRINT, "find": {"loss": r"loss ([\d.,]+)"}, "within": {"loss": 0.1},
            "rows": {"`one`": {"with": repr(output), "loss": 1.5}}, **changes}


@pytest.mark.parametrize("output, wrong", [("loss 9, loss 1.58", 0), ("loss 1.61", 1)])
def test_a_figure_holds_or_does_not(output, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert figures.measure_all({"it": entry_of(output)}, "one") == wrong
    assert ("DOES NOT HOLD" in capsys.readouterr().out) == bool(wrong)


def test_a_ratio_may_be_off_by_a_factor_and_a_time_is_not_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    entry = entry_of("ours 3,000 theirs 1,000 in 7 s", within={"ratio": 1.3},
                     find={"ratio": [r"ours ([\d,]+)", r"theirs ([\d,]+)"], "seconds": r"in (\d+) s"})
    for ratio, wrong in ((2.4, 0), (3.8, 0), (2.2, 1), (4.0, 1)):
        entry["rows"]["`one`"] |= {"ratio": ratio, "seconds": 99}
        assert figures.measure_all({"it": entry}) == wrong
    assert "seconds 7, claimed 99: not judged" in capsys.readouterr().out


def test_the_mean_over_the_seeds_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    entry = entry_of("", command=f'"{sys.executable}" -c "print({{seed}} + 0.5)"', seeds=[1, 2],
                     find={"loss": r"([\d.]+)"}, rows={"one": {"loss": [1.9, 2.2]}})
    assert figures.measure_all({"it": entry}) == 0
    entry["rows"]["one"]["loss"] = [1.5, 1.7]
    assert figures.measure_all({"it": entry}) == 1


def test_what_cannot_be_measured_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    with pytest.raises(UserError, match="nothing that matches 'loss"):
        figures.measure_all({"it": entry_of("no number")})
    with pytest.raises(UserError, match="exit status 3 of: echo .*: the cause .*output.txt has all of it"):
        figures.measure_all({"it": entry_of("", command='echo the cause; exit 3')})
    with pytest.raises(UserError, match="row = two: there is no such row; there are: one"):
        figures.measure_all({"it": entry_of("loss 1")}, "two")


@pytest.mark.parametrize("names, changes, message", [
    ([], {}, "name a figure"), (["debug-mun"], {}, "debug-mun: there is no such figure; did you mean debug-muon?"),
    (["debug-muon", "two-workers"], dict(row="Muon"), "name one figure"),
    (["debug-muon"], dict(row="SGD"), "row = SGD: there is no such row; there are: AdamW; Muon"),
    (["debug-muon"], dict(minutes=1.0), "minutes = 1: is in place of names; leave it out, or debug-muon"),
    ([], dict(minutes=0.01), "minutes = 0.01: the quickest figure takes"),
    ([], dict(minutes=1.0, row="Muon"), "row = 'Muon': it is for a figure that is named"),
    ([next(name for name, entry in ENTRIES.items() if not entry["command"])], {}, "no command of this repository"),
])
def test_what_cannot_be_chosen_is_named_before_anything_runs(names, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        figures.choose(ENTRIES, names, figures.Settings(**changes))


def test_the_list_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(figures, "columns", lambda: 80)
    figures.main(["debug-muon"], figures.Settings(list=True))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80 and lines[0].startswith("debug-muon") and "100 updates" in lines[0]
