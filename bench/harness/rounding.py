"""How far rounding alone moves a bfloat16 training run: comparison runs ("twins") that differ in rounding only.

Adam moves each weight by about the learning rate, however small its gradient is. The last bits of bfloat16 activations
therefore decide much of the next loss, and no fixed tolerance fits. So the tolerance is measured, as the distance of
these twins from the run in float32:

- runs of fastalign whose weights have other last bits
- for peers also a run with peft's LoRA layers, which round an adapter away where it is small beside the layer's output

Two things may be `FACTOR` times as far from float32 as the furthest twin: the losses, and the gradient of the first
step, which no update has influenced yet.

The twins share an error that all runs of fastalign have, so they cannot reveal it. The component of fastalign's
gradient along the float32 gradient therefore has a separate bound, the larger of two: `SLOPE`, which a gradient of
twice or half the length exceeds, or what the other trainers lose in the same precision. (On long prompts four fifths of
the gradient are one direction in each of two early layers, and bfloat16 keeps little of it.)

If all weights are trained, every run starts from random last bits. In a model from a quantised file many weights lie
exactly between two bfloat16 numbers (8 % of SmolLM2's). Under autocast the first update, however small, rounds all of
them to one side. That happens in every trainer, but in no twin.
"""

from __future__ import annotations

import math

import torch

FACTOR = 3  # times the furthest of a few twins
SLOPE = 0.25  # a gradient of half the length is off by 0.5, one of twice the length or none at all by 1
SKETCH = 1024  # numbers that the sketch of a gradient has
BLOCK = 1 << 20  # entries per block: the sketch must need little memory, as the memory of the run is measured
FLOAT32 = "fastalign, float32"
PEFT = "fastalign, peft's layers"
LAST_BITS = ("fastalign, last bits 1", "fastalign, last bits 2", "fastalign, last bits 3")


def twins(tuning: str, multiplies_bfloat16: bool) -> list[str]:
    """The twins to run. The one with peft's layers needs LoRA, and a machine on which it does not take minutes."""
    return [FLOAT32, *LAST_BITS, *([PEFT] if tuning == "lora" and multiplies_bfloat16 else [])]


def change(model: torch.nn.Module, run: str, draw: bool) -> None:
    """Turns the loaded model, or fastalign in this process, into what the twin `run` needs.

    With `draw`, runs that are not about last bits start from random last bits too.
    """
    if draw or run in LAST_BITS:
        generator = torch.Generator().manual_seed(LAST_BITS.index(run) if run in LAST_BITS else len(LAST_BITS))
        for p in model.parameters():
            noise = torch.rand(p.shape, generator=generator) * 2 - 1
            p.data = (p.data.float() * (1 + torch.finfo(torch.bfloat16).eps * noise.to(p.device))).to(p.dtype)
    if run == PEFT:
        from fastalign.models import scoring

        scoring.speed_up_linear = lambda model: None


def sketch(model: torch.nn.Module) -> list[float]:
    """`SKETCH` sums of the gradient's entries with random signs.

    Such sums keep the lengths and distances of gradients within 5 %, and a run can report them.
    """
    sums, generator = torch.zeros(SKETCH), torch.Generator().manual_seed(0)
    grads = (p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None)
    for block in (block for grad in grads for block in grad.split(BLOCK)):
        padded = torch.nn.functional.pad(block.float().cpu(), (0, -block.numel() % SKETCH))
        signs = torch.randint(0, 2, padded.shape, generator=generator, dtype=torch.int8)
        sums += padded.where(signs.bool(), -padded).view(SKETCH, -1).sum(1)
    return sums.tolist()


def distances(run, exact) -> dict[str, float]:
    """How far a run is from the exact run.

    Returns:
        "loss": the largest difference of a step's loss. "gradient": the distance of the gradients, relative to the
        length of the exact one. "slope": how far the component along the exact gradient is from 1.
    """
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
    """The largest distances that rounding explains.

    Args:
        runs: twin -> its run.
        peers: runs of the other trainers, to check a run of fastalign. None to check a run of a peer.
    """
    ours = peers is not None
    others = [r for twin, r in runs.items() if twin != FLOAT32 and not (ours and twin == PEFT)]
    found = [distances(r, runs[FLOAT32]) for r in others]
    explained = {what: FACTOR * max(d[what] for d in found) for what in ("loss", "gradient", "slope")}
    slopes = [distances(run, runs[FLOAT32])["slope"] for run in peers] if ours else [explained["slope"]]
    return explained | {"slope": max(SLOPE, *slopes)}
