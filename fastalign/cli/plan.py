"""`fastalign plan CONFIG`: the memory that a run will need, part by part, and what to change where it does not fit."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.cli import configuration, table
from fastalign.cli.run_options import RunOptions
from fastalign.errors import ConfigError
from fastalign.memory import parts, planning
from fastalign.memory.planning import Choice
from fastalign.memory.shapes import Shapes, read_shapes

_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit",
    "lion_8bit": "lion_8bit", "lion_32bit": "lion", "sgd": "sgd",
}  # fmt: skip


def add(commands: Any) -> None:
    """Adds `plan` to the parser's commands."""
    parser = commands.add_parser("plan", help="say what memory a run needs, without loading the model")
    parser.add_argument("config", help="a recipe, or a YAML file of options")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options that replace those of the file")
    parser.add_argument("--memory", metavar="SIZE", help="choose the fastest way that fits, such as 16GB")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of the longest micro-batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to plan for; the default is what is here")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Prints the plan.

    Returns:
        0: it fits, or there is no limit. 1: it does not fit. What cannot be planned raises, which is 2.
    """
    from fastalign.cli.train import check

    options = {**configuration.read_recipe(args.config), **configuration.read_arguments(args.options)}
    run, of_method, row = check(options)
    shapes, setting, rows = settings(run, of_method, row, tokens=args.tokens, device=args.device)
    text = args.memory or run.memory_limit
    limit = None if text is None else planning.parse_size("--memory" if args.memory else "memory_limit", text)
    setting = setting._replace(bounded=limit is not None and setting.device == "cpu")
    _show(shapes, setting)
    return 0 if limit is None else _show_choice(shapes, setting, rows, limit)


def check_limit(run: RunOptions, of_method: Mapping[str, Any], row: str) -> None:
    """Refuses a run that is planned to need more than its `memory_limit`.

    Args:
        run: The options of the run.
        of_method: The options of its method.
        row: Its row in METHODS.

    Raises:
        ConfigError: The run does not fit. The message says by how much, and the cheapest change.
    """
    shapes, setting, rows = settings(run, of_method, row)
    setting = setting._replace(bounded=setting.device == "cpu")
    limit = planning.parse_size("memory_limit", run.memory_limit)
    needed = planning.peak(shapes, setting)
    if needed > limit:
        raise ConfigError(
            f"memory_limit is {run.memory_limit}, but the run is planned to need {_gb(needed)}, {_gb(needed - limit)} "
            f"more: {_remedy(shapes, setting, rows, limit)}"
        )


def settings(
    run: RunOptions, of_method: Mapping[str, Any], row: str, *, tokens: int | None = None, device: str | None = None
) -> tuple[Shapes, parts.Setting, int]:
    """The shapes of a run's model, what the run decides about memory, and the rows of a micro-batch.

    Args:
        run: The options of the run.
        of_method: The options of its method.
        row: Its row in METHODS.
        tokens: Tokens of the longest micro-batch. None: as many as max_length allows.
        device: "cpu" or "cuda". None: what this machine has.

    Raises:
        ConfigError: An option is not in the plan's formulas.
        ModelError: The model's architecture is not.
    """
    known = table.of_method(row)

    def option(name: str) -> Any:
        return of_method.get(name, known.get(name, {}).get("default"))

    _check_planned(run, option, row)
    shapes, stored = read_shapes(str(run.model))
    if stored is not None:
        raise ConfigError(
            f"model {run.model} was saved quantised ({stored}), which plan does not read: name its original"
        )
    if device is None:
        device = "cpu" if option("use_cpu") or not Path("/dev/nvidia0").exists() else "cuda"
    rows = option("per_device_train_batch_size")
    if tokens is None:
        tokens = rows * _row_tokens(option("max_length"), row)
    if tokens < 1:
        raise ConfigError(f"--tokens is {tokens}; a micro-batch has at least 1")
    return shapes, parts.Setting(
        tokens, rank=run.lora_rank, size=_size(run, device), quantization=run.quantization,
        checkpointing=bool(option("gradient_checkpointing") or option("activation_checkpointing")),
        double=run.double_quantization, optimizer=_optimizer(str(option("optim"))), device=device,
        reference=option("precompute_ref_log_probs") is False, accumulates=option("gradient_accumulation_steps") > 1,
        memory_budget=parts.CACHE_BYTES if option("memory_budget") is None else option("memory_budget"),
    ), rows  # fmt: skip


def _check_planned(run: RunOptions, option: Any, row: str) -> None:
    """ConfigError for options whose memory the formulas do not have."""
    if row == "distill":
        raise ConfigError(
            "method is distill, whose teacher is not in the plan's formulas; plan knows sft and preferences"
        )
    if run.regularizers:
        names = ", ".join(str(r.get("name")) for r in run.regularizers)
        raise ConfigError(
            f"regularizers is {names}, whose memory is not in the plan's formulas; leave them out to plan"
        )
    if run.adapter is not None:
        raise ConfigError(f"adapter is {run.adapter!r}, whose rank plan does not read; leave it out and set lora_rank")
    if run.lora_rank and run.lora_targets != "all-linear":
        raise ConfigError(f"lora_targets is {run.lora_targets!r}; plan knows all-linear only")
    for name in ("bf16", "fp16", "torch_compile", "use_liger_kernel", "neftune_noise_alpha", "deepspeed", "fsdp"):
        if option(name) and name != "bf16":
            raise ConfigError(f"{name} is {option(name)!r}, which is not in the plan's formulas; leave it out to plan")
    if option("bf16") and not run.lora_rank:
        raise ConfigError("bf16 is True with all weights trained, whose copies are not in the plan's formulas")


def _row_tokens(max_length: int | None, row: str) -> int:
    """The most tokens of one row: a pair has two completions, and each prompt may be as short as one token."""
    if max_length is None:
        raise ConfigError("max_length is None, so rows may have any length; give --tokens, or set max_length")
    return max_length if row == "sft" else 2 * max_length


def _size(run: RunOptions, device: str) -> int:
    """Bytes of a weight, as `fastalign.models.loading.default_dtype` chooses it."""
    if run.dtype != "auto":
        if run.dtype not in _SIZES:
            raise ConfigError(f"dtype is {run.dtype!r}; it must be auto or one of {', '.join(_SIZES)}")
        return _SIZES[run.dtype]
    if not run.lora_rank:
        return 4
    cpuinfo = Path("/proc/cpuinfo")
    has = device == "cuda" or (cpuinfo.is_file() and "avx512_bf16" in cpuinfo.read_text(encoding="utf-8"))
    return 2 if has else 4


def _optimizer(name: str) -> str:
    if name not in _OPTIMIZERS:
        raise ConfigError(
            f"optim is {name!r}, which is not in the plan's formulas; plan knows {', '.join(_OPTIMIZERS)}"
        )
    return _OPTIMIZERS[name]


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _show(shapes: Shapes, setting: parts.Setting) -> None:
    found = parts.parts(shapes, setting)
    where = {"cpu": "CPU", "cuda": "GPU"}[setting.device]
    print(f"Peak on the {where} at {setting.tokens:,} tokens per micro-batch, {shapes.parameters:,} parameters:")
    for name, size in found.items():
        if size:
            print(f"  {name:<24}{size / 1e9:>9.3f} GB")
    print(f"  {'sum':<24}{sum(found.values()) / 1e9:>9.3f} GB")


def _show_choice(shapes: Shapes, setting: parts.Setting, rows: int, limit: int) -> int:
    """Prints the fastest way that fits, and why the others lost; returns the exit status."""
    choices = planning.alternatives(shapes, setting, rows)
    chosen = planning.choose(choices, limit)
    if chosen is None:
        over = planning.peak(shapes, setting) - limit
        print(f"Does not fit in {_gb(limit)}, by {_gb(over)}: {_remedy(shapes, setting, rows, limit)}")
        return 1
    print(f"Fits in {_gb(limit)}: {_describe(chosen, setting, rows)}, {_gb(chosen.peak)}.")
    if setting.bounded:
        print("  (set memory_limit in the configuration: without it the allocator keeps freed memory)")
    for choice in choices:
        if choice is not chosen:
            lost = f"{_gb(choice.peak - limit)} too much" if choice.peak > limit else _slower(choice, chosen)
            print(f"  not {_describe(choice, setting, rows)}: {lost}")
    return 0


def _slower(choice: Choice, chosen: Choice) -> str:
    return f"fits, but is estimated to take {choice.cost / chosen.cost:.2f}x the time"


def _describe(choice: Choice, setting: parts.Setting, rows: int) -> str:
    count = round(rows * choice.setting.tokens / setting.tokens)
    checkpointing = "with" if choice.setting.checkpointing else "without"
    return (
        f"per_device_train_batch_size={count}, {checkpointing} gradient_checkpointing, "
        f"quantization={choice.setting.quantization}"
    )


def _remedy(shapes: Shapes, setting: parts.Setting, rows: int, limit: int) -> str:
    """The cheapest change with which the run fits."""
    choices = planning.alternatives(shapes, setting, rows)
    chosen = planning.choose(choices, limit)
    if chosen is not None:
        return f"{_describe(chosen, setting, rows)} needs {_gb(chosen.peak)}"
    least = min(choices, key=lambda choice: choice.peak)
    tokens = planning.longest(shapes, least.setting, limit)
    if tokens:
        return f"{_describe(least, setting, rows)} fits with {tokens:,} tokens per micro-batch (max_length)"
    if not setting.rank:
        return "train an adapter (lora_rank=16)"
    return f"no setting fits, the least needs {_gb(least.peak)}; take a smaller model"
