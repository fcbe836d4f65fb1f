"""Which answers are trained on, and what counts in the means."""

from __future__ import annotations

import torch

from fastalign.rollout.engine import Rollout
from fastalign.training.samples import judged_rows, sample_metrics

NAN = float("nan")


def rollout(k=3, finished=(True, True, True)):
    return Rollout([1, 2], [[5] * (i + 1) for i in range(k)], [[-1.0] * (i + 1) for i in range(k)], list(finished))


def test_groups_without_spread_are_not_computed_but_count():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 0.0]])
    (row,) = judged_rows([rollout(), rollout()], rewards, rewards - 1, keep_all=False, drop_truncated=False)
    assert row["left_out"] == [3, 6] and row["advantages"] == [0.0, 1.0, -1.0]
    assert len(row["sampling_logprobs"]) == 3
    both = judged_rows([rollout(), rollout()], rewards, rewards - 1, keep_all=True, drop_truncated=False)
    assert len(both) == 2 and [r["left_out"] for r in both] == [[0, 0], [0, 0]]


def test_answers_without_a_reward_or_an_end_count_in_nothing():
    rewards = torch.tensor([[1.0, NAN, 3.0]])
    (row,) = judged_rows([rollout(finished=(True, True, False))], rewards, rewards, keep_all=False, drop_truncated=True)
    assert row["completion_ids"] == [[5]] and row["left_out"] == [0, 0]


def test_a_micro_batch_is_never_empty():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [NAN, NAN, NAN]])
    (row,) = judged_rows([rollout(), rollout()], rewards, torch.ones(2, 3), keep_all=False, drop_truncated=False)
    assert row["advantages"] == [0.0] and row["left_out"] == [3, 6]


def test_metrics():
    rewards = torch.tensor([[[1.0], [NAN], [3.0]], [[2.0], [2.0], [2.0]]])
    found = sample_metrics([rollout(), rollout(finished=(True, False, True))], rewards, rewards[..., 0], ["r"])
    means = {name: float(total / count) for name, (total, count) in found.items()}
    assert means["reward"] == 2.0 and means["rewards/unscored"] == float(torch.tensor(1 / 6))
    assert means["frac_reward_zero_std"] == 0.5 and means["completions/mean_length"] == 2.0
    assert means["completions/clipped_ratio"] == float(torch.tensor(1 / 6)) and means["reward_std"] == 0.5
