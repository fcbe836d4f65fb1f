"""Options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from fastalign.config.base import AlignmentConfig
from fastalign.options import help_field


@dataclass
class SFTConfig(AlignmentConfig):
    """Options of `SFTTrainer`: supervised fine-tuning on completions, assistant turns or plain text."""

    learning_rate: float = help_field(2e-5, "AdamW's initial learning rate; 2e-4 or so suits LoRA.")
