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
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropout_
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastalign.data.packing import Group
from fastalign.errors import ModelError
from fastalign.models import attention_gpu
from fastalign.models.attention_gpu import Segment
from fastalign.models.linear import has_native_matmul
from fastalign.ops.segment_attention import beats_sdpa, segment_attention

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
        self.table = torch.tensor(table, device="cpu")  # as `segment_attention` takes them
        self._masks: dict[torch.device, list[Tensor | None]] = {}
        self._varlen: dict[torch.device, attention_gpu.Varlen] = {}

    def masks(self, device: torch.device) -> list[Tensor | None]:
        """One boolean (queries, keys) mask per segment, True = visible; None where plain causal attention will do."""
        if device not in self._masks:
            self._masks[device] = [_segment_mask(segment, self.window, device) for segment in self.segments]
        return self._masks[device]

    def varlen(self, device: torch.device) -> attention_gpu.Varlen:
        """The same for a kernel that takes segments of any length."""
        if device not in self._varlen:
            self._varlen[device] = attention_gpu.lay_out(self.segments, device)
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
    if not query.is_cuda and not has_native_matmul(dtype := query.dtype):
        wide = (t.float() for t in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            output, _ = _attention_function(module, *wide, attention_mask, dropout, scaling, softcap, s_aux, **kwargs)
        return output.to(dtype), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return explicit_attention(query, key, value, attention_mask, options).transpose(1, 2).contiguous(), None


def _packed_attention(query: Tensor, key: Tensor, value: Tensor, packed: PackedMask, options: Options) -> Tensor:
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


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> Tensor:
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
