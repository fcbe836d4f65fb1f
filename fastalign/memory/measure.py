"""The memory that a training step is predicted to need, and the most that the process has needed so far."""

from __future__ import annotations

import resource
import sys

import torch
from torch import nn

from fastalign.models.adapters import causal_lm

# Bytes that are resident before any tensor is made: the interpreter, torch, transformers and what they load.
_CPU_BASE = 600_000_000


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory that was held so far, in bytes.

    Args:
        device: on a GPU the peak of torch's allocator is returned, on a CPU the peak resident set of the process.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def predict(model: nn.Module, *, tokens: int, checkpointing: bool = False) -> int:
    """Predicts the peak memory of one training step, in bytes.

    It is the sum of

    - the weights, and for those that are trained a float32 gradient and two float32 moments of AdamW,
    - the activations that the backward pass needs. Per layer and token these are about ten vectors of the hidden size
      and four of the MLP's size; with checkpointing one vector of the hidden size, plus all of one layer,
    - one float32 vector of the hidden size per token. The log-probs need no logits,
    - on a CPU, 600 MB of libraries.

    Args:
        model: with its weights loaded; `requires_grad` says what is trained.
        tokens: tokens of one micro-batch.
        checkpointing: whether activations are recomputed in the backward pass.
    """
    config = causal_lm(model).config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    # The MLP's size; models that do not state it use four times the hidden size.
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad) * 3 * 4
    size = max(
        2, parameters[0].element_size()
    )  # of an activation; below 16 bits weights are quantised, not activations
    layer = (10 * hidden + 4 * inner) * size * tokens
    activations = layer + layers * hidden * size * tokens if checkpointing else layers * layer
    base = 0 if parameters[0].is_cuda else _CPU_BASE
    return base + weights + trained + activations + tokens * hidden * 4
