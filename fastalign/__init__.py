"""fastalign: post-training of language models on one memory-limited machine."""

import importlib

from fastalign.fused import (
    PreferenceOutput,
    UnpairedOutput,
    fused_linear_aot,
    fused_linear_apo_down,
    fused_linear_apo_zero,
    fused_linear_bco,
    fused_linear_bco_pair,
    fused_linear_cpo,
    fused_linear_discopop,
    fused_linear_dpo,
    fused_linear_exo,
    fused_linear_hinge,
    fused_linear_ipo,
    fused_linear_kto,
    fused_linear_nca,
    fused_linear_orpo,
    fused_linear_preference,
    fused_linear_robust,
    fused_linear_sft,
    fused_linear_simpo,
    fused_linear_sppo,
)
from fastalign.ops import (
    linear_divergence,
    linear_logprobs,
    logits_divergence,
    preference_loss,
    segment_sum,
    selective_logprobs,
    sparse_divergence,
    sparse_logits_divergence,
)

__version__ = "0.1.0"

# The trainers bring transformers with them; the fused calls must not, so these are imported when first asked for.
_LAZY = {
    "DistillationConfig": "fastalign.config",
    "PreferenceConfig": "fastalign.config",
    "SFTConfig": "fastalign.config",
    "DistillationTrainer": "fastalign.distillation",
    "PreferenceTrainer": "fastalign.trainer",
    "SFTTrainer": "fastalign.trainer",
    "EWC": "fastalign.regularizers",
    "KLToStart": "fastalign.regularizers",
    "L2SP": "fastalign.regularizers",
    "Distillation": "fastalign.teachers",
    "LayerWise": "fastalign.layerwise",
    "Replay": "fastalign.replay",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'fastalign' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "EWC",
    "L2SP",
    "Distillation",
    "DistillationConfig",
    "DistillationTrainer",
    "KLToStart",
    "LayerWise",
    "PreferenceConfig",
    "PreferenceOutput",
    "PreferenceTrainer",
    "Replay",
    "SFTConfig",
    "SFTTrainer",
    "UnpairedOutput",
    "__version__",
    "fused_linear_aot",
    "fused_linear_apo_down",
    "fused_linear_apo_zero",
    "fused_linear_bco",
    "fused_linear_bco_pair",
    "fused_linear_cpo",
    "fused_linear_discopop",
    "fused_linear_dpo",
    "fused_linear_exo",
    "fused_linear_hinge",
    "fused_linear_ipo",
    "fused_linear_kto",
    "fused_linear_nca",
    "fused_linear_orpo",
    "fused_linear_preference",
    "fused_linear_robust",
    "fused_linear_sft",
    "fused_linear_simpo",
    "fused_linear_sppo",
    "linear_divergence",
    "linear_logprobs",
    "logits_divergence",
    "preference_loss",
    "segment_sum",
    "selective_logprobs",
    "sparse_divergence",
    "sparse_logits_divergence",
]
