"""One loss over pairs by name, or a weighted mixture of several."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.table import PAIRWISE, canonical, options_of
from fastalign.options import nearest


def pairwise_loss(
    loss_types: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    lengths_chosen: Tensor | None = None,
    lengths_rejected: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    length_normalised: Collection[str] | None = None,
) -> Tensor:
    """One loss over pairs, or a weighted mixture of several, as in MPO.

        L = sum_k loss_weights[k] * loss_types[k](chosen, rejected, ref_chosen, ref_rejected)

    An NLL term (RPO's alpha, MPO's `sft`, the second term of CPO and ORPO) is not part of it: that is a mean over the
    tokens of the whole accumulated batch, and the caller adds it.

    Args:
        loss_types: A name in PAIRWISE, TRL's name for one, or several of these.
        loss_weights: One finite weight per loss; None: 1 each.
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference; None where no loss needs a reference.
        ref_rejected: (B,) `rejected` under the reference; None where no loss needs a reference.
        lengths_chosen: (B,) numbers of tokens in the sums of `chosen`; None where no loss takes averages.
        lengths_rejected: (B,) the same for `rejected`.
        options: Options of the losses, such as beta and label_smoothing. Each loss takes those that it has, and its
            defaults for the rest.
        length_normalised: Names of the losses that are given averages per token, `sums / lengths`, instead of sums.
            None: those in LENGTH_NORMALISED. `LENGTH_NORMALISED - {"ipo"}` gives IPO as its paper writes it.

    Returns:
        (B,) the weighted losses, in the dtype of `chosen`.

    Raises:
        InputError: A loss or an option is unknown, the weights do not match the losses, a reference or a length is
            missing, or a loss refuses its arguments.

    References:
        MPO: Wang et al. 2024, arXiv:2411.10442.
    """
    names = [canonical(name) for name in ([loss_types] if isinstance(loss_types, str) else loss_types)]
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    options = options or {}
    _check_mixture(names, weights, options)
    if length_normalised is None:
        averaged = {name for name in names if PAIRWISE[name].averaged}
    else:
        averaged = {canonical(name) for name in length_normalised}.intersection(names)
    sums = [chosen, rejected]
    if ref_chosen is not None and ref_rejected is not None:
        sums += [ref_chosen, ref_rejected]
    elif needing := [name for name in names if PAIRWISE[name].reference]:
        raise InputError(
            f"ref_chosen or ref_rejected is None and {needing[0]!r} needs both: pass the reference's sums."
        )
    averages = _averages(sums, lengths_chosen, lengths_rejected, min(averaged)) if averaged else sums
    terms = []
    for name, weight in zip(names, weights, strict=True):
        row = PAIRWISE[name]
        logprobs = averages if name in averaged else sums
        taken = {key: options[key] for key in options_of(name) if key in options}
        terms.append(weight * row.function(*(logprobs if row.reference else logprobs[:2]), **taken))
    return sum(terms[1:], start=terms[0])


def _averages(
    sums: list[Tensor], lengths_chosen: Tensor | None, lengths_rejected: Tensor | None, needing: str
) -> list[Tensor]:
    """Per-token averages of chosen and rejected sums in turn; `needing` is the loss that an error names."""
    lengths = []
    for name, length in (("lengths_chosen", lengths_chosen), ("lengths_rejected", lengths_rejected)):
        if length is None or length.shape != sums[0].shape:
            found = "None" if length is None else f"a {tuple(length.shape)} tensor"
            raise InputError(
                f"{name} is {found}; {needing!r} needs averages per token: pass the number of scored tokens of each "
                f"completion, shape {tuple(sums[0].shape)}."
            )
        # A completion without a scored token has the sum 0. Its average is then 0 as well, not nan.
        lengths.append(length.clamp(min=1))
    return [total / lengths[i % 2] for i, total in enumerate(sums)]


def _check_mixture(names: list[str], weights: list[float], options: Mapping[str, Any]) -> None:
    if not names:
        raise InputError("loss_types is empty; name at least one loss.")
    if len(weights) != len(names) or not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"loss_weights is {weights} for loss_types {names}; expected one finite weight per loss.")
    known = sorted({key for name in PAIRWISE for key in options_of(name)})
    for key in options:
        if key not in known:
            raise InputError(f"option {key!r} is taken by no loss; {nearest(key, known)}")
