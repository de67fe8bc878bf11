"""Text and JSON written whole: whoever looks finds the old file or the new one, never half of it."""

import errno
import json
import os
from pathlib import Path

from configurator import UserError

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # where folders can't be synced: CIFS, some FUSE


def read_json(path):
    """Raises UserError if the file can't be read or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def to_json(value, indent=None):
    """The value as JSON and a line's end. Infinity and NaN, which JSON lacks, become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=indent) + "\n"


def write_json(path, value):
    write_text(path, to_json(value, indent=1))


def write_text(path, text):
    """Writes path.new and renames it to `path` when it has reached the disk."""
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(new, path)


def rename(old, new):
    """Has the new name of a file or folder reach the disk, where the system has a way to ask for that."""
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
