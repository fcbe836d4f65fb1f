"""Ordinary text as windows of tokens: replay trains on them, and the alignment tax is measured on them."""

from __future__ import annotations

from pathlib import Path

from fastalign.data.encoding import special_prefix
from fastalign.data.loading import load_rows
from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst")


def text_windows(source, tokenizer, *, length: int = 512) -> list[dict]:
    """Text as rows of at most `length` tokens.

    A longer text is cut into windows. Each window starts with the tokenizer's BOS, if it adds one. Where a row has a
    prompt, only its first window starts with it; a row whose prompt takes up half of a window or more is left out.

    Args:
        source: the path of a text file (.txt, .md, .rst), which is one text; or anything that `load_rows` takes and
            that holds text, messages, or prompt and completion.
        tokenizer: a transformers tokenizer with an EOS token.
        length: the most tokens of a window, prompt and EOS included.

    Returns:
        Rows as `tokenize` makes them: `prompt_ids`, `completion_ids` with one list, and `completion_mask`.

    Raises:
        DataError: the file cannot be read or is not UTF-8, the rows are pairs or have labels, or no row is left.
    """
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() in TEXT_SUFFIXES:
        source = [{"text": _read(Path(source))}]
    dataset, report = tokenize(load_rows(source), tokenizer)
    rows: list[dict] = dataset.to_list()
    if "label" in dataset.column_names or len(rows[0]["completion_ids"]) != 1:
        raise DataError(f"The rows are '{report.format}', not text: give text, messages, or prompt and completion.")
    prefix = special_prefix(tokenizer)
    windows = [window for row in rows for window in _windows(row, prefix, length)]
    if not windows:
        raise DataError(f"No row is left: all have prompts of more than {length // 2} tokens. Use longer windows.")
    return windows


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark would become the first token
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it.") from error
    if not text.strip():
        raise DataError(f"{path} is empty: it needs some text.")
    return text


def _windows(row: dict, prefix: list[int], length: int) -> list[dict]:
    """The windows of one row, without those in which nothing is scored or nothing can be predicted."""
    prompt, (completion,) = row["prompt_ids"], row["completion_ids"]
    if 2 * len(prompt) >= length:
        return []
    (mask,) = row.get("completion_mask") or [[1] * len(completion)]
    windows, at = [], 0
    while at < len(completion):
        part = slice(at, at + length - len(prompt))
        tokens = len(prompt) + len(completion[part])
        if any(mask[part]) and tokens > 1:
            windows.append({
                "prompt_ids": prompt, "completion_ids": [completion[part]], "completion_mask": [mask[part]],
            })  # fmt: skip
        at = part.stop
        prompt = prefix  # of every window after the first one
    return windows
