"""A run owns its folder while it lives: a lock on run.lock, which the system takes back when the process ends.

The file says which process has the folder. It stays behind; without its lock it means nothing.
"""

import contextlib
import errno
import json
import os
import platform
import time
from pathlib import Path

from configurator import UserError, say

OWNED = {}  # the run.lock of each folder that this process owns, by its path; closed: it owns it no more
HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # another process has the lock


@contextlib.contextmanager
def owned(folder, setting="out_dir", did="trained", wait=False):
    """Holds the folder, which is made if it isn't there. Raises UserError if another living process has it.

    setting: what names the folder. did: what its owner has done there. wait: for its end, instead.
    Where the file system has no locks, one line says so, and the run goes on.
    """
    path = Path(folder) / "run.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        there = f"its {path.name} is no file, delete it, or " * (os.path.lexists(path) and not path.is_file())
        raise UserError(f"{setting} = {folder}: {error.strerror or error}; {there}name another folder") from None
    with file:
        while held(file):
            if not wait:
                raise UserError(f"{setting} = {folder}: {owner(path, did)}; wait for its end, or name another"
                                f" --{setting}")
            say(f"{folder}: {owner(path, did)}; waiting for its end")
            time.sleep(0.5)
        file.truncate(0)
        about = {"pid": os.getpid(), "host": platform.node(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk; the run's own files will say so
            os.write(file.fileno(), json.dumps(about).encode())  # past the buffer, which would fail again at its end
        OWNED[path] = file
        yield


def require_owned(folder):
    """Raises UserError if the folder, owned here, was moved or deleted since: another run may have its name now."""
    file = OWNED.get(path := Path(folder) / "run.lock")
    with contextlib.suppress(FileNotFoundError):
        if not file or file.closed or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return
    raise UserError(f"out_dir = {folder} was moved or deleted while the run lived")


def held(file):
    """Whether another process has the lock of an open file; else this one takes it, if the file system has locks."""
    try:
        lock(file)
    except OSError as error:
        if error.errno in HELD:
            return True
        say(f"{file.name}: this file system has no locks ({error.strerror}): start no second one in this folder")
    return False


def lock(file):
    """Locks an open file for this process, and not for its children. Raises OSError if that can't be."""
    try:
        import fcntl
    except ImportError:  # Windows, where what is locked can't be read: so a byte beyond the text is
        import msvcrt
        file.seek(2**20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked children would keep


def owner(path, did):
    """In words, which process has the lock."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} has {did} there since {found['started']}"
    return f"another process has {did} there"
