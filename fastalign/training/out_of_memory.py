"""A micro-batch that does not fit into memory is computed in parts, and the update stays the same.

Losses are divided by the totals of the whole optimiser step, so the gradients of parts add up to the gradient of the
micro-batch. When memory runs out, some gradients of the micro-batch may have been added already. Therefore the step is
computed again from its first micro-batch, with the random state and the sums that it began with. From then on every
micro-batch of as many tokens is split before it is tried.

Passes without gradients (an evaluation, the log-probs of the reference) have no such state. There the batch that did
not fit is computed in halves, see `in_parts`.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from fastalign.data.batch import Batch
from fastalign.errors import TrainingError, is_out_of_memory
from fastalign.training.checkpoint import random_state, set_random_state

logger = logging.getLogger("fastalign")

Item = TypeVar("Item")
Result = TypeVar("Result")


def halves(batch: Batch, collate: Callable[[list[dict]], dict[str, Batch]]) -> list[Batch]:
    """A batch of two or more rows as two batches."""
    middle, device = len(batch.rows) // 2, batch.packed.input_ids.device
    parts = (batch.rows[:middle], batch.rows[middle:])
    return [replace(collate(rows)["batch"].to(device), sampled=batch.sampled) for rows in parts]


def in_parts(
    whole: Item, compute: Callable[[Item], Result], halve: Callable[[Item], list[Item]]
) -> Iterator[tuple[Item, Result]]:
    """What `compute` returns for an item, or for parts of it where memory runs out.

    Args:
        whole: The item.
        compute: The pass. It must leave nothing behind when it fails.
        halve: Two parts of an item that did not fit; raises a `TrainingError` where that is not possible.

    Yields:
        Each part with its result, in the order of the item.
    """
    waiting = deque([whole])
    while waiting:
        item = waiting.popleft()
        result = _unless_out_of_memory(compute, item)
        if result is not None:
            yield item, result
            continue
        _free_memory()
        waiting.extendleft(reversed(halve(item)))


def _unless_out_of_memory(compute: Callable[[Item], Result], item: Item) -> Result | None:
    """The result; None if memory ran out. The error must not stay: it holds what was computed so far."""
    try:
        return compute(item)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_splittable(where: str, rows: list[dict], tokens: int, tokenizer: Any, why_not: str | None) -> None:
    """Checks that a batch which did not fit can be computed in parts.

    Args:
        where: What was computed, such as "Step 3".
        rows: The tokenised rows of the batch.
        tokens: The tokens that it computes.
        tokenizer: Shows the prompt of a row.
        why_not: Why a batch of several rows cannot be split; None: it can.

    Raises:
        TrainingError: There is one row, or the batch cannot be split.
    """
    trains = where.startswith("Step")
    if len(rows) < 2:
        prompt = tokenizer.decode(rows[0]["prompt_ids"])[:60]
        raise TrainingError(
            f"{where}: memory ran out on one row of {tokens} tokens, the one with the prompt {prompt!r}: lower "
            f"max_length{', drop the row, or set gradient_checkpointing=True' if trains else ' or drop the row'}."
        )
    if why_not is not None:
        raise TrainingError(
            f"{where}: memory ran out on a micro-batch of {len(rows)} rows and {tokens} tokens, which cannot be "
            f"split because {why_not}: lower per_device_{'train' if trains else 'eval'}_batch_size."
        )


def why_unsplittable(objective: Any, world_size: int) -> str | None:
    """Why a batch must be computed as one; None if it may be split."""
    if world_size > 1:
        return "several processes wait for each other"
    return "the loss compares its rows" if getattr(objective, "compares_rows", False) else None


class SplitsMicroBatches(Trainer):
    """The part of `AlignmentTrainer` that computes a micro-batch in parts where it does not fit into memory.

    Attributes:
        most_tokens: Micro-batches of as many tokens did not fit; None: all of them did so far.
    """

    most_tokens: int | None = None
    objective: Any
    terms: Any
    sums: Any
    guard: Any
    throughput: Any
    _micro_batches: int
    _window: list[Any]  # the micro-batches of this optimiser step so far
    _undo: Callable[[], None]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """`transformers.Trainer.training_step`, in parts where memory runs out.

        Raises:
            TrainingError: One row does not fit by itself, or the loss compares the rows of a micro-batch.
        """
        if self._micro_batches == 0:
            self._window, self._undo = [], self._snapshot()
        self._window.append(inputs)
        done = self._try(model, [inputs], num_items_in_batch)
        while isinstance(done, Batch):
            self._forget(model, done)
            done = self._try(model, self._window, num_items_in_batch)
        return done

    def _try(self, model: nn.Module, micro_batches: list[Any], totals: Any) -> Tensor | Batch:
        """The loss of the last of these micro-batches; or the part for which memory ran out."""
        loss = torch.zeros((), device=self.args.device)
        for inputs in micro_batches:
            losses = []
            for part in self._parts(inputs["batch"]):
                part_loss = self._loss_of_part(model, part, totals)
                if part_loss is None:
                    return part
                losses.append(part_loss)
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return loss

    def _loss_of_part(self, model: nn.Module, part: Batch, totals: Any) -> Tensor | None:
        """The loss after its backward pass; None if memory ran out."""
        step = super().training_step
        return _unless_out_of_memory(lambda inputs: step(model, inputs, totals), {"batch": part})

    def _parts(self, batch: Batch) -> list[Batch]:
        if self.most_tokens is None or len(batch.rows) < 2 or size_of(batch) < self.most_tokens:
            return [batch]
        return [part for half in halves(batch, self.data_collator) for part in self._parts(half)]

    def _forget(self, model: nn.Module, failed: Batch) -> None:
        """Takes back what this step has done, and notes what did not fit.

        Raises:
            TrainingError: There is nothing left to split.
        """
        _free_memory()
        step, rows, tokens = self.state.global_step + 1, len(failed.rows), size_of(failed)
        why_not = why_unsplittable(self.objective, self.args.world_size)
        check_splittable(f"Step {step}", failed.rows, tokens, self.processing_class, why_not)
        self.most_tokens = tokens
        logger.warning(
            "Step %d: memory ran out on a micro-batch of %d rows and %d tokens. Such large ones are computed in "
            "parts from here on; the updates stay the same.", step, rows, tokens,
        )  # fmt: skip
        model.zero_grad()
        self._undo()

    def _snapshot(self) -> Callable[[], None]:
        """A function that takes everything but the gradients back to where it is now."""
        random, sums = random_state(), dict(self.sums.sums["train"])
        states = [part.state for part in (self.objective, *self.terms) if getattr(part, "state", None)]
        copies = [{name: value.clone() for name, value in state.items()} for state in states]
        guard, throughput = self.guard, self.throughput
        checks = (list(guard.checks), list(guard.rows), guard.stopped)
        counts = vars(throughput).copy()

        def undo() -> None:
            set_random_state(random)
            self.sums.sums["train"] = dict(sums)
            for state, copy in zip(states, copies, strict=True):
                for name, value in state.items():
                    value.copy_(copy[name])
            guard.checks, guard.rows, guard.stopped = list(checks[0]), list(checks[1]), checks[2]
            vars(throughput).update(counts)
            self._micro_batches = 0

        return undo


def size_of(batch: Batch) -> int:
    """The tokens that a batch computes, padding included."""
    return batch.packed.input_ids.numel()
