"""Tables and plots from JSON alone."""

from __future__ import annotations

from dataclasses import replace

from bench import report
from bench.measure import Measurement, load, save

FASTEST = Measurement(
    suite="ops", case="frozen-float32-4x2x8-mask0", sizes={"n": 4, "h": 2, "v": 8}, implementation="2 matrix products",
    median_s=0.1, q1_s=0.1, q3_s=0.1, runs=3, peak_extra_bytes=5 << 20, errors={"products": 1e-7}, checked="all rows",
    device="A CPU", threads=2, load=0.0, versions={"torch": "2.13"}, commit="abc", date="2026-01-01T00:00:00Z",
)  # fmt: skip
SLOWER = replace(
    FASTEST, implementation="eager", median_s=2.5, q1_s=2.0, q3_s=3.0, errors={"logprobs": 2e-6}, peak_extra_bytes=None
)


def wider(m: Measurement) -> Measurement:
    return replace(m, case=m.case.replace("x8", "x16"), sizes=m.sizes | {"v": 16})


def test_a_table_is_made_from_json(tmp_path):
    save([SLOWER, FASTEST, wider(SLOWER)], tmp_path / "ops.json")
    text = report.tables(load(tmp_path / "ops.json"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == list(report.HEADER)
    assert rows[2] == ["2 matrix products", "100 ms", "100 ms - 100 ms", "1.00", "5 MiB", "products 1.0e-07"]
    assert rows[3] == ["eager", "2.50 s", "2.00 s - 3.00 s", "25.00", "-", "logprobs 2.0e-06"]
    assert rows[6][:4] == ["eager", "2.50 s", "2.00 s - 3.00 s", "-"], "another case's floor is not this one's"
    assert "checked: all rows. A CPU, 2 threads, load 0.0 before. torch 2.13; commit abc, 2026-01-01" in text
    assert text.count("### ops: ") == 2


def test_columns_line_up():
    lines = [line for line in report.tables([FASTEST, SLOWER]).splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1


def test_memory_is_drawn_where_there_are_two_vocabularies(tmp_path):
    assert report.memory_plots([FASTEST]) == {}
    other = replace(FASTEST, case="forward-float32-4x2x8-mask0")
    written = report.write([FASTEST, wider(FASTEST), other], tmp_path, "ops")
    assert [path.name for path in written] == ["ops.md", "ops-memory-frozen-float32-4x2-mask0.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
