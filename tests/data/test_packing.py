from __future__ import annotations

import pickle

import pytest
import torch

from fastalign.data.packing import lay_out, pack, pad, pad_to_multiple
from fastalign.data.segments import Group
from fastalign.errors import InputError

PAIR = {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5], [6]]}
PLAIN = {"prompt_ids": [], "completion_ids": [[7, 8, 9]]}
MASKED = {"prompt_ids": [10], "completion_ids": [[11, 12, 13]], "completion_mask": [[1, 0, 1]]}


def assert_scores(batch, index, targets, cu_seqlens, lengths):
    assert batch.score_index.tolist() == index
    assert batch.targets.tolist() == targets
    assert batch.cu_seqlens.tolist() == cu_seqlens
    assert batch.completion_lengths.tolist() == lengths


def test_pack_shares_the_prompt():
    batch = pack([PAIR, PLAIN, MASKED])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 0, 1, 2, 3]]
    assert batch.layout == (
        Group((0, 3), ((3, 5), (5, 6))),
        Group((6, 6), ((6, 9),)),
        Group((9, 10), ((10, 13),)),
    )
    assert_scores(batch, [2, 3, 2, 6, 7, 9, 11], [4, 5, 6, 8, 9, 11, 13], [0, 2, 3, 5, 7], [2, 1, 3, 3])
    assert batch.attention_mask is None


def test_pack_without_sharing_copies_the_prompt():
    batch = pack([PAIR, MASKED], share_prompts=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 10, 11, 12, 13]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.layout == (Group((0, 3), ((3, 5),)), Group((5, 8), ((8, 9),)), Group((9, 10), ((10, 13),)))
    assert_scores(batch, [2, 3, 7, 9, 11], [4, 5, 6, 11, 13], [0, 2, 3, 5], [2, 1, 3])


def test_a_row_is_filled_up_with_what_is_not_scored():
    batch = pack([PAIR, MASKED])
    more = pad_to_multiple(batch, 8)
    assert more.input_ids.tolist() == [[*batch.input_ids[0], 0, 0, 0, 0, 0, 0]]
    assert more.position_ids.tolist() == [[*batch.position_ids[0], 0, 0, 0, 0, 0, 0]]
    assert more.layout == (*batch.layout, Group((10, 10), ((10, 16),))) and more.filling == 6
    assert_scores(more, *(getattr(batch, name).tolist() for name in SCORES))
    rows = pad([PAIR], 0)
    assert (
        pad_to_multiple(batch, 5) is batch and pad_to_multiple(batch, 1) is batch and pad_to_multiple(rows, 64) is rows
    )


SCORES = ("score_index", "targets", "cu_seqlens", "completion_lengths")


def test_pad():
    batch = pad([PAIR, PLAIN, MASKED], pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0], [7, 8, 9, 0, 0], [10, 11, 12, 13, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.position_ids is None and batch.layout is None
    assert_scores(batch, [2, 3, 7, 10, 11, 15, 17], [4, 5, 6, 8, 9, 11, 13], [0, 2, 3, 5, 7], [2, 1, 3, 3])


def test_one_token_after_an_empty_prompt_has_an_empty_span():
    batch = pack([{"prompt_ids": [], "completion_ids": [[5]]}, PAIR])
    assert_scores(batch, [3, 4, 3], [4, 5, 6], [0, 0, 2, 3], [1, 2, 1])
    assert pack([{"prompt_ids": [], "completion_ids": [[5]]}]).targets.dtype == torch.int64


def test_masks_follow_the_tokens_of_a_completion_without_prompt():
    batch = pack([{"prompt_ids": [], "completion_ids": [[5, 6, 7, 8]], "completion_mask": [[1, 0, 1, 1]]}])
    assert_scores(batch, [1, 2], [7, 8], [0, 2], [4])


def test_model_inputs_are_those_the_layout_needs():
    assert set(pack([PAIR]).model_inputs()) == {"input_ids", "position_ids"}
    assert set(pad([PAIR], 0).model_inputs()) == {"input_ids", "attention_mask"}


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = pack([PAIR])
    moved = batch.to("meta")
    tensors = [v for v in vars(moved).values() if torch.is_tensor(v)]
    assert len(tensors) == 6 and all(t.device.type == "meta" for t in tensors)
    assert moved.layout == batch.layout and batch.input_ids.device.type == "cpu"


def test_batches_cross_process_borders_of_data_loader_workers():
    batch = pickle.loads(pickle.dumps(pack([PAIR])))
    assert batch.layout == pack([PAIR]).layout and batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("function", [pack, lambda examples: pad(examples, 0)], ids=["pack", "pad"])
@pytest.mark.parametrize(
    "example, message",
    [
        ({"prompt_ids": [1]}, r"Example 1 has no 'completion_ids'; it has \['prompt_ids'\]"),
        ({"prompt_ids": [1], "completion_ids": []}, r"Example 1 has an empty completion \(lengths \[\]\)"),
        ({"prompt_ids": [1], "completion_ids": [[2], []]}, r"Example 1 has an empty completion \(lengths \[1, 0\]\)"),
        ({"prompt_ids": [1], "completion_ids": [[2, 3]], "completion_mask": [[1]]}, r"mask of lengths \[1\].*\[2\]"),
        ({"prompt_ids": [1], "completion_ids": [[2, -100]]}, "Found the token id -100"),
        ({"prompt_ids": [-1], "completion_ids": [[2]]}, "Found the token id -1"),
    ],
)
def test_bad_examples_are_named(function, example, message):
    with pytest.raises(InputError, match=message):
        function([PAIR, example])


def test_no_examples_and_no_padding_token():
    for function in (pack, lambda examples: pad(examples, 0)):
        with pytest.raises(InputError, match="no examples"):
            function([])
    for token in (None, -1):
        with pytest.raises(InputError, match=f"pad_token_id is {token}"):
            pad([PAIR], token)


def test_the_numbers_of_the_drawing_in_the_modules_docstring():
    p, a, b, q, c, d = [1, 2, 3], [4, 5], [6], [7, 8], [9], [10, 11]
    pairs = [{"prompt_ids": p, "completion_ids": [a, b]}, {"prompt_ids": q, "completion_ids": [c, d]}]
    batch = pack(pairs)
    assert batch.position_ids is not None and batch.targets is not None
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3]
    assert batch.targets.tolist() == [*a, *b, *c, *d]
    assert batch.score_index.tolist() == [2, 3, 2, 7, 7, 9]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4, 6]


def test_an_unknown_layout_is_refused():
    with pytest.raises(InputError, match="layout is 'shard'; expected one of shared, packed, padded"):
        lay_out([PAIR], "shard", 0)
