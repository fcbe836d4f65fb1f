"""`fastalign reward`, then `fastalign score` with what it left."""

from __future__ import annotations

import json

import pytest

from fastalign.cli.main import main


@pytest.fixture(scope="module")
def run(model_dir, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    rows = folder / "pairs.jsonl"
    rows.write_text("".join(json.dumps({**row, "margin": 0.1}) + "\n" for row in pairs))
    words = [
        "reward", f"model={model_dir}", f"train={rows}", f"eval={rows}", f"output_dir={folder / 'run'}", "max_steps=2",
        "use_cpu=true", "disable_tqdm=true", "lora_rank=4", "learning_rate=0.01", "dtype=float32",
    ]  # fmt: skip
    assert main(words) == 0
    return folder / "run", rows


def test_a_run_is_scored(run, capsys, tmp_path):
    folder, rows = run
    assert (folder / "report.html").is_file() and (folder / "model" / "model.safetensors").is_file()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == "reward model" and not (folder / "samples.jsonl").exists()
    capsys.readouterr()
    assert main(["score", str(folder), "--data", str(rows), "--out", str(tmp_path / "scores.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "8 of 8 rows scored" in printed and "the chosen answer has the higher score (8 pairs)" in printed
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(len(line["scores"]) == len(line["completions"]) == 2 for line in lines)
    shown = float(printed.split("%")[0].split()[-1])
    right = sum((line["scores"][0] > line["scores"][1]) for line in lines)
    assert shown == 100 * right / 8


def test_completions_alone_have_scores_too(run, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "cd"}\n')
    assert main(["score", str(run[0] / "model"), "--data", str(tmp_path / "rows.jsonl")]) == 0
    assert "score: mean" in capsys.readouterr().out


def test_a_language_model_is_refused(model_dir, run, capsys):
    assert main(["score", str(model_dir), "--data", str(run[1])]) == 2
    assert "holds no reward model" in capsys.readouterr().err
