"""The memory that a training step is predicted to need, and the most that the process has needed so far."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from torch import nn

from fastalign.errors import ModelError
from fastalign.memory.parts import Setting, parts
from fastalign.memory.shapes import Shapes, shapes_of
from fastalign.models.adapters import causal_lm, lora_layers


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
    """Predicts the peak memory of one training step with AdamW, in bytes.

    The formulas are those of `fastalign plan`, see `fastalign.memory.parts`. Weights and trained parameters are counted
    on the loaded model.

    Args:
        model: with its weights loaded; `requires_grad` says what is trained.
        tokens: tokens of one micro-batch, all of which may be scored.
        checkpointing: whether activations are recomputed in the backward pass.
    """
    config = causal_lm(model).config.get_text_config()
    parameters = list(model.parameters())
    # Half precision is the least: weights of fewer bits are quantised, activations are not.
    size = max(2, parameters[0].element_size())
    rank = max((lora.a.shape[0] for _, lora in lora_layers(model)), default=0)
    device = "cuda" if parameters[0].is_cuda else "cpu"
    setting = Setting(tokens, rank=rank, size=size, checkpointing=checkpointing, device=device)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(map(_bytes_of, parameters))
    return sum(parts(_shapes(config), setting, weights=weights, trained=trained).values())


def _bytes_of(parameter: Any) -> int:
    """Bytes of a weight with the scales of a quantised one."""
    scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)
    of_scales = 0 if scales is None else scales.numel() * scales.element_size()
    return parameter.numel() * parameter.element_size() + of_scales


def _shapes(config: Any) -> Shapes:
    """The shapes of a loaded model; where the table does not know its architecture, those of a plain decoder."""
    try:
        return shapes_of(config.to_dict())
    except ModelError:
        hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 1)
        # Models that do not state the size of their MLP use four times the hidden size.
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        return Shapes(hidden, inner, config.num_hidden_layers, hidden, hidden, heads, config.vocab_size, tied=False)
