"""Text and JSON written whole: whoever looks finds the old file or the new one, never half of it."""

import json
import os
from pathlib import Path

from configurator import UserError


def read_json(path):
    """Raises UserError if the file can't be read or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def write_json(path, value):
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_text(path, text):
    """Writes path.new and renames it to `path` when it has reached the disk."""
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(new, path)


def rename(old, new):
    """Has the new name of a file or folder reach the disk, except on Windows, which has no way to ask for that."""
    os.replace(old, new)
    if os.name != "nt":
        handle = os.open(Path(new).parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
