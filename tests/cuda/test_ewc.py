"""csrc/cuda/ewc.cu, run on the CPU, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from fastalign import reference

EPS = torch.finfo(torch.float32).eps
SIZES = [(4097,), (0,), (3, 5), (1,), (7,)]
MANY = SIZES + [(7,)] * 69  # more than one launch takes


def problem(theta, anchor, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)

    def tensors(dtype):
        return [torch.randn(size, generator=generator).to(dtype) for size in sizes]

    parameters, anchors, grads = tensors(theta), tensors(anchor), tensors(theta)
    return parameters, anchors, [t.abs() for t in tensors(torch.float32)], grads


@pytest.mark.parametrize("with_fisher", [True, False], ids=["ewc", "l2"])
@pytest.mark.parametrize(
    ("theta", "anchor"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
     (torch.float16, torch.float32)],
    ids=str,
)  # fmt: skip
def test_penalty_and_gradient(cuda, theta, anchor, with_fisher):
    many = theta == torch.float32 and with_fisher
    parameters, anchors, fishers, grads = problem(theta, anchor, MANY if many else SIZES)
    fishers = fishers if with_fisher else None
    fresh = [i % 2 == 0 for i in range(len(parameters))]
    before = [g.clone() for g in grads]
    penalty = cuda.ewc_penalty(parameters, anchors, fishers, 0.7, grads, fresh)
    exact = reference.ewc_penalty(*([t.double() for t in ts] for ts in (parameters, anchors)), fishers, 2.0)
    assert penalty.dtype == torch.float64 and abs(penalty - exact) <= 32 * EPS * exact  # 16 elements a thread
    for i, grad in enumerate(grads):
        added = 0.7 * (parameters[i].double() - anchors[i].double())
        added *= 1 if fishers is None else fishers[i].double()
        kept = torch.zeros_like(added) if fresh[i] else before[i].double()
        allowed = (torch.finfo(theta).eps + 4 * EPS) * (
            kept.abs() + added.abs()
        ) + 1e-7  # the last: float16 steps near 0
        assert ((grad - (kept + added)).abs() <= allowed).all()


def test_the_sum_alone(cuda):
    parameters, anchors, fishers, _ = problem(torch.float32, torch.float32)
    kept = [p.clone() for p in parameters]
    penalty = cuda.ewc_penalty(parameters, anchors, fishers, 0.7)
    assert penalty > 0 and all(map(torch.equal, parameters, kept))
    assert torch.equal(penalty, cuda.ewc_penalty(parameters, anchors, fishers, 0.1))


def test_launches(cuda, emulated):
    parameters, anchors, fishers, _ = problem(torch.float32, torch.float32, MANY)
    before = emulated.launches()
    cuda.ewc_penalty(parameters, anchors, fishers, 0.7)
    assert emulated.launches() - before == 2  # 73 tensors that have elements
