"""A trainer in Python leaves the same folder as a command, and the commands read it."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign import (
    DistillationConfig,
    DistillationTrainer,
    PreferenceConfig,
    PreferenceTrainer,
    SFTConfig,
    SFTTrainer,
)
from fastalign.cli.main import main
from fastalign.cli.record import read_record
from fastalign.config.record import NOT_REPEATABLE, as_names
from fastalign.errors import ConfigError
from fastalign.files import read_metrics
from fastalign.training.record import given_options

LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FAST = {"use_cpu": True, "disable_tqdm": True, "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory, pairs):
    """Files of pairs and of prompts."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": pairs[0]["prompt"]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def left(tmp_path_factory, model_dir, files):
    """The folder that DPO with names of everything left, as its user leaves it."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    args = PreferenceConfig(output_dir=str(run), ref_cache_dir=str(run.parent / "cache"), learning_rate=1e-2, **FAST)
    PreferenceTrainer(str(model_dir), args, str(files / "pairs.jsonl"), peft_config=LoraConfig(**LORA)).train()
    return run


def test_the_folder_holds_what_a_commands_does(left):
    names = {path.name for path in left.iterdir()}
    assert names >= {
        "run.json", "preflight.txt", "metrics.jsonl", "summary.json", "report.html", "adapter_model.safetensors",
        "adapter_config.json", "tokenizer.json", "checkpoint-3",
    }  # fmt: skip
    assert "trained" in (left / "preflight.txt").read_text()
    assert "dpo" in json.loads((left / "summary.json").read_text())["title"]


def test_every_command_reads_it(left, files, tmp_path, capsys):
    words = ["--max-new-tokens", "2"]
    prompts = str(files / "prompts.jsonl")
    assert main(["report", str(left)]) == 0
    assert main(["diagnose", str(left)]) in (0, 1)
    assert main(["generate", str(left), "--prompts", prompts, "--out", str(tmp_path / "answers.jsonl"), *words]) == 0
    assert main(["compare", str(left), str(left), "--prompts", prompts, *words]) == 0
    assert main(["merge", str(left), "--out", str(tmp_path / "merged")]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(json.loads((left / "run.json").read_text())["model"])
    PeftModel.from_pretrained(base, left)
    AutoTokenizer.from_pretrained(left)
    assert "has ended" not in capsys.readouterr().err


def test_a_command_repeats_it_to_its_numbers(left):
    assert main(["train", str(left / "run.json"), "samples=0"]) == 0
    first, second = (
        [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (left, left.with_name("mine-2"))
    )
    assert first == second and len(first) == 3
    weights = [(run / "adapter_model.safetensors").read_bytes() for run in (left, left.with_name("mine-2"))]
    assert weights[0] == weights[1]


def test_objects_have_no_name_and_that_is_said(model_dir, pairs, tokenizer, tmp_path, capsys):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    args = SFTConfig(output_dir=str(tmp_path / "run"), **FAST)
    SFTTrainer(AutoModelForCausalLM.from_pretrained(model_dir), args, rows, processing_class=tokenizer).train()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["train"] is None and record["model"] == str(model_dir)
    assert "model, train_dataset, processing_class were given as Python objects" in record[NOT_REPEATABLE]
    with pytest.raises(ConfigError, match=r"no command can repeat.*run that program again"):
        read_record(tmp_path / "run" / "run.json")
    assert main(["train", str(tmp_path / "run" / "run.json")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("fastalign: ")
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_a_used_folder_keeps_its_options(left, model_dir, files):
    before = (left / "run.json").read_bytes()
    args = PreferenceConfig(output_dir=str(left), ref_cache_dir=str(left.parent / "cache"), beta=0.7, **FAST)
    trainer = PreferenceTrainer(str(model_dir), args, str(files / "pairs.jsonl"), peft_config=LoraConfig(**LORA))
    with pytest.raises(ConfigError, match="holds a run already"):
        trainer.train()
    assert (left / "run.json").read_bytes() == before


def test_a_teacher_given_by_name_is_an_option(model_dir, pairs, tmp_path, write_completions):
    args = DistillationConfig(output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), **FAST)
    trainer = DistillationTrainer(str(model_dir), args, write_completions(tmp_path, pairs), teacher=str(model_dir))
    assert trainer.given.options["teacher"] == str(model_dir) and not trainer.given.objects


@pytest.fixture
def write_completions():
    """f(folder, pairs): the path of a file with the chosen answers."""

    def write(folder, pairs):
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / "rows.jsonl")

    return write


ARGUMENTS = {
    "model": "m", "train_dataset": "a.jsonl", "eval_dataset": None, "peft_config": None, "way": "merge",
    "dtype": "auto", "quantization": "none", "double_quantization": False, "quantize_head": False,
    "processing_class": None, "regularizers": (), "callbacks": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, True),
        ({"use_dora": True}, False),
        ({"target_modules": None}, True),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": ".*q_proj"}, False),
        ({"rank_pattern": {"q_proj": 3}}, False),
        ({"bias": "all"}, False),
    ],
)
def test_an_adapter_is_named_only_if_options_describe_it_in_full(options, named):
    given = given_options({**ARGUMENTS, "peft_config": LoraConfig(**{**LORA, **options})}, {})
    assert (given.objects == []) is named


def test_rows_that_have_names():
    mixture = {"easy": "a.jsonl", "hard": [{"path": "b.jsonl", "weight": 2}, "c.jsonl"]}
    assert as_names(mixture) == mixture
    assert as_names([{"prompt": "a", "completion": "b"}]) is None
    assert as_names({"easy": [{"prompt": "a"}]}) is None
    assert as_names([]) is None
