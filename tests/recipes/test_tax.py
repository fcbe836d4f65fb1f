"""The comparison of what holds the tax down: its text is split, its runs are told apart, its report is whole."""

from __future__ import annotations

import json
from pydoc_data.topics import topics

from fastalign.recipes.tax.compare import RUNS, report, split_topics, spread


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
