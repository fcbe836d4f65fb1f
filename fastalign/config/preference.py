"""Options of preference optimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from fastalign.config.base import AlignmentConfig
from fastalign.config.ranges import COUNT, NOT_NEGATIVE, SHARE, Range, check_ranges
from fastalign.errors import ConfigError, InputError
from fastalign.losses import (
    ALIASES,
    F_DIVERGENCES,
    PAIRWISE,
    UNPAIRED,
    FDivergence,
    canonical,
    options_of,
    pairwise_loss,
)
from fastalign.options import help_field, nearest, one_of

NllOver = Literal["completion", "prompt_and_completion"]
_RANGES = {
    "nll_weight": NOT_NEGATIVE,
    "desirable_weight": NOT_NEGATIVE,
    "undesirable_weight": NOT_NEGATIVE,
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": COUNT,
    "ld_alpha": SHARE,
    "f_alpha_divergence_coef": Range(-math.inf, math.inf),
}
_ONLY_WITH = {
    "kto or apo_zero_unpaired": ("desirable_weight", "undesirable_weight"),
    "f_divergence_type=alpha_divergence": ("f_alpha_divergence_coef",),
    "a loss over pairs": ("ld_alpha", "use_weighting", "f_divergence_type"),
    "sync_ref_model=True": ("ref_model_mixup_alpha", "ref_model_sync_steps"),
}


@dataclass
class PreferenceConfig(AlignmentConfig):
    """Options of `PreferenceTrainer`: one preference loss, or a weighted mixture, on pairs or on labelled rows.

    The options are these and those of `AlignmentConfig`. The page of each loss says what its options mean in its
    formula. An option that none of the chosen losses has is refused.

    Attributes:
        loss_type: One loss or several (a mixture, as in MPO): names of `fastalign.losses.PAIRWISE` or TRL's names for
            them, "sft" for an NLL term, or one name of `fastalign.losses.UNPAIRED` by itself. "sft" alone trains on the
            chosen completions, and looks at the rejected ones for the metrics only.
        loss_weights: One weight per loss of a mixture. None: 1 each.
        beta: Strength of the pull to the reference. None: the default of each loss, mostly 0.1.
        label_smoothing: Probability that a preference label is wrong (dpo, robust and others).
        alpha: Coefficient of the alpha divergence (dpo_alpha).
        tau: Target of the scaled margin (ipo_tau).
        discopop_tau: Temperature of the log-ratio modulation (discopop).
        gamma_beta_ratio: Target margin over beta (simpo).
        desirable_weight: Weight of desirable rows (kto, apo_zero_unpaired).
        undesirable_weight: Weight of undesirable rows (kto, apo_zero_unpaired).
        f_divergence_type: The divergence that holds the policy to its reference, for losses of the margin: "reverse_kl"
            (the usual one), "forward_kl", "js_divergence" or "alpha_divergence" (f-DPO, arXiv:2309.16240). See
            `fastalign.losses.divergence_scores`.
        f_alpha_divergence_coef: The coefficient of "alpha_divergence": 0 is the forward KL, 1 the reverse KL.
        ld_alpha: Weight of the tokens by which one completion of a pair is longer than the other, from 0 to 1 (LD-DPO,
            arXiv:2409.06411). It counts in the sums under the policy and the reference, not in the NLL. None: 1.
        use_weighting: Weigh the loss of each pair by how likely the policy is to write it (WPO, arXiv:2406.11827):
            `w(chosen) w(rejected)` with `w = exp(mean over tokens of (log p(y_t) - log sum_v p(v)^2))`, without
            gradient. It suits pairs that the policy did not write itself.
        nll_weight: Weight of the chosen completions' NLL in nats per token (RPO's alpha). None: the default of the
            losses, mostly 0.
        nll_over: Which tokens the NLL counts: "completion" or "prompt_and_completion".
        precompute_ref_log_probs: Compute the reference's log-probs once, before training, and store them on disk.
            False: score a copy of the reference at every step.
        ref_cache_dir: Folder of the stored log-probs. None: ~/.cache/fastalign.
        sync_ref_model: Move the reference towards the model while training (TR-DPO, arXiv:2404.09656).
        ref_model_mixup_alpha: Share of the model in each such move, 0 to 1.
        ref_model_sync_steps: Optimiser steps between two such moves.

    Raises:
        ConfigError: A loss is unknown, losses cannot be mixed, or an option is out of range or not one of the losses'.
    """

    loss_type: str | list[str] = help_field(
        ["dpo"], "One loss or several (a mixture, as in MPO): " + ", ".join([*PAIRWISE, *UNPAIRED]) + ", sft."
    )
    loss_weights: list[float] | None = help_field(None, "One weight per loss of a mixture; None: 1 each.")
    beta: float | None = help_field(None, "Strength of the pull to the reference; None: the loss's own, mostly 0.1.")
    label_smoothing: float | None = help_field(None, "Probability that a preference label is wrong (dpo, robust, ...).")
    alpha: float | None = help_field(None, "Coefficient of the alpha divergence (dpo_alpha).")
    tau: float | None = help_field(None, "Target of the scaled margin (ipo_tau).")
    discopop_tau: float | None = help_field(None, "Temperature of the log-ratio modulation (discopop).")
    gamma_beta_ratio: float | None = help_field(None, "Target margin over beta (simpo).")
    desirable_weight: float = help_field(1.0, "Weight of desirable rows (kto, apo_zero_unpaired).")
    undesirable_weight: float = help_field(1.0, "Weight of undesirable rows (kto, apo_zero_unpaired).")
    f_divergence_type: FDivergence = help_field(
        "reverse_kl",
        "Divergence from the reference, for losses of the margin: reverse_kl, forward_kl, js_divergence, "
        "alpha_divergence.",
    )
    f_alpha_divergence_coef: float = help_field(0.5, "Coefficient of alpha_divergence: 0 forward KL, 1 reverse KL.")
    ld_alpha: float | None = help_field(
        None, "Weight of the tokens by which a completion is longer than the other, 0 to 1 (LD-DPO). None: 1."
    )
    use_weighting: bool = help_field(False, "Weigh each pair by how likely the policy is to write it (WPO).")
    nll_weight: float | None = help_field(
        None, "Weight of the chosen completions' NLL per token (RPO's alpha); None: the loss's own, mostly 0."
    )
    nll_over: NllOver = help_field("completion", "Tokens that the NLL counts: completion, or prompt_and_completion.")
    precompute_ref_log_probs: bool = help_field(
        True, "Compute the reference log-probs once before training, and keep them on disk; False: at every step."
    )
    ref_cache_dir: str | None = help_field(
        None, "Folder of the stored reference log-probs; None: ~/.cache/fastalign.", path=True
    )
    sync_ref_model: bool = help_field(False, "Move the reference towards the model while training (TR-DPO).")
    ref_model_mixup_alpha: float = help_field(0.6, "Share of the model in each such move.")
    ref_model_sync_steps: int = help_field(512, "Optimiser steps between two such moves.")

    def __post_init__(self):
        super().__post_init__()
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = [1.0] * len(names) if self.loss_weights is None else [float(w) for w in self.loss_weights]
        if not names or len(weights) != len(names):
            raise ConfigError(f"loss_weights is {self.loss_weights} for loss_type {names}; give one weight per loss")
        self.loss_type, self.loss_weights = [_loss_name(name) for name in names], weights
        unpaired = [name for name in self.loss_type if name in UNPAIRED]
        if unpaired and len(names) > 1:
            raise ConfigError(f"loss_type is {names}; {unpaired[0]} takes labelled rows, not pairs, and stands alone")
        one_of("nll_over", self.nll_over, get_args(NllOver))
        one_of("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        check_ranges(self, _RANGES)
        if not all(map(math.isfinite, weights)) or min(weights) < 0 or not any(weights):
            raise ConfigError(f"loss_weights is {weights}; they must be finite and at least 0, and one above 0")
        self._check_loss_options()
        self._check_unused()
        self._check_variants()
        if self.sync_ref_model:
            self._check_sync()

    def _check_loss_options(self) -> None:
        """Call the losses once on made-up numbers: they refuse a bad option now, not at the first step."""
        names = self.loss_type
        if len(set(names)) < len(names):
            raise ConfigError(f"loss_type {names} names a loss twice; name it once, with the sum of the weights")
        taken = {option for name in names if name != "sft" for option in options_of(name)}
        if self.unpaired is None:
            taken.add("nll_weight")
        given = self._options_given(*PAIRWISE, *UNPAIRED) | {"nll_weight": self.nll_weight}
        for option, value in given.items():
            if value and option not in taken:
                raise ConfigError(f"{option} is {value}, but {' + '.join(names)} has no such option")
        if self.unpaired and self.nll_over != "completion":
            raise ConfigError(f"nll_over is {self.nll_over!r}, but {self.unpaired} has no NLL term")
        logp, one = torch.full((1,), -1.0), torch.ones(1)
        try:
            if self.unpaired:
                UNPAIRED[self.unpaired](logp, logp, one.bool(), 0.0, **self.unpaired_options)
            elif self.pairwise:
                pairwise_loss(
                    list(self.pairwise), list(self.pairwise.values()), logp, logp, logp, logp,
                    lengths_chosen=one, lengths_rejected=one, options=self.loss_options,
                )  # fmt: skip
        except InputError as error:
            raise ConfigError(str(error)) from None

    def _check_unused(self) -> None:
        """ConfigError for options that were set and that nothing would read."""
        used = {
            "kto or apo_zero_unpaired": bool(self.unpaired) and "weights" in options_of(str(self.unpaired)),
            "sync_ref_model=True": self.sync_ref_model,
            "f_divergence_type=alpha_divergence": self.f_divergence_type == "alpha_divergence",
            "a loss over pairs": self.unpaired is None,
        }
        for needed, names in _ONLY_WITH.items():
            for name in names:
                default = type(self).__dataclass_fields__[name].default
                if not used[needed] and getattr(self, name) != default:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)}, but only {needed} reads it: leave it out, or set that"
                    )

    def _check_variants(self) -> None:
        """ConfigError for variants of DPO that a chosen loss does not have."""
        if self.f_divergence_type != "reverse_kl":
            others = [name for name in self.pairwise if not PAIRWISE[name].of_margin]
            if others or not self.pairwise:
                known = ", ".join(name for name, row in PAIRWISE.items() if row.of_margin)
                raise ConfigError(
                    f"f_divergence_type is {self.f_divergence_type!r} with loss_type {others or self.loss_type}; other "
                    f"divergences than reverse_kl go with {known} and sft: leave it out, or take one of these"
                )
        sorting = [name for name in self.pairwise if name in ("aot", "aot_unpaired")]
        if self.use_weighting and sorting:
            raise ConfigError(
                f"use_weighting is True, but {sorting[0]} sorts the batch, and its losses are not those of single "
                "pairs: leave one of them out"
            )

    def _check_sync(self) -> None:
        if self.precompute_ref_log_probs:
            raise ConfigError("sync_ref_model moves the reference: set precompute_ref_log_probs=False with it")
        if not self.needs_reference:
            raise ConfigError(f"sync_ref_model is True, but {' + '.join(self.loss_type)} has no reference to move")
        if self.ref_model_sync_steps < 1 or not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ConfigError(
                f"ref_model_sync_steps is {self.ref_model_sync_steps} and ref_model_mixup_alpha "
                f"{self.ref_model_mixup_alpha}; the first must be at least 1, the second from 0 to 1"
            )

    def _options_given(self, *names: str) -> dict[str, Any]:
        """The options of the named losses that are fields of this class and were set.

        A new option of a loss is a keyword of its function and a field here: this method matches the two by name.
        """
        options = {option for name in names for option in options_of(name)}
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name in options}
        return {option: value for option, value in values.items() if value is not None}

    @property
    def mixture(self) -> dict[str, float]:
        """Weight of each loss by its name, `sft` (the NLL term) included."""
        return dict(zip(self.loss_type, self.loss_weights or [], strict=True))

    @property
    def pairwise(self) -> dict[str, float]:
        """Weight of each loss over pairs."""
        return {name: weight for name, weight in self.mixture.items() if name in PAIRWISE}

    @property
    def unpaired(self) -> str | None:
        """The name of the loss over labelled rows; None where the losses are over pairs."""
        return self.loss_type[0] if self.loss_type[0] in UNPAIRED else None

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares the policy with a reference."""
        return self.unpaired is not None or any(PAIRWISE[name].reference for name in self.pairwise)

    @property
    def nll_coefficient(self) -> float:
        """Weight of the NLL term: `nll_weight`, or what the losses have by default, plus the weight of `sft`."""
        own = max((PAIRWISE[name].nll_weight for name in self.pairwise), default=0.0)
        return self.mixture.get("sft", 0.0) + (own if self.nll_weight is None else self.nll_weight)

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options for losses over pairs that were set."""
        return self._options_given(*PAIRWISE)

    @property
    def unpaired_options(self) -> dict[str, Any]:
        """The options for the loss over labelled rows: those that were set, and the weights of both labels."""
        if self.unpaired is None:
            return {}
        weights = {"weights": (self.desirable_weight, self.undesirable_weight)}
        return self._options_given(self.unpaired) | (weights if "weights" in options_of(self.unpaired) else {})

    @property
    def reward_beta(self) -> float:
        """The beta of the rewards that are logged: the default of the first loss where `beta` is not set."""
        first = next((name for name in self.loss_type if name != "sft"), "dpo")
        return options_of(first)["beta"] if self.beta is None else self.beta


def _loss_name(name: str) -> str:
    """The name of a loss in the table, from that name or TRL's; ConfigError with the nearest name for any other."""
    if name in UNPAIRED or name == "sft":
        return name
    try:
        return canonical(name)
    except InputError:
        known = [*PAIRWISE, *UNPAIRED, "sft", *ALIASES]
        raise ConfigError(f"loss_type {name!r} is unknown; {nearest(name, known)}") from None
