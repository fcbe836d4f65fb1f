"""The numbers that turn products into logits."""

from __future__ import annotations


def head_numbers(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float, float]:
    return float(logit_scale), float(softcap or 0.0), float(temperature)
