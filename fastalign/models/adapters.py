"""What fastalign knows of peft."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of its wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
