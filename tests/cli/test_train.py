"""`fastalign train` and the methods: options that are refused, and what one whole tiny run leaves behind."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from peft import PeftModel

from fastalign.cli import table, train
from fastalign.cli.main import main
from fastalign.cli.run_options import RunOptions
from fastalign.config.preference import PreferenceConfig
from fastalign.errors import ConfigError

# Help


def test_help_of_a_method_lists_every_option(shown):
    text = shown("dpo", "--help")
    listed = {line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.split()}
    assert {"beta", "loss_type", "on_truncate", "num_train_epochs"} <= set(PreferenceConfig.__dataclass_fields__)
    known = set(PreferenceConfig.__dataclass_fields__) | set(RunOptions.__dataclass_fields__)
    assert known - listed == {"logging_nan_inf_filter"}  # any value but its default is refused
    assert max(map(len, text.splitlines())) <= 120
    listed = {line.split()[0] for line in shown("sft", "--help").splitlines() if line.startswith("  ")}
    assert "beta" not in listed and "max_length" in listed


def test_every_loss_is_a_command(shown):
    for name in ("discopop", "sigmoid"):
        assert "gamma_beta_ratio" in shown(name, "--help")


# Bad input: one sentence, before anything is loaded or trained


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["betta=0.1"], "Unknown option 'betta'; did you mean 'beta'?"),
        (["lora_rnk=4"], "did you mean 'lora_rank'?"),
        (["num_train_epoch=4"], "did you mean 'num_train_epochs'?"),
        (["beta"], "'beta' is not of the form key=value"),
        (["beta=high"], "beta is 'high'; expected float"),
        (["beta=-1"], "beta is -1"),
        (["learning_rate=-1"], "learning_rate is -1"),
        (["max_steps=0"], "max_steps is 0"),
        (["per_device_train_batch_size=0"], "per_device_train_batch_size is 0"),
        (["title=[half"], "title"),
        (["loss_type=dop"], "did you mean 'dpo'?"),
        (["lora_rank=-1"], "lora_rank is -1"),
        (["lr_scheduler_type=cosin"], "cosin"),
        (["dtype=float33"], "dtype is 'float33'"),
        (["model=./nowhere"], "no model folder './nowhere'"),
        (["model="], "model is missing"),
        (["train=nowhere.jsonl"], "nowhere.jsonl"),
        (["eval=nowhere.jsonl"], "nowhere.jsonl"),
        (["eval_strategy=steps"], "eval_dataset"),
        (["lora_targets=no_such_layer"], "no_such_layer"),
        (["max_length=8"], "longer than max_length=8"),
        (["method=dop"], "did you mean 'dpo'"),
    ],
)
def test_bad_options_are_one_sentence(refused, rows, model_dir, tmp_path, options, said):
    good = [f"model={model_dir}", f"train={rows}", f"output_dir={tmp_path / 'run'}", "use_cpu=true"]
    assert said in refused("dpo", *good, *options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_no_is_a_strategy_although_yaml_reads_it_as_false(refused, model_dir):
    said = refused("dpo", f"model={model_dir}", "train=nowhere.jsonl", "save_strategy=no", "logging_strategy=no")
    assert "nowhere.jsonl is not a file" in said


def test_run_folder_that_cannot_be_made_is_said_before_loading(refused, rows, model_dir):
    said = refused("dpo", f"model={model_dir}", f"train={rows}", f"output_dir={rows}")
    assert "output_dir" in said and "File exists" in said


def test_command_says_the_method_not_its_file(refused, tmp_path, model_dir, rows):
    path = tmp_path / "run.yaml"
    rows.write_text('{"text": "a"}\n')
    path.write_text(f"method: dpo\nmodel: {model_dir}\ntrain: ./{rows.name}\n")
    assert "rows with prompt, completion and label" in refused(
        "kto", "--config", path, f"output_dir={tmp_path / 'run'}"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("method: dpo\nbetta: 0.1\n", "did you mean 'beta'?"),
        ("model: x\ntrain: y\n", "method is None"),
        ("method: dpo\ntrain: y\n", "model is missing"),
    ],
)
def test_bad_files_are_one_sentence(refused, tmp_path, content, said):
    (tmp_path / "run.yaml").write_text(content)
    assert said in refused("train", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": "nowhere.jsonl"}, "train: nowhere.jsonl is not a file"),
        ({"eval": "nowhere.csv"}, "eval: nowhere.csv is not a file"),
        ({"eval": {"a": ["nowhere.csv"]}}, "eval: nowhere.csv is not a file or a folder"),
        ({"eval": "owner/name"}, "eval: owner/name is not a file or a folder; check the path (hub:owner/name reads"),
        ({"model": "./nowhere"}, "no model folder './nowhere'"),
        ({"model": "nowhere.gguf"}, "model: nowhere.gguf is not a file"),
        ({"method": "distill", "teacher": "~/nowhere"}, "teacher: there is no model folder"),
        ({"regularizers": [{"name": "replay", "text": "a.txt"}]}, "text of replay: a.txt is not a file"),
        ({"regularizers": [{"name": "ewc", "strength": 1.0, "fisher": ["b.safetensors"]}]}, "fisher of ewc"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint is 'nowhere', which is no folder"),
    ],
)
def test_files_that_are_not_there_are_refused_before_anything_is_imported(rows, options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        train.check({"method": "dpo", "model": "organisation/name", "train": str(rows), **options})


def test_names_and_caches_need_no_file(rows):
    of_method = {"teacher": "start", "cache_dir": "./new"}
    options = {"method": "distill", "model": "organisation/name-v1.5", "train": str(rows), **of_method}
    run, found, row = train.check({**options, "regularizers": [{"name": "l2_sp", "strength": 1}]})
    assert (run.model, found, row) == ("organisation/name-v1.5", of_method, "distill")


def test_option_of_a_newer_transformers_is_looked_up_before_it_is_refused(monkeypatch, rows):
    """As if the table had been written before `seed` was an option."""
    held = table.read()
    without = {name: option for name, option in held["inherited"].items() if name != "seed"}
    options = {"method": "sft", "model": "a/b", "train": str(rows)}
    monkeypatch.setattr(table, "read", lambda: {**held, "inherited": without, "transformers": "5.0.0"})
    assert train.check({**options, "seed": 3})[1] == {"seed": 3}
    with pytest.raises(ConfigError, match="Unknown option 'sead'"):
        train.check({**options, "sead": 3})
    monkeypatch.setattr(table, "read", lambda: {**held, "inherited": without})
    with pytest.raises(ConfigError, match="Unknown option 'seed'"):
        train.check({**options, "seed": 3})


def test_missing_files_are_one_sentence(refused, tmp_path):
    assert "did you mean 'dpo-smollm2'" in refused("train", "dpo-smolm2")
    assert "cannot be read" in refused("dpo", "--config", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(("method", "kind"), [("dpo", "labelled"), ("sft", "pairs"), ("sft", "labelled")])
def test_rows_of_another_method_are_one_sentence(refused, tmp_path, model_dir, write_rows, request, method, kind):
    path = write_rows(tmp_path / "rows.jsonl", request.getfixturevalue(kind))
    assert "The data set is" in refused(method, f"model={model_dir}", f"train={path}", f"output_dir={tmp_path / 'run'}")


def test_data_is_looked_at_before_the_model_is_loaded(refused, tmp_path, tokenizer, labelled, write_rows):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("no weights in here")
    path = write_rows(tmp_path / "rows.jsonl", labelled)
    assert "pairs, with chosen and rejected," in refused(
        "dpo", f"model={tmp_path / 'model'}", f"train={path}", f"output_dir={tmp_path / 'run'}"
    )


def test_optimizer_of_a_package_that_is_not_there_is_said(refused, rows, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    said = refused("dpo", f"model={model_dir}", f"train={rows}", f"output_dir={tmp_path / 'run'}", "optim=adamw_8bit")
    assert "bitsandbytes" in said


# One whole run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model_dir, pairs, write_rows):
    """What `fastalign train` leaves: a YAML file beside its data, two options over it."""
    folder = tmp_path_factory.mktemp("recipe")
    write_rows(folder / "train.jsonl", pairs)
    write_rows(folder / "held_out.jsonl", pairs[:4])
    recipe = {
        "method": "dpo", "title": "A tiny run", "model": str(model_dir), "train": "./train.jsonl",
        "eval": "./held_out.jsonl", "output_dir": str(folder / "run"), "ref_cache_dir": str(folder / "cache"),
        "lora_rank": 2, "samples": 3, "max_new_tokens": 4, "learning_rate": "1e-2", "max_steps": 1,
        "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "tiny.yaml"), "max_steps=3", "beta=0.3"]) == 0
    return folder / "run"


def test_run_folder_is_whole(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "run.json", "metrics.jsonl", "summary.json",
        "preflight.txt", "samples.jsonl", "report.html",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".tmp", ".bin", ".pt", ".pkl"))]


def test_run_keeps_its_options(run_folder):
    config = json.loads((run_folder / "run.json").read_text())
    assert config["beta"] == 0.3 and config["max_steps"] == 3  # the command line wins
    assert config["loss_type"] == ["dpo"] and config["lora_rank"] == 2
    assert config["learning_rate"] == 0.01


def test_run_logs_every_step(run_folder):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[0]["rewards/margins"] == 0.0
    assert steps[2]["rewards/margins"] != 0.0
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 3]
    assert evaluations[0]["eval_rewards/margins"] == evaluations[0]["eval_kl"] == 0.0
    assert evaluations[1]["eval_kl"] > 0.0


def test_run_compares_before_and_after(run_folder, pairs):
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["title"] == "A tiny run"
    rows = {row["metric"]: row for row in summary["rows"]}
    assert rows["Reward margin"]["before"] == 0.0 and rows["Reward margin"]["after"] != 0.0
    assert rows["Mean answer length"]["before"] > 0
    assert {"tokens/s", "peak memory"} <= summary["facts"].keys()
    samples = [json.loads(line) for line in (run_folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == [row["prompt"] for row in pairs[:3]]
    assert all({"before", "after"} <= sample.keys() for sample in samples)


def test_run_writes_its_report_and_preflight(run_folder):
    assert "8 of 8 kept" in (run_folder / "preflight.txt").read_text()
    page = (run_folder / "report.html").read_text()
    assert "A tiny run" in page and "<svg" in page and "8 of 8 kept" in page


def test_adapter_of_a_run_loads(run_folder, tiny_llama):
    model = PeftModel.from_pretrained(tiny_llama(), run_folder)
    assert any(value.any() for name, value in model.state_dict().items() if "lora_B" in name)
