"""Shared by the tests of the native CPU kernels."""

import pytest
import torch

from fastalign.ops import native


@pytest.fixture(params=native.describe()["kernels_available"])
def isa(request):
    """Each instruction set that this machine runs, chosen by name."""
    native.select(request.param)
    yield request.param
    native.select(None)


@pytest.fixture
def threads():
    """A function that sets torch's threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
