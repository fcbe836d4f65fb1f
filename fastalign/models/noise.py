"""NEFTune: noise on the embeddings while training, scaled by each row's own length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastalign.data.packing import PackedBatch


def row_lengths(batch: PackedBatch) -> Tensor:
    """How long the row of each token is, by itself: a prompt and one completion.

    In a packed row several of them lie one after another, and a prompt may serve several completions. It counts with
    the longest of these.

    Returns:
        float32, of the shape of `batch.input_ids`; at least 1.
    """
    if batch.layout is None:
        mask: Any = batch.attention_mask  # padded rows have one
        return mask.sum(1, keepdim=True).expand_as(mask).clamp(min=1).float()
    lengths = torch.ones(batch.input_ids.shape, dtype=torch.float32)
    for (start, stop), completions in batch.layout:
        own = [stop - start + end - begin for begin, end in completions]
        lengths[0, start:stop] = max(own, default=stop - start)
        for (begin, end), length in zip(completions, own, strict=True):
            lengths[0, begin:end] = length
    return lengths.to(batch.input_ids.device)


@contextlib.contextmanager
def noisy_embeddings(model: Any, batch: PackedBatch, alpha: float | None) -> Iterator[None]:
    """Adds noise from the uniform distribution over [-m, m] to the embeddings, with m = alpha / sqrt(length * width).

    transformers' own hook takes the length of the tensor for that of the row. A packed row holds many rows, so its
    noise would be weaker, the more of them a batch has.

    Args:
        model: The transformers model. Nothing is added while it is in eval mode.
        batch: What it is called with.
        alpha: The strength; None or 0: no noise.

    References:
        Jain et al. 2023, arXiv:2310.05914.
    """
    if not alpha or not model.training:
        yield
        return
    lengths = row_lengths(batch).unsqueeze(-1)  # (R, L, 1)

    def add_noise(module: object, inputs: object, output: Tensor) -> Tensor:
        size = alpha / (lengths * output.shape[-1]).sqrt()
        return output + (torch.rand_like(output) * 2 - 1) * size.to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
