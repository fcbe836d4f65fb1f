"""swiglu: every backend right to the rounding, gradients too; what it saves, compiles to and refuses."""

from __future__ import annotations

import pytest
import torch

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops import swiglu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
op = torch.ops.fastalign


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradients(function, tensors, grad):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def native(gate, up):
    return swiglu(gate, up, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (33, 37), (2, 9, 1000)])
def test_error_budget(shape, dtype, isa):
    """One rounding to the dtype, and a few of the accumulators'."""
    gate, up = 4 * numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    grad = numbers(*shape, dtype=dtype, seed=2)
    found = with_gradients(native, [gate, up], grad)
    truth = with_gradients(reference.swiglu, [gate.double(), up.double()], grad)
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for ours, exact in zip(found, truth, strict=True):
        assert ours.dtype == dtype
        rounded = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
        assert ((ours.double() - exact).abs() <= rounded + 8 * wide * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_round_a_few_times(backend, dtype):
    gate, up, grad = (numbers(7, 40, dtype=dtype, seed=i) for i in range(3))
    found = with_gradients(lambda gate, up: swiglu(gate, up, backend=backend), [gate, up], grad)
    truth = with_gradients(reference.swiglu, [gate.double(), up.double()], grad)
    for ours, exact in zip(found, truth, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_gates_far_from_zero(isa):
    gate = torch.tensor([-200.0, -89.0, -87.5, 87.5, 200.0, float("nan")])
    found = with_gradients(native, [gate, torch.ones(6)], torch.ones(6))
    truth = with_gradients(reference.swiglu, [gate.double(), torch.ones(6).double()], torch.ones(6))
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradcheck(backend, isa):
    gate, up = (numbers(3, 5, dtype=torch.float64, seed=i).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: swiglu(gate, up, backend=backend), (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype, threads):
    gate, up, grad = (numbers(333, 70, dtype=dtype, seed=i) for i in range(3))
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(with_gradients(native, [gate, up], grad))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_transposed_input(backend):
    x = numbers(6, 8)
    across = x.t().contiguous().t()

    def run(gate, up):
        return swiglu(gate, up, backend=backend)

    expected = with_gradients(run, [x, x], x)
    assert all(map(torch.equal, with_gradients(run, [across, x], across), expected))
    assert all(map(torch.equal, with_gradients(run, [x, across], x), expected))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gate_and_up_alone_are_saved_for_the_backward_pass(backend):
    saved = []
    gate, up = (numbers(50, 64, seed=i).requires_grad_() for i in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate, up, backend=backend)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck(backend):
    gate, up = numbers(6, 8), numbers(6, 8, seed=1)
    torch.library.opcheck(op.swiglu.default, (gate, up, backend))
    torch.library.opcheck(op.swiglu_backward.default, (torch.ones(6, 8), gate, up, backend))


@pytest.mark.parametrize("backend", ["cpu", "torch", "auto"])
def test_compiles_in_one_graph_to_the_same_bits(backend):
    def run(gate, up):
        return swiglu(gate, up, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs, grad = [numbers(5, 8), numbers(5, 8, seed=1)], numbers(5, 8, seed=2)
    assert all(map(torch.equal, with_gradients(compiled, inputs, grad), with_gradients(run, inputs, grad)))


def test_second_derivatives_are_refused_not_wrong():
    gate = numbers(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(native(gate, numbers(3, 8)).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_errors_say_what_was_found_and_what_to_do():
    x = numbers(3, 8)
    with pytest.raises(InputError, match=r"gate is \(3, 8\) torch.float32 and up \(3, 7\) torch.float32; .*one shape"):
        swiglu(x, x[:, 1:])
    with pytest.raises(InputError, match=r"up \(3, 8\) torch.bfloat16; .*one floating dtype"):
        swiglu(x, x.bfloat16())
    with pytest.raises(InputError, match=r"\['cpu', 'meta'\]; move them to one device"):
        swiglu(x, x.to("meta"))
    with pytest.raises(BackendError, match=r"'tpu'; swiglu has auto, reference, torch, cpu"):
        swiglu(x, x, backend="tpu")
