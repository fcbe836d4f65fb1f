"""Makes a loaded model ready for training: trainable weights, special tokens, dropout."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastalign.errors import ModelError
from fastalign.models.adapters import causal_lm, has_adapter, is_adapter_name
from fastalign.models.loading import logger
from fastalign.models.quantization import check_unquantized, use_training_product


def check_trainable(model: nn.Module) -> None:
    """Checks that something can be trained in a dtype that training works in.

    An adapter in 16 bits becomes float32, in place. Other trainable weights in 16 bits stay so, with a warning: small
    updates of them round to nothing.

    Raises:
        ModelError: no parameter requires a gradient, or the model is quantised and has no adapter, or bitsandbytes
            has rearranged its weights.
    """
    use_training_product(model)
    check_unquantized(model, "pass a peft_config, which trains an adapter on them, or load the model unquantised")
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
    """Sets BOS, EOS and padding of the model to the tokenizer's, so that generation stops where training data ended.

    The configurations of the model and of its generation are changed in place. Chat models may list further tokens at
    which generation stops; they stay in the list.

    Args:
        model: A transformers model, changed in place.
        tokenizer: The tokenizer whose special tokens the model takes over.
    """
    generation = getattr(model, "generation_config", None)
    stops = generation.eos_token_id if generation is not None else None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, generation):
            if config is not None:
                setattr(config, name, getattr(tokenizer, name))
    if isinstance(stops, list):
        generation.eos_token_id = [tokenizer.eos_token_id, *(t for t in stops if t != tokenizer.eos_token_id)]


def disable_dropout(model: nn.Module) -> None:
    """Turns off every dropout of the model, in place, except that of adapters, which peft_config sets on purpose."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not is_adapter_name(name):
            module.p = 0.0
        for attribute in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


def check_router(model: PreTrainedModel) -> bool:
    """Whether the model routes tokens to experts with a load-balancing loss, which no method of fastalign adds.

    Raises:
        ModelError: the configuration asks for that loss.
    """
    config = model.config.get_text_config()
    routes = getattr(config, "router_aux_loss_coef", None) is not None
    if routes and getattr(config, "output_router_logits", False):
        raise ModelError(
            f"{type(model).__name__} is to add the router's load-balancing loss (output_router_logits=True), which "
            "fastalign does not add: set model.config.output_router_logits=False to train without it."
        )
    return routes


def make_ready(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, disable: bool = True) -> None:
    """Makes a model, in place, as it is trained: checked, without dropout, and with the tokenizer's EOS.

    Args:
        model: a transformers model, or a PeftModel around one.
        tokenizer: gives the tokens that end and pad.
        disable: whether the model's dropout is turned off. An adapter's dropout stays.

    Raises:
        ModelError: see `check_trainable` and `check_router`.
    """
    check_trainable(model)
    check_router(causal_lm(model))
    if disable:
        disable_dropout(model)
    adopt_special_tokens(causal_lm(model), tokenizer)
