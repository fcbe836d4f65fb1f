"""The ops: one file each, holding schema, fake, autograd and the public function, top to bottom."""

from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.ewc import ewc_penalty, ewc_penalty_, lora_ewc_penalty
from fastalign.ops.linear_divergence import linear_divergence
from fastalign.ops.linear_logprobs import linear_logprobs
from fastalign.ops.linear_token_statistics import linear_token_statistics
from fastalign.ops.logits_divergence import logits_divergence
from fastalign.ops.preference_loss import preference_loss
from fastalign.ops.rms_norm import rms_norm
from fastalign.ops.segment_attention import segment_attention
from fastalign.ops.segment_sum import segment_sum
from fastalign.ops.selective_logprobs import selective_logprobs
from fastalign.ops.sparse_divergence import sparse_divergence
from fastalign.ops.sparse_logits_divergence import sparse_logits_divergence
from fastalign.ops.swiglu import swiglu

__all__ = [
    "accumulate_fisher_",
    "ewc_penalty",
    "ewc_penalty_",
    "linear_divergence",
    "linear_logprobs",
    "linear_token_statistics",
    "logits_divergence",
    "lora_ewc_penalty",
    "preference_loss",
    "rms_norm",
    "segment_attention",
    "segment_sum",
    "selective_logprobs",
    "sparse_divergence",
    "sparse_logits_divergence",
    "swiglu",
]
