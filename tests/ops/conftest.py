"""Shared by the tests of the ops: the instruction sets of the native CPU kernels, and threads."""

import pytest
import torch

from fastalign.ops.backends import cpu


@pytest.fixture(params=cpu.describe()["kernels_available"])
def isa(request):
    """Each instruction set that this machine runs, chosen by name."""
    cpu.select(request.param)
    yield request.param
    cpu.select(None)


@pytest.fixture
def threads():
    """A function that sets torch's threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
