"""One micro-batch as the trainers and the objectives see it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastalign.data.packing import PackedBatch


@dataclass
class Batch:
    """One micro-batch of B rows with C completions and S scored completion tokens, as the collator makes it.

    Attributes:
        packed: The token ids and their layout. Its `targets` are the S scored completion tokens, followed by
            `prompt_tokens` tokens of prompts.
        columns: What a method needs beside the tokens, by the name of the data set's column. Every tensor is flat and
            in the order of the rows: one value per row (`label`, (B,) bool), per completion, or per scored token
            (`ref_logprobs`, (S,) float32). A method that needs a further column adds it to its data set. It needs no
            field here.
        prompt_tokens: How many of the last `packed.targets` are tokens of prompts. They lie behind
            `packed.cu_seqlens[-1]`, so that sums over completions do not contain them.
        rows: The tokenised rows that were laid out.
        sampled: True if the completions are samples of the model that is trained, False if they come from the data set.
    """

    packed: PackedBatch
    columns: dict[str, Tensor] = field(default_factory=dict)
    prompt_tokens: int = 0
    rows: list[dict] = field(default_factory=list)
    sampled: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`. accelerate's data loaders call this method to place a batch.

        Args:
            device: Where the tensors go.
            non_blocking: Accepted because accelerate passes it. It has no effect: a copy to a GPU never blocks here.

        Returns:
            A new batch.
        """
        del non_blocking
        columns = {name: value.to(device, non_blocking=True) for name, value in self.columns.items()}
        return replace(self, packed=self.packed.to(device), columns=columns)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory: a data loader with `pin_memory=True` calls this."""
        columns = {name: value.pin_memory() for name, value in self.columns.items()}
        return replace(self, packed=self.packed.pin_memory(), columns=columns)
