"""Options of online training: methods that learn from rewards of the model's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fastalign.config.base import AlignmentConfig
from fastalign.config.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range, check_ranges
from fastalign.errors import ConfigError
from fastalign.losses.advantages import Scale
from fastalign.losses.policy import Reduction
from fastalign.options import help_field, one_of

Weight = Literal["token", "sequence", "sum"]


class PolicyLoss(NamedTuple):
    """A method: its loss per token, how losses are averaged, and its defaults.

    Attributes:
        surrogate: "clip" (PPO), "cispo" or "sapo"; see `fastalign.losses.policy`.
        weight: Importance weights per token, per completion as a mean over its tokens ("sequence"), or as their sum.
        reduction: How losses of tokens become one.
        epsilon: Lower bound of clipping where none is given.
        epsilon_high: Upper bound likewise.
        scale: What advantages are divided by where nothing is given.
        leave_one_out: Whether the baseline is the mean of the other answers.
    """

    surrogate: Literal["clip", "cispo", "sapo"]
    weight: Weight
    reduction: Reduction
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    scale: Scale = "group"
    leave_one_out: bool = False


POLICY: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss("clip", "token", "sequence_mean"),
    "dapo": PolicyLoss("clip", "token", "token_mean", epsilon_high=0.28),
    "bnpo": PolicyLoss("clip", "token", "token_mean"),
    "dr_grpo": PolicyLoss("clip", "token", "fixed_length", scale="none"),
    "gspo": PolicyLoss("clip", "sequence", "sequence_mean", epsilon=3e-4, epsilon_high=4e-4),
    "luspo": PolicyLoss("clip", "sequence", "length_weighted", epsilon=2e-3, epsilon_high=2.5e-3),
    "cispo": PolicyLoss("cispo", "token", "token_mean", epsilon_high=5.0),
    "sapo": PolicyLoss("sapo", "token", "sequence_mean"),
    "rloo": PolicyLoss("clip", "sum", "sequence_mean", scale="none", leave_one_out=True),
}

_RANGES = {
    "num_generations": COUNT,
    "max_completion_length": COUNT,
    "temperature": POSITIVE,
    "beta": NOT_NEGATIVE,
    "kl_target": POSITIVE,
    "num_iterations": COUNT,
    "epsilon": Range(0, 1, above=True, below=True),
    "epsilon_high": POSITIVE,
    "delta": Range(1, above=True),
    "importance_sampling_cap": POSITIVE,
}
# Options that only some losses read.
_READ_BY = {"epsilon": ("clip",), "epsilon_high": ("clip", "cispo"), "delta": ("clip",)}


@dataclass
class OnlineConfig(AlignmentConfig):
    """Options of `OnlineTrainer`: GRPO and its relatives, and RLOO. Names are TRL's where the meaning is the same.

    The fields of `AlignmentConfig` are options too. A row is a prompt: `per_device_train_batch_size` prompts, each with
    `num_generations` answers, are one micro-batch. `max_length` is the most tokens of a prompt with an answer.

    Attributes:
        loss_type: The method: grpo, dapo, bnpo, dr_grpo, gspo, luspo, cispo, sapo or rloo. Losses are always averaged
            over the whole step, so bnpo is dapo with another default of epsilon_high.
        learning_rate: AdamW's initial learning rate. None: 1e-4 for an adapter, 1e-6 for all weights.
        reward_funcs: One reward function or several: `module:function`, `path:function` of a Python file, or the folder
            of a reward model.
        reward_weights: One weight per reward; None: 1 each.
        num_generations: Answers to each prompt, 2 or more.
        max_completion_length: The most tokens of an answer.
        temperature: Of the draws, and of the log-probs that are trained.
        num_iterations: Optimiser steps on the same answers. With n of them, one row of n is used per epoch.
        scale_rewards: What advantages are divided by: the standard deviation of the "group" or of the "batch", or
            "none". None: the method's own, which is group, and none for dr_grpo and rloo.
        epsilon: How far importance weights count below 1. None: the method's own.
        epsilon_high: How far they count above 1; for cispo the bound of the weight itself. None: the method's own.
        delta: Bound of the weight where the advantage is negative. None: no bound.
        beta: Weight of the exact KL divergence to the start, a mean over tokens. 0: without it.
        kl_target: Nats per answer that the divergence is steered to: beta grows by a half where it is above 1.5 times
            the target, and is halved where it is below half of it. None: beta stays.
        importance_sampling_cap: Answers are weighted by the ratio of the trainer's to the sampler's probability of each
            token, up to this. None: not weighted.
        mask_truncated_completions: Leave answers that did not end out of the loss.

    Raises:
        ConfigError: An option has a value out of its range, or two options exclude each other.
    """

    loss_type: str = help_field("grpo", "The method: " + ", ".join(POLICY) + ".")
    reward_funcs: str | list[str] | None = help_field(
        None, "One reward or several: module:function, path:function of a Python file, or the folder of a reward model."
    )
    reward_weights: list[float] | None = help_field(None, "One weight per reward. None: 1 each.")
    num_generations: int = help_field(8, "Answers to each prompt.")
    max_completion_length: int = help_field(256, "The most tokens of an answer.")
    temperature: float = help_field(1.0, "Temperature of the draws, and of the log-probs that are trained.")
    num_iterations: int = help_field(1, "Optimiser steps on the same answers; one row of so many is used per epoch.")
    scale_rewards: str | None = help_field(
        None, "Advantages are divided by the deviation of the group, of the batch, or none. None: the method's own."
    )
    epsilon: float | None = help_field(None, "How far importance weights count below 1. None: the method's own.")
    epsilon_high: float | None = help_field(
        None, "How far they count above 1; for cispo the bound itself. None: the method's own."
    )
    delta: float | None = help_field(None, "Bound of the weight where the advantage is negative. None: no bound.")
    beta: float = help_field(0.0, "Weight of the exact KL divergence to the start, a mean over tokens; 0: none.")
    kl_target: float | None = help_field(
        None, "Nats per answer that the divergence is steered to, by changing beta. None: beta stays."
    )
    importance_sampling_cap: float | None = help_field(
        2.0, "Largest weight for the difference between sampler and trainer. None: not weighted."
    )
    mask_truncated_completions: bool = help_field(False, "Leave answers that did not end out of the loss.")

    def __post_init__(self):
        super().__post_init__()
        one_of("loss_type", self.loss_type, POLICY)
        check_ranges(self, _RANGES)
        if self.num_generations < 2:
            raise ConfigError(
                f"num_generations is {self.num_generations}; the baseline is the mean of the answers to a prompt, so "
                "set 2 or more"
            )
        if self.scale_rewards is not None:
            one_of("scale_rewards", self.scale_rewards, get_args(Scale))
        if self.policy.leave_one_out and self.scale_rewards not in (None, "none"):
            raise ConfigError(f"scale_rewards is {self.scale_rewards!r}; rloo does not scale advantages: leave it out")
        for name, kinds in _READ_BY.items():
            if getattr(self, name) is not None and self.policy.surrogate not in kinds:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, which {self.loss_type} does not read: leave it out"
                )
        if self.kl_target is not None and not self.beta:
            raise ConfigError(
                f"kl_target is {self.kl_target}, and beta 0, which cannot grow: set beta, for example 0.05"
            )
        if self.neftune_noise_alpha is not None:
            raise ConfigError("neftune_noise_alpha would make log-probs differ from those that drew: leave it out")
        if self.max_length is not None and self.max_completion_length >= self.max_length:
            raise ConfigError(
                f"max_completion_length is {self.max_completion_length}, which leaves no room for a prompt in "
                f"max_length={self.max_length}: raise max_length"
            )

    @property
    def policy(self) -> PolicyLoss:
        """The method's row, with the options that are given in the place of its defaults."""
        row = POLICY[self.loss_type]
        given: dict[str, Any] = {
            "epsilon": self.epsilon, "epsilon_high": self.epsilon_high, "scale": self.scale_rewards
        }  # fmt: skip
        return row._replace(**{name: value for name, value in given.items() if value is not None})

    @property
    def forward_options(self) -> dict[str, Any]:
        """What the forward pass of training takes further: log-probs at the temperature of the draws, and entropies."""
        return {"temperature": self.temperature, "entropy": True}
