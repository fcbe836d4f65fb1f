"""The options of a run that do not depend on its method: model, data, adapter, samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastalign.cli.methods import REGULARIZERS, check_regularizers
from fastalign.config.quantization import check_quantization
from fastalign.errors import ConfigError
from fastalign.memory.planning import parse_size
from fastalign.options import help_field, one_of


@dataclass
class RunOptions:
    """The model, the data, the adapter and what is shown at the end; see `fastalign dpo --help`.

    Raises:
        ConfigError: model or train is missing, a number is out of range, or a regulariser is not declared well.
    """

    model: str | None = help_field(
        None, "A model folder, a .gguf file, a packaged model, or organisation/name.", path=True
    )
    train: str | None = help_field(None, "Training rows: a .jsonl, .json, .parquet or .csv file.", path=True)
    eval: str | None = help_field(
        None, "Held-out rows, for evaluation and for the answers before and after training.", path=True
    )
    title: str | None = help_field(None, "The report's title.")
    dtype: str = help_field("auto", "Type of the weights: float32, bfloat16, float16, or auto (the machine decides).")
    quantization: str = help_field(
        "none", "Quantises the frozen weights under a LoRA adapter: none, nf4, fp4 or int8 (needs bitsandbytes)."
    )
    double_quantization: bool = help_field(False, "Whether the scales of nf4 and fp4 weights are quantised too.")
    adapter: str | None = help_field(
        None,
        "The adapter that the model comes with: merge (into its weights; the default, with a new adapter on top), or "
        "continue (train it further).",
    )
    lora_rank: int = help_field(16, "Rank of the LoRA adapter; 0 trains the whole model.")
    lora_alpha: int = help_field(32, "LoRA's scale is lora_alpha / lora_rank.")
    lora_dropout: float = help_field(0.0, "Dropout on the adapter's input.")
    lora_targets: str = help_field("all-linear", "Layers with an adapter: all-linear, or names joined by commas.")
    samples: int = help_field(32, "Number of held-out prompts answered before and after training; 0 for none.")
    max_new_tokens: int = help_field(160, "Longest answer, in tokens.")
    memory_limit: str | None = help_field(
        None, "The most memory that the run may need, such as 16GB: a run that is planned to need more is refused."
    )
    regularizers: list[dict[str, Any]] | None = help_field(
        None, "What preserves old knowledge, as [{name: l2_sp, strength: 0.1}]; names: " + ", ".join(REGULARIZERS) + "."
    )

    def __post_init__(self):
        for name in ("model", "train"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is missing; give {name}=... or set it in the configuration file")
        if self.lora_rank < 0 or self.samples < 0:
            raise ConfigError(f"lora_rank is {self.lora_rank}, samples {self.samples}; both must be 0 or more")
        check_quantization(self.quantization, self.double_quantization)
        if self.quantization != "none" and not self.lora_rank:
            raise ConfigError(
                f"quantization is {self.quantization!r} and lora_rank 0; quantised weights cannot be trained, "
                "so set lora_rank to 1 or more"
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; an answer has at least 1")
        if self.adapter is not None:
            one_of("adapter", self.adapter, ("merge", "continue"))
        if self.memory_limit is not None:
            parse_size("memory_limit", self.memory_limit)
        check_regularizers(self.regularizers)
