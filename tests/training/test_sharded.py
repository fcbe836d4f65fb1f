"""What is refused with FSDP; what works is in tests/training/test_two_processes.py."""

import pytest
import torch
from accelerate import Accelerator

from fastalign.errors import ConfigError
from fastalign.regularizers import KLToStart
from fastalign.training.sharded import ShardedTraining


class OneProcess(ShardedTraining):
    def __init__(self, *, fsdp):
        self.is_fsdp_enabled, self.model, self.accelerator = fsdp, torch.nn.Linear(2, 2), Accelerator(cpu=True)
        self.objective = None


def test_regularizers_are_refused_with_fsdp_alone():
    with pytest.raises(ConfigError, match="KLToStart cannot be combined with FSDP"):
        OneProcess(fsdp=True).begin_sharded([KLToStart(0.1)])
    OneProcess(fsdp=False).begin_sharded([KLToStart(0.1)])
