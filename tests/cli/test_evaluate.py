"""`fastalign eval`."""

from __future__ import annotations

import json

from fastalign.cli.main import main


def test_a_suite_is_measured_and_every_item_kept(capsys, model_dir, tmp_path):
    suite, out = tmp_path / "mine.jsonl", tmp_path / "eval.json"
    rows = [{"prompt": "x", "choices": ["a", "b"], "label": i % 2, "category": f"c{i % 2}"} for i in range(4)]
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", str(model_dir), "--suite", str(suite), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "mine" in text and "c1" in text and "50.0%" in text
    found = json.loads(out.read_text())
    assert [item["correct"] for item in found["items"]].count(True) == 2
    assert found["items"][0].keys() >= {"suite", "id", "category", "correct", "logprobs"}


def test_mistakes(refused, tmp_path):
    assert "There is no suite" in refused("eval", "./nowhere", "--suite", "nothing")
    assert "limit is 0" in refused("eval", "./nowhere", "--suite", "knowledge", "--limit", "0")
    assert "--suite" in refused("eval", "./nowhere")
