"""The sharded parts of a checkpoint: each rank writes its part of every tensor, and any number of ranks reads them.

The folders are torch.distributed.checkpoint's, in safetensors files: PyTorch's own format has a pickle, which could run
code. All ranks call `write` together; the other functions each rank calls for itself.
"""

import warnings

import torch
import torch.distributed as dist


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def write(folder, state, trainer, group):
    """Writes this rank's parts of the model's and the optimizer's tensors; waits until all ranks have written theirs.

    Returns the trainer without the tensors that were written. trainer: may be None.
    """
    import torch.distributed.checkpoint as dcp
    parts = {"model": state}
    if trainer:
        optimizer, moments, rest = trainer["optimizer"], {}, {}
        for number, entry in optimizer["state"].items():
            rest[number] = {name: value for name, value in entry.items() if not is_sharded(value)}
            moments |= {f"{number}.{name}": value for name, value in entry.items() if is_sharded(value)}
        parts["optimizer"] = moments
        trainer = trainer | {"optimizer": optimizer | {"state": rest}}
    dist.barrier(group)  # until the main rank has cleared the place
    try:
        for name, tensors in parts.items():
            writer = dcp.HuggingFaceStorageWriter(str(folder / name), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    return trainer


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
    """This rank's part of a tensor that every rank has, if `like` is sharded and has its shape; else the tensor."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
