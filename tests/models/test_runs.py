"""Which folder of a run holds its model. Real runs are loaded in tests/cli/test_generate.py."""

from __future__ import annotations

import pytest

from fastalign.errors import ModelError
from fastalign.models.runs import model_folder


def test_a_run_s_model_its_newest_checkpoint_or_a_sentence(tmp_path, model_dir):
    assert model_folder("organisation/name") == "organisation/name"
    assert model_folder(model_dir) == model_dir
    assert model_folder(tmp_path) == tmp_path  # no run: whoever loads it says what is wrong
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="has left no model"):
        model_folder(tmp_path)
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":  # which was not written to its end
            (tmp_path / name / "adapter_model.safetensors").touch()
    assert model_folder(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    assert model_folder(tmp_path) == tmp_path / "model"
