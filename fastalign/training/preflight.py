"""Before training: options that would fail later, and the lines of the preflight report on the run itself."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from huggingface_hub import HfApi, get_token, is_offline_mode
from torch import nn
from transformers import Trainer
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from fastalign.config.base import AlignmentConfig
from fastalign.data.packing import Layout
from fastalign.data.token_table import lengths
from fastalign.errors import ConfigError
from fastalign.memory import measure
from fastalign.models.adapters import causal_lm
from fastalign.models.ready import check_router
from fastalign.options import one_of

_LAYOUTS = {"shared": "packed, each prompt once", "packed": "packed, a prompt per completion", "padded": "padded rows"}


def check_config(args: object, expected: type[AlignmentConfig]) -> None:
    """ConfigError for options of another class, such as None or transformers.TrainingArguments."""
    if not isinstance(args, expected):
        name = (
            "PreferenceConfig, SFTConfig, DistillationConfig, RewardConfig or OnlineConfig"
            if expected is AlignmentConfig
            else expected.__name__
        )
        raise ConfigError(f"args is of type {type(args).__name__}; pass a {name}")


def check_options(args: AlignmentConfig, *, has_eval_rows: bool) -> None:
    """Refuses options that the Trainer would refuse only after everything is loaded.

    Args:
        args: The options of the run.
        has_eval_rows: Whether there are held-out rows.

    Raises:
        ConfigError: The options are of another class, a tracker is not installed, the hub for the push is not reached
            or does not know the user, an evaluation is set without rows for it, or the optimiser cannot run here.
    """
    check_config(args, AlignmentConfig)
    _check_processes(args)
    _check_trackers(args)
    _check_hub(args)
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


def _check_processes(args: AlignmentConfig) -> None:
    """ConfigError for options that would give the processes other rows, or other numbers of them, than we count on."""
    if args.world_size <= 1:
        return
    for name, needed in (("even_batches", True), ("split_batches", False), ("dispatch_batches", None)):
        value = getattr(args.accelerator_config, name)
        if value != needed and not (name == "dispatch_batches" and value is False):
            raise ConfigError(
                f"{name} of accelerator_config is {value}; with {args.world_size} processes each must get as many "
                "micro-batches of its own as the others, or they would wait for one another: leave it out"
            )


def _check_trackers(args: AlignmentConfig) -> None:
    """ConfigError for a tracker that is unknown or not installed. The Trainer would say so after loading everything."""
    available = get_available_reporting_integrations()
    for name in args.report_to or ():
        one_of("report_to", name, (*INTEGRATION_TO_CALLBACK, "none"))
        if name not in (*available, "flyte"):  # flyte has no such test
            raise ConfigError(f"report_to is {name!r}, which is not installed: `pip install {name}`, or leave it out")


def _check_hub(args: AlignmentConfig) -> None:
    """ConfigError for a push that cannot succeed: the hub is not reached, or it does not know the user."""
    if not args.push_to_hub:
        return
    if is_offline_mode():
        raise ConfigError("push_to_hub is True, but HF_HUB_OFFLINE is set, so no hub is reached: leave one of them out")
    if args.hub_token is None and get_token() is None:
        raise ConfigError(
            "push_to_hub is True, but there is no token of a hub: run `hf auth login`, set HF_TOKEN, or leave it out"
        )
    try:
        HfApi().whoami(token=args.hub_token)
    except Exception as error:  # of the network, of a proxy, or because the token is unknown
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"push_to_hub is True, but the hub cannot be used: {reason}; leave push_to_hub out and upload the run "
            "folder later, or connect to the network and log in (`hf auth login`)"
        ) from error


def largest_batch(dataset: Dataset, layout: Layout, rows: int) -> int:
    """Tokens of the longest rows in a layout. Only the shared layout has a prompt once for all completions."""
    sizes = lengths(dataset).per_row(share_prompts=layout == "shared")
    return int(np.sort(sizes)[-rows:].sum())


def report_lines(model: nn.Module, dataset: Dataset, args: AlignmentConfig, layout: Layout) -> list[tuple[str, str]]:
    """(label, text) lines on the batches, the trainable parameters and the predicted memory of a run.

    The memory is predicted for the longest micro-batch that can occur: the longest rows, as many as one holds.

    Args:
        model: The model, ready for training.
        dataset: Tokenised rows.
        args: The options.
        layout: "shared", "packed" or "padded".
    """
    size = args.per_device_train_batch_size
    tokens = largest_batch(dataset, layout, size)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    predicted = measure.predict(model, tokens=tokens, checkpointing=bool(args.gradient_checkpointing))
    processes = f" x {args.world_size} processes" if args.world_size > 1 else ""
    lines = [
        ("batches", f"{size} x {args.gradient_accumulation_steps}{processes} rows per step, {_LAYOUTS[layout]}"),
        ("trainable", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"),
        ("learning rate", f"{args.learning_rate:g}"),
        ("predicted memory", f"{predicted / 1e9:.2f} GB at the longest batch ({tokens:,} tokens)"),
    ]
    repeated = -len(dataset) % (size * args.world_size)
    if processes and repeated and not args.dataloader_drop_last:
        lines.append(("repeated rows", f"{repeated} at the end of each epoch, so that all processes have as many"))
    if check_router(causal_lm(model)):
        lines.append(("router loss", "not added: the load of the experts is not balanced while training"))
    return lines
