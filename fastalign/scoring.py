"""Token log-probabilities of a packed batch, computed inside the model's own forward.

`prepare(model)` teaches a model one more way to be called: `model(packed=batch)` runs the body over the batch, picks
the hidden states that predict a scored token, and takes them straight to log-probabilities. Called any other way the
model does what it did before. It has to be the model's own forward, since wrappers (DDP, FSDP, peft, accelerate)
hook into that call and synchronise what went through it.
"""

from __future__ import annotations

import types
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.attention import packed_attention, prepare_model
from fastalign.body import speed_up_body
from fastalign.errors import ModelError
from fastalign.linear import speed_up_linear
from fastalign.ops import linear_logprobs
from fastalign.ops.linear_divergence import linear_divergence
from fastalign.packing import PackedBatch, pack, pad
from fastalign.reference import linear_logits


class Scores(NamedTuple):
    """What `model(packed=batch)` returns."""

    logprobs: Tensor | None  # (S,) float32, of `batch.targets`; None without those
    entropy: Tensor | None  # (S,) float32
    hidden: Tensor | None  # (S, H), what the output layer was given


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


def prepare(model: nn.Module) -> str:
    """Lets `model(packed=batch)` return `Scores`; returns how its batches must be laid out.

    model: a transformers causal language model, or a PeftModel around one, with its weights loaded; changed in place.
    Returns "shared", "packed" or "padded" (see `attention.prepare_model`). ModelError for models that are not causal
    language models, or whose output layer gives other log-probabilities than fastalign's reading of it.
    """
    speed_up_linear(model)
    speed_up_body(model)
    layout = prepare_model(model)
    base = causal_lm(model)
    if not hasattr(base, "_fastalign_forward"):
        base._fastalign_forward = base.forward
        base.forward = types.MethodType(_forward, base)
    _check_head(base, layout)
    return layout


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of its wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lay_out(examples: list[dict], layout: str, pad_token_id: int) -> PackedBatch:
    """The micro-batch of some examples, in the layout that `prepare` found for the model."""
    if layout == "padded":
        return pad(examples, pad_token_id)
    return pack(examples, share_prompts=layout == "shared")


def _forward(
    self, *args, packed: PackedBatch | None = None, entropy=False, keep_hidden=False, memory_budget=None, **kw
):
    if packed is None:
        return self._fastalign_forward(*args, **kw)
    with packed_attention(packed.layout):
        hidden = self.base_model(**packed.model_inputs(), use_cache=False)[0]
    hidden = hidden.flatten(0, 1)[packed.score_index]  # (S, H)
    if packed.targets is None:
        return Scores(None, None, hidden)
    head = output_head(self)
    options = {"ignore_index": None, "memory_budget": memory_budget} | head.options()  # each of them has a target
    out = linear_logprobs(hidden, head.weight, packed.targets, entropy=entropy, **options)
    logprobs, entropies = out if entropy else (out, None)
    return Scores(logprobs, entropies, hidden if keep_hidden else None)


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


@torch.no_grad()
def _check_head(model: PreTrainedModel, layout: str) -> None:
    """Compare with the logits of the model's own forward, so that no unknown output layer goes unnoticed."""
    vocab = model.get_input_embeddings().weight.shape[0]
    example = {"prompt_ids": [vocab // 3], "completion_ids": [[vocab // 3 + 1, vocab // 2, vocab // 5]]}
    batch = lay_out([example], layout, pad_token_id=0).to(model.device)
    training, _ = model.training, model.eval()
    try:
        # Models scale or cap between body and logits in ways of their own: compare the logits, not the code.
        hidden = model(packed=batch, keep_hidden=True).hidden
        head = output_head(model)
        ours = linear_logits(hidden, head.weight, **head.options())
        inputs = torch.tensor([example["prompt_ids"] + example["completion_ids"][0]], device=model.device)
        theirs = model(input_ids=inputs, use_cache=False).logits[0, :-1].to(ours.dtype)
    finally:
        model.train(training)
    error = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
    limit = torch.finfo(hidden.dtype).eps ** 0.5 * max(1.0, theirs.abs().max().item())
    if not error <= limit:
        raise ModelError(
            f"{type(model).__name__} turns hidden states into logits in a way fastalign does not know (log-probs "
            f"differ by {error:.3g}, at most {limit:.3g} would be rounding): this architecture is not supported."
        )
