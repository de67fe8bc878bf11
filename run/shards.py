"""Sharded tensors in checkpoints: each rank writes its part of every tensor, and any number of ranks can read them.

torch.distributed.checkpoint writes the folders, as safetensors files: its default format has a pickle, which could run
code. All ranks must call `write` together. A rank may call the other functions alone.
"""

import warnings

import torch
import torch.distributed as dist


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def write(folder, state, trainer, group):
    """Writes this rank's shards of `state`, and of the optimizer in `trainer`; waits until all ranks have done so.

    Returns the trainer without the optimizer's sharded tensors. trainer: contents of trainer.pt, or None.
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
    dist.barrier(group)  # waits until the main rank has created the folder
    try:
        for name, tensors in parts.items():
            writer = dcp.HuggingFaceStorageWriter(str(folder / name), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    return trainer


def read(folder, like=None):
    """Returns {name: tensor} of a folder of shards: sharded like the tensor like(name), or whole if `like` is None."""
    import torch.distributed.checkpoint as dcp
    reader = dcp.HuggingFaceStorageReader(str(folder))
    state = {}
    for name, found in reader.read_metadata().state_dict_metadata.items():
        state[name] = torch.empty_like(like(name)) if like else torch.empty(found.size, dtype=found.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about reading without the other ranks
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def distribute(tensor, like):
    """Returns a whole tensor sharded like the tensor `like`; unchanged if `like` is whole or has another shape."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
