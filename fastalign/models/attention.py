"""Attention over packed rows on unmodified transformers models: every completion sees its prompt and itself.

A packed row holds groups, `prompt | completion 0 | completion 1 | ...`. The prompt is computed once, and all its
completions attend to it:

    queries          keys that they see
    prompt           prompt, causally
    completion 0     prompt, completion 0 causally
    completion 1     prompt, completion 1 causally        (not completion 0, which lies between them)

So a row consists of *segments*. A segment is a run of queries that sees `[prefix |] itself`. A group's prompt and first
completion together are one plainly causal segment. Each further completion is a segment with the prompt as its prefix.

transformers lets a model's attention function and mask function be exchanged by name. Under the name "fastalign" the
mask function returns a `PackedMask` instead of a mask tensor. It reaches every layer as its `attention_mask`, and the
attention function there runs one call for all segments (`attention_gpu` on a GPU, `fastalign.ops.segment_attention` on
a CPU), or one call per segment where the model needs something that those do not compute. Because the layout is an
argument of the layer, gradient checkpointing passes it to the layer again when it recomputes it.

Without a layout both functions do what transformers' "sdpa" does, so a prepared model generates as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, wraps
from inspect import signature
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropout_
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastalign.data.segments import Group, Segment, Varlen, gathered_keys, segments_of
from fastalign.errors import ModelError
from fastalign.models import attention_gpu
from fastalign.models.linear import has_native_matmul
from fastalign.ops.segment_attention import beats_sdpa, segment_attention

NAME = "fastalign"

logger = logging.getLogger("fastalign")


class PackedMask:
    """What the layers of a model get as `attention_mask` while a layout is active: segments and their masks.

    Args:
        layout: the groups of the row, see `fastalign.data.packing.PackedBatch`.
        window: how many keys a query sees at most, itself included; None for all.
        keys: the layout's index tensors on the device of the row, if they are made already.
    """

    def __init__(self, layout: tuple[Group, ...], window: int | None, keys: Varlen | None = None):
        self.window = window
        self.segments = segments_of(layout)
        self.length = sum(segment.length for segment in self.segments)
        self._masks: dict[torch.device, list[Tensor | None]] = {}
        self._keys = keys

    @cached_property
    def table(self) -> Tensor:
        """(segments, 4) int64 on the CPU, as `segment_attention` takes it."""
        starts = [0, *accumulate(segment.length for segment in self.segments)]
        rows = [(starts[i], s.length, starts[s.source], s.prefix) for i, s in enumerate(self.segments)]
        return torch.tensor(rows, device="cpu")

    def masks(self, device: torch.device) -> list[Tensor | None]:
        """Per segment a boolean mask (queries, keys), True = visible; None where plain causal attention is enough."""
        if device not in self._masks:
            self._masks[device] = [_segment_mask(segment, self.window, device) for segment in self.segments]
        return self._masks[device]

    def varlen(self, device: torch.device) -> Varlen:
        """The segments as the GPU kernels take them, which compute all of them in one call."""
        if self._keys is None or self._keys.indices.device != device:
            self._keys = gathered_keys(self.segments).to(device)
        return self._keys


def _segment_mask(segment: Segment, window: int | None, device: torch.device) -> Tensor | None:
    """(queries, keys): causal against the last key, so that every query sees the whole prefix, unless a window ends."""
    keys = segment.prefix + segment.length
    if segment.prefix == 0 and (window is None or window >= keys):
        return None
    mask = torch.ones(segment.length, keys, dtype=torch.bool, device=device).tril(segment.prefix)
    return mask if window is None else mask.triu(segment.prefix - window + 1)


# The layout of the row that the model is called with, and its `PackedBatch.keys`.
_layout: ContextVar[tuple[tuple[Group, ...], Varlen | None] | None] = ContextVar("layout", default=None)


@contextmanager
def packed_attention(layout: tuple[Group, ...] | None, keys: Varlen | None = None) -> Iterator[None]:
    """A context in which the forward of a prepared model attends by `layout`; None leaves attention as it is.

    `keys` are the layout's index tensors, `PackedBatch.keys`. Without them a GPU's attention makes them.

    Only the forward needs the context, not the backward pass: gradient checkpointing recomputes a layer from its
    arguments, and the layout is one of them. Call the model with `use_cache=False`.
    """
    token = _layout.set(None if layout is None else (layout, keys))
    try:
        yield
    finally:
        _layout.reset(token)


def _mask_function(*, local_size: int | None = None, config=None, use_vmap: bool = False, **kwargs):
    """Stands for transformers' mask function. It returns a `PackedMask`, or refuses a rule that segments cannot have.

    transformers calls it once per kind of attention (full, sliding window), with `local_size` the window.
    """
    active = _layout.get()
    if active is None:
        return sdpa_mask(local_size=local_size, config=config, use_vmap=use_vmap, **kwargs)
    if "allow_is_bidirectional_skip" in kwargs:
        raise ModelError("A layer needs non-causal attention, which cannot be packed: use padded batches.")
    if use_vmap:
        raise ModelError("The model adds a rule to the attention mask, which cannot be packed: use padded batches.")
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise ModelError("The model attends in chunks, which cannot be packed: use padded batches.")
    layout, varlen = active
    mask = PackedMask(layout, local_size, varlen)
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


class AttentionOptions(NamedTuple):
    """What attention depends on besides queries, keys, values and the mask."""

    dropout: float  # probability that an attention weight is dropped
    scaling: float  # factor of the scores
    softcap: float | None  # bound of the scores' absolute value
    sinks: Tensor | None  # (heads,), a further logit per head whose probability attends to nothing (gpt-oss)


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
    """Stands for transformers' attention function, with and without a layout."""
    options = AttentionOptions(dropout, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if isinstance(attention_mask, PackedMask):
        for name in ("position_bias", "head_mask", "cache"):
            if kwargs.get(name) is not None:
                raise ModelError(
                    f"The model passes {name!r} to its attention, which cannot be packed: use padded batches."
                )
        return _packed_attention(query, key, value, attention_mask, options), None
    if not query.is_cuda and not has_native_matmul(dtype := query.dtype):
        # The CPU has no instructions for products of this dtype: float32 is faster, and rounds less.
        query, key, value = query.float(), key.float(), value.float()
        with torch.autocast("cpu", enabled=False):
            output, _ = _attention_function(
                module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, **kwargs
            )
        return output.to(dtype), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return explicit_attention(query, key, value, attention_mask, options).transpose(1, 2).contiguous(), None


def _packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedMask, options: AttentionOptions
) -> Tensor:
    """Attention over a packed row by the fastest way that computes what the model needs; (1, T, heads, Dv)."""
    if name := attention_gpu.kernel(query, value, options.dropout, options.softcap, options.sinks):
        return attention_gpu.attend(
            name, query, key, value, packed.varlen(query.device), window=packed.window, dropout=options.dropout,
            scaling=options.scaling, softcap=options.softcap,
        )  # fmt: skip
    plain = options.softcap is None and options.sinks is None
    if plain and not options.dropout and query.device.type == "cpu":
        if torch.is_autocast_enabled("cpu") and query.dtype != torch.float64:
            query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
        if beats_sdpa(query, key, value):
            return segment_attention(query, key, value, packed.table, packed.window, options.scaling)
    attend = _sdpa if plain else explicit_attention
    if not query.is_cuda and not has_native_matmul(dtype := query.dtype):
        query, key, value = query.float(), key.float(), value.float()
        with torch.autocast("cpu", enabled=False):
            return _by_segments(attend, query, key, value, packed, options).to(dtype)
    return _by_segments(attend, query, key, value, packed, options)


def _by_segments(attend: Callable, query, key, value, packed: PackedMask, options: AttentionOptions) -> Tensor:
    """One call of `attend` per segment, over copies of the prompt's keys and values; (1, T, heads, Dv)."""
    sizes = [segment.length for segment in packed.segments]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    outputs = []
    for i, (segment, mask) in enumerate(zip(packed.segments, packed.masks(query.device), strict=True)):
        k, v = keys[i], values[i]
        if segment.prefix:
            k, v = (torch.cat([x[segment.source][:, :, : segment.prefix], x[i]], dim=2) for x in (keys, values))
        outputs.append(attend(queries[i], k, v, mask, options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    """Attention over one segment by torch's `scaled_dot_product_attention`; no mask means causal."""
    groups = query.shape[1] // key.shape[1]
    # The CPU kernel reads grouped keys in place; the CUDA kernels that take a mask do not.
    if groups > 1 and query.is_cuda and mask is not None:
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    return scaled_dot_product_attention(
        query, key, value, mask, options.dropout, is_causal=mask is None, scale=options.scaling, enable_gqa=groups > 1
    )


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attention with a soft cap and sinks, written out: softmax(softcap * tanh(scaling q k' / softcap)) v.

    Args:
        query: (B, heads, Tq, D).
        key: (B, kv_heads, Tk, D).
        value: (B, kv_heads, Tk, Dv).
        mask: boolean (Tq, Tk) or (B, 1 or heads, Tq, Tk), True = visible; None means causal.
        options: dropout, scaling, soft cap, and the sinks, which enter the softmax as one more logit per head.

    Returns:
        (B, heads, Tq, Dv).
    """
    kv_heads = key.shape[1]
    query = query.unflatten(1, (kv_heads, -1))  # (B, kv_heads, heads / kv_heads, Tq, D)
    scores = query @ key.unsqueeze(2).transpose(-1, -2) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        mask = mask.tril() if mask.shape[0] > 1 else mask
    mask = mask.unsqueeze(2) if mask.dim() == 4 else mask
    # The smallest finite number and not -inf: a row of padding may see no key at all, and would become NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype).view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    probs = dropout_(probs[..., : key.shape[2]], options.dropout)
    return (probs @ value.unsqueeze(2)).flatten(1, 2)


def _without_search(prepare: Callable) -> Callable:
    """Transformers' preparation of a mask, which does not search the position ids while this attention has a layout.

    The search is for packed sequences, and its answer is read on the host: on a GPU every forward would wait for
    everything before it. The layout knows the sequences, and `_mask_function` never uses the answer. Models that cannot
    have this attention need the answer, and get it.
    """
    parameters = signature(prepare)

    @wraps(prepare)
    def prepare_mask(*args, **kwargs):
        given = parameters.bind(*args, **kwargs).arguments
        if _layout.get() is not None and given["config"]._attn_implementation == NAME:
            given["position_ids"] = None
        return prepare(**given)

    return prepare_mask


# transformers has no public way to leave the search out. Every mask of a model is prepared by this function.
masking_utils._preprocess_mask_arguments = _without_search(masking_utils._preprocess_mask_arguments)

AttentionInterface.register(NAME, _attention_function)


AttentionMaskInterface.register(NAME, _mask_function)
