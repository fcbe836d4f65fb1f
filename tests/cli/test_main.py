"""The command line, in this process: what it prints, its exit status, and what one whole tiny run leaves behind."""

from __future__ import annotations

import json
import platform
import re

import pytest
import torch
import yaml
from peft import PeftModel

from fastalign import __version__
from fastalign.cli import main
from fastalign.cli.run import RunOptions
from fastalign.config.preference import PreferenceConfig
from fastalign.data.text import text_windows
from fastalign.fisher.diagonal import fisher_diagonal
from fastalign.fisher.storage import Fisher
from fastalign.models.loading import load_model, load_tokenizer
from fastalign.ops.backends import cpu


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path, pairs):
    return write_rows(tmp_path / "pairs.jsonl", pairs)


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail, and returns the one sentence it says."""

    def refused(*argv) -> str:
        assert main.main([str(item) for item in argv]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fastalign: "), captured.err
        return lines[0]

    return refused


# Help


def shown(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        main.main(list(argv))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_commands_and_an_example(capsys):
    text = shown(capsys, "--help")
    for word in ("dpo", "sft", "train", "data", "info", "fastalign train dpo-smollm2", "key=value"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_of_a_method_lists_every_option_of_ours(capsys):
    text = shown(capsys, "dpo", "--help")
    listed = {line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.split()}
    inherited = set(PreferenceConfig.__mro__[2].__dataclass_fields__)
    ours = {name for name in PreferenceConfig.__dataclass_fields__ if name not in inherited}
    assert {"beta", "loss_type", "on_truncate", "share_prompts"} <= ours
    assert ours | set(RunOptions.__dataclass_fields__) | {"learning_rate", "output_dir"} <= listed
    assert "num_train_epochs" in text
    assert "beta" not in shown(capsys, "sft", "--help").split("options of the method")[1]


def test_version(capsys):
    assert shown(capsys, "--version").split() == ["fastalign", __version__]


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["dop"])
    assert stopped.value.code == 2
    assert "dop" in capsys.readouterr().err


def test_every_loss_is_a_command(capsys):
    assert {"sft", "dpo", "ipo", "orpo", "simpo", "kto", "bco", "sigmoid"} <= set(main.methods())
    assert "beta" in shown(capsys, "discopop", "--help")


# One command each


def test_info_says_what_is_in_use(capsys):
    assert main.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (__version__, "torch", "transformers", "native module"):
        assert word in text
    found = cpu.describe()
    kernels = next(line for line in text.splitlines() if line.startswith("cpu kernels"))
    assert kernels.split()[2] == f"{found['isa']}," and f"{torch.get_num_threads()} threads of torch" in kernels
    assert f"{found['vector_bits']}-bit vectors" in kernels
    assert ("BRGEMM in use" in kernels) == (found["isa"] == "avx512_bf16")
    module = next(line for line in text.splitlines() if line.startswith("native module"))
    assert "without" not in module, "this compiler takes the flags of every instruction set"


def test_info_of_kernels_that_were_not_chosen(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "_brgemm", True)  # as on a machine with AMX
    cpu.select("plain")
    try:
        assert main.main(["info"]) == 0
    finally:
        cpu.select(None)
    assert re.search(r"^cpu kernels +plain, .* BRGEMM there, but not used", capsys.readouterr().out, re.M)


def test_info_names_the_kernels_that_were_not_compiled(capsys, monkeypatch):
    found = cpu.describe() | {"kernels_compiled": ["avx2", "plain"]}
    monkeypatch.setattr(cpu, "describe", lambda: found)
    for machine, said in (("x86_64", "avx2, plain; without avx512_bf16, avx512,"), ("aarch64", "avx2, plain\n")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert main.main(["info"]) == 0
        assert said in capsys.readouterr().out


def test_data_check_prints_the_preflight_report(capsys, rows, model_dir):
    assert main.main(["data", "check", str(rows), "--model", str(model_dir)]) == 0
    text = capsys.readouterr().out
    assert "8 of 8 kept" in text and "end of sequence" in text


def test_data_check_cuts_where_training_would(capsys, tmp_path, model_dir, pairs):
    path = write_rows(tmp_path / "rows.jsonl", [*pairs, {**pairs[0], "prompt": "long " * 300}])
    assert main.main(["data", "check", str(path), "--model", str(model_dir)]) == 0
    text = capsys.readouterr().out
    assert "8 of 9 kept" in text and f"max_length {PreferenceConfig().max_length:,}" in text


def test_data_check_names_the_damaged_line(refused, tmp_path, model_dir):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half\n{"text": "fine"}\n')
    said = refused("data", "check", path, "--model", model_dir)
    assert str(path) in said and "line 2" in said


def test_data_check_of_chat_rows_without_template_says_so(refused, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (tmp_path / "model" / "model.safetensors").touch()
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "a"},
                                                              {"role": "assistant", "content": "b"}]}])  # fmt: skip
    assert "chat template" in refused("data", "check", path, "--model", tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "expected", "squared"),
    [
        ([], {}, "windows"),
        (["--per", "token"], {"per": "token"}, "tokens"),
        (["--estimator", "sampled", "--seed", "3"], {"estimator": "sampled", "seed": 3}, "windows"),
        (["--estimator", "batch"], {"estimator": "batch"}, "batches"),
    ],
)
def test_fisher_is_told_what_fisher_diagonal_takes(capsys, tmp_path, model_dir, options, expected, squared):
    rows, out = write_rows(tmp_path / "rows.jsonl", [{"text": "Some text."}, {"text": "More."}]), tmp_path / "fisher"
    assert main.main(["fisher", str(model_dir), "--text", str(rows), "--out", str(out), *options]) == 0
    tokenizer = load_tokenizer(model_dir)
    made = fisher_diagonal(load_model(model_dir, for_adapter=False), text_windows(str(rows), tokenizer), **expected)
    found = Fisher.load(out)
    assert found.per == made.per and all(torch.equal(found[name], values) for name, values in made.items())
    assert f"from {made.samples} {squared} written" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- model\n- train\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("1: 2\n", "must be a mapping"),
        ("model: [half\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        ("method: dpo\nbetta: 0.1\n", "did you mean 'beta'?"),
        ("model: x\ntrain: y\n", "method is None"),
        ("method: dpo\ntrain: y\n", "model is missing"),
    ],
)
def test_bad_files_are_one_sentence(refused, tmp_path, content, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused("train", path)


def test_no_is_a_strategy_although_yaml_reads_it_as_false(refused, model_dir):
    said = refused("dpo", f"model={model_dir}", "train=nowhere.jsonl", "save_strategy=no", "logging_strategy=no")
    assert "nowhere.jsonl is not a file" in said


def test_run_folder_that_cannot_be_made_is_said_before_loading(refused, rows, tmp_path):
    said = refused("dpo", "model=./nowhere", f"train={rows}", f"output_dir={rows}")
    assert "output_dir" in said and "File exists" in said


def test_command_says_the_method_not_its_file(refused, tmp_path, model_dir, rows):
    path = tmp_path / "run.yaml"
    path.write_text(f"method: dpo\nmodel: {model_dir}\ntrain: ./{rows.name}\n")
    assert "KTO and BCO need" in refused("kto", "--config", path, f"output_dir={tmp_path / 'run'}")


def test_missing_files_are_one_sentence(refused, tmp_path):
    assert "dpo-smollm2" in refused("train", "dpo-smolm2")
    assert "cannot be read" in refused("dpo", "--config", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(("method", "kind"), [("dpo", "labelled"), ("kto", "pairs"), ("sft", "pairs")])
def test_rows_of_another_method_are_one_sentence(refused, tmp_path, model_dir, request, method, kind):
    path = write_rows(tmp_path / "rows.jsonl", request.getfixturevalue(kind))
    assert "The data set is" in refused(method, f"model={model_dir}", f"train={path}", f"output_dir={tmp_path / 'run'}")


def test_data_is_looked_at_before_the_model_is_loaded(refused, tmp_path, tokenizer, labelled):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("no weights in here")
    path = write_rows(tmp_path / "rows.jsonl", labelled)
    assert "needs chosen and rejected" in refused(
        "dpo", f"model={tmp_path / 'model'}", f"train={path}", f"output_dir={tmp_path / 'run'}"
    )


def test_optimizer_of_a_package_that_is_not_there_is_said(refused, rows, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    said = refused("dpo", f"model={model_dir}", f"train={rows}", f"output_dir={tmp_path / 'run'}", "optim=adamw_8bit")
    assert "bitsandbytes" in said


# One whole run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model_dir, pairs):
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
    assert main.main(["train", str(folder / "tiny.yaml"), "max_steps=3", "beta=0.3"]) == 0
    return folder / "run"


def test_run_folder_is_whole(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "config.json", "metrics.jsonl", "summary.json",
        "preflight.txt", "samples.jsonl", "report.html",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".tmp", ".bin", ".pt", ".pkl"))]


def test_run_keeps_its_options(run_folder):
    config = json.loads((run_folder / "config.json").read_text())
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
