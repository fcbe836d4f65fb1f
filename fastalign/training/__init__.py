"""The trainers, one file per method."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.training.distillation import DistillationTrainer as DistillationTrainer
    from fastalign.training.online import OnlineTrainer as OnlineTrainer
    from fastalign.training.preference import PreferenceTrainer as PreferenceTrainer
    from fastalign.training.reward import RewardTrainer as RewardTrainer
    from fastalign.training.sft import SFTTrainer as SFTTrainer
    from fastalign.training.trainer import AlignmentTrainer as AlignmentTrainer

lazy_exports(
    __name__,
    {
        "AlignmentTrainer": "fastalign.training.trainer",
        "DistillationTrainer": "fastalign.training.distillation",
        "OnlineTrainer": "fastalign.training.online",
        "PreferenceTrainer": "fastalign.training.preference",
        "RewardTrainer": "fastalign.training.reward",
        "SFTTrainer": "fastalign.training.sft",
    },
)
