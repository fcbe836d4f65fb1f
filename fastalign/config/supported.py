"""What becomes of every option of `transformers.TrainingArguments` and of every argument of its `Trainer`.

Each one stands in one of three lists: it works, it is refused with a sentence, or it has no meaning here. A test holds
the lists complete for the installed transformers. So no option that somebody sets does nothing without a word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fastalign.errors import ConfigError
from fastalign.options import nearest

_NO_LOGITS = "evaluation forms no logits, only the log-probs of the targets"
_NO_MODEL_INPUTS = "fastalign lays out the batches itself"

WORKS = frozenset({
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules", "gradient_accumulation_steps",
    "max_grad_norm", "bf16", "fp16", "tf32", "activation_checkpointing", "activation_checkpointing_kwargs",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "neftune_noise_alpha", "torch_empty_cache_steps", "logging_strategy", "logging_steps",
    "logging_first_step", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "report_to",
    "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy",
    "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start", "save_only_model",
    "save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
    "hub_revision", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip",
    "restore_callback_states_from_checkpoint", "full_determinism", "seed", "data_seed", "use_cpu",
    "accelerator_config", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "dataloader_in_order", "train_sampling_strategy", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "debug",
    "skip_memory_metrics", "resume_from_checkpoint",
})  # fmt: skip

# Option -> (the values that change nothing, why every other value is refused and what to do).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": (
        (0.0,),
        "no loss of fastalign smooths over the vocabulary: leave it out. For noisy preference labels, set "
        "label_smoothing of a preference loss",
    ),
    "logging_nan_inf_filter": (
        (False,),
        "it would log a loss of NaN as if it were the mean of the losses before: leave it out",
    ),
    "average_tokens_across_devices": (
        (True,),
        "losses are always divided by the totals of all processes: leave it out",
    ),
    "bf16_full_eval": (
        (False,),
        "it would round the weights that are trained to 16 bits for good: load the model with dtype='bfloat16'",
    ),
    "fp16_full_eval": (
        (False,),
        "it would round the weights that are trained to 16 bits for good: load the model with dtype='float16'",
    ),
    "use_liger_kernel": (
        (False,),
        "fastalign computes the loss from the hidden states by its own kernels: leave it out",
    ),
    "liger_kernel_config": ((None, {}), "Liger's kernels are not used: leave it out"),
    "auto_find_batch_size": (
        (False,),
        "a smaller batch in the middle of a run would change it: set a smaller per_device_train_batch_size, with more "
        "gradient_accumulation_steps",
    ),
    "include_num_input_tokens_seen": (
        ("no", False),
        f"{_NO_MODEL_INPUTS}, and logs tokens_per_second: leave it out",
    ),
    "include_for_metrics": (([], ()), f"{_NO_LOGITS}: leave it out"),
    "batch_eval_metrics": ((False,), f"{_NO_LOGITS}: leave it out"),
    "eval_accumulation_steps": ((None,), f"{_NO_LOGITS}, so nothing piles up: leave it out"),
    "eval_use_gather_object": ((False,), f"{_NO_LOGITS}: leave it out"),
    "label_names": ((None, []), f"{_NO_MODEL_INPUTS}: leave it out"),
    "length_column_name": (("length",), f"{_NO_MODEL_INPUTS}: leave it out"),
    "deepspeed": ((None,), "DeepSpeed is not supported: use fsdp, or one process"),
    "parallelism_config": ((None,), "only data parallelism is supported: use DDP or fsdp"),
}

# Flags that the Trainer's example scripts read, what launchers set, and what fastalign sets itself. Other values of
# them are accepted and change nothing: there is nothing that they could change.
NO_MEANING = frozenset({
    # `do_eval` is set by `eval_strategy`; `remove_unused_columns` is always off; `prediction_loss_only` is always on;
    # evaluation returns a loss alone, which `eval_do_concat_batches` concatenates or not; the forward that is trained
    # never uses the cache, which `use_cache` switches on in the configuration that is saved.
    "do_train", "do_eval", "do_predict", "local_rank", "remove_unused_columns", "prediction_loss_only",
    "eval_do_concat_batches", "use_cache",
})  # fmt: skip

# Arguments of `transformers.Trainer.__init__`.
ARGUMENTS_THAT_WORK = frozenset({
    "model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks", "optimizers",
    "optimizer_cls_and_kwargs",
})  # fmt: skip
# The same, and arguments of other libraries' trainers -> why it is refused, and what to do.
ARGUMENTS_REFUSED = {
    "data_collator": f"{_NO_MODEL_INPUTS}: leave it out, and change the rows instead",
    "model_init": "a model that is made anew for every run has no fixed reference: pass the model, or its folder",
    "compute_loss_func": "the loss follows from the method: pick one by loss_type, or subclass AlignmentTrainer",
    "compute_metrics": f"{_NO_LOGITS}: compute metrics in a callback's on_evaluate, for example from generated answers",
    "preprocess_logits_for_metrics": f"{_NO_LOGITS}: compute metrics in a callback's on_evaluate",
    "ref_model": (
        "the reference is the model as training starts from it: leave it out, or pass the model that should be the "
        "reference as `model`"
    ),
    "quantization_config": "pass quantization='nf4', 'fp4' or 'int8' with the model's folder",
    "formatting_func": "only SFTTrainer has it: map the rows before you pass them",
    "tokenizer": "pass it as processing_class",
}


def check_supported(args: Any) -> None:
    """Checks the options of transformers that fastalign cannot honour.

    Raises:
        ConfigError: One of them has a value that would do nothing, or harm. The sentence names it and the remedy.
    """
    for name, (harmless, why) in REFUSED.items():
        value = getattr(args, name, harmless[0])
        if value not in harmless:
            raise ConfigError(f"{name} is {value!r}; {why}")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ConfigError(
            f"train_sampling_strategy is {args.train_sampling_strategy!r}; packed rows have no padding that it could "
            "save: leave it out, or set random or sequential"
        )
    if args.fsdp and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError(
            f"fsdp is {args.fsdp!r}, but there is one process, and nothing to shard over: start several with "
            "`torchrun --nproc_per_node=N -m fastalign.cli.main ...`, or leave it out"
        )


def check_arguments(given: Mapping[str, Any]) -> None:
    """Checks further arguments of a trainer, by name.

    Raises:
        ConfigError: An argument cannot be honoured, or is unknown.
    """
    for name, value in given.items():
        if name in ARGUMENTS_REFUSED:
            if value is not None:
                raise ConfigError(f"{name} is not supported: {ARGUMENTS_REFUSED[name]}")
        elif name not in ARGUMENTS_THAT_WORK:
            raise ConfigError(f"There is no argument {name!r}; {nearest(name, sorted(ARGUMENTS_THAT_WORK))}")
