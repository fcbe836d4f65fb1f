"""What the suite `fisher` measures of EWC: penalty and gradient over tensors of SmolLM2-135M's shapes."""

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
GRADIENT = "gradient of "  # begins the name of an output
STRENGTH = 10.0
MOVES = 5  # numbers an entry, at the least: theta, theta0, F and the gradient are read, the gradient is written
CHECKED = (0, 1, 8, -1)  # tensors whose gradients are checked: the embedding, a matrix, norms


def tensors(blocks: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, which have gradients, anchors, Fisher information: of the embedding, some blocks, and the norms."""
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
    penalty = ewc_penalty_(parameters, anchors, fishers, STRENGTH, backend=backend)
    return _outputs(penalty, parameters)


def autograd(parameters, anchors, fishers) -> Outputs:
    penalty = ewc_penalty(parameters, anchors, fishers, STRENGTH)
    penalty.backward()
    return _outputs(penalty, parameters)


def plain(parameters, anchors, fishers) -> Outputs:
    """As it is usually written."""
    triples = zip(parameters, anchors, fishers, strict=True)
    penalty = STRENGTH / 2 * torch.stack([(f * (p - a) ** 2).sum() for p, a, f in triples]).sum()
    penalty.backward()
    return _outputs(penalty, parameters)


def _outputs(penalty: Tensor, parameters: list[Tensor]) -> Outputs:
    return {"penalty": penalty.detach().reshape(1)} | {f"{GRADIENT}{i}": parameters[i].grad for i in CHECKED}


def truth(parameters, anchors, fishers) -> Outputs:
    """The penalty, and what each run adds to the gradients that are checked."""
    pulls = [f.double() * (p.detach().double() - a) for p, a, f in zip(parameters, anchors, fishers, strict=True)]
    penalty = sum(
        (pull * (p.detach().double() - a)).sum() for pull, p, a in zip(pulls, parameters, anchors, strict=True)
    )
    exact = {"penalty": STRENGTH / 2 * penalty.reshape(1)}
    return exact | {f"{GRADIENT}{i}": STRENGTH * pulls[i] for i in CHECKED}
