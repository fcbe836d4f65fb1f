"""What rounding explains of a bfloat16 run: runs of fastalign on the same rows in which nothing else changes.

An update by Adam moves each weight by about its learning rate however small its gradient, so that the last bits of
bfloat16 activations decide much of the next loss, and no fixed tolerance says how much. So it is measured, as distances
from the run in float32: of runs with other last bits in the weights and, for peers, of one with peft's own LoRA layers,
which round an adapter away where it is small beside its layer's output. Losses, and the gradient of the first step,
which no update has blurred yet, may be `FACTOR` times as far from float32's as the furthest of these. What all of
fastalign's runs have in common is in these as well, so its gradient is held to float32's along it too: by `SLOPE`,
which a fault that makes it longer or shorter exceeds, or by what the other trainers lose of it in the same precision
(on long prompts four fifths of the gradient are a direction each of two early layers, and bfloat16 keeps little of it).

Where all weights are trained, every run starts from last bits drawn at random. Of a model from a quantised file many
weights lie exactly between two bfloat16 numbers, 8 % of SmolLM2's: the first update, however small, tips all of them
under autocast, in any trainer, and in no twin.
"""

from __future__ import annotations

import math

import torch

FACTOR = 3  # of the largest of few draws
SLOPE = 0.25  # a gradient of half the length, twice the length or none is off by 0.5 or 1
SKETCH = 1024
BLOCK = 1 << 20  # entries that get their signs at a time: the sketch is made within the run whose memory is measured
FLOAT32 = "fastalign, float32"
PEFT = "fastalign, peft's layers"
LAST_BITS = ("fastalign, last bits 1", "fastalign, last bits 2", "fastalign, last bits 3")


def twins(tuning: str, multiplies_bfloat16: bool) -> list[str]:
    """The runs to make; peft's layers where there are some, and where their products do not take minutes."""
    return [FLOAT32, *LAST_BITS, *([PEFT] if tuning == "lora" and multiplies_bfloat16 else [])]


def change(model: torch.nn.Module, run: str, draw: bool) -> None:
    """Makes the loaded model, or this process's fastalign, the twin's; with `draw`, other runs too get last bits."""
    if draw or run in LAST_BITS:
        generator = torch.Generator().manual_seed(LAST_BITS.index(run) if run in LAST_BITS else len(LAST_BITS))
        for p in model.parameters():
            noise = torch.rand(p.shape, generator=generator) * 2 - 1
            p.data = (p.data.float() * (1 + torch.finfo(torch.bfloat16).eps * noise.to(p.device))).to(p.dtype)
    if run == PEFT:
        from fastalign.models import scoring

        scoring.speed_up_linear = lambda model: None


def sketch(model: torch.nn.Module) -> list[float]:
    """`SKETCH` sums of the gradients' entries with random signs: their lengths and distances are kept within 5 %."""
    sums, generator = torch.zeros(SKETCH), torch.Generator().manual_seed(0)
    grads = (p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None)
    for block in (block for grad in grads for block in grad.split(BLOCK)):
        block = torch.nn.functional.pad(block.float().cpu(), (0, -block.numel() % SKETCH))
        signs = torch.randint(0, 2, block.shape, generator=generator, dtype=torch.int8)
        sums += block.where(signs.bool(), -block).view(SKETCH, -1).sum(1)
    return sums.tolist()


def distances(run, exact) -> dict[str, float]:
    """How far a run's losses are from the exact run's, and its gradient: in all, and along the exact one (length 1)."""
    losses = [abs(a - b) for a, b in zip(run.losses, exact.losses, strict=True)]
    length = math.hypot(*exact.gradient)
    gradient = math.dist(run.gradient, exact.gradient) / length
    slope = sum(a * b for a, b in zip(run.gradient, exact.gradient, strict=True)) / length**2
    return {
        "loss": math.nan if any(map(math.isnan, losses)) else max(losses),
        "gradient": gradient,
        "slope": abs(slope - 1),
    }


def allowed(runs: dict, peers: list | None = None) -> dict[str, float]:
    """What the distances of a run of fastalign's may be, beside the peers' runs; without these, of a peer's run.

    runs: twin -> run.
    """
    ours = peers is not None
    others = [r for twin, r in runs.items() if twin != FLOAT32 and not (ours and twin == PEFT)]
    found = [distances(r, runs[FLOAT32]) for r in others]
    explained = {what: FACTOR * max(d[what] for d in found) for what in ("loss", "gradient", "slope")}
    slopes = [distances(run, runs[FLOAT32])["slope"] for run in peers] if ours else [explained["slope"]]
    return explained | {"slope": max(SLOPE, *slopes)}
