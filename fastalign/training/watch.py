"""Says in the log what goes wrong while it goes wrong: the diagnostics of `fastalign.report.diagnostics`."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback

from fastalign.models.adapters import lora_layers
from fastalign.models.sharding import gathered
from fastalign.report.diagnostics import Finding, Logged, find

logger = logging.getLogger("fastalign")

_OFTEN = 50  # logged lines; behind them the lines are looked at whenever a tenth more have come


class Watch(TrainerCallback):
    """Warns of each diagnostic when it first fires.

    Attributes:
        found: What has fired so far, by name.
    """

    def __init__(self):
        self.records: list[dict[str, Any]] = []
        self.found: dict[str, Finding] = {}
        self._next = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Looks at the lines so far. All of them are read, so this gets rarer as they get many."""
        if not logs or not state.is_world_process_zero:
            return
        self.records.append({"step": state.global_step, **logs})
        if len(self.records) >= self._next:
            self._next = len(self.records) + 1 if len(self.records) < _OFTEN else math.ceil(1.1 * len(self.records))
            self.look()

    def on_train_end(self, args, state, control, **kwargs):
        """Looks at all lines once more."""
        if state.is_world_process_zero:
            self.look()

    def look(self) -> None:
        """Warns of what has not been seen before."""
        for finding in find(Logged(self.records)):
            if finding.name not in self.found:
                self.found[finding.name] = finding
                logger.warning("%s: %s. What to try: %s.", finding.title, finding.evidence, finding.remedy)


@torch.no_grad()
def adapter_norm(model: Any) -> float | None:
    """The norm of all B matrices of the model's LoRA adapters together, 0 in a new adapter; None without an adapter."""
    norms = [gathered(lora.b.detach()).float().norm() for _, lora in lora_layers(model)]
    return torch.stack(norms).norm().item() if norms else None
