"""Options of preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastalign.config.base import AlignmentConfig
from fastalign.errors import ConfigError, InputError
from fastalign.losses import ALIASES, PAIRWISE, REFERENCE_FREE, UNPAIRED, canonical, pairwise_loss
from fastalign.options import help_field, nearest, one_of


@dataclass
class PreferenceConfig(AlignmentConfig):
    """Options of `PreferenceTrainer`: one preference loss, or a weighted mixture, on pairs or on labelled rows."""

    loss_type: str | list[str] = help_field(
        ["dpo"], "One loss or several (a mixture, as in MPO): " + ", ".join([*PAIRWISE, *UNPAIRED]) + ", sft."
    )
    loss_weights: list[float] | None = help_field(None, "One weight a loss of a mixture; None: 1 each.")
    beta: float | None = help_field(None, "Strength of the pull to the reference; None: the loss's own, mostly 0.1.")
    label_smoothing: float | None = help_field(None, "Probability that a preference label is wrong (dpo, robust, ...).")
    alpha: float | None = help_field(None, "Coefficient of the alpha divergence (dpo_alpha).")
    tau: float | None = help_field(None, "Target of the scaled margin (ipo_tau).")
    discopop_tau: float | None = help_field(None, "Temperature of the log-ratio modulation (discopop).")
    gamma_beta_ratio: float | None = help_field(None, "Target margin over beta (simpo).")
    desirable_weight: float = help_field(1.0, "Weight of desirable rows (kto).")
    undesirable_weight: float = help_field(1.0, "Weight of undesirable rows (kto).")
    nll_weight: float | None = help_field(
        None, "Weight of the chosen completions' NLL per token (RPO's alpha); None: 1 for orpo and cpo, else 0."
    )
    nll_over: str = help_field("completion", "Tokens of that NLL: completion, or prompt_and_completion.")
    precompute_ref_log_probs: bool = help_field(
        True, "Compute the reference log-probs once before training, and keep them on disk; False: at every step."
    )
    ref_cache_dir: str | None = help_field(None, "Where they are kept; None: ~/.cache/fastalign.", path=True)
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
        if self.loss_type == ["sft"]:
            raise ConfigError("loss_type is sft alone; use SFTTrainer, or `fastalign sft`")
        one_of("nll_over", self.nll_over, ("completion", "prompt_and_completion"))
        self._check_loss_options()
        if self.sync_ref_model:
            self._check_sync()

    def _check_loss_options(self) -> None:
        """The losses know which options they take, and in which range: ask them now, not at the first step."""
        names = self.loss_type
        if len(set(names)) < len(names):
            raise ConfigError(f"loss_type {names} names a loss twice; name it once, with the sum of the weights")
        taken = {key for name in names if name != "sft" for key in (PAIRWISE | UNPAIRED)[name].__kwdefaults__}
        if self.unpaired is None:
            taken.add("nll_weight")
        for key in ("label_smoothing", "alpha", "tau", "discopop_tau", "gamma_beta_ratio", "nll_weight"):
            if getattr(self, key) and key not in taken:
                raise ConfigError(f"{key} is {getattr(self, key)}, but {' + '.join(names)} has no such option")
        if self.unpaired and self.nll_over != "completion":
            raise ConfigError(f"nll_over is {self.nll_over!r}, but {self.unpaired} has no NLL term")
        logp, one = torch.full((1,), -1.0), torch.ones(1)
        try:
            if self.unpaired:
                UNPAIRED[self.unpaired](logp, logp, one.bool(), 0.0, **self.unpaired_options)
            else:
                pairwise_loss(
                    list(self.pairwise), list(self.pairwise.values()), logp, logp, logp, logp,
                    lengths_chosen=one, lengths_rejected=one, options=self.loss_options,
                )  # fmt: skip
        except InputError as error:
            raise ConfigError(str(error)) from None

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

    @property
    def pairwise(self) -> dict[str, float]:
        """Weight of each loss over pairs."""
        return {n: w for n, w in zip(self.loss_type, self.loss_weights, strict=True) if n in PAIRWISE}

    @property
    def unpaired(self) -> str | None:
        """The loss over labelled rows, if it is one."""
        return self.loss_type[0] if self.loss_type[0] in UNPAIRED else None

    @property
    def needs_reference(self) -> bool:
        return self.unpaired is not None or not REFERENCE_FREE.issuperset(self.pairwise)

    @property
    def nll_coefficient(self) -> float:
        """Weight of the NLL term, `sft` of a mixture included."""
        named = sum(w for n, w in zip(self.loss_type, self.loss_weights, strict=True) if n == "sft")
        if self.nll_weight is not None:
            return self.nll_weight + named
        return named + (1.0 if {"orpo", "cpo"} & set(self.loss_type) else 0.0)

    @property
    def loss_options(self) -> dict[str, float]:
        """What the losses over pairs are called with: the options that were set."""
        names = ("beta", "label_smoothing", "alpha", "tau", "discopop_tau", "gamma_beta_ratio")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def unpaired_options(self) -> dict[str, Any]:
        """What the loss over labelled rows is called with."""
        beta = {} if self.beta is None else {"beta": self.beta}
        weights = {"weights": (self.desirable_weight, self.undesirable_weight)} if self.unpaired == "kto" else {}
        return beta | weights

    @property
    def reward_beta(self) -> float:
        """Beta of the implicit rewards that are logged: the first loss's own where none is set."""
        first = next(name for name in self.loss_type if name != "sft")
        return (PAIRWISE | UNPAIRED)[first].__kwdefaults__["beta"] if self.beta is None else self.beta


def _loss_name(name: str) -> str:
    if name in UNPAIRED or name == "sft":
        return name
    try:
        return canonical(name)
    except InputError:
        known = [*PAIRWISE, *UNPAIRED, "sft", *ALIASES]
        raise ConfigError(f"loss_type {name!r} is unknown; {nearest(name, known)}") from None
