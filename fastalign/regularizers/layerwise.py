"""Layer-wise tuning: from the top of the model down, in stages, each layer with a learning rate of its own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastalign.errors import ConfigError, ModelError
from fastalign.models.adapters import causal_lm
from fastalign.objectives.base import Metrics
from fastalign.regularizers.base import Step, Term, check_positive


@dataclass
class LayerWise:
    """Trains the top layers first and unfreezes downwards, stage by stage (Howard & Ruder 2018, arXiv:1801.06146).

    stages: layers trained in each stage, counted from the top and growing, say [2, 8, 30]; or a number of stages, which
        grow evenly to all layers. What is above the layers (the last norm, a head of its own) is trained throughout.
    begins: where in the training each stage begins, from 0 to 1, say [0, 0.3, 0.6]; None: evenly.
    decay: the k-th layer from the top (k = 0, 1, ...) learns at `learning_rate * decay^k`.
    embeddings: train the embeddings in the last stage, if it trains all layers; a head tied to them goes with them.

    Frozen layers cost neither gradients nor their memory: below the lowest layer that is trained there is no graph.
    Adapters are treated as the layers they are on.
    """

    stages: int | list[int] = 3
    begins: list[float] | None = None
    decay: float = 1.0
    embeddings: bool = False

    def start(self, trainer) -> Term:
        check_positive("LayerWise", decay=self.decay)
        if trainer.args.world_size > 1:
            raise ConfigError("LayerWise freezes weights while training, which DDP does not allow: use one process")
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
        stages = self.stages
        if isinstance(stages, int) and not isinstance(stages, bool) and 0 < stages <= layers:
            return [round(layers * (i + 1) / stages) for i in range(stages)]
        good = isinstance(stages, list) and stages and all(type(n) is int and 0 < n <= layers for n in stages)
        if not good or any(a >= b for a, b in pairwise(stages)):
            raise ConfigError(
                f"stages of LayerWise is {stages!r}; give numbers of layers that grow, from 1 to the model's {layers}, "
                "or the number of stages: each must unfreeze something"
            )
        return stages

    def _begins(self) -> list[float]:
        count = self.stages if isinstance(self.stages, int) else len(self.stages)
        if self.begins is None:
            return [i / count for i in range(count)]
        begins = self.begins
        if len(begins) != count or begins[0] != 0 or any(a >= b for a, b in pairwise(begins)) or begins[-1] >= 1:
            raise ConfigError(
                f"begins of LayerWise is {begins} for {count} stages; give one number each, from 0 up and below 1"
            )
        return begins


def _layers(model: nn.Module) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(model).__name__} has no list of its {count} layers: LayerWise cannot tell top from bottom."
    )


def _levels(model: nn.Module, layers: nn.ModuleList) -> list[tuple[nn.Parameter, int]]:
    """Every trainable parameter with its layer's number from the top: -1 above the layers, their number below them."""
    count = len(layers)
    inside = {id(p): count - 1 - i for i, layer in enumerate(layers) for p in layer.parameters()}
    levels, outside = [], count  # what comes before the layers is below them
    for parameter in model.parameters():
        if id(parameter) in inside:
            outside = -1
        if parameter.requires_grad:
            levels.append((parameter, inside.get(id(parameter), outside)))
    return levels


def _reach(stage: int, count: int) -> int:
    """Levels below this one are trained: with all layers, what is below them too."""
    return count + 1 if stage == count else stage


def _check_stages(stages: list[int], trainable: set[int], count: int) -> None:
    """ModelError for a stage that adds no trainable level."""
    for number, (before, stage) in enumerate(pairwise([0, *stages]), 1):
        above = _reach(before, count) if before else -1
        if not any(above <= level < _reach(stage, count) for level in trainable):
            raise ModelError(
                f"Stage {number} of {len(stages)} unfreezes nothing: none of layers {before + 1} to {stage} of "
                f"{count}, counted from the top, is trainable. Choose other stages, or put adapters there."
            )


class _Freezer(TrainerCallback):
    """Freezes and unfreezes at the beginning of each step; gives everything back at the end."""

    def __init__(self, levels, stages: list[int], begins: list[float], count: int, model: nn.Module):
        self.levels, self.stages, self.begins, self.count, self.model = levels, stages, begins, count, model
        self.trained = stages[0]

    def on_train_begin(self, args, state, control, **kwargs):
        # where activations are recomputed under an adapter, a hook makes the embeddings' output require gradients
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
        trained = torch.tensor(self.trained, device=step.loss.device)
        return step.loss.new_zeros(()), {"layers_trained": (trained, torch.ones_like(trained))}


def split_groups(optimizer: torch.optim.Optimizer, rates: dict[int, float]) -> None:
    """Parts the optimiser's groups so that each parameter learns at its rate (by id) times its group's."""
    groups = []
    for group in optimizer.param_groups:
        parts = defaultdict(list)
        for parameter in group["params"]:
            parts[rates.get(id(parameter), 1.0)].append(parameter)
        groups += [{**group, "params": part, "lr": group["lr"] * rate} for rate, part in parts.items()]
    optimizer.param_groups[:] = groups
