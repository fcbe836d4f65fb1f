"""Options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from fastalign.config.base import AlignmentConfig
from fastalign.options import help_field


@dataclass
class SFTConfig(AlignmentConfig):
    """Options of `SFTTrainer`: supervised fine-tuning on completions, assistant turns or plain text.

    The fields of `AlignmentConfig` are options too.

    Attributes:
        learning_rate: AdamW's initial learning rate. None: 2e-4 for an adapter, 1e-5 for all weights.
    """

    learning_rate: float | None = help_field(
        None, "AdamW's initial learning rate. None: 2e-4 for an adapter, 1e-5 for all weights."
    )
    adapter_rate = 2e-4
    full_rate = 1e-5
