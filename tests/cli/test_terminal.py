"""Text that models and data wrote, on a terminal."""

from __future__ import annotations

from fastalign.cli.terminal import printable


def test_controls_are_shown_as_their_codes():
    assert printable("a\x1b]0;title\x07\x9b2J\r\nb\tc\n") == "a\\x1b]0;title\\x07\\x9b2J\nb\tc\n"
    assert printable("[/red] [link=http://x] caf\u00e9 \u4e2d") == "[/red] [link=http://x] caf\u00e9 \u4e2d"
