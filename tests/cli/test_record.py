"""`fastalign train RUN/run.json` repeats a run."""

from __future__ import annotations

import json
import shutil

import pytest

from fastalign.cli.main import main
from fastalign.cli.record import read_record, run_record
from fastalign.cli.run_options import RunOptions
from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError
from fastalign.files import read_metrics


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_a_run_is_repeated_to_its_numbers(trained, name, tmp_path, monkeypatch):
    folder = shutil.copytree(trained(name), tmp_path / name)
    monkeypatch.chdir(tmp_path)  # from another place
    assert main(["train", f"{name}/run.json"]) == 0
    again = tmp_path / f"{name}-2"
    first, second = (
        [line["loss"] for line in read_metrics(f / "metrics.jsonl") if "loss" in line] for f in (folder, again)
    )
    assert first == second and len(first) == 12
    weights = "adapter_model.safetensors" if name == "dpo" else "model/model.safetensors"
    assert (again / weights).read_bytes() == (folder / weights).read_bytes()
    records = [json.loads((f / "run.json").read_text()) for f in (folder, again)]
    assert {key for key in records[0] if records[0][key] != records[1].get(key)} == {"output_dir"}
    assert read_record(folder / "run.json")["output_dir"] == str(tmp_path / f"{name}-3")


def test_options_of_the_command_line_win(trained, tmp_path):
    folder = shutil.copytree(trained("sft"), tmp_path / "run")
    assert main(["train", str(folder / "run.json"), "max_steps=1", f"output_dir={tmp_path / 'short'}"]) == 0
    assert json.loads((tmp_path / "short" / "run.json").read_text())["max_steps"] == 1


def test_tokens_are_not_kept(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), hub_token="hf_secret", use_cpu=True)
    record = run_record(RunOptions(model="a/b", train="rows.jsonl"), config)
    assert "hf_secret" not in json.dumps(record, default=str)
    (tmp_path / "run.json").write_text(json.dumps(record, default=str))
    assert "hub_token" not in read_record(tmp_path / "run.json")


def test_what_cannot_be_repeated_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"method": "dop", "train": "a"}')
    with pytest.raises(ConfigError, match="did you mean 'dpo'"):
        read_record(path)
    path.write_text('{"method": "dpo", "train": null}')
    with pytest.raises(ConfigError, match="given in memory"):
        read_record(path)


def test_every_file_is_named_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    run = RunOptions(model="a/b", train=[{"path": "a.jsonl", "weight": 2}, "gone.jsonl"], eval={"held": "a.jsonl"})
    record, whole = run_record(run, SFTConfig(output_dir="run", use_cpu=True)), str(tmp_path / "a.jsonl")
    assert record["train"] == [{"path": whole, "weight": 2}, "gone.jsonl"]
    assert (record["eval"], record["model"]) == ({"held": whole}, "a/b")
