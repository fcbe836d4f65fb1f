"""The numbers that the options may have. What a Trainer would take and fail on later, or train NaN with, is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastalign.errors import ConfigError


class Range(NamedTuple):
    """What a number may be; None always passes, since it means a default."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # than `least`, which itself is no value then
    below: bool = False  # than `most`

    def holds(self, value: float) -> bool:
        """Whether the number is finite and inside."""
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return math.isfinite(value) and low and high

    def __str__(self) -> str:
        low = "" if self.least == -math.inf else f"{'above' if self.above else 'at least'} {self.least:g}"
        high = "" if self.most == math.inf else f"{'below' if self.below else 'at most'} {self.most:g}"
        return " and ".join(["finite", *filter(None, (low, high))])


COUNT, NOT_NEGATIVE, POSITIVE = Range(1), Range(0), Range(0, above=True)
SHARE, SHARE_BELOW_1 = Range(0, 1), Range(0, 1, below=True)

# Of transformers.TrainingArguments, where it has no check of its own, and of AlignmentConfig.
TRAINING = {
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE_BELOW_1,
    "adam_beta2": SHARE_BELOW_1,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": COUNT,
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": COUNT,
    "ddp_timeout": Range(1, 10**9),
    "seed": Range(0, 2**32 - 1),
    "data_seed": Range(0, 2**32 - 1),
    "memory_budget": NOT_NEGATIVE,
    "mlp_tile": COUNT,
}


def check_ranges(config: Any, ranges: Mapping[str, Range]) -> None:
    """Checks the numbers among the fields of a configuration.

    Args:
        config: The configuration.
        ranges: The range of each field, by its name.

    Raises:
        ConfigError: A number is NaN, infinite or out of its range, or no number at all.
    """
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name} is {value!r}; it must be a number, {allowed}")
        if not allowed.holds(value):
            raise ConfigError(f"{name} is {value}; it must be {allowed}")
