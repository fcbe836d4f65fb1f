"""`fastalign fisher`."""

from __future__ import annotations

import pytest
import torch

from fastalign.cli.main import main
from fastalign.data.text import text_windows
from fastalign.fisher.diagonal import fisher_diagonal
from fastalign.fisher.storage import Fisher
from fastalign.models.loading import load_model, load_tokenizer


@pytest.mark.parametrize(
    ("options", "expected", "squared"),
    [
        ([], {}, "windows"),
        (["--per", "token"], {"per": "token"}, "tokens"),
        (["--estimator", "sampled", "--seed", "3"], {"estimator": "sampled", "seed": 3}, "windows"),
        (["--estimator", "batch"], {"estimator": "batch"}, "batches"),
    ],
)
def test_fisher_is_told_what_fisher_diagonal_takes(capsys, tmp_path, model_dir, write_rows, options, expected, squared):
    rows, out = write_rows(tmp_path / "rows.jsonl", [{"text": "Some text."}, {"text": "More."}]), tmp_path / "fisher"
    assert main(["fisher", str(model_dir), "--text", str(rows), "--out", str(out), *options]) == 0
    tokenizer = load_tokenizer(model_dir)
    made = fisher_diagonal(load_model(model_dir, for_adapter=False), text_windows(str(rows), tokenizer), **expected)
    found = Fisher.load(out)
    assert found.per == made.per and all(torch.equal(found[name], values) for name, values in made.items())
    shown = capsys.readouterr()
    assert f"from {made.samples} {squared} written" in shown.out
    assert "fisher: 100%" in shown.err or "fisher:   0%" in shown.err


@pytest.mark.parametrize("options", [["--length", "1"], ["--bits", "16"]])
def test_bad_numbers_are_refused_before_anything_is_loaded(refused, options):
    assert options[1] in refused("fisher", "./nowhere", "--text", "nowhere.txt", "--out", "x", *options)
