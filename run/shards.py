"""The sharded parts of a checkpoint: each rank writes its part of every tensor, and any number of ranks reads them.

A folder of shards is one of torch.distributed.checkpoint, in safetensors files. PyTorch's own format has a pickle,
which could run code. All ranks call `gathered` and `write` together; the other functions each rank calls for itself.
"""

import warnings

import torch
import torch.distributed as dist


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def gathered(state):
    """The whole tensors of a sharded state, in host memory of the main rank; {} on the others."""
    whole = {}
    for name, value in state.items():
        full = value.full_tensor()
        if dist.get_rank() == 0:
            whole[name] = full.cpu()
    return whole


def without_moments(trainer):
    """(trainer without the sharded tensors of its optimizer, these tensors by parameter's number and name)."""
    optimizer, moments = trainer["optimizer"], {}
    rest = {number: dict(entry) for number, entry in optimizer["state"].items()}
    for number, entry in optimizer["state"].items():
        for name, value in entry.items():
            if is_sharded(value):
                moments[f"{number}.{name}"] = rest[number].pop(name)
    return trainer | {"optimizer": optimizer | {"state": rest}}, moments


def write(folder, state, group):
    """Writes this rank's parts of the tensors; returns when all ranks have written theirs."""
    import torch.distributed.checkpoint as dcp
    try:
        dist.barrier(group)  # until the main rank has cleared the place
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(state, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def read(folder, like=None):
    """{name: tensor} of all that the shards hold, whole; if `like` is given, each laid out as like(name) is."""
    import torch.distributed.checkpoint as dcp
    reader = dcp.HuggingFaceStorageReader(str(folder))
    state = {}
    for name, found in reader.read_metadata().state_dict_metadata.items():
        state[name] = torch.empty_like(like(name)) if like else torch.empty(found.size, dtype=found.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about each rank reading for itself
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def distribute(tensor, like):
    """This rank's part of a tensor that every rank has, laid out as `like` is."""
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
