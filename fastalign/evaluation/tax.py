"""The alignment tax, token by token: what tuning changed in a model, on text that it was not tuned for.

    text -> windows of tokens -> both models' hidden states -> KL, log-probs, entropies of every token -> summary

Nothing of the size tokens x vocabulary is held. An adapter's base is the same model with the adapter switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastalign.data.packing import PackedBatch, lay_out
from fastalign.data.text import text_windows
from fastalign.errors import DataError, ModelError
from fastalign.models.adapters import causal_lm
from fastalign.models.head import Head, output_head, token_divergence
from fastalign.models.loading import load_model, load_tokenizer, tokenizer_beside
from fastalign.models.modes import evaluation_mode
from fastalign.models.scoring import Scores, prepare
from fastalign.models.vocabulary import check_vocabulary

_BATCH_TOKENS = 2048
MOST_CHANGED = 20
PASSAGES = 3
# From a packed batch: its scores, with hidden states and entropies, and the output layer.
Ask = Callable[[PackedBatch], tuple[Scores, Head]]


@dataclass
class Tokens:
    """What is known of each scored token, all arrays of its length; rows and positions say where it stands."""

    ids: np.ndarray
    rows: np.ndarray  # window
    positions: np.ndarray  # in the window, counted from 0; the first token of a text has nothing before it
    kl: np.ndarray  # KL(base || tuned) of the distributions that predict it, in nats
    base_logprobs: np.ndarray
    tuned_logprobs: np.ndarray
    base_entropy: np.ndarray
    tuned_entropy: np.ndarray


@torch.no_grad()
def compare_tokens(
    base: Ask, tuned: Ask, rows: Sequence[dict], layout: str, *, device="cpu", progress: bool = True
) -> Tokens:
    """Both models on the same windows of tokens (`text_windows`), every token behind a window's first one."""
    plain = [{"prompt_ids": [], "completion_ids": [[*r["prompt_ids"], *r["completion_ids"][0]]]} for r in rows]
    columns: list[list[np.ndarray]] = []
    for batch in tqdm(list(_batches(plain)), desc="tax", unit="batch", leave=False, disable=not progress):
        packed = lay_out([plain[i] for i in batch], layout, 0).to(device)
        then, head = base(packed)
        now, tuned_head = tuned(packed)
        kl = token_divergence(now.hidden, tuned_head, then.hidden, head, divergence="forward_kl")
        lengths = [len(plain[i]["completion_ids"][0]) - 1 for i in batch]
        places = [np.repeat(batch, lengths), np.concatenate([np.arange(1, n + 1) for n in lengths])]
        found = (kl, then.logprobs, now.logprobs, then.entropy, now.entropy)
        columns.append([packed.targets.cpu().numpy(), *places, *(t.double().cpu().numpy() for t in found)])
    return Tokens(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))


def _batches(rows: list[dict]):
    batch, tokens = [], 0
    for i, row in enumerate(rows):
        length = len(row["completion_ids"][0])
        if length < 2:
            continue
        if batch and tokens + length > _BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += length
    if batch:
        yield batch


def asks(model: nn.Module, weights=nullcontext) -> Ask:
    """How a prepared model is asked; weights: makes the context in which it is, `model.disable_adapter`, say."""

    def ask(packed: PackedBatch) -> tuple[Scores, Head]:
        with evaluation_mode(model), weights():
            scores = model(packed=packed, entropy=True, keep_hidden=True)
            return scores, output_head(causal_lm(model)).detach()

    return ask


def summarise(tokens: Tokens) -> dict[str, float]:
    """Sum and mean of the KL, and perplexity and mean entropy before and after."""
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


def by_position(tokens: Tokens) -> list[dict[str, float]]:
    """Mean KL at positions 1, 2-3, 4-7, ...: how it depends on how much stands before a token."""
    found = []
    for exponent in range(int(tokens.positions.max()).bit_length()):
        low, high = 2**exponent, 2 ** (exponent + 1) - 1
        there = (tokens.positions >= low) & (tokens.positions <= high)
        if there.any():
            kl = tokens.kl[there]
            found.append({"from": low, "to": high, "tokens": int(there.sum()), "kl_mean": float(kl.mean())})
    return found


def most_changed(tokens: Tokens, rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The tokens with the largest KL, with what stands before them."""
    found = []
    for i in np.argsort(-tokens.kl, kind="stable")[:MOST_CHANGED]:
        row = rows[tokens.rows[i]]
        ids = [*row["prompt_ids"], *row["completion_ids"][0]]
        at = int(tokens.positions[i])
        found.append({
            "before": tokenizer.decode(ids[max(0, at - 12) : at]), "token": tokenizer.decode([ids[at]]),
            "kl": float(tokens.kl[i]), "base_logprob": float(tokens.base_logprobs[i]),
            "tuned_logprob": float(tokens.tuned_logprobs[i]),
        })  # fmt: skip
    return found


def most_changed_kinds(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The entries of the vocabulary before which most of the KL stands, with their share of it."""
    kinds, inverse, counts = np.unique(tokens.ids, return_inverse=True, return_counts=True)
    sums = np.bincount(inverse, weights=tokens.kl)
    total = max(float(sums.sum()), 1e-300)
    return [
        {
            "token": tokenizer.decode([int(kinds[i])]),
            "count": int(counts[i]),
            "kl_mean": float(sums[i] / counts[i]),
            "share": float(sums[i] / total),
        }
        for i in np.argsort(-sums, kind="stable")[:MOST_CHANGED]
    ]


def passages(tokens: Tokens, rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[str, int]]]:
    """The windows that changed most, as (text of a token, 0 to 4 by its KL: above 0.1, 0.3, 1, 3 nats)."""
    sums = np.bincount(tokens.rows, weights=tokens.kl, minlength=len(rows))
    counts = np.bincount(tokens.rows, minlength=len(rows))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), -math.inf)
    found = []
    for number in np.argsort(-means, kind="stable")[: min(PASSAGES, int((counts > 0).sum()))]:
        row = rows[number]
        ids = [*row["prompt_ids"], *row["completion_ids"][0]][:300]
        kl = np.zeros(len(ids))
        there = (tokens.rows == number) & (tokens.positions < len(ids))
        kl[tokens.positions[there]] = tokens.kl[there]
        levels = np.searchsorted([0.1, 0.3, 1.0, 3.0], kl)
        found.append([(tokenizer.decode([token]), int(level)) for token, level in zip(ids, levels, strict=True)])
    return found


def measure_tax(
    base: str, tuned: str, files: Sequence[str], *, length: int = 512, max_tokens: int | None = None, dtype="auto"
) -> dict[str, Any]:
    """The tax of a tuned model (a folder of it, or a run folder, adapter or not) over its base on some files of text.

    files: .txt, or rows of text, messages, or prompt and completion (.jsonl, .json, .parquet, .csv). length: tokens of
        a window at most. max_tokens: of each file, the first so many; None for all. Returns what `write_tax` writes.

    ModelError where either cannot be loaded or their tokenizers differ, DataError for what is no text.
    """
    tokenizer = load_tokenizer(base)
    texts = {name: _first(text_windows(name, tokenizer, length=length), max_tokens) for name in files}
    ask_base, ask_tuned, layout, model = _load_pair(base, tuned, tokenizer, dtype)
    positions = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None) or math.inf
    if length > positions:
        raise DataError(f"length is {length}, but the model has {positions} positions: measure shorter windows.")
    parts = {
        name: compare_tokens(ask_base, ask_tuned, rows, layout, device=causal_lm(model).device)
        for name, rows in texts.items()
    }
    rows = [row for rows in texts.values() for row in rows]
    whole = _joined(list(parts.values()), [len(rows) for rows in texts.values()])
    return {
        "base": base,
        "tuned": tuned,
        "length": length,
        "files": {name: summarise(part) for name, part in parts.items()},
        "total": summarise(whole),
        "by_position": by_position(whole),
        "histogram": histogram(whole),
        "most_changed": most_changed(whole, rows, tokenizer),
        "kinds": most_changed_kinds(whole, tokenizer),
        "passages": passages(whole, rows, tokenizer),
    }


def histogram(tokens: Tokens) -> list[dict[str, float]]:
    """Shares of the tokens and of the whole KL by the token's KL, in half decades from 1e-5 to 10 nats."""
    edges = [0.0, *(10 ** (e / 2) for e in range(-10, 3)), math.inf]
    total = max(float(tokens.kl.sum()), 1e-300)
    found = []
    for low, high in pairwise(edges):
        there = (tokens.kl >= low) & (tokens.kl < high)
        shares = {"tokens": float(there.mean()), "kl": float(tokens.kl[there].sum() / total)}
        found.append({"from": low, "to": high, **shares})
    return found


def _first(rows: list[dict], max_tokens: int | None) -> list[dict]:
    if max_tokens is None:
        return rows
    kept, tokens = [], 0
    for row in rows:
        tokens += len(row["prompt_ids"]) + len(row["completion_ids"][0])
        if kept and tokens > max_tokens:
            break
        kept.append(row)
    return kept


def _joined(parts: list[Tokens], rows: list[int]) -> Tokens:
    starts = np.cumsum([0, *rows[:-1]])
    columns = [list(vars(part).values()) for part in parts]
    for column, start in zip(columns, starts, strict=True):
        column[1] = column[1] + start
    return Tokens(*(np.concatenate(values) for values in zip(*columns, strict=True)))


def _load_pair(base: str, tuned: str, tokenizer, dtype) -> tuple[Ask, Ask, str, PreTrainedModel]:
    folder = Path(tuned).expanduser()
    if (folder / "model").is_dir() and not any(folder.glob("*.safetensors")):
        folder = folder / "model"  # of a run that trained all weights
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"The adapter folder {tuned} holds no adapter_model.safetensors (nothing pickled is read).")
    own = tokenizer_beside(folder) if folder.is_dir() else load_tokenizer(tuned)
    if own is not None:
        check_vocabulary(tokenizer, own, ("base", "tuned model"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(base, dtype=dtype).to(device)
    if not adapter:
        other = load_model(folder if folder.is_dir() else tuned, dtype=dtype).to(device)
        sizes = [m.get_input_embeddings().weight.shape[0] for m in (model, other)]
        if own is None and sizes[0] != sizes[1]:
            raise ModelError(
                f"{tuned} holds no tokenizer, and its vocabulary has {sizes[1]:,} entries where that of {base} has "
                f"{sizes[0]:,}: put its tokenizer there, so that they can be compared."
            )
        layouts = [prepare(m.eval()) for m in (model, other)]
        return asks(model), asks(other), max(layouts, key=("shared", "packed", "padded").index), model
    try:
        model = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # the library has no common one for adapters that do not fit
        raise ModelError(f"The adapter {tuned} does not fit {base}: {' '.join(str(error).split())[:300]}") from error
    layout = prepare(model.eval())
    return asks(model, model.disable_adapter), asks(model), layout, model
