"""What torchrun's environment says: rank, world size, device; collectives that are no-ops for one process.

    torchrun --nproc_per_node=2 train.py config/shakespeare_char.py
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

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from configurator import UserError
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
        """The sums of each number over all ranks, in float64: a list of floats, equal on every rank."""
        if self.size == 1:
            return [float(number) for number in numbers]
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor([float(number) for number in numbers], dtype=exact, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, number):
        """The largest over all ranks of a whole number."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def share(self, items):
        """Yields this rank's share of `items`, each with 1.

        Every rank gets the same number of items, because sharded models must run in lockstep: missing ones are filled
        with the first item, and 0.
        """
        for i in watched(range(self.rank, -(-len(items) // self.size) * self.size, self.size), "evaluating"):
            yield (items[i], 1) if i < len(items) else (items[0], 0)

    def from_main(self, work):
        """What work() returns on the main rank, on every rank; the others wait for it."""
        result = [work() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(result)
        return result[0]

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def wrap(model, blocks, sharded, compiled, recompute, dtype, world):
    """The model to call in training: recomputing, compiled, on many workers. The parameters keep their names.

    recompute: each block is computed again in the backward pass, instead of keeping its activations. Raises UserError
    where there are no blocks to do so.
    """
    if recompute and not blocks:
        raise UserError(f"recompute = True: a {type(model).__name__} has no blocks to compute again; leave it out")
    for block in blocks if sharded or recompute else ():
        if compiled and sharded:
            block.forward = torch.compile(block.forward)  # what gathers the block's parameters stays outside
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if sharded:
        shard(model, blocks, dtype, world)
        return model
    model.to(world.device)
    if compiled:
        model.compile()
    if world.size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def shard(model, blocks, dtype, world):
    """Spreads the model's parameters over all ranks, in place: each block by itself, then the rest (FSDP2).

    A rank keeps its part of each parameter, and so of its gradient and moments, in float32, and gathers a block's, in
    `dtype`, only while it computes it. Gradients are summed in float32. The model may lie on the CPU: only parts move.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes two seconds
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nobody writes to results
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
ARRIVAL = 1800  # seconds that rank 0 waits for the other workers of a start
PATIENCE = 10  # seconds that torchrun takes at most to end the workers that are left


@contextlib.contextmanager
def others_explain():
    """A worker whose peer is gone says so in a line, and leaves it to that one and to torchrun to say why."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not any(words in str(error) for words in LOST):
            raise
        print(f"rank {dist.get_rank()}: another worker is gone", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)  # torchrun takes the first worker that ends for the cause
        os._exit(1)


def store_of_this_start(store, rank, size):
    """A part of `store` that no earlier start of the workers has written to: a PrefixStore, the same on every rank.

    torchrun keeps one store over all its restarts. A restarted worker may read a dead peer's address from it and wait
    30 minutes for that peer. So rank 0 picks a fresh prefix for each start and sends it to every rank that asks, also
    in the name of the dead, which does no harm. Raises UserError if a worker doesn't ask in time.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        name = store.get(f"to/{mine}").decode()  # waits for it
        store.set(f"{name}/heard/{rank}", "")
        return dist.PrefixStore(name, store)
    deaf, until = list(range(1, size)), time.monotonic() + ARRIVAL
    while deaf:
        if time.monotonic() > until:
            raise UserError(f"workers {', '.join(map(str, deaf))} did not start within {ARRIVAL // 60} minutes")
        for other in deaf:
            if store.check([f"hello/{other}"]):
                store.set("to/" + store.get(f"hello/{other}").decode(), mine)
        deaf = [other for other in deaf if not store.check([f"{mine}/heard/{other}"])]
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def start(device_name="auto"):
    """Joins the process group when torchrun started this process as one of several; a world of one otherwise.

    Raises UserError when there are more workers on a machine than GPUs, and when the environment is incomplete.
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
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = store_of_this_start(store, rank, size)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size, store=store)
    return World(rank, size, device)
