"""The comparison of what holds the tax down: its text is split, its runs are told apart, its report is whole."""

from __future__ import annotations

import json
import math
import sys
from pydoc_data.topics import topics

import pytest

from fastalign.fisher.storage import Fisher
from fastalign.recipes.tax import compare
from fastalign.recipes.tax.compare import RUNS, Run, report, split_topics, spread
from fastalign.regularizers.layerwise import LayerWise


def test_text_that_is_measured_is_seen_by_no_method():
    seen, measured = ([row["text"] for row in part] for part in split_topics())
    assert len(seen) + len(measured) == len(set(topics.values()))
    assert not set(seen) & set(measured)
    assert sum(map(len, measured)) > 100_000


def test_rows_are_spread_over_all():
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread([1, 2], 5) == [1, 2]


def test_runs_have_names_of_their_own():
    assert len({run.name for run in RUNS}) == len(RUNS)
    assert all(sum(other.method == run.method for other in RUNS) >= 2 for run in RUNS)


@pytest.fixture
def small(monkeypatch, tiny_llama, tokenizer, tmp_path):
    """The comparison at the size of a test: a tiny model that reads bytes, few rows and steps, one run a method."""
    model = tiny_llama()
    model.config.max_position_embeddings = 4096  # rotary: nothing else depends on it
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"STEPS": 3, "ROWS_A_STEP": 2, "HELD_OUT_PAIRS": 3, "TAX_WINDOWS": 2, "FISHER_WINDOWS": 3, "WINDOW": 64}
    runs = [
        *(next(run for run in RUNS if run.method == name) for name in ("plain", "ewc", "distillation", "replay")),
        Run("layer-wise", "2", lambda setting: [LayerWise([1, 2])]), Run("plain", "again", lambda setting: []),
    ]  # fmt: skip
    for name, value in {"MODEL": str(tmp_path / "model"), "RUNS": runs, **sizes}.items():
        monkeypatch.setattr(compare, name, value)
    monkeypatch.setattr(compare, "topics", {name: topics[name] for name in sorted(topics)[:9]})
    return tmp_path / "out"


def test_every_method_is_run_from_the_same_start(small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", "--out", str(small)])
    compare.main()
    results = {path.stem: json.loads(path.read_text()) for path in (small / "runs").iterdir()}
    assert sorted(results) == ["distillation-0.5", "ewc-1", "layer-wise-2", "plain-1", "plain-again", "replay-0.2"]
    taxes = {name: result["tax"] for name, result in results.items()}
    assert taxes["plain-again"] == taxes["plain-1"]  # whatever was run between
    assert len({tax["base_perplexity"] for tax in taxes.values()}) == 1
    assert len({tax["kl_mean"] for tax in taxes.values()}) == 5 and all(tax["kl_mean"] > 0 for tax in taxes.values())
    first = {name: result["log"][0]["loss"] for name, result in results.items()}
    assert first["plain-1"] == first["ewc-1"] == first["layer-wise-2"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["distillation-0.5"] == pytest.approx(0.5 * math.log(2), rel=1e-5)
    assert results["plain-1"]["fisher_distance"] > 0 and Fisher.load(small / "fisher.safetensors").samples == 3
    assert len((small / "tax.md").read_text().splitlines()) == 2 + 6
    before = {path: path.stat().st_mtime_ns for path in (small / "runs").iterdir()}
    compare.main()  # what is done is kept
    assert before == {path: path.stat().st_mtime_ns for path in (small / "runs").iterdir()}


def test_report_is_made_from_the_runs_that_are_done(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    for number, run in enumerate(RUNS[:5]):
        result = {
            "method": run.method, "strength": run.strength, "accuracy": 0.9, "margin": 1.5 + number, "seconds": 60.0,
            "tax": {"kl_mean": 0.25 / (number + 1), "base_perplexity": 20.0, "tuned_perplexity": 30.0},
        }  # fmt: skip
        (tmp_path / "runs" / f"{run.name}.json").write_text(json.dumps(result))
    report(tmp_path)
    table = (tmp_path / "tax.md").read_text().splitlines()
    assert len(table) == 2 + 5 and len({len(line) for line in table}) == 1
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == [
        "plain",
        "1",
        "0.250",
        "20.0 to 30.0",
        "90",
        "1.50",
        "60",
    ]
    assert len(json.loads((tmp_path / "tax.json").read_text())["runs"]) == 5
    assert (tmp_path / "tax.png").read_bytes().startswith(b"\x89PNG")
