"""The table of losses: from a name to a function, and to what its callers must know about it.

A new loss is a function in a file of this package and a row here. The trainer, the command line, mixtures and
`fused_linear_<name>` follow from the row; the options of the loss are the keyword defaults of the function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses import divergence, pointwise, preference, reference_free, transport, unpaired
from fastalign.options import nearest


@dataclass(frozen=True)
class PairLoss:
    """A row of the table of losses over pairs.

    Attributes:
        function: `f(chosen, rejected, ref_chosen, ref_rejected, *, beta=..., ...) -> (B,)`. Every loss has a `beta`.
        reference: Whether the function takes `ref_chosen` and `ref_rejected`.
        averaged: Whether the loss is given averages per token by default, instead of sums.
        of_margin: Whether the loss depends on the margin alone, so that other f-divergences apply to it.
        nll_weight: Weight of the NLL of the chosen completions that belongs to the loss.
        aliases: The names that TRL has for the loss.
    """

    function: Callable[..., Tensor]
    reference: bool = True
    averaged: bool = False
    of_margin: bool = False
    nll_weight: float = 0.0
    aliases: tuple[str, ...] = ()


# `reverse_kl`, `forward_kl`, `js_divergence` and `alpha_divergence` are values of TRL's `f_divergence_type`, as TRL
# applies them to `sigmoid`. All other aliases are values of TRL's `loss_type`. IPO is averaged as in TRL.
PAIRWISE: dict[str, PairLoss] = {
    "dpo": PairLoss(preference.dpo, of_margin=True, aliases=("sigmoid", "reverse_kl")),
    "dpo_norm": PairLoss(preference.dpo, averaged=True, of_margin=True, aliases=("sigmoid_norm",)),
    "dpo_alpha": PairLoss(divergence.dpo_alpha, aliases=("alpha_divergence",)),
    "dpo_forward_kl": PairLoss(divergence.dpo_forward_kl, aliases=("forward_kl",)),
    "dpo_js": PairLoss(divergence.dpo_js, aliases=("js_divergence",)),
    "ipo": PairLoss(preference.ipo, averaged=True, of_margin=True),
    "ipo_tau": PairLoss(preference.ipo_tau, averaged=True, of_margin=True),
    "hinge": PairLoss(preference.hinge, of_margin=True),
    "robust": PairLoss(preference.robust, of_margin=True),
    "exo": PairLoss(preference.exo, of_margin=True, aliases=("exo_pair",)),
    "nca": PairLoss(pointwise.nca, aliases=("nca_pair",)),
    "bco_pair": PairLoss(pointwise.bco_pair),
    "sppo": PairLoss(pointwise.sppo, aliases=("sppo_hard",)),
    "apo_zero": PairLoss(pointwise.apo_zero),
    "apo_down": PairLoss(pointwise.apo_down),
    "aot": PairLoss(transport.aot),
    "aot_unpaired": PairLoss(transport.aot_unpaired),
    "discopop": PairLoss(preference.discopop, of_margin=True),
    "simpo": PairLoss(reference_free.simpo, reference=False, averaged=True),
    "cpo": PairLoss(reference_free.cpo, reference=False, nll_weight=1.0),
    "orpo": PairLoss(reference_free.orpo, reference=False, averaged=True, nll_weight=1.0),
}
# Losses over single completions, `f(logprobs, ref_logprobs, labels, baseline, *, beta=..., ...) -> (B,)`.
UNPAIRED: dict[str, Callable[..., Tensor]] = {
    "kto": unpaired.kto,
    "apo_zero_unpaired": unpaired.apo_zero_unpaired,
    "bco": unpaired.bco,
}


# Three views of the table, for callers. The package itself reads the rows, so that a row that is added later counts.
REFERENCE_FREE = frozenset(name for name, row in PAIRWISE.items() if not row.reference)
LENGTH_NORMALISED = frozenset(name for name, row in PAIRWISE.items() if row.averaged)
ALIASES = {alias: name for name, row in PAIRWISE.items() for alias in row.aliases}


def canonical(loss_type: str) -> str:
    """The name in PAIRWISE of a loss over pairs.

    Args:
        loss_type: A name in PAIRWISE, or TRL's name for that loss.

    Returns:
        The name in PAIRWISE.

    Raises:
        InputError: There is no such loss; the nearest name is suggested.
    """
    if loss_type in PAIRWISE:
        return loss_type
    for name, row in PAIRWISE.items():
        if loss_type in row.aliases:
            return name
    if loss_type == "sft":
        raise InputError(
            "loss_type 'sft' is a mean over tokens, not a loss over pairs; leave it out here and add its weight times "
            "the NLL of the chosen completions to the result."
        )
    raise InputError(f"loss_type {loss_type!r} is unknown; {nearest(str(loss_type), [*PAIRWISE, *ALIASES])}")


def loss_function(name: str) -> Callable[..., Tensor]:
    """The function of a loss by its name in PAIRWISE or UNPAIRED."""
    return PAIRWISE[name].function if name in PAIRWISE else UNPAIRED[name]


def options_of(name: str) -> dict[str, Any]:
    """The options of a loss with their defaults, such as `{"beta": 0.1, "label_smoothing": 0.0}`.

    Args:
        name: A name in PAIRWISE or UNPAIRED.

    Returns:
        The keyword arguments of its function.
    """
    return dict(loss_function(name).__kwdefaults__ or {})
