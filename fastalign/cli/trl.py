"""Configurations of TRL 1.16 for dpo, sft, kto and reward, read with TRL's names, meanings and defaults.

A configuration is TRL's if it has a key that only TRL has, such as `model_name_or_path`. Every key of TRL does one of
three things here:

- It is honoured: `RENAMED` and the functions below say as which option. Keys in no table mean the same in both.
- It is refused, together with all others that cannot be honoured, in one message: `REFUSED`.
- It has no effect on what is trained, only on how TRL computes it: `NO_EFFECT`. The first line of the report names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.errors import ConfigError

METHODS = ("dpo", "sft", "kto", "reward")

RENAMED = {
    "model_name_or_path": "model",
    "torch_dtype": "dtype",
    "use_bnb_nested_quant": "double_quantization",
}
# What TRL has where nothing is given, as fastalign's options.
_DEFAULTS: dict[str, Any] = {
    "output_dir": "trainer_output", "logging_steps": 10, "gradient_checkpointing": True, "max_length": 1024,
    "dtype": "float32", "lora_rank": 0,
}  # fmt: skip
_PREFERENCE = {"learning_rate": 1e-6, "beta": 0.1, "precompute_ref_log_probs": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {**_DEFAULTS, **_PREFERENCE, "loss_type": ["sigmoid"]},
    "kto": {**_DEFAULTS, **_PREFERENCE, "loss_type": "kto", "train_sampling_strategy": "sequential"},
    "sft": {**_DEFAULTS, "learning_rate": 2e-5},
    "reward": {**_DEFAULTS, "learning_rate": 1e-4},
}
_LORA = {
    "lora_r": ("lora_rank", 16),
    "lora_alpha": ("lora_alpha", 32),
    "lora_dropout": ("lora_dropout", 0.05),
}
_QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
_DATA = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")

# Key -> (the values that ask for nothing, what to do about any other).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_offloading": ((False,), "activations stay on the device: use gradient_checkpointing"),
    "bnb_4bit_quant_storage": ((None,), "leave it out"),
    "chat_template_path": ((None,), "put the template into the model's folder as chat_template.jinja"),
    "dataset_kwargs": ((None, {}), "leave it out, and change the rows instead"),
    "dataset_streaming": ((False,), "rows are read before training: leave it out"),
    "datasets": ((None, []), "name one data set by dataset_name, or write a fastalign configuration with train: [...]"),
    "eos_token": ((None,), "the tokenizer's own ends every answer: set it in the tokenizer"),
    "eval_packing": ((None, False), "evaluation counts rows: leave it out"),
    "lora_modules_to_save": ((None, []), "only adapters or all weights are trained: leave it out"),
    "lora_target_parameters": ((None, []), "adapters go on linear layers: leave it out"),
    "lora_task_type": (("CAUSAL_LM", "SEQ_CLS"), "the method decides what the model is: leave it out"),
    "max_completion_length": ((None,), "TRL 1.16 has no such option: set max_length"),
    "max_prompt_length": ((None,), "TRL 1.16 has no such option: set max_length"),
    "max_seq_length": ((None,), "TRL 1.16 has no such option: set max_length"),
    "model_revision": (("main", None), "download that revision, and give its folder as model_name_or_path"),
    "packing": (
        (False,),
        "it makes one row of several, and so the batch larger: leave it out (nothing is padded here)",
    ),
    "reference_free": ((None, False), "TRL 1.16 has no such option: take a loss without a reference, such as simpo"),
    "router_aux_loss_coef": ((None, 0, 0.0), "the router's loss is not added: leave it out"),
    "rpo_alpha": (
        (None,),
        "TRL 1.16 has no such option: set loss_type: [sigmoid, sft], loss_weights: [1.0, rpo_alpha]",
    ),
    "shuffle_dataset": ((False,), "rows are shuffled in every epoch: leave it out"),
    "use_dora": ((False,), "adapters are plain LoRA: leave it out"),
    "use_rslora": ((False,), "set lora_alpha to lora_alpha * sqrt(lora_r), which is the same"),
}
NO_EFFECT = (
    "attn_implementation", "dataset_num_proc", "ignore_bias_buffers", "packing_strategy", "pad_to_multiple_of",
    "pad_token", "padding_free", "precompute_ref_batch_size",
)  # fmt: skip
_ELSEWHERE = (
    "use_peft",
    "trust_remote_code",
    "lora_target_modules",
    "truncation_mode",
    "dataset_text_field",
    "model_init_kwargs",
)
# What only TRL has: a configuration with one of these is TRL's.
ONLY_TRL = {*RENAMED, *_LORA, *_QUANTIZATION, *_DATA, *REFUSED, *NO_EFFECT, *_ELSEWHERE} - {
    "lora_alpha",
    "lora_dropout",
}


class Translation(NamedTuple):
    """A configuration of TRL as fastalign's.

    Attributes:
        options: fastalign's options, TRL's defaults among them.
        note: The first line of the report: what was read how, and what has no effect.
    """

    options: dict[str, Any]
    note: str


def is_trl(options: Mapping[str, Any]) -> bool:
    """Whether a configuration is TRL's.

    Raises:
        ConfigError: It names the model or the data in the words of both.
    """
    trls = [key for key in options if key in ONLY_TRL]
    ours = [key for key in ("model", "train") if key in options]
    named = [key for key in trls if key in ("model_name_or_path", "dataset_name")]
    if ours and named:
        raise ConfigError(
            f"{named[0]} is TRL's and {ours[0]} is fastalign's; a configuration is one or the other: write model and "
            "train, or model_name_or_path and dataset_name"
        )
    return bool(trls) and not ours


def translate(given: Mapping[str, Any], cuda: Callable[[], bool]) -> Translation:
    """A configuration of TRL as fastalign's options.

    Args:
        given: The keys of TRL, and `method`.
        cuda: Whether there is a GPU, on which TRL trains in bfloat16 by default.

    Raises:
        ConfigError: The method is another, or keys cannot be honoured: all of them are named.
    """
    options, problems, idle = dict(given), [], []
    method = _method(options)
    result = {"method": method, **DEFAULTS[method]}
    for part in (_refused, _data, _adapter, _quantization, _loss, _scored, _truncation, _model, _speed):
        part(options, result, problems, idle)
    for key, name in RENAMED.items():
        if key in options:
            result[name] = options.pop(key)
    if "bf16" not in options and not options.get("fp16") and cuda() and not options.get("use_cpu"):
        result["bf16"] = True
    result |= options
    if "model" not in result:
        problems.append("model_name_or_path is missing: name the model")
    if problems:
        raise ConfigError("this configuration of TRL cannot be run as it is: " + "; ".join(problems))
    note = f"Read as a configuration of TRL 1.16 for {method}, with TRL's defaults"
    return Translation(result, note + (f"; without effect here: {', '.join(idle)}" if idle else ""))


def _method(options: dict) -> str:
    method = options.pop("method", None)
    if method not in METHODS:
        raise ConfigError(
            f"this is a configuration of TRL ({next(k for k in options if k in ONLY_TRL)}), which is run as "
            "`fastalign dpo --config FILE`, or sft, kto or reward"
            + ("" if method is None else f", not {method}: for that write a fastalign configuration")
        )
    return method


def _refused(options: dict, result: dict, problems: list[str], idle: list[str]) -> None:
    for key, (harmless, remedy) in REFUSED.items():
        if key in options and (value := options.pop(key)) not in harmless:
            problems.append(f"{key} is {value!r}: {remedy}")
    if options.pop("trust_remote_code", False):
        problems.append("trust_remote_code is set: no code that came with a model is run, leave it out")
    idle += [key for key in NO_EFFECT if key in options and options.pop(key) is not None]


def _data(options: dict, result: dict, problems: list[str], idle: list[str]) -> None:
    name, config = options.pop("dataset_name", None), options.pop("dataset_config", None)
    train, test = options.pop("dataset_train_split", "train"), options.pop("dataset_test_split", "test")
    text = options.pop("dataset_text_field", "text")
    if text != "text":
        result["columns"] = {"text": text}
    evaluates = options.get("eval_strategy", "no") not in ("no", False)
    if name is None:
        problems.append("dataset_name is missing: name the data set")
    elif not Path(name).expanduser().exists():
        source = f"hub:{name}" if config is None else f"hub:{name}:{config}"
        result["train"] = f"{source}:{train}"
        if evaluates and "eval" not in options:
            result["eval"] = f"{source}:{test}"
    else:
        result["train"] = name
        if config is not None or train != "train":
            problems.append("dataset_config and dataset_train_split choose from a data set of the hub: name the file")
        if evaluates and "eval" not in options:
            problems.append(f"eval_strategy is set, but {name} has no split {test!r}: add eval: FILE, or set it to no")


def _adapter(options: dict, result: dict, problems: list[str], idle: list[str]) -> None:
    given = {key: options.pop(key) for key in (*_LORA, "lora_target_modules") if options.get(key) is not None}
    if not options.pop("use_peft", False):
        idle += [f"{key} (use_peft is not set)" for key in given]
        return
    for key, (name, default) in _LORA.items():
        result[name] = given.get(key, default)
    targets = given.get("lora_target_modules", "default")  # TRL leaves the choice to PEFT
    targets = [targets] if isinstance(targets, str) else targets
    result["lora_targets"] = ",".join(targets)


def _quantization(options: dict, result: dict, problems: list[str], idle: list[str]) -> None:
    four, eight = options.pop("load_in_4bit", False), options.pop("load_in_8bit", False)
    kind = options.pop("bnb_4bit_quant_type", "nf4")
    if four and eight:
        problems.append("load_in_4bit and load_in_8bit are both set: set one")
    elif four or eight:
        result["quantization"] = kind if four else "int8"
        if not result["lora_rank"]:
            problems.append("quantised weights cannot be trained: set use_peft")


def _loss(options: dict, result: dict, problems: list[str], idle: list[str]) -> None:
    loss = options.get("loss_type", result.get("loss_type"))
    names = [loss] if isinstance(loss, str) else list(loss or [])
    if options.get("f_divergence_type", "reverse_kl") != "alpha_divergence":
        options.pop("f_alpha_divergence_coef", None)  # TRL reads it with that divergence only
    if result["method"] == "sft":
        given = options.pop("loss_type", "nll")
        result["loss_type"] = "nll" if given == "chunked_nll" else given
    elif result["method"] == "kto":
        if names not in (["kto"], ["apo_zero_unpaired"]):
            problems.append(f"loss_type is {loss!r}: TRL's KTO has kto and apo_zero_unpaired")
    elif names == ["sft"]:
        # TRL computes rewards for the log alone; fastalign refuses a beta that no loss reads.
        idle += [key for key in ("beta",) if key in options]
        options.pop("beta", None)
        del result["beta"]


def _scored(options: dict, result: dict, problems: list[str], idle: list[str]) -> None:
    """Which tokens sft scores: all of messages and text, and completions without their prompts, if nothing is set."""
    if result["method"] != "sft":
        return
    result["assistant_only_loss"] = options.pop("assistant_only_loss", False)
    if options.get("completion_only_loss", True) is None:
        del options["completion_only_loss"]


def _truncation(options: dict, result: dict, problems: list[str], idle: list[str]) -> None:
    mode = options.pop("truncation_mode", "keep_start")
    if mode not in ("keep_start", "keep_end"):
        problems.append(f"truncation_mode is {mode!r}: TRL has keep_start and keep_end")
    result["on_truncate"] = "drop" if result["method"] == "reward" else mode  # TRL's RewardTrainer leaves long rows out


def _model(options: dict, result: dict, problems: list[str], idle: list[str]) -> None:
    """The arguments that TRL passes on to transformers when it loads the model."""
    given = options.pop("model_init_kwargs", None) or {}
    if not isinstance(given, Mapping):
        problems.append(f"model_init_kwargs is {given!r}: write a mapping, such as {{dtype: bfloat16}}")
        return
    for key, value in given.items():
        if key in ("dtype", "torch_dtype"):
            result["dtype"] = value
        elif key in ("attn_implementation", "use_cache", "low_cpu_mem_usage", "device_map"):
            idle.append(f"model_init_kwargs.{key}")
        elif value not in (None, False) and (key, value) != ("revision", "main"):
            problems.append(f"model_init_kwargs has {key}: {value!r}: only its dtype can be honoured, leave it out")


def _speed(options: dict, result: dict, problems: list[str], idle: list[str]) -> None:
    """What only makes TRL faster, by the names that transformers has for it."""
    if options.get("train_sampling_strategy") == "group_by_length":
        options["train_sampling_strategy"] = "random"
        idle.append("train_sampling_strategy: group_by_length")
    idle += [key for key in ("group_by_length", "use_liger_kernel", "liger_kernel_config") if options.pop(key, None)]
