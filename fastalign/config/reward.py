"""Options of reward models."""

from __future__ import annotations

from dataclasses import dataclass

from fastalign.config.base import AlignmentConfig
from fastalign.config.ranges import NOT_NEGATIVE, check_ranges
from fastalign.options import help_field


@dataclass
class RewardConfig(AlignmentConfig):
    """Options of `RewardTrainer`: the Bradley-Terry loss on pairs.

    The fields of `AlignmentConfig` are options too.

    Attributes:
        learning_rate: AdamW's initial learning rate. None: 1e-4 for an adapter, 1e-5 for all weights.
        center_rewards_coefficient: Weight of `(score of chosen + score of rejected)^2`, which holds the scores around
            0. None: without it.

    Raises:
        ConfigError: An option has a value out of its range.
    """

    learning_rate: float | None = help_field(
        None, "AdamW's initial learning rate. None: 1e-4 for an adapter, 1e-5 for all weights."
    )
    full_rate = 1e-5
    center_rewards_coefficient: float | None = help_field(
        None, "Weight of (score of chosen + score of rejected)^2, which holds the scores around 0. None: without it."
    )

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, {"center_rewards_coefficient": NOT_NEGATIVE})
