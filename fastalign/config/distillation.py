"""Options of distillation."""

from __future__ import annotations

from dataclasses import dataclass

from fastalign.config.ranges import COUNT, POSITIVE, SHARE_BELOW_1, Range, check_ranges
from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError
from fastalign.options import help_field, one_of
from fastalign.reference import DIVERGENCES, Divergence

_RANGES = {
    "weight": SHARE_BELOW_1,
    "temperature": POSITIVE,
    "jsd_beta": Range(0, 1, above=True, below=True),
    "top_k": COUNT,
    "sample_temperature": POSITIVE,
    "sample_tokens": COUNT,
}


@dataclass
class DistillationConfig(SFTConfig):
    """Options of `DistillationTrainer`: `weight * NLL + (1 - weight) * temperature^2 * D(student, teacher)`.

    The fields of `SFTConfig` and `AlignmentConfig` are options too.

    Attributes:
        teacher: The teacher: a model that `load_model` takes, "start" for the weights that training starts from, or a
            .safetensors file of top-k log-probs.
        weight: The weight of the NLL of the data, from 0 to below 1. The teacher's term has the weight `1 - weight`.
        temperature: The temperature of both distributions.
        divergence: D: "forward_kl" is KL(teacher || student), "reverse_kl" is KL(student || teacher), and "jsd" is the
            generalised Jensen-Shannon divergence.
        jsd_beta: The share of the teacher in the mixture of "jsd".
        top_k: Compute the k largest log-probs of the teacher once for every training token and store them on disk.
            None: run the teacher at every step.
        cache_dir: The folder where they are stored. None: ~/.cache/fastalign.
        on_policy: The share of steps that train on samples of the student itself, from 0 to 1 (lambda of GKD,
            arXiv:2306.13649).
        sample_temperature: The temperature of these samples.
        sample_tokens: The most tokens of a sample.

    Raises:
        ConfigError: An option has a value out of its range, or two options exclude each other.
    """

    method = "distill"

    teacher: str | None = help_field(
        None,
        "The teacher: a model, `start` (the weights before training), or a .safetensors file of its log-probs.",
        path=True,
    )
    weight: float = help_field(0.5, "Weight of the data's NLL. The teacher's term has the weight 1 - weight.")
    temperature: float = help_field(1.0, "Temperature of the student's and the teacher's distribution.")
    divergence: Divergence = help_field(
        "forward_kl", "Divergence from the teacher: forward_kl (teacher || student), reverse_kl, or jsd."
    )
    jsd_beta: float = help_field(0.5, "Share of the teacher in jsd.")
    top_k: int | None = help_field(
        None, "Store the teacher's k largest log-probs per token once, before training. None: run it at every step."
    )
    cache_dir: str | None = help_field(None, "Folder of the stored log-probs. None: ~/.cache/fastalign.", path=True)
    on_policy: float = help_field(0.0, "Share of steps on the student's own samples, from 0 to 1 (lambda of GKD).")
    sample_temperature: float = help_field(1.0, "Temperature of the student's samples.")
    sample_tokens: int = help_field(128, "The most tokens of a sample.")

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, _RANGES)
        one_of("divergence", self.divergence, DIVERGENCES)
        if self.loss_type != "nll":
            raise ConfigError(f"loss_type is {self.loss_type!r}, but distillation adds to the NLL: leave it out")
        if self.on_policy and not (self.completion_only_loss and self.assistant_only_loss):
            raise ConfigError(
                "completion_only_loss or assistant_only_loss is False, but on_policy samples the completions: leave "
                "both out"
            )
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(f"on_policy is {self.on_policy}; it is a share of the steps: set a number from 0 to 1")
        if self.on_policy and (self.top_k or str(self.teacher).endswith(".safetensors")):
            raise ConfigError(
                f"on_policy is {self.on_policy}, and new samples have no stored log-probs: give the teacher itself, "
                "without top_k"
            )
