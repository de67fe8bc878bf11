"""A process owns its folder by a file lock on run.lock, which the system releases when the process ends.

The file names the owner, for messages. It is never deleted; only the lock counts.
"""

import contextlib
import errno
import json
import os
import platform
import time
from pathlib import Path

from configurator import UserError, say

OWNED = {}  # {path: open file} of the run.lock files that this process has locked; closed ones are released
HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # another process has the lock


@contextlib.contextmanager
def owned(folder, setting="out_dir", did="been training", wait=False):
    """Owns the folder inside the `with` block, and creates it if needed. Where files can't be locked, only says so.

    Raises UserError if another process owns the folder; with wait=True waits for that process to end instead.
    setting, did: for messages, the setting that names the folder and what the owner has done in it.
    """
    path = Path(folder) / "run.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        in_the_way = os.path.lexists(path) and not path.is_file()
        advice = f"{path.name} in it is not a file: delete it, or " if in_the_way else ""
        raise UserError(f"{setting} = {folder}: {error.strerror or error}; {advice}name another folder") from None
    with file:
        while not acquire(file):
            if not wait:
                raise UserError(f"{setting} = {folder}: {owner(path, did)}; wait until it ends, or name another"
                                f" --{setting}")
            say(f"{folder}: {owner(path, did)}; waiting until it ends")
            time.sleep(0.5)
        file.truncate(0)
        about = {"pid": os.getpid(), "host": platform.node(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk: the run's own files will report it
            os.write(file.fileno(), json.dumps(about).encode())  # not file.write: closing would fail again
        OWNED[path] = file
        yield


def require_owned(folder):
    """Raises UserError if this process owned the folder and it was moved or deleted: the path may be another run's."""
    file = OWNED.get(path := Path(folder) / "run.lock")
    with contextlib.suppress(FileNotFoundError):
        if not file or file.closed or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return
    raise UserError(f"out_dir = {folder} was moved or deleted while the run was using it")


def acquire(file):
    """Locks an open file, if the file system can. Returns False if another process has locked it, else True."""
    try:
        lock(file)
    except OSError as error:
        if error.errno in HELD:
            return False
        say(f"{file.name}: this file system has no locks ({error.strerror}): never start a second run in this folder")
    return True


def lock(file):
    """Locks an open file for this process, but not for its children. Raises OSError if it can't."""
    try:
        import fcntl
    except ImportError:  # Windows: locked bytes can't be read, so lock one beyond the text
        import msvcrt
        file.seek(2**20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's locks would live on in forked children


def owner(path, did):
    """Returns which process has the lock, in words."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} has {did} there since {found['started']}"
    return f"another process has {did} there"
