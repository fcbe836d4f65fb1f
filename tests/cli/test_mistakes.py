"""Mistakes that people make: each one ends in one sentence with the remedy, before the model is loaded."""

from __future__ import annotations

import json

import pytest

from fastalign.cli.main import main

PAIRS = [{"prompt": f"Q{i}", "chosen": "a good answer", "rejected": "bad"} for i in range(4)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with the files that the commands below name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("fastalign.training.preflight.is_offline_mode", lambda: True)
    text = {
        "pairs.jsonl": "".join(json.dumps(row) + "\n" for row in PAIRS),
        "empty.jsonl": "",
        "broken.jsonl": json.dumps(PAIRS[0]) + '\n{"prompt": 1',
        "bad.yaml": "a: [1",
        "file": "",
    }
    for name, content in text.items():
        (tmp_path / name).write_text(content)


# What is typed -> what the sentence must say. MODEL is the tiny model's folder.
TYPED = {
    "dppo": "There is no command 'dppo'; did you mean 'dpo'",
    "": "required: COMMAND",
    "dpo --model MODEL": "train is missing; give train=",
    "dpo model": "'model' is not of the form key=value",
    "dpo model=MODEL": "train is missing; give train=",
    "dpo model=./nowhere train=pairs.jsonl": "no model folder './nowhere'",
    "dpo model=MODEL train=no.jsonl": "no.jsonl is not a file",
    "dpo model=MODEL train=empty.jsonl": "empty.jsonl is empty",
    "dpo model=MODEL train=broken.jsonl": "broken.jsonl, line 2: not valid JSON",
    "dpo --config nope.yaml": "nope.yaml cannot be read",
    "dpo --config bad.yaml": "bad.yaml is not valid YAML",
    "train dpo-smollm3": "did you mean 'dpo-smollm2'",
    "distill model=MODEL train=pairs.jsonl": "teacher is missing",
}
# The same for options that are added to a run that would work otherwise.
OPTIONS = {
    "beta=abc": "beta is 'abc'; expected float",
    "beta=-1": "beta is -1",
    "beta=.nan": "beta is nan",
    "learning_rate=high": "learning_rate is 'high'; expected float",
    "learning_rate=.inf": "learning_rate is inf",
    "learning_rat=1": "did you mean 'learning_rate'",
    "loss_type=dpoo": "did you mean 'dpo'",
    "per_device_train_batch_size=0": "per_device_train_batch_size is 0; it must be",
    "max_length=1": "max_length is 1",
    "max_steps=0": "give 1 or more",
    "num_train_epochs=0": "num_train_epochs is 0",
    "logging_steps=.inf": "logging_steps is inf",
    "save_steps=-1": "save_steps is -1",
    "ddp_timeout=1000000000000000000000000000000": "ddp_timeout is 1",
    "accelerator_config=nope.json": "nope.json",
    "optim=adamw_foo": "optim is 'adamw_foo'; did you mean",
    "eval_strategy=epoch": "there is no eval_dataset: give one",
    "bf16=true fp16=true": "At most one of fp16 and bf16",
    "fp16=true": "fp16 is True, but training runs on a CPU",
    "dtype=fp8": "dtype is 'fp8'; it must be",
    "deepspeed=ds.json": "DeepSpeed is not supported",
    "fsdp=full_shard": "there is one process",
    "report_to=tensorbord": "did you mean 'tensorboard'",
    "push_to_hub=true": "push_to_hub is True, but HF_HUB_OFFLINE is set",
    "use_liger_kernel=true": "use_liger_kernel is True; fastalign computes",
    "label_smoothing_factor=0.1": "set label_smoothing of a preference loss",
    "train_sampling_strategy=group_by_length": "packed rows have no padding",
    "load_in_4bit=true": "set quantization=nf4",
    "packing=true": "rows are always packed",
    "rpo_alpha=1": "set nll_weight",
    "lora_r=8": "set lora_rank",
    "lora_dropout=2": "lora_dropout is 2",
    "lora_rank=-1": "lora_rank is -1",
    "max_prompt_length=9": "set max_length",
    "group_by_length=true": "leave it out",
    "desirable_weight=2": "only kto or apo_zero_unpaired reads it",
    "ref_model_sync_steps=3": "only sync_ref_model=True reads it",
    "output_dir=file": "output_dir 'file' cannot be written: File exists",
    "regularizers=[{name:[a]}]": "name of a regularizer is ['a']",
    "regularizers=[{name:l2sp,strength:1}]": "did you mean 'l2_sp'",
    "regularizers=[{name:l2_sp,strength:-1}]": "strength of L2SP is -1",
    "regularizers=[{name:ewc,strength:1,fisher:no.safetensors}]": "no.safetensors is not a file",
    "resume_from_checkpoint=./nowhere": "'./nowhere', which is no folder",
}


@pytest.mark.parametrize("typed", [*TYPED, *OPTIONS])
def test_one_sentence_with_the_remedy(typed, files, model_dir, capsys):
    words = typed.replace("MODEL", str(model_dir)).split()
    if typed in OPTIONS:
        words = ["dpo", f"model={model_dir}", "train=pairs.jsonl", "use_cpu=true", "output_dir=run"] + [
            word.replace(":", ": ").replace(",", ", ") if word.startswith("regularizers") else word for word in words
        ]
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("fastalign: ") and "\n" not in said and len(said) < 500
    assert {**TYPED, **OPTIONS}[typed] in said
    assert "traceback" not in said


def test_numbers_and_dates_may_name_a_folder_or_a_title(files, model_dir, capsys):
    """YAML reads 2026-11-30 as a date. It is what fails in the end that shows that the date was taken."""
    words = ["dpo", f"model={model_dir}", "train=empty.jsonl", "output_dir=2026-11-30", "title=2024"]
    assert main(words) == 2
    assert "empty.jsonl is empty" in capsys.readouterr().err
