"""bench.py measures what it says, and its table is the JSON."""

import json
import shlex
import sys

import pytest

import bench
from configurator import UserError


def test_every_measured_row_is_in_the_json(tmp_path, capsys):
    out, nothing = tmp_path / "bench.json", f"{shlex.quote(sys.executable)} -c pass"
    bench.main(bench.Settings(only="train,sample,against", sizes="small", dtypes="float32", batches="1,2",
                              new_tokens=4, repeats=1,
                              transformers=False, device="cpu", ours=nothing, against=nothing, out=str(out)))
    rows = {row["case"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"small, float32, ours", "small, float32, 1 at once, ours", "small, float32, 2 at once, ours",
                         "ours", "theirs"}
    printed = capsys.readouterr().out
    assert all(case in printed and 0 < row["least"] <= row["median"] <= row["most"] for case, row in rows.items())


def test_a_command_that_fails_is_named():
    with pytest.raises(UserError, match="ended with status 3: alas"):
        bench.command([sys.executable, "-c", "import sys; sys.exit(print('alas') or 3)"], ".")()
    with pytest.raises(UserError, match="no_such_program -x: can't be started: No such file"):
        bench.command(["no_such_program", "-x"], ".")()
    with pytest.raises(UserError, match="out = no_such_folder/b.json: there is no folder no_such_folder"):
        bench.Settings(out="no_such_folder/b.json")
    with pytest.raises(UserError, match="give both or neither"):
        bench.Settings(against="true")
