"""Options of other libraries that are no options here, and what to write instead."""

from __future__ import annotations

from fastalign.options import nearest

_INSTEAD = {
    "load_in_4bit": "set quantization=nf4",
    "load_in_8bit": "set quantization=int8",
    "packing": "rows are always packed: leave it out",
    "padding_free": "rows are always packed: leave it out",
    "group_by_length": "packed rows have no padding: leave it out",
    "rpo_alpha": "set nll_weight",
    "max_prompt_length": "set max_length, with on_truncate=keep_end to cut the start of prompts",
    "max_completion_length": "set max_length",
    "max_seq_length": "set max_length",
    "truncation_mode": "set on_truncate",
    "model_name_or_path": "set model",
    "dataset_name": "set train",
    "torch_dtype": "set dtype",
    "use_peft": "set lora_rank (0 trains all weights)",
    "lora_r": "set lora_rank",
    "lora_target_modules": "set lora_targets",
    "simpo_gamma": "set gamma_beta_ratio",
    "cpo_alpha": "set nll_weight",
    "reference_free": "use a loss without a reference, such as simpo or orpo",
    "evaluation_strategy": "set eval_strategy",
    "num_epochs": "set num_train_epochs",
    "learning_rate_scheduler": "set lr_scheduler_type",
    "epochs": "set num_train_epochs",
    "batch_size": "set per_device_train_batch_size",
    "micro_batch_size": "set per_device_train_batch_size",
    "base_model": "set model",
    "sequence_len": "set max_length",
    "cutoff_len": "set max_length",
    "max_seq_len": "set max_length",
    "sample_packing": "rows are always packed: leave it out",
    "finetuning_type": "set lora_rank (0 trains all weights)",
    "lora_target": "set lora_targets",
    "pref_loss": "set loss_type",
    "pref_beta": "set beta",
    "rl_beta": "set beta",
    "pref_ftx": "set nll_weight",
    "quantization_bit": "set quantization=nf4",
}


def remedy(option: str, known: list[str]) -> str:
    """What to do about an unknown option: what other libraries' option is called here, or the nearest name."""
    return _INSTEAD.get(option) or f"{nearest(option, known)}{_HELP if len(known) > 40 else ''}"


_HELP = "; `fastalign dpo --help` lists the options"
