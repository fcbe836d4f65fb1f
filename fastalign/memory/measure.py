"""Memory: what a training step is predicted to need, and what the process has needed."""

from __future__ import annotations

import resource
import sys

import torch
from torch import nn

from fastalign.models.adapters import causal_lm

# Resident before any tensor is made: the interpreter, torch, transformers and what they load.
_CPU_BASE = 600_000_000


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory held so far: the allocator's peak on a GPU, the process's peak resident set on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def predict(model: nn.Module, *, tokens: int, checkpointing: bool = False) -> int:
    """Bytes that a training step over `tokens` tokens is predicted to need at its peak.

    Weights, float32 gradients and two AdamW moments of what is trained, and the activations kept for the backward
    pass: per layer and token about ten vectors of the hidden size and four of the MLP's, or one vector where
    activations are recomputed (plus one layer's worth). The scored tokens' log-probs need no logits.
    """
    config = causal_lm(model).config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad) * 3 * 4
    size = max(2, next(iter(parameters)).element_size())
    layer = (10 * hidden + 4 * inner) * size * tokens
    activations = layer + layers * hidden * size * tokens if checkpointing else layers * layer
    base = 0 if parameters[0].is_cuda else _CPU_BASE
    return base + weights + trained + activations + tokens * hidden * 4
