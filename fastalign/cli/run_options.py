"""The options of a run that do not depend on its method: model, data, adapter, samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from fastalign.cli.methods import REGULARIZERS, check_regularizers
from fastalign.config.quantization import Quantization, check_quantization
from fastalign.config.ranges import COUNT, NOT_NEGATIVE, SHARE_BELOW_1, check_ranges
from fastalign.errors import ConfigError
from fastalign.memory.planning import parse_size
from fastalign.options import GivenAdapter, check_keys, help_field, one_of

_RANGES = {
    "lora_rank": NOT_NEGATIVE,
    "lora_alpha": COUNT,
    "lora_dropout": SHARE_BELOW_1,
    "samples": NOT_NEGATIVE,
    "max_new_tokens": COUNT,
}


@dataclass
class RunOptions:
    """The model, the data, the adapter and what is shown at the end; see `fastalign dpo --help`.

    Raises:
        ConfigError: model or train is missing, a number is out of range, or a regulariser is not declared well.
    """

    model: str | None = help_field(
        None, "A model folder, a .gguf file, a packaged model, or organisation/name.", path=True
    )
    train: str | list | dict | None = help_field(
        None,
        "Training rows: a file or a folder (.jsonl, .json, .csv, .tsv, .parquet, also .gz and .zst), hub:owner/name, "
        "or a list of these, each alone or as {path: ..., weight: 2}.",
        path=True,
    )
    eval: str | list | dict | None = help_field(
        None,
        "Held-out rows, for evaluation and for the answers before and after training: likewise, or several by name, as "
        "{easy: a.jsonl, hard: b.jsonl}.",
        path=True,
    )
    columns: dict[str, str] | None = help_field(
        None, "Which columns hold what, where their names do not say it, as {prompt: question}."
    )
    title: str | None = help_field(None, "The report's title.")
    dtype: str = help_field("auto", "Type of the weights: float32, bfloat16, float16, or auto (the machine decides).")
    quantization: Quantization = help_field(
        "none", "Quantises the frozen weights under a LoRA adapter: none, nf4, fp4 or int8 (needs bitsandbytes)."
    )
    double_quantization: bool = help_field(False, "Whether the scales of nf4 and fp4 weights are quantised too.")
    quantize_head: bool = help_field(
        False, "Whether the output layer is quantised too; not where it is tied to the embedding."
    )
    adapter: GivenAdapter | None = help_field(
        None,
        "The adapter that the model comes with: merge (into its weights; the default, with a new adapter on top), or "
        "continue (train it further).",
    )
    lora_rank: int = help_field(16, "Rank of the LoRA adapter; 0 trains the whole model.")
    lora_alpha: int = help_field(32, "LoRA's scale is lora_alpha / lora_rank.")
    lora_dropout: float = help_field(0.0, "Dropout on the adapter's input.")
    lora_targets: str = help_field(
        "all-linear",
        "Layers with an adapter: all-linear, names joined by commas, or default (what peft chooses for the model).",
    )
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
        check_ranges(self, _RANGES)
        check_quantization(self.quantization, self.double_quantization, self.quantize_head)
        if self.quantization != "none" and not self.lora_rank:
            raise ConfigError(
                f"quantization is {self.quantization!r} and lora_rank 0; quantised weights cannot be trained, "
                "so set lora_rank to 1 or more"
            )
        if self.adapter is not None:
            one_of("adapter", self.adapter, get_args(GivenAdapter))
        if self.memory_limit is not None:
            parse_size("memory_limit", self.memory_limit)
        check_regularizers(self.regularizers)


def paths_of(source: Any) -> list[str]:
    """The paths in the value of `train` or `eval`: one, a list, {path, weight}, or a dict of these by name.

    Raises:
        ConfigError: The value holds something else.
    """
    if source is None or isinstance(source, str):
        return [source] if source else []
    if isinstance(source, list):
        return [path for item in source for path in paths_of(item)]
    if isinstance(source, dict) and "path" in source:
        check_keys("a source of rows", source, ("path", "weight"))
        return paths_of(source["path"])
    if isinstance(source, dict):
        return [path for item in source.values() for path in paths_of(item)]
    raise ConfigError(f"{source!r} names no rows; give a path, or {{path: ..., weight: 2}}")
