"""With one process nothing is sent; two of them are in tests/training/test_two_processes.py."""

import torch

from fastalign.data.processes import (
    gather_objects,
    largest_of_processes,
    process_count,
    process_index,
    sum_over_processes,
    wait_for_all,
)


def test_one_process_gets_back_what_it_gave():
    values = torch.tensor([1.0, 2.0])
    assert (process_count(), process_index()) == (1, 0)
    assert sum_over_processes(values) is values and largest_of_processes(values) is values
    assert gather_objects({"a": 1}) == [{"a": 1}]
    wait_for_all()
