"""MLP layers computed over some tokens at a time, so that a layer keeps its input for the backward pass and no more.

An MLP works on each token by itself. Its inner vectors, three of size I per token, are most of what a training step
keeps: 4608 of 8448 numbers per token and layer of SmolLM2-135M. Here each tile of tokens is checkpointed: the backward
pass computes its inner vectors again (Chen et al. 2016, arXiv:1604.06174; over the sequence in tiles as in ALST,
arXiv:2506.13996). That costs one more forward pass of the MLPs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastalign.errors import ModelError

_NAMES = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def tile_mlps(model: nn.Module, tokens: int | None) -> None:
    """Lets the MLPs of a model compute so many tokens at a time; the model is changed in place.

    Results are the same up to rounding, since a product may add up its terms in another order for fewer rows.

    Args:
        model: a model that `prepare` has prepared, since that replaces the forward methods of MLPs too.
        tokens: of a tile; None takes an earlier tiling off.

    Raises:
        ModelError: the model has no MLP with gate, up and down projections.
    """
    mlps: list[Any] = [m for m in model.modules() if any(names <= set(m._modules) for names in _NAMES)]
    for mlp in mlps:
        if isinstance(mlp.forward, _Tiled):
            mlp.forward = mlp.forward.inner
        if tokens is not None:
            mlp.forward = _Tiled(mlp.forward, tokens)
    if tokens is not None and not mlps:
        raise ModelError(
            f"mlp_tile is {tokens}, but {type(model).__name__} has no MLP with gate_proj, up_proj and down_proj: leave "
            "mlp_tile out."
        )


class _Tiled:
    """The forward of an MLP in tiles of tokens. It is no function, so that a tiling can be recognised and taken off."""

    def __init__(self, inner: Callable[[Tensor], Tensor], tokens: int):
        self.inner, self.tokens = inner, tokens

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (T, H)
        if torch.is_grad_enabled() and rows.shape[0]:
            parts = [checkpoint(self.inner, part, use_reentrant=False) for part in rows.split(self.tokens)]
        else:  # the inner vectors of all tokens would be the peak of a forward pass
            parts = [self.inner(part) for part in rows.split(self.tokens)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)  # (T, H)
        return out.view(*x.shape[:-1], out.shape[-1])
