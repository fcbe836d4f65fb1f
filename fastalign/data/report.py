"""The preflight report: what tokenising did to a data set, said before the first training step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Lengths:
    """Minimum, mean, 95th percentile and maximum of some lengths, in tokens."""

    min: int
    mean: float
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Lengths:
        """The summary of `lengths (N,)`, N > 0. The percentile is a length that occurs (the next one above)."""
        p95 = np.percentile(lengths, 95, method="higher")
        return cls(int(lengths.min()), float(lengths.mean()), int(p95), int(lengths.max()))

    def __str__(self) -> str:
        return f"min {self.min:,}   mean {self.mean:,.1f}   95 % {self.p95:,}   max {self.max:,}"


@dataclass
class DataReport:
    """Counts and lengths of one tokenised data set.

    format             the format found, for example "preference, chat messages"
    rows_in            rows given
    rows_kept          rows of the tokenised data set
    dropped            reason -> rows left out for it
    dropped_rows       reason -> the first few of them, counted from 1
    completions        completions kept (two a row for preference data)
    eos_present        completions whose text already ended with EOS
    eos_added          completions that had EOS added
    eos_inside         single-turn completions that hold a further EOS before their end
    token_merges       completions whose first characters merge with the prompt's last when tokenised as one text
    duplicate_bos      rows whose text already began with the BOS that the tokenizer adds: it was made one
    prompts_cut        rows whose prompt lost its beginning (on_truncate="keep_end")
    template_mismatch  rows whose chat template starts an answer otherwise than its generation prompt does
    prompt_length, completion_length   `Lengths` over rows and over completions
    tokens_shared      tokens in all when each prompt is laid out once
    tokens_unshared    tokens in all when each completion carries its own prompt
    scored_tokens      tokens whose log-probability is used: unmasked and with a token before them
    max_length         the longest prompt + completion allowed, or None
    """

    format: str
    rows_in: int
    rows_kept: int
    dropped: dict[str, int]
    dropped_rows: dict[str, list[int]]
    prompt_length: Lengths
    completion_length: Lengths
    completions: int
    tokens_shared: int
    tokens_unshared: int
    scored_tokens: int
    max_length: int | None = None
    eos_present: int = 0
    eos_added: int = 0
    eos_inside: int = 0
    token_merges: int = 0
    duplicate_bos: int = 0
    prompts_cut: int = 0
    template_mismatch: int = 0

    @property
    def scored_fraction(self) -> float:
        """Scored tokens over all tokens, each prompt laid out once."""
        return self.scored_tokens / self.tokens_shared

    def to_dict(self) -> dict:
        """Everything as plain numbers, strings, dicts and lists, fit for JSON."""
        return {**asdict(self), "scored_fraction": self.scored_fraction}

    def render(self, extra: Iterable[tuple[str, str]] = ()) -> str:
        """A plain-text table; `extra` (label, value) pairs become its last lines."""
        lines = [*self._lines(), *extra]
        width = max(len(label) for label, _ in lines) + 2
        table = [f"  {label:<{width}}{value}" for label, value in lines]
        notes = [f"  ! {note}" for note in self._warnings()]
        return "\n".join([f"Preflight: {self.format}", *table, *notes])

    def __str__(self) -> str:
        return self.render()

    def _lines(self) -> list[tuple[str, str]]:
        limit = "" if self.max_length is None else f" (max_length {self.max_length:,})"
        return [
            ("rows", f"{self.rows_kept:,} of {self.rows_in:,} kept"),
            *((f"  dropped: {reason}", self._dropped_line(reason)) for reason in self.dropped),
            ("prompt tokens", str(self.prompt_length)),
            ("completion tokens", str(self.completion_length) + limit),
            (
                "tokens",
                f"{self.tokens_shared:,} with each prompt once, {self.tokens_unshared:,} with one per completion",
            ),
            ("scored tokens", f"{self.scored_tokens:,} ({self.scored_fraction:.1%} of the tokens)"),
            (
                "end of sequence",
                f"exactly one EOS ends each of {self.completions:,} completions: "
                f"{self.eos_present:,} had it, {self.eos_added:,} got it",
            ),
            ("duplicate BOS", f"made one in {self.duplicate_bos:,} rows" if self.duplicate_bos else "none"),
            (
                "token merges",
                f"{self.token_merges:,} of {self.completions:,} completions" if self.token_merges else "none",
            ),
        ]

    def _dropped_line(self, reason: str) -> str:
        count, first = self.dropped[reason], self.dropped_rows[reason]
        more = ", ..." if count > len(first) else ""
        return f"{count:,} (row{'s' if count > 1 else ''} {', '.join(map(str, first))}{more})"

    def _warnings(self) -> list[str]:
        completions, rows = f"{self.completions:,} completions", f"{self.rows_kept:,} rows"
        notes = [
            (
                self.token_merges,
                f"of {completions} would merge with the end of their prompt if both were tokenised as one text, as "
                "after a prompt that ends in a space. They are tokenised apart, as in generation; if there are many, "
                "move the space to the completion.",
            ),
            (
                self.eos_inside,
                f"of {completions} hold an EOS before their end, which the model never generates past: look for "
                "special tokens written out in the text.",
            ),
            (self.prompts_cut, f'of {rows} lost the beginning of their prompt to max_length (on_truncate="keep_end").'),
            (
                self.template_mismatch,
                f"of {rows} have answers that do not begin with the chat template's generation prompt (it may force a "
                "thinking tag): the model trains on another prompt than it generates from.",
            ),
        ]
        return [f"{count:,} {text}" for count, text in notes if count]
