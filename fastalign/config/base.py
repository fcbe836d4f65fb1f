"""The options of a training run: `transformers.TrainingArguments` plus what alignment adds.

Names follow TRL's where the meaning is the same, so that a configuration can be carried over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from fastalign.errors import ConfigError
from fastalign.options import help_field, one_of

ON_TRUNCATE = ("error", "drop", "keep_end")


ON_INVALID = ("error", "drop")


@dataclass
class AlignmentConfig(TrainingArguments):
    """What every fastalign trainer takes, beside the fields of `transformers.TrainingArguments`."""

    output_dir: str | None = help_field("runs/latest", "The run folder: model or adapter, config, metrics, report.")
    learning_rate: float = help_field(1e-6, "AdamW's initial learning rate; 1e-4 or so suits LoRA.")
    logging_steps: float = help_field(10, "Optimiser steps between two logged lines.")
    report_to: str | list[str] | None = help_field("none", "Experiment trackers; none, so nothing leaves the machine.")
    max_length: int | None = help_field(1024, "Most tokens of a prompt with one completion; None for no limit.")
    on_truncate: str = help_field("error", "Rows that are too long: error, drop, or keep_end (cut the prompt's start).")
    on_invalid: str = help_field("error", "Rows with empty, missing or identical fields: error or drop.")
    disable_dropout: bool = help_field(True, "Turn the model's own dropout off; LoRA's dropout is kept.")
    memory_budget: int | None = help_field(None, "Bytes of probability tiles kept for a trainable head; None: 1 GiB.")
    share_prompts: bool = help_field(True, "Lay out each prompt once for all its completions.")
    dataloader_pin_memory: bool = help_field(torch.cuda.is_available(), "Page-locked batches, for a GPU.")
    run_name: str | None = help_field(None, "A name for the run, shown in the report.")

    def __post_init__(self):
        self.remove_unused_columns = False  # the collator reads columns that no forward signature names
        one_of("on_truncate", self.on_truncate, ON_TRUNCATE)
        one_of("on_invalid", self.on_invalid, ON_INVALID)
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; it must hold a prompt and a completion: 2 or more")
        super().__post_init__()
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(f"max_steps is {self.max_steps}; give 1 or more, or -1 for num_train_epochs instead")
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be a finite number, 0 or more")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; no loss here smooths over the vocabulary: "
                "leave it out (label_smoothing is the preference losses' own)"
            )
