"""Output for a terminal: its width, colours, progress bars, and control characters made harmless."""

import os
import re
import shutil
import sys


def columns():
    """The terminal's width in characters; 100 without a terminal."""
    return shutil.get_terminal_size((100, 24)).columns


def paint(text, code, stream=None):
    """The text with the ANSI colour `code` ("32" is green); plain if `stream` is no terminal or NO_COLOR is set."""
    on = (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[{code}m{text}\x1b[0m" if on else text


def printable(text, stream=None):
    """The text; for a terminal, with a symbol for each control character except newline and tab."""
    if not (stream or sys.stdout).isatty():
        return text
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", symbol, text)


def symbol(match):
    """The symbol for a control character, such as \u241b for escape; \ufffd for those above 127."""
    code = ord(match[0])
    return "\u2421" if code == 127 else chr(0x2400 + code) if code < 32 else "\ufffd"


def progress(total, what, unit=""):
    """A tqdm progress bar, used as a context; call update(n) on it after n more units.

    It appears after two seconds, only on rank 0's terminal, and vanishes at the end. total: in units; None if unknown.
    """
    from tqdm import tqdm
    quiet = True if os.environ.get("RANK", "0") != "0" else None  # None: quiet unless stderr is a terminal
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, delay=2, disable=quiet, leave=False,
                dynamic_ncols=True)


def watched(items, what):
    """Yields the items of a sequence and shows a progress bar, labelled `what`."""
    with progress(len(items), what) as line:
        for item in items:
            yield item
            line.update()
