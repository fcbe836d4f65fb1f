"""Making a loaded model ready for training."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastalign.errors import ModelError
from fastalign.models.adapters import has_adapter, is_adapter_name
from fastalign.models.loading import logger


def check_trainable(model: nn.Module) -> None:
    """ModelError if there is nothing to train; 16-bit adapters become float32, 16-bit weights get a warning."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ModelError("No parameter of the model is trainable: pass a peft_config, or set requires_grad.")
    low = [name for name, p in trainable if p.dtype in (torch.bfloat16, torch.float16)]
    if low and has_adapter(model):
        for _, parameter in trainable:
            parameter.data = parameter.data.float()
    elif low:
        logger.warning(
            "%d trainable tensors are in 16 bits (%s, ...), where small updates round to nothing: load the model in "
            "float32 (dtype='float32'), or train an adapter.", len(low), low[0],
        )  # fmt: skip


def adopt_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ending and padding as the tokenizer has them, so that generation stops where training data ended."""
    generation = model.generation_config
    stops = generation.eos_token_id if generation is not None else None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, generation):
            if config is not None:
                setattr(config, name, getattr(tokenizer, name))
    if isinstance(stops, list):  # chat models stop at several tokens
        generation.eos_token_id = [tokenizer.eos_token_id, *(t for t in stops if t != tokenizer.eos_token_id)]


def disable_dropout(model: nn.Module) -> None:
    """Turns every dropout off but those of adapters."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not is_adapter_name(name):
            module.p = 0.0
        for attribute in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
