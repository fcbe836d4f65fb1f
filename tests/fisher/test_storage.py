"""Fisher information in files, and added up over several."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.fisher.diagonal import fisher_diagonal
from fastalign.fisher.storage import Fisher


def test_files_keep_32_bits_exactly(tiny_llama, tmp_path):
    rows = [{"prompt_ids": [5, 6], "completion_ids": [[7, 8, 2], [9]]}, {"prompt_ids": [3], "completion_ids": [[2]]}]
    fisher = fisher_diagonal(tiny_llama(), rows, estimator="sampled")
    fisher.save(tmp_path / "new" / "fisher.safetensors")
    found = Fisher.load(tmp_path / "new" / "fisher.safetensors")
    assert found.keys() == fisher.keys() and all(torch.equal(found[n], v) for n, v in fisher.items())
    assert (found.samples, found.estimator, found.per) == (3, "sampled", "sequence")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["fisher.safetensors"]


def test_files_of_8_bits(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = torch.exp(8 * torch.randn(37, 61, generator=generator))  # over thirty octaves
    fisher = Fisher({"w": values, "empty": torch.zeros(0), "norm": values[0]}, samples=3)
    fisher.save(tmp_path / "f", bits=8)
    found = Fisher.load(tmp_path / "f")
    assert found.keys() == fisher.keys() and found.samples == 3
    assert torch.equal(found["norm"], values[0]) and found["empty"].shape == (0,)
    budget = torch.maximum(0.034 * values, 6e-8 * values.amax(1, keepdim=True))
    assert ((found["w"] - values).abs() <= budget).all()
    assert (tmp_path / "f").stat().st_size < values.numel() * 1.1 + 1500
    for bits in (8, 32):  # what is in 8 bits stays as it is
        found.save(tmp_path / "again", bits=bits)
        assert torch.equal(Fisher.load(tmp_path / "again")["w"], found["w"])


def test_online_merging():
    old = Fisher({"a": torch.tensor([1.0, 2.0])}, samples=3)
    merged = old.merged(Fisher({"a": torch.tensor([10.0, 20.0])}, samples=4), decay=0.5)
    assert merged["a"].tolist() == [10.5, 21.0] and merged.samples == 7 and old["a"].tolist() == [1.0, 2.0]
    with pytest.raises(ModelError, match=r"1 parameters \(b, ...\) are in one"):
        old.merged({"a": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"a is \(2,\) in one Fisher information and \(3,\) in the other"):
        old.merged({"a": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"decay is 1\.5"):
        old.merged(old, decay=1.5)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        Fisher.load(tmp_path / "none")
    (tmp_path / "torn").write_bytes(b"12345678{")
    with pytest.raises(DataError, match="not a readable safetensors file"):
        Fisher.load(tmp_path / "torn")
    with pytest.raises(ConfigError, match="bits is 4"):
        Fisher().save(tmp_path / "f", bits=4)
    assert not (tmp_path / "f").exists()
