"""One self-contained HTML page: it contains its tables and plots and loads nothing."""

from __future__ import annotations

import base64
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #dde3ea; white-space: nowrap; }
th { color: #51606f; font-weight: 600; } tr.ours td { font-weight: 600; background: #eef5ff; }
p.about { color: #51606f; font-size: .82rem; } img { max-width: 100%; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; width: min(46%, 34rem); min-width: 20rem; }
figure.row { width: 100%; }
"""


def page(title: str, cases: list[tuple[str, list[tuple[str, ...]], str]], figures: dict[str, bytes]) -> str:
    """The text of the page.

    Args:
        title: title and heading.
        cases: one (heading, rows of the table with its header first, how it was measured) per case.
        figures: name -> PNG.
    """
    images = "".join(_image(*figure) for figure in figures.items())
    body = "".join(_case(*case) for case in cases)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>{images}{body}</html>\n"
    )


def _image(name: str, png: bytes) -> str:
    """An image in the page. One that holds several plots side by side is as wide as the page."""
    # A PNG file has its width and height in bytes 16 to 24, big-endian.
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    kind = ' class="row"' if width > 3 * height else ""
    data = base64.b64encode(png).decode()
    return f'<figure{kind}><img alt="{escape(name)}" src="data:image/png;base64,{data}"></figure>'


def _case(heading: str, rows: list[tuple[str, ...]], about: str) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = "".join(f"<tr{_class(row)}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return (
        f'<h2>{escape(heading)}</h2><div class="wide"><table><tr>{header}</tr>{lines}</table></div>'
        f'<p class="about">{escape(about)}</p>'
    )


def _class(row: tuple[str, ...]) -> str:
    return ' class="ours"' if row[0].startswith("fastalign") else ""
