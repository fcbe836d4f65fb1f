"""Rewards of answers: from a reward model, and how good it is on held-out pairs."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.rewards.held_out import pair_report as pair_report
    from fastalign.rewards.model import RewardModel as RewardModel

lazy_exports(
    __name__,
    {
        "RewardModel": "fastalign.rewards.model",
        "pair_report": "fastalign.rewards.held_out",
    },
)
