"""Attention over packed rows: every completion sees its prompt and itself, on unmodified transformers models.

transformers lets a model's attention and mask functions be exchanged by name. Under the name "fastalign" the mask
function returns, instead of a mask tensor, a `PackedMask`, which reaches every layer as its `attention_mask`; there
the attention function runs one call for all segments (`varlen.py` on a GPU, `cpu_attention.py`), or one per segment
where the model asks for more than those know. A segment is a run of queries over `[prefix |] itself`: a group's prompt
and first completion are one plainly causal segment, each further completion is a segment with the prompt as its prefix.
Nothing is computed twice, and the layout survives the recomputation of gradient checkpointing, because it is an
argument of the layer.

Without a layout both functions do what transformers' "sdpa" does, so a prepared model generates as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropout_
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastalign import cpu_attention, varlen
from fastalign.errors import ModelError
from fastalign.linear import multiplies
from fastalign.packing import Group, PackedBatch, pack, pad
from fastalign.varlen import Segment

NAME = "fastalign"
logger = logging.getLogger("fastalign")


class PackedMask:
    """What the layers of a model get as `attention_mask` while a layout is active: segments and their masks."""

    def __init__(self, layout: tuple[Group, ...], window: int | None):
        self.window = window
        self.segments = []
        for prompt, completions in layout:
            head = len(self.segments)
            self.segments.append(Segment(completions[0][1] - prompt[0], 0, head))
            for start, stop in completions[1:]:
                self.segments.append(Segment(stop - start, prompt[1] - prompt[0], head))
        self.length = sum(segment.length for segment in self.segments)
        starts = [0, *accumulate(segment.length for segment in self.segments)]
        table = [(starts[i], s.length, starts[s.head], s.prefix) for i, s in enumerate(self.segments)]
        self.table = torch.tensor(table, device="cpu")  # as `cpu_attention` takes them
        self._masks: dict[torch.device, list[Tensor | None]] = {}
        self._varlen: dict[torch.device, varlen.Varlen] = {}

    def masks(self, device: torch.device) -> list[Tensor | None]:
        """One boolean (queries, keys) mask per segment, True = visible; None where plain causal attention will do."""
        if device not in self._masks:
            self._masks[device] = [_segment_mask(segment, self.window, device) for segment in self.segments]
        return self._masks[device]

    def varlen(self, device: torch.device) -> varlen.Varlen:
        """The same for a kernel that takes segments of any length."""
        if device not in self._varlen:
            self._varlen[device] = varlen.lay_out(self.segments, device)
        return self._varlen[device]


def _segment_mask(segment: Segment, window: int | None, device: torch.device) -> Tensor | None:
    keys = segment.prefix + segment.length
    if segment.prefix == 0 and (window is None or window >= keys):
        return None
    mask = torch.ones(segment.length, keys, dtype=torch.bool, device=device).tril(segment.prefix)
    return mask if window is None else mask.triu(segment.prefix - window + 1)


_layout: ContextVar[tuple[Group, ...] | None] = ContextVar("layout", default=None)


@contextmanager
def packed_attention(layout: tuple[Group, ...] | None) -> Iterator[None]:
    """While active, the forward of a prepared model reads its row by `layout`; None leaves attention as it is.

    Wrap the forward only: gradient checkpointing's recomputation in backward needs no context. Give the model
    `use_cache=False`.
    """
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def _mask_function(*, local_size: int | None = None, config=None, use_vmap: bool = False, **kwargs):
    layout = _layout.get()
    if layout is None:
        return sdpa_mask(local_size=local_size, config=config, use_vmap=use_vmap, **kwargs)
    if "allow_is_bidirectional_skip" in kwargs:
        raise ModelError("A layer asks for non-causal attention, which cannot be packed: use padded batches.")
    if use_vmap:
        raise ModelError(
            "The model adds its own rule to the attention mask, which cannot be packed: use padded batches."
        )
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise ModelError("The model attends in chunks, which cannot be packed: use padded batches.")
    mask = PackedMask(layout, local_size)
    batch, queries, keys = kwargs["batch_size"], kwargs["q_length"], kwargs["kv_length"]
    if (batch, queries, keys) != (1, mask.length, mask.length):
        raise ModelError(
            f"The layout describes one row of {mask.length} tokens, but the model was given {batch} row(s) of "
            f"{queries} tokens over {keys} keys: pass the packed batch alone, without a cache."
        )
    if (padding := kwargs.get("attention_mask")) is not None and not padding.all():
        raise ModelError(
            "A packed row has no padding: do not pass an attention_mask with zeros together with a layout."
        )
    return mask


class Options(NamedTuple):
    """What a model asks of its attention besides queries, keys and values; `sinks` is (heads,)."""

    dropout: float
    scaling: float
    softcap: float | None
    sinks: Tensor | None


def _attention_function(
    module: nn.Module,
    query: Tensor,  # (B, heads, T, D)
    key: Tensor,  # (B, kv_heads, T, D)
    value: Tensor,  # (B, kv_heads, T, Dv)
    attention_mask: PackedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:  # (B, T, heads, Dv)
    options = Options(dropout, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if isinstance(attention_mask, PackedMask):
        for name in ("position_bias", "head_mask", "cache"):
            if kwargs.get(name) is not None:
                raise ModelError(
                    f"The model passes {name!r} to its attention, which cannot be packed: use padded batches."
                )
        return _packed_attention(query, key, value, attention_mask, options), None
    if not query.is_cuda and not multiplies(dtype := query.dtype):
        wide = (t.float() for t in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            output, _ = _attention_function(module, *wide, attention_mask, dropout, scaling, softcap, s_aux, **kwargs)
        return output.to(dtype), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return _explicit_attention(query, key, value, attention_mask, options).transpose(1, 2).contiguous(), None


def _packed_attention(query: Tensor, key: Tensor, value: Tensor, packed: PackedMask, options: Options) -> Tensor:
    if name := varlen.kernel(query, value, options.dropout, options.softcap, options.sinks):
        return varlen.attend(
            name, query, key, value, packed.varlen(query.device), window=packed.window, dropout=options.dropout,
            scaling=options.scaling, softcap=options.softcap,
        )  # fmt: skip
    plain = options.softcap is None and options.sinks is None
    if plain and not options.dropout and query.device.type == "cpu":
        if torch.is_autocast_enabled("cpu") and query.dtype != torch.float64:
            query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
        if cpu_attention.takes(query, key, value):
            return cpu_attention.attend(query, key, value, packed.table, packed.window, options.scaling)
    attend = _sdpa if plain else _explicit_attention
    if not query.is_cuda and not multiplies(dtype := query.dtype):
        query, key, value = query.float(), key.float(), value.float()
        with torch.autocast("cpu", enabled=False):
            return _by_segments(attend, query, key, value, packed, options).to(dtype)
    return _by_segments(attend, query, key, value, packed, options)


def _by_segments(attend: Callable, query, key, value, packed: PackedMask, options: Options) -> Tensor:
    sizes = [segment.length for segment in packed.segments]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    outputs = []
    for i, (segment, mask) in enumerate(zip(packed.segments, packed.masks(query.device), strict=True)):
        k, v = keys[i], values[i]
        if segment.prefix:
            k, v = (torch.cat([x[segment.head][:, :, : segment.prefix], x[i]], dim=2) for x in (keys, values))
        outputs.append(attend(queries[i], k, v, mask, options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """SDPA of one segment; no mask means causal."""
    groups = query.shape[1] // key.shape[1]
    # The CPU kernel reads grouped keys in place; the CUDA kernels that take a mask do not.
    if groups > 1 and query.is_cuda and mask is not None:
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    return scaled_dot_product_attention(
        query, key, value, mask, options.dropout, is_causal=mask is None, scale=options.scaling, enable_gqa=groups > 1
    )


def _explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """softmax(softcap * tanh(q k' scaling / softcap)) v, attention sinks as one more logit; no mask means causal."""
    kv_heads = key.shape[1]
    query = query.unflatten(1, (kv_heads, -1))  # (B, kv_heads, heads / kv_heads, Tq, D)
    scores = query @ key.unsqueeze(2).transpose(-1, -2) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        mask = mask.tril() if mask.shape[0] > 1 else mask
    mask = mask.unsqueeze(2) if mask.dim() == 4 else mask
    # The smallest finite number, not -inf: a padding row may see no key at all.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype).view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    probs = dropout_(probs[..., : key.shape[2]], options.dropout)
    return (probs @ value.unsqueeze(2)).flatten(1, 2)


AttentionInterface.register(NAME, _attention_function)
AttentionMaskInterface.register(NAME, _mask_function)


def prepare_model(model: nn.Module) -> Literal["shared", "packed", "padded"]:
    """Sets the attention of a causal model, and finds out by a forward of a few tokens how batches may be laid out.

    Args:
        model: a transformers model with its weights loaded, or a PeftModel around one. It is changed in place (its
            attention implementation), except where it must keep its own.

    Returns:
        "shared": `pack(examples)`; the model honours positions and keeps completions apart.
        "packed": `pack(examples, share_prompts=False)`; the model keeps whole sequences apart by itself.
        "padded": `pad(examples, pad_token_id)`; for instance models with recurrent state.
        Results are the same. Anything but "shared" is said once, as a warning of the logger "fastalign".

    Raises:
        ModelError: not a transformers model, an encoder-decoder, not causal, or an adapter that adds virtual tokens.
    """
    base = _base_model(model)
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        layout, reason = _find_layout(base)
    finally:
        for module, training in modes.items():
            module.training = training
    if layout != "shared":
        how = "packed without sharing" if layout == "packed" else "padded"
        logger.warning("%s cannot share prompts (%s): batches will be %s.", type(base).__name__, reason, how)
    return layout


def _find_layout(base: PreTrainedModel) -> tuple[Literal["shared", "packed", "padded"], str | None]:
    body, stock = base.base_model, base.config._attn_implementation
    if type(base)._can_set_attn_implementation() and base.device.type == "cpu" and not multiplies(base.dtype):
        base.set_attn_implementation(NAME)  # the same rounding as in a packed row: a model's own is coarser
    reference = _Reference(body)
    # Recurrent blocks carry a short convolution over time, and both run across sequence boundaries.
    if any(isinstance(module, nn.Conv1d) for module in base.get_decoder().modules()):
        return "padded", "it has layers with recurrent state"
    reason = "it does not use transformers' AttentionInterface"
    if type(base)._can_set_attn_implementation():
        base.set_attn_implementation(NAME)
        reason = reference.mismatch(body, share_prompts=True)
        if reason is None:
            return "shared", None
        base.set_attn_implementation(stock)
    return "padded" if reference.mismatch(body, share_prompts=False) else "packed", reason


def _base_model(model: nn.Module) -> PreTrainedModel:
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"The adapter type {model.active_peft_config.peft_type.value} adds virtual tokens to every sequence, "
                "which packed batches have no place for: use LoRA."
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"Expected a transformers PreTrainedModel or a PeftModel, got {type(model).__name__}.")
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} is an encoder-decoder: only causal language models are supported.")
    return model


# Two groups of (prompt, completions); tokens count from the middle of the vocabulary, away from special tokens.
_PROBE = (
    ([0, 1, 2], [[3, 4, 5], [6, 7]]),
    ([8, 9], [[10], [11, 12, 13]]),
)
# The same with other tokens before the last of each prompt, to see how much the context matters to the model at hand.
_OTHER_CONTEXT = (
    ([14, 15, 2], [[3, 4, 5], [6, 7]]),
    ([16, 9], [[10], [11, 12, 13]]),
)


def _examples(body: PreTrainedModel, probe: tuple) -> list[dict]:
    vocabulary = body.get_input_embeddings().weight.shape[0]

    def tokens(offsets):
        return [(vocabulary // 3 + offset) % vocabulary for offset in offsets]

    return [{"prompt_ids": tokens(p), "completion_ids": [tokens(c) for c in completions]} for p, completions in probe]


@torch.no_grad()
def _hidden(body: PreTrainedModel, batch: PackedBatch, *, positions: bool = True) -> Tensor:
    batch = batch.to(body.get_input_embeddings().weight.device)
    inputs = batch.model_inputs() if positions else {"input_ids": batch.input_ids}
    with packed_attention(batch.layout):
        hidden = body(**inputs, use_cache=False)[0]
    return hidden.flatten(0, 1)[batch.score_index]  # (S, H)


def _alone(body: PreTrainedModel) -> Tensor:
    """Hidden states of the probe (S, H), each sequence in a row of its own, its positions left to the model."""
    rows = [
        {"prompt_ids": example["prompt_ids"], "completion_ids": [completion]}
        for example in _examples(body, _PROBE)
        for completion in example["completion_ids"]
    ]
    return torch.cat([_hidden(body, pack([row]), positions=False) for row in rows])


class _Reference:
    """Hidden states of the probe from padded rows, as a rule by the model's own attention, and what counts as equal."""

    def __init__(self, body: PreTrainedModel):
        batch = pad(_examples(body, _PROBE), pad_token_id=0)
        self.hidden = _hidden(body, batch)
        others = _hidden(body, pad(_examples(body, _OTHER_CONTEXT), pad_token_id=0))
        # Measured as a share of what another context changes: one token too many, or a wrong position, makes 0.1 to 2.
        # Rounding by the same attention stays under 5e-6 in float32 and 1.3 eps in bfloat16 over 30 layers; two kinds
        # of attention, which round differently at every layer, are 9 eps apart there.
        context, eps = _distance(self.hidden, others).mean(), torch.finfo(others.dtype).eps
        self.same, self.close = (max(1e-4, share * eps) * context for share in (4, 16))
        before_first, before_second = self.hidden[batch.cu_seqlens[:2]]
        if _distance(before_first, before_second) > self.same:
            raise ModelError(
                f"{type(body).__name__} is not causal (a token's hidden state depends on later tokens): "
                "only causal language models are supported."
            )

    def mismatch(self, body: PreTrainedModel, *, share_prompts: bool) -> str | None:
        """Why a packed row, by the attention the model has now, gives other hidden states, or None if it does not."""
        try:
            alone = _alone(body)
            packed = _hidden(body, pack(_examples(body, _PROBE), share_prompts=share_prompts))
        # Whatever stops a model's own code from taking packed input is a reason to lay it out otherwise.
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if not (_distance(alone, self.hidden) <= self.close).all():
            return "its hidden states by fastalign's attention differ from those by its own"
        if not (_distance(packed, alone) <= self.same).all():
            return "its hidden states in a packed row differ from those of separate rows"
        return None


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).double().norm(dim=-1)
