"""From rows to tokens, with a report on what tokenising did to them.

    file -> rows (files.py) -> texts of prompt and completions (formats.py) -> their tokens (encoding.py)
         -> a data set with prompt_ids, completion_ids, completion_mask, label (here) -> DataReport (report.py)

Nothing here reaches the network. A cache is written only where the caller names its folder (see token_cache.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import datasets

from fastalign.data.chat import Example
from fastalign.data.columns import unread_columns
from fastalign.data.encoding import (
    Tokens,
    add_bos_and_eos,
    encode_examples,
    score_everything,
    special_prefix,
    truncate_completions,
    truncate_prompt,
    words_of,
)
from fastalign.data.formats import Format, check_row, detect_format, to_example
from fastalign.data.layouts import Converted, convert_rows
from fastalign.data.loading import Rows, load_rows
from fastalign.data.messages import RowProblem
from fastalign.data.pretokenized import TokenFormat, read_tokens, token_format
from fastalign.data.report import DataReport, Lengths
from fastalign.data.token_cache import FileSink, MemorySink, find_cache
from fastalign.data.token_keys import files_of_rows
from fastalign.data.token_table import lengths, scored, table_of
from fastalign.data.unpairing import labelled_from_pairs
from fastalign.data.words import Words
from fastalign.data.workers import in_order, worker_count
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.options import OnInvalid, OnTruncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000
MANY_BATCHES = 4  # above which several processes take less time than one, although each has to start
# What the rows may be for, what they must hold, and what rows of which formats can serve.
NEEDS = {
    "pairs": "pairs, with chosen and rejected,",
    "labelled": "rows with prompt, completion and label, or pairs,",
    "completions": "text, messages, or prompt and completion (without a label)",
}
GIVES = {"pairs": "pairs", "labelled": "rows with a label", "completions": "conversations without a label"}
GIVEN_FOR = {"pairs": ("pairs",), "labelled": ("labelled", "pairs"), "completions": ("completions",)}
NAMED_ROWS = 5  # how many row numbers an error or the report lists


def tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    on_truncate: OnTruncate = "error",
    on_invalid: OnInvalid = "error",
    num_proc: int | None = None,
    allow_empty_prompt: bool = False,
    apply_chat_template: bool = False,
    wanted: str | None = None,
    score_all_of: Collection[str] = (),
    cache_dir: str | Path | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """Tokenises rows of any known format, and reports on it.

    - A prompt is tokenised alone, because that is how the model sees it in generation. A completion is tokenised as
      the continuation of its prompt.
    - If the tokenizer puts BOS (or another prefix) before a text, `prompt_ids` starts with it exactly once, whether or
      not a chat template writes it too.
    - Every completion ends with EOS exactly once: without it the model would not learn to stop. The end-of-turn token
      of a chat template is that EOS if it is the tokenizer's `eos_token`.

    Args:
        rows: anything that `load_rows` takes. All rows have one layout, which is recognised by the columns (see
            `fastalign.data.layouts` and `fastalign.data.formats`). Rows of token ids are checked and taken as they are
            (see `fastalign.data.pretokenized`).
        tokenizer: a transformers tokenizer with an EOS token. Chat messages go through its chat template.
        max_length: the most tokens of a prompt together with its longest completion; None sets no limit.
        on_truncate: what happens to rows that are longer. "error": they are refused. "drop": they are left out.
            "keep_end": the beginning of their prompt is cut (BOS stays). A completion is never cut and never loses its
            EOS, so a row whose completion is too long is left out. "keep_start": the end of their completions is cut,
            EOS with it. A row of whose completions nothing would be left, or no difference, is left out.
        on_invalid: what happens to rows with missing fields, wrong types, empty completions or identical pairs.
            "error": they are refused. "drop": they are left out.
        num_proc: how many processes to use; None: for some thousand rows one per processor, for fewer rows this one.
        allow_empty_prompt: whether rows of plain strings may lack a prompt: an empty one, or a pair without a prompt
            whose answers do not begin alike. Such rows count as invalid otherwise.
        apply_chat_template: whether plain strings become chat messages: the prompt a user's turn, and each completion
            an assistant's. Rows that hold chat messages always go through the chat template.
        wanted: what the rows are for: "pairs", "labelled" (one completion with a label), or "completions". Other rows
            are refused before they are tokenised. Of pairs, "labelled" makes two rows each: the chosen completion with
            the label true, the rejected one with the label false. None takes rows of any format.
        score_all_of: formats ("messages", "prompt-completion") of whose rows every token is scored behind BOS, the
            prompt and the user's turns too. Without it, completions and the assistant's turns are.
        cache_dir: a folder where the tokens of many rows are stored, to be found by the next call with the same rows,
            tokenizer and options; None: they are held in memory, and not stored.

    Returns:
        The data set and its report. The columns of the data set:

        - `prompt_ids`: list of int32
        - `completion_ids`: list of lists of int32; two lists for preference data, chosen first
        - `completion_mask`: as `completion_ids`, 1 for scored tokens; the column exists only if a token is not scored
        - `label`: bool; the column exists only for unpaired data

    Raises:
        ConfigError: an unknown option.
        ModelError: the tokenizer has no EOS token, or it is a slow one and the rows hold chat messages.
        DataError: the rows cannot be read or used, or none is left.

    Examples:
        >>> dataset, report = tokenize("pairs.jsonl", tokenizer, max_length=1024, on_truncate="drop")
        >>> print(report)
    """
    _check_options(max_length, on_truncate, on_invalid, wanted)
    options = {
        "max_length": max_length, "on_truncate": on_truncate, "on_invalid": on_invalid, "wanted": wanted,
        "allow_empty_prompt": allow_empty_prompt, "apply_chat_template": apply_chat_template,
        "score_all_of": sorted(score_all_of),
    }  # fmt: skip
    if cache_dir is not None and files_of_rows(rows) is None:
        rows = load_rows(rows)  # the key is made of the values
    compute = partial(_tokenized, rows, tokenizer, num_proc=num_proc, **options)
    cache = find_cache(cache_dir, rows, tokenizer, options)
    return compute(sink=MemorySink()) if cache is None else cache.read_or_write(compute)


def _tokenized(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sink: MemorySink | FileSink,
    num_proc: int | None,
    max_length: int | None,
    on_truncate: OnTruncate,
    on_invalid: OnInvalid,
    wanted: str | None,
    allow_empty_prompt: bool,
    apply_chat_template: bool,
    score_all_of: Collection[str],
) -> tuple[datasets.Dataset, DataReport]:
    """As `tokenize`; the tokens are collected in `sink`."""
    rows = load_rows(rows).with_format(None)
    if not len(rows):
        raise DataError("The data set has no rows: it needs at least one.")
    fmt = token_format(rows)
    limits: dict[str, Any] = {"max_length": max_length, "on_truncate": on_truncate}
    if fmt is not None:
        converted = Converted(rows)
        _check_wanted(fmt, wanted)
        work = partial(_take_rows, fmt=fmt, tokenizer=tokenizer, **limits)
    else:
        converted = convert_rows(rows, wanted)
        fmt = _checked_format(converted, wanted)
        fmt = _as_chat(fmt) if apply_chat_template else fmt
        read = partial(to_example, fmt=fmt, tokenizer=tokenizer, allow_empty_prompt=allow_empty_prompt)
        limits |= {"words": words_of(tokenizer), "score_all": fmt.name in score_all_of}
        work = partial(_tokenize_rows, read=read, tokenizer=tokenizer, **limits)
    _check_tokenizer(tokenizer, fmt)
    cells, starts = partial(_cells, converted.rows, fmt), range(0, len(converted.rows), BATCH_ROWS)
    workers = worker_count(len(starts), 1 if num_proc is None and len(starts) <= MANY_BATCHES else num_proc)
    # Fewer rows are tokenised fast enough that one error can name everything that is wrong.
    if on_invalid == "error" and isinstance(fmt, Format) and len(converted.rows) > BATCH_ROWS:
        _check_rows(in_order(partial(_checked_rows, cells, fmt), starts, workers), converted, len(rows))
    outcome, unpaired = _Outcome(), wanted == "labelled" and fmt.gives == "pairs"
    for batch in in_order(partial(_worked, cells, work), starts, workers):
        outcome.add(batch)
        sink.add(labelled_from_pairs(batch.table) if unpaired else batch.table)
    _number_as_given(outcome, converted)
    _raise_if_refused(outcome, len(rows), max_length, on_truncate, on_invalid)
    label = unpaired or fmt.gives == "labelled"
    tokens = sink.finish(masked=bool(outcome.counts["masked"]), labelled=label)
    report = _report(tokens, outcome, fmt, len(rows), max_length)
    return tokens, replace(
        report,
        layout=converted.name,
        rows_made=len(converted.rows) if converted.name else None,
        unpaired=unpaired,
        unread_columns=unread_columns(rows, converted.read if converted.name else fmt.sources),
        plain_on_chat=bool(
            not fmt.chat and fmt.name not in ("text", "tokens") and getattr(tokenizer, "chat_template", None)
        ),
    )


@dataclass
class _Outcome:
    """The result of tokenising some rows. Row numbers count from 1, as people do."""

    rows: list[tuple[Tokens, bool | None]] = field(default_factory=list)  # each with its label
    problems: list[tuple[int, str, str]] = field(default_factory=list)  # (row number, kind, detail)
    too_long: list[tuple[int, int]] = field(default_factory=list)  # (row number, tokens)
    left_out: list[tuple[str, int]] = field(default_factory=list)  # (reason, row number) of rows that teach nothing
    counts: Counter = field(default_factory=Counter)  # fields of the report, and "masked"
    kept: int = 0  # how many rows there are
    table: Any = None  # of the rows, which are then no longer here

    def add(self, other: _Outcome) -> None:
        """Adds what was found in other rows, without the rows themselves."""
        self.problems += other.problems
        self.too_long += other.too_long
        self.counts.update(other.counts)
        self.kept += other.kept


def _checked_format(converted: Converted, wanted: str | None) -> Format:
    """The format of the rows, which must be one that is wanted."""
    try:
        fmt = detect_format(converted.rows)
    except DataError as error:
        if converted.other is None:
            raise
        raise DataError(
            f"The rows have the layout '{converted.other.name}', which gives {GIVES[converted.other.gives]}; "
            f"{NEEDS[str(wanted)]} are needed."
        ) from error
    _check_wanted(fmt, wanted)
    return fmt


def _check_wanted(fmt: Format | TokenFormat, wanted: str | None) -> None:
    if wanted and fmt.gives not in GIVEN_FOR[wanted]:
        raise DataError(f"The data set is '{fmt}'; {NEEDS[wanted]} are needed.")


def _cells(rows: datasets.Dataset, fmt: Format | TokenFormat, start: int) -> tuple[int, dict[str, list]]:
    """Some rows, as (how many rows are before them, columns)."""
    return start, rows.select_columns(list(fmt.sources.values()))[start : start + BATCH_ROWS]


def _checked_rows(cells: Callable[[int], tuple[int, dict[str, list]]], fmt: Format, start: int) -> _Outcome:
    outcome = _Outcome()
    _read_examples(cells(start), partial(check_row, fmt=fmt), outcome)
    return outcome


def _check_rows(batches: Iterator[_Outcome], converted: Converted, rows: int) -> None:
    """Refuses rows for what can be seen without the tokenizer: a bad value in the last row should show at once."""
    outcome = _Outcome(kept=rows)
    for batch in batches:
        outcome.add(batch)
    _number_as_given(outcome, converted)
    _raise_if_refused(outcome, rows, None, "error", "error")


def _number_as_given(outcome: _Outcome, converted: Converted) -> None:
    """Numbers rows as they were before they were converted, and adds what converting them has found."""
    if not converted.name:
        return
    outcome.problems = [(converted.numbers[n - 1], kind, detail) for n, kind, detail in outcome.problems]
    outcome.problems = sorted(outcome.problems + converted.problems)
    outcome.too_long = [(converted.numbers[n - 1], length) for n, length in outcome.too_long]
    outcome.left_out = [("no better answer", number) for number in converted.empty]


def _check_options(max_length: int | None, on_truncate: str, on_invalid: str, wanted: str | None) -> None:
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ConfigError(f"max_length must be an integer of at least 2 or None, found {max_length!r}.")
    if on_truncate not in get_args(OnTruncate):
        raise ConfigError(f"on_truncate must be one of {', '.join(get_args(OnTruncate))}, found {on_truncate!r}.")
    if on_invalid not in get_args(OnInvalid):
        raise ConfigError(f'on_invalid must be "error" or "drop", found {on_invalid!r}.')
    if wanted is not None and wanted not in NEEDS:
        raise ConfigError(f"wanted must be one of {', '.join(NEEDS)} or None, found {wanted!r}.")


def _as_chat(fmt: Format) -> Format:
    """The format with its plain strings taken as turns."""
    if not fmt.chat and "prompt" not in fmt.columns:
        raise ConfigError(f"apply_chat_template needs rows with a prompt, found {fmt}: leave it out.")
    return replace(fmt, chat=True)


def _check_tokenizer(tokenizer, fmt: Format | TokenFormat) -> None:
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ModelError("The tokenizer has no EOS token, which must end each completion: set tokenizer.eos_token.")
    if fmt.chat and not tokenizer.chat_template:
        raise DataError(
            "The rows hold chat messages, but the tokenizer has no chat template: set tokenizer.chat_template (take it "
            "from the instruction-tuned version of the model), or give the rows as plain strings."
        )
    if fmt.chat and not tokenizer.is_fast:
        raise ModelError(
            f"Chat messages need a fast tokenizer, which knows where each token lies in the text, and "
            f"{type(tokenizer).__name__} is a slow one: load it with AutoTokenizer, or give the rows as plain strings."
        )


def _worked(
    cells: Callable[[int], tuple[int, dict[str, list]]], work: Callable[[Any], _Outcome], start: int
) -> _Outcome:
    """The outcome of some rows, with their tokens as a table: Python's lists take ten times the memory of Arrow's."""
    outcome = work(cells(start))
    outcome.problems.sort()
    outcome.table = table_of(outcome.rows, masked=bool(outcome.counts["masked"]))
    outcome.kept, outcome.rows = len(outcome.rows), []
    return outcome


def _tokenize_rows(
    batch: tuple[int, dict[str, list]],
    read: Callable[[dict], Example],
    tokenizer,
    words: Words | None,
    max_length: int | None,
    on_truncate: str,
    score_all: bool,
) -> _Outcome:
    """Tokenises some rows, given as (how many rows are before them, columns)."""
    outcome = _Outcome()
    examples = _read_examples(batch, read, outcome)
    prefix = special_prefix(tokenizer)
    encoded = encode_examples(list(examples.values()), tokenizer, words)
    for (number, example), tokens in zip(examples.items(), encoded, strict=True):
        add_bos_and_eos(tokens, example, prefix, tokenizer.eos_token_id)
        if problem := _token_problem(tokens):
            outcome.problems.append((number, *problem))
        else:
            if score_all:
                score_everything(tokens, prefix)
            _take(outcome, number, tokens, example.label, prefix, max_length, on_truncate)
    return outcome


def _take_rows(
    batch: tuple[int, dict[str, list]], fmt: TokenFormat, tokenizer, max_length: int | None, on_truncate: str
) -> _Outcome:
    """Takes over some rows of token ids, given as (how many rows are before them, columns)."""
    outcome, prefix = _Outcome(), special_prefix(tokenizer)
    read = partial(read_tokens, fmt=fmt, vocabulary=len(tokenizer), eos=tokenizer.eos_token_id)
    for number, (tokens, label) in _read_examples(batch, read, outcome).items():
        if len(tokens.completions) == 2 and tokens.completions[0] == tokens.completions[1]:
            outcome.problems.append((number, "identical pair", "chosen and rejected are the same tokens"))
        else:
            _take(outcome, number, tokens, label, prefix, max_length, on_truncate)
    return outcome


def _take(
    outcome: _Outcome, number: int, tokens: Tokens, label, prefix: list[int], max_length: int | None, on_truncate: str
) -> None:
    """Adds a row to the outcome: to its rows, or to those that are too long."""
    length = tokens.length
    if max_length and length > max_length and not (
        (on_truncate == "keep_end" and truncate_prompt(tokens, prefix, max_length))
        or (on_truncate == "keep_start" and truncate_completions(tokens, max_length))
    ):  # fmt: skip
        outcome.too_long.append((number, length))
        return
    outcome.counts.update(tokens.counts)
    outcome.rows.append((tokens, label))


def _read_examples(
    batch: tuple[int, dict[str, list]], read: Callable[[dict], Any], outcome: _Outcome
) -> dict[int, Any]:
    """The usable rows by their numbers. What is wrong with the others goes into `outcome`."""
    before, columns = batch
    examples = {}
    for number, values in enumerate(zip(*columns.values(), strict=True), start=before + 1):
        row = dict(zip(columns, values, strict=True))
        try:  # one bad row must not stop the others
            examples[number] = read(row)
        except RowProblem as problem:
            outcome.problems.append((number, problem.kind, problem.detail))
    return examples


def _token_problem(tokens: Tokens) -> tuple[str, str] | None:
    """Kind and detail of what only the tokens show to be wrong."""
    if any(len(ids) == 1 for ids in tokens.completions):
        return "empty completion", "a completion holds nothing but EOS"
    if len(tokens.completions) == 2 and tokens.completions[0] == tokens.completions[1]:
        return "identical pair", "chosen and rejected give the same tokens"
    return None


# The report


def _raise_if_refused(outcome: _Outcome, rows: int, max_length, on_truncate: str, on_invalid: str) -> None:
    if outcome.problems and on_invalid == "error":
        raise DataError(
            f"{len(outcome.problems):,} of {rows:,} rows cannot be used: {_describe(outcome.problems)}. Mend them, or "
            'pass on_invalid="drop" to leave them out (rows are counted from 1).'
        )
    longest = max((length for _, length in outcome.too_long), default=0)
    if outcome.too_long and on_truncate == "error":
        raise DataError(
            f"{len(outcome.too_long):,} of {rows:,} rows are longer than max_length={max_length:,} tokens (the longest "
            f'has {longest:,}): raise max_length, or pass on_truncate="drop" to leave them out, "keep_end" to cut '
            'the beginning of their prompts, or "keep_start" to cut the end of their completions.'
        )
    if not outcome.kept:
        reason = (
            _describe(outcome.problems) or f"all are longer than max_length={max_length} (the longest has {longest:,})"
        )
        raise DataError(f"None of the {rows:,} rows is left: {reason}.")


def _describe(problems: list[tuple[int, str, str]]) -> str:
    """The problems by kind, each with the numbers of its first rows and with the first row's detail."""
    parts = []
    for kind in dict.fromkeys(kind for _, kind, _ in problems):
        rows = [(number, detail) for number, other, detail in problems if other == kind]
        numbers = ", ".join(str(number) for number, _ in rows[:NAMED_ROWS]) + (
            ", ..." if len(rows) > NAMED_ROWS else ""
        )
        parts.append(f"{len(rows):,} with {kind} (row{'s' if len(rows) > 1 else ''} {numbers}: {rows[0][1]})")
    return "; ".join(parts)


def _report(
    tokens: datasets.Dataset, outcome: _Outcome, fmt: Format | TokenFormat, rows: int, max_length: int | None
) -> DataReport:
    found = lengths(tokens)
    in_all = scored(tokens) if "completion_mask" in tokens.column_names else int(found.completions.sum())
    left_out = [(kind, number) for number, kind, _ in outcome.problems] + [("too long", n) for n, _ in outcome.too_long]
    left_out += outcome.left_out
    counts: dict[str, Any] = {name: count for name, count in outcome.counts.items() if name != "masked"}
    return DataReport(
        format=str(fmt),
        rows_in=rows,
        rows_kept=len(tokens),
        dropped=dict(Counter(kind for kind, _ in left_out)),
        dropped_rows={kind: [n for other, n in left_out if other == kind][:NAMED_ROWS] for kind, _ in left_out},
        prompt_length=Lengths.of(found.prompts),
        completion_length=Lengths.of(found.completions),
        completions=len(found.completions),
        tokens_shared=int(found.per_row().sum()),
        tokens_unshared=int(found.with_prompt().sum()),
        # Nothing predicts the first token of a completion without a prompt.
        scored_tokens=in_all - int(found.counts[found.prompts == 0].sum()),
        max_length=max_length,
        **counts,
    )
