"""The memory plan of a run's options, and `memory_limit`, which refuses a run that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.cli import table
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
            f"memory_limit is {run.memory_limit}, but the run is planned to need {in_gb(needed)}, "
            f"{in_gb(needed - limit)} more: {remedy(shapes, setting, rows, limit)}"
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
    if run.quantize_head and shapes.tied:
        raise ConfigError(f"quantize_head is True, but the output layer of {run.model} is tied to the embedding")
    if device is None:
        device = "cpu" if option("use_cpu") or not Path("/dev/nvidia0").exists() else "cuda"
    rows = option("per_device_train_batch_size")
    count: int = rows * _row_tokens(option("max_length"), row) if tokens is None else tokens
    if count < 1:
        raise ConfigError(f"--tokens is {count}; a micro-batch has at least 1")
    return shapes, parts.Setting(
        count, rank=run.lora_rank, size=_size(run, device), quantization=run.quantization,
        checkpointing=bool(option("gradient_checkpointing") or option("activation_checkpointing")),
        double=run.double_quantization, optimizer=_optimizer(str(option("optim"))), device=device,
        reference=option("precompute_ref_log_probs") is False, accumulates=option("gradient_accumulation_steps") > 1,
        targets=_targets(run, shapes) if run.lora_rank else None, quantize_head=run.quantize_head,
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
    for name in ("bf16", "fp16", "torch_compile", "use_liger_kernel", "neftune_noise_alpha", "deepspeed", "fsdp"):
        if option(name) and name != "bf16":
            raise ConfigError(f"{name} is {option(name)!r}, which is not in the plan's formulas; leave it out to plan")
    if option("bf16") and not run.lora_rank:
        raise ConfigError("bf16 is True with all weights trained, whose copies are not in the plan's formulas")


def _targets(run: RunOptions, shapes: Shapes) -> tuple[str, ...] | None:
    """The names of the layers with an adapter; None for all-linear."""
    if run.lora_targets == "all-linear":
        return None
    if run.lora_targets == "default":  # of peft, for the architectures that `shapes_of` knows
        if not shapes.lora_default:
            raise ConfigError(
                "lora_targets is 'default', and peft has no default for this architecture; name the layers"
            )
        return "q_proj", "v_proj"
    names = [name.strip() for name in run.lora_targets.split(",")]
    known = [*shapes.names, "lm_head"]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"lora_targets is {run.lora_targets!r}, and {name!r} is no layer that plan knows; it knows all-linear, "
                f"default and {', '.join(known)}"
            )
    return tuple(names)


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


def in_gb(size: int) -> str:
    """A size in GB, 10^9 bytes."""
    return f"{size / 1e9:.2f} GB"


def describe(choice: Choice, setting: parts.Setting, rows: int) -> str:
    """The options that a choice stands for."""
    count = round(rows * choice.setting.tokens / setting.tokens)
    checkpointing = "with" if choice.setting.checkpointing else "without"
    return (
        f"per_device_train_batch_size={count}, {checkpointing} gradient_checkpointing, "
        f"quantization={choice.setting.quantization}"
    )


def remedy(shapes: Shapes, setting: parts.Setting, rows: int, limit: int) -> str:
    """The cheapest change with which the run fits."""
    choices = planning.alternatives(shapes, setting, rows)
    chosen = planning.choose(choices, limit)
    if chosen is not None:
        return f"{describe(chosen, setting, rows)} needs {in_gb(chosen.peak)}"
    least = min(choices, key=lambda choice: choice.peak)
    tokens = planning.longest(shapes, least.setting, limit)
    if tokens:
        return f"{describe(least, setting, rows)} fits with {tokens:,} tokens per micro-batch (max_length)"
    if not setting.rank:
        return "train an adapter (lora_rank=16)"
    return f"no setting fits, the least needs {in_gb(least.peak)}; take a smaller model"
