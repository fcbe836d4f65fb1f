"""The EWC case of the suite `fisher`: penalty and gradient over tensors with the shapes of SmolLM2-135M."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.measure import Outputs
from fastalign.ops.ewc import ewc_penalty, ewc_penalty_

HIDDEN, INNER, KEYS, VOCAB, BLOCKS = 576, 1536, 192, 49152, 30  # SmolLM2-135M's
LAYERS = [  # (out, in) of one block: q, k, v, o, gate, up, down
    (HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN),
    (HIDDEN, INNER),
]  # fmt: skip
GRADIENT = "gradient of "  # names of outputs that are gradients begin with it
STRENGTH = 10.0
MOVES = 5  # numbers that must move per entry: theta, theta0, F and the gradient are read, the gradient is written
CHECKED = (0, 1, 8, -1)  # indices of the tensors whose gradients are checked: the embedding, a matrix, two norms


def tensors(blocks: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(parameters with gradients, anchors, Fisher information) of the embedding, `blocks` blocks and the last norm."""
    generator = torch.Generator().manual_seed(0)
    block = [*LAYERS, (HIDDEN,), (HIDDEN,)]
    shapes = [(VOCAB // BLOCKS * blocks, HIDDEN), *(blocks * block), (HIDDEN,)]
    anchors = [torch.randn(*shape, generator=generator) for shape in shapes]
    parameters = [(a + 0.1).requires_grad_() for a in anchors]
    fishers = [a.abs() for a in anchors]
    for p, a in zip(parameters, anchors, strict=True):
        p.grad = a.clone()
    return parameters, anchors, fishers


def in_place(backend: str, parameters, anchors, fishers) -> Outputs:
    """`ewc_penalty_`, which adds its gradient to `.grad` itself."""
    penalty = ewc_penalty_(parameters, anchors, fishers, STRENGTH, backend=backend)
    return _outputs(penalty, parameters)


def autograd(parameters, anchors, fishers) -> Outputs:
    """`ewc_penalty`, whose gradient autograd adds to `.grad`."""
    penalty = ewc_penalty(parameters, anchors, fishers, STRENGTH)
    penalty.backward()
    return _outputs(penalty, parameters)


def plain(parameters, anchors, fishers) -> Outputs:
    """The penalty in plain torch, as it is usually written."""
    triples = zip(parameters, anchors, fishers, strict=True)
    penalty = STRENGTH / 2 * torch.stack([(f * (p - a) ** 2).sum() for p, a, f in triples]).sum()
    penalty.backward()
    return _outputs(penalty, parameters)


def _outputs(penalty: Tensor, parameters: list[Tensor]) -> Outputs:
    return {"penalty": penalty.detach().reshape(1)} | {f"{GRADIENT}{i}": parameters[i].grad for i in CHECKED}


def truth(parameters, anchors, fishers) -> Outputs:
    """The penalty in float64, and what one run must add to the gradients that are checked."""
    pulls = [f.double() * (p.detach().double() - a) for p, a, f in zip(parameters, anchors, fishers, strict=True)]
    penalty = sum(
        (pull * (p.detach().double() - a)).sum() for pull, p, a in zip(pulls, parameters, anchors, strict=True)
    )
    exact = {"penalty": STRENGTH / 2 * penalty.reshape(1)}
    return exact | {f"{GRADIENT}{i}": STRENGTH * pulls[i] for i in CHECKED}
