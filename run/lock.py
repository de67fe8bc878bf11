"""A run owns its folder while it lives: a lock on run.lock, which the system takes back when the process ends.

    with owned("out"):
        ...

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

HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # what the systems say of a lock that another process has
HANDLES = set()  # of the locks that this process has


@contextlib.contextmanager
def owned(folder, setting="out_dir", did="trained"):
    """Holds the folder, which is made if it isn't there. Raises UserError if another living process has it.

    setting: what names the folder. did: what its owner has done there.
    Where the file system has no locks, one line says so, and the run goes on.
    """
    path = Path(folder) / "run.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{setting} = {folder}: {error.strerror}; name another folder") from None
    HANDLES.add(handle)
    try:
        try:
            lock(handle)
        except OSError as error:
            if error.errno in HELD:
                raise UserError(f"{setting} = {folder}: {owner(path, did)}; wait for its end, or name another folder"
                                f" with --{setting}") from None
            say(f"{path}: no locks on this file system ({error.strerror}): start no second run in {folder}")
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": platform.node(),
                                     "started": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
        yield
    finally:
        close(handle)


def lock(handle):
    """Locks an open file. Raises OSError if another process has locked it, or if the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows, where what is locked can't be read: so a byte beyond the text is
        import msvcrt
        os.lseek(handle, 2**20, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def owner(path, did):
    """In words, which process has the lock."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} has {did} there since {found['started']}"
    return f"another process has {did} there"


def close(handle):
    if handle in HANDLES:
        HANDLES.remove(handle)
        os.close(handle)


def forget():
    """A forked child lets go of the locks: it may outlive the run."""
    for handle in list(HANDLES):
        close(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
