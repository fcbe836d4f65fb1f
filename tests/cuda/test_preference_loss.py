"""csrc/cuda/preference_loss.cu, run on the CPU, against the losses under autograd in float64."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import BackendError
from fastalign.ops.preference_loss import FORMULAS, preference_loss

# Empty sequences first, in the middle and last; one longer than a block has threads.
CU_SEQLENS = torch.tensor([0, 0, 4, 9, 10, 317, 317, 317, 330, 341, 341])
OPTIONS = {
    "dpo": {"beta": 0.7, "label_smoothing": 0.2},
    "simpo": {"gamma_beta_ratio": 0.3},
    "kto": {"weights": (1, 0.4)},
}
EPS = torch.finfo(torch.float32).eps


def problem(name, size=1.0):
    generator = torch.Generator().manual_seed(0)
    logprobs = -size * torch.rand(341, generator=generator) - 1e-3
    ref_sums = None if name in ("simpo", "cpo", "orpo") else -35 * size * torch.rand(10, generator=generator)
    labels = {"labels": torch.rand(10, generator=generator) < 0.5, "kl": 0.3} if name == "kto" else {}
    return logprobs, ref_sums, labels | OPTIONS.get(name, {})


def evaluate(logprobs, ref_sums, name, **options):
    logprobs = logprobs.detach().clone().requires_grad_()
    out = preference_loss(logprobs, options.pop("cu_seqlens", CU_SEQLENS), ref_sums, loss_type=name, **options)
    weights = torch.linspace(-1, 2, out.losses.numel(), dtype=logprobs.dtype)
    total = (weights * out.losses).sum() + (out.sums * torch.linspace(1, 3, len(out.sums), dtype=logprobs.dtype)).sum()
    return [t.detach() for t in out] + list(torch.autograd.grad(total, logprobs))


@pytest.mark.parametrize("averaged", [False, True], ids=["sums", "averages"])
@pytest.mark.parametrize("alternating", [True, False], ids=["in turn", "in halves"])
@pytest.mark.parametrize("name", FORMULAS)
def test_within_a_rounding_of_float64(cuda, name, alternating, averaged):
    """Inputs are float32 and everything between is double: only results and the backward pass's three are rounded.
    Of orpo no completion is empty: that would count as -tiny, another number in float64."""
    logprobs, ref_sums, options = problem(name)
    options |= {"averaged": averaged, "alternating": alternating}
    if name == "orpo":
        options["cu_seqlens"] = torch.tensor([0, 3, 4, 9, 10, 317, 318, 320, 330, 340, 341])
    found = evaluate(logprobs, ref_sums, name, backend="cuda", **options)
    wide = logprobs.double(), None if ref_sums is None else ref_sums.double()
    exact = evaluate(*wide, name, backend="reference", **options)
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 4 * EPS * want.abs().max()


@pytest.mark.parametrize("name", FORMULAS)
def test_margins_of_ten_thousand(cuda, name):
    logprobs, ref_sums, options = problem(name, size=1e4)
    assert all(t.isfinite().all() for t in evaluate(logprobs, ref_sums, name, backend="cuda", **options))


def test_offsets_that_do_not_fit_give_nan(cuda):
    logprobs = -torch.rand(20)
    for bounds in ([0, 5, 9, 12, 21], [1, 5, 9, 12, 20], [0, 5, 3, 12, 20], [0, 5, 9, 12, 19]):
        out = preference_loss(logprobs, torch.tensor(bounds), loss_type="cpo", backend="cuda")
        assert out.losses.isnan().any(), bounds
    assert (
        preference_loss(logprobs, torch.tensor([0, 5, 9, 12, 20]), loss_type="cpo", backend="cuda")
        .losses.isfinite()
        .all()
    )


def test_no_pairs(cuda):
    out = preference_loss(torch.empty(0), torch.tensor([0]), loss_type="cpo", backend="cuda")
    assert out.losses.shape == (0,) and out.coefficients.shape == (0,)


def test_one_launch_forward_and_one_backward(cuda, emulated):
    logprobs, ref_sums, options = problem("dpo")
    before = emulated.launches()
    evaluate(logprobs, ref_sums, "dpo", backend="cuda", **options)
    assert emulated.launches() - before == 2


def test_float64_is_refused(cuda):
    with pytest.raises(BackendError, match=r"preference_loss here: a tensor is torch.float64; it takes float32"):
        preference_loss(torch.zeros(4).double(), torch.tensor([0, 2, 4]), loss_type="cpo", backend="cuda")
