"""Tables in README and in the documentation: between their markers, from the records alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness.measure import load
from bench.pages import readme

OP = "frozen-float32-2048x576x49152-mask0"
SIZES = {"n": 2048, "h": 576, "v": 49152, "mask": 0}


@pytest.fixture
def measured(record, trained):
    named = {"fastalign cpu": 1.25, "TRL chunked_logprob": 5.0, "2 matrix products": 1.11}
    ops = [record(case=OP, sizes=SIZES, implementation=name, median_s=s) for name, s in named.items()]
    steps = [
        trained(median_s=2.0),
        trained(implementation="TRL", median_s=16.0, sizes={"resident_bytes": 6 << 30}),
        trained(implementation="TRL, no checkpointing", median_s=13.0, sizes={"resident_bytes": 9 << 30}),
    ]
    return ops + steps


@pytest.fixture
def files(tmp_path, monkeypatch):
    """README, docs/benchmarks.md and the page with the tax table, with old figures between the markers."""
    results = f"before 1.23\n{readme.BEGIN}\nold 4.56\n{readme.END}\nafter 7.89\n"
    texts = {
        "README": results, "BENCHMARKS": results, "ABILITIES": f"{readme.TAX_BEGIN}old 0.12{readme.TAX_END}\nafter\n",
    }  # fmt: skip
    for name, text in texts.items():
        path = tmp_path / f"{name}.md"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(readme, name, path)
    return {name: tmp_path / f"{name}.md" for name in texts}


def read(path):
    return path.read_text(encoding="utf-8")


def test_what_is_between_the_markers_is_replaced(measured, files):
    readme.update(measured)
    texts = {name: read(path) for name, path in files.items()}
    tax = readme.tax_table(json.loads(readme.TAX.read_text(encoding="utf-8"))["runs"])
    assert texts["ABILITIES"] == f"{readme.TAX_BEGIN}\n\n{tax}\n\n{readme.TAX_END}\nafter\n"
    tables = {
        "BENCHMARKS": f"{readme.section(measured)}\n\n{readme.SHOWN_PLOT}",
        "README": readme.short_section(measured),
    }
    for name, table in tables.items():
        assert texts[name] == f"before 1.23\n{readme.BEGIN}\n\n{table}\n\n{readme.END}\nafter 7.89\n"
    assert {path.name for path in files["README"].parent.iterdir()} == {path.name for path in files.values()}
    readme.update(measured)
    assert {name: read(path) for name, path in files.items()} == texts, "twice is the same as once"


def test_the_short_table_has_the_fastest_of_each_side(measured, record):
    slower = [
        record(case=OP, sizes=SIZES, implementation=name, median_s=9.0) for name in ("fastalign torch", "Liger x")
    ]
    rows = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in readme.short_section([*measured, *slower]).splitlines()
    ]
    assert rows[2] == ["DPO step, LoRA float32, dialogue", "2.00 (3.0 GiB)", "TRL: 0.31 (6.0 GiB)", "6.5x"]
    assert rows[3][1:] == ["1.25 s (5 MiB)", "TRL chunked_logprob: 5.00 s (5 MiB)", "4.0x"]
    alone = [m for m in measured if m.implementation == "fastalign cpu"]
    with pytest.raises(SystemExit, match="none of the cases"):
        readme.short_section(alone)


def test_figures_are_those_of_the_records(measured):
    text = readme.section(measured)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    # 4 pairs in 2 s; in 13 s, the better of two, with the smaller memory of the two: of another run, and it says so
    assert (
        "each figure is the better one:\nthe pairs/s of the faster setting, and the memory of the one that needs less, "
        "the model included." in text
    )
    assert rows[2] == ["LoRA float32, dialogue", "2.00 (3.0 GiB)", "0.31 (6.0 GiB)", "6.5x"]
    op = next(row for row in rows if row[0] == "log-probs and gradient, frozen head")
    assert op[1:] == ["1.25 s (5 MiB)", "5.00 s (5 MiB)", "-", "-", "-", "1.11 s (5 MiB)"]


def test_a_machine_where_bare_products_are_no_floor_says_so(measured, record):
    def text(**seconds):
        sizes = {"flop": 10**10}
        products = [
            record(suite="machine", case="product-float32", implementation=n, median_s=s, q1_s=s, q3_s=s, sizes=sizes)
            for n, s in seconds.items()
        ]
        return readme.section([*measured, *products])

    assert "run at 200 GFLOP/s" in text(torch=0.05, oneDNN=0.025)
    assert "oneDNN's products (400 GFLOP/s)" in text(torch=0.05, oneDNN=0.025)
    for other in (text(torch=0.05, oneDNN=0.045), text(torch=0.05), text()):
        assert "oneDNN" not in other


def test_divergences_fisher_and_ewc_stand_beside_the_fastest_other(record):
    kl, errors = readme.OTHERS[0][1], {"loss": 1e-7, "d_hidden": 1e-6}
    kls = {"fastalign cpu": 1.2, "fastalign torch": 1.5, "eager": 4.0, "Liger fused linear JSD": 5.0}
    rows = [record(suite="divergences", case=kl, implementation=n, median_s=t, errors=errors) for n, t in kls.items()]
    rows += [record(suite="divergences", case=kl, implementation="3 matrix products", errors={"products": 1e-7})]
    fishers = {"fastalign": 1.4, "BackPACK BatchGrad": 2.1, "loop over sequences": 2.2}
    rows += [
        record(suite="fisher", case="body-32x64", implementation=n, median_s=t, errors={"fisher": 1e-6})
        for n, t in fishers.items()
    ]
    # quicker, but not the same thing
    rows += [record(suite="fisher", case="body-32x64", implementation="ordinary backward", errors={"gradient": 1e-6})]
    copied = {"bytes": 3 * 10**9, "copy_bytes_per_s": 2 * 10**10}
    rows += [
        record(suite="fisher", case="ewc", implementation=n, median_s=t, sizes=copied, peak_extra_bytes=None)
        for n, t in {"fastalign": 0.2, "torch": 0.4}.items()
    ]
    lines = [[c.strip() for c in line.strip("|").split("|")][1:] for line in readme.section(rows).splitlines()]
    assert lines[2:5] == [
        ["1.20 s (5 MiB)", "eager: 4.00 s (5 MiB)", "200 ms (5 MiB)"],
        ["1.40 s (5 MiB)", "BackPACK BatchGrad: 2.10 s (5 MiB)", "-"],
        ["200 ms", "torch: 400 ms", "150 ms"],
    ]
    alone = [m for m in rows if m.implementation.startswith("fastalign") and m.suite == "divergences"]
    assert "forward KL" not in readme.section([*alone, *rows[-2:]]), "with nobody beside it"


def tuned(method, strength, margin, learning_rate=0.1, after=20.0):
    tax = {"base_perplexity": 17.0, "tuned_perplexity": after, "kl_mean": 0.25}
    return {"method": method, "strength": strength, "margin": margin, "learning_rate": learning_rate, "tax": tax}


def test_the_tax_of_each_method_is_that_of_the_run_nearest_to_half_the_margin():
    runs = [
        tuned("plain", "0.4", 9.0, 0.04), tuned("plain", "1", 20.0, 0.1, 29.04), tuned("plain", "0.2", 8.0, 0.02),
        tuned("ewc", "1", 15.1), tuned("ewc", "10", 5.0),
    ]  # fmt: skip
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in readme.tax_table(runs).splitlines()]
    assert [row[:3] for row in rows[2:]] == [
        ["plain (1)", "20.0", "17.0 to 29.0"],
        ["plain (0.4)", "9.0", "17.0 to 20.0"],
        ["ewc (10)", "5.0", "17.0 to 20.0"],
    ]
    assert rows[2][3] == "0.250"


def test_the_tax_in_the_documentation_is_that_of_the_records():
    runs = json.loads(readme.TAX.read_text(encoding="utf-8"))["runs"]
    text = readme.between(readme.ABILITIES, readme.TAX_BEGIN, readme.TAX_END, readme.tax_table(runs))
    assert text == read(readme.ABILITIES)


@pytest.mark.parametrize("name", ["README", "BENCHMARKS"])
def test_the_results_are_those_of_the_records(name, files):
    committed = read(readme.ROOT / ("README.md" if name == "README" else "docs/benchmarks.md"))
    files[name].write_text(committed, encoding="utf-8")
    readme.update([m for path in sorted((readme.ROOT / "bench/results").rglob("*.json")) for m in load(path)])
    assert read(files[name]) == committed, "python -m bench report makes it again"


def test_the_days_of_its_records_are_said(measured):
    assert f"; {measured[0].date[:10]}.\n" in readme.section(measured)
    old = replace(measured[0], date="2025-12-31T10:00:00Z")
    assert f"; 2025-12-31 to {measured[1].date[:10]}.\n" in readme.section([old, *measured[1:]])


def test_an_empty_cell_is_explained(measured):
    assert "-: not measured." in readme.section(measured).splitlines(), "by whom, these records do not say"
    reasons = {"torch linear_cross_entropy": "about 25 s a run.", "fastalign cuda": "no GPU"}
    text = readme.section([replace(m, skipped=reasons) if m.case == OP else m for m in measured])
    assert "-: not measured. Log-probs and gradient, frozen head: torch: about 25 s a run." in text.splitlines()
    assert "no GPU" not in text, "it has no column"
    others = [replace(measured[0], implementation=f"{name} x") for name in readme.PEERS.values()]
    assert "not measured" not in readme.section([*measured, *others])


def test_a_case_that_was_not_measured_is_left_out(measured, trained):
    ops_alone = readme.section(measured[:3])
    assert "pairs/s" not in ops_alone and "log-probs and gradient" in ops_alone
    text = readme.section([*measured[3:], trained(case="lora-float32-long")])  # with nobody beside it
    assert "linear_logprobs" not in text and "long prompts" not in text and "dialogue" in text


def test_the_one_plot_is_of_records_with_one_number_of_threads():
    records = load(readme.ROOT / "bench/results" / readme.PLOT.replace(Path(readme.PLOT).name, "ops.json"))
    curve = [m for m in records if m.case.startswith("frozen-float32-2048x576x") and m.case.endswith("-mask0")]
    assert len({m.sizes["v"] for m in curve}) == 5 and len({m.threads for m in curve}) == 1
    text = read(readme.BENCHMARKS)
    assert text.count("![Memory against vocabulary]") == text.count(readme.SHOWN_PLOT) == 1
    assert (readme.ROOT / "bench/results" / readme.PLOT).exists()


@pytest.mark.parametrize(
    "text",
    ["", readme.BEGIN, f"{readme.END} {readme.BEGIN}", f"{readme.BEGIN} {readme.BEGIN} {readme.END}"],
)
def test_without_its_markers_it_refuses(text, measured, files):
    files["BENCHMARKS"].write_text(text, encoding="utf-8")
    before = {name: read(path) for name, path in files.items()}
    with pytest.raises(SystemExit, match=re.escape("BENCHMARKS.md must hold")):
        readme.update(measured)
    assert {name: read(path) for name, path in files.items()} == before


def test_without_any_case_of_it_it_refuses(record, files):
    before = {name: read(path) for name, path in files.items()}
    with pytest.raises(SystemExit, match="none of the cases"):
        readme.update([record()])
    assert {name: read(path) for name, path in files.items()} == before


def test_a_gpu_has_a_table_that_names_it(measured, files, record):
    case = readme.GPU_OPS[0][0]
    shared = {"case": case, "sizes": SIZES, "device": "a GPU"}
    named = {"fastalign triton": 0.003, "fastalign cuda": 0.002, "TRL chunked_logprob": 0.005, "eager": 0.004}
    errors = {"fastalign triton": 1e-5, "fastalign cuda": 2e-5, "TRL chunked_logprob": 3e-2, "eager": 1e-2}
    on_gpu = [
        record(**shared, implementation=name, median_s=s, errors={"logprobs": errors[name]})
        for name, s in named.items()
    ]
    on_gpu += [record(**shared, implementation="2 matrix products", median_s=0.001)]
    versions = dict.fromkeys(("torch", "trl", "liger-kernel", "cut-cross-entropy"), "9.9")
    on_gpu = [replace(m, versions=versions, date="2025-12-31T00:00:00Z") for m in on_gpu]
    readme.update([*on_gpu, *measured])
    text = read(files["BENCHMARKS"])
    assert text.index(readme.section(measured)) < text.index("| on a GPU, bfloat16")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    header = next(row for row in rows if row[0].startswith("on a GPU, bfloat16"))
    assert header[1:] == ["fastalign, CUDA", "fastalign, Triton", "eager", "TRL", "bare products"], "all with a figure"
    row = next(row for row in rows if row[0] == readme.GPU_OPS[0][1])
    assert row[1:] == ["2 ms (5 MiB)", "3 ms (5 MiB)", "4 ms (5 MiB)", "5 ms (5 MiB)", "1 ms (5 MiB)"]
    assert "a GPU; torch 9.9, trl 9.9" in text
    assert "off by at most 2.0e-05 nats (fastalign), 3.0e-02 (the others)." in text
    assert readme.by_machine([]) == []


def test_two_gpus_have_a_table_each(record):
    case, name = readme.GPU_OPS[0]
    rows = [
        record(case=case, device=device, implementation="fastalign cuda", median_s=s, versions={"torch": torch})
        for device, s, torch in (("one GPU", 0.002, "1.2"), ("another GPU", 0.009, "3.4"))
    ]
    table, about, other_table, other_about = readme.by_machine([*rows, record(device="a third GPU")])
    assert "2 ms" in table and "9 ms" not in table and "9 ms" in other_table and "2 ms" not in other_table
    assert table.splitlines()[2].startswith(f"| {name} ")
    assert about.startswith("one GPU; torch 1.2;") and other_about.startswith("another GPU; torch 3.4;")
    assert "(fastalign), - (the others)" in about, "there are none"


def test_a_floor_alone_on_a_gpu_has_no_errors_to_name(record):
    case = readme.GPU_OPS[0][0]
    floor = record(case=case, device="a GPU", implementation="2 matrix products", errors={"products": 1e-7})
    assert "off by at most - nats (fastalign), - (the others)." in readme.by_machine([floor])[1]


def test_another_cpu_has_tables_of_its_own_and_what_was_measured_last_comes_first(measured, files):
    half = {"median_s": 0.5, "q1_s": 0.5, "q3_s": 0.5, "device": "another CPU, 2 cores, AVX512"}
    other = [replace(m, **half, date="2026-02-01T00:00:00Z") for m in measured]
    readme.update([*measured, *other])
    text = read(files["BENCHMARKS"])
    first, second = readme.section(other), readme.section(measured)
    assert "another CPU" in first and "another CPU" not in second
    assert f"\n\n{first}\n\n{second}\n\n{readme.SHOWN_PLOT}\n\n{readme.END}" in text
    third = replace(other[0], device="a third CPU, 2 cores, AVX512", case="t-2-threads", suite="scale")
    assert readme.by_machine([*measured, *other, third]) == [first, second], "it has nothing that they show"


def test_of_how_many_runs_and_of_a_cpu_without_bfloat16(measured):
    old = [replace(m, device="a CPU, 2 cores, AVX2", runs=7 - i % 5) for i, m in enumerate(measured)]
    assert "Medians of 3 to 7 interleaved runs.\n" in readme.section(old)
    assert "no bfloat16 instructions" not in readme.section(old)
    assert "no bfloat16 instructions" in readme.section([*old, replace(old[0], case=readme.OPS[2][0])])
