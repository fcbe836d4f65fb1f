"""From tokenised rows to micro-batches."""

import datasets
import pytest
import torch

from fastalign.data.collate import Collator, with_mismatched
from fastalign.errors import DataError

ROWS = [
    {"prompt_ids": [1, 2, 3], "completion_ids": [[4], [5, 6]]},
    {"prompt_ids": [7, 8], "completion_ids": [[9, 10, 11], [12]]},
]


def test_kto_takes_its_second_completions_from_other_prompts():
    prompts = [[5], [5], [6], [7], [7], [5]]
    rows = [{"prompt_ids": prompt, "completion_ids": [[i]]} for i, prompt in enumerate(prompts)]
    paired = with_mismatched(datasets.Dataset.from_list(rows))
    assert [row["completion_ids"][1] for row in paired] == [[2], [2], [3], [5], [5], [2]]
    assert [(row["prompt_ids"], row["completion_ids"][0][0]) for row in paired] == [
        (p, i) for i, p in enumerate(prompts)
    ]
    with pytest.raises(DataError, match="other prompts'"):
        with_mismatched(datasets.Dataset.from_list(rows[:2]))


def test_a_column_per_row_per_completion_or_per_token_is_flat():
    extra = [
        {"label": True, "advantages": [0.5, -0.5], "ref_logprobs": [[-1.0], [-2.0, -3.0]]},
        {"label": False, "advantages": [1.0, -1.0], "ref_logprobs": [[-4.0, -5.0, -6.0], [-7.0]]},
    ]
    rows = [{**row, "completion_mask": None, **columns} for row, columns in zip(ROWS, extra, strict=True)]
    batch = Collator("shared", 0)(rows)["batch"]
    assert batch.rows == rows and batch.prompt_tokens == 0
    assert batch.columns.keys() == {"label", "advantages", "ref_logprobs"}
    assert batch.columns["label"].tolist() == [True, False] and batch.columns["label"].dtype == torch.bool
    assert batch.columns["advantages"].tolist() == [0.5, -0.5, 1.0, -1.0]
    assert batch.columns["ref_logprobs"].dtype == torch.float32
    assert (batch.columns["ref_logprobs"].int() == -torch.arange(1, 8)).all()
    assert len(batch.columns["ref_logprobs"]) == batch.packed.cu_seqlens[-1] == len(batch.packed.targets)


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("multiple", [1, 64])
def test_prompts_are_scored_behind_the_completions_and_once(layout, multiple):
    batch = Collator(layout, 0, score_prompts=True, multiple=multiple)(ROWS)["batch"]
    packed = batch.packed
    assert batch.prompt_tokens == 3
    assert packed.targets.tolist() == [4, 5, 6, 9, 10, 11, 12, 2, 3, 8]
    assert packed.cu_seqlens[-1] == 7
    inputs = packed.input_ids[0]
    before = inputs[packed.score_index].tolist()
    assert before == [3, 3, 5, 8, 9, 10, 8, 1, 2, 7]  # the token that each hidden state has just read
    assert len(inputs) % multiple == 0


def test_rows_of_a_packed_batch_are_filled_up_to_a_multiple():
    batches = [Collator("shared", 0, multiple=multiple)(ROWS)["batch"].packed for multiple in (1, 16)]
    assert [(b.input_ids.shape[1], b.filling) for b in batches] == [(12, 0), (16, 4)]
