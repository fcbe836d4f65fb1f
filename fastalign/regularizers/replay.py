"""Replay: ordinary text among the alignment data, in exact proportion, so that what it taught is not forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastalign.data.packing import lay_out
from fastalign.data.text import text_windows
from fastalign.errors import ConfigError, DataError
from fastalign.models.adapters import causal_lm
from fastalign.models.fit import check_fit
from fastalign.objectives.base import Metrics
from fastalign.ops import segment_sum
from fastalign.regularizers.base import Step, Term, check_positive

# Shares are counted in millionths, in integers, so that they stay exact however long training is.
_WHOLE = 1_000_000


def curriculum(epoch: float) -> float:
    """`0.3 exp(-epoch / 10) + 0.1`: 40 % of the rows at first, 10 % in the long run."""
    return 0.3 * math.exp(-epoch / 10) + 0.1


@dataclass
class Replay:
    """Rows of ordinary text join the alignment rows; each adds `weight` times its mean NLL, as one row of the batch.

    text: rows or a file of them, with text, messages, or prompt and completion, or a .txt file; see `text_windows`.
    share: of replayed rows among all rows that are trained on, say 0.1 to 0.2; a function from the epoch to it; a
        mapping of start, end and decay for `(start - end) exp(-epoch / decay) + end`; or "curriculum", which is
        `0.3 exp(-epoch / 10) + 0.1`. Rows are not drawn by chance: in any stretch of training their number is within
        one of the exact proportion.
    max_length: tokens of a row at most; longer texts are cut into several.

    Rows come in an order drawn anew for each pass over the text from the trainer's seed, and a resumed run goes on
    where it was.
    """

    text: str | list[dict] = field(metadata={"path": True})
    share: float | str | Mapping[str, float] | Callable[[float], float] = "curriculum"
    weight: float = 1.0
    max_length: int = 256

    def start(self, trainer) -> Term:
        check_positive("Replay", weight=self.weight, max_length=self.max_length)
        schedule = self._schedule()
        if isinstance(self.text, list) and not self.text:
            raise DataError("The replay set is empty: give some rows of ordinary text, or leave Replay out.")
        try:
            rows = text_windows(self.text, trainer.processing_class, length=self.max_length)
        except DataError as error:
            raise DataError(f"The replay set cannot be used: {error}") from error
        check_fit(rows, causal_lm(trainer.model))
        return _Replayed(rows, schedule, self.weight, trainer)

    def _schedule(self) -> Callable[[float], int]:
        """The share at an epoch, in millionths."""
        share = curriculum if self.share == "curriculum" else self.share
        if isinstance(share, Mapping):
            share = _decaying(share)
        if isinstance(share, (str, bool)):
            raise ConfigError(f"share of Replay is {share!r}; give a number between 0 and 1, or 'curriculum'")

        def millionths(epoch: float) -> int:
            value = share(epoch) if callable(share) else share
            if not 0 < value < 1 or not 0 < round(value * _WHOLE) < _WHOLE:
                raise ConfigError(f"share of Replay is {value} at epoch {epoch:g}; it must be between 0 and 1")
            return round(value * _WHOLE)

        millionths(0.0)
        if isinstance(self.share, Mapping):
            millionths(math.inf)  # a function of somebody's may not take it
        return millionths


def _decaying(share: Mapping[str, float]) -> Callable[[float], float]:
    if share.keys() != {"start", "end", "decay"}:
        raise ConfigError(f"share of Replay is {dict(share)}; as a mapping it needs start, end and decay (in epochs)")
    check_positive("Replay's share", **share)
    start, end, decay = share["start"], share["end"], share["decay"]
    return lambda epoch: (start - end) * math.exp(-epoch / decay) + end


class _Replayed:
    """The term: which rows are next, and their NLL."""

    def __init__(self, rows: list[dict], schedule: Callable[[float], int], weight: float, trainer):
        self.rows, self.schedule, self.weight, self.trainer = rows, schedule, weight, trainer
        # Kept in checkpoints: rows drawn so far, and the proportion's remainder in millionths.
        self.state = {"replay": torch.zeros(2, dtype=torch.int64)}
        self.waiting: list[int] = []  # of each alignment row of this step to come: replayed rows beside it

    def __call__(self, step: Step) -> tuple[Tensor, Metrics]:
        if step.first:
            self.waiting = self.spread(step.rows, self.schedule(step.epoch))
        own = len(step.batch.rows)
        count = sum(self.waiting[:own])
        del self.waiting[:own]
        device = step.loss.device
        share = {"replay/share": (torch.tensor(count, device=device), torch.tensor(own + count, device=device))}
        if count == 0:
            return step.loss.new_zeros(()), share
        trainer = self.trainer
        packed = lay_out(self.draw(count), trainer.layout, trainer.data_collator.pad_token_id).to(device)
        logprobs = step.model(packed=packed, memory_budget=trainer.args.memory_budget).logprobs
        lengths = packed.cu_seqlens.diff().clamp(min=1)
        loss = -self.weight * (segment_sum(logprobs, packed.cu_seqlens) / lengths).sum() / step.totals.items
        return loss, {**share, "replay/nll": (-logprobs.sum(), lengths.sum())}

    def spread(self, rows: int, share: int) -> list[int]:
        """Replayed rows beside each of the next alignment rows.

        One stream of both: each of its rows adds `share` to the remainder, and is a replayed one where that reaches a
        whole (Bresenham's line).
        """
        counts, remainder = [], int(self.state["replay"][1])
        for _ in range(rows):
            counts.append(0)
            remainder += share
            while remainder >= _WHOLE:
                counts[-1] += 1
                remainder += share - _WHOLE
        self.state["replay"][1] = remainder
        return counts

    def draw(self, count: int) -> list[dict]:
        """The next rows of the text; of several processes, each takes its turn."""
        world, rank = self.trainer.args.world_size, self.trainer.args.process_index
        first = int(self.state["replay"][0])
        self.state["replay"][0] += count
        return [self.row(n * world + rank) for n in range(first, first + count)]

    def row(self, number: int) -> dict:
        passes, at = divmod(number, len(self.rows))
        generator = torch.Generator().manual_seed(self.trainer.args.seed + passes)
        return self.rows[int(torch.randperm(len(self.rows), generator=generator)[at])]
