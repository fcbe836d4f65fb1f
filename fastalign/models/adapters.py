"""What fastalign knows of peft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from fastalign.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel as PeftModel


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of its wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The model with the adapter that a folder holds, which is switched on.

    Args:
        model: the base model; peft puts the adapter's layers into it.
        folder: an adapter that was saved as safetensors.

    Raises:
        ModelError: the adapter cannot be read, or it does not fit the model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder)
    except Exception as error:  # peft has no common error for adapters that do not fit
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"The adapter {folder} does not fit {model.name_or_path or 'the model'}: {reason}") from error
