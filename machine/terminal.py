"""What a terminal can show: its width, colour, one line of progress; and which characters are safe to send to it."""

import os
import re
import shutil
import sys


def columns():
    """The terminal's width; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def paint(text, code, stream=None):
    """The text in a colour, such as "32" for green: on a terminal, unless NO_COLOR is set."""
    on = (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[{code}m{text}\x1b[0m" if on else text


def printable(text, stream=None):
    """The text as a terminal may get it: each control character but newline and tab as a symbol. Files get it all."""
    if not (stream or sys.stdout).isatty():
        return text
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", symbol, text)


def symbol(match):
    """A control character's picture, such as \u241b for escape; \ufffd for those above 127."""
    code = ord(match[0])
    return "\u2421" if code == 127 else chr(0x2400 + code) if code < 32 else "\ufffd"


def progress(total, what, unit=""):
    """tqdm's line for long work, to be called update(count) on: on a terminal only, after two seconds, then gone.

    total: of the units; None: unknown. Use it as a context.
    """
    from tqdm import tqdm
    quiet = True if os.environ.get("RANK", "0") != "0" else None  # None: where stderr is no terminal
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, delay=2, disable=quiet, leave=False,
                dynamic_ncols=True)


def watched(items, what):
    """Yields the items, of which there is a number, and shows `progress` meanwhile."""
    with progress(len(items), what) as line:
        for item in items:
            yield item
            line.update()
