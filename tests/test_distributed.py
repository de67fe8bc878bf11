"""Real runs of several workers: torchrun starts and restarts them, on one host and on two."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import settings_for
from test_image_classification import data as pictures  # noqa: F401
from test_question_answering import folder as asked  # noqa: F401
from test_tagging import folder as tagged  # noqa: F401
from test_tasks import KINDS, shapes, small  # noqa: F401
from test_train import FAST, as_arguments, rows, run, trainer, weights

import train
from configurator import UserError, differences
from machine.distributed import start, store_of_this_start

ROOT = Path(train.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# train.py, but worker 1 does {what} before its eighth update, if the file `accident` exists; it removes the file first.
ACCIDENTAL = """
import os, sys
sys.path.insert(0, {root!r})
import train
from configurator import UserError, from_command_line, one_line_errors
from machine.distributed import others_explain

def update(task, work, step, world, real=train.update):
    if step == 7 and world.rank == 1 and os.path.exists({accident!r}):
        os.remove({accident!r})
        {what}
    return real(task, work, step, world)

train.update = update
with one_line_errors(), others_explain():
    train.main(*from_command_line(train.Settings, "", **train.HOW))
"""


def torchrun(script, *arguments, options=("--standalone", "--nproc_per_node=2"), **how):
    return subprocess.run([*TORCHRUN, *options, str(script), *arguments], capture_output=True, text=True, timeout=300,
                          **how)


def accidental(folder, what):
    (folder / "accident").touch()
    path = folder / "accidental.py"
    path.write_text(ACCIDENTAL.format(root=str(ROOT), accident=str(folder / "accident"), what=what))
    return path


def test_missing_variables_are_named_unless_there_is_one_worker(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start("cpu").size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE = 2, without LOCAL_RANK and MASTER_ADDR and MASTER_PORT: start"):
        start("cpu")


HUNDREDS = dict(max_iters=200, eval_interval=50, log_interval=10, learning_rate=3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("task, batch_size, changes, rounding", [
    ("text", 8, HUNDREDS, 2e-4), ("text", 5, FAST, 3e-3),  # Muon amplifies rounding
    ("image-text", 8, {}, 1e-4), ("image-text", 5, {"rates": {"vision": 0.0}}, 1e-4),
    ("tagging", 8, {}, 1e-4), ("tagging", 5, {"learn": "tags"}, 1e-4),
    ("question-answering", 8, {}, 1e-4), ("question-answering", 5, {"block_size": 40, "train_rows": 9}, 1e-4),
    ("image-classification", 8, {}, 1e-4), ("image-classification", 5, {"pool": "first", "stem": True}, 1e-4)])
def test_one_two_and_four_workers_compute_the_same(task, batch_size, changes, rounding, tiny, small,  # noqa: F811
                                                   tagged, asked, pictures, tmp_path):  # noqa: F811
    """With dropout; of 4 pieces, or of 3, one of which is smaller. The workers evaluate unequal numbers of batches."""
    labelled = dict(n_layer=1, n_head=2, n_embd=32, max_iters=12, eval_interval=6, log_interval=3, device="cpu",
                    dtype="float32")
    own = {"text": tiny, "tagging": {"dataset": str(tagged), "hide_rate": 0.3, **labelled},
           "question-answering": {"dataset": str(asked), "block_size": 24, **labelled},
           "image-classification": {"dataset": str(pictures), "shift": 1, "flip": True, **labelled}}
    values = {**own.get(task, {**small, **KINDS.get(task, {})}), **changes}
    values |= {"batch_size": batch_size, "micro_batch_size": 2, "dropout": 0.1}
    train.main(settings_for(task, **values, out_dir=str(tmp_path / "1")), {})
    for workers in (2, 4):
        wanted = differences(settings_for(task, **values, out_dir=str(tmp_path / str(workers))))
        done = torchrun(ROOT / "train.py", *as_arguments(wanted),
                        options=["--standalone", f"--nproc_per_node={workers}"])
        assert done.returncode == 0, done.stderr
        assert ("1 of 4 workers are idle" in done.stdout) == (workers == 4 and batch_size == 5)
        for one, many in zip(rows(tmp_path / "1"), rows(tmp_path / str(workers)), strict=True):
            one, many = ({name: row[name] for name in ("step", "loss", "grad_norm", "val_loss") if name in row}
                         for row in (one, many))
            assert one == pytest.approx(many, abs=rounding, rel=rounding)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_worker_is_started_again_and_the_curve_is_the_same(tmp_path, tiny):
    script = accidental(tmp_path, "os.kill(os.getpid(), 9)")
    arguments = as_arguments(tiny, resume="auto", eval_interval=5, log_interval=1)
    done = torchrun(script, *arguments, f"--out_dir={tmp_path / 'killed'}",
                    options=["--standalone", "--nproc_per_node=2", "--max-restarts=3"])
    assert done.returncode == 0, done.stderr
    assert [start["step"] for start in json.loads((tmp_path / "killed" / "run.json").read_text())["starts"]] == [0, 5]
    undisturbed = torchrun(script, *arguments, f"--out_dir={tmp_path / 'whole'}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "killed")] == [
        (row["step"], row["loss"]) for row in rows(tmp_path / "whole")]
    torch.testing.assert_close(weights(tmp_path / "killed"), weights(tmp_path / "whole"), atol=0, rtol=0)


def test_a_start_does_not_read_what_an_earlier_one_left_in_the_store():
    """Worker 2 of an earlier start died after its request, which is still in the store. Then all three start."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def begin(rank):
        client = dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
        part = store_of_this_start(client, rank, 3)
        if rank == 0:
            assert not part.check(["address"])
            part.set("address", str(time.monotonic()))
        return part.get("address")

    server.set("hello/2", "the dead")
    with ThreadPoolExecutor(3) as workers:
        starts = [set(workers.map(begin, range(3))) for _ in range(3)]
    assert [len(seen) for seen in starts] == [1, 1, 1] and len(set.union(*starts)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("what, said", [("raise UserError('the cable is out')", "error on rank 1: the cable is out"),
                                        ("raise ValueError('a bug')", "ValueError: a bug\n")])
def test_an_error_of_one_worker_ends_all_with_its_message(tmp_path, tiny, what, said):
    began = time.monotonic()
    done = torchrun(accidental(tmp_path, what), *as_arguments(tiny, max_iters=100_000),
                    f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 1 and done.stderr.count(said) == 1
    assert "rank 0: another worker is gone\n" in done.stderr and "gloo" not in done.stderr
    assert time.monotonic() - began < 100  # most of it is the start; collectives would wait for half an hour


# train.py, but worker {late} starts three seconds late.
LATE = """
import os, runpy, sys, time
time.sleep(3 * (os.environ["RANK"] == "{late}"))
sys.path.insert(0, {root!r})
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("late, wrong, said", [
    (0, "dataset", "there is no data set"), (1, "dataset", "there is no data set"),
    (1, "out_dir", "out_dir = ")])  # the last one: an error of the main rank alone
def test_an_error_is_printed_once_by_the_main_rank(late, wrong, said, tmp_path):
    path = tmp_path / "late.py"
    path.write_text(LATE.format(late=late, root=str(ROOT)))
    arguments = {"device": "cpu", "out_dir": str(tmp_path / "out"), wrong: str(path)}
    done = torchrun(path, *(f"--{name}={value}" for name, value in arguments.items()))
    assert done.returncode == 1 and done.stderr.count(said) == 1, done.stderr
    assert f"error: {said}" in done.stderr and "gloo" not in done.stderr


@pytest.mark.slow
def test_two_hosts_give_the_curve_of_one(tmp_path, tiny):
    """The hosts are two network namespaces, each with its own address, joined by a virtual cable."""
    hosts = {f"quill{os.getpid()}{side}": f"10.77.0.{n}" for n, side in enumerate("ab", start=1)}
    a, b = hosts
    try:
        for line in (f"netns add {a}", f"netns add {b}",
                     f"link add {a[-8:]} netns {a} type veth peer {b[-8:]} netns {b}",
                     *(f"-n {host} addr add {address}/24 dev {host[-8:]}" for host, address in hosts.items()),
                     *(f"-n {host} link set {device} up" for host in hosts for device in (host[-8:], "lo"))):
            if not shutil.which("ip") or subprocess.run(["ip", *line.split()], capture_output=True).returncode:
                pytest.skip("network namespaces need Linux, root and iproute2")
        arguments = as_arguments(tiny, out_dir=str(tmp_path / "two"))
        workers = [subprocess.Popen(
            ["ip", "netns", "exec", host, *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
             "--rdzv_id=1", f"--rdzv_endpoint={hosts[a]}:29500", f"--local_addr={address}",
             f"--rdzv_conf=is_host={host == a}", str(ROOT / "train.py"), *arguments],
            env={**os.environ, "GLOO_SOCKET_IFNAME": host[-8:]}, stderr=subprocess.PIPE, text=True)
            for host, address in hosts.items()]
        for worker in workers:
            _, errors = worker.communicate(timeout=300)
            assert worker.returncode == 0, errors
    finally:
        for host in hosts:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", host], capture_output=True)
    for one, two in zip(run(tmp_path / "one", tiny), rows(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)
    assert trainer(tmp_path / "two")["step"] == tiny["max_iters"]


SLURM = {  # stand-ins for the commands that tools/slurm.sh calls, on a cluster of one node
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" > {folder}/requeued; fi',
    "srun": 'shift; SLURM_NODEID=0 SLURMD_NODENAME=localhost exec "$@"',
    "torchrun": 'exec {python} -m torch.distributed.run "${{@/--nproc_per_node=gpu/--nproc_per_node=1}}"',
    "python": 'exec {python} "$@"',
}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="clusters run Linux")
def test_under_slurm_a_run_is_requeued_until_it_has_finished(tmp_path, tiny):
    (tmp_path / "bin").mkdir()
    for name, body in SLURM.items():
        path = tmp_path / "bin" / name
        path.write_text("#!/bin/bash\n" + body.format(python=sys.executable, folder=tmp_path) + "\n")
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                   "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost",
                   "SLURM_JOB_END_TIME": str(int(time.time()) + 3600)}

    def job(*more):
        done = subprocess.run(["bash", "tools/slurm.sh", tmp_path / "out", *as_arguments(tiny), *more], cwd=ROOT,
                              text=True, capture_output=True, env=environment, timeout=300)
        requeued = tmp_path / "requeued"
        return done.returncode, done.stderr, requeued.exists() and requeued.read_text()

    assert job("--max_minutes=0.0001")[::2] == (0, "requeue 7\n")
    (tmp_path / "requeued").unlink()
    status, said, requeued = job()
    assert (status, requeued) == (0, False), said
    assert trainer(tmp_path / "out")["step"] == tiny["max_iters"]
    assert job("--dataset=nowhere")[0] == 1
