import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from configurator import UserError
from run import files, lock
from sources import known

ROOT = Path(__file__).parents[1]
HOLDER = """
import os, sys, time
from run.lock import owned
with owned(sys.argv[1]):
    child = os.fork() if hasattr(os, "fork") else 1
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """(process, child): a process that owns the folder `out`, and the id of its child, which outlives it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "out"], stdout=subprocess.PIPE, text=True,
                               cwd=ROOT)
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    if child > 1:
        os.kill(child, 9)


def test_a_folder_is_owned_until_its_process_ends(tmp_path, holder):
    process, child = holder
    before = (tmp_path / "out" / "run.lock").read_text()
    message = f"out_dir = .*: process {process.pid} on .* has been training there since 2.*; wait until it ends"
    with pytest.raises(UserError, match=message):
        with lock.owned(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "run.lock").read_text() == before and os.listdir(tmp_path / "out") == ["run.lock"]
    threading.Timer(0.2, process.kill).start()
    for wait in (True, False):  # though the child is alive and the file exists
        with lock.owned(tmp_path / "out", wait=wait):
            assert process.wait() is not None
            assert f'"pid": {os.getpid()}' in (tmp_path / "out" / "run.lock").read_text()


def test_a_run_waits_while_another_one_prepares_its_data_set(tmp_path, holder, monkeypatch):
    def end():
        (tmp_path / "out" / "digits").mkdir()
        (tmp_path / "out" / "digits" / "meta.json").touch()
        holder[0].kill()

    monkeypatch.setattr(known, "DATA", tmp_path / "out")
    monkeypatch.setattr(known, "prepare_known", None)
    threading.Timer(0.2, end).start()
    assert known.ensure("digits") == "digits"


def test_a_file_system_without_locks_is_reported_and_accepted(tmp_path, monkeypatch, capsys):
    def fails(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "lock", fails)
    with lock.owned(tmp_path):
        assert "this file system has no locks (No locks available): never start a second" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_names_the_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out_dir = .*file/x: Not a directory; name another folder"):
        with lock.owned(tmp_path / "file" / "x"):
            pass


def test_a_lock_that_is_not_a_file_is_named(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(UserError, match="run.lock in it is not a file: delete it, or name another folder"):
        with lock.owned(tmp_path):
            pass


@pytest.mark.skipif(os.name == "nt", reason="Windows does not move open files")
def test_a_folder_that_was_moved_is_no_longer_owned(tmp_path):
    folder = tmp_path / "out"
    with lock.owned(folder):
        lock.require_owned(folder)
        folder.rename(tmp_path / "moved")
        with pytest.raises(UserError, match="out_dir = .*out was moved or deleted while the run was using it"):
            lock.require_owned(folder)
        folder.mkdir()
        (folder / "run.lock").touch()  # another run's
        with pytest.raises(UserError, match="was moved or deleted"):
            lock.require_owned(folder)
    lock.require_owned(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows can't sync folders")
def test_a_folder_that_cannot_be_synced_is_accepted_but_a_disk_error_is_not(tmp_path, monkeypatch):
    def fails(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    number = errno.EINVAL
    files.write_text(tmp_path / "a", "x")
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        files.write_text(tmp_path / "a", "x")
