"""What a trainer minimises: log-probs of one micro-batch in, loss and metrics out."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.objectives.base import Metrics as Metrics
    from fastalign.objectives.base import Objective as Objective
    from fastalign.objectives.base import Totals as Totals
    from fastalign.objectives.policy import PolicyObjective as PolicyObjective
    from fastalign.objectives.preference import PreferenceObjective as PreferenceObjective
    from fastalign.objectives.reward import RewardObjective as RewardObjective
    from fastalign.objectives.sft import SFTObjective as SFTObjective
    from fastalign.objectives.unpaired import UnpairedObjective as UnpairedObjective

lazy_exports(
    __name__,
    {
        "Metrics": "fastalign.objectives.base",
        "Objective": "fastalign.objectives.base",
        "PolicyObjective": "fastalign.objectives.policy",
        "PreferenceObjective": "fastalign.objectives.preference",
        "RewardObjective": "fastalign.objectives.reward",
        "SFTObjective": "fastalign.objectives.sft",
        "Totals": "fastalign.objectives.base",
        "UnpairedObjective": "fastalign.objectives.unpaired",
    },
)
