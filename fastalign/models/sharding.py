"""Models whose weights FSDP2 shards over the processes. No other module of `models` knows of shards.

`fully_shard` turns every weight into a `DTensor`, of which each process has a part. Before a layer runs, its group of
weights is gathered ("unsharded"), and most groups are freed behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def gathered(value: Tensor) -> Tensor:
    """The complete tensor, without a gradient where it is sharded. All processes must call it."""
    if not isinstance(value, DTensor):
        return value
    part: Any = value.detach()  # a DTensor too, though torch annotates a Tensor
    return part.full_tensor()


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(parameter.device_mesh.device_type)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gather_layer(layer: nn.Module) -> None:
    """Gathers the weights of a layer that is not run as a module, so that no hook of FSDP does it.

    FSDP reduces the gradients of such a layer at the end of the backward pass.
    """
    if isinstance(layer, FSDPModule):
        layer.unshard()


@contextmanager
def free_gathered(model: nn.Module) -> Iterator[None]:
    """A context in which no weight is gathered yet. Afterwards those are gathered anew that were before.

    Use it where the content of the parts changes for a while: a gathered weight would still have the old content.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    before = [group for group in groups if not all(isinstance(p, DTensor) for p in group.parameters())]
    _free(groups)
    try:
        yield
    finally:
        _free(groups)
        for group in before:  # a backward pass may need them, and no hook would gather them for it
            group.unshard()


def swap_parts(one: Tensor, other: Tensor) -> None:
    """Exchanges the content of two tensors that are sharded in the same way."""
    with torch.no_grad():
        mine, theirs = own_part(one), own_part(other)
        before = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(before)


def own_part(value: Tensor) -> Tensor:
    """What lies on this process of a tensor: its part if it is sharded, else all of it."""
    return value.to_local() if isinstance(value, DTensor) else value


def _free(groups: list) -> None:
    for group in groups:
        group.reshard()
