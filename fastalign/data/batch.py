"""One micro-batch as the trainer sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fastalign.data.packing import PackedBatch


@dataclass
class Batch:
    """One micro-batch as the collator makes it."""

    packed: PackedBatch
    ref_logprobs: Tensor | None = None  # (S,) of the completions' tokens
    desirable: Tensor | None = None  # (B,) bool, unpaired rows
    prompt_tokens: int = 0  # the last so many of `packed.targets` are tokens of prompts, behind cu_seqlens[-1]
    rows: list[dict] | None = None  # what was laid out
    sampled: bool = False  # the completions are the model's own, not the data set's

    def to(self, device, non_blocking: bool = False) -> Batch:
        del non_blocking  # PackedBatch.to does not block either way
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")})
