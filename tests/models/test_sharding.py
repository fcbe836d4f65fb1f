"""Without shards nothing changes; shards of two processes are in tests/training/test_two_processes.py."""

import torch
from torch import nn

from fastalign.models.sharding import (
    free_gathered,
    gather_layer,
    gathered,
    is_sharded,
    own_part,
    sharded_like,
    swap_parts,
)


def test_a_model_without_shards_is_left_as_it_is():
    model = nn.Linear(2, 3)
    assert not is_sharded(model)
    assert gathered(model.weight) is model.weight and own_part(model.weight) is model.weight
    value = torch.ones(3, 2)
    assert sharded_like(value, model.weight) is value
    gather_layer(model)
    with free_gathered(model):
        before = model.weight.detach().clone()
        swap_parts(model.weight, value)
    assert torch.equal(model.weight, torch.ones(3, 2)) and torch.equal(value, before)
