"""Options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastalign.config.base import AlignmentConfig
from fastalign.options import help_field, one_of

SFTLoss = Literal["nll", "dft"]


@dataclass
class SFTConfig(AlignmentConfig):
    """Options of `SFTTrainer`: supervised fine-tuning on completions, assistant turns or plain text.

    The fields of `AlignmentConfig` are options too.

    Attributes:
        learning_rate: AdamW's initial learning rate. None: 2e-4 for an adapter, 1e-5 for all weights.
        loss_type: "nll", the mean negative log-likelihood, or "dft", which weighs each token's NLL by its probability,
            without gradient (arXiv:2508.05629).
        assistant_only_loss: Score the assistant's turns of messages alone; False: every token, as TRL by default.
        completion_only_loss: Score completions alone; False: prompts too.

    Raises:
        ConfigError: An option has a value out of its range.
    """

    learning_rate: float | None = help_field(
        None, "AdamW's initial learning rate. None: 2e-4 for an adapter, 1e-5 for all weights."
    )
    adapter_rate = 2e-4
    full_rate = 1e-5
    loss_type: SFTLoss = help_field(
        "nll", "nll: mean negative log-likelihood; dft: each token's NLL times its probability."
    )
    assistant_only_loss: bool = help_field(
        True, "Score the assistant's turns of messages alone; False: every token of them."
    )
    completion_only_loss: bool = help_field(True, "Score completions alone; False: prompts too.")

    def __post_init__(self):
        super().__post_init__()
        one_of("loss_type", self.loss_type, get_args(SFTLoss))
