"""report.html: what a run did, on one page that needs nothing but itself.

Read from the run folder; every file may be missing, and its section is then left out:

    metrics.jsonl   an object per logged step: {"step": int, "epoch": float, "time": seconds since start, "loss": ...};
                    keys starting with eval_ come from evaluations. Charts of known metrics: fastalign/charts.py
    config.json     the options, flat or nested
    summary.json    {"title", "model", "dataset", "method": str,
                     "rows": [{"metric": str, "before": number, "after": number, "unit": str, "better": "up" | "down"}],
                     "facts": {label: value}}; all optional; model, dataset and method otherwise from config.json
    samples.jsonl   {"prompt", "before", "after", "reference"}; all optional. A prompt may be a list of chat messages
    preflight.txt   plain text

Everything in these files is data, never markup: a model may have written it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fastalign.errors import InputError
from fastalign.files import read_json, read_jsonl, read_metrics, write_text
from fastalign.report.charts import CHARTS, Chart, Drawing, draw

__all__ = ["write_report"]

SAMPLES_SHOWN = 24
# Logged by transformers' Trainer about itself: one value a run, or derived from metrics that have a chart.
NOT_CHARTED = {"step", "epoch", "time", "total_flos", "train_loss", "train_runtime"}
NOT_CHARTED |= {f"{phase}_{rate}_per_second" for phase in ("train", "eval") for rate in ("samples", "steps")}
NOT_CHARTED |= {"eval_runtime", "eval_model_preparation_time"}
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
SIGN = {"up": 1, "down": -1}


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write `report.html` into a run folder from the files there, atomically, and return its path.

    The page loads nothing and runs no script; the same files give the same bytes. Raises InputError if the folder does
    not exist, DataError if config.json or summary.json is damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder: give the folder of a run, the one that holds metrics.jsonl.")
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": format_number, "text": format_text, "svg": Markup}
    write_text(run_dir / "report.html", environment.from_string(template).render(_page(run_dir)))
    return run_dir / "report.html"


def _page(run_dir: Path) -> dict[str, Any]:
    """The template's variables."""
    records = read_metrics(run_dir / "metrics.jsonl")
    config = dict(_flatten(read_json(run_dir / "config.json")))
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
    """Nested options as ("lora.r", 16)."""
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
    return max((r[key] for r in records if _is_number(r.get(key)) and math.isfinite(r[key])), default=0)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table before/after, with the change and whether it is one for the better."""
    before, after = row.get("before"), row.get("after")
    change = after - before if _is_number(before) and _is_number(after) else None
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
    """Charts of the known metrics, then one of every other number that was logged more than once."""
    known = {key for chart in CHARTS for key in chart.keys}
    logged: dict[str, int] = {}
    for record in records:
        for key, value in record.items():
            if _is_number(value) and key not in NOT_CHARTED:
                key = key.removeprefix("eval_")
                logged[key] = logged.get(key, 0) + 1
    others = [Chart(key, "value", {key: "train"}) for key, count in logged.items() if key not in known and count > 1]
    return [drawing for chart in (*CHARTS, *others) if (drawing := draw(chart, records))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_number(value: Any, sign: bool = False) -> str:
    """Three significant digits (integers in full), thousands apart; what is no number, as text."""
    if value is None:
        return DASH
    if not _is_number(value):
        return format_text(value)
    if not isinstance(value, int) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    size, plus = abs(value), "+" if sign and value > 0 else ""
    if isinstance(value, int):
        text = f"{size:,}"
    elif 1e-3 <= size < 1e7:
        text = f"{size:,.{max(0, 2 - math.floor(math.log10(size)))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = re.sub("e([+-])0?", r"e\1", f"{size:.3g}").replace("e+", "e").replace("-", MINUS)
    return f"{plus}{MINUS if value < 0 else ''}{text}"


def format_text(value: Any) -> str:
    """Text of a value from a run's files; a list of chat messages as "role: content" lines."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "content" in item for item in value):
        return "\n\n".join(f"{item.get('role', '')}: {format_text(item['content'])}" for item in value)
    if isinstance(value, list):
        return ", ".join(format_text(item) for item in value)
    return "yes" if value is True else "no" if value is False else DASH if value is None else str(value)
