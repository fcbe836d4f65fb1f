"""Data sets: from rows to tokens, with a report on what that did to them.

    file -> rows (fastalign/rows.py) -> prompt and completion texts (fastalign/formats.py)
         -> prompt_ids, completion_ids, completion_mask, label -> DataReport (fastalign/preflight.py)

Nothing here reaches the network or writes a cache: data sets live in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import datasets
import pyarrow.compute as pc
from datasets import Features, List, Value

from fastalign.data.files import load_rows
from fastalign.data.formats import Example, Format, RowProblem, detect_format, to_example
from fastalign.data.report import DataReport, Lengths
from fastalign.errors import ConfigError, DataError, ModelError

__all__ = ["load_rows", "tokenize"]

BATCH_ROWS = 1000
NAMED_ROWS = 5  # how many row numbers an error or the report spells out


def tokenize(
    rows,
    tokenizer,
    *,
    max_length: int | None = None,
    on_truncate: str = "error",
    on_invalid: str = "error",
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """Tokenise rows of any known format, and report on it.

    rows         anything `load_rows` takes; their format (see `fastalign.data.formats`) is found once for all
    tokenizer    a transformers tokenizer with an EOS token; chat messages go through its chat template
    max_length   most tokens of a prompt with its longest completion
    on_truncate  "error": refuse rows that are too long; "drop": leave them out; "keep_end": cut the beginning of their
                 prompt, behind BOS. A completion is never cut and never loses its EOS: one too long drops its row
    on_invalid   "error": refuse rows with missing fields, wrong types, empty completions, identical pairs; "drop"
    num_proc     worker processes. The tokenizer uses all cores already; more processes help with slow chat templates

    Returns a data set and its `DataReport`. Columns: prompt_ids (int32 list), completion_ids (a list of them, two for
    preference data), completion_mask (same shape, 1: scored; there only if some token is not scored) and label (there
    only for unpaired data).

    A prompt is tokenised alone, as in generation, and each completion as its continuation. If the tokenizer puts BOS
    (or another prefix) before a text, prompt_ids starts with it exactly once, whether or not a chat template writes it
    too. Each completion ends with EOS exactly once; a chat template's end-of-turn token is that EOS if it is the
    tokenizer's eos_token.

    Raises ConfigError for unknown options, ModelError for a tokenizer without EOS, DataError for the rest.
    """
    _check_options(max_length, on_truncate, on_invalid)
    rows = load_rows(rows).with_format(None)
    if not len(rows):
        raise DataError("The data set has no rows: it needs at least one.")
    fmt = detect_format(rows)
    _check_tokenizer(tokenizer, fmt)
    rows = rows.select_columns([name for name in (*fmt.columns, "tools") if name in rows.column_names])
    work = partial(_tokenize_batch, fmt=fmt, tokenizer=tokenizer, max_length=max_length, on_truncate=on_truncate)
    batches = ((start, rows[start : start + BATCH_ROWS]) for start in range(0, len(rows), BATCH_ROWS))
    result = _Batch()
    tokens = _to_dataset(_run(work, batches, num_proc), result, fmt)
    _raise_if_refused(result, len(tokens), len(rows), max_length, on_truncate, on_invalid)
    return tokens, _report(tokens, result, fmt, len(rows), max_length)


@dataclass
class _Batch:
    """What tokenising some rows gave."""

    rows: list[dict] = field(default_factory=list)
    problems: list[tuple[int, str, str]] = field(default_factory=list)  # (row number, kind, detail)
    too_long: list[tuple[int, int]] = field(default_factory=list)  # (row number, tokens)
    counts: Counter = field(default_factory=Counter)


def _check_options(max_length: int | None, on_truncate: str, on_invalid: str) -> None:
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ConfigError(f"max_length must be an integer of at least 2 or None, found {max_length!r}.")
    if on_truncate not in ("error", "drop", "keep_end"):
        raise ConfigError(f'on_truncate must be "error", "drop" or "keep_end", found {on_truncate!r}.')
    if on_invalid not in ("error", "drop"):
        raise ConfigError(f'on_invalid must be "error" or "drop", found {on_invalid!r}.')


def _check_tokenizer(tokenizer, fmt: Format) -> None:
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ModelError("The tokenizer has no EOS token, which must end each completion: set tokenizer.eos_token.")
    if fmt.chat and not tokenizer.chat_template:
        raise DataError(
            "The rows hold chat messages, but the tokenizer has no chat template: set tokenizer.chat_template (take it "
            "from the instruction-tuned version of the model), or give the rows as plain strings."
        )
    if fmt.chat and not tokenizer.is_fast:
        raise ModelError(
            f"Chat messages need a fast tokenizer, which tells where each token lies; {type(tokenizer).__name__} is "
            "none: load it with AutoTokenizer, or give the rows as plain strings."
        )


def _run(work, batches, num_proc: int | None) -> Iterator[_Batch]:
    if not num_proc or num_proc == 1:
        yield from (work(batch) for batch in batches)
        return
    with ProcessPoolExecutor(num_proc) as pool:
        yield from pool.map(work, batches)


def _tokenize_batch(
    batch: tuple[int, dict[str, list]], fmt: Format, tokenizer, max_length: int | None, on_truncate: str
) -> _Batch:
    start, columns = batch
    result, numbers, examples = _Batch(), [], []
    for number, values in enumerate(zip(*columns.values(), strict=True), start=start + 1):
        try:
            examples.append(to_example(dict(zip(columns, values, strict=True)), fmt, tokenizer))
            numbers.append(number)
        except RowProblem as problem:
            result.problems.append((number, problem.kind, problem.detail))
    prefix = special_prefix(tokenizer)
    for number, example, tokens in zip(numbers, examples, _encode(examples, tokenizer), strict=True):
        _close(tokens, example, prefix, tokenizer.eos_token_id)
        problem, length = _token_problem(tokens), tokens.length
        if problem:
            result.problems.append((number, *problem))
        elif (
            max_length and length > max_length and not (on_truncate == "keep_end" and _cut(tokens, prefix, max_length))
        ):
            result.too_long.append((number, length))
        else:
            result.counts.update(tokens.counts)
            result.rows.append(
                {
                    "prompt_ids": tokens.prompt,
                    "completion_ids": tokens.completions,
                    "completion_mask": tokens.masks,
                    "label": example.label,
                }
            )
    result.problems.sort()
    return result


@dataclass
class _Tokens:
    """Token ids of one example, masks of its completions' shape, and what was found on the way."""

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[int]]
    counts: Counter

    @property
    def length(self) -> int:
        return len(self.prompt) + max(map(len, self.completions))


def _encode(examples: list[Example], tokenizer) -> list[_Tokens]:
    """Tokens of the prompts, and of the completions as their continuation, without BOS or EOS of our own."""
    prompts = [example.prompt for example in examples]
    prompt_ids = [ids for ids, _ in _call(tokenizer, prompts)]
    owner = [row for row, example in enumerate(examples) for _ in example.completions]
    texts = [_up_to_eos(text, tokenizer.eos_token) for example in examples for text in example.completions]
    spans = [span for example in examples for span in example.spans]
    offsets = any(span is not None for span in spans)

    wholes = _call(tokenizer, [prompts[row] + text for row, text in zip(owner, texts, strict=True)], offsets)
    parts = [_behind(prompt_ids[row], len(prompts[row]), whole) for row, whole in zip(owner, wholes, strict=True)]
    merged = [n for n, part in enumerate(parts) if part is None]
    for n, part in zip(merged, _encode_apart(tokenizer, [texts[n] for n in merged], offsets), strict=True):
        parts[n] = part

    tokens = [_Tokens(ids, [], [], Counter()) for ids in prompt_ids]
    for row, (ids, starts), span in zip(owner, parts, spans, strict=True):
        tokens[row].completions.append(ids)
        tokens[row].masks.append(
            [1] * len(ids) if span is None else [int(any(a <= start < b for a, b in span)) for start in starts]
        )
    for n in merged:
        tokens[owner[n]].counts["token_merges"] += 1
    return tokens


def _call(tokenizer, texts: list[str], offsets: bool = False) -> list[tuple[list[int], list[int]]]:
    """Per text its token ids and, if `offsets`, the character at which each token starts."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )
    starts = [[a for a, _ in pairs] for pairs in encoded["offset_mapping"]] if offsets else [[] for _ in texts]
    return list(zip(encoded["input_ids"], starts, strict=True))


def _behind(lead: list[int], characters: int, whole: tuple[list[int], list[int]]) -> tuple[list[int], list[int]] | None:
    """The tokens of `whole` after those of `lead`, a text of so many characters; None if they merge at its end."""
    ids, starts = whole
    if ids[: len(lead)] != lead:
        return None
    return ids[len(lead) :], [start - characters for start in starts[len(lead) :]]


def _encode_apart(tokenizer, texts: list[str], offsets: bool) -> list[tuple[list[int], list[int]]]:
    """Tokens of texts that follow another text without merging with it.

    Taken behind a newline where that parts from them: at the start of a text, some tokenizers put a space before the
    first word.
    """
    ((newline, _),) = _call(tokenizer, ["\n"])
    after_newline = [_behind(newline, 1, whole) for whole in _call(tokenizer, ["\n" + text for text in texts], offsets)]
    alone = _call(tokenizer, texts, offsets)
    return [after or plain for after, plain in zip(after_newline, alone, strict=True)]


def _up_to_eos(text: str, eos: str) -> str:
    """The text without white space after a closing EOS."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(eos) else text


def special_prefix(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text: [BOS], as a rule, or none."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return next((whole[:n] for n in range(len(whole)) if bare and whole[n : n + len(bare)] == bare), [])


def _close(tokens: _Tokens, example: Example, prefix: list[int], eos: int) -> None:
    """Makes the prefix (BOS) the prompt's start exactly once, and EOS each completion's end."""
    counts = tokens.counts
    for ids, mask in [(tokens.prompt, [])] if tokens.prompt else zip(tokens.completions, tokens.masks, strict=True):
        written = _repeats(ids, prefix)
        counts["duplicate_bos"] |= int(written > 0)
        del ids[:written], mask[:written]
    tokens.prompt = prefix + tokens.prompt
    for ids, mask, span in zip(tokens.completions, tokens.masks, example.spans, strict=True):
        counts["eos_present" if ids[-1:] == [eos] else "eos_added"] += 1
        while ids[-1:] == [eos]:
            del ids[-1], mask[-1]
        counts["eos_inside"] += int(span is None and eos in ids)
        ids.append(eos)
        mask.append(1)
    counts["template_mismatch"] = int(example.template_mismatch)
    counts["masked"] = int(any(0 in mask for mask in tokens.masks))


def _repeats(ids: list[int], prefix: list[int]) -> int:
    """How many tokens at the start of `ids` are repetitions of `prefix`."""
    length = 0
    while prefix and ids[length : length + len(prefix)] == prefix:
        length += len(prefix)
    return length


def _token_problem(tokens: _Tokens) -> tuple[str, str] | None:
    if any(len(ids) == 1 for ids in tokens.completions):
        return "empty completion", "a completion holds nothing but EOS"
    if len(tokens.completions) == 2 and tokens.completions[0] == tokens.completions[1]:
        return "identical pair", "chosen and rejected give the same tokens"
    return None


def _cut(tokens: _Tokens, prefix: list[int], max_length: int) -> bool:
    """Cuts the prompt's beginning (behind BOS) to fit, if that leaves a token to predict the completions' first."""
    excess = tokens.length - max_length
    if len(tokens.prompt) - excess <= len(prefix):
        return False
    tokens.prompt = prefix + tokens.prompt[len(prefix) + excess :]
    tokens.counts["prompts_cut"] = 1
    return True


# Reporting


def _to_dataset(batches: Iterator[_Batch], result: _Batch, fmt: Format) -> datasets.Dataset:
    """One data set of all batches, converted one by one, since Python's lists take ten times the memory."""
    features = Features(
        prompt_ids=List(Value("int32")),
        completion_ids=List(List(Value("int32"))),
        completion_mask=List(List(Value("int8"))),
        label=Value("bool"),
    )
    tables = []
    for batch in batches:
        columns = {name: [row[name] for row in batch.rows] for name in features}
        tables.append(datasets.Dataset.from_dict(columns, features=features))
        result.problems += batch.problems
        result.too_long += batch.too_long
        result.counts.update(batch.counts)
    unused = [] if fmt.name == "unpaired" else ["label"]
    unused += [] if result.counts["masked"] else ["completion_mask"]
    return datasets.concatenate_datasets(tables).remove_columns(unused)


def _raise_if_refused(result: _Batch, kept: int, rows: int, max_length, on_truncate: str, on_invalid: str) -> None:
    if result.problems and on_invalid == "error":
        raise DataError(
            f"{len(result.problems):,} of {rows:,} rows cannot be used: {_describe(result.problems)}. Mend them, or "
            'pass on_invalid="drop" to leave them out (rows are counted from 1).'
        )
    longest = max((length for _, length in result.too_long), default=0)
    if result.too_long and on_truncate == "error":
        raise DataError(
            f"{len(result.too_long):,} of {rows:,} rows are longer than max_length={max_length:,} tokens (the longest "
            f'has {longest:,}): raise max_length, or pass on_truncate="drop" to leave them out or "keep_end" to cut '
            "the beginning of their prompts."
        )
    if not kept:
        found = (
            _describe(result.problems) or f"all are longer than max_length={max_length} (the longest has {longest:,})"
        )
        raise DataError(f"None of the {rows:,} rows is left: {found}.")


def _describe(problems: list[tuple[int, str, str]]) -> str:
    """Problems by kind, with the first rows' numbers and what is wrong with the first."""
    parts = []
    for kind in dict.fromkeys(kind for _, kind, _ in problems):
        rows = [(number, detail) for number, found, detail in problems if found == kind]
        numbers = ", ".join(str(number) for number, _ in rows[:NAMED_ROWS]) + (
            ", ..." if len(rows) > NAMED_ROWS else ""
        )
        parts.append(f"{len(rows):,} with {kind} (row{'s' if len(rows) > 1 else ''} {numbers}: {rows[0][1]})")
    return "; ".join(parts)


def _report(tokens: datasets.Dataset, result: _Batch, fmt: Format, rows: int, max_length: int | None) -> DataReport:
    prompts = pc.list_value_length(tokens.data["prompt_ids"]).to_numpy()  # (N,)
    flat = pc.list_flatten(tokens.data["completion_ids"])
    completions = pc.list_value_length(flat).to_numpy().reshape(len(prompts), -1)  # (N, k)
    scored = int(completions.sum())
    if "completion_mask" in tokens.column_names:
        scored = pc.sum(pc.list_flatten(pc.list_flatten(tokens.data["completion_mask"]))).as_py()
    left_out = [(kind, number) for number, kind, _ in result.problems] + [("too long", n) for n, _ in result.too_long]
    counts = {name: count for name, count in result.counts.items() if name != "masked"}
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
