"""Distillation from a teacher: generalised Jensen-Shannon divergence, and cosine similarity of the logits.

Inputs have one row per token: `student_input` (N, H), `teacher_input` (N, G), `true_labels` (N,). Rows whose label is
`ignore_index` count in neither term, and both terms are means over the others:

    loss = weight_hard_loss * NLL + weight_soft_loss * distance(student, teacher)

The temperature divides the logits of the distance, not those of the NLL. As in Liger there is no factor temperature^2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastalign.errors import ConfigError, InputError
from fastalign.fused import have_target
from fastalign.ops import linear_divergence, linear_logprobs

DistillationResult = Tensor | tuple[Tensor, Tensor, Tensor]
Layer = tuple[Tensor, Tensor, Tensor | None]  # (N, H) hidden states, (V, H) weight, (V,) bias

# Logits that the cosine holds at a time, per side.
_TILE = 1 << 24


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature!r}; expected a number above 0: 1 leaves the logits as they are")


def _like_teacher(student: Layer, teacher: Layer) -> Layer:
    """The student with the teacher's vocabulary.

    Where the teacher's is larger (padded), Liger gives the student logits of 0 there, and they count in its softmax.
    """
    hidden, weight, bias = student
    missing = teacher[1].shape[0] - weight.shape[0]
    if missing < 0:
        raise InputError(
            f"the student's vocabulary has {weight.shape[0]} entries and the teacher's {teacher[1].shape[0]}; the "
            "teacher's must be at least as large: cut the student's output layer, or call "
            "fastalign.ops.linear_divergence, which compares the entries that both have"
        )
    if missing == 0:
        return student
    weight = nn.functional.pad(weight, (0, 0, 0, missing))
    return hidden, weight, None if bias is None else nn.functional.pad(bias, (0, missing))


def _distil(
    distance: Callable[[Layer, Layer, Tensor], Tensor],
    student: Layer,
    teacher: Layer,
    labels: Tensor,
    ignore_index: int,
    weights: tuple[float, float],
    both: bool,
) -> DistillationResult:
    """The mixture of the NLL with a distance, which is given both sides and the mask of rows that count."""
    scored = have_target(labels, ignore_index)
    count = scored.sum().clamp(min=1)
    hard_weight, soft_weight = weights
    soft = distance(_like_teacher(student, teacher), teacher, scored).sum() / count
    hard = torch.zeros_like(soft)
    if hard_weight or both:
        hidden, weight, bias = student
        hard = -linear_logprobs(hidden, weight, labels, bias=bias, ignore_index=ignore_index).sum() / count
    loss = hard_weight * hard + soft_weight * soft
    return (loss, soft.detach(), hard.detach()) if both else loss


def liger_fused_linear_jsd(
    student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, true_labels: Tensor,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5, beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0,
    compiled: bool = True, chunk_size: int = 1024, return_soft_hard_loss: bool = False,
) -> DistillationResult:  # fmt: skip
    """Distillation by the Jensen-Shannon divergence as a function: see `LigerFusedLinearJSDLoss`.

    The arguments, in Liger's order:
        student_input, student_weight, teacher_input, teacher_weight, true_labels: As in the module's `forward`.
        student_bias, teacher_bias: As in the module's `forward`.
        weight_hard_loss, weight_soft_loss, beta, ignore_index, temperature, compiled, chunk_size: As in the module.
        return_soft_hard_loss: As in the module.
    """
    _check_temperature(temperature)

    def distance(student: Layer, teacher: Layer, scored: Tensor) -> Tensor:
        # A frozen student needs no token weights. With them, a trainable output layer costs one pass less.
        return linear_divergence(
            *student[:2], *teacher[:2], bias=student[2], teacher_bias=teacher[2], token_weights=scored.float(),
            divergence="forward_kl" if beta == 0 else "reverse_kl" if beta == 1 else "jsd",
            temperature=temperature, jsd_beta=0.5 if beta in (0, 1) else beta,
        )  # fmt: skip

    student, teacher = (student_input, student_weight, student_bias), (teacher_input, teacher_weight, teacher_bias)
    weights = weight_hard_loss, weight_soft_loss
    return _distil(distance, student, teacher, true_labels, ignore_index, weights, return_soft_hard_loss)


def _one_minus_cosine(hidden: Tensor, weight: Tensor, bias: Tensor | None, other: Layer) -> Tensor:
    """(n,) 1 - cosine of two rows of logits."""

    def logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return nn.functional.linear(h, w, b).to(torch.promote_types(h.dtype, torch.float32))

    with torch.no_grad():
        fixed = logits(*other)
    return 1 - nn.functional.cosine_similarity(logits(hidden, weight, bias), fixed, dim=-1)


def liger_fused_linear_cosine(
    student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, true_labels: Tensor,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5, beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0,
    compiled: bool = True, chunk_size: int = 1024, return_soft_hard_loss: bool = False,
) -> DistillationResult:  # fmt: skip
    """Distillation by cosine similarity as a function: see `LigerFusedLinearCosineSimilarityLoss`.

    The arguments, in Liger's order:
        student_input, student_weight, teacher_input, teacher_weight, true_labels: As in the module's `forward`.
        student_bias, teacher_bias: As in the module's `forward`.
        weight_hard_loss, weight_soft_loss, beta, ignore_index, temperature, compiled, chunk_size: As in the module.
        return_soft_hard_loss: As in the module.
    """
    _check_temperature(temperature)

    def distance(student: Layer, teacher: Layer, scored: Tensor) -> Tensor:
        hidden, weight, bias = student
        rows = max(1, _TILE // weight.shape[0])
        hidden, teacher_hidden = hidden[scored], teacher[0][scored]
        # Each tile's logits are computed again in the backward pass, so that one tile is held at a time.
        tiles = [
            checkpoint(_one_minus_cosine, h, weight, bias, (t, *teacher[1:]), use_reentrant=False)
            for h, t in zip(hidden.split(rows), teacher_hidden.split(rows), strict=True)
        ]
        return beta * torch.cat(tiles)

    student, teacher = (student_input, student_weight, student_bias), (teacher_input, teacher_weight, teacher_bias)
    weights = weight_hard_loss, weight_soft_loss
    return _distil(distance, student, teacher, true_labels, ignore_index, weights, return_soft_hard_loss)


class LigerFusedLinearJSDLoss(nn.Module):
    """Distillation by the generalised Jensen-Shannon divergence of student s and teacher t.

        distance = beta KL(t || m) + (1 - beta) KL(s || m)  with  m = beta t + (1 - beta) s

    Args:
        weight_hard_loss: Weight of the NLL of the labels.
        weight_soft_loss: Weight of the divergence.
        beta: The teacher's share in m. 0: KL(t || s); 1: KL(s || t).
        ignore_index: The label of rows that do not count.
        temperature: Divides the logits of the divergence; above 0.
        compiled: No effect.
        chunk_size: No effect.
        return_soft_hard_loss: Whether to return `(loss, divergence, NLL)` instead of the loss.

    Raises:
        ConfigError: `temperature` is not above 0.
    """

    def __init__(
        self, weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, beta: float = 0.5,
        ignore_index: int = -100, temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):  # fmt: skip
        super().__init__()
        _check_temperature(temperature)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    _function = staticmethod(liger_fused_linear_jsd)

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
        true_labels: Tensor, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    ) -> DistillationResult:  # fmt: skip
        """The loss, or `(loss, distance, NLL)`.

        Args:
            student_input: (N, H) hidden states of the student.
            student_weight: (V, H) its output layer.
            teacher_input: (N, G) hidden states of the teacher.
            teacher_weight: (U, G) its output layer, U at least V. The student's logits of the entries that only the
                teacher has are 0, as in Liger.
            true_labels: (N,) int64, the tokens that the hidden states predict.
            student_bias: (V,) bias of the student's output layer.
            teacher_bias: (U,) bias of the teacher's.

        Raises:
            InputError: Shapes or dtypes do not fit, or the student's vocabulary is the larger one.
        """
        return self._function(
            student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias,
            weight_hard_loss=self.weight_hard_loss, weight_soft_loss=self.weight_soft_loss, beta=self.beta,
            ignore_index=self.ignore_index, temperature=self.temperature,
            return_soft_hard_loss=self.return_soft_hard_loss,
        )  # fmt: skip


class LigerFusedLinearCosineSimilarityLoss(LigerFusedLinearJSDLoss):
    """Distillation by the cosine between the logits of student and teacher.

        distance = beta (1 - cosine(student's logits, teacher's logits))

    The arguments are those of `LigerFusedLinearJSDLoss`. `beta` is a factor here, and the temperature has no effect:
    a cosine does not depend on the length of its vectors.
    """

    _function = staticmethod(liger_fused_linear_cosine)


class LigerFusedLinearJSDFunction:
    """`apply` is `liger_fused_linear_jsd`."""

    apply = staticmethod(liger_fused_linear_jsd)


class LigerFusedLinearCosineSimilarityFunction:
    """`apply` is `liger_fused_linear_cosine`."""

    apply = staticmethod(liger_fused_linear_cosine)
