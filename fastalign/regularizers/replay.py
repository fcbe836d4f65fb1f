"""Replay: ordinary text is trained on between the alignment data, so that the model does not forget it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastalign.data.packing import lay_out
from fastalign.data.text import text_windows
from fastalign.errors import ConfigError, DataError
from fastalign.models.adapters import causal_lm
from fastalign.models.fit import check_fit
from fastalign.objectives.base import Metrics
from fastalign.ops import segment_sum
from fastalign.options import help_field
from fastalign.regularizers.base import Step, Term, check_positive, number_on

# Shares are integers, in millionths: sums of them stay exact, however long training is.
_ONE = 1_000_000


def curriculum(epoch: float) -> float:
    """The default share of replayed rows, `0.3 exp(-epoch / 10) + 0.1`: first 40 %, in the long run 10 %."""
    return 0.3 * math.exp(-epoch / 10) + 0.1


@dataclass
class Replay:
    """Adds rows of ordinary text to the alignment rows: `weight` times the mean NLL of each, as one row of the batch.

    The number of replayed rows is not random: in any stretch of training it is within one of the exact proportion. The
    order of the rows is drawn from the trainer's seed, anew for each pass over the text. A resumed run continues at the
    row where it stopped.

    Args:
        text: rows or a file of them, with text, messages, or prompt and completion; or a .txt file. See
            `fastalign.data.text.text_windows`.
        share: replayed rows among all rows that are trained on, between 0 and 1, for example 0.1 to 0.2. One of

            - a number,
            - a function from the epoch to a number,
            - a mapping with start, end and decay, for `(start - end) exp(-epoch / decay) + end`,
            - "curriculum", for `0.3 exp(-epoch / 10) + 0.1`.
        weight: factor of a replayed row's loss, above 0.
        max_length: most tokens of a row; longer texts are cut into several rows.

    Raises:
        ConfigError: an option has a wrong value.
    """

    text: str | list[dict] = field(
        metadata={
            "path": True,
            "help": "Ordinary text: a .txt file, or rows with text, messages, or prompt and completion.",
        }
    )
    share: float | str | Mapping[str, float] | Callable[[float], float] = help_field(
        "curriculum",
        "Replayed rows among all: a number, {start, end, decay}, or curriculum (0.3 exp(-epoch / 10) + 0.1).",
    )
    weight: float = help_field(1.0, "Factor of a replayed row's loss.")
    max_length: int = help_field(256, "Most tokens of a row; longer texts are cut into several.")

    def __post_init__(self):
        check_positive("Replay", weight=self.weight, max_length=self.max_length)
        self._schedule()

    def start(self, trainer: Any) -> Term:
        """The term for a trainer: it draws rows and computes their loss.

        Raises:
            ConfigError: an option has a wrong value.
            DataError: the text has no rows, or cannot be read.
            ModelError: a token of the text is unknown to the model.
        """
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
        """A function from the epoch to the share in millionths."""
        share = curriculum if self.share == "curriculum" else self.share
        if isinstance(share, Mapping):
            share = _decaying(share)
        if not callable(share) and (isinstance(share, bool) or not isinstance(share, (int, float))):
            raise ConfigError(f"share of Replay is {share!r}; give a number between 0 and 1, or 'curriculum'")

        def millionths(epoch: float) -> int:
            value = share(epoch) if callable(share) else share
            if not 0 < value < 1 or not 0 < round(value * _ONE) < _ONE:
                raise ConfigError(f"share of Replay is {value} at epoch {epoch:g}; it must be between 0 and 1")
            return round(value * _ONE)

        millionths(0.0)
        if isinstance(self.share, Mapping):
            # The share moves from start to end, so both ends are checked. A user's function may not accept infinity.
            millionths(math.inf)
        return millionths


def _decaying(share: Mapping[str, float]) -> Callable[[float], float]:
    """`(start - end) exp(-epoch / decay) + end` as a function of the epoch."""
    if share.keys() != {"start", "end", "decay"}:
        raise ConfigError(f"share of Replay is {dict(share)}; as a mapping it needs start, end and decay (in epochs)")
    check_positive("Replay's share", **share)
    start, end, decay = share["start"], share["end"], share["decay"]
    return lambda epoch: (start - end) * math.exp(-epoch / decay) + end


class _Replayed:
    """The term: it decides which rows are next, and computes their NLL.

    Args:
        rows: tokenised rows of the text.
        schedule: from the epoch to the share in millionths.
        weight: factor of a row's loss.
        trainer: gives the layout, the seed and the number of processes.
    """

    def __init__(self, rows: list[dict], schedule: Callable[[float], int], weight: float, trainer):
        self.rows, self.schedule, self.weight, self.trainer = rows, schedule, weight, trainer
        # Saved in checkpoints: the number of rows drawn so far, and the remainder of the proportion in millionths.
        # All processes have the same: they count the rows of all, and each computes those beside its own rows.
        self.state = {"replay": torch.zeros(2, dtype=torch.int64)}
        # For each alignment row of this step that is still to come, the number of replayed rows that go with it.
        self.waiting: list[int] = []

    def __call__(self, step: Step) -> tuple[Tensor, Metrics]:
        world, rank = self.trainer.args.world_size, self.trainer.args.process_index
        if step.first:  # every process has as many rows
            self.waiting = self.spread(step.rows * world, self.schedule(step.epoch))
        alignment_rows = len(step.batch.rows or [])
        # Micro-batches are dealt to the processes in turn, so these are the rows of one micro-batch in each process.
        counts = [sum(self.waiting[i * alignment_rows : (i + 1) * alignment_rows]) for i in range(world)]
        count, before = counts[rank], sum(counts[:rank])
        del self.waiting[: world * alignment_rows]
        rows = self.draw(sum(counts))[before : before + count]
        device = step.loss.device
        all_rows = number_on(device, alignment_rows + count)
        share = {"replay/share": (number_on(device, count), all_rows)}
        if count == 0:
            return step.loss.new_zeros(()), share
        trainer = self.trainer
        packed = lay_out(rows, trainer.layout, trainer.data_collator.pad_token_id).to(device)
        # Without DDP's wrapper, whose forward waits for the other processes: they may have no row to replay now. The
        # gradients are averaged all the same, because DDP's hooks are on the parameters.
        model: Any = trainer.accelerator.unwrap_model(step.model)
        logprobs = model(packed=packed, memory_budget=trainer.args.memory_budget).logprobs
        lengths = packed.cu_seqlens.diff().clamp(min=1)  # (count,), scored tokens
        # Like a row of the objective: a mean over the row's tokens, divided by the rows of the complete step.
        loss = -self.weight * (segment_sum(logprobs, packed.cu_seqlens) / lengths).sum() / step.totals.items
        return loss, {**share, "replay/nll": (-logprobs.sum(), lengths.sum())}

    def spread(self, rows: int, share: int) -> list[int]:
        """The number of replayed rows that go with each of the next alignment rows.

        Think of one stream of both kinds of rows. Each row of it adds `share` to a remainder. Whenever the remainder
        reaches one, the next row is a replayed one, and one is subtracted (Bresenham's line). So the proportion is
        exact over any stretch of the stream.

        Args:
            rows: the number of alignment rows.
            share: of replayed rows among all, in millionths.
        """
        counts, remainder = [], int(self.state["replay"][1])
        for _ in range(rows):
            counts.append(0)
            remainder += share
            while remainder >= _ONE:
                counts[-1] += 1
                remainder += share - _ONE
        self.state["replay"][1] = remainder
        return counts

    def draw(self, count: int) -> list[dict]:
        """The next rows of the text."""
        first = int(self.state["replay"][0])
        self.state["replay"][0] += count  # in the checkpoint, so a resumed run continues with the next row
        return [self.row(number) for number in range(first, first + count)]

    def row(self, number: int) -> dict:
        """Row `number` of an endless stream: one shuffled pass over the text after another."""
        passes, at = divmod(number, len(self.rows))
        generator = torch.Generator().manual_seed(self.trainer.args.seed + passes)
        return self.rows[int(torch.randperm(len(self.rows), generator=generator)[at])]
