"""A micro-batch and its columns."""

import torch

from fastalign.data.batch import Batch
from fastalign.data.packing import pack


def test_batch_moves_as_a_whole():
    packed = pack([{"prompt_ids": [1, 2], "completion_ids": [[3], [3, 3]]}])
    columns = {"ref_logprobs": torch.zeros(3), "label": torch.tensor([True])}
    rows = [{"prompt_ids": [1, 2]}]
    moved = Batch(packed, columns, prompt_tokens=3, rows=rows, sampled=True).to("meta", non_blocking=True)
    assert {moved.packed.input_ids.device.type, *(t.device.type for t in moved.columns.values())} == {"meta"}
    assert moved.columns.keys() == columns.keys()
    assert moved.prompt_tokens == 3 and moved.sampled and moved.rows is rows


def test_batches_do_not_share_their_columns():
    one, other = (Batch(pack([{"prompt_ids": [1], "completion_ids": [[2]]}])) for _ in range(2))
    one.columns["label"] = torch.tensor([True])
    assert other.columns == {}
