"""Text and JSON written whole: whoever looks finds the old file or the new one, never half of it."""

import json
import os


def to_json(value):
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def write_json(path, value):
    write_text(path, to_json(value))


def write_text(path, text):
    """Writes path.new and renames it to `path` when it has reached the disk."""
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def sync_folder(folder):
    """Has the names in a folder reach the disk. Windows has no way to ask for that."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
