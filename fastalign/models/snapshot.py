"""A model's weights at one moment: a copy of those that are trained, and a fingerprint of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.data.keys import KEY_BYTES
from fastalign.models.adapters import adapter_settings, changes_nothing, is_adapter_name, plain_name
from fastalign.models.sharding import free_gathered, own_part, sharded_like, swap_parts

_FORMAT = "1"  # Part of every fingerprint. Raise it when the content of cached files changes: old ones are not read.


class ReferenceWeights:
    """A copy of a model's trainable weights, to compute with while they train on. Frozen weights are not copied.

    Attributes:
        parameters: the model's trainable parameters.
        values: the copies, in the same order.
    """

    def __init__(self, model: nn.Module):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.values = [p.detach().clone() for p in self.parameters]
        self._sharded: nn.Module | None = None

    def shard(self, model: nn.Module) -> None:
        """Follows the model after FSDP2 has replaced its parameters by sharded ones. The copies are sharded likewise.

        Args:
            model: The same model, whose parameters have the names that they had.
        """
        # The checkpointing of layers, where FSDP does it, adds a wrapper to their names.
        parameters = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
        self.parameters = [parameters[name] for name in self.names]
        self.values = [sharded_like(v, p) for v, p in zip(self.values, self.parameters, strict=True)]
        self._sharded = model

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model computes with the copied weights. Use it under `torch.no_grad`.

        Model and copy exchange their storage, so nothing is copied, and they exchange it back after an error as well.
        Sharded ones exchange their content, because FSDP holds on to the storage.
        """
        with free_gathered(self._sharded) if self._sharded is not None else nullcontext():
            self._swap()
            try:
                yield
            finally:
                self._swap()

    def _swap(self) -> None:
        if self._sharded is not None:
            for parameter, value in zip(self.parameters, self.values, strict=True):
                swap_parts(parameter, value)
            return
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.values[i] = self.values[i], parameter.data

    def move_towards_model(self, share: float) -> None:
        """Sets `reference = share * model + (1 - share) * reference`.

        References:
            TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656.
        """
        for parameter, value in zip(self.parameters, self.values, strict=True):
            own_part(value).lerp_(own_part(parameter.data), share)


def fingerprint(model: Any, precision: str = "") -> str:
    """A hash of everything that decides the model's outputs: configuration, weights, and the precision of products.

    New LoRA adapters (B = 0) change no output and are left out: their random A differs from run to run. So a model has
    the same fingerprint with and without a new adapter.

    Args:
        model: a transformers model or a PeftModel around one.
        precision: what products are rounded to, for example autocast's dtype. It becomes part of the hash.

    Returns:
        A hexadecimal string.
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
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
