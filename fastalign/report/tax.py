"""The alignment tax as a table on the terminal, and as tax.json and tax.html in a folder.

All text in it is data, never markup, because it comes from the files that were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.errors import ConfigError, printable
from fastalign.files import write_json, write_text
from fastalign.report.charts import COLOURS, draw_svg
from fastalign.report.rendering import format_number, render, text_table

TOKENS_PRINTED = 8

# Label, key in a summary of `fastalign.evaluation.tax.summarise`, unit, and the factor from the value to that unit.
_ROWS = (
    ("Tokens", "tokens", "", 1),
    ("KL(base || tuned), per token", "kl_mean", "nats", 1),
    ("KL(base || tuned), sum", "kl_sum", "nats", 1),
    ("KL of a token, 99th percentile", "kl_p99", "nats", 1),
    ("Perplexity, base", "base_perplexity", "", 1),
    ("Perplexity, tuned", "tuned_perplexity", "", 1),
    ("Perplexity, change", "perplexity_change", "%", 100),
    ("Entropy per token, base", "base_entropy", "nats", 1),
    ("Entropy per token, tuned", "tuned_entropy", "nats", 1),
    ("Entropy per token, change", "entropy_change", "nats", 1),
)


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the main table: one column per file, and one for all files if there are several.

    Args:
        measured: what `fastalign.evaluation.measure_tax` returned.
    """
    parts = {Path(name).name: summary for name, summary in measured["files"].items()}
    if len(parts) > 1:
        parts["all"] = measured["total"]
    rows = [
        [label, *(format_number(part[key] * factor, sign="change" in key) for part in parts.values()), unit]
        for label, key, unit, factor in _ROWS
    ]
    return ["", *parts, ""], rows


def show_tax(measured: Mapping[str, Any]) -> None:
    """Print the tax: the main table, the KL by position, and the tokens that changed most.

    Args:
        measured: what `fastalign.evaluation.measure_tax` returned.
    """
    headings, rows = table(measured)
    positions = [
        [
            str(part["from"]) if part["from"] == part["to"] else f"{part['from']} to {part['to']}",
            format_number(part["tokens"]),
            format_number(part["kl_mean"]),
        ]
        for part in measured["by_position"]
    ]
    changed = [
        [
            *(format_number(token[key]) for key in ("kl", "base_logprob", "tuned_logprob")),
            f"... {' '.join(token['before'].split())[-40:]} [{token['token']!r}]",
        ]
        for token in measured["most_changed"][:TOKENS_PRINTED]
    ]
    parts = [
        f"\nAlignment tax of {measured['tuned']} over {measured['base']}\n",
        text_table([headings, *rows], left=(0, len(headings) - 1)),
        "\nKL by position\n",
        text_table([["tokens before", "tokens", "nats per token"], *positions]),
        "\nTokens that changed most\n",
        text_table([["KL", "log-prob, base", "tuned", "text, and the token in brackets"], *changed], left=(3,)),
    ]
    print("\n".join(map(printable, parts)))


def write_tax(measured: Mapping[str, Any], folder: str | Path) -> Path:
    """Write tax.json and tax.html, a page that loads nothing and runs no script.

    Args:
        measured: what `fastalign.evaluation.measure_tax` returned.
        folder: where to write; it is made if it does not exist.

    Returns:
        The path of the page.

    Raises:
        ConfigError: the folder cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {str(folder)!r} cannot be made: {error.strerror}; name another one") from error
    headings, rows = table(measured)
    page = render(
        "tax.html.j2", measured=measured, headings=headings, rows=rows,
        by_position=_by_position(measured), histogram=_histogram(measured),
    )  # fmt: skip
    write_json(folder / "tax.json", measured)
    write_text(folder / "tax.html", page)
    return folder / "tax.html"


def _by_position(measured: Mapping[str, Any]) -> str:
    parts = measured["by_position"]

    def plot(axes) -> None:
        at = range(len(parts))
        axes.plot(at, [part["kl_mean"] for part in parts], "o-", color=COLOURS["--first"], linewidth=1.8, markersize=4)
        axes.set_xticks(at, [str(part["from"]) for part in parts])
        axes.set_ylim(bottom=0)

    return draw_svg(plot, "tokens before, at least", "nats per token", salt="tax by position")


def _histogram(measured: Mapping[str, Any]) -> str:
    parts = measured["histogram"]

    def plot(axes) -> None:
        for key, colour in (("tokens", "--muted"), ("kl", "--first")):
            shares = [100 * part[key] for part in parts]
            axes.stairs(shares, range(len(parts) + 1), color=COLOURS[colour], linewidth=1.8)
        ticks = [i for i, part in enumerate(parts) if i % 2 and part["from"] > 0]
        axes.set_xticks(ticks, [f"{parts[i]['from']:g}".replace("e-05", "e-5") for i in ticks])
        axes.set_ylim(bottom=0)

    return draw_svg(plot, "KL of a token in nats, at least", "%", salt="tax histogram")
