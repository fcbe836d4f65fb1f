"""Measures a model on suites: the result of every item, and the share of right ones by suite and by category."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fastalign.data.prompts import Prompt, encode_prompt
from fastalign.errors import ConfigError, DataError
from fastalign.evaluation.answers import answer
from fastalign.evaluation.choices import score_choices
from fastalign.evaluation.code import check_isolation, code_of, continued, run_code
from fastalign.evaluation.instructions import follows
from fastalign.evaluation.matching import is_right
from fastalign.evaluation.suite import Item, Suite
from fastalign.models.adapters import causal_lm
from fastalign.models.fit import positions_of
from fastalign.models.scoring import prepare
from fastalign.stats import wilson


def evaluate(
    model: Any,
    suites: Sequence[Suite | str | Path],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    plain: bool = False,
    limit: int | None = None,
    unsafe_code: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """What a model gets right on some suites.

    - `choices`: the model's answer is the option with the highest log-probability. A prompt of text is continued as it
      stands, without chat template.
    - `answer`, `checks` and `tests`: the model writes an answer. A prompt of text becomes a user's turn if the
      tokenizer has a chat template, unless `plain`.

    Args:
        model: A folder, run folder or name; or a transformers model, which is prepared in place.
        suites: Suites, paths of .jsonl files, or names of suites that fastalign ships.
        tokenizer: The model's tokenizer; needed with a model that is no path or name.
        max_new_tokens: The most tokens of an answer.
        temperature: Answers are drawn at this temperature; 0 takes the likeliest token.
        seed: Of the draws.
        batch_size: How many prompts share a batch while answers are written.
        plain: Prompts of text are continued without chat template.
        limit: Only the first so many items of each suite.
        unsafe_code: Whether a model's code may run where the system cannot lock it in.
        progress: Whether to show progress bars.

    Returns:
        What eval.json holds: `items` (one mapping per item, with `suite`, `id`, `category`, `kind`, `correct`, and what
        the model answered), `suites` and `categories` (name -> `items`, `correct`, `accuracy` with `low` and `high`,
        the ends of Wilson's 95 % interval, and `chance`, the accuracy of guessing), and the options.

    Raises:
        DataError: A suite cannot be read, two have the same name, or an item does not fit the model.
        ConfigError: An option is out of range, or code cannot be locked in.
        ModelError: The model cannot be loaded.

    Examples:
        >>> found = evaluate("smollm2-135m-instruct", ["knowledge"], limit=20)
        >>> found["suites"]["knowledge"]["items"]
        20
    """
    _check_options(max_new_tokens, temperature, batch_size, limit)
    read = [suite if isinstance(suite, Suite) else Suite.read(suite) for suite in suites]
    names = [suite.name for suite in read]
    if len(set(names)) < len(names) or not names:
        raise DataError(f"The suites are {names}: give at least one, and each name once.")
    asked = [(suite.name, item) for suite in read for item in suite.items[:limit]]
    if any(item.kind == "tests" for _, item in asked):
        check_isolation(unsafe=unsafe_code)
    given = isinstance(model, (str, Path))
    if given:
        from fastalign.models.runs import load_run

        name, (model, tokenizer) = str(model), load_run(model)
    elif tokenizer is None:
        raise ConfigError("tokenizer is None; give the tokenizer of the model, or name the model by its folder")
    else:
        name = str(getattr(causal_lm(model).config, "name_or_path", "") or type(causal_lm(model)).__name__)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "plain": plain,
        "limit": limit,
    }
    items = [item for _, item in asked]
    results: list[dict[str, Any]] = [{}] * len(items)
    for at, found in _choices(model, tokenizer, items, progress):
        results[at] = found
    torch.manual_seed(seed)
    for at, found in _written(model, tokenizer, items, options, batch_size, progress):
        results[at] = found
    rows = [
        {"suite": suite, "id": item.id, "category": item.category, "kind": item.kind, **result}
        for (suite, item), result in zip(asked, results, strict=True)
    ]
    return {"model": name, "options": options, **summarise_items(rows), "items": rows}


def summarise_items(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`suites` and `categories`: the accuracy of each with its interval, from the items of `evaluate`."""
    return {
        "suites": _by(rows, lambda row: row["suite"]),
        "categories": _by(rows, lambda row: f"{row['suite']}/{row['category']}"),
    }


def _by(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> dict[str, dict[str, float]]:
    summaries = {}
    for name, group in groupby(sorted(rows, key=key), key):
        members = list(group)
        correct = [row["correct"] for row in members]
        share = wilson(correct)
        summaries[name] = {
            "items": len(members), "correct": sum(correct), "accuracy": share.estimate, "low": share.low,
            "high": share.high, "chance": float(np.mean([row.get("chance", 0.0) for row in members])),
        }  # fmt: skip
    return summaries


def _choices(model: Any, tokenizer: Any, items: list[Item], progress: bool) -> Iterable[tuple[int, dict[str, Any]]]:
    places = [at for at, item in enumerate(items) if item.kind == "choices"]
    if not places:
        return
    chosen = [items[at] for at in places]
    scores = score_choices(model, tokenizer, prepare(model), chosen, progress=progress)
    for at, item, score in zip(places, chosen, scores, strict=True):
        per_character = score.logprobs / [len(text) for text in item.choices]
        best = int(score.logprobs.argmax())
        yield at, {
            "correct": best == item.label, "chosen": best, "label": item.label, "chance": 1 / len(item.choices),
            "logprobs": score.logprobs.tolist(), "correct_per_character": int(per_character.argmax()) == item.label,
        }  # fmt: skip


def _written(
    model: Any, tokenizer: Any, items: list[Item], options: dict[str, Any], batch_size: int, progress: bool
) -> Iterable[tuple[int, dict[str, Any]]]:
    places = [at for at, item in enumerate(items) if item.kind != "choices"]
    if not places:
        return
    positions = positions_of(model)
    plain, most = options["plain"], options["max_new_tokens"]
    prompts = [encode_prompt(Prompt(items[at].prompt), tokenizer, plain=plain) for at in places]
    for at, ids in zip(places, prompts, strict=True):
        if not ids or len(ids) + most > positions:
            raise DataError(
                f"Item {items[at].id} has {len(ids):,} tokens, and the model has {positions:,} positions for it and "
                f"{most} tokens of answer: shorten it, leave it out, or lower max_new_tokens."
            )
    answers = answer(
        model, tokenizer, prompts, max_new_tokens=most, batch_size=batch_size, label="answers" if progress else None,
        temperature=options["temperature"] or None,
    )  # fmt: skip
    is_plain = plain or not tokenizer.chat_template
    for at, text, tokens, finished in zip(places, answers.texts, answers.lengths, answers.finished, strict=True):
        yield at, {**_judged(items[at], text, is_plain), "answer": text, "tokens": tokens, "finished": finished}


def _judged(item: Item, text: str, plain: bool) -> dict[str, Any]:
    """Whether an answer is right, with what says why not."""
    if item.kind == "answer":
        return {"correct": is_right(text, item.answer)}
    if item.kind == "checks":
        checks = follows(text, item.checks)
        return {"correct": all(checks.values()), "failed": [name for name, passed in checks.items() if not passed]}
    code = continued(item.prompt, text) if plain and isinstance(item.prompt, str) else code_of(text)
    result = run_code(f"{code}\n\n{item.tests}\n")
    return {"correct": result.passed, "reason": result.reason}


def _check_options(max_new_tokens: int, temperature: float, batch_size: int, limit: int | None) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}; it must be 0 or more")
