"""rms_norm: every backend right to the rounding, gradients too; what it saves, compiles to and refuses."""

from __future__ import annotations

import pytest
import torch

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops import rms_norm

EPS = 1e-5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
op = torch.ops.fastalign


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradients(function, tensors, grad):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def native(x, weight):
    return rms_norm(x, weight, EPS, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 37), (2, 9, 64), (40, 576)])
def test_error_budget(shape, dtype, isa):
    """One rounding to the dtype, and a few of the accumulators' of as many terms as a row has."""
    x, weight = 3 * numbers(*shape, dtype=dtype), 1 + numbers(shape[-1], dtype=dtype, seed=1)
    grad = numbers(*shape, dtype=dtype, seed=2)
    found = with_gradients(native, [x, weight], grad)
    truth = with_gradients(lambda x, w: reference.rms_norm(x, w, EPS), [x.double(), weight.double()], grad)
    pulls = grad.double() * weight.double() * truth[0] / (x.double() * weight.double())  # cancel where rows are short
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for ours, exact, size in zip(found[:2], truth[:2], (truth[0], pulls), strict=True):
        assert ours.dtype == dtype
        rounded = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
        assert ((ours.double() - exact).abs() <= rounded + 8 * wide * shape[-1] ** 0.5 * size.abs().max()).all()
    # The weight's gradient is torch's, from the products as torch rounds them.
    rows = x.numel() // shape[-1]
    assert (found[2].double() - truth[2]).abs().max() <= 2 * torch.finfo(dtype).eps * rows**0.5 * 30


def test_gradcheck(isa):
    x, weight = numbers(3, 5, dtype=torch.float64), numbers(5, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(native, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_are_as_near_as_two_roundings(backend, dtype):
    x, weight, grad = (numbers(*s, dtype=dtype, seed=i) for i, s in enumerate([(7, 40), (40,), (7, 40)]))
    found = with_gradients(lambda x, w: rms_norm(x, w, EPS, backend=backend), [x, weight], grad)
    truth = with_gradients(lambda x, w: reference.rms_norm(x, w, EPS), [x.double(), weight.double()], grad)
    for ours, exact in zip(found, truth, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().max() <= 40 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype, threads):
    x, weight, grad = numbers(333, 70, dtype=dtype), numbers(70, dtype=dtype), numbers(333, 70, dtype=dtype, seed=3)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(with_gradients(native, [x, weight], grad)[:2])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_transposed_input():
    x, weight = numbers(6, 8), numbers(8)
    across = x.t().contiguous().t()
    assert torch.equal(native(across, weight), native(x, weight))
    found, expected = (with_gradients(native, [t, weight], across) for t in (across, x))
    assert all(map(torch.equal, found, expected))


def test_what_is_saved_for_the_backward_pass():
    saved = []
    x, weight = numbers(50, 64, dtype=torch.bfloat16).requires_grad_(), torch.ones(64, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        native(x, weight)
    assert sorted(t.numel() for t in saved) == [50, 64, 50 * 64]
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1


def test_auto_is_the_kernel_here_and_torch_elsewhere():
    x, weight = numbers(3, 8), numbers(8)
    assert torch.equal(rms_norm(x, weight, EPS), native(x, weight))
    assert rms_norm(x.to("meta"), weight.to("meta"), EPS).shape == (3, 8)


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)])
def test_opcheck(shape):
    x, weight = numbers(*shape), numbers(8)
    torch.library.opcheck(op.rms_norm.default, (x, weight, EPS))
    _, scale = op.rms_norm(x, weight, EPS)
    torch.library.opcheck(op.rms_norm_backward.default, (torch.ones(shape), x, weight, scale, EPS))


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_compiles_in_one_graph_to_the_same_bits(backend):
    def run(x, weight):
        return rms_norm(x, weight, EPS, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs, grad = [numbers(5, 8), numbers(8, seed=1)], numbers(5, 8, seed=2)
    assert all(map(torch.equal, with_gradients(compiled, inputs, grad), with_gradients(run, inputs, grad)))


def test_second_derivatives_are_refused_not_wrong():
    x = numbers(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(native(x, numbers(8)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_errors_say_what_was_found_and_what_to_do():
    x, weight = numbers(3, 8), numbers(8)
    with pytest.raises(InputError, match=r"x is torch.float32 and weight torch.bfloat16; .*one floating dtype"):
        rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(InputError, match=r"x is \(3, 8\) and weight \(7,\); they must be \(..., H\) and \(H,\)"):
        rms_norm(x, weight[1:], EPS)
    with pytest.raises(BackendError, match=r"'tpu'; rms_norm has auto, reference, torch, cpu"):
        rms_norm(x, weight, EPS, backend="tpu")
    with pytest.raises(BackendError, match=r"backend='cpu' cannot run rms_norm here: a tensor lies on meta"):
        rms_norm(x.to("meta"), weight.to("meta"), EPS, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_one_row_without_leading_dimensions(backend):
    x, weight = torch.randn(7, requires_grad=True), torch.randn(7, requires_grad=True)
    out = rms_norm(x, weight, 1e-6, backend=backend)
    expected = torch.nn.functional.rms_norm(x, (7,), weight, 1e-6)
    for a, e in zip(
        torch.autograd.grad(out.sum(), (x, weight)), torch.autograd.grad(expected.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, e)
