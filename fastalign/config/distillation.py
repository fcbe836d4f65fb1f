"""Options of distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError
from fastalign.options import help_field


@dataclass
class DistillationConfig(SFTConfig):
    """Options of `DistillationTrainer`: `a NLL + (1 - a) tau^2 D(student, teacher)` on data or the student's own."""

    teacher: str | None = help_field(
        None, "The teacher: a model, `start`, or a .safetensors file of its log-probs.", path=True
    )
    weight: float = help_field(0.5, "a, the weight of the data's NLL; the teacher's is 1 - a.")
    temperature: float = help_field(1.0, "tau, of both distributions.")
    divergence: str = help_field("forward_kl", "D: forward_kl (teacher || student), reverse_kl, or jsd.")
    jsd_beta: float = help_field(0.5, "The teacher's share in jsd.")
    top_k: int | None = help_field(None, "Compute the teacher's k largest log-probs once, and keep them on disk.")
    cache_dir: str | None = help_field(None, "Where they are kept; None: ~/.cache/fastalign.", path=True)
    on_policy: float = help_field(0.0, "Share of steps on the student's own samples, from 0 to 1 (GKD's lambda).")
    sample_temperature: float = help_field(1.0, "Temperature of these samples.")
    sample_tokens: int = help_field(128, "Longest sample, in tokens.")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(f"on_policy is {self.on_policy}; it is a share of the steps, from 0 to 1")
        if self.on_policy and (self.top_k or str(self.teacher).endswith(".safetensors")):
            raise ConfigError("on_policy asks the teacher about new samples: give the teacher itself, without top_k")
        if self.sample_tokens < 1 or not 0 < self.sample_temperature < math.inf:
            raise ConfigError(
                f"sample_tokens is {self.sample_tokens} and sample_temperature {self.sample_temperature}; the first "
                "must be at least 1, the second above 0"
            )
