"""The key under which the tokens of a data set are stored: a digest of everything that decides on them.

- the rows: the bytes of their files, or the values of a data set
- the tokenizer: its vocabulary, special tokens, chat template, and how it was configured
- the options of `fastalign.data.tokenize`
- the code: the files of this package, and the versions of the libraries that take part
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets

from fastalign.data.files import extension
from fastalign.data.loading import Source, files_of

MIN_ROWS = 4000  # of a data set, and
MIN_BYTES = 4_000_000  # of files: fewer are tokenised in less time than it takes to store them
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
_READ_BYTES = 1 << 20


def token_key(rows: Any, tokenizer: Any, options: Mapping[str, Any]) -> str | None:
    """The key of the tokens of some rows; None if the rows are few, or if it cannot be known what decides on them.

    Args:
        rows: the rows, as `fastalign.data.tokenize` takes them.
        tokenizer: the tokenizer.
        options: the options of `fastalign.data.tokenize` that decide on the tokens.
    """
    about = _about_tokenizer(tokenizer)
    if about is None:
        return None
    digest = hashlib.blake2b(digest_size=20)
    if not _add_rows(digest, rows):
        return None
    for part in (about, json.dumps(dict(options), sort_keys=True), _about_code()):
        _add(digest, part.encode())
    return digest.hexdigest()


def _add(digest: Any, part: bytes | memoryview) -> None:
    digest.update(len(part).to_bytes(8, "little") + part)  # with its length: no byte can move to the next part


def files_of_rows(rows: Any) -> list[tuple[Path, float]] | None:
    """The files that hold the rows, each with its weight; None where `load_rows` has to say what the rows are."""
    return files_of(rows.where if isinstance(rows, Source) else rows)


def _add_rows(digest: Any, rows: Any) -> bool:
    """Adds the rows to a digest; False if they are few, or of a kind that is read anew each time."""
    parts = files_of_rows(rows)
    if parts is not None:
        if sum(path.stat().st_size for path, _ in parts) < MIN_BYTES:
            return False
        for path, weight in parts:
            _add(digest, repr((extension(path), weight)).encode())
            with path.open("rb") as file:
                _add(digest, str(path.stat().st_size).encode())
                while part := file.read(_READ_BYTES):
                    digest.update(part)
        _add(digest, repr(rows.columns if isinstance(rows, Source) else None).encode())
        return True
    if not isinstance(rows, datasets.Dataset) or len(rows) < MIN_ROWS:
        return False
    plain: Any = rows.with_format("arrow")
    _add(digest, repr(rows.features).encode())
    for table in plain.iter(1000):
        for batch in table.combine_chunks().to_batches():
            _add(digest, memoryview(batch.serialize()))
    return True


def _about_tokenizer(tokenizer: Any) -> str | None:
    """Everything about a tokenizer that decides on its tokens; None if that cannot be known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Code of other origin may tokenise in its own way, and a slow tokenizer does not tell all that it is made of.
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    settings = backend.to_str()
    if json.loads(settings)["model"].get("dropout"):  # draws at random
        return None
    template = json.dumps(tokenizer.chat_template)
    today = dt.date.today().isoformat() if "strftime_now" in template else ""  # such a template writes the date
    rest = {key: str(value) for key, value in tokenizer.init_kwargs.items()}
    rest["split_special_tokens"] = str(tokenizer.split_special_tokens)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json.dumps([type(tokenizer).__name__, settings, template, today, special, rest], sort_keys=True)


@cache
def _about_code() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        _add(digest, path.name.encode() + path.read_bytes())
    return json.dumps([digest.hexdigest(), *(f"{name} {version(name)}" for name in _LIBRARIES)])
