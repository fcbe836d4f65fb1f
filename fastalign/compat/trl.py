"""TRL's `selective_log_softmax`, from `trl.trainer.utils` of TRL 1.16."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops import selective_logprobs


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of some vocabulary entries.

        log_softmax(logits / temperature) at index

    The result is float32 (float64 for float64 logits), where TRL returns the dtype of the logits: a sum of a few
    hundred bfloat16 log-probabilities is off by whole units.

    Args:
        logits: (..., V) floating.
        index: (...) int64, or (..., K) for K log-probabilities per position.
        temperature: What the logits are divided by.
        row_mask: Shaped like `index`. Entries where it is zero are zero, without gradient.

    Returns:
        Log-probabilities in nats, shaped like `index`.
    """
    if index.dim() == logits.dim() - 1:
        targets = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
        return selective_logprobs(logits, targets, temperature=temperature)
    # One pass over the vocabulary gives the log-probability of the largest logit, which is finite even where others are
    # -inf. The K log-probabilities differ from it by the differences of the logits.
    top = logits.argmax(-1, keepdim=True)
    anchor = selective_logprobs(logits, top.squeeze(-1), temperature=temperature).unsqueeze(-1)
    above = (logits.gather(-1, index).to(anchor.dtype) - logits.gather(-1, top).to(anchor.dtype)) / temperature
    logprobs = anchor + above
    return logprobs if row_mask is None else torch.where(row_mask == 0, 0.0, logprobs)
