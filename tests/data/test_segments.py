"""Which keys the segments of a packed row see, as index tensors."""

from __future__ import annotations

import torch

from fastalign.data import pack, pad_to_multiple
from fastalign.data.segments import Segment, gathered_keys, segments_of

# Two groups, of three completions and of one, then a completion without a prompt.
SEGMENTS = [Segment(5, 0, 0), Segment(3, 2, 0), Segment(1, 2, 0), Segment(4, 0, 3), Segment(2, 3, 3), Segment(1, 0, 5)]
PAIR = {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5], [6], [7, 8]]}


def test_every_token_has_a_key_of_its_own_and_repeats_are_prefixes():
    layout = gathered_keys(SEGMENTS)
    tokens = sum(s.length for s in SEGMENTS)
    assert torch.equal(layout.key_index[layout.own], torch.arange(tokens, dtype=torch.int32))
    taken = torch.cat([layout.own, *(at for at, _ in layout.repeats)])
    assert torch.equal(taken.sort().values, torch.arange(len(layout.key_index), dtype=torch.int32))
    for at, repeated in layout.repeats:
        assert torch.equal(layout.key_index[at], repeated) and len(set(repeated.tolist())) == len(repeated)
    assert [repeated.tolist() for _, repeated in layout.repeats] == [[0, 1, 9, 10, 11], [0, 1]]
    assert layout.cu_seqlens_q.tolist() == [0, 5, 8, 9, 13, 15, 16]
    assert layout.cu_seqlens_k.tolist() == [0, 5, 10, 13, 17, 22, 23]
    assert (layout.longest_q, layout.longest_k) == (5, 5)


def test_a_groups_first_completion_is_one_segment_with_its_prompt():
    batch = pad_to_multiple(pack([PAIR, {"prompt_ids": [], "completion_ids": [[9]]}]), 16)
    assert segments_of(batch.layout) == [(5, 0, 0), (1, 3, 0), (2, 3, 0), (1, 0, 3), (7, 0, 4)]


def test_the_indices_are_views_of_one_tensor_which_one_copy_takes_elsewhere():
    batch = pack([PAIR]).with_keys()
    assert batch.with_keys() is batch
    assert batch.keys.indices.dtype == torch.int32 and sum(batch.keys.sizes) == batch.keys.indices.numel()
    moved = batch.to("meta").keys
    assert moved.key_index.device.type == "meta" and moved.sizes == batch.keys.sizes
    parts = [moved.key_index, moved.own, moved.cu_seqlens_q, moved.cu_seqlens_k, *(t for p in moved.repeats for t in p)]
    assert [len(part) for part in parts] == list(moved.sizes)
    assert {part.untyped_storage()._cdata for part in parts} == {moved.indices.untyped_storage()._cdata}


def test_a_longer_row_has_other_keys():
    batch = pack([PAIR]).with_keys()
    assert pad_to_multiple(batch, 32).keys is None
    assert pad_to_multiple(batch, 32).with_keys().keys.cu_seqlens_q[-1] == 32
