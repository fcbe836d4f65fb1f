"""Names of files in run.json."""

from __future__ import annotations

from fastalign.config.record import absolute, method_of_losses


def test_what_exists_is_named_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    found = absolute([{"path": "a.jsonl", "weight": 2}, "gone.jsonl", 3, None])
    assert found == [{"path": str(tmp_path / "a.jsonl"), "weight": 2}, "gone.jsonl", 3, None]


def test_the_nll_of_chosen_answers_names_no_method():
    assert method_of_losses(["sft", "dpo"]) == "dpo"
