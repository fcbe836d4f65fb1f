"""The alignment tax per token: what tuning changed in a model, measured on text that it was not tuned for.

    text -> windows of tokens -> hidden states of both models -> KL, log-probs, entropies of every token -> summary

No tensor of size tokens x vocabulary is ever held. If the tuned model is an adapter, its base is the same model with
the adapter switched off, so only one copy of the weights is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastalign.data.batching import batches_within
from fastalign.data.packing import LAYOUTS, Layout, PackedBatch, lay_out
from fastalign.data.text import text_windows
from fastalign.errors import DataError, ModelError
from fastalign.models.adapters import causal_lm, load_adapter
from fastalign.models.fit import positions_of
from fastalign.models.head import Head, output_head, token_divergence
from fastalign.models.loading import load_model, load_tokenizer, tokenizer_beside
from fastalign.models.modes import evaluation_mode
from fastalign.models.runs import model_folder
from fastalign.models.scoring import prepare
from fastalign.models.vocabulary import check_vocabulary

TOKENS_LISTED = 20  # in the two lists of what changed most
PASSAGES = 3
PASSAGE_TOKENS = 300
TOKENS_BEFORE = 12  # shown before a token that changed much
SHADES = (0.1, 0.3, 1.0, 3.0)  # nats, from which on a token of a passage is shaded darker
SMALLEST = 1e-300  # keeps shares of a KL of 0 from being 0 / 0


class TokenScores(NamedTuple):
    """What a model says about the S scored tokens of a batch."""

    logprobs: Tensor  # (S,) float32, log-probability of each token
    entropy: Tensor  # (S,) float32, entropy in nats of the distribution that predicts the token
    hidden: Tensor  # (S, H), hidden states that predict the tokens
    head: Head  # the output layer, which turns hidden states into logits


Scorer = Callable[[PackedBatch], TokenScores]


@dataclass
class TokenChanges:
    """Both models on every scored token. All arrays have one entry per token."""

    ids: np.ndarray
    rows: np.ndarray  # number of the window that the token is in
    positions: np.ndarray  # in the window, from 1 on: nothing predicts the token at position 0, so it is not scored
    kl: np.ndarray  # KL(base || tuned) of the distributions that predict the token, in nats
    base_logprobs: np.ndarray
    tuned_logprobs: np.ndarray
    base_entropy: np.ndarray
    tuned_entropy: np.ndarray


def measure_tax(
    base: str, tuned: str, files: Sequence[str], *, length: int = 512, max_tokens: int | None = None, dtype="auto"
) -> dict[str, Any]:
    """The alignment tax of a tuned model on some files of text.

    The tax is KL(base || tuned) of the next-token distributions, over the whole vocabulary, in nats per token.

    Args:
        base: the model before tuning, a folder or a name that `load_model` knows.
        tuned: the model after tuning: a folder with a complete model or an adapter, or the run folder of either.
        files: text (.txt, .md, .rst), or rows of text, messages, or prompt and completion (.jsonl, .json, .parquet,
            .csv).
        length: the most tokens of a window. A longer text is cut into windows.
        max_tokens: how many tokens of each file are measured, from its start; None measures all of them.
        dtype: of the weights, as `load_model` takes it.

    Returns:
        What `fastalign.report.write_tax` writes to tax.json: `files` and `total` (see `summarise`), `by_position`,
        `histogram`, `most_changed`, `kinds`, `passages`, and the arguments.

    Raises:
        ModelError: a model cannot be loaded, or the two have different tokenizers.
        DataError: a file cannot be read or is not text, or `length` is more than the model has positions.
    """
    tokenizer = load_tokenizer(base)
    texts = {name: _first_windows(text_windows(name, tokenizer, length=length), max_tokens) for name in files}
    base_scorer, tuned_scorer, layout, model = _load_pair(base, tuned, tokenizer, dtype)
    positions = positions_of(model)
    if length > positions:
        raise DataError(f"length is {length}, but the model has {positions} positions: measure shorter windows.")
    parts = {
        name: compare_tokens(base_scorer, tuned_scorer, rows, layout, device=causal_lm(model).device)
        for name, rows in texts.items()
    }
    rows = [row for rows in texts.values() for row in rows]
    total = _concatenate(list(parts.values()), [len(rows) for rows in texts.values()])
    return {
        "base": base,
        "tuned": tuned,
        "length": length,
        "files": {name: summarise(part) for name, part in parts.items()},
        "total": summarise(total),
        "by_position": by_position(total),
        "histogram": histogram(total),
        "most_changed": most_changed(total, rows, tokenizer),
        "kinds": most_changed_kinds(total, tokenizer),
        "passages": most_changed_passages(total, rows, tokenizer),
    }


# Two models on the same tokens


def model_scorer(model: nn.Module, context: Callable[[], AbstractContextManager] = nullcontext) -> Scorer:
    """A scorer of a prepared model.

    Args:
        model: a model that `prepare` has seen. It is put in evaluation mode during each call.
        context: makes a context manager around each call, for example `model.disable_adapter`.
    """

    def score(packed: PackedBatch) -> TokenScores:
        with evaluation_mode(model), context():
            scores = model(packed=packed, entropy=True, keep_hidden=True)
            return TokenScores(scores.logprobs, scores.entropy, scores.hidden, output_head(causal_lm(model)).detach())

    return score


@torch.no_grad()
def compare_tokens(
    base: Scorer,
    tuned: Scorer,
    rows: Sequence[dict],
    layout: Layout,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> TokenChanges:
    """Scores the same windows with two models.

    Args:
        base: the scorer of the model before tuning.
        tuned: the scorer of the model after tuning.
        rows: windows of tokens from `text_windows`. Prompts are scored too: all of a window is text here.
        layout: "shared", "packed" or "padded", as `prepare` returned it.
        device: where the models are.
        progress: whether to show a progress bar.

    Returns:
        One entry for every token of every window except its first token, which nothing predicts.
    """
    windows = [[*row["prompt_ids"], *row["completion_ids"][0]] for row in rows]
    scored = [number for number, window in enumerate(windows) if len(window) > 1]
    batches = list(batches_within(scored, lambda number: len(windows[number])))
    columns: list[list[np.ndarray]] = []
    for batch in tqdm(batches, desc="tax", unit="batch", leave=False, disable=not progress):
        examples = [{"prompt_ids": [], "completion_ids": [windows[number]]} for number in batch]
        packed = lay_out(examples, layout, 0).to(device)
        before, after = base(packed), tuned(packed)
        kl = token_divergence(after.hidden, after.head, before.hidden, before.head, divergence="forward_kl")
        lengths = [len(windows[number]) - 1 for number in batch]
        values = (kl, before.logprobs, after.logprobs, before.entropy, after.entropy)
        assert packed.targets is not None
        columns.append([
            packed.targets.cpu().numpy(),
            np.repeat(batch, lengths),
            np.concatenate([np.arange(1, n + 1) for n in lengths]),
            *(value.double().cpu().numpy() for value in values),
        ])  # fmt: skip
    return TokenChanges(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))


# Summaries


def summarise(tokens: TokenChanges) -> dict[str, float]:
    """Sum, mean and 99th percentile of the KL, and perplexity and mean entropy before and after."""
    base, tuned = (float(np.exp(-logprobs.mean())) for logprobs in (tokens.base_logprobs, tokens.tuned_logprobs))
    entropies = float(tokens.base_entropy.mean()), float(tokens.tuned_entropy.mean())
    return {
        "tokens": len(tokens.ids),
        "kl_sum": float(tokens.kl.sum()),
        "kl_mean": float(tokens.kl.mean()),
        "kl_p99": float(np.percentile(tokens.kl, 99)),
        "base_perplexity": base,
        "tuned_perplexity": tuned,
        "perplexity_change": tuned / base - 1,
        "base_entropy": entropies[0],
        "tuned_entropy": entropies[1],
        "entropy_change": entropies[1] - entropies[0],
    }


def by_position(tokens: TokenChanges) -> list[dict[str, float]]:
    """Mean KL at positions 1, 2 to 3, 4 to 7, ...: how the tax depends on the number of tokens before a token."""
    bins = []
    for exponent in range(int(tokens.positions.max()).bit_length()):
        low, high = 2**exponent, 2 ** (exponent + 1) - 1
        inside = (tokens.positions >= low) & (tokens.positions <= high)
        if inside.any():
            kl = tokens.kl[inside]
            bins.append({"from": low, "to": high, "tokens": int(inside.sum()), "kl_mean": float(kl.mean())})
    return bins


def histogram(tokens: TokenChanges) -> list[dict[str, float]]:
    """Shares of the tokens, and of the sum of the KL, by the token's KL: bins of half a decade from 1e-5 to 10 nats."""
    edges = [0.0, *(10 ** (e / 2) for e in range(-10, 3)), math.inf]
    total = max(float(tokens.kl.sum()), SMALLEST)
    bins = []
    for low, high in pairwise(edges):
        inside = (tokens.kl >= low) & (tokens.kl < high)
        shares = {"tokens": float(inside.mean()), "kl": float(tokens.kl[inside].sum() / total)}
        bins.append({"from": low, "to": high, **shares})
    return bins


def most_changed(
    tokens: TokenChanges, rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The tokens with the largest KL, each with the text before it."""
    changed = []
    for i in np.argsort(-tokens.kl, kind="stable")[:TOKENS_LISTED]:
        row = rows[int(tokens.rows[i])]
        ids = [*row["prompt_ids"], *row["completion_ids"][0]]
        at = int(tokens.positions[i])
        changed.append({
            "before": tokenizer.decode(ids[max(0, at - TOKENS_BEFORE) : at]), "token": tokenizer.decode([ids[at]]),
            "kl": float(tokens.kl[i]), "base_logprob": float(tokens.base_logprobs[i]),
            "tuned_logprob": float(tokens.tuned_logprobs[i]),
        })  # fmt: skip
    return changed


def most_changed_kinds(tokens: TokenChanges, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The vocabulary entries whose occurrences add up to most of the KL, each with its share of the sum."""
    kinds, inverse, counts = np.unique(tokens.ids, return_inverse=True, return_counts=True)
    sums = np.bincount(inverse, weights=tokens.kl)
    total = max(float(sums.sum()), SMALLEST)
    return [
        {
            "token": tokenizer.decode([int(kinds[i])]),
            "count": int(counts[i]),
            "kl_mean": float(sums[i] / counts[i]),
            "share": float(sums[i] / total),
        }
        for i in np.argsort(-sums, kind="stable")[:TOKENS_LISTED]
    ]


def most_changed_passages(
    tokens: TokenChanges, rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase
) -> list[list[tuple[str, int]]]:
    """The windows with the largest mean KL, each as (text of a token, shade 0 to 4 by its KL, see `SHADES`)."""
    sums = np.bincount(tokens.rows, weights=tokens.kl, minlength=len(rows))
    counts = np.bincount(tokens.rows, minlength=len(rows))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), -math.inf)
    passages = []
    for number in np.argsort(-means, kind="stable")[: min(PASSAGES, int((counts > 0).sum()))]:
        row = rows[int(number)]
        ids = [*row["prompt_ids"], *row["completion_ids"][0]][:PASSAGE_TOKENS]
        kl = np.zeros(len(ids))
        inside = (tokens.rows == number) & (tokens.positions < len(ids))
        kl[tokens.positions[inside]] = tokens.kl[inside]
        shades = np.searchsorted(SHADES, kl)
        passages.append([(tokenizer.decode([token]), int(shade)) for token, shade in zip(ids, shades, strict=True)])
    return passages


# Files and folders


def _first_windows(rows: list[dict], max_tokens: int | None) -> list[dict]:
    """The first windows of at most `max_tokens` tokens in all, and at least one window."""
    if max_tokens is None:
        return rows
    first, tokens = [], 0
    for row in rows:
        tokens += len(row["prompt_ids"]) + len(row["completion_ids"][0])
        if first and tokens > max_tokens:
            break
        first.append(row)
    return first


def _concatenate(parts: list[TokenChanges], windows: list[int]) -> TokenChanges:
    """The parts as one. Their window numbers go on from part to part; `windows`: how many windows each part has."""
    starts = np.cumsum([0, *windows[:-1]])
    columns = [list(vars(part).values()) for part in parts]
    for column, start in zip(columns, starts, strict=True):
        column[1] = column[1] + start  # `rows`, the second field
    return TokenChanges(*(np.concatenate(values) for values in zip(*columns, strict=True)))


def _load_pair(base: str, tuned: str, tokenizer, dtype) -> tuple[Scorer, Scorer, Layout, nn.Module]:
    """The scorers of both models, the layout that both can take, and a model that knows the device and positions."""
    folder = Path(model_folder(tuned)).expanduser()
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter and not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"The adapter folder {tuned} holds no adapter_model.safetensors (nothing pickled is read).")
    tuned_tokenizer = tokenizer_beside(folder) if folder.is_dir() else load_tokenizer(tuned)
    if tuned_tokenizer is not None:
        check_vocabulary(tokenizer, tuned_tokenizer, ("base", "tuned model"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_model(base, dtype=dtype)  # Any: transformers' own annotations of `to` are wrong
    model.to(device)
    if is_adapter:
        peft_model = load_adapter(model, folder)
        layout = prepare(peft_model.eval())
        return model_scorer(peft_model, peft_model.disable_adapter), model_scorer(peft_model), layout, peft_model
    other: Any = load_model(folder if folder.is_dir() else tuned, dtype=dtype)
    other.to(device)
    sizes = [m.get_input_embeddings().weight.shape[0] for m in (model, other)]
    if tuned_tokenizer is None and sizes[0] != sizes[1]:
        raise ModelError(
            f"{tuned} holds no tokenizer, and its vocabulary has {sizes[1]:,} entries where that of {base} has "
            f"{sizes[0]:,}: put its tokenizer there, so that they can be compared."
        )
    layouts = [prepare(m.eval()) for m in (model, other)]
    # The more careful of the two layouts, which both models can take.
    layout = max(layouts, key=LAYOUTS.index)
    return model_scorer(model), model_scorer(other), layout, model
