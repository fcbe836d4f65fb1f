"""`fastalign compare`: two runs on the same prompts."""

from __future__ import annotations

import json

from fastalign.cli.main import main


def test_two_models_side_by_side(trained, model_dir, tmp_path, capsys, pairs):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "compared.json"
    rows = [{"prompt": f"[/red] {row['prompt']}\x1b[2J", "answer": "red"} for row in pairs]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "5",
        "--limit",
        "4",
        "--dtype",
        "float32",
        "--out",
        str(out),
    ]
    rules = ["--rule", "shorter", "--rule", "contains:e", "--rule", "answer"]
    assert main(["compare", str(model_dir), str(trained("dpo")), *words, *rules]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "win rate of the second" in said and "[/red]" in said and "\x1b" not in said
    assert [rule["rule"] for rule in found["rules"]] == ["shorter", "contains:e", "answer"]
    assert len(found["answers"]) == 4 and found["answers"][0]["prompt"] == rows[0]["prompt"]
    for rule in found["rules"]:
        verdicts = [row[rule["rule"]] for row in found["answers"]]
        assert [verdicts.count(key) for key in ("first", "second", "tie")] == [
            rule[k] for k in ("first", "second", "ties")
        ]
    capsys.readouterr()
    assert main(["generate", str(trained("dpo")), *words[:4], "--dtype", "float32"]) == 0
    alone = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
    assert [row["second"] for row in found["answers"]] == alone[:4]


def test_a_model_does_not_win_against_itself(trained, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("Name a colour.\n")
    words = ["--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "3", "--out", str(tmp_path / "c.json")]
    assert main(["compare", str(trained("sft")), str(trained("sft")), *words]) == 0
    (rule,) = json.loads((tmp_path / "c.json").read_text())["rules"]
    assert (rule["ties"], rule["win_rate"], rule["p_value"]) == (1, 0.5, 1.0)


def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(refused, tmp_path):
    (tmp_path / "p.txt").write_text("Name a colour.\n")
    words = ("compare", "nowhere/a", "nowhere/b", "--prompts", tmp_path / "p.txt")
    assert "did you mean 'shorter'" in refused(*words, "--rule", "shortr")
    assert "column `answer`" in refused(*words, "--rule", "answer")
    assert "limit is 0" in refused(*words, "--limit", 0)
