"""EWC and L2-SP: quadratic penalties on the distance of the weights from where training started."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.errors import ConfigError, ModelError
from fastalign.fisher.storage import Fisher
from fastalign.models.adapters import Lora, lora_layers, plain_name
from fastalign.models.quantization import quantized_layers
from fastalign.ops.ewc import ewc_penalty, lora_ewc_penalty
from fastalign.options import help_field
from fastalign.regularizers.base import Term, check_positive, once_a_step


@dataclass
class EWC:
    """Elastic weight consolidation: adds `strength / 2 * sum F (theta - theta_start)^2` over the trained parameters.

    Adapters count by the weight that they merge to.

    Args:
        fisher: F, how much each weight matters to the ability that must not be lost: a mapping from parameter names to
            tensors of their shapes (`fastalign.fisher_diagonal` of the model without adapters), or its safetensors
            file. Or a list of several, oldest first. They are added up with factors 1, decay, decay^2, ... from the
            newest to the oldest (online EWC, Schwarz et al. 2018, arXiv:1805.06370).
        strength: factor of the penalty, above 0.
        decay: above 0 and at most 1; see `fisher`.

    Raises:
        ConfigError: an option has a wrong value.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796.
    """

    fisher: str | list[str] | Mapping[str, Tensor] | list[Mapping[str, Tensor]] = field(
        metadata={"path": True, "help": "Safetensors file of Fisher information, or several of them, oldest first."}
    )
    strength: float = field(metadata={"help": "Factor of the penalty."})
    decay: float = help_field(1.0, "Factor of older Fisher information for each newer one.")

    def __post_init__(self):
        check_positive("EWC", strength=self.strength, decay=self.decay)
        if self.decay > 1:
            raise ConfigError(f"decay of EWC is {self.decay}; it must be at most 1, which forgets nothing")

    def start(self, trainer: Any) -> Term:
        """The term for a trainer, whose model has the weights that training starts from.

        Raises:
            ConfigError: an option has a wrong value.
            DataError: a file of Fisher information is missing or damaged.
            ModelError: the Fisher information is of another model.
        """
        return once_a_step("ewc", distance_penalty(trainer, self._fishers(), self.strength))

    def _fishers(self) -> Fisher:
        """All Fisher information, added up."""
        several = self.fisher if isinstance(self.fisher, list) else [self.fisher]
        if not several:
            raise ConfigError("fisher of EWC is an empty list; give one file of Fisher information or more")
        fishers = [Fisher.load(fisher) if isinstance(fisher, (str, Path)) else Fisher(fisher) for fisher in several]
        return functools.reduce(lambda older, newer: older.merged(newer, self.decay), fishers)


@dataclass
class L2SP:
    """Adds `strength / 2 * sum (theta - theta_start)^2` over the trained parameters.

    Adapters count by the weight that they merge to.

    Args:
        strength: factor of the penalty, above 0.

    Raises:
        ConfigError: an option has a wrong value.

    References:
        Li et al. 2018, arXiv:1802.01483.
    """

    strength: float = field(metadata={"help": "Factor of the penalty."})

    def __post_init__(self):
        check_positive("L2SP", strength=self.strength)

    def start(self, trainer: Any) -> Term:
        """The term for a trainer, whose model has the weights that training starts from."""
        return once_a_step("l2_sp", distance_penalty(trainer, None, self.strength))


def distance_penalty(trainer: Any, fishers: Mapping[str, Tensor] | None, strength: float) -> Callable[[], Tensor]:
    """A function that returns `strength / 2 * sum F (theta - theta_start)^2`, a scalar with a gradient.

    An adapter counts by how far its merged weight has moved, `s (B A - B_start A_start)`, with the F of the weight that
    it is on: neither A nor B alone says how the layer's output changed.

    Args:
        trainer: its model still has the weights that training starts from.
        fishers: F by parameter name; None is F = 1 everywhere.
        strength: factor of the penalty.

    Raises:
        ModelError: F lacks a trained weight, has another shape, or holds parameters that the model does not have.
    """
    start = trainer.keep_start()
    start_values = {id(p): value for p, value in zip(start.parameters, start.values, strict=True)}
    adapters, factors = _trained_adapters(trainer.model, start_values)
    others = {
        plain_name(name): p
        for name, p in trainer.model.named_parameters()
        if id(p) in start_values and id(p) not in factors
    }
    if fishers is not None:
        fishers = {plain_name(name): fisher for name, fisher in fishers.items()}
        shapes = {name: tuple(p.shape) for name, p in others.items()}
        for name, adapter in adapters.items():
            shape = (adapter.lora.b.shape[0], adapter.lora.a.shape[1])  # (out, in)
            shapes[name] = shape[::-1] if adapter.lora.is_transposed else shape
        _check_names(fishers, trainer.model, shapes)
        fishers = {name: fishers[name].to(start.parameters[0].device) for name in shapes}

    def penalty() -> Tensor:
        trained = {name: p for name, p in others.items() if p.requires_grad}  # what is frozen by now has not moved
        total = torch.zeros((), device=start.parameters[0].device)
        if trained:
            weights = None if fishers is None else [fishers[name] for name in trained]
            anchors = [start_values[id(p)] for p in trained.values()]
            total = total + ewc_penalty(list(trained.values()), anchors, weights, strength)
        for name, adapter in adapters.items():
            if adapter.lora.a.requires_grad or adapter.lora.b.requires_grad:
                total = total + _adapter_penalty(adapter, None if fishers is None else fishers[name], strength)
        return total

    return penalty


class _TrainedAdapter(NamedTuple):
    """A LoRA adapter, and its factors when training started."""

    lora: Lora
    start_a: Tensor  # (r, in)
    start_b: Tensor | None  # (out, r); None where it was 0, as in a new adapter


def _adapter_penalty(adapter: _TrainedAdapter, fisher: Tensor | None, strength: float) -> Tensor:
    lora = adapter.lora
    if fisher is not None and lora.is_transposed:
        fisher = fisher.T  # to (out, in)
    a, b = lora.a, lora.b
    if adapter.start_b is not None:
        # s (B A - B0 A0) is one adapter of twice the rank, so it never has to be formed: [B, -B0] [A; A0].
        a, b = torch.cat([a, adapter.start_a]), torch.cat([b, -adapter.start_b], dim=1)
    return lora_ewc_penalty(a, b, lora.scaling, fisher, strength)


def _trained_adapters(
    model: nn.Module, start_values: Mapping[int, Tensor]
) -> tuple[dict[str, _TrainedAdapter], set[int]]:
    """The LoRA adapters that are trained, by the plain name of the weight they are on, and the ids of their factors."""
    trained, factors = {}, set()
    for name, lora in lora_layers(model):
        if id(lora.a) not in start_values and id(lora.b) not in start_values:
            continue
        start_a, start_b = (start_values.get(id(p), p) for p in (lora.a, lora.b))
        # Looked at once and not at every step: on a GPU the answer has to be waited for.
        trained[name] = _TrainedAdapter(lora, start_a, start_b if start_b.any() else None)
        factors |= {id(lora.a), id(lora.b)}
    return trained, factors


def _check_names(fishers: Mapping[str, Tensor], model: nn.Module, trained: Mapping[str, tuple]) -> None:
    """ModelError unless F names parameters of the model only, and has every trained weight in its shape."""
    known = {plain_name(name) for name, _ in model.named_parameters()}
    which = "the unquantised model" if quantized_layers(model) else "this model"
    again = f"compute it again, for {which} without adapters (fastalign fisher)"
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
