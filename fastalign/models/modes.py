"""Evaluation mode for a while, on a model that is being trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode, and each of its modules back in the mode it was in, also after an error.

    `model.train(before)` would not do: it also switches blocks that are kept in evaluation mode, frozen norms say.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
