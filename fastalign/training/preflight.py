"""Before training: options that would fail later, and the lines of the preflight report on the run itself."""

from __future__ import annotations

from datasets import Dataset
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from fastalign.config.base import AlignmentConfig
from fastalign.data.packing import Layout
from fastalign.errors import ConfigError
from fastalign.memory import measure

_LAYOUTS = {"shared": "packed, each prompt once", "packed": "packed, a prompt per completion", "padded": "padded rows"}


def check_options(args: AlignmentConfig, *, has_eval_rows: bool) -> None:
    """ConfigError for options that the Trainer would refuse only after everything is loaded."""
    if not has_eval_rows and args.eval_strategy != "no":
        strategy = IntervalStrategy(args.eval_strategy).value
        raise ConfigError(f"eval_strategy is {strategy!r}, but there is no eval_dataset: give one")
    try:
        # This imports what the optimiser needs, for example bitsandbytes.
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        name = OptimizerNames(args.optim).value
        raise ConfigError(f"optim is {name!r}, and cannot run here: {' '.join(str(error).split())}") from error
    except ValueError:  # some optimisers want the model here, which is not loaded yet
        return


def row_tokens(row: dict, layout: Layout) -> int:
    """Tokens of one tokenised row in a layout. Only the shared layout has the prompt once for all completions."""
    prompts = 1 if layout == "shared" else len(row["completion_ids"])
    return prompts * len(row["prompt_ids"]) + sum(map(len, row["completion_ids"]))


def report_lines(model: nn.Module, dataset: Dataset, args: AlignmentConfig, layout: Layout) -> list[tuple[str, str]]:
    """(label, text) lines on the batches, the trainable parameters and the predicted memory of a run.

    The memory is predicted for the longest micro-batch that can occur: the longest rows, as many as one holds.
    """
    size = args.per_device_train_batch_size
    tokens = sum(sorted(row_tokens(dataset[i], layout) for i in range(len(dataset)))[-size:])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    predicted = measure.predict(model, tokens=tokens, checkpointing=bool(args.gradient_checkpointing))
    return [
        ("batches", f"{size} x {args.gradient_accumulation_steps} rows per step, {_LAYOUTS[layout]}"),
        ("trainable", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"),
        ("learning rate", f"{args.learning_rate:g}"),
        ("predicted memory", f"{predicted / 1e9:.2f} GB at the longest batch ({tokens:,} tokens)"),
    ]
