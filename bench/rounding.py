"""What rounding explains of a bfloat16 loss curve: runs of fastalign on the same rows in which nothing else changes.

An update by Adam moves each weight by about its learning rate however small its gradient, so that the last bits of
bfloat16 activations decide much of the next loss, and no fixed tolerance says how much. So it is measured: in float32,
with other last bits in the weights, and, for peers, with peft's own LoRA layers, which round an adapter away where it
is small beside its layer's output. A correct loss lies within what these runs span at its step, or near it.
"""

from __future__ import annotations

import math

import torch

FLOAT32 = "fastalign, float32"
PEFT = "fastalign, peft's layers"
LAST_BITS = ("fastalign, last bits 1", "fastalign, last bits 2", "fastalign, last bits 3")


def twins(tuning: str, multiplies_bfloat16: bool) -> list[str]:
    """The runs to make; peft's layers where there are some, and where their products do not take minutes."""
    return [FLOAT32, *LAST_BITS, *([PEFT] if tuning == "lora" and multiplies_bfloat16 else [])]


def change(model: torch.nn.Module, twin: str) -> None:
    """Makes the loaded model, or this process's fastalign, the twin's. Other names change nothing."""
    if twin in LAST_BITS:
        generator = torch.Generator().manual_seed(LAST_BITS.index(twin))
        for p in model.parameters():
            noise = torch.rand(p.shape, generator=generator) * 2 - 1
            p.data = (p.data.float() * (1 + torch.finfo(torch.bfloat16).eps * noise.to(p.device))).to(p.dtype)
    if twin == PEFT:
        from fastalign import scoring

        scoring.speed_up_linear = lambda model: None


def unexplained(losses: list[float], curves: dict[str, list[float]], ours: bool) -> float:
    """The largest distance of a loss from what the twins' losses of its step span; nan where one is not a number."""
    spans = zip(*(curve for twin, curve in curves.items() if twin != PEFT or not ours), strict=True)
    outside = [max(min(span) - loss, loss - max(span), 0.0) for loss, span in zip(losses, spans, strict=True)]
    numbers = [*losses, *(loss for curve in curves.values() for loss in curve)]
    return math.nan if any(map(math.isnan, numbers)) else max(outside)
