"""The weights of a model at one moment: a copy of what is trained, and a fingerprint of everything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastalign.data.keys import KEY_BYTES
from fastalign.models.adapters import adapter_settings, changes_nothing, is_adapter_name, plain_name

_FORMAT = "1"  # part of every key: a change of what is stored makes old files unread


class ReferenceWeights:
    """A copy of a model's trainable weights, to be put in place while the reference is asked."""

    def __init__(self, model: nn.Module):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference's weights inside; use it under `torch.no_grad`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.values[i] = self.values[i], parameter.data

    def move_towards_model(self, share: float) -> None:
        """`reference = share * model + (1 - share) * reference` (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656)."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            value.lerp_(parameter.data, share)


def fingerprint(model: nn.Module, precision: str = "") -> str:
    """A hash of everything that the model computes with: configuration, weights, and the precision of its products.

    Fresh LoRA adapters (B = 0) change nothing and are left out: their random A differs from run to run.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    settings = adapter_settings(model)
    if changes_nothing(state):
        state = {name: value for name, value in state.items() if not is_adapter_name(name)}
        settings = []
    config = model.config.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"):
        config.pop(name, None)
    heading = f"{_FORMAT} {precision} {sorted(config.items(), key=str)} {settings}"
    digest = hashlib.blake2b(heading.encode(), digest_size=KEY_BYTES)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        # By plain names, so that a model has one fingerprint with and without a new adapter around it.
        digest.update(f"{plain_name(name)} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
