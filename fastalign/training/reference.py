"""Log-probabilities under the reference, the model as it was when training started. No second model is loaded.

There are two ways to compute them.

- `ReferenceWeights` is a copy of the trainable weights, mostly a few megabytes of adapters. A forward pass runs with
  the copy in place of the trained weights.
- `precompute` runs the data set through the model once, before training. It stores one number per scored token on
  disk, under a key made from the token ids and the weights. A later run with another loss, beta or batch size reads
  them from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from fastalign.data.batch import Batch
from fastalign.data.batching import batch_rows, token_count
from fastalign.data.keyed_log import KeyedLog
from fastalign.data.keyed_parts import own_part, write_parts
from fastalign.data.keys import cache_folder, dataset_keys
from fastalign.data.packing import PackedBatch
from fastalign.data.processes import gather_objects, process_count, process_index
from fastalign.data.token_table import with_values
from fastalign.errors import DataError, ModelError
from fastalign.files import check_writable
from fastalign.models.adapters import causal_lm
from fastalign.models.head import Head, output_head
from fastalign.models.modes import evaluation_mode
from fastalign.models.scoring import Scores
from fastalign.models.sharding import gathered, is_sharded
from fastalign.models.snapshot import ReferenceWeights
from fastalign.training.out_of_memory import check_splittable, in_parts

logger = logging.getLogger("fastalign")

# Scores and output layer of one micro-batch under some weights; None: the model's weights as they are.
ScoreWith = Callable[[ReferenceWeights | None], tuple[Scores, Head]]


@dataclass
class Reference:
    """What an objective compares the model with, and the checks that it is what training started from.

    Attributes:
        weights: A copy of the trainable weights. None only if the log-probs of every row are stored and the model has
            no adapter. The first step then scores the model as it is, which is the reference.
        dtype: What the model's products are rounded to. It bounds how far stored log-probs may be off.
        cache_dir: The folder of stored log-probs; None: ~/.cache/fastalign.
        moves: Whether `weights` follow the model while it is trained (TR-DPO).
    """

    weights: ReferenceWeights | None
    dtype: torch.dtype
    cache_dir: str | None = None
    moves: bool = False

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to save: {name: copied weight in its shape and dtype} if they move, else nothing."""
        weights = self.weights.values if self.weights and self.moves else []
        return {f"reference.{i}": value for i, value in enumerate(weights)}

    def logprobs(self, batch: Batch, policy: Tensor, score_with: ScoreWith, *, first: bool) -> Tensor:
        """(S,) the completions' log-probs under the reference: stored ones, or from a forward pass.

        The first step always runs the forward pass, to check what is stored. Where `weights` is None that pass uses the
        model's weights as they are, which are the reference's until the first update.

        Args:
            batch: The micro-batch. Stored log-probs are its column "ref_logprobs".
            policy: (S + batch.prompt_tokens,) log-probs under the model: first those of the S completion tokens, then
                those of scored prompt tokens, which are ignored.
            score_with: Scores the micro-batch under given weights.
            first: Whether this is the first step: the model has had no update, so both must agree. That is checked.

        Raises:
            ModelError: In the first step the model's log-probs differ from the reference's.
            DataError: In the first step stored log-probs differ from computed ones by more than rounding.
        """
        stored, scored = batch.columns.get("ref_logprobs"), policy.shape[0] - batch.prompt_tokens
        if stored is not None and not first:
            return stored
        computed = score_with(self.weights)[0].logprobs
        assert computed is not None, "every batch of training has targets"
        if first:
            check_start(policy.detach()[:scored], computed[:scored])
            if stored is not None:
                check_stored(stored, computed[:scored], self.dtype, self.cache_dir)
        return computed[:scored]


@torch.no_grad()
def score_with_weights(
    model: nn.Module, packed: PackedBatch, weights: ReferenceWeights | None, **options: Any
) -> tuple[Scores, Head]:
    """Scores and output layer of a batch under other weights: one forward pass without dropout.

    Args:
        model: The model as training calls it, with its wrappers.
        packed: The batch.
        weights: The weights to compute with; None: the model's weights as they are.
        **options: Further options of the forward pass, such as `temperature`.

    Returns:
        The scores with their hidden states, and the output layer without a graph.
    """
    with evaluation_mode(model), weights.in_place() if weights else nullcontext():
        scores = model(packed=packed, keep_hidden=True, **options)
        return scores, detached_head(model)


def detached_head(model: nn.Module) -> Head:
    """The output layer without a graph. Of a sharded model it is a copy, because FSDP frees what it gathers."""
    head = output_head(causal_lm(model)).detach()
    if not is_sharded(model):
        return head
    assert isinstance(head.weight, Tensor), "quantised weights need an adapter, which FSDP refuses"
    weight = gathered(head.weight).clone()
    return head._replace(weight=weight, bias=None if head.bias is None else gathered(head.bias).clone())


def start_rounding(device: torch.device) -> float:
    """How much log-probs of the same weights may differ with and without gradients, in nats per token.

    On a CPU they are equal. On a GPU the matrix library may choose different kernels for the same product, whose sums
    round differently.
    """
    return 0.0 if device.type == "cpu" else 1e-4


def check_start(policy: Tensor, reference: Tensor) -> None:
    """Checks that model and reference agree before the first update.

    At that moment both are the same weights, so every log-ratio and every margin must be 0. A difference shows a wrong
    reference or a model that draws at random. Training would go on without a sign of it, with rewards that mean
    nothing.

    Args:
        policy: (S,) log-probs in nats under the model.
        reference: (S,) those under the reference.

    Raises:
        ModelError: They do not agree.
    """
    off, limit = (policy - reference).abs().max().item(), start_rounding(policy.device)
    if not off <= limit:  # also true for NaN
        within = f" within {limit:.3g}" if limit else ""
        raise ModelError(
            f"Before the first step the model's log-probs differ from the reference's by {off:.3g}; they must be "
            f"equal{within}. The model is not deterministic: set disable_dropout=True, "
            "turn off what draws at random, or leave out torch_compile, which rounds otherwise."
        )


def check_stored(stored: Tensor, reference: Tensor, dtype: torch.dtype, cache_dir: str | None) -> None:
    """Checks that stored log-probs are those of the reference, within rounding.

    They were computed in other batches, whose sums round differently, and a deep model amplifies that. The limit is
    10 times the square root of the eps of `dtype`, or of the stored dtype's where that is larger.

    Args:
        stored: (S,) log-probs in nats, read from the cache.
        reference: (S,) those that the reference gives now.
        dtype: What the model's products are rounded to.
        cache_dir: The cache's folder, for the error; None: the default one.

    Raises:
        DataError: They differ by more.
    """
    limit = max(torch.finfo(dtype).eps, torch.finfo(stored.dtype).eps) ** 0.5 * 10
    off = (stored - reference).abs().max().item()
    if not off <= limit:
        raise DataError(
            f"Stored reference log-probs are off by {off:.3g} (at most {limit:.3g} would be rounding): delete the "
            f"cache folder {cache_dir or '~/.cache/fastalign'} and start again."
        )


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """What products are rounded to with bf16=True or fp16=True; None: to the dtype of the weights."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None


def product_dtype(args: TrainingArguments, model: nn.Module) -> torch.dtype:
    """What the model's products are rounded to: autocast's dtype, or that of the weights."""
    return autocast_dtype(args) or next(model.parameters()).dtype


def precompute(
    dataset: Dataset,
    score: Callable[[list[dict]], tuple[PackedBatch, Tensor]],
    fingerprint: str,
    cache_dir: str | Path | None = None,
    *,
    tokenizer: Any = None,
    show: bool = True,
) -> Dataset:
    """Adds the log-probs under the reference to a data set. Rows whose completions are all stored are not computed.

    Several processes compute a part of the rows each, and all of them read the file.

    Args:
        dataset: Tokenised rows.
        score: Takes rows, returns their batch and its (S,) log-probs.
        fingerprint: Hash of the model's weights, see `fastalign.models.snapshot`. It names the file.
        cache_dir: The folder of stored log-probs; None: ~/.cache/fastalign.
        tokenizer: Shows the prompt of a row that does not fit into memory.
        show: Whether a bar shows the progress.

    Raises:
        TrainingError: Memory ran out on one row. Batches of several rows are computed in parts.

    Returns:
        The data set with the column `ref_logprobs`: per row, a list of float32 token log-probs for each completion.
    """
    # Other weights get another file. A completion that several data sets contain is stored once.
    path = cache_folder(cache_dir) / "ref_logprobs" / f"{fingerprint}.safetensors"
    log = KeyedLog(path, "logprobs")
    known, keys = log.read(), dataset_keys(dataset)
    # The batches do not depend on what is stored: a pass that goes on rounds as one that was never stopped.
    batches = list(batch_rows(dataset, range(len(keys))))
    wanted = _first_keys(batches, keys)
    missing = [n for n, of_batch in enumerate(wanted) if not of_batch <= known.keys()]
    if process_count() > 1:  # the same batches for all, also where the machines have cache folders of their own
        missing = sorted(set().union(*gather_objects(missing)))
    if missing:
        check_writable("ref_cache_dir", path.parent)

        def halve(part: list[int]) -> list[list[int]]:
            shown = [dataset[i] for i in part]
            check_splittable("Reference log-probs", shown, sum(map(token_count, shown)), tokenizer, None)
            return [part[: len(part) // 2], part[len(part) // 2 :]]

        new: dict[bytes, np.ndarray] = {}
        for (n,) in tqdm(
            own_part([[n] for n in missing]), desc="reference log-probs", unit="batch", leave=False, disable=not show
        ):
            found: dict[bytes, np.ndarray] = {}
            for part, (batch, logprobs) in in_parts(batches[n], lambda part: score([dataset[i] for i in part]), halve):
                values = logprobs.float().cpu().numpy()
                bounds = batch.cu_seqlens.tolist()
                # A key per completion, from its tokens and its prompt's. The batch has the completions in this order.
                flat = [key for i in part for key in keys[i]]
                for key, start, end in zip(flat, bounds[:-1], bounds[1:], strict=True):
                    if key in wanted[n] and key not in known:
                        found.setdefault(key, values[start:end])
            new |= found
            log.add(found)
        known = _store(log, known, new)
    return with_values(dataset, "ref_logprobs", [[known[key] for key in keys_of_row] for keys_of_row in keys])


def _first_keys(batches: list[list[int]], keys: list[list[bytes]]) -> list[set[bytes]]:
    """The keys that each batch computes: those of its rows which are in no batch before it."""
    seen: set[bytes] = set()
    first = []
    for batch in batches:
        first.append({key for i in batch for key in keys[i]} - seen)
        seen |= first[-1]
    return first


def _store(log: KeyedLog, known: dict[bytes, np.ndarray], new: dict[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
    """Writes the log-probs that were stored before and those that every process has computed; returns all of them."""
    if process_index() == 0:
        new = {**known, **new}
    try:
        write_parts(log.path, list(new), {"logprobs": list(new.values())})
        log.clear()
    except (OSError, SafetensorError) as error:  # this run has them in memory
        logger.warning("The reference log-probs cannot be stored, so the next run computes them anew: %s.", error)
    return new if process_count() == 1 else log.read()
