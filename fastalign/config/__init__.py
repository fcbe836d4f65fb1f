"""The options of each training method."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.config.base import AlignmentConfig as AlignmentConfig
    from fastalign.config.distillation import DistillationConfig as DistillationConfig
    from fastalign.config.online import OnlineConfig as OnlineConfig
    from fastalign.config.preference import PreferenceConfig as PreferenceConfig
    from fastalign.config.reward import RewardConfig as RewardConfig
    from fastalign.config.sft import SFTConfig as SFTConfig

lazy_exports(
    __name__,
    {
        "AlignmentConfig": "fastalign.config.base",
        "DistillationConfig": "fastalign.config.distillation",
        "OnlineConfig": "fastalign.config.online",
        "PreferenceConfig": "fastalign.config.preference",
        "RewardConfig": "fastalign.config.reward",
        "SFTConfig": "fastalign.config.sft",
    },
)
