"""The output layer of a model, in the form that the ops take it. No other module reads an output layer."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from fastalign.errors import ModelError
from fastalign.models.adapters import Lora, unwrap_layer
from fastalign.models.quantization import float_weight
from fastalign.ops.linear_divergence import linear_divergence


class Head(NamedTuple):
    """The output layer of a model: logits are `softcap * tanh(logit_scale * (h W' + bias) / softcap)`.

    Attributes:
        weight: (V, H) floating point, with the adapters on the layer added to it.
        bias: (V,), or None.
        logit_scale: factor of the logits, applied before the soft cap.
        softcap: bound of the logits' absolute value; None for no bound.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def detach(self) -> Head:
        """The same numbers without a gradient."""
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def first(self, count: int) -> Head:
        """The layer of the first `count` entries of the vocabulary, or of all where there are fewer."""
        if count >= self.weight.shape[0]:
            return self  # slicing all rows would cost a copy of the gradient
        return self._replace(weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])

    def options(self) -> dict[str, Any]:
        """Everything but the weight, as keyword arguments of `linear_logprobs` and its relatives."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def output_head(model: PreTrainedModel) -> Head:
    """Weight, bias, scale and soft cap of the model's output layer, with the adapters on it added to the weight.

    Args:
        model: the transformers model itself; `causal_lm(model)` takes it out of its wrappers.

    Raises:
        ModelError: the model has no output layer, or the layer has an adapter or a quantisation that cannot be
            expressed as one weight.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no output layer: load it as a causal language model.")
    config = model.config.get_text_config()
    # Cohere multiplies its logits by `logit_scale`, Granite divides them by `logits_scaling`.
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    plain, adapters = unwrap_layer(layer)
    weight, bias = float_weight(plain.weight), getattr(plain, "bias", None)
    for lora in adapters:
        weight = _with_adapter(weight, lora)
    return Head(
        weight, bias if isinstance(bias, Tensor) else None, scale, getattr(config, "final_logit_softcapping", None)
    )


def token_divergence(hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher: Head, **options: Any) -> Tensor:
    """Per token, the divergence of the model's next-token distribution from a teacher's.

    Args:
        hidden: (S, H) hidden states of the model.
        head: the model's output layer.
        teacher_hidden: (S, G) hidden states of the teacher.
        teacher: the teacher's output layer.
        options: those of `fastalign.linear_divergence` that do not describe the output layers (`divergence`,
            `temperature`, ...).

    Returns:
        (S,) float32, in nats.
    """
    of_teacher = {f"teacher_{name}": value for name, value in teacher.options().items()}
    return linear_divergence(
        hidden, head.weight, teacher_hidden, teacher.weight, **head.options(), **of_teacher, **options
    )


def _with_adapter(weight: Tensor, lora: Lora) -> Tensor:
    """`weight + scaling * b a`, (V, H), in the weight's dtype."""
    if lora.dropout > 0 or not lora.is_plain:
        raise ModelError(
            f"The adapter {lora.name!r} on the output layer uses dropout, a bias or a LoRA variant, which fastalign "
            "cannot fold into its weight: set lora_dropout=0 and plain LoRA, or leave the output layer out of "
            "target_modules."
        )
    # peft's own `get_delta_weight` would round to the weight's dtype. Here the product stays in the adapter's float32.
    return weight + (lora.b @ lora.a * lora.scaling).to(weight.dtype)
