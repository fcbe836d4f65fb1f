"""Tables, and all that is made of a folder of results, from JSON alone."""

from __future__ import annotations

import pytest

from bench import __main__ as bench
from bench.harness.measure import load, save
from bench.pages import report


@pytest.fixture
def floor(record):
    return record(implementation="2 matrix products", median_s=0.1, errors={"products": 1e-7})


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_table_is_made_from_json(record, floor, tmp_path):
    slow = record(median_s=2.5, q1_s=2.0, q3_s=3.0, errors={"logprobs": 2e-6}, peak_extra_bytes=None)
    other = record(case="frozen-float32-4x2x16-mask0")
    save([slow, floor, other], tmp_path / "ops.json")
    text = report.tables(load(tmp_path / "ops.json"))
    rows = cells(text)
    assert rows[0] == list(report.HEADER)
    assert rows[2] == ["2 matrix products", "100 ms", "100 ms - 100 ms", "1.00", "5 MiB", "products 1.0e-07"]
    assert rows[3] == ["eager", "2.50 s", "2.00 s - 3.00 s", "25.00", "-", "logprobs 2.0e-06"]
    assert rows[6][3] == "-", "another case's floor is not this one's"
    assert "all rows. A CPU, 2 cores, AVX2, 2 threads, load 0.0 before. torch 2.13; commit abc, 2026-01-01" in text
    assert text.count("### ops: ") == 2


def test_what_was_not_measured_is_named_below_the_table(record):
    text = report.tables([record(skipped={"Liger": "No module named 'liger_kernel'", "slow": "about 30 s a run."})])
    end = " Not measured: Liger: No module named 'liger_kernel'. Not measured: slow: about 30 s a run.\n"
    assert text.endswith("2026-01-01T00:00:00Z." + end)


def test_training_is_counted_in_pairs_and_tokens(trained):
    theirs = trained(implementation="TRL", median_s=8.0, sizes={"reference_us": 0})
    rows = cells(report.tables([theirs, trained()]))
    assert rows[0] == list(report.TRAIN_HEADER)
    assert rows[2] == ["fastalign", "2.000", "500", "50%", "2.00 s", "500 ms of it", "3.00 GiB", "1.0e-05"]
    assert "Losses" not in report.tables([trained()]), "records of before they were kept have none"
    curves = report.tables([trained(losses=[0.69315, 0.5]), trained(implementation="TRL", losses=[0.693149, 0.50001])])
    assert " Losses: fastalign 0.69315 0.50000; TRL 0.69315 0.50001.\n" in curves
    assert rows[3] == ["TRL", "0.500", "125", "12%", "8.00 s", "within", "3.00 GiB", "1.0e-05"]


def test_a_curve_keeps_its_order_and_tells_its_power(curve):
    text = report.tables(curve(points=(4, 1, 2)))
    rows = cells(text)
    assert rows[0] == list(report.SCALE_HEADER)
    assert [row[0] for row in rows[2:]] == ["n = 4", "n = 1", "n = 2"]
    assert rows[2][1:] == ["800 ms", "800 ms - 800 ms", "logprobs 1.0e-06"]
    assert "Time grows with the power 1.50." in text and "1 thread," in text


def test_a_gather_is_held_against_the_copy(record):
    sizes = {"n": 4, "bytes": 3 * 10**9, "copy_bytes_per_s": 20 * 10**9}
    rows = cells(report.tables([record(suite="selective", case="backward", sizes=sizes)]))
    assert rows[0] == list(report.GATHER_HEADER)
    assert rows[2] == ["eager", "200 ms", "200 ms - 200 ms", "15.0", "75%", "5 MiB", "logprobs 1.0e-06"]


def test_columns_line_up(record, floor, trained, curve):
    for measured in ([floor, record()], [trained()], curve()):
        lines = [line for line in report.tables(measured).splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1


def test_everything_is_written_beside_the_results_and_nothing_else(record, curve, tmp_path):
    wide = record(case="frozen-float32-4x2x16-mask0", sizes={"n": 4, "h": 2, "v": 16, "mask": 0})
    written = report.everything([record(), wide, *curve()], tmp_path)
    assert [path.name for path in written] == ["memory-frozen-float32-4x2-mask0.png", "curves.png", "report.html"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    page = written[-1].read_text(encoding="utf-8")
    assert page.count("<table>") == 3 and page.count("data:image/png;base64,") == 2
    assert "scale: n-1-thread" in page and "ops: frozen-float32-4x2x16-mask0" in page


def test_a_report_has_the_tables_of_every_suite(record, curve, tmp_path, capsys):
    save([record()], tmp_path / "ops.json")
    save(curve(), tmp_path / "scale.json")
    (tmp_path / "ops.md").write_text("of an earlier run")
    bench.make_report(tmp_path)
    assert (tmp_path / "ops.md").read_text() == report.tables([record()])
    assert (tmp_path / "scale.md").read_text() == report.tables(curve())
    written = {"ops.json", "scale.json", "ops.md", "scale.md", "curves.png", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == written
    assert "ops.md" in capsys.readouterr().out


def test_without_results_there_is_no_report(tmp_path):
    with pytest.raises(SystemExit, match="there are no results"):
        bench.make_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
