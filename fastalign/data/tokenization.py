"""From rows to tokens, with a report on what tokenising did to them.

    file -> rows (files.py) -> texts of prompt and completions (formats.py) -> their tokens (encoding.py)
         -> a data set with prompt_ids, completion_ids, completion_mask, label (here) -> DataReport (report.py)

Nothing here reaches the network or writes a cache: data sets live in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import datasets
import pyarrow.compute as pc
from datasets import Features, List, Value

from fastalign.data.chat import Example
from fastalign.data.columns import unread_columns
from fastalign.data.encoding import Tokens, add_bos_and_eos, encode_examples, special_prefix, truncate_prompt
from fastalign.data.formats import Format, check_row, detect_format, to_example
from fastalign.data.layouts import Converted, convert_rows
from fastalign.data.loading import Rows, load_rows
from fastalign.data.messages import RowProblem
from fastalign.data.numbers import numbers_of, with_numbers
from fastalign.data.pretokenized import TokenFormat, read_tokens, token_format
from fastalign.data.report import DataReport, Lengths
from fastalign.data.unpairing import labelled_from_pairs
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.options import OnInvalid, OnTruncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000
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
    numbers: Sequence[str] = (),
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
            EOS, so a row whose completion is too long is left out.
        on_invalid: what happens to rows with missing fields, wrong types, empty completions or identical pairs.
            "error": they are refused. "drop": they are left out.
        num_proc: how many worker processes to use. A fast tokenizer uses all cores already, so more processes help
            only with slow chat templates.
        allow_empty_prompt: whether rows of plain strings may lack a prompt: an empty one, or a pair without a prompt
            whose answers do not begin alike. Such rows count as invalid otherwise.
        apply_chat_template: whether plain strings become chat messages: the prompt a user's turn, and each completion
            an assistant's. Rows that hold chat messages always go through the chat template.
        wanted: what the rows are for: "pairs", "labelled" (one completion with a label), or "completions". Other rows
            are refused before they are tokenised. Of pairs, "labelled" makes two rows each: the chosen completion with
            the label true, the rejected one with the label false. None takes rows of any format.
        numbers: columns of numbers that are carried over where the rows have them, one finite number per row.

    Returns:
        The data set and its report. The columns of the data set:

        - `prompt_ids`: list of int32
        - `completion_ids`: list of lists of int32; two lists for preference data, chosen first
        - `completion_mask`: as `completion_ids`, 1 for scored tokens; the column exists only if a token is not scored
        - `label`: bool; the column exists only for unpaired data
        - the columns of `numbers`: float64

    Raises:
        ConfigError: an unknown option.
        ModelError: the tokenizer has no EOS token, or it is a slow one and the rows hold chat messages.
        DataError: the rows cannot be read or used, or none is left.

    Examples:
        >>> dataset, report = tokenize("pairs.jsonl", tokenizer, max_length=1024, on_truncate="drop")
        >>> print(report)
    """
    _check_options(max_length, on_truncate, on_invalid, wanted)
    rows = load_rows(rows).with_format(None)
    if not len(rows):
        raise DataError("The data set has no rows: it needs at least one.")
    fmt = token_format(rows)
    if fmt is not None:
        converted = Converted(rows)
        _check_wanted(fmt, wanted)
        work = partial(_take_rows, fmt=fmt)
    else:
        converted = convert_rows(rows, wanted)
        fmt = _checked_format(converted, wanted)
        fmt = _as_chat(fmt) if apply_chat_template else fmt
        read = partial(to_example, fmt=fmt, tokenizer=tokenizer, allow_empty_prompt=allow_empty_prompt)
        work = partial(_tokenize_rows, read=read)
    numbers = [name for name in numbers if name in converted.rows.column_names]
    work = partial(work, numbers=numbers, tokenizer=tokenizer, max_length=max_length, on_truncate=on_truncate)
    _check_tokenizer(tokenizer, fmt)
    # Fewer rows are tokenised fast enough that one error can name everything that is wrong.
    if on_invalid == "error" and isinstance(fmt, Format) and len(converted.rows) > BATCH_ROWS:
        _check_rows(converted, fmt, len(rows))
    outcome = _Outcome()
    tokens = _to_dataset(_run(work, _batches(converted.rows, fmt, numbers), num_proc), outcome, fmt, numbers)
    _number_as_given(outcome, converted)
    _raise_if_refused(outcome, len(tokens), len(rows), max_length, on_truncate, on_invalid)
    if wanted == "labelled" and fmt.gives == "pairs":
        tokens = labelled_from_pairs(tokens)
    report = _report(tokens, outcome, fmt, len(rows), max_length)
    return tokens, replace(
        report,
        layout=converted.name,
        rows_made=len(converted.rows) if converted.name else None,
        unpaired="label" in tokens.column_names and fmt.gives == "pairs",
        unread_columns=unread_columns(rows, converted.read if converted.name else fmt.sources),
        plain_on_chat=bool(
            not fmt.chat and fmt.name not in ("text", "tokens") and getattr(tokenizer, "chat_template", None)
        ),
    )


@dataclass
class _Outcome:
    """The result of tokenising some rows. Row numbers count from 1, as people do."""

    rows: list[dict] = field(default_factory=list)
    problems: list[tuple[int, str, str]] = field(default_factory=list)  # (row number, kind, detail)
    too_long: list[tuple[int, int]] = field(default_factory=list)  # (row number, tokens)
    left_out: list[tuple[str, int]] = field(default_factory=list)  # (reason, row number) of rows that teach nothing
    counts: Counter = field(default_factory=Counter)  # fields of the report, and "masked"


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


def _batches(
    rows: datasets.Dataset, fmt: Format | TokenFormat, numbers: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, list]]]:
    rows = rows.select_columns([*fmt.sources.values(), *numbers])
    return ((start, rows[start : start + BATCH_ROWS]) for start in range(0, len(rows), BATCH_ROWS))


def _check_rows(converted: Converted, fmt: Format, rows: int) -> None:
    """Refuses rows for what can be seen without the tokenizer: a bad value in the last row should show at once."""
    outcome = _Outcome()
    for batch in _batches(converted.rows, fmt):
        _read_examples(batch, partial(check_row, fmt=fmt), outcome)
    _number_as_given(outcome, converted)
    _raise_if_refused(outcome, rows, rows, None, "error", "error")


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
        raise ConfigError(f'on_truncate must be "error", "drop" or "keep_end", found {on_truncate!r}.')
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


def _run(work, batches, num_proc: int | None) -> Iterator[_Outcome]:
    if not num_proc or num_proc == 1:
        yield from (work(batch) for batch in batches)
        return
    with ProcessPoolExecutor(num_proc) as pool:
        yield from pool.map(work, batches)


def _tokenize_rows(
    batch: tuple[int, dict[str, list]],
    read: Callable[[dict], Example],
    numbers: Sequence[str],
    tokenizer,
    max_length: int | None,
    on_truncate: str,
) -> _Outcome:
    """Tokenises some rows, given as (how many rows are before them, columns)."""
    outcome = _Outcome()
    examples = _read_examples(batch, partial(with_numbers, read=read, names=numbers), outcome)
    prefix = special_prefix(tokenizer)
    encoded = encode_examples(list(examples.values()), tokenizer)
    for (number, example), tokens in zip(examples.items(), encoded, strict=True):
        add_bos_and_eos(tokens, example, prefix, tokenizer.eos_token_id)
        if problem := _token_problem(tokens):
            outcome.problems.append((number, *problem))
        else:
            columns = {"label": example.label, **numbers_of(batch, number, numbers)}
            _take(outcome, number, tokens, columns, prefix, max_length, on_truncate)
    outcome.problems.sort()
    return outcome


def _take_rows(
    batch: tuple[int, dict[str, list]],
    fmt: TokenFormat,
    numbers: Sequence[str],
    tokenizer,
    max_length: int | None,
    on_truncate: str,
) -> _Outcome:
    """Takes over some rows of token ids, given as (how many rows are before them, columns)."""
    outcome, prefix = _Outcome(), special_prefix(tokenizer)
    read = partial(read_tokens, fmt=fmt, vocabulary=len(tokenizer), eos=tokenizer.eos_token_id)
    read = partial(with_numbers, read=read, names=numbers)
    for number, (tokens, label) in _read_examples(batch, read, outcome).items():
        if len(tokens.completions) == 2 and tokens.completions[0] == tokens.completions[1]:
            outcome.problems.append((number, "identical pair", "chosen and rejected are the same tokens"))
        else:
            columns = {"label": label, **numbers_of(batch, number, numbers)}
            _take(outcome, number, tokens, columns, prefix, max_length, on_truncate)
    outcome.problems.sort()
    return outcome


def _take(
    outcome: _Outcome, number: int, tokens: Tokens, columns: dict[str, Any], prefix: list[int], max_length: int | None,
    on_truncate: str,
) -> None:  # fmt: skip
    """Adds a row to the outcome: to its rows, or to those that are too long."""
    length = tokens.length
    if max_length and length > max_length and not (
        on_truncate == "keep_end" and truncate_prompt(tokens, prefix, max_length)
    ):  # fmt: skip
        outcome.too_long.append((number, length))
        return
    outcome.counts.update(tokens.counts)
    outcome.rows.append(
        {
            "prompt_ids": tokens.prompt,
            "completion_ids": tokens.completions,
            "completion_mask": tokens.masks,
            **columns,
        }
    )


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


# The data set and its report


def _to_dataset(
    batches: Iterator[_Outcome], outcome: _Outcome, fmt: Format | TokenFormat, numbers: Sequence[str] = ()
) -> datasets.Dataset:
    """One data set of all batches. Problems and counts are added up in `outcome`.

    Each batch is converted as it comes: Python's lists take ten times the memory of Arrow's.
    """
    features = Features(
        prompt_ids=List(Value("int32")),
        completion_ids=List(List(Value("int32"))),
        completion_mask=List(List(Value("int8"))),
        label=Value("bool"),
        **{name: Value("float64") for name in numbers},
    )
    tables = []
    for batch in batches:
        columns = {name: [row[name] for row in batch.rows] for name in features}
        tables.append(datasets.Dataset.from_dict(columns, features=features))
        outcome.problems += batch.problems
        outcome.too_long += batch.too_long
        outcome.counts.update(batch.counts)
    unused = [] if fmt.gives == "labelled" else ["label"]
    unused += [] if outcome.counts["masked"] else ["completion_mask"]
    return datasets.concatenate_datasets(tables).remove_columns(unused)


def _raise_if_refused(outcome: _Outcome, usable: int, rows: int, max_length, on_truncate: str, on_invalid: str) -> None:
    if outcome.problems and on_invalid == "error":
        raise DataError(
            f"{len(outcome.problems):,} of {rows:,} rows cannot be used: {_describe(outcome.problems)}. Mend them, or "
            'pass on_invalid="drop" to leave them out (rows are counted from 1).'
        )
    longest = max((length for _, length in outcome.too_long), default=0)
    if outcome.too_long and on_truncate == "error":
        raise DataError(
            f"{len(outcome.too_long):,} of {rows:,} rows are longer than max_length={max_length:,} tokens (the longest "
            f'has {longest:,}): raise max_length, or pass on_truncate="drop" to leave them out or "keep_end" to cut '
            "the beginning of their prompts."
        )
    if not usable:
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
    prompts = _arrow("list_value_length", tokens.data["prompt_ids"]).to_numpy()  # (N,)
    every_completion = _arrow("list_flatten", tokens.data["completion_ids"])
    completions = _arrow("list_value_length", every_completion).to_numpy().reshape(len(prompts), -1)  # (N, k)
    scored = int(completions.sum())
    if "completion_mask" in tokens.column_names:
        every_mask = _arrow("list_flatten", tokens.data["completion_mask"])
        scored = _arrow("sum", _arrow("list_flatten", every_mask)).as_py()
    left_out = [(kind, number) for number, kind, _ in outcome.problems] + [("too long", n) for n, _ in outcome.too_long]
    left_out += outcome.left_out
    counts: dict[str, Any] = {name: count for name, count in outcome.counts.items() if name != "masked"}
    return DataReport(
        format=str(fmt),
        rows_in=rows,
        rows_kept=len(tokens),
        dropped=dict(Counter(kind for kind, _ in left_out)),
        dropped_rows={kind: [n for other, n in left_out if other == kind][:NAMED_ROWS] for kind, _ in left_out},
        prompt_length=Lengths.of(prompts),
        completion_length=Lengths.of(completions),
        completions=completions.size,
        tokens_shared=int(prompts.sum() + completions.sum()),
        tokens_unshared=int((prompts[:, None] + completions).sum()),
        # Nothing predicts the first token of a completion without a prompt.
        scored_tokens=scored - int((prompts == 0).sum()) * completions.shape[1],
        max_length=max_length,
        **counts,
    )


def _arrow(function: str, column):
    """One of Arrow's compute functions by its name; pyarrow makes its Python functions from these at run time."""
    return pc.call_function(function, [column])
