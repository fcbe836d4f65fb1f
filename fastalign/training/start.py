"""What training starts from: the model, what happens to the adapter it comes with, and a new adapter.

A model may come with an adapter, for example from supervised fine-tuning that preference optimisation follows. What
was learnt there must not be lost, so there are two ways to go on:

- merge: the adapter becomes part of the weights. These are what training starts from and what its reference is. A new
  adapter is added on top of them, or all weights are trained.
- continue: the adapter is trained further. The reference is the model with the adapter as it came.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from torch import nn

from fastalign.config.quantization import Quantization
from fastalign.data.processes import wait_for_all
from fastalign.errors import ConfigError, ModelError
from fastalign.models.adapters import adapter_base, add_adapter, causal_lm, has_adapter, merge_adapter, train_adapter
from fastalign.models.loading import load_model, load_with_adapter
from fastalign.options import GivenAdapter, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastalign.config.base import AlignmentConfig
    from fastalign.models.adapters import PeftConfig

MERGED = "base"  # folder, inside the run folder, of a model with its old adapter merged


class Origin(NamedTuple):
    """What the preflight report says of the model that training starts from."""

    base: str
    reference: str
    trained: str


def way_of(adapter: GivenAdapter | None, peft_config: PeftConfig | None) -> GivenAdapter:
    """What happens to an adapter that the model comes with: "merge" or "continue".

    Raises:
        ConfigError: `adapter` is unknown, not supported, or contradicts `peft_config`.
    """
    if adapter is None:
        return "continue" if peft_config is None else "merge"
    one_of("adapter", adapter, (*get_args(GivenAdapter), "stack"))
    if adapter == "stack":
        raise ConfigError(
            "adapter is 'stack', which is not supported: peft saves two adapters on one model in two folders, and who "
            "loads the run folder gets one of them: use 'merge', which computes the same"
        )
    if adapter == "continue" and peft_config is not None:
        raise ConfigError(
            "adapter is 'continue', but peft_config configures a new adapter: leave peft_config out, or set "
            "adapter='merge'"
        )
    return adapter


def load_start(
    source: str | Path,
    dtype: Any,
    way: GivenAdapter,
    peft_config: PeftConfig | None,
    quantization: Quantization = "none",
    double_quantization: bool = False,
    quantize_head: bool = False,
) -> nn.Module:  # fmt: skip
    """Loads a model, or the model and the adapter of an adapter folder.

    Args:
        source: A folder or a name that `load_model` knows.
        dtype: The dtype of the weights; "auto" picks by machine.
        way: "merge" or "continue", from `way_of`.
        peft_config: The new adapter; None: there is none.
        quantization: As for `load_model`.
        double_quantization: As for `load_model`.
        quantize_head: As for `load_model`.

    Raises:
        ConfigError: The weights would be quantised and the folder's adapter merged into them.
        ModelError: The model cannot be loaded.
    """
    options = {
        "dtype": dtype, "quantization": quantization, "double_quantization": double_quantization,
        "quantize_head": quantize_head,
    }  # fmt: skip
    if adapter_base(source) is None:
        return load_model(source, for_adapter=peft_config is not None, **options)
    if way == "merge" and quantization != "none":
        raise ConfigError(
            f"quantization is {quantization!r}, and the adapter of {source} would be merged into rounded weights: "
            "train it further with adapter='continue', or merge it first and quantise the result"
        )
    return load_with_adapter(source, for_adapter=peft_config is not None or way == "continue", **options)


def start_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: AlignmentConfig, peft_config: PeftConfig | None,
    adapter: GivenAdapter | None,
) -> tuple[nn.Module, Origin]:  # fmt: skip
    """The model with the adapter that is trained, and what the preflight report says of it.

    If a new adapter is added to merged weights, these are saved into `base` in the run folder. The new adapter names
    that folder as its base model, so the run can be loaded: on the old base model it would compute something else.

    Args:
        model: The model, perhaps with an adapter.
        tokenizer: Saved with a merged model.
        args: The options; `output_dir` and `seed` are read.
        peft_config: The new adapter; None: there is none.
        adapter: As for `AlignmentTrainer`.

    Raises:
        ConfigError: The options contradict each other.
        ModelError: `adapter` is given, and the model comes without one.
    """
    way, base = way_of(adapter, peft_config), causal_lm(model).name_or_path or type(causal_lm(model)).__name__
    as_given = "the model as it is given"
    if not has_adapter(model):
        if adapter is not None:
            raise ModelError(f"adapter is {adapter!r}, but the model {base} comes without an adapter: leave it out.")
    elif way == "continue":
        train_adapter(model)
        return model, Origin(base, "the model with the adapter as it came", "the adapter it came with, further")
    else:
        model = merge_adapter(model)
        base, as_given = f"{base} with the adapter it came with, merged into its weights", "the base"
        if peft_config is not None:
            wait_for_all()  # another process may still read the folder that is replaced
        if peft_config is not None and args.should_save:
            causal_lm(model).name_or_path = str(_save_merged(model, tokenizer, Path(str(args.output_dir))))
    if peft_config is None:
        return model, Origin(base, as_given, "the model's trainable weights")
    return add_adapter(model, peft_config, args.seed), Origin(base, "the base", "a new adapter on the base")


def _save_merged(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Saves the model into `base` of the run folder. It is written aside first: it may replace what was loaded."""
    target, aside = (folder / MERGED).resolve(), (folder / f"{MERGED}.tmp").resolve()
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target
