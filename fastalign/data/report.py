"""The preflight report: what tokenising did to a data set, shown before the first training step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import numpy as np


@dataclass(frozen=True)
class Lengths:
    """A summary of some lengths, all in tokens.

    Attributes:
        min: the shortest length.
        mean: the mean length.
        p95: the 95th percentile, a length that occurs.
        max: the longest length.
    """

    min: int
    mean: float
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Lengths:
        """The summary of `lengths (N,)`, N > 0. The percentile is rounded up to a length that occurs."""
        p95 = np.percentile(lengths, 95, method="higher")
        return cls(int(lengths.min()), float(lengths.mean()), int(p95), int(lengths.max()))

    def __str__(self) -> str:
        return f"min {self.min:,}   mean {self.mean:,.1f}   95 % {self.p95:,}   max {self.max:,}"


@dataclass
class DataReport:
    """Counts and lengths of one tokenised data set.

    Attributes:
        format: the format that was detected, for example "preference, chat messages".
        rows_in: rows given.
        rows_kept: rows of the tokenised data set.
        dropped: for each reason, how many rows were left out for it.
        dropped_rows: for each reason, the numbers of the first few of these rows, counted from 1.
        prompt_length: lengths of the prompts of the rows kept, BOS included.
        completion_length: lengths of their completions, EOS included.
        completions: completions of the rows kept (two per row for preference data).
        tokens_shared: tokens in all if each prompt is computed once for all its completions.
        tokens_unshared: tokens in all if each completion has a copy of the prompt.
        scored_tokens: tokens whose log-probability is used. A token is not used if its mask is 0, or if no token is
            before it.
        max_length: the limit for a prompt together with its longest completion; None if there is none.
        eos_present: completions whose text ended with EOS already.
        eos_added: completions to which EOS was added.
        eos_inside: completions, of one assistant turn, that hold another EOS before their end.
        eos_missing: completions, given as token ids, that do not end with EOS. They are taken as they are.
        token_merges: completions whose first characters would merge with the last ones of the prompt into one token if
            both were tokenised as one text.
        duplicate_bos: rows whose text started with the BOS that the tokenizer adds. It is there once now.
        completions_cut: completions that lost their end, EOS with it (on_truncate="keep_start").
        prompts_cut: rows whose prompt lost its beginning (on_truncate="keep_end").
        template_mismatch: rows whose chat template starts an answer differently than its generation prompt does.
        answers_cut: answers before the last one of a conversation from which the chat template leaves out thoughts or
            other words. They are scored as the template writes them.
        thoughts_kept: last answers whose thoughts the chat template leaves out. They were put in.
        foreign_thoughts: completions with thoughts in <think>, where the chat template writes thoughts in another way.
        unstopped_answers: answers before the last one behind which the chat template writes no special token.
        shared_words: pairs without a prompt column, whose answers begin with the same words behind a turn marker.
        unmarked_prompts: pairs without a prompt column and without a turn marker: their prompt is all they share.
        layout: the layout that the rows had before they were converted, and what decided; empty if they were not.
        rows_made: how many rows they were converted to; None if they were not.
        unpaired: whether each pair became two rows with a label.
        plain_on_chat: whether plain strings are not written with the chat template that the tokenizer has.
        unread_columns: columns that hold text, or lists, and are not read.
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
    eos_missing: int = 0
    token_merges: int = 0
    duplicate_bos: int = 0
    completions_cut: int = 0
    prompts_cut: int = 0
    template_mismatch: int = 0
    answers_cut: int = 0
    thoughts_kept: int = 0
    foreign_thoughts: int = 0
    unstopped_answers: int = 0
    shared_words: int = 0
    unmarked_prompts: int = 0
    layout: str = ""
    rows_made: int | None = None
    unpaired: bool = False
    plain_on_chat: bool = False
    unread_columns: list[str] = field(default_factory=list)

    @property
    def scored_fraction(self) -> float:
        """Share of the tokens that are scored, 0 to 1; each prompt counts once."""
        return self.scored_tokens / self.tokens_shared

    def to_dict(self) -> dict:
        """The report as numbers, strings, dicts and lists that JSON can hold."""
        return {**asdict(self), "scored_fraction": self.scored_fraction}

    def render(self, extra: Iterable[tuple[str, str]] = ()) -> str:
        """The report as a table in plain text, with a warning below it for everything that needs a look.

        Args:
            extra: more lines for the end of the table, as (label, value).
        """
        lines = [*self._lines(), *extra]
        width = max(len(label) for label, _ in lines) + 2
        table = [f"  {label:<{width}}{value}" for label, value in lines]
        notes = [f"  ! {note}" for note in self._warnings()]
        return "\n".join([f"Preflight: {self.format}", *table, *notes])

    def __str__(self) -> str:
        return self.render()

    def _lines(self) -> list[tuple[str, str]]:
        limit = "" if self.max_length is None else f" (max_length {self.max_length:,})"
        made = self.rows_in if self.rows_made is None else self.rows_made
        pairs = self.rows_kept // 2 if self.unpaired else self.rows_kept
        return [
            *([("layout", self.layout)] if self.layout else []),
            *([("converted", f"{self.rows_in:,} rows to {made:,}")] if self.layout else []),
            ("rows", f"{pairs:,} of {made:,} kept" + (", two labelled rows of each pair" if self.unpaired else "")),
            *((f"  dropped: {reason}", self._dropped_line(reason)) for reason in self.dropped),
            ("prompt tokens", str(self.prompt_length)),
            ("completion tokens", str(self.completion_length) + limit),
            (
                "tokens",
                f"{self.tokens_shared:,} with each prompt once, {self.tokens_unshared:,} with a prompt per completion",
            ),
            ("scored tokens", f"{self.scored_tokens:,} ({self.scored_fraction:.1%} of the tokens)"),
            ("end of sequence", self._end_line()),
            ("duplicate BOS", f"removed in {self.duplicate_bos:,} rows" if self.duplicate_bos else "none"),
            (
                "token merges",
                f"{self.token_merges:,} of {self.completions:,} completions" if self.token_merges else "none",
            ),
        ]

    def _end_line(self) -> str:
        ended = self.completions - self.eos_missing - self.completions_cut
        line = (
            f"exactly one EOS ends each of {ended:,} completions: {self.eos_present:,} had it already, and it was "
            f"added to {self.eos_added:,}"
        )
        return line + (f"; {self.eos_missing:,} lack it" if self.eos_missing else "")

    def _dropped_line(self, reason: str) -> str:
        count, first = self.dropped[reason], self.dropped_rows[reason]
        more = ", ..." if count > len(first) else ""
        return f"{count:,} (row{'s' if count > 1 else ''} {', '.join(map(str, first))}{more})"

    def _warnings(self) -> list[str]:
        completions, rows = f"{self.completions:,} completions", f"{self.rows_kept:,} rows"
        notes = [
            (
                self.token_merges,
                f"of {completions} would merge with the end of their prompt if both were tokenised as one text. This "
                "happens after a prompt that ends with a space, for example. Here they are tokenised separately, as in "
                "generation. If there are many, move the space to the start of the completion.",
            ),
            (
                self.eos_inside,
                f"of {completions} hold an EOS before their end. In generation the model stops there: look for special "
                "tokens that are written out in the text.",
            ),
            (
                self.eos_missing,
                f"of {completions} do not end with EOS: the model does not learn from them to stop. Token ids are "
                "taken as they are given.",
            ),
            (
                self.completions_cut,
                f'of {completions} lost their end to max_length, EOS with it (on_truncate="keep_start"): the model '
                "does not learn from them to stop.",
            ),
            (self.prompts_cut, f'of {rows} lost the beginning of their prompt to max_length (on_truncate="keep_end").'),
            (
                self.template_mismatch,
                f"of {rows} have answers that do not start with the chat template's generation prompt, which may add a "
                "thinking tag: the model is trained on a different prompt than it gets in generation.",
            ),
            (
                self.shared_words,
                "pairs without a prompt column have answers that begin with the same words: the prompt ends before "
                "them, behind the last turn marker.",
            ),
            (
                self.unmarked_prompts,
                "pairs without a prompt column have no turn marker such as 'Assistant:'. All words that both sides "
                "begin with count as their prompt, even where the two answers begin alike.",
            ),
            (
                self.answers_cut,
                "earlier answers of conversations are scored without some of their thoughts or words, because the chat "
                "template leaves them out. To train on all thoughts, make a row of each answer.",
            ),
            (
                self.thoughts_kept,
                f"of {completions} are scored with the thoughts of their last answer, which the chat template leaves "
                "out.",
            ),
            (
                self.foreign_thoughts,
                f"of {completions} have their thoughts in <think> tags, which are scored as words: the chat template "
                "writes thoughts in another way. Give them under the key 'reasoning_content' of the answer.",
            ),
            (
                self.unstopped_answers,
                "earlier answers of conversations end without a special token, because the chat template writes none "
                "there: the model learns to stop from the last answers alone.",
            ),
        ]
        general = [f"Columns that are not read: {', '.join(self.unread_columns)}."] if self.unread_columns else []
        if self.plain_on_chat:
            general.append(
                "The rows are plain strings, and the tokenizer has a chat template, which is not used. To train on its "
                "turns, give chat messages, or call tokenize(..., apply_chat_template=True)."
            )
        return general + [f"{count:,} {text}" for count, text in notes if count]
