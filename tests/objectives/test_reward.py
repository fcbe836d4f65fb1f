"""The objective of reward models: totals make micro-batches add up, and the preference for length is counted."""

from __future__ import annotations

import pytest
import torch

from fastalign.config.reward import RewardConfig
from fastalign.data.batch import Batch
from fastalign.data.packing import pack
from fastalign.objectives.base import Totals
from fastalign.objectives.reward import RewardObjective

ROWS = [
    {"prompt_ids": [1], "completion_ids": [[2, 3, 4], [5]]},
    {"prompt_ids": [1, 2], "completion_ids": [[2], [5, 6]]},
    {"prompt_ids": [3], "completion_ids": [[2, 4], [5, 6]]},
]


def batch(rows, margins=None):
    return Batch(pack(rows), {} if margins is None else {"margin": torch.tensor(margins, dtype=torch.float64)})


def test_micro_batches_add_up_to_the_whole(tmp_path):
    objective = RewardObjective(RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=0.01))
    scores, margins = torch.tensor([2.0, 1.0, 0.5, 0.7, -1.0, -1.0]), [0.1, 0.2, 0.3]
    whole, metrics = objective(scores, None, batch(ROWS, margins), objective.totals(batch(ROWS)))
    of_parts = (objective.totals(batch(rows)) for rows in (ROWS[:1], ROWS[1:]))
    totals = Totals(*map(sum, zip(*of_parts, strict=True)))
    parts = [
        objective(scores[2 * a : 2 * b], None, batch(ROWS[a:b], margins[a:b]), totals)[0] for a, b in ((0, 1), (1, 3))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)
    means = {name: (total / count).item() for name, (total, count) in metrics.items()}
    assert means["rewards/accuracies"] == pytest.approx(0.5)  # one right, one wrong, one tie
    assert means["rewards/prefers_longer"] == 1.0  # both pairs of different length; the third has none
    assert means["rewards/margins"] == pytest.approx((1.0 - 0.2 + 0.0) / 3)
