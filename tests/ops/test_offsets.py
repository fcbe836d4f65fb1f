"""Offsets of packed sequences: what is accepted, converted and refused."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import InputError
from fastalign.ops.offsets import as_offsets, assert_offsets, check_offsets


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_both_integer_dtypes_become_int64(dtype):
    offsets = as_offsets(torch.tensor([0, 2, 5], dtype=dtype))
    assert offsets.dtype == torch.int64 and offsets.tolist() == [0, 2, 5]


def test_int64_is_not_copied():
    given = torch.tensor([0, 2])
    assert as_offsets(given) is given


@pytest.mark.parametrize("wrong", [torch.tensor([[0, 2]]), torch.tensor([0.0]), torch.zeros(0, dtype=torch.int64)])
def test_other_shapes_and_dtypes_are_refused(wrong):
    with pytest.raises(InputError, match=r"it must be \(S \+ 1,\) offsets of int64 or int32"):
        as_offsets(wrong)


@pytest.mark.parametrize(
    ("offsets", "covers", "lies_within"),
    [
        ([0, 2, 5], True, True),
        ([0, 0, 5, 5], True, True),
        ([1, 5], False, True),
        ([0, 4], False, True),
        ([2], False, True),
        ([0, 6], False, False),
        ([-1, 5], False, False),
        ([0, 3, 2, 5], False, False),
    ],
    ids=str,
)
def test_offsets_rise_over_all_tokens_or_within_them(offsets, covers, lies_within):
    for fits, all_tokens in ((covers, True), (lies_within, False)):
        if fits:
            check_offsets(torch.tensor(offsets), 5, all_tokens=all_tokens)
            assert_offsets(torch.tensor(offsets), 5, op="op", all_tokens=all_tokens)
            continue
        where = r"from 0 to 5" if all_tokens else r"within \[0, 5\]"
        with pytest.raises(InputError, match=rf"cu_seqlens is \[.*\]...; it must rise {where}"):
            check_offsets(torch.tensor(offsets), 5, all_tokens=all_tokens)
        with pytest.raises(RuntimeError, match=rf"op: cu_seqlens does not rise {where}"):
            assert_offsets(torch.tensor(offsets), 5, op="op", all_tokens=all_tokens)
