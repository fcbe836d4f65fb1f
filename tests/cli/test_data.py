"""`fastalign data check`."""

from __future__ import annotations

import json

from fastalign.cli.main import main
from fastalign.config.preference import PreferenceConfig


def test_data_check_prints_the_preflight_report(capsys, rows, model_dir):
    assert main(["data", "check", str(rows), "--model", str(model_dir)]) == 0
    text = capsys.readouterr().out
    assert "8 of 8 kept" in text and "end of sequence" in text


def test_data_check_cuts_where_training_would(capsys, tmp_path, model_dir, pairs, write_rows):
    path = write_rows(tmp_path / "rows.jsonl", [*pairs, {**pairs[0], "prompt": "long " * 300}])
    assert main(["data", "check", str(path), "--model", str(model_dir)]) == 0
    text = capsys.readouterr().out
    assert "8 of 9 kept" in text and f"max_length {PreferenceConfig().max_length:,}" in text


def test_data_check_names_the_damaged_line(refused, tmp_path, model_dir):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half\n{"text": "fine"}\n')
    said = refused("data", "check", path, "--model", model_dir)
    assert str(path) in said and "line 2" in said


def test_data_check_of_chat_rows_without_template_says_so(refused, tmp_path, tokenizer, write_rows):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (tmp_path / "model" / "model.safetensors").touch()
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "a"},
                                                              {"role": "assistant", "content": "b"}]}])  # fmt: skip
    assert "chat template" in refused("data", "check", path, "--model", tmp_path / "model")


def test_data_check_shows_what_is_scored_and_writes_the_rows(capsys, tmp_path, model_dir, write_rows):
    user, answer = {"from": "human", "value": "Name a [bold]colour."}, {"from": "gpt", "value": "Red."}
    path = write_rows(tmp_path / "rows.jsonl", [{"talk": [user, answer, user, answer]}] * 3)
    out = tmp_path / "out.jsonl"
    words = (
        "data",
        "check",
        path,
        "--model",
        model_dir,
        "--columns",
        "messages=talk",
        "--out",
        out,
        "--for",
        "completions",
    )
    assert main([*map(str, words)]) == 0
    text = capsys.readouterr().out
    assert text.count("\nRow ") == 2 and "what is scored is in [[ ]]" in text
    assert "completion: [[Red.<|im_end|>]]\n<|im_start|>user\nName a [bold]colour.<|im_end|>" in text
    assert f"3 rows written to {out}" in text
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"messages": [user, answer, user, answer]}] * 3
    assert main(["data", "check", str(out), str(out), "--model", str(model_dir), "--rows", "0"]) == 0
    text = capsys.readouterr().out
    assert "6 of 6 kept" in text and "Row 1" not in text


def test_data_check_refuses_rows_for_another_use_and_bad_words(refused, rows, model_dir):
    assert "text, messages, or prompt" in refused("data", "check", rows, "--model", model_dir, "--for", "completions")
    assert "FIELD=COLUMN" in refused("data", "check", rows, "--model", model_dir, "--columns", "prompt")
    assert "name a .jsonl file" in refused("data", "check", rows, "--model", model_dir, "--out", "a.csv")


def test_items_of_a_suite_among_the_rows(tmp_path, write_rows, model_dir, capsys):
    question = "How many windows did the old traveller from the north count in the seven streets of that little town?"
    rows = [{"prompt": question.upper(), "completion": "Many."}, {"prompt": "Another one.", "completion": "No."}]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "suite.jsonl", [{"id": "a", "prompt": question, "answer": "7"}])
    command = ["data", "check", str(tmp_path / "rows.jsonl"), "--model", str(model_dir), "--rows", "0", "--against"]
    assert main([*command, str(tmp_path / "suite.jsonl")]) == 1
    assert "verbatim: item a in row 1" in capsys.readouterr().out
    assert main([*command, "formats"]) == 0
    assert "Not contaminated" in capsys.readouterr().out
