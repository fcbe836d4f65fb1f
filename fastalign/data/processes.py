"""The processes that train one model together, each on its part of the rows, and what they tell each other.

torchrun, accelerate or SLURM start them, and `transformers.Trainer` makes the group. With one process nothing is sent,
and every function here returns what it was given.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# How gloo says it, which raises a plain RuntimeError.
_LOST = ("onnection closed by peer", "onnection reset by peer", "roken pipe", "imed out waiting")


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0. Process 0 prints and writes."""
    return dist.get_rank() if process_count() > 1 else 0


def wait_for_all() -> None:
    """Returns when every process has called it."""
    if process_count() > 1:
        dist.barrier()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's tensor, which must have one shape, without a gradient."""
    return _reduced(values, dist.ReduceOp.SUM) if process_count() > 1 else values


def largest_of_processes(values: Tensor) -> Tensor:
    """The largest value in any process, element by element, without a gradient."""
    return _reduced(values, dist.ReduceOp.MAX) if process_count() > 1 else values


def gather_objects(value: T) -> list[T]:
    """What every process has given, in their order. Meant for small things, since it is copied to all of them."""
    if process_count() == 1:
        return [value]
    gathered: list[Any] = [None] * process_count()
    dist.all_gather_object(gathered, value)
    return gathered


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone, or did not answer in time."""
    known = process_count() > 1 and isinstance(error, RuntimeError)
    return known and (isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST))


def _reduced(values: Tensor, operation: Any) -> Tensor:
    values = values.detach().clone()
    dist.all_reduce(values, operation)
    return values
