"""Evaluation mode (no dropout) for a while, on a model that is being trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context with the model in evaluation mode. Afterwards each module has its previous mode, also after an error.

    Modes are restored module by module. `model.train(mode)` would switch all of them, also those that somebody keeps in
    evaluation mode on purpose, for example frozen norms.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
