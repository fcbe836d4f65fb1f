"""The output layer of a model, in the form that the ops take it. No other module reads an output layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastalign.errors import ModelError
from fastalign.models.adapters import Lora, trained_rows, unwrap_layer
from fastalign.models.quantization import QuantizedWeight, float_weight, is_quantized_layer, quantized_weight
from fastalign.ops.head.weights import ComposedWeight
from fastalign.ops.linear_divergence import linear_divergence
from fastalign.ops.linear_logprobs import linear_logprobs


class Head(NamedTuple):
    """The output layer of a model: logits are `softcap * tanh(logit_scale * (h W' + bias) / softcap)`.

    Attributes:
        weight: (V, H) in floating point, or quantised.
        bias: (V,), or None.
        logit_scale: factor of the logits, applied before the soft cap.
        softcap: bound of the logits' absolute value; None for no bound.
        lora: the adapters on the layer, as `linear_logprobs` takes them; None for no adapter.
        new_rows: token ids (k,) and rows (k, H) that take the place of those of the weight; None for no such rows.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    lora: tuple[Tensor, Tensor, float] | None = None
    new_rows: tuple[Tensor, Tensor] | None = None

    def detach(self) -> Head:
        """The same numbers without a gradient."""
        return self._replace(
            weight=self.weight.detach() if isinstance(self.weight, Tensor) else self.weight,
            bias=None if self.bias is None else self.bias.detach(),
            lora=None if self.lora is None else (self.lora[0].detach(), self.lora[1].detach(), self.lora[2]),
            new_rows=None if self.new_rows is None else (self.new_rows[0], self.new_rows[1].detach()),
        )

    def dense(self) -> Head:
        """The same layer with one weight in floating point, (V, H), for what cannot read it in parts."""
        if self.lora is None and self.new_rows is None and isinstance(self.weight, Tensor):
            return self
        dtype = self.weight.dtype or torch.float32
        a, b, scale = self.lora or (None, None, 1.0)
        weight = ComposedWeight(self.weight, b, scale, self.new_rows).dense(a, dtype)
        return self._replace(weight=weight, lora=None, new_rows=None)

    @property
    def dense_weight(self) -> Tensor:
        """The weight (V, H) of a layer that `dense` returned, or of one whose weight is in floating point."""
        assert isinstance(self.weight, Tensor), "dense() comes first"
        return self.weight

    def first(self, count: int) -> Head:
        """The layer of the first `count` entries of the vocabulary, or of all where there are fewer."""
        if count >= self.weight.shape[0]:
            return self  # slicing all rows would cost a copy of the gradient
        return self._replace(
            weight=self.weight[:count] if isinstance(self.weight, Tensor) else self.weight.first(count),
            bias=None if self.bias is None else self.bias[:count],
            lora=None if self.lora is None else (self.lora[0], self.lora[1][:count], self.lora[2]),
            new_rows=_first_rows(self.new_rows, count),
        )

    def options(self) -> dict[str, Any]:
        """Bias, scale and soft cap, as keyword arguments of `linear_logprobs` and its relatives."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def logprobs(self, hidden: Tensor, targets: Tensor, **options: Any) -> Any:
        """`fastalign.linear_logprobs` of this layer.

        Args:
            hidden: (S, H).
            targets: (S,) token ids.
            options: those of `linear_logprobs` that do not describe the output layer.
        """
        return linear_logprobs(
            hidden, self.weight, targets, lora=self.lora, new_rows=self.new_rows, **self.options(), **options
        )


def output_head(model: PreTrainedModel) -> Head:
    """Weight, bias, scale, soft cap and adapters of the model's output layer.

    Args:
        model: the transformers model itself; `causal_lm(model)` takes it out of its wrappers.

    Raises:
        ModelError: the model has no output layer, or the layer has an adapter that is no addition to its weight, or a
            quantisation that is not known.
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
    packed = quantized_weight(plain) if is_quantized_layer(plain) else None
    weight, bias = packed or float_weight(plain.weight), getattr(plain, "bias", None)
    bias, softcap = bias if isinstance(bias, Tensor) else None, getattr(config, "final_logit_softcapping", None)
    head = Head(weight, bias, scale, softcap, _joined(adapters), trained_rows(layer))
    # Where the weight is trained beside its adapter, only their sum passes the gradient on to both.
    return head.dense() if isinstance(weight, Tensor) and weight.requires_grad else head


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
    weight, weight_of_teacher = head.dense().dense_weight, teacher.dense().dense_weight
    return linear_divergence(
        hidden, weight, teacher_hidden, weight_of_teacher, **head.options(), **of_teacher, **options
    )


def _first_rows(rows: tuple[Tensor, Tensor] | None, count: int) -> tuple[Tensor, Tensor] | None:
    """Those of the rows (ids, values) whose token is among the first `count`."""
    if rows is None:
        return None
    kept = rows[0] < count
    return (rows[0][kept], rows[1][kept]) if kept.any() else None


def _joined(adapters: list[Lora]) -> tuple[Tensor, Tensor, float] | None:
    """The adapters on a layer as one: its a (r, H), b (V, r) and scale."""
    for lora in adapters:
        if lora.dropout > 0 or not lora.is_plain:
            raise ModelError(
                f"The adapter {lora.name!r} on the output layer uses dropout, a bias or a LoRA variant, which "
                "fastalign cannot fold into its weight: set lora_dropout=0 and plain LoRA, or leave the output layer "
                "out of target_modules."
            )
    if len(adapters) < 2:
        return (adapters[0].a, adapters[0].b, adapters[0].scaling) if adapters else None
    return torch.cat([lora.a for lora in adapters]), torch.cat([lora.b * lora.scaling for lora in adapters], 1), 1.0
