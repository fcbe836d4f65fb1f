"""Text that models and data wrote, on a terminal: it must not move the cursor, set the title, or become markup."""

from __future__ import annotations

import re

# C0 and C1 control characters, except tab and newline. ESC starts the sequences that a terminal obeys.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""The text with each control character shown as its code, such as `\x1b`, except tabs and line breaks.

    Args:
        text: what a model or a file holds. A carriage return before a line break is dropped.

    Examples:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))
