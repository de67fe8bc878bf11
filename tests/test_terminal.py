"""Output for a terminal: colours if they are wanted, and no control characters."""

import pytest

from machine.terminal import paint, printable


class Stream:
    def __init__(self, terminal):
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_reach_files_but_no_terminal(terminal):
    text = "a\x1b[2Jb\r\x07\x9b1m\x7f\tc\n\u00e9\U0001f600"
    shown = "a\u241b[2Jb\u240d\u2407\ufffd1m\u2421\tc\n\u00e9\U0001f600"
    assert printable(text, Stream(terminal)) == (shown if terminal else text)


def test_colours_are_for_terminals_unless_no_color_is_set(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert paint("best", "32", Stream(True)) == "\x1b[32mbest\x1b[0m" and paint("best", "32", Stream(False)) == "best"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("best", "32", Stream(True)) == "best"
