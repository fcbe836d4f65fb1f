"""What goes wrong in training, found in the numbers that a run logs: one table of diagnostics.

    metrics.jsonl, samples.jsonl, summary.json, nonfinite_rows.jsonl -> Logged -> each diagnostic -> Finding

A diagnostic is a pure function from `Logged` to the evidence in one sentence, or None. It needs a margin over the noise
of the batches before it speaks: means of several lines are compared, never two lines. `first` and `last` below are the
first and the last quarter of the logged lines, at least three each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from fastalign.files import read_json, read_jsonl, read_metrics
from fastalign.report.numbers import change_of, first_quarter, is_finite, last_quarter, noise_of

__all__ = ["DIAGNOSTICS", "Diagnostic", "Finding", "Logged", "diagnose", "find"]

FEW = 8  # logged lines that a trend needs
SHORT = 20  # optimiser steps, before which nothing is said of a run that does not learn
WINDOW = 20  # lines before a jump


@dataclass
class Logged:
    """What a run has logged so far.

    Attributes:
        records: the lines of metrics.jsonl.
        samples: the lines of samples.jsonl, with the answers `before` and `after`.
        summary: summary.json.
        bad_rows: the lines of nonfinite_rows.jsonl.
    """

    records: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    bad_rows: Sequence[Mapping[str, Any]] = ()

    @property
    def steps(self) -> int:
        """Optimiser steps that were logged."""
        return max((int(r["step"]) for r in self.records if is_finite(r.get("step"))), default=0)

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, finite values only: of training lines, or of evaluations if it starts with eval_.

        If a step was logged twice, as after resuming from a checkpoint, the later line counts.
        """
        line = "eval_loss" if key.startswith("eval_") else "loss"
        found = {
            int(r["step"]): float(r[key])
            for r in self.records
            if line in r and is_finite(r.get(key)) and is_finite(r.get("step"))
        }
        return sorted(found.items())

    def values(self, key: str) -> list[float]:
        """The values of a metric in the order of their steps."""
        return [value for _, value in self.series(key)]


class Diagnostic(NamedTuple):
    """One row of the table."""

    name: str
    title: str
    check: Callable[[Logged], str | None]
    remedy: str


class Finding(NamedTuple):
    """A diagnostic that has fired.

    Attributes:
        name: Of the row in `DIAGNOSTICS`.
        title: What is wrong, in a few words.
        evidence: The numbers that show it.
        remedy: What to try.
    """

    name: str
    title: str
    evidence: str
    remedy: str


def diagnose(run_dir: str | os.PathLike) -> list[Finding]:
    """What the files of a run folder show to be wrong, whether the run has ended or not; see `DIAGNOSTICS`."""
    folder = Path(run_dir)
    return find(
        Logged(
            read_metrics(folder / "metrics.jsonl"), read_jsonl(folder / "samples.jsonl"),
            read_json(folder / "summary.json"), read_jsonl(folder / "nonfinite_rows.jsonl"),
        )
    )  # fmt: skip


def find(logged: Logged) -> list[Finding]:
    """Every diagnostic that fires, in the order of the table."""
    found = [(row, row.check(logged)) for row in DIAGNOSTICS]
    return [Finding(row.name, row.title, evidence, row.remedy) for row, evidence in found if evidence]


# The diagnostics. Each says what it sees, with numbers.


def not_finite(logged: Logged) -> str | None:
    """A loss that is NaN or infinite; or rows on which the guard stopped the run."""
    if logged.bad_rows:
        row = logged.bad_rows[0]
        prompt = str(row.get("prompt", ""))[:60]
        return (
            f"at step {row.get('step', '?')} the {row.get('not_finite', 'loss')} of {len(logged.bad_rows)} rows was not"
            f" finite, and the run stopped before it reached the weights; the first row has the prompt {prompt!r}"
        )
    for record in logged.records:
        for key in ("loss", "eval_loss"):
            value = record.get(key)
            if isinstance(value, float) and not math.isfinite(value):
                return f"{key} is {value} at step {record.get('step', '?')}"
    return None


def loss_spike(logged: Logged) -> str | None:
    """A loss of three times the largest of the lines before it, and more than a fifth above where the run started."""
    return _jump(logged, "loss", "the loss", over_largest=3, over_start=1.2, over_middle=3)


def exploding_gradient(logged: Logged) -> str | None:
    """A gradient norm of twice the largest and 20 times the median of the lines before it, and 10 times the start.

    Or one that grows over a few lines, and stays at 5 times the largest value from before and 10 times the start.
    """
    jumped = _jump(logged, "grad_norm", "the gradient norm", over_largest=2, over_start=10, over_middle=20)
    return jumped or _climb(logged, "grad_norm", "the gradient norm")


def _climb(logged: Logged, key: str, name: str) -> str | None:
    """Three lines in a row that are far above all lines before, with a line between them on which the value grew."""
    series = logged.series(key)
    values = [abs(value) for _, value in series]
    for i in range(8, len(series)):
        before, after = values[max(0, i - 3 - WINDOW) : i - 3], values[i - 2 : i + 1]
        start = fmean(values[:3])
        if min(after) > max(5 * max(before), 10 * median(before), 10 * start, 1e-6):
            return (
                f"{name} is {min(after):.3g} to {max(after):.3g} from step {series[i - 2][0]} to {series[i][0]}; it "
                f"was {max(before):.3g} at most before, and {start:.3g} at the start"
            )
    return None


def _jump(
    logged: Logged, key: str, name: str, *, over_largest: float, over_start: float, over_middle: float
) -> str | None:
    """The first value that is far above the lines before it.

    With small batches single values are far above the median, so the largest counts too. Towards the end of a run
    almost all values may be near 0, so a value must also be large beside those at the start.
    """
    series = logged.series(key)
    values = [abs(value) for _, value in series]
    for i in range(5, len(series)):
        before = values[max(0, i - WINDOW) : i]
        start = fmean(values[:3])
        limit = max(over_largest * max(before), over_middle * median(before), over_start * start, 1e-6)
        if values[i] > limit:
            return (
                f"{name} is {series[i][1]:.3g} at step {series[i][0]}; in the {len(before)} lines before it was "
                f"{max(before):.3g} at most, and {start:.3g} at the start"
            )
    return None


def vanishing_gradient(logged: Logged) -> str | None:
    """A gradient norm below a thousandth of what it was, while the loss is still more than half of what it was."""
    norms, losses = logged.values("grad_norm"), logged.values("loss")
    if len(norms) < FEW or len(losses) < FEW:
        return None
    start, now = median(first_quarter(norms)), median(last_quarter(norms))
    loss, loss_now = fmean(first_quarter(losses)), fmean(last_quarter(losses))
    if now < max(1e-3 * start, 1e-9) and abs(loss_now) > 0.5 * abs(loss):
        return f"the gradient norm fell from {start:.3g} to {now:.3g}; the loss is {loss_now:.3g}, {loss:.3g} before"
    return None


def plateau(logged: Logged) -> str | None:
    """After an improvement the last quarter brought less than 0.5 %, or than its noise, at a high learning rate."""
    series, rates = logged.series("loss"), logged.values("learning_rate")
    n, values = len(series), [value for _, value in series]
    if n < 5 * FEW or not rates or rates[-1] < 0.5 * max(rates):
        return None  # where the learning rate falls to 0, the loss flattens as it should
    first, third, last = values[: n // 8], values[n // 2 : 3 * n // 4], values[3 * n // 4 :]
    improved = fmean(first) - fmean(third) > noise_of(first, third)
    level = abs(fmean(third))
    # A loss that does not fall any more moves by the noise of its batches. Noise of more than 3 % hides too much.
    little = min(max(0.005 * level, noise_of(third, last)), 0.03 * level)
    if improved and level > 0.05 * abs(fmean(first)) and fmean(third) - fmean(last) < little:
        middle = series[3 * n // 4][0]
        return (
            f"the mean loss of steps {series[n // 2][0]} to {middle} is {fmean(third):.4g}, and from there to step "
            f"{series[-1][0]} {fmean(last):.4g}, at a learning rate that is still {rates[-1]:.2g}"
        )
    return None


def learning_rate_idle(logged: Logged) -> str | None:
    """A loss that is where it began, within 1 % and the noise; margins that begin at 0 have stayed there."""
    losses, margins = logged.values("loss"), logged.values("rewards/margins")
    if len(losses) < FEW or logged.steps < SHORT or not any(logged.values("grad_norm")):
        return None
    change, noise = change_of(losses)
    start = abs(fmean(first_quarter(losses)))
    # With a reference all margins begin at 0, and any that is not small shows that the weights have moved.
    from_zero = bool(margins) and abs(margins[0]) < 0.02
    if (from_zero and max(map(abs, margins)) > 0.02) or abs(change) > max(noise, 0.01 * start):
        return None
    rate = max(logged.values("learning_rate"), default=math.nan)
    of_margins = f", and the reward margin is {fmean(last_quarter(margins)):.2g}" if margins else ""
    return (
        f"after {logged.steps} steps at a learning rate of up to {rate:.2g} the mean loss is "
        f"{fmean(last_quarter(losses)):.4g}, and it began at {fmean(first_quarter(losses)):.4g}{of_margins}"
    )


def adapter_still(logged: Logged) -> str | None:
    """An adapter whose weights are what they were."""
    series = logged.series("adapter_norm")
    norms = [norm for _, norm in series]
    if len(norms) < 3 or max(norms) - min(norms) > 1e-6 * max(1.0, *norms):
        return None
    return f"from step {series[0][0]} to {series[-1][0]} the norm of the adapter's B matrices stays at {norms[-1]:.6g}"


def chosen_falls(logged: Logged) -> str | None:
    """Log-probabilities of the chosen answers that fall by more than half of what the margin gains."""
    chosen, margins = logged.values("rewards/chosen"), logged.values("rewards/margins")
    if len(chosen) < FEW or len(margins) < FEW:
        return None
    margin, _ = change_of(margins)
    fall, noise = change_of(chosen)
    if margin > 0.1 and fall < -max(0.5 * margin, noise):
        return (
            f"the margin rose by {margin:.3g}, but the reward of the chosen answers fell by {-fall:.3g}: both answers "
            "become less likely, the rejected ones faster"
        )
    return None


def kl_runaway(logged: Logged) -> str | None:
    """More than one nat per token between the model and its start, and still rising."""
    for key, what in (("eval_kl", "on the held-out rows"), ("kl_to_start", "on the training rows")):
        series = logged.series(key)
        if series and series[-1][1] > 1.0 and series[-1][1] >= 0.9 * max(value for _, value in series):
            step, value = series[-1]
            return f"the KL divergence to the start is {value:.3g} nats per token at step {step}, {what}"
    return None


def eval_worsens(logged: Logged) -> str | None:
    """A held-out loss that ends 5 % above its best, or 2 % above where it was before training."""
    series = logged.series("eval_loss")
    if len(series) < 2:
        return None
    (first, start), (last, end) = series[0], series[-1]
    best_at, best = min(series, key=lambda pair: pair[1])
    if len(series) > 2 and best_at < last and end > best + 0.05 * abs(best) + 1e-3:
        return f"the held-out loss was {best:.4g} at step {best_at}, and is {end:.4g} at step {last}"
    if first == 0 and end > start + 0.02 * abs(start):
        return f"the held-out loss was {start:.4g} before training, and is {end:.4g} at step {last}"
    return None


def accuracy_at_chance(logged: Logged) -> str | None:
    """Pairs that are told apart no better than by chance in the second half of the run."""
    margins = dict(logged.series("rewards/margins"))
    series = [(step, value) for step, value in logged.series("rewards/accuracies") if margins.get(step)]
    late = [value for _, value in series[len(series) // 2 :]]
    if len(late) < FEW or logged.steps < SHORT:
        return None
    mean = fmean(late)
    if 0.4 < mean < 0.58 and mean + noise_of(late) < 0.65:
        return f"from step {series[len(series) // 2][0]} on, {mean:.0%} of the pairs have a positive margin"
    return None


def margins_saturated(logged: Logged) -> str | None:
    """Half of the run or more at a loss near 0 on pairs that are all told apart: these steps teach nothing."""
    accuracy, losses = logged.series("rewards/accuracies"), logged.values("loss")
    if len(accuracy) < FEW or len(losses) != len(accuracy):
        return None
    half = len(losses) // 2
    late, start = fmean(losses[half:]), fmean(losses[:3])
    if fmean(value for _, value in accuracy[half:]) >= 0.99 and 0 <= late < 0.02 * abs(start):
        return (
            f"from step {accuracy[half][0]} on, the mean loss is {late:.2g} (it began at {start:.3g}), at full accuracy"
        )
    return None


def _texts(logged: Logged) -> tuple[list[str], list[str]]:
    pairs = [(s.get("before"), s.get("after")) for s in logged.samples]
    kept = [(str(before), str(after)) for before, after in pairs if before is not None and after is not None]
    return [before for before, _ in kept], [after for _, after in kept]


def length_collapse(logged: Logged) -> str | None:
    """Answers of less than a tenth of their former length, or half of them empty."""
    before, after = _texts(logged)
    if len(before) < 3:
        return None
    old, new = (fmean(len(text) for text in texts) for texts in (before, after))
    empty = [sum(not text.strip() for text in texts) / len(texts) for texts in (before, after)]
    if (old >= 10 and new < 0.1 * old) or (empty[1] >= 0.5 > 2 * empty[0]):
        return f"answers have {new:.3g} characters on average, {old:.3g} before training; {empty[1]:.0%} are empty"
    return None


def answers_do_not_end(logged: Logged) -> str | None:
    """Half of the answers or more that ended by themselves before training no longer do."""
    rows = logged.summary.get("rows")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, Mapping) and row.get("metric") == "Answers that end by themselves":
            before, after = row.get("before"), row.get("after")
            if is_finite(before) and is_finite(after) and before >= 50 and after < 0.5 * before:
                return f"{after:.0f} % of the answers end by themselves, {before:.0f} % before training"
    return None


def diversity_collapse(logged: Logged) -> str | None:
    """The same answer to different prompts, or answers that repeat the same two words."""
    before, after = _texts(logged)
    if len(before) < 3:
        return None
    same = [1 - len({text.strip() for text in texts}) / len(texts) for texts in (before, after)]
    if same[1] >= 0.5 and same[0] < 0.25:
        return f"{same[1]:.0%} of the answers repeat another one ({same[0]:.0%} before training)"
    repeats = [fmean(map(_repetition, texts)) for texts in (before, after)]
    if repeats[1] > 0.6 and repeats[0] < 0.3:
        return f"{repeats[1]:.0%} of the letter sequences inside an answer repeat ({repeats[0]:.0%} before training)"
    return None


def _repetition(text: str) -> float:
    """The share of windows of eight characters that the text has had before; 0 for short texts."""
    windows = [text[i : i + 8] for i in range(len(text) - 7)]
    return 1 - len(set(windows)) / len(windows) if len(windows) >= 16 else 0.0


DIAGNOSTICS = (
    Diagnostic("not_finite", "Loss or gradient is not finite", not_finite,
               "look at the named rows; lower the learning rate; set max_grad_norm=1.0 if it is off"),
    Diagnostic("loss_spike", "The loss jumped", loss_spike,
               "lower the learning rate or warm up longer; look at the rows of that step"),
    Diagnostic("exploding_gradient", "The gradient exploded", exploding_gradient,
               "lower the learning rate; set max_grad_norm=1.0; warm up longer"),
    Diagnostic("vanishing_gradient", "The gradient vanished", vanishing_gradient,
               "lower weight_decay and the learning rate; look whether the weights have shrunk or saturated"),
    Diagnostic("plateau", "The loss stopped falling", plateau,
               "stop earlier, or let the learning rate fall (lr_scheduler_type=cosine); more or other data"),
    Diagnostic("learning_rate_idle", "Training has no effect on the loss", learning_rate_idle,
               "raise the learning rate tenfold (adapters: about 1e-4); train longer; can these rows be learnt?"),
    Diagnostic("adapter_still", "The adapter does not move", adapter_still,
               "look at the learning rate and its schedule, and at what is trainable in preflight.txt"),
    Diagnostic("chosen_falls", "The chosen answers become less likely", chosen_falls,
               "set nll_weight (0.1 to 1), use apo_zero, or train on the chosen answers first (sft)"),
    Diagnostic("kl_runaway", "The model runs away from its start", kl_runaway,
               "raise beta; lower the learning rate; train fewer epochs; add the regulariser kl_to_start"),
    Diagnostic("eval_worsens", "The evaluation gets worse", eval_worsens,
               "stop at the best step (load_best_model_at_end=true); fewer epochs; a lower learning rate; more rows"),
    Diagnostic("accuracy_at_chance", "Preference accuracy stays at chance", accuracy_at_chance,
               "read twenty pairs: are the labels consistent, are chosen and rejected swapped in some; raise beta"),
    Diagnostic("margins_saturated", "The pairs are all learnt", margins_saturated,
               "stop earlier; harder pairs; a smaller beta keeps the margin small"),
    Diagnostic("length_collapse", "The answers became very short", length_collapse,
               "are chosen answers shorter than rejected ones? use a length-normalised loss (simpo, dpo_norm)"),
    Diagnostic("answers_do_not_end", "The answers no longer end", answers_do_not_end,
               "look at the EOS lines of preflight.txt, and whether chosen answers are longer than rejected ones"),
    Diagnostic("diversity_collapse", "The answers repeat themselves", diversity_collapse,
               "train fewer epochs; lower the learning rate; look for repeated completions among the rows"),
)  # fmt: skip
