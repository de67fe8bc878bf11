"""Atomic writes of text and JSON files: a reader finds the old file or the new one, never half of one."""

import errno
import json
import os
import re
from pathlib import Path

from configurator import UserError

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # this file system can't sync folders: CIFS, FUSE


def read_json(path):
    """Returns the value in a JSON file. Raises UserError if the file can't be read or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def to_json(value, indent=None):
    """Returns the value as JSON, with a newline at the end. NaN and infinity, which JSON lacks, become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=indent) + "\n"


def write_json(path, value):
    write_text(path, to_json(value, indent=1))


def write_text(path, text):
    """Writes and syncs path.new, then renames it to `path`."""
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(new, path)


def rename(old, new):
    """Renames a file or folder, and syncs the new name to disk where the system can."""
    os.replace(old, new)
    if os.name == "nt":
        return
    folder = os.open(Path(new).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(folder)


def reason(error):
    """Returns why a write failed: the operating system's words, if torch or safetensors have wrapped them in others."""
    said = re.sub(r".*: (.*) \(os error \d+\)", r"\1", str(error).partition("\n")[0])
    while error and not isinstance(error, OSError):
        error = error.__context__
    return getattr(error, "strerror", None) or said
