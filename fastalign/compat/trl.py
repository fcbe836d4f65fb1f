"""TRL 1.16: its trainers' scoring by fastalign's kernels (`enable`), and its `selective_log_softmax`.

TRL's trainers for DPO, SFT, KTO, GRPO and RLOO score tokens by one function, `ChunkedLogProbFunction.apply`, and its
distillation trainer by another, `ChunkedDivergenceFunction.apply`. `enable` puts fastalign's in their place, which have
the same arguments and results.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.ops import linear_divergence, linear_logprobs, linear_token_statistics, selective_logprobs
from fastalign.ops.backends import cpu

# The arguments of TRL's two functions, of which nothing may be missing or new. TRL's name for the soft cap is long.
_CAP = "final_logit_softcapping"
_SEAMS: dict[tuple[str, str], tuple[str, ...]] = {
    ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction"): (
        "hidden", "weight", "bias", "targets", "temperature", "chunk_size", _CAP, "logit_scale", "outputs",
    ),
    ("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction"): (
        "student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias", "beta",
        "temperature", "student_logit_scale", f"student_{_CAP}", "teacher_logit_scale", f"teacher_{_CAP}",
    ),
}  # fmt: skip
# Where TRL decides whether masked positions are scored and thrown away, or left out.
_LEAVES_OUT = (("trl.trainer.utils", "_use_triton"), ("trl.trainer.distillation_trainer", "_use_triton"))
_LOG_PROBS, _OPTIONAL = "log_probs", ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_undo: list[Callable[[], None]] = []  # what `disable` calls; empty while TRL is as it was
_entropy = [True]  # the argument of the latest `enable`


class enable:
    """Lets TRL's trainers score tokens with fastalign's kernels, on the CPU.

    Call it before `trainer.train()`. It counts for all trainers of the process until `disable`, or as a context manager
    until the end of the block:

        fastalign.compat.trl.enable()
        with fastalign.compat.trl.enable(): ...

    Results and metrics stay the same, up to rounding. Masked positions (prompts, padding) are left out before the
    products, as TRL does on a GPU. These stay with TRL's own code:

    - tensors on a GPU, where TRL has Triton kernels;
    - dtypes that the C++ kernels are not faster for;
    - a TRL whose function has other arguments than that of 1.16. A warning says so, and nothing is changed.

    Under autocast a trained output layer is multiplied in float32, not in bfloat16.

    Args:
        entropy: Whether the entropies that DPO, KTO and SFT only log are computed. If not, they are NaN in the log, and
            a step is faster. GRPO and RLOO train with their entropies, which are always computed.

    Attributes:
        active: Whether TRL was changed.
    """

    def __init__(self, *, entropy: bool = True):
        self._before = _entropy[-1] if _undo else None  # how the block around this one was enabled
        disable()
        problem = _why_not()
        self.active = problem is None
        if problem is not None:
            warnings.warn(f"fastalign.compat.trl.enable() changes nothing: {problem}", stacklevel=2)
            return
        log_probs, divergence = (getattr(importlib.import_module(module), name) for module, name in _SEAMS)
        _replace(log_probs, "apply", staticmethod(_scoring(log_probs.apply, entropy)))
        _replace(divergence, "apply", staticmethod(_divergence(divergence.apply)))
        for module, name in _LEAVES_OUT:
            place = importlib.import_module(module)
            _replace(place, name, _on_cpu_too(getattr(place, name)))
        _entropy[:] = [entropy]

    def __enter__(self) -> enable:
        return self

    def __exit__(self, *_: object) -> None:
        disable()
        if self._before is not None:
            enable(entropy=self._before)


def disable() -> None:
    """Leaves TRL as it was before `enable`. Without an `enable` it does nothing."""
    while _undo:
        _undo.pop()()


def _why_not() -> str | None:
    """Why TRL cannot be changed, or would not get faster, or None."""
    if not cpu.is_fast(torch.float32):
        return cpu.in_use.unavailable or "the C++ kernels for this processor are not faster than TRL's code"
    if missing := cpu.why_no_kernel("details"):
        return missing
    try:
        for (module, name), expected in _SEAMS.items():
            function = getattr(importlib.import_module(module), name)
            given = tuple(inspect.signature(function.forward).parameters)[1:]  # without ctx
            if given != expected:
                return f"{module}.{name} takes {', '.join(given)}, which is not TRL 1.16; install trl==1.16.*"
        for module, name in _LEAVES_OUT:
            if list(inspect.signature(getattr(importlib.import_module(module), name)).parameters) != ["device"]:
                return f"{module}.{name} takes other arguments than in TRL 1.16; install trl==1.16.*"
    except (ImportError, AttributeError) as error:
        return f"TRL 1.16 is not there ({error}); install trl==1.16.*"
    return None


def _replace(place: Any, name: str, value: Any) -> None:
    """Sets an attribute, and says to `disable` how to restore it. An inherited one (`apply`) is uncovered again."""
    own, before = name in vars(place), getattr(place, name)
    setattr(place, name, value)
    _undo.append((lambda: setattr(place, name, before)) if own else (lambda: delattr(place, name)))


def _on_cpu_too(use_triton: Callable[..., bool]) -> Callable[..., bool]:
    # By it TRL decides whether masked positions may be left out. On a CPU they may: nothing is compiled for a shape.
    return lambda device: device.type == "cpu" or use_triton(device)


def _is_ours(*tensors: Tensor | None) -> bool:
    """Whether fastalign's C++ kernels are the faster ones for these tensors."""
    given = [t for t in tensors if t is not None]
    return all(t.device.type == "cpu" and cpu.is_fast(t.dtype) for t in given)


def _for_products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of autocast, where it is on. The gradient of a trained weight would be rounded: that stays."""
    if torch.is_autocast_enabled("cpu") and not weight.requires_grad:
        dtype = torch.get_autocast_dtype("cpu")
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _scoring(trls: Callable[..., Any], log_entropy: bool) -> Callable[..., Any]:
    """`ChunkedLogProbFunction.apply`: log-probs of targets (N,), and those of the four optional outputs asked for."""

    @torch.compiler.disable
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = _OPTIONAL,
    ) -> tuple[Tensor | None, ...]:
        wanted = set(outputs) - {_LOG_PROBS}
        if not _is_ours(hidden, weight, bias) or not wanted <= set(_OPTIONAL):
            return trls(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        hidden, weight = _for_products(hidden, weight)
        options: dict[str, Any] = {
            "bias": bias, "temperature": temperature, "softcap": final_logit_softcapping, "logit_scale": logit_scale,
        }  # fmt: skip
        if not wanted:
            return linear_logprobs(hidden, weight, targets, ignore_index=None, **options), None, None, None, None
        # Who wants the entropy and nothing else is GRPO or RLOO, which train with it.
        entropy = "entropy" in wanted and (log_entropy or wanted == {"entropy"})
        values = linear_token_statistics(hidden, weight, targets, entropy=entropy, **options)
        results: dict[str, Tensor | None] = {
            "entropy": values.entropy if entropy else torch.full_like(values.mean_logit, float("nan")),
            "log_sum_sq_probs": values.log_sum_sq_probs,
            "mean_logits": values.mean_logit,
            "is_top1": values.is_top1,
        }
        return values.logprobs, *(value if name in wanted else None for name, value in results.items())

    return apply


def _divergence(trls: Callable[..., Any]) -> Callable[..., Any]:
    """`ChunkedDivergenceFunction.apply`: divergences (N,), and the student's entropies (N,) without gradient."""

    @torch.compiler.disable
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        weights = student_weight, student_bias, teacher_weight, teacher_bias
        vocabularies = len(student_weight), len(teacher_weight)
        if not _is_ours(student_hidden, teacher_hidden, *weights) or len(set(vocabularies)) > 1:
            return trls(
                student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, beta,
                temperature, student_logit_scale, student_final_logit_softcapping, teacher_logit_scale,
                teacher_final_logit_softcapping,
            )  # fmt: skip
        hidden, weight = _for_products(student_hidden, student_weight)
        options: dict[str, Any] = {
            "bias": student_bias, "temperature": temperature, "logit_scale": student_logit_scale,
            "softcap": student_final_logit_softcapping,
        }  # fmt: skip
        kinds: dict[float, Any] = {0.0: {"divergence": "forward_kl"}, 1.0: {"divergence": "reverse_kl"}}
        values = linear_divergence(
            hidden, weight, *_for_products(teacher_hidden.detach(), teacher_weight.detach()),
            teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
            teacher_logit_scale=teacher_logit_scale, teacher_softcap=teacher_final_logit_softcapping,
            **kinds.get(beta, {"divergence": "jsd", "jsd_beta": beta}), **options,
        )  # fmt: skip
        with torch.no_grad():
            targets = torch.zeros(len(hidden), dtype=torch.int64)
            _, entropies = linear_logprobs(hidden, weight, targets, ignore_index=None, entropy=True, **options)
        return values, entropies

    return apply


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of some vocabulary entries.

        log_softmax(logits / temperature) at index

    The result is float32 (float64 for float64 logits), where TRL returns the dtype of the logits: a sum of a few
    hundred bfloat16 log-probabilities is off by whole units.

    Args:
        logits: (..., V) floating.
        index: (...) int64, or (..., K) for K log-probabilities per position.
        temperature: What the logits are divided by.
        row_mask: Shaped like `index`. Entries where it is zero are zero, without gradient.

    Returns:
        Log-probabilities in nats, shaped like `index`.
    """
    if index.dim() == logits.dim() - 1:
        targets = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
        return selective_logprobs(logits, targets, temperature=temperature)
    # One pass over the vocabulary gives the log-probability of the largest logit, which is finite even where others are
    # -inf. The K log-probabilities differ from it by the differences of the logits.
    top = logits.argmax(-1, keepdim=True)
    anchor = selective_logprobs(logits, top.squeeze(-1), temperature=temperature).unsqueeze(-1)
    above = (logits.gather(-1, index).to(anchor.dtype) - logits.gather(-1, top).to(anchor.dtype)) / temperature
    logprobs = anchor + above
    return logprobs if row_mask is None else torch.where(row_mask == 0, 0.0, logprobs)
