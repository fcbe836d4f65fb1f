"""The output layer of a model, as the ops take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.errors import ModelError
from fastalign.ops.linear_divergence import linear_divergence


class Head(NamedTuple):
    """The output layer of a model, as `linear_logprobs` takes it."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    def detach(self) -> Head:
        """The same numbers, whatever becomes of the parameters they are in."""
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def first(self, count: int) -> Head:
        """The layer of the first `count` entries of the vocabulary, or of all where there are fewer."""
        if count >= self.weight.shape[0]:
            return self  # a slice would cost its gradient a copy
        return self._replace(weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])

    def options(self) -> dict:
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def output_head(model: PreTrainedModel) -> Head:
    """Weight, bias, scale and soft cap of the model's output layer, adapters on it included."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no output layer: load it as a causal language model.")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    weight, bias = _effective_weight(layer)
    return Head(weight, bias, scale, getattr(config, "final_logit_softcapping", None))


def token_divergence(hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher: Head, **options) -> Tensor:
    """Per token, how far the model's next-token distribution is from a teacher's; (S, H) and (S, G) -> (S,).

    options: those of `linear_divergence` beside the heads' own.
    """
    own = {f"teacher_{name}": value for name, value in teacher.options().items()}
    return linear_divergence(hidden, head.weight, teacher_hidden, teacher.weight, **head.options(), **own, **options)


def _effective_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    if hasattr(layer, "modules_to_save"):  # peft trains a copy of the whole layer
        active = layer.original_module if layer.disable_adapters else layer.modules_to_save[layer.active_adapters[0]]
        return _effective_weight(active)
    if not hasattr(layer, "base_layer"):
        return _plain_weight(layer), layer.bias if isinstance(getattr(layer, "bias", None), Tensor) else None
    weight, bias = _effective_weight(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        dropout = layer.lora_dropout[adapter]
        variant = adapter in getattr(layer, "lora_variant", {}) or layer.lora_B[adapter].bias is not None
        if getattr(dropout, "p", 0.0) > 0 or variant:
            raise ModelError(
                f"The adapter {adapter!r} on the output layer uses dropout, a bias or a LoRA variant, which fastalign "
                "cannot fold into its weight: set lora_dropout=0 and plain LoRA, or leave the output layer out of "
                "target_modules."
            )
        # B A formed here, not peft's own, so that the product stays in the adapter's float32
        delta = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * layer.scaling[adapter]
        weight = weight + delta.to(weight.dtype)
    return weight, bias


def _plain_weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if weight.is_floating_point():
        return weight
    if hasattr(weight, "quant_state"):  # bitsandbytes, 4 bits
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    raise ModelError(
        f"The output layer holds {weight.dtype} weights of an unknown quantisation; load it unquantised "
        "(llm_int8_skip_modules=['lm_head'])."
    )
