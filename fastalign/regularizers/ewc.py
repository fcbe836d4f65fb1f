"""EWC and L2-SP: quadratic penalties on the distance of the weights from where training started."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastalign.errors import ConfigError, ModelError
from fastalign.fisher.storage import Fisher
from fastalign.models.adapters import plain_name
from fastalign.ops.ewc import ewc_penalty, lora_ewc_penalty
from fastalign.regularizers.base import Term, check_positive, once_a_step


@dataclass
class EWC:
    """`strength / 2 * sum F (theta - theta_start)^2` over what is trained, adapters by the weight they merge to.

    fisher: how much each weight matters to what must be kept, by parameter name (`fastalign.fisher.fisher_diagonal` of
        the model without adapters), or the safetensors file of it; several, oldest first, are added up with weights 1,
        decay, decay^2, ... from the newest back (online EWC, Schwarz et al. 2018, arXiv:1805.06370).

    Kirkpatrick et al. 2017, arXiv:1612.00796.
    """

    fisher: str | list[str] | Mapping[str, Tensor] | list[Mapping[str, Tensor]] = field(metadata={"path": True})
    strength: float
    decay: float = 1.0

    def start(self, trainer) -> Term:
        check_positive("EWC", strength=self.strength, decay=self.decay)
        if self.decay > 1:
            raise ConfigError(f"decay of EWC is {self.decay}; it must be at most 1, which forgets nothing")
        return once_a_step("ewc", distance_penalty(trainer, self._fishers(), self.strength))

    def _fishers(self) -> Fisher:
        several = self.fisher if isinstance(self.fisher, list) else [self.fisher]
        if not several:
            raise ConfigError("fisher of EWC is an empty list; give one file of Fisher information or more")
        read = [Fisher.load(fisher) if isinstance(fisher, (str, Path)) else Fisher(fisher) for fisher in several]
        return functools.reduce(lambda older, newer: older.merged(newer, self.decay), read)


@dataclass
class L2SP:
    """`strength / 2 * sum (theta - theta_start)^2` over what is trained, adapters by the weight they merge to.

    Li et al. 2018, arXiv:1802.01483.
    """

    strength: float

    def start(self, trainer) -> Term:
        check_positive("L2SP", strength=self.strength)
        return once_a_step("l2_sp", distance_penalty(trainer, None, self.strength))


class _Adapter(NamedTuple):
    """A LoRA layer: its factors, theirs at the start (None: 0, as of a new one), whether its weight lies transposed."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    start_a: Tensor
    start_b: Tensor | None
    scaling: float
    transposed: bool


def distance_penalty(trainer, fishers: Mapping[str, Tensor] | None, strength: float) -> Callable[[], Tensor]:
    """A function for `strength / 2 * sum F (theta - theta_start)^2`, F by name of the parameter, or 1.

    An adapter counts by its merged weight, `s (B A - B_start A_start)`, with the F of the weight it is on.
    """
    start = trainer.keep_start()
    then = {id(p): value for p, value in zip(start.parameters, start.values, strict=True)}
    adapters, factors = _adapters(trainer.model, then)
    others = {
        plain_name(name): p for name, p in trainer.model.named_parameters() if id(p) in then and id(p) not in factors
    }
    if fishers is not None:
        fishers = {plain_name(name): fisher for name, fisher in fishers.items()}
        shapes = {name: tuple(p.shape) for name, p in others.items()}
        for name, adapter in adapters.items():
            shape = (adapter.b.shape[0], adapter.a.shape[1])
            shapes[name] = shape[::-1] if adapter.transposed else shape
        _check_names(fishers, trainer.model, shapes)
        fishers = {name: fishers[name].to(start.parameters[0].device) for name in shapes}

    def penalty() -> Tensor:
        trained = {name: p for name, p in others.items() if p.requires_grad}  # the rest has not moved
        total = torch.zeros((), device=start.parameters[0].device)
        if trained:
            weights = None if fishers is None else [fishers[name] for name in trained]
            anchors = [then[id(p)] for p in trained.values()]
            total = total + ewc_penalty(list(trained.values()), anchors, weights, strength)
        for name, adapter in adapters.items():
            if adapter.a.requires_grad or adapter.b.requires_grad:
                total = total + _adapter_penalty(adapter, None if fishers is None else fishers[name], strength)
        return total

    return penalty


def _adapter_penalty(adapter: _Adapter, fisher: Tensor | None, strength: float) -> Tensor:
    if fisher is not None and adapter.transposed:
        fisher = fisher.T
    a, b = adapter.a, adapter.b
    if adapter.start_b is not None:  # s (B A - B0 A0) is an adapter of twice the rank
        a, b = torch.cat([a, adapter.start_a]), torch.cat([b, -adapter.start_b], dim=1)
    return lora_ewc_penalty(a, b, adapter.scaling, fisher, strength)


def _adapters(model: nn.Module, then: Mapping[int, Tensor]) -> tuple[dict[str, _Adapter], set[int]]:
    """The LoRA layers by name of the weight they are on, and the ids of their factors."""
    found, factors = {}, set()
    for name, layer in model.named_modules():
        for adapter in getattr(layer, "lora_A", None) or ():
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if id(a) not in then and id(b) not in then:
                continue
            start_a, start_b = (then.get(id(p), p) for p in (a, b))
            start_b = start_b if start_b.any() else None  # looked at once: on a GPU it has to be waited for
            transposed = getattr(layer, "fan_in_fan_out", False)
            found[plain_name(f"{name}.weight")] = _Adapter(a, b, start_a, start_b, layer.scaling[adapter], transposed)
            factors |= {id(a), id(b)}
    return found, factors


def _check_names(fishers: Mapping[str, Tensor], model: nn.Module, trained: Mapping[str, tuple]) -> None:
    known = {plain_name(name) for name, _ in model.named_parameters()}
    again = "compute it again, for this model without adapters (fastalign fisher)"
    if gone := [name for name in fishers if name not in known]:
        raise ModelError(
            f"The Fisher information holds {len(gone)} parameters that the model does not have ({gone[0]}, ...): "
            f"{again}."
        )
    if missing := [name for name in trained if name not in fishers]:
        raise ModelError(
            f"The Fisher information lacks {len(missing)} of the {len(trained)} weights that are trained "
            f"({missing[0]}, ...): {again}."
        )
    for name, shape in trained.items():
        if tuple(fishers[name].shape) != shape:
            raise ModelError(
                f"The Fisher information of {name} is {tuple(fishers[name].shape)}, the weight {shape}: {again}."
            )
