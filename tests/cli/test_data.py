"""`fastalign data check`."""

from __future__ import annotations

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
