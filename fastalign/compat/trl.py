"""TRL's `selective_log_softmax`, from `trl.trainer.utils` of TRL 1.16."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops import selective_logprobs


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """`log_softmax(logits / temperature)` at `index`, shaped like `index`.

    logits: (..., V). index: (...) int64, or (..., K) for K log-probabilities a position. row_mask, shaped like index:
    entries where it is zero are zero, without gradient. Always float32 (float64 for float64 logits), where TRL returns
    the logits' dtype: a sum of a few hundred bfloat16 log-probabilities is off by whole units.
    """
    if index.dim() == logits.dim() - 1:
        targets = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
        return selective_logprobs(logits, targets, temperature=temperature)
    # All K hang on the largest logit, which is finite, so that one pass over the vocabulary is enough.
    top = logits.argmax(-1, keepdim=True)
    anchor = selective_logprobs(logits, top.squeeze(-1), temperature=temperature).unsqueeze(-1)
    above = (logits.gather(-1, index).to(anchor.dtype) - logits.gather(-1, top).to(anchor.dtype)) / temperature
    logprobs = anchor + above
    return logprobs if row_mask is None else torch.where(row_mask == 0, 0.0, logprobs)
