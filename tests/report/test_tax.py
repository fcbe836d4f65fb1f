"""The tax as a table and as a page, from made-up measurements."""

from __future__ import annotations

import json
import re

import pytest

from fastalign.errors import ConfigError
from fastalign.report.tax import show_tax, table, write_tax

ATTACK = "<script>alert(1)</script>[bold]{{ 7*7 }}"


def summary(tokens: int) -> dict:
    return {
        "tokens": tokens, "kl_mean": 0.25, "kl_sum": 0.25 * tokens, "kl_p99": 2.5, "base_perplexity": 20.0,
        "tuned_perplexity": 25.0, "perplexity_change": 0.25, "base_entropy": 2.0, "tuned_entropy": 1.5,
        "entropy_change": -0.5,
    }  # fmt: skip


def measured(files: int = 2, text: str = "plain") -> dict:
    return {
        "base": text, "tuned": text, "length": 64,
        "files": {f"folder/{n}.txt": summary(100 * n + 100) for n in range(files)}, "total": summary(1234),
        "by_position": [
            {"from": 1, "to": 1, "tokens": 3, "kl_mean": 0.5}, {"from": 2, "to": 3, "tokens": 6, "kl_mean": 1.25},
        ],
        "histogram": [
            {"from": 0.0, "to": 0.1, "tokens": 0.5, "kl": 0.0}, {"from": 0.1, "to": 1.0, "tokens": 0.5, "kl": 1.0},
        ],
        "most_changed": [{"before": text, "token": text, "kl": 3.5, "base_logprob": -1.5, "tuned_logprob": -4.5}],
        "kinds": [{"token": text, "count": 7, "kl_mean": 0.75, "share": 0.125}],
        "passages": [[(text, 0), (text, 4)]],
    }  # fmt: skip


def test_a_column_per_file_and_one_for_all():
    headings, rows = table(measured())
    assert headings == ["", "0.txt", "1.txt", "all", ""]
    assert rows[0] == ["Tokens", "100", "200", "1,234", ""]
    assert ["KL(base || tuned), per token", "0.25", "0.25", "0.25", "nats"] in rows
    assert ["Perplexity, change", "+25", "+25", "+25", "%"] in rows
    assert ["Entropy per token, change", *["\N{MINUS SIGN}0.5"] * 3, "nats"] in rows


def test_one_file_needs_no_column_for_all():
    assert table(measured(1))[0] == ["", "0.txt", ""]


def test_the_terminal_shows_text_as_it_is(capsys):
    show_tax(measured(text="a[b]c"))
    out = capsys.readouterr().out
    assert out.count("a[b]c") >= 3  # base, text before, token
    assert "2 to 3" in out and "1.25" in out and "KL by position" in out


def test_the_page_escapes_what_the_files_hold(tmp_path):
    path = write_tax(measured(text=ATTACK), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "tax.html"
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;[bold]{{ 7*7 }}") == 7
    assert page.count("<svg") == 2 and 'class="k4"' in page
    assert not re.search(r"https?:|@import|<img|<link", page)
    assert json.loads((path.parent / "tax.json").read_text())["total"]["tokens"] == 1234


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file.*cannot be made: .*; name another one"):
        write_tax(measured(), tmp_path / "file" / "out")
