"""Several processes as one: the group that `torchrun` starts, or a single process.

Training divides every batch among the ranks and adds up their gradients, so that the steps are
those of one process with the whole batch (up to rounding).
"""

import datetime
import logging
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lab.system.errors import UserError


def grouped() -> bool:
    """Whether this process belongs to a group of processes."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if grouped() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if grouped() else 1


def barrier() -> None:
    """Wait until all ranks have called this."""
    if grouped():
        dist.barrier()


def from_first(value):
    """The value that the first rank has."""
    values = [value]
    if grouped():
        dist.broadcast_object_list(values)
    return values[0]


def together(work):
    """`work()` on every rank; a `UserError` on one of them ends all, each with a message."""
    result = problem = None
    try:
        result = work()
    except UserError as error:
        problem = error
    if grouped():
        failed = [None] * world()
        dist.all_gather_object(failed, problem is not None)
        if any(failed) and problem is None:
            problem = UserError(f"rank {rank()}: stopped, because another rank cannot continue")
    if problem is not None:
        raise problem
    return result


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place."""
    if grouped():
        dist.all_reduce(values)
    return values


def sum_gradients(parameters) -> None:
    """Replace every gradient by its sum over the ranks; one message for all of them."""
    if not grouped():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = total(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(summed.view_as(gradient))


@contextmanager
def process_group(device: str = "cpu"):
    """The group of processes that torchrun started, or none."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # Objects and barriers go through gloo on GPUs, too; a rank may have to wait long.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=30))
    if rank() > 0:  # what all ranks log appears once
        logging.getLogger("spurious").setLevel(logging.WARNING)
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """The device of this rank: each has a GPU of its own."""
    if device == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device
