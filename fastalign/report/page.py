"""report.html: what a run did, on one page that needs no other file.

The page is made from the files of the run folder. Every file may be missing; its section is then left out.

    metrics.jsonl   one object per logged step: {"step": int, "epoch": float, "time": seconds since start, "loss": ...}.
                    Keys that start with eval_ come from evaluations. report/charts.py lists the known metrics
    run.json        the options, flat or nested
    summary.json    {"title", "model", "dataset", "method": str,
                     "rows": [{"metric": str, "before": number, "after": number, "unit": str, "better": "up" | "down"}],
                     "facts": {label: value}}. Every field may be missing. Where model, dataset or method is missing,
                    run.json's is shown
    samples.jsonl   {"prompt", "before", "after", "reference"}. Every field may be missing. A prompt may be a list of
                    chat messages
    preflight.txt   plain text
    nonfinite_rows.jsonl    the rows on which a guard stopped the run

Everything in these files is data, never markup, because a model may have written it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastalign.errors import InputError
from fastalign.files import read_json, read_jsonl, read_metrics, write_text
from fastalign.report.charts import CHARTS, Chart, Drawing, draw
from fastalign.report.diagnostics import DIAGNOSTICS, diagnose
from fastalign.report.rendering import format_number, is_number, render
from fastalign.report.state import state_of

__all__ = ["write_report"]

SAMPLES_SHOWN = 24
# What transformers' Trainer logs about itself: one value per run, or derived from metrics that have a chart.
NOT_CHARTED = {"step", "epoch", "time", "total_flos", "train_loss", "train_runtime"}
NOT_CHARTED |= {f"{phase}_{rate}_per_second" for phase in ("train", "eval") for rate in ("samples", "steps")}
NOT_CHARTED |= {"eval_runtime", "eval_model_preparation_time"}
SIGN = {"up": 1, "down": -1}


def write_report(run_dir: str | os.PathLike, *, refresh: int | None = None) -> Path:
    """Write report.html into a run folder, atomically, from the files in that folder.

    The page loads nothing and runs no script. The same files give the same bytes. The run may still go on.

    Args:
        run_dir: the folder of a run. The files that it may hold are listed at the top of this module.
        refresh: seconds after which a browser loads the page again; None: never.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder does not exist.
        DataError: run.json or summary.json is damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder: give the folder of a run, the one that holds metrics.jsonl.")
    write_text(run_dir / "report.html", render("report.html.j2", refresh=refresh, **_variables(run_dir)))
    return run_dir / "report.html"


def _variables(run_dir: Path) -> dict[str, Any]:
    """The template's variables."""
    records = read_metrics(run_dir / "metrics.jsonl")
    config = dict(_flatten(read_json(run_dir / "run.json")))
    summary = read_json(run_dir / "summary.json")
    samples = read_jsonl(run_dir / "samples.jsonl")
    preflight = run_dir / "preflight.txt"
    return {
        "title": str(summary.get("title") or f"Training run {run_dir.resolve().name}"),
        "model": summary.get("model") or config.get("model"),
        "dataset": summary.get("dataset") or config.get("dataset"),
        "method": summary.get("method") or config.get("method"),
        "extent": _extent(records),
        "facts": _mapping(summary.get("facts")),
        "rows": [_row(row) for row in _objects(summary.get("rows"))],
        "state": state_of(run_dir) if records or config else "",
        "findings": diagnose(run_dir),
        "diagnostics": len(DIAGNOSTICS),
        "drawings": _drawings(records),
        "samples": samples[:SAMPLES_SHOWN],
        "sample_count": len(samples),
        "preflight": preflight.read_text(encoding="utf-8", errors="replace").strip() if preflight.exists() else "",
        "config": config,
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _flatten(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested options as pairs such as ("lora.r", 16)."""
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _extent(records: list[dict[str, Any]]) -> str:
    """How long the run was: "300 steps, 2 epochs, 5 min 12 s"."""
    steps, epochs, seconds = (_largest(records, key) for key in ("step", "epoch", "time"))
    parts = []
    if steps:
        parts.append(f"{format_number(int(steps))} step{'s' if steps != 1 else ''}")
    if epochs:
        parts.append(f"{format_number(epochs)} epoch{'s' if epochs != 1 else ''}")
    if seconds:
        parts.append(_duration(seconds))
    return ", ".join(parts)


def _largest(records: list[dict[str, Any]], key: str) -> float:
    return max((r[key] for r in records if is_number(r.get(key)) and math.isfinite(r[key])), default=0)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table that compares before and after: the change, and whether it is for the better."""
    before, after = row.get("before"), row.get("after")
    change = after - before if is_number(before) and is_number(after) else None
    verdict = ""
    if change is not None and math.isfinite(change) and row.get("better") in SIGN:
        gain = change * SIGN[row["better"]]
        verdict = "better" if gain > 0 else "worse" if gain < 0 else "same"
    return {
        "metric": row.get("metric", ""),
        "unit": row.get("unit") or "",
        "before": before,
        "after": after,
        "change": change,
        "verdict": verdict,
    }


def _drawings(records: list[dict[str, Any]]) -> list[Drawing]:
    """Charts of the known metrics, followed by one of every other number that was logged more than once."""
    known = {key for chart in CHARTS for key in chart.keys}
    logged: dict[str, int] = {}
    for record in records:
        numbers = [key.removeprefix("eval_") for key in record if is_number(record[key]) and key not in NOT_CHARTED]
        for key in numbers:
            logged[key] = logged.get(key, 0) + 1
    others = [Chart(key, "value", {key: "train"}) for key, count in logged.items() if key not in known and count > 1]
    return [drawing for chart in (*CHARTS, *others) if (drawing := draw(chart, records))]
