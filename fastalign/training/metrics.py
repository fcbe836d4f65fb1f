"""What is logged: metrics of a held-out batch, sums of metrics between two lines, and tokens per second."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer

from fastalign.data.batch import Batch
from fastalign.data.processes import gather_objects, process_count
from fastalign.errors import TrainingError
from fastalign.memory import measure
from fastalign.models.head import token_divergence
from fastalign.models.snapshot import ReferenceWeights
from fastalign.objectives.base import Metrics, Objective
from fastalign.regularizers.base import count_of
from fastalign.training.reference import detached_head, score_with_weights
from fastalign.training.watch import adapter_norm

Mode = Literal["train", "eval"]


class MetricSums:
    """Sums and counts of metrics over micro-batches, separately for training and for evaluation.

    They stay on the device until `take_means`. To read a number off a GPU waits for everything before it, so the
    training loop must not do that in every micro-batch. Sums are float64: many micro-batches may come before a line.

    Each process sums up its rows. Only `take_means` adds the sums of all processes.
    """

    def __init__(self):
        self.sums: dict[Mode, dict[str, Tensor]] = {"train": {}, "eval": {}}  # each (2,) float64: sum and count

    def add(self, mode: Mode, metrics: Metrics) -> None:
        """Adds the (sum, count) pairs of one micro-batch."""
        sums = self.sums[mode]
        for name, pair in metrics.items():
            values = torch.stack([part.detach().double() for part in pair])
            sums[name] = sums[name] + values if name in sums else values

    def clear(self, mode: Mode) -> None:
        """Forgets what was added."""
        self.sums[mode].clear()

    def take_means(self, mode: Mode, prefix: str = "") -> dict[str, float]:
        """The means over all processes since the last call, which all of them make. Their names start with `prefix`.

        Losses over labelled rows give rewards of chosen and of rejected rows, but no pairs. Their margin is the
        difference of both means.
        """
        means = {name: total / count for name, (total, count) in self._take_sums(mode).items() if count}
        if "rewards/chosen" in means and "rewards/rejected" in means:
            means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
        return {prefix + name: value for name, value in means.items()}

    def _take_sums(self, mode: Mode) -> dict[str, tuple[float, float]]:
        """(sum, count) of each metric over all processes, which are cleared. One transfer reads all of them."""
        sums = self.sums[mode]
        values = torch.stack(list(sums.values())).tolist() if sums else []
        # A process may lack a metric of another one, for example of replayed rows that it drew none of.
        totals: dict[str, tuple[float, float]] = {}
        for of_process in gather_objects(dict(zip(sums, values, strict=True))):
            for name, (total, count) in of_process.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + total, before[1] + count)
        sums.clear()
        return totals


class Throughput:
    """Tokens that training has computed: in all, and per second since the last log line.

    Attributes:
        total: Tokens of this process so far. A shared prompt counts once, and tokens that only fill up a row do not
            count.
        of_all: Tokens of all processes up to the last logged line.
    """

    def __init__(self):
        self.total, self.of_all = 0, 0
        self.restart()

    def restart(self) -> None:
        """Starts the clock of `per_second`."""
        self._tokens, self._since = 0, time.monotonic()

    def add(self, batch: Batch) -> None:
        """Counts the tokens of one micro-batch."""
        tokens = batch.packed.input_ids.numel() - batch.packed.filling
        self._tokens += tokens
        self.total += tokens

    def per_second(self) -> float:
        """Tokens per second of this process since the last call."""
        tokens, seconds = self._tokens, time.monotonic() - self._since
        self.restart()
        return tokens / max(seconds, 1e-9)


@torch.no_grad()
def held_out(
    model: nn.Module, batch: Batch, objective: Objective, reference: ReferenceWeights | None
) -> tuple[Tensor, Metrics]:
    """Loss and metrics of one held-out batch, without regularisers.

    Args:
        model: The model as training calls it.
        batch: The batch, with the column "ref_logprobs" if the objective needs a reference and there is no copy of it.
        objective: What is minimised.
        reference: A copy of the reference's weights. With it the metrics include "kl", the exact KL divergence
            `KL(model || reference)` over the whole vocabulary, per scored token.

    Returns:
        The loss of the batch, and the metrics. They include "loss" weighted by the size of the batch: a plain mean of
        batch losses would give a short last batch the weight of a full one.
    """
    scores = model(packed=batch.packed, keep_hidden=True)
    ref_logprobs, metrics = batch.columns.get("ref_logprobs"), {}
    if reference is not None:
        ref_scores, ref_head = score_with_weights(model, batch.packed, reference)
        assert ref_scores.logprobs is not None and ref_scores.hidden is not None, "it has targets and keeps them"
        ref_logprobs = ref_scores.logprobs[: scores.logprobs.shape[0] - batch.prompt_tokens]
        head = detached_head(model)
        kl = token_divergence(scores.hidden, head, ref_scores.hidden, ref_head, divergence="reverse_kl")
        metrics["kl"] = (kl.sum(dtype=torch.float64), count_of(kl))
    totals = objective.totals(batch)
    loss, of_objective = objective(scores.of_objective, ref_logprobs, batch, totals)
    weight = objective.weight(totals)
    return loss, {**metrics, **of_objective, "loss": (loss * weight, weight)}


def check_same_gradients(norms: Sequence[float | None]) -> None:
    """Checks that the processes average their gradients, by the norm of each process's.

    Raises:
        TrainingError: The norms differ, so that every process trains a model of its own.
    """
    finite = [norm for norm in norms if norm is not None and math.isfinite(norm)]
    if any(not math.isclose(norm, finite[0], rel_tol=0.01) for norm in finite):
        listed = ", ".join("none" if norm is None else f"{norm:.4g}" for norm in norms)
        raise TrainingError(
            f"The processes have different gradients (norms {listed}), so each trains a model of its own: leave out "
            "what wraps the model in place of DDP or FSDP, and start again from the last checkpoint before this run."
        )


class LoggedMetrics(Trainer):
    """The part of `AlignmentTrainer` that logs: metrics gathered since the last line, tokens per second, memory."""

    sums: MetricSums
    throughput: Throughput
    writer: Any  # the callback that writes metrics.jsonl

    @property
    def training_seconds(self) -> float:
        """Seconds that training took so far, those before it was resumed included."""
        return self.writer.seconds

    @property
    def tokens_seen(self) -> int:
        """Tokens that training has computed so far, in all processes. Each shared prompt counts once."""
        return self.throughput.total if process_count() == 1 else self.throughput.of_all

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs a line; a line of training gets the means of the metrics since the last one."""
        if "loss" in logs or "train_runtime" in logs:  # the second is the last line of a run
            logs = {**logs, **self.sums.take_means("train")}
            tokens = self.throughput
            peak = measure.peak_bytes(self.args.device) / 1e9
            mine = (tokens.per_second(), tokens.total, peak, logs.get("grad_norm"))
            speeds, totals, peaks, norms = zip(*gather_objects(mine), strict=True)
            tokens.of_all = sum(totals)
            check_same_gradients(norms)
            if "loss" in logs:
                logs |= {"tokens_per_second": sum(speeds), "memory_gb": max(peaks)}  # memory of the fullest process
        if "loss" in logs and (norm := adapter_norm(self.model)) is not None:
            logs["adapter_norm"] = norm
        super().log(logs, start_time)
