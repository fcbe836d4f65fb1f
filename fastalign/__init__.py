"""fastalign: post-training of language models on one memory-limited machine."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.config import DistillationConfig as DistillationConfig
    from fastalign.config import PreferenceConfig as PreferenceConfig
    from fastalign.config import SFTConfig as SFTConfig
    from fastalign.fisher import Fisher as Fisher
    from fastalign.fisher import fisher_diagonal as fisher_diagonal
    from fastalign.fused import PreferenceOutput as PreferenceOutput
    from fastalign.fused import UnpairedOutput as UnpairedOutput
    from fastalign.fused import fused_linear_aot as fused_linear_aot
    from fastalign.fused import fused_linear_apo_down as fused_linear_apo_down
    from fastalign.fused import fused_linear_apo_zero as fused_linear_apo_zero
    from fastalign.fused import fused_linear_bco as fused_linear_bco
    from fastalign.fused import fused_linear_bco_pair as fused_linear_bco_pair
    from fastalign.fused import fused_linear_cpo as fused_linear_cpo
    from fastalign.fused import fused_linear_discopop as fused_linear_discopop
    from fastalign.fused import fused_linear_dpo as fused_linear_dpo
    from fastalign.fused import fused_linear_exo as fused_linear_exo
    from fastalign.fused import fused_linear_hinge as fused_linear_hinge
    from fastalign.fused import fused_linear_ipo as fused_linear_ipo
    from fastalign.fused import fused_linear_kto as fused_linear_kto
    from fastalign.fused import fused_linear_nca as fused_linear_nca
    from fastalign.fused import fused_linear_orpo as fused_linear_orpo
    from fastalign.fused import fused_linear_preference as fused_linear_preference
    from fastalign.fused import fused_linear_robust as fused_linear_robust
    from fastalign.fused import fused_linear_sft as fused_linear_sft
    from fastalign.fused import fused_linear_simpo as fused_linear_simpo
    from fastalign.fused import fused_linear_sppo as fused_linear_sppo
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
    from fastalign.training import PreferenceTrainer as PreferenceTrainer
    from fastalign.training import SFTTrainer as SFTTrainer

__version__ = "0.1.0"

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
        "PreferenceConfig": "fastalign.config",
        "PreferenceOutput": "fastalign.fused",
        "PreferenceTrainer": "fastalign.training",
        "Replay": "fastalign.regularizers",
        "SFTConfig": "fastalign.config",
        "SFTTrainer": "fastalign.training",
        "UnpairedOutput": "fastalign.fused",
        "accumulate_fisher_": "fastalign.ops",
        "ewc_penalty": "fastalign.ops",
        "ewc_penalty_": "fastalign.ops",
        "fisher_diagonal": "fastalign.fisher",
        "fused_linear_aot": "fastalign.fused",
        "fused_linear_apo_down": "fastalign.fused",
        "fused_linear_apo_zero": "fastalign.fused",
        "fused_linear_bco": "fastalign.fused",
        "fused_linear_bco_pair": "fastalign.fused",
        "fused_linear_cpo": "fastalign.fused",
        "fused_linear_discopop": "fastalign.fused",
        "fused_linear_dpo": "fastalign.fused",
        "fused_linear_exo": "fastalign.fused",
        "fused_linear_hinge": "fastalign.fused",
        "fused_linear_ipo": "fastalign.fused",
        "fused_linear_kto": "fastalign.fused",
        "fused_linear_nca": "fastalign.fused",
        "fused_linear_orpo": "fastalign.fused",
        "fused_linear_preference": "fastalign.fused",
        "fused_linear_robust": "fastalign.fused",
        "fused_linear_sft": "fastalign.fused",
        "fused_linear_simpo": "fastalign.fused",
        "fused_linear_sppo": "fastalign.fused",
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
