"""Layer-wise tuning: stages that unfreeze the model from the top down, and a learning rate per layer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from fastalign.errors import ConfigError, ModelError
from fastalign.models.adapters import causal_lm
from fastalign.objectives.base import Metrics
from fastalign.options import help_field
from fastalign.regularizers.base import Step, Term, check_positive, number_on


@dataclass
class LayerWise:
    """Trains the top layers first and unfreezes lower ones stage by stage, each layer with its own learning rate.

    What is above the layers (the last norm, an output layer that is not tied to the embeddings) is trained throughout.
    Frozen layers cost neither gradients nor their memory: there is no graph below the lowest layer that is trained. An
    adapter is treated like the layer that it is on.

    Args:
        stages: number of layers trained in each stage, counted from the top and growing, for example [2, 8, 30]; or the
            number of stages, which then grow evenly to all layers.
        begins: where in the training each stage begins, from 0 to below 1, for example [0, 0.3, 0.6]; None for evenly.
        decay: the k-th layer from the top (k = 0, 1, ...) learns at `learning_rate * decay^k`; above 0.
        embeddings: whether the embeddings are trained in the last stage, if that trains all layers. An output layer
            tied to them is trained or frozen with them.

    Raises:
        ConfigError: an option has a wrong value.

    References:
        Howard & Ruder 2018, arXiv:1801.06146.
    """

    stages: int | list[int] = help_field(3, "Layers trained in each stage, from the top; or the number of stages.")
    begins: list[float] | None = help_field(None, "Where each stage begins, from 0 to below 1; none: evenly.")
    decay: float = help_field(1.0, "Factor of the learning rate from each layer to the one below it.")
    embeddings: bool = help_field(False, "Train the embeddings in the last stage.")

    def __post_init__(self):
        check_positive("LayerWise", decay=self.decay)

    def start(self, trainer: Any) -> Term:
        """Freezes the model for the first stage, sets the learning rates, and returns a term that shows the stage.

        Raises:
            ConfigError: an option has a wrong value, or `ddp_find_unused_parameters` is off with several processes.
            ModelError: the model has no list of layers, or a stage unfreezes nothing.
        """
        _let_ddp_skip_frozen(trainer.args)
        base = causal_lm(trainer.model)
        layers = _layers(base)
        stages, begins = self._stages(len(layers)), self._begins()
        levels = _levels(base, layers)
        if not self.embeddings or stages[-1] < len(layers):
            for parameter, level in levels:
                parameter.requires_grad_(level < stages[-1])
        levels = [(parameter, level) for parameter, level in levels if parameter.requires_grad]
        _check_stages(stages, {level for _, level in levels}, len(layers))
        trainer.rates.update({id(p): self.decay ** max(level, 0) for p, level in levels})
        freezer = _Freezer(levels, stages, begins, len(layers), base)
        trainer.add_callback(freezer)
        return freezer.term

    def _stages(self, layers: int) -> list[int]:
        """Layers trained in each stage, for a model of so many layers."""
        stages = self.stages
        if isinstance(stages, int) and not isinstance(stages, bool) and 0 < stages <= layers:
            return [round(layers * (i + 1) / stages) for i in range(stages)]
        numbers = stages if isinstance(stages, list) else []
        good = numbers and all(type(n) is int and 0 < n <= layers for n in numbers)
        if not good or any(a >= b for a, b in pairwise(numbers)):
            raise ConfigError(
                f"stages of LayerWise is {stages!r}; give numbers of layers that grow, from 1 to the model's {layers}, "
                "or the number of stages: each must unfreeze something"
            )
        return numbers

    def _begins(self) -> list[float]:
        """The share of the training after which each stage begins."""
        count = self.stages if isinstance(self.stages, int) else len(self.stages)
        if self.begins is None:
            return [i / count for i in range(count)]
        begins = self.begins
        if len(begins) != count or begins[0] != 0 or any(a >= b for a, b in pairwise(begins)) or begins[-1] >= 1:
            raise ConfigError(
                f"begins of LayerWise is {begins} for {count} stages; give one number each, from 0 up and below 1"
            )
        return begins


def _let_ddp_skip_frozen(args: Any) -> None:
    """With several processes, lets DDP go without the gradients of frozen layers, which it would wait for."""
    if args.world_size <= 1:
        return
    if args.ddp_find_unused_parameters is False:
        raise ConfigError(
            "ddp_find_unused_parameters is False, and LayerWise freezes layers whose gradients DDP would wait for: "
            "leave it out"
        )
    args.ddp_find_unused_parameters = True


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of transformer layers, from the bottom to the top."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(model).__name__} has no list of its {count} layers: LayerWise cannot tell top from bottom."
    )


def _levels(model: nn.Module, layers: nn.ModuleList) -> list[tuple[nn.Parameter, int]]:
    """Every trainable parameter with its level: the number of its layer from the top.

    The level is -1 above the layers, and the number of layers below them.
    """
    count = len(layers)
    inside = {id(p): count - 1 - i for i, layer in enumerate(layers) for p in layer.parameters()}
    # `parameters()` lists them in the order of the forward pass: what comes before the layers is below them.
    levels, outside = [], count
    for parameter in model.parameters():
        if id(parameter) in inside:
            outside = -1
        if parameter.requires_grad:
            levels.append((parameter, inside.get(id(parameter), outside)))
    return levels


def _reach(stage: int, count: int) -> int:
    """The level below which parameters are trained in a stage; a stage of all layers also trains what is below them."""
    return count + 1 if stage == count else stage


def _check_stages(stages: list[int], trainable: set[int], count: int) -> None:
    """ModelError if a stage adds no trainable parameter to the one before it."""
    for number, (before, stage) in enumerate(pairwise([0, *stages]), 1):
        above = _reach(before, count) if before else -1
        if not any(above <= level < _reach(stage, count) for level in trainable):
            raise ModelError(
                f"Stage {number} of {len(stages)} unfreezes nothing: none of layers {before + 1} to {stage} of "
                f"{count}, counted from the top, is trainable. Choose other stages, or put adapters there."
            )


class _Freezer(TrainerCallback):
    """Freezes and unfreezes parameters at the beginning of each step, and unfreezes all of them at the end."""

    def __init__(
        self, levels: list[tuple[nn.Parameter, int]], stages: list[int], begins: list[float], count: int,
        model: PreTrainedModel,
    ):  # fmt: skip
        self.levels, self.stages, self.begins, self.count, self.model = levels, stages, begins, count, model
        self.trained = stages[0]

    def on_train_begin(self, args, state, control, **kwargs):
        # With an adapter and gradient checkpointing, transformers makes the embeddings' output require gradients by a
        # hook. Without the hook the graph ends at the lowest trained layer.
        self.model.disable_input_require_grads()
        self.on_step_begin(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        done = state.global_step / max(1, state.max_steps)
        stage = sum(begin <= done for begin in self.begins) - 1
        self.trained = self.stages[stage]
        for parameter, level in self.levels:
            parameter.requires_grad_(level < _reach(self.trained, self.count))

    def on_train_end(self, args, state, control, **kwargs):
        for parameter, _ in self.levels:
            parameter.requires_grad_(True)

    def term(self, step: Step) -> tuple[Tensor, Metrics]:
        """Adds nothing to the loss; the metric is the number of layers that are trained."""
        trained = number_on(step.loss.device, self.trained)
        return step.loss.new_zeros(()), {"layers_trained": (trained, torch.ones_like(trained))}


def split_groups(optimizer: torch.optim.Optimizer, rates: dict[int, float]) -> None:
    """Splits the optimiser's parameter groups, in place, so that each parameter can have its own learning rate.

    Args:
        optimizer: its groups are replaced.
        rates: factors of the group's learning rate, by the id of the parameter; 1 where a parameter is missing.
    """
    groups = []
    for group in optimizer.param_groups:
        parts = defaultdict(list)
        for parameter in group["params"]:
            parts[rates.get(id(parameter), 1.0)].append(parameter)
        # A scheduler multiplies each group's rate by one factor, so the ratios between layers stay as they are here.
        groups += [{**group, "params": part, "lr": group["lr"] * rate} for rate, part in parts.items()]
    optimizer.param_groups[:] = groups
