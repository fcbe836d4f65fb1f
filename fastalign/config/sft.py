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
        learning_rate: AdamW's initial learning rate. The default suits full fine-tuning. About 2e-4 suits LoRA.
    """

    learning_rate: float = help_field(2e-5, "AdamW's initial learning rate. About 2e-4 suits LoRA.")
