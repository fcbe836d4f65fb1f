"""Ordinary text as rows of tokens: what replay trains on and what the tax is measured on."""

from __future__ import annotations

from pathlib import Path

from fastalign.data.files import load_rows
from fastalign.data.tokenization import special_prefix, tokenize
from fastalign.errors import DataError


def text_windows(source, tokenizer, *, length: int = 512) -> list[dict]:
    """Rows of at most `length` tokens: `prompt_ids`, one list in `completion_ids`, perhaps `completion_mask`.

    source: the path of a .txt file, which is one text, or rows that `load_rows` takes and that hold text, messages, or
    prompt and completion. A text that is longer is cut into windows, each behind the tokenizer's BOS if it puts one;
    where a prompt takes up half a window or more the row is left out, and only the first window has it.

    DataError for pairs and labelled rows, for what cannot be read, and where nothing is left.
    """
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() in (".txt", ".md", ".rst"):
        source = [{"text": _read(Path(source))}]
    dataset, report = tokenize(load_rows(source), tokenizer)
    if "label" in dataset.column_names or len(dataset[0]["completion_ids"]) != 1:
        raise DataError(f"The rows are '{report.format}', not text: give text, messages, or prompt and completion.")
    prefix = special_prefix(tokenizer)
    windows = [window for row in dataset for window in _windows(row, prefix, length)]
    if not windows:
        raise DataError(f"No row is left: all have prompts of more than {length // 2} tokens. Use longer windows.")
    return windows


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it.") from error
    if not text.strip():
        raise DataError(f"{path} is empty: it needs some text.")
    return text


def _windows(row: dict, prefix: list[int], length: int) -> list[dict]:
    prompt, (completion,) = row["prompt_ids"], row["completion_ids"]
    if 2 * len(prompt) >= length:
        return []
    (mask,) = row.get("completion_mask") or [[1] * len(completion)]
    found, at = [], 0
    while at < len(completion):
        size = length - len(prompt)
        if any(mask[at : at + size]) and len(prompt) + len(completion[at : at + size]) > 1:
            found.append({
                "prompt_ids": prompt, "completion_ids": [completion[at : at + size]],
                "completion_mask": [mask[at : at + size]],
            })  # fmt: skip
        at += size
        prompt = prefix
    return found
