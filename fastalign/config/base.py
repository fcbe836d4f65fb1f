"""The options of a training run: `transformers.TrainingArguments` plus what alignment adds.

Names follow TRL's where the meaning is the same, so that a configuration can be carried over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
from transformers import TrainingArguments

from fastalign.config.ranges import TRAINING, check_ranges
from fastalign.config.supported import check_supported
from fastalign.errors import ConfigError
from fastalign.options import OnInvalid, OnTruncate, help_field, one_of


@dataclass
class AlignmentConfig(TrainingArguments):
    """The options of every fastalign trainer. All fields of `transformers.TrainingArguments` are options too.

    Attributes:
        output_dir: The run folder. It gets the model or adapter, the configuration, metrics.jsonl and the report.
        learning_rate: AdamW's initial learning rate. None: `adapter_rate` or `full_rate`, by what is trained.
            The trainer's preflight report says which.
        logging_steps: Optimiser steps between two logged lines.
        report_to: Experiment trackers. The default is none, so that nothing leaves the machine.
        max_length: The most tokens that a prompt may have together with one of its completions. None: no limit.
        on_truncate: What happens to longer rows: "error", "drop", "keep_end", which cuts the start of the prompt, or
            "keep_start", which cuts the end of the completions, EOS with it (TRL's default).
        on_invalid: What happens to rows with empty, missing or identical fields: "error" or "drop".
        allow_empty_prompt: Accept rows of plain strings without a prompt. They are refused otherwise: as a rule the
            prompt is in a column of an unknown name.
        apply_chat_template: Make a chat of plain strings: the prompt a user's turn, each completion an answer.
        token_cache_dir: The folder where the tokens of many rows are stored, for the next run with the same rows,
            tokenizer and options. None: ~/.cache/fastalign.
        disable_dropout: Turn off the dropout of the model itself. The dropout of LoRA stays as it is configured.
        memory_budget: Bytes of probability tiles that the forward pass may keep for the backward pass when the output
            layer is trained. None: 1 GiB.
        share_prompts: Compute each prompt once for all of its completions.
        mlp_tile: Tokens of a tile, in which MLP layers compute: a layer then keeps its input for the backward pass,
            not its three inner vectors, which are computed again. None: all tokens at once.
        dataloader_pin_memory: Put batches into page-locked memory, from where a GPU copies faster. None: only if CUDA
            is available.
        logging_nan_inf_filter: Always False: True would log a loss of NaN as if it were the mean of the losses before.
        run_name: A name that the report shows.
        resume_from_checkpoint: A checkpoint folder to go on from; True or "last" for the newest whole checkpoint in
            `output_dir`, or the beginning if there is none.
        overwrite_output_dir: Delete what an older run left in `output_dir`. A new run in such a folder is refused
            otherwise.

    Raises:
        ConfigError: An option has a value out of its range. The message names the option, the value and a remedy.
    """

    output_dir: str | None = help_field("runs/latest", "The run folder: model or adapter, config, metrics, report.")
    learning_rate: float | None = help_field(
        None, "AdamW's initial learning rate. None: 1e-4 for an adapter, 1e-6 for all weights."
    )
    # The learning rates where none is given. They are no options.
    adapter_rate = 1e-4
    full_rate = 1e-6
    method = "sft"  # the command that has these options; with a loss_type that names it. It is no option either.
    logging_steps: float = help_field(10, "Optimiser steps between two logged lines.")
    report_to: str | list[str] | None = help_field(
        "none", "Experiment trackers. The default is none, so nothing leaves the machine."
    )
    max_length: int | None = help_field(
        1024, "The most tokens of a prompt together with one completion. None: no limit."
    )
    on_truncate: OnTruncate = help_field(
        "error",
        "What happens to rows that are too long: error, drop, keep_end (cut the start of the prompt), or "
        "keep_start (cut the end of the completions).",
    )
    on_invalid: OnInvalid = help_field(
        "error", "What happens to rows with empty, missing or identical fields: error or drop."
    )
    allow_empty_prompt: bool = help_field(False, "Accept rows of plain strings that have no prompt.")
    apply_chat_template: bool = help_field(
        False, "Make a chat of plain strings: the prompt a user's turn, each completion an answer."
    )
    token_cache_dir: str | None = help_field(
        None, "Where tokens of many rows are stored for later runs. None: ~/.cache/fastalign.", path=True
    )
    disable_dropout: bool = help_field(True, "Turn off the model's dropout. LoRA's dropout is not changed.")
    memory_budget: int | None = help_field(
        None, "Bytes of probability tiles that are stored for a trained output layer. None: 1 GiB."
    )
    share_prompts: bool = help_field(True, "Compute each prompt once for all of its completions.")
    mlp_tile: int | None = help_field(
        None, "Tokens that MLP layers compute at a time, their inner vectors again in the backward pass: less memory."
    )
    dataloader_pin_memory: bool | None = help_field(
        None, "Put batches into page-locked memory, for faster copies to a GPU. None: if CUDA is available."
    )
    # Only False is accepted (see below), so it has no help text, and `fastalign METHOD --help` does not show it.
    logging_nan_inf_filter: bool = False
    run_name: str | None = help_field(None, "A name for the run, which the report shows.")
    resume_from_checkpoint: str | bool | None = help_field(
        None, "A checkpoint folder to go on from; last or true: the newest whole one in output_dir."
    )
    overwrite_output_dir: bool = help_field(False, "Delete what an older run left in output_dir.")

    def __post_init__(self):
        # The Trainer drops columns that are no argument of the model's forward. The collator needs them all.
        self.remove_unused_columns = False
        if self.dataloader_pin_memory is None:
            # The class cannot have this as its default: importing it would start CUDA.
            self.dataloader_pin_memory = torch.cuda.is_available()
        check_supported(self)
        one_of("on_truncate", self.on_truncate, get_args(OnTruncate))
        one_of("on_invalid", self.on_invalid, get_args(OnInvalid))
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; a prompt and a completion need at least 2 tokens: set 2 or more"
            )
        # Before TrainingArguments looks at them: it stumbles over infinity.
        check_ranges(self, TRAINING)
        self._check_lengths()
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ConfigError(
                "fp16 is True, but training runs on a CPU, where it does nothing: set bf16, or leave it out"
            )

    @property
    def forward_options(self) -> dict[str, Any]:
        """What the forward pass of training takes further, `temperature` for example."""
        return {}

    @property
    def scoring_options(self) -> dict[str, Any]:
        """The part of `forward_options` that decides log-probs: what the start is scored with, too."""
        return {name: value for name, value in self.forward_options.items() if name == "temperature"}

    def _check_lengths(self) -> None:
        """ConfigError for lengths of training that train nothing."""
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(f"max_steps is {self.max_steps}; give 1 or more, or -1 to use num_train_epochs instead")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < math.inf:
            raise ConfigError(
                f"num_train_epochs is {self.num_train_epochs:g}, which trains nothing: "
                "give a number above 0, or set max_steps"
            )
