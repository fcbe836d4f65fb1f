"""The tax as a table on the terminal, and as tax.json and tax.html in a folder. All text in it is data, not markup."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from fastalign.errors import ConfigError
from fastalign.files import write_json, write_text
from fastalign.report.charts import COLOURS, svg
from fastalign.report.page import format_number, format_text

_ROWS = (
    ("Tokens", "tokens", "", 1),
    ("KL(base || tuned), a token", "kl_mean", "nats", 1),
    ("KL(base || tuned), sum", "kl_sum", "nats", 1),
    ("KL of the 99th percentile", "kl_p99", "nats", 1),
    ("Perplexity, base", "base_perplexity", "", 1),
    ("Perplexity, tuned", "tuned_perplexity", "", 1),
    ("Perplexity, change", "perplexity_change", "%", 100),
    ("Entropy, base", "base_entropy", "nats", 1),
    ("Entropy, tuned", "tuned_entropy", "nats", 1),
    ("Entropy, change", "entropy_change", "nats", 1),
)


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: what was measured, on each file and on all."""
    parts = {Path(name).name: summary for name, summary in found["files"].items()}
    if len(parts) > 1:
        parts["all"] = found["total"]
    rows = [
        [label, *(format_number(part[key] * factor, sign="change" in key) for part in parts.values()), unit]
        for label, key, unit, factor in _ROWS
    ]
    return ["", *parts, ""], rows


def show_tax(found: Mapping[str, Any]) -> None:
    """Print the table, the KL by position, and the tokens that changed most."""
    console = Console(highlight=False)
    headings, rows = table(found)
    shown = Table(title=f"Tax of {found['tuned']} over {found['base']}", title_justify="left", title_style="bold")
    for i, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if i in (0, len(headings) - 1) else "right")
    for row in rows:
        shown.add_row(*row)
    console.print()
    console.print(shown)
    positions = Table(title="KL by position", title_justify="left", title_style="bold")
    for heading in ("tokens before it", "tokens", "nats a token"):
        positions.add_column(heading, justify="right")
    for part in found["by_position"]:
        span = str(part["from"]) if part["from"] == part["to"] else f"{part['from']} to {part['to']}"
        positions.add_row(span, format_number(part["tokens"]), format_number(part["kl_mean"]))
    console.print(positions)
    changed = Table(title="Most changed tokens", title_justify="left", title_style="bold")
    for heading in ("KL", "log-prob before", "after", "text"):
        changed.add_column(heading, justify="left" if heading == "text" else "right")
    for token in found["most_changed"][:8]:
        numbers = (format_number(token[key]) for key in ("kl", "base_logprob", "tuned_logprob"))
        before = " ".join(token["before"].split())[-40:]
        changed.add_row(*numbers, f"... {before} [{token['token']!r}]".replace("[", r"\["))
    console.print(changed)


def write_tax(found: Mapping[str, Any], folder: str | Path) -> Path:
    """Write tax.json and tax.html, which loads nothing and runs no script; returns the page's path."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {str(folder)!r} cannot be made: {error.strerror}; name another one") from error
    write_json(folder / "tax.json", found)
    template = Path(__file__).with_name("tax.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": format_number, "text": format_text, "svg": Markup}
    headings, rows = table(found)
    page = environment.from_string(template).render(
        found=found, headings=headings, rows=rows, by_position=_by_position(found), histogram=_histogram(found)
    )
    write_text(folder / "tax.html", page)
    return folder / "tax.html"


def _by_position(found: Mapping[str, Any]) -> str:
    parts = found["by_position"]

    def plot(axes) -> None:
        at = range(len(parts))
        axes.plot(at, [part["kl_mean"] for part in parts], "o-", color=COLOURS["--first"], linewidth=1.8, markersize=4)
        axes.set_xticks(at, [str(part["from"]) for part in parts])
        axes.set_ylim(bottom=0)

    return svg(plot, "tokens before it, at least", "nats a token", salt="tax by position")


def _histogram(found: Mapping[str, Any]) -> str:
    parts = found["histogram"]

    def plot(axes) -> None:
        for key, colour in (("tokens", "--muted"), ("kl", "--first")):
            shares = [100 * part[key] for part in parts]
            axes.stairs(shares, range(len(parts) + 1), color=COLOURS[colour], linewidth=1.8)
        ticks = [i for i, part in enumerate(parts) if i % 2 and part["from"] > 0]
        axes.set_xticks(ticks, [f"{parts[i]['from']:g}".replace("e-05", "e-5") for i in ticks])
        axes.set_ylim(bottom=0)

    return svg(plot, "KL of a token, nats, from", "%", salt="tax histogram")
