r"""Several workers, started by torchrun: ranks, collectives (no-ops for a single process), DDP and FSDP2.

    torchrun --nproc_per_node=2 train.py config/shakespeare_char.py

Two machines that share a folder: the first has the address 10.0.0.1, the second 10.0.0.2 (under SLURM: tools/slurm.sh).

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=quill --rdzv_endpoint=10.0.0.1:29500 \
        --local_addr=10.0.0.1 --rdzv_conf=is_host=1 train.py config/gpt2.py             # on the first
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=quill --rdzv_endpoint=10.0.0.1:29500 \
        --local_addr=10.0.0.2 --rdzv_conf=is_host=0 train.py config/gpt2.py             # on the second

If they don't find each other, name the network device: GLOO_SOCKET_IFNAME=eth0, for GPUs NCCL_SOCKET_IFNAME=eth0.
torchrun --max-restarts=3 with --resume=auto starts all workers again when one has failed, from the last save.
"""

import contextlib
import functools
import os
import signal
import sys
import time
import uuid
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from configurator import PATIENCE, UserError
from machine.device import pick_device
from machine.terminal import watched


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        """Only the main rank writes files and prints."""
        return self.rank == 0

    def sum(self, *numbers):
        """Sums each number over all ranks, in float64 (float32 on MPS): a list of floats, the same on every rank."""
        if self.size == 1:
            return [float(number) for number in numbers]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor([float(number) for number in numbers], dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, number):
        """The largest value that an int has on any rank."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def share(self, items):
        """Yields (item, 1) for each of this rank's share of `items`.

        All ranks get the same number of items, because sharded models must run in lockstep. Missing ones are filled
        with (first item, 0): the 0 says not to count it.
        """
        padded = -(-len(items) // self.size) * self.size  # rounded up to a multiple
        for i in watched(range(self.rank, padded, self.size), "evaluating"):
            yield (items[i], 1) if i < len(items) else (items[0], 0)

    def from_main(self, work):
        """Calls work() on the main rank only, and returns its result on every rank."""
        result = [work() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(result)
        return result[0]

    def gather(self, items):
        """The items of all ranks in one list, on every rank: those of rank 0 first. items: a list of picklable ones."""
        if self.size == 1:
            return items
        found = [None] * self.size
        dist.all_gather_object(found, items)
        return [item for some in found for item in some]

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def wrap(model, blocks, sharded, compiled, recompute, dtype, world):
    """Returns the module to call in training: the model, moved to the device and, for several workers, wrapped in DDP.

    sharded: FSDP2 instead of DDP; it gathers parameters in `dtype`. The model's parameters keep their names.
    recompute: compute each of `blocks` again in the backward pass, to save memory; raises UserError if there are none.
    """
    if recompute and not blocks:
        raise UserError(f"recompute = True: the model {type(model).__name__} has no blocks to compute again; leave it"
                        " out")
    for block in blocks:
        if compiled and sharded:
            block.forward = torch.compile(block.forward)  # FSDP2's hooks, which gather parameters, are not compiled
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if sharded:
        shard(model, blocks, dtype, world)
        return model
    model.to(world.device)
    called = torch.compile(model) if compiled else model  # an evaluation calls the model itself: nothing new to compile
    if world.size == 1:
        return called
    return DistributedDataParallel(called, gradient_as_bucket_view=True, broadcast_buffers=False)


def shard(model, blocks, dtype, world):
    """Spreads the model's parameters over all ranks, in place: each block by itself, then the rest (FSDP2).

    Each rank keeps its part of the parameters, gradients and moments, in float32. It gathers a block's parameters, in
    `dtype`, only while it computes that block. Gradients are averaged in float32. Moves the model to the device.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a slow import: two seconds
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about in-place changes of outputs: we make none
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


# What PyTorch's errors say when another worker has died.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
ARRIVAL = 1800  # seconds that workers wait for each other: to start, and for rank 0 to prepare the data


@contextlib.contextmanager
def others_explain():
    """A context. If a RuntimeError in it has a text in LOST, so another worker has died, prints one line and exits with
    status 1 after PATIENCE seconds, so that torchrun blames that worker, not this one. Other errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not any(words in str(error) for words in LOST):
            raise
        print(f"rank {dist.get_rank()}: another worker is gone", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)  # torchrun blames the first worker that ends: it must not be this one
        os._exit(1)


def store_of_this_start(store, rank, size):
    """Returns a PrefixStore: a part of `store` under a prefix that is new at each start and the same on every rank.

    torchrun keeps one store over all its restarts. A restarted worker may read a dead worker's address from it and wait
    30 minutes for it. So rank 0 picks a prefix at each start and sends it to every rank that asks. If a dead worker
    asked, the answer does no harm. Raises UserError on rank 0 if a worker does not ask within ARRIVAL seconds.
    """
    token = uuid.uuid4().hex  # rank 0's is the prefix, another rank's marks its request
    if rank > 0:
        store.set(f"hello/{rank}", token)
        prefix = store.get(f"to/{token}").decode()  # waits for the answer
        store.set(f"{prefix}/heard/{rank}", "")
        return dist.PrefixStore(prefix, store)
    missing, deadline = list(range(1, size)), time.monotonic() + ARRIVAL
    while missing:
        if time.monotonic() > deadline:
            raise UserError(f"workers {', '.join(map(str, missing))} did not start within {ARRIVAL // 60} minutes: see"
                            " what their machines print, and start all workers again")
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set("to/" + store.get(f"hello/{other}").decode(), token)
        missing = [other for other in missing if not store.check([f"{token}/heard/{other}"])]
        time.sleep(0.01)
    return dist.PrefixStore(token, store)


def start(device_name="auto"):
    """Joins the other workers, if torchrun started several, and returns this process's World.

    With several workers, raises UserError for too few GPUs, a device like cuda:1, or missing variables of torchrun.
    """
    device, size = pick_device(device_name), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(0, 1, device)
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE = {size}, without {' and '.join(missing)}: start the workers with torchrun, or"
                        " unset WORLD_SIZE")
    if device.index is not None:
        raise UserError(f"device = {device}: torchrun gives each worker a GPU of its own; use --device=cuda")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"worker {local_rank} has no GPU: this machine has {torch.cuda.device_count()};"
                            " lower --nproc_per_node or use --device=cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store = None  # PyTorch makes one
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = store_of_this_start(store, rank, size)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size, store=store,
                            timeout=timedelta(seconds=ARRIVAL), device_id=device if device.type == "cuda" else None)
    return World(rank, size, device)
