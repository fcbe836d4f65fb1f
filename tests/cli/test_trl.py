"""Configurations of TRL: whole ones run, every key is honoured or named, and the first line says how it was read."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from fastalign.cli import table, train, trl
from fastalign.cli.main import main
from fastalign.cli.run_options import RunOptions
from fastalign.errors import ConfigError

NAMED = {"model_name_or_path": "model", "dataset_name": "owner/rows"}


def read(method="dpo", cuda=False, **given):
    return trl.translate({"method": method, **NAMED, **given}, lambda: cuda)


@pytest.fixture
def config(tmp_path, model_dir, write_rows, pairs):
    """f(method, **keys): a YAML file of TRL, with rows for the method."""
    rows = {
        "dpo": pairs,
        "sft": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "reward": pairs,
        "kto": [{"prompt": r["prompt"], "completion": r["chosen"], "label": n % 2 == 0} for n, r in enumerate(pairs)],
    }

    def write(method, **keys):
        path = tmp_path / f"{method}.yaml"
        data = write_rows(tmp_path / f"{method}.jsonl", rows[method])
        given = {
            "model_name_or_path": str(model_dir), "dataset_name": str(data), "output_dir": str(tmp_path / method),
            "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "attn_implementation": "sdpa",
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }  # fmt: skip
        path.write_text(yaml.safe_dump(given | keys))
        return path

    return write


@pytest.mark.parametrize("method", trl.METHODS)
def test_a_configuration_of_trl_runs_unchanged(config, method, tmp_path, capsys):
    keys = {"use_peft": True, "lora_r": 4} if method == "dpo" else {}
    assert main([method, "--config", str(config(method, **keys)), "--logging_steps", "1"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"Read as a configuration of TRL 1.16 for {method}, with TRL's defaults")
    assert "without effect here: attn_implementation" in first
    assert (tmp_path / method / "preflight.txt").read_text().splitlines()[0] == first
    record = json.loads((tmp_path / method / "run.json").read_text())
    text = json.dumps(record)
    rate = {"sft": 2e-05, "reward": 0.0001}.get(method, 1e-06)
    assert f'"learning_rate": {rate}' in text and '"gradient_checkpointing": true' in text
    assert f'"lora_rank": {4 if keys else 0}' in text
    if keys:
        adapter = json.loads(next((tmp_path / method).rglob("adapter_config.json")).read_text())
        assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]  # PEFT's choice for Llama, as in TRL


def test_trls_defaults():
    options = read().options
    assert options["lora_rank"] == 0 and options["dtype"] == "float32" and options["on_truncate"] == "keep_start"
    assert options["train"] == "hub:owner/rows:train" and "eval" not in options and "bf16" not in options
    assert read(cuda=True).options["bf16"] is True
    assert "bf16" not in read(cuda=True, use_cpu=True).options and "bf16" not in read(cuda=True, fp16=True).options
    assert read("kto").options["train_sampling_strategy"] == "sequential"


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("dpo", {"use_peft": True}, {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05}),
        ("dpo", {"use_peft": True}, {"lora_targets": "default"}),
        ("dpo", {"use_peft": True, "lora_target_modules": ["a", "b"]}, {"lora_targets": "a,b"}),
        ("dpo", {"use_peft": True, "lora_target_modules": "all-linear"}, {"lora_targets": "all-linear"}),
        ("dpo", {"use_peft": True, "load_in_4bit": True}, {"quantization": "nf4"}),
        ("dpo", {"use_peft": True, "load_in_8bit": True}, {"quantization": "int8"}),
        ("dpo", {"truncation_mode": "keep_end"}, {"on_truncate": "keep_end"}),
        ("dpo", {"f_divergence_type": "js_divergence", "loss_type": "ipo"}, {"f_divergence_type": "js_divergence"}),
        ("dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.25},
         {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.25}),
        ("dpo", {"ld_alpha": 0.5, "use_weighting": True}, {"ld_alpha": 0.5, "use_weighting": True}),
        ("dpo", {"loss_type": "sft"}, {"loss_type": "sft"}),
        ("kto", {"loss_type": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {"loss_weights": [1.0, 0.5]}),
        ("dpo", {"eval_strategy": "steps", "dataset_test_split": "dev"}, {"eval": "hub:owner/rows:dev"}),
        ("dpo", {"dataset_config": "en"}, {"train": "hub:owner/rows:en:train"}),
        ("dpo", {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ("sft", {"loss_type": "chunked_nll", "dataset_text_field": "body"},
         {"columns": {"text": "body"}, "loss_type": "nll"}),
        ("sft", {"loss_type": "dft"}, {"loss_type": "dft", "assistant_only_loss": False}),
        ("sft", {"assistant_only_loss": True}, {"assistant_only_loss": True}),
        ("sft", {"completion_only_loss": False}, {"completion_only_loss": False}),
        ("dpo", {"model_init_kwargs": {"torch_dtype": "bfloat16", "attn_implementation": "sdpa"}},
         {"dtype": "bfloat16"}),
        ("dpo", {"train_sampling_strategy": "group_by_length"}, {"train_sampling_strategy": "random"}),
    ],
)  # fmt: skip
def test_keys_are_honoured(method, given, expected):
    options = read(method, **given).options
    assert {key: options[key] for key in expected} == expected


def test_all_keys_that_cannot_be_honoured_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        read(rpo_alpha=1.0, use_dora=True, load_in_4bit=True, model_init_kwargs={"trust_remote_code": True})
    message = str(error.value)
    for said in (
        "use_dora is True", "set use_peft", "model_init_kwargs has trust_remote_code: True",
        "rpo_alpha is 1.0: TRL 1.16 has no such option: set loss_type: [sigmoid, sft], loss_weights: [1.0, rpo_alpha]",
    ):  # fmt: skip
        assert said in message
    assert "lora_alpha" not in message


def test_a_list_as_the_loss_of_sft_is_left_to_the_option_s_check():
    assert read("sft", loss_type=["nll"]).options["loss_type"] == ["nll"]


@pytest.mark.parametrize("key", trl.REFUSED)
def test_a_value_that_asks_for_nothing_is_accepted(key):
    method = "sft" if key in ("packing", "eval_packing") else "dpo"
    for value in trl.REFUSED[key][0]:
        options = read(method, **{key: value}).options
        assert key not in options
    with pytest.raises(ConfigError, match=f"{key} is 'other'"):
        read(method, **{key: "other"})


def test_the_page_has_a_row_for_every_key_that_is_honoured():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "from-trl.md").read_text(encoding="utf-8")
    table = page.partition("| TRL's key | becomes |")[2].partition("\n\n")[0]
    first = " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("|"))
    named = set(re.findall(r"`(\w+)", first))
    honoured = trl.ONLY_TRL - trl.REFUSED.keys() - {*trl.NO_EFFECT, "trust_remote_code"}
    assert honoured <= named <= honoured | {"lora_alpha", "lora_dropout", "dtype", "bf16", "fp16"}


def test_what_is_translated_to_is_an_option():
    """No default and no renamed key leads to an option that fastalign does not have."""
    of_run = {f.name for f in fields(RunOptions)}
    for method, row in (("dpo", "preference"), ("kto", "preference"), ("sft", "sft"), ("reward", "reward")):
        known = of_run | set(table.of_method(row)) | {"method"}
        assert read(method, use_peft=True).options.keys() <= known
        assert not known & trl.ONLY_TRL, "a key of fastalign would make any configuration TRL's"
    assert set(trl.RENAMED.values()) <= of_run


@pytest.mark.parametrize("key", ["lora_r", "model_name_or_path", "truncation_mode", "use_peft", "padding_free"])
def test_one_key_that_only_trl_has_is_enough(key):
    assert trl.is_trl({"beta": 0.1, key: 1}) and not trl.is_trl({"beta": 0.1, "lora_alpha": 8})


def test_both_at_once_are_refused(config, refused, rows):
    said = refused("dpo", "--config", config("dpo"), "train=x.jsonl")
    assert "dataset_name is TRL's and train is fastalign's" in said
    assert "set lora_rank" in refused("dpo", "model=m", f"train={rows}", "--lora_r", "8")


def test_other_methods_and_missing_names_are_refused(config, refused):
    assert "which is run as `fastalign dpo --config FILE`" in refused("train", config("dpo"))
    assert "not orpo" in refused("orpo", "--config", config("dpo"))
    with pytest.raises(ConfigError, match="model_name_or_path is missing"):
        trl.translate({"method": "dpo", "dataset_name": "owner/rows"}, lambda: False)
    assert "Unknown option 'betta'; did you mean 'beta'" in refused("dpo", "--config", config("dpo", betta=1))
    assert "no split 'test': add eval: FILE" in refused("dpo", "--config", config("dpo", eval_strategy="steps"))


def test_sft_scores_what_trl_scores_where_nothing_is_set():
    options = read("sft", completion_only_loss=None).options
    assert options["assistant_only_loss"] is False and "completion_only_loss" not in options
    assert "assistant_only_loss" not in read("dpo").options


def test_what_only_makes_trl_faster_is_named():
    note = read(use_liger_kernel=True, train_sampling_strategy="group_by_length", group_by_length=False).note
    assert note.endswith("without effect here: train_sampling_strategy: group_by_length, use_liger_kernel")


def test_without_a_key_of_trl_nothing_changes():
    options = {"method": "dpo", "model": "m", "train": "t.jsonl", "lora_alpha": 8}
    assert not trl.is_trl(options)
    with pytest.raises(ConfigError, match="set nll_weight"):
        train.check(options | {"rpo_alpha": 1.0})
