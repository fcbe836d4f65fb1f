"""Judged answers as rows that are trained on, and what is logged of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.losses.advantages import without_spread
from fastalign.objectives.base import Metrics, mean_of
from fastalign.rollout.engine import Rollout


def judged_rows(
    rollouts: list[Rollout], rewards: Tensor, advantages: Tensor, *, keep_all: bool, drop_truncated: bool
) -> list[dict]:
    """The rows of a micro-batch: one per group, with its answers, their advantages and log-probs.

    - Answers without a reward are left out, and so are truncated ones where that is wanted. They count in no mean.
    - Groups whose rewards are all equal have a gradient of exactly 0. They are not computed, but count in the means,
      as `left_out` says. At least one group stays, since a batch cannot be empty.

    Args:
        rollouts: G prompts with k answers each.
        rewards: (G, k), NaN where an answer could not be scored.
        advantages: (G, k).
        keep_all: Whether groups without a spread are computed too, because a further term of the loss needs them.
        drop_truncated: Whether answers that did not end are left out.
    """
    idle = without_spread(rewards).tolist()
    rows, skipped = [], [0, 0]
    groups = list(zip(rollouts, rewards, advantages, idle, strict=True))
    for number, (rollout, reward, advantage, equal) in enumerate(groups):
        used = [
            i for i, value in enumerate(reward.tolist())
            if not math.isnan(value) and (rollout.finished[i] or not drop_truncated)
        ]  # fmt: skip
        last = number == len(groups) - 1 and not rows
        if (equal and not keep_all and not last) or (not used and not last):
            skipped = [skipped[0] + len(used), skipped[1] + sum(len(rollout.completion_ids[i]) for i in used)]
            continue
        values = advantage.tolist()
        if not used:  # nothing of this micro-batch can be used: one answer stands for it, with an advantage of 0
            used, values = [0], [0.0]
        row = {
            "prompt_ids": rollout.prompt_ids,
            "completion_ids": [rollout.completion_ids[i] for i in used],
            "advantages": [values[i] for i in used],
            "left_out": [0, 0],
        }
        if rollout.logprobs is not None:
            row["sampling_logprobs"] = [rollout.logprobs[i] for i in used]
        rows.append(row)
    rows[0]["left_out"] = skipped
    return rows


def sample_metrics(rollouts: list[Rollout], rewards: Tensor, total: Tensor, names: list[str]) -> Metrics:
    """What is logged of answers, under TRL's names.

    Args:
        rollouts: G prompts with k answers each.
        rewards: (G, k, functions), NaN where there is none.
        total: (G, k) their weighted sums.
        names: Of the reward functions.
    """
    scored = total[~total.isnan()]
    lengths = torch.tensor([float(len(ids)) for rollout in rollouts for ids in rollout.completion_ids])
    finished = torch.tensor([float(end) for rollout in rollouts for end in rollout.finished])
    metrics = {
        "reward": mean_of(scored),
        "rewards/unscored": mean_of(total.isnan().float()),
        "completions/mean_length": mean_of(lengths),
        "completions/clipped_ratio": mean_of(1 - finished),
    }
    if total.shape[1] > 1:
        spread = torch.stack([group[~group.isnan()].std(correction=0) for group in total]).nan_to_num(nan=0.0)
        metrics["reward_std"] = mean_of(spread)
        metrics["frac_reward_zero_std"] = mean_of(without_spread(total).float())
    for i, name in enumerate(names):
        values = rewards[..., i][~rewards[..., i].isnan()]
        metrics[f"rewards/{name}/mean"] = mean_of(values)
    return metrics
