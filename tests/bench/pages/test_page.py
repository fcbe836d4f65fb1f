"""The page of results is one file that needs nothing else."""

from __future__ import annotations

import base64
import re

import pytest

from bench.pages.page import page

HARMFUL = "<script src='http://x/y.js'>&"


@pytest.fixture
def html():
    rows = [("name", HARMFUL), ("fastalign cpu", HARMFUL), (HARMFUL, "fastalign"), ("eager", "1 s")]
    return page(HARMFUL, [(HARMFUL, rows, HARMFUL)], {HARMFUL: b"\x89PNG"})


def test_nothing_is_fetched(html):
    assert re.findall(r"<(?:script|link|iframe|object|embed)\b", html) == []
    assert [at for at in re.findall(r'(?:src|href)="(.*?)"', html) if not at.startswith("data:image/png;base64,")] == []
    assert "url(" not in html and "@import" not in html
    assert base64.b64encode(b"\x89PNG").decode() in html


def test_every_text_is_escaped(html):
    assert "<script" not in html
    # title and h1, the heading, the image's name, a header, two cells and what is said below
    assert html.count("&lt;script src=&#x27;http://x/y.js&#x27;&gt;&amp;") == 2 + 1 + 1 + 1 + 2 + 1


def test_ours_are_marked_and_they_alone(html):
    marked = re.findall(r'<tr class="ours"><td>(.*?)</td>', html)
    assert marked == ["fastalign cpu"]
    assert html.count("<tr") == 4


@pytest.mark.parametrize(("width", "wide"), [(700, False), (1800, True)])
def test_several_plots_in_a_row_are_as_wide_as_the_page(width, wide):
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + width.to_bytes(4, "big") + (420).to_bytes(4, "big")
    assert ('<figure class="row">' in page("x", [], {"curves": png})) == wide
