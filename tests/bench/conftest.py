"""Records that no machine made: reports are made from records alone, so these will do."""

from __future__ import annotations

import pytest

from bench.harness.measure import Measurement

DEFAULTS = {
    "suite": "ops", "case": "frozen-float32-4x2x8-mask0", "sizes": {"n": 4, "h": 2, "v": 8, "mask": 0},
    "implementation": "eager", "median_s": 0.2, "q1_s": None, "q3_s": None, "runs": 3, "peak_extra_bytes": 5 << 20,
    "errors": {"logprobs": 1e-6}, "checked": "all rows", "device": "A CPU, 2 cores, AVX2", "threads": 2, "load": 0.0,
    "versions": {"torch": "2.13"}, "commit": "abc", "date": "2026-01-01T00:00:00Z",
}  # fmt: skip


@pytest.fixture(scope="session")
def record():
    """A function that makes one; its quartiles are its median unless they are given."""

    def make(**fields) -> Measurement:
        made = {**DEFAULTS, **fields}
        made["q1_s"], made["q3_s"] = made["q1_s"] or made["median_s"], made["q3_s"] or made["median_s"]
        return Measurement(**made)

    return make


@pytest.fixture(scope="session")
def trained(record):
    """A function that makes a record of the suite `train`."""
    sizes = {
        "pairs": 4, "tokens": 1000, "scored": 300, "reference_us": 500_000, "flop": 10**9, "gemm_flop_per_s": 10**9,
        "resident_bytes": 3 << 30,
    }  # fmt: skip

    def make(case="lora-float32-dialogue", implementation="fastalign", median_s=2.0, **fields) -> Measurement:
        changed = sizes | fields.pop("sizes", {})
        return record(
            suite="train", case=case, implementation=implementation, median_s=median_s, sizes=changed,
            errors={"loss": 1e-5}, **fields,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def curve(record):
    """A function that makes the records of one curve of the suite `scale`, whose seconds are a known power."""

    def make(axis="n", points=(1, 2, 4), power=1.5, threads=1) -> list[Measurement]:
        case = f"{axis}-{threads}-thread"
        return [
            record(
                suite="scale", case=case, sizes={axis: p}, implementation=f"{axis} = {p}", median_s=0.1 * p**power,
                threads=threads, peak_extra_bytes=None,
            )
            for p in points
        ]  # fmt: skip

    return make
