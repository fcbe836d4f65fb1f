"""Losses as pure functions of per-sequence log-probabilities, and the one list of their names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.divergence import dpo_alpha, dpo_forward_kl, dpo_js
from fastalign.losses.preference import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    cpo,
    discopop,
    dpo,
    exo,
    hinge,
    implicit_rewards,
    ipo,
    ipo_tau,
    log1mexp,
    nca,
    orpo,
    robust,
    simpo,
    sppo,
)
from fastalign.losses.unpaired import bco, kto, kto_baseline

# The one place where names map to losses over pairs. A new loss is a line here and a function with its test.
PAIRWISE: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "dpo_norm": dpo,
    "dpo_alpha": dpo_alpha,
    "dpo_forward_kl": dpo_forward_kl,
    "dpo_js": dpo_js,
    "ipo": ipo,
    "ipo_tau": ipo_tau,
    "hinge": hinge,
    "robust": robust,
    "exo": exo,
    "nca": nca,
    "bco_pair": bco_pair,
    "sppo": sppo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "discopop": discopop,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
}
# Called as f(chosen, rejected): no reference log-probabilities.
REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo"})
# Given averages per token where `pairwise_loss` is not told otherwise; all others are given sums.
LENGTH_NORMALISED = frozenset({"dpo_norm", "ipo", "ipo_tau", "simpo", "orpo"})
# TRL's loss types, and its f_divergence_type as applied to `sigmoid`, where ours are named otherwise.
ALIASES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "sppo_hard": "sppo",
    "reverse_kl": "dpo",
    "forward_kl": "dpo_forward_kl",
    "js_divergence": "dpo_js",
    "alpha_divergence": "dpo_alpha",
}
# Called as f(logprobs, ref_logprobs, labels, baseline).
UNPAIRED: dict[str, Callable[..., Tensor]] = {"kto": kto, "bco": bco}


def canonical(loss_type: str) -> str:
    """The name in PAIRWISE of a loss type given by that name or by TRL's; InputError for any other."""
    name = ALIASES.get(loss_type, loss_type)
    if name in PAIRWISE:
        return name
    if name == "sft":
        raise InputError(
            "loss_type 'sft' is a mean over tokens, not a loss over pairs; leave it out here and add its weight times "
            "the NLL of the chosen completions to the result."
        )
    known = [*PAIRWISE, *ALIASES]
    nearest = difflib.get_close_matches(str(loss_type), known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose from {', '.join(known)}."
    raise InputError(f"loss_type {loss_type!r} is unknown; {hint}")


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
    options: Mapping[str, float] | None = None,
    length_normalised: Collection[str] = LENGTH_NORMALISED,
) -> Tensor:
    """sum_k loss_weights[k] * loss_types[k](pairs): one loss or a weighted mixture of several, as in MPO (Wang et al.
    2024, arXiv:2411.10442). Weights of None mean 1 each.

    The log-probabilities are (B,) sums over each completion's tokens; `lengths_chosen` and `lengths_rejected` are the
    (B,) numbers of these tokens. Losses named in `length_normalised` get sums divided by lengths instead: by default
    those defined on averages, and both forms of IPO, as in TRL; `LENGTH_NORMALISED - {"ipo"}` gives the paper's.
    References may be None where every loss is in REFERENCE_FREE, lengths where no loss is averaged.

    `options` hold for all losses alike: each takes those it has (beta, label_smoothing, tau, ...) and keeps its
    defaults for the rest. An NLL term (RPO's alpha, MPO's `sft`, CPO's and ORPO's second term) is a mean over tokens
    of the whole accumulated batch and is the caller's to add.

    Returns the (B,) weighted losses, in the dtype given. Raises InputError for unknown names or options, weights that
    do not match the losses, missing references or lengths, and whatever the losses themselves refuse.
    """
    names = [canonical(name) for name in ([loss_types] if isinstance(loss_types, str) else loss_types)]
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    options = options or {}
    averaged = {canonical(name) for name in length_normalised}.intersection(names)
    _check_mixture(names, weights, options)
    if not REFERENCE_FREE.issuperset(names) and (ref_chosen is None or ref_rejected is None):
        needing = next(name for name in names if name not in REFERENCE_FREE)
        raise InputError(f"ref_chosen or ref_rejected is None and {needing!r} needs both: pass the reference's sums.")
    if averaged:
        _check_lengths(min(averaged), chosen, lengths_chosen=lengths_chosen, lengths_rejected=lengths_rejected)
        # A completion with no scored token has the sum 0; so is its average then, not nan.
        lengths = (lengths_chosen.clamp(min=1), lengths_rejected.clamp(min=1)) * 2
    total: Tensor | float = 0.0
    for name, weight in zip(names, weights, strict=True):
        loss = PAIRWISE[name]
        logprobs = (chosen, rejected) if name in REFERENCE_FREE else (chosen, rejected, ref_chosen, ref_rejected)
        if name in averaged:
            logprobs = [logprob / length for logprob, length in zip(logprobs, lengths, strict=False)]
        total = total + weight * loss(*logprobs, **{key: options[key] for key in loss.__kwdefaults__ if key in options})
    return total


def _check_lengths(needing: str, chosen: Tensor, **lengths: Tensor | None) -> None:
    for name, length in lengths.items():
        if length is None or length.shape != chosen.shape:
            found = "None" if length is None else f"a {tuple(length.shape)} tensor"
            raise InputError(
                f"{name} is {found}; {needing!r} needs averages per token: pass the number of scored tokens of each "
                f"completion, shape {tuple(chosen.shape)}."
            )


def _check_mixture(names: list[str], weights: list[float], options: Mapping[str, float]) -> None:
    if not names:
        raise InputError("loss_types is empty; name at least one loss.")
    if len(weights) != len(names) or not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"loss_weights is {weights} for loss_types {names}; expected one finite weight per loss.")
    known = sorted({key for loss in PAIRWISE.values() for key in loss.__kwdefaults__})
    for key in options:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose from {', '.join(known)}."
            raise InputError(f"option {key!r} is taken by no loss; {hint}")


__all__ = [
    "ALIASES",
    "LENGTH_NORMALISED",
    "PAIRWISE",
    "REFERENCE_FREE",
    "UNPAIRED",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco",
    "bco_pair",
    "canonical",
    "cpo",
    "discopop",
    "dpo",
    "dpo_alpha",
    "dpo_forward_kl",
    "dpo_js",
    "exo",
    "hinge",
    "implicit_rewards",
    "ipo",
    "ipo_tau",
    "kto",
    "kto_baseline",
    "log1mexp",
    "nca",
    "orpo",
    "pairwise_loss",
    "robust",
    "simpo",
    "sppo",
]
