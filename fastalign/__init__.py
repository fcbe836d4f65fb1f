"""fastalign: post-training of language models on one memory-limited machine."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports
from fastalign.models.offline import guard_imports

if TYPE_CHECKING:
    from fastalign.config import DistillationConfig as DistillationConfig
    from fastalign.config import OnlineConfig as OnlineConfig
    from fastalign.config import PreferenceConfig as PreferenceConfig
    from fastalign.config import RewardConfig as RewardConfig
    from fastalign.config import SFTConfig as SFTConfig
    from fastalign.evaluation import Suite as Suite
    from fastalign.evaluation import check_contamination as check_contamination
    from fastalign.evaluation import evaluate as evaluate
    from fastalign.fisher import Fisher as Fisher
    from fastalign.fisher import fisher_diagonal as fisher_diagonal
    from fastalign.fused import *  # noqa: F403 -- `fused_linear_<loss>` of every loss, as fused.pyi lists them
    from fastalign.fused import PreferenceOutput as PreferenceOutput
    from fastalign.fused import UnpairedOutput as UnpairedOutput
    from fastalign.ops import accumulate_fisher_ as accumulate_fisher_
    from fastalign.ops import ewc_penalty as ewc_penalty
    from fastalign.ops import ewc_penalty_ as ewc_penalty_
    from fastalign.ops import linear_divergence as linear_divergence
    from fastalign.ops import linear_logprobs as linear_logprobs
    from fastalign.ops import logits_divergence as logits_divergence
    from fastalign.ops import lora_ewc_penalty as lora_ewc_penalty
    from fastalign.ops import preference_loss as preference_loss
    from fastalign.ops import segment_sum as segment_sum
    from fastalign.ops import selective_logprobs as selective_logprobs
    from fastalign.ops import sparse_divergence as sparse_divergence
    from fastalign.ops import sparse_logits_divergence as sparse_logits_divergence
    from fastalign.regularizers import EWC as EWC
    from fastalign.regularizers import L2SP as L2SP
    from fastalign.regularizers import Distillation as Distillation
    from fastalign.regularizers import KLToStart as KLToStart
    from fastalign.regularizers import LayerWise as LayerWise
    from fastalign.regularizers import Replay as Replay
    from fastalign.training import DistillationTrainer as DistillationTrainer
    from fastalign.training import OnlineTrainer as OnlineTrainer
    from fastalign.training import PreferenceTrainer as PreferenceTrainer
    from fastalign.training import RewardTrainer as RewardTrainer
    from fastalign.training import SFTTrainer as SFTTrainer

__version__ = "0.1.0"

# The functions `fused_linear_<loss>` come from the table of losses: a name that ends in `*` stands for all of them.
guard_imports()

lazy_exports(
    __name__,
    {
        "Distillation": "fastalign.regularizers",
        "DistillationConfig": "fastalign.config",
        "DistillationTrainer": "fastalign.training",
        "EWC": "fastalign.regularizers",
        "Fisher": "fastalign.fisher",
        "KLToStart": "fastalign.regularizers",
        "L2SP": "fastalign.regularizers",
        "LayerWise": "fastalign.regularizers",
        "OnlineConfig": "fastalign.config",
        "OnlineTrainer": "fastalign.training",
        "PreferenceConfig": "fastalign.config",
        "PreferenceOutput": "fastalign.fused",
        "PreferenceTrainer": "fastalign.training",
        "Replay": "fastalign.regularizers",
        "RewardConfig": "fastalign.config",
        "RewardTrainer": "fastalign.training",
        "SFTConfig": "fastalign.config",
        "SFTTrainer": "fastalign.training",
        "Suite": "fastalign.evaluation",
        "UnpairedOutput": "fastalign.fused",
        "accumulate_fisher_": "fastalign.ops",
        "check_contamination": "fastalign.evaluation",
        "evaluate": "fastalign.evaluation",
        "ewc_penalty": "fastalign.ops",
        "ewc_penalty_": "fastalign.ops",
        "fisher_diagonal": "fastalign.fisher",
        "fused_linear_*": "fastalign.fused",
        "linear_divergence": "fastalign.ops",
        "linear_logprobs": "fastalign.ops",
        "logits_divergence": "fastalign.ops",
        "lora_ewc_penalty": "fastalign.ops",
        "preference_loss": "fastalign.ops",
        "segment_sum": "fastalign.ops",
        "selective_logprobs": "fastalign.ops",
        "sparse_divergence": "fastalign.ops",
        "sparse_logits_divergence": "fastalign.ops",
    },
)
