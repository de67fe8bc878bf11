"""One HTML file from a record: page.html with the style, the script and the record in it.

The file loads nothing. Its Content-Security-Policy lets the browser run the scripts that were put in here, known by
their hashes, and nothing else: no other script, no attribute that holds code, no request to another address.
"""

import base64
import hashlib
import json
from pathlib import Path
from string import Template

from configurator import UserError

HERE = Path(__file__).parent


def part(name):
    """The text of a file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


def page(record, scripts=(), styles=()):
    """The HTML, a str. record: see record.py; None: nothing is shown until a script calls show(record).

    scripts, styles: further texts, which go after the page's own. With scripts, the page may ask its own server.
    """
    script, style = "\n".join((part("page.js"), *scripts)), "\n".join((part("page.css"), *styles))
    return Template(part("page.html")).substitute(
        script=script, script_hash=hashed(script), style=style, style_hash=hashed(style), record=escaped(record),
        connect="'self'" if scripts else "'none'")


def hashed(text):
    """The source expression by which a Content-Security-Policy knows an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def escaped(record):
    """The record as JSON in ASCII, without <: so no text of it can end the <script> that holds it.

    Raises UserError for a number that JSON lacks.
    """
    try:
        return json.dumps(record, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    except ValueError:
        raise UserError("the model computes NaN or infinity, so there is nothing to show: its training went wrong, or"
                        " its weights need another --dtype") from None
