"""EWC's penalty and gradient against the definition in float64, by autograd, and on merged LoRA weights."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops import ewc
from fastalign.ops.ewc import ewc_penalty, ewc_penalty_, lora_ewc_penalty

BACKENDS = ["torch", "cpu"]
SHAPES = [(3, 5), (), (70000,), (1,), (0, 4), (33, 129)]


def tensors(dtype=torch.float32, seed=0):
    """(parameters, anchors, fishers): the anchors near the parameters, as in training."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parameters = [draw(shape) for shape in SHAPES]
    anchors = [p + 0.1 * draw(p.shape) for p in parameters]
    fishers = [draw(shape) ** 2 for shape in SHAPES]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        [p.to(dtype).requires_grad_() for p in parameters],
        [a.to(dtype) for a in anchors],
        [f.to(wide) for f in fishers],
    )


def exact(parameters, anchors, fishers, strength):
    """Penalty and gradients in float64, of the tensors as they were rounded."""
    leaves = [p.detach().double().requires_grad_() for p in parameters]
    fishers = fishers and [f.double() for f in fishers]
    total = reference.ewc_penalty(leaves, [a.double() for a in anchors], fishers, strength)
    return total.item(), torch.autograd.grad(total, leaves)


def assert_within_budget(total, grads, truth, dtype):
    penalty, exact_grads = truth
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # Distance, product and square each round a term of the sum, which is taken in float64 and rounded once.
    assert abs(total.item() - penalty) <= 5 * eps32 * abs(penalty)
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        # Distance, two products, and the rounding to the dtype, below whose smallest number nothing is kept.
        assert (
            (grad.double() - expected).abs() <= (4 * eps32 + eps) * expected.abs() + eps * torch.finfo(dtype).tiny
        ).all()


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_penalty_and_gradient(backend, dtype, fisher):
    parameters, anchors, fishers = tensors(dtype)
    fishers = fishers if fisher else None
    truth = exact(parameters, anchors, fishers, 3.0)
    total = ewc_penalty(parameters, anchors, fishers, 3.0, backend=backend)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within_budget(total, torch.autograd.grad(total, parameters), truth, dtype)

    total = ewc_penalty_(parameters, anchors, fishers, 3.0, backend=backend)
    assert not total.requires_grad
    assert_within_budget(total, [p.grad for p in parameters], truth, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_added_to_what_is_there(backend):
    parameters, anchors, fishers = tensors()
    before = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in parameters]
    for parameter, grad in zip(parameters[1:], before[1:], strict=True):
        parameter.grad = grad.clone()
    ewc_penalty_(parameters, anchors, fishers, 2.0, backend=backend)
    _, added = exact(parameters, anchors, fishers, 2.0)
    before[0].zero_()  # the first had none
    for parameter, old, new in zip(parameters, before, added, strict=True):
        budget = 6e-8 * (4 * new.abs() + (old + new).abs())
        assert ((parameter.grad - (old + new)).abs() <= budget).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_a_term_of_a_loss(backend):
    """Scaled by what comes behind it, and added to the parameter's other gradients."""
    parameters, anchors, fishers = tensors(torch.float64)
    (3 * ewc_penalty(parameters, anchors, fishers, 0.5, backend=backend) + parameters[0].sum()).backward()
    _, expected = exact(parameters, anchors, fishers, 1.5)
    torch.testing.assert_close(parameters[0].grad, expected[0] + 1, rtol=1e-14, atol=0)
    torch.testing.assert_close(parameters[5].grad, expected[5], rtol=1e-14, atol=0)
    small = [p[:2].detach().requires_grad_() for p in parameters[::5]], [a[:2] for a in anchors[::5]]
    ones = [f[:2] for f in fishers[::5]]
    assert torch.autograd.gradcheck(lambda *p: ewc_penalty(p, small[1], ones, 0.7, backend=backend), small[0])


def test_the_tensors_are_read_once(monkeypatch):
    """Also where the loss is scaled. A second backward over the same graph reads them again, and gives the same,
    whatever became of the first one's tensors."""
    parameters, anchors, fishers = tensors(torch.float64)
    runs, run = [], ewc._run
    monkeypatch.setattr(ewc, "_run", lambda *args: runs.append(args) or run(*args))
    loss = 3 * ewc_penalty(parameters, anchors, fishers, 0.5, backend="torch")
    _, expected = exact(parameters, anchors, fishers, 1.5)
    loss.backward(retain_graph=True)
    assert len(runs) == 1
    loss.backward()
    for parameter, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad, rtol=1e-14, atol=0)
    with torch.no_grad():
        ewc_penalty(parameters, anchors, fishers, 0.5, backend="torch")
    assert runs[-1][5] is None, "a gradient that nobody wants"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scale_rounds_16_bits_once_more_unless_it_is_a_power_of_two(dtype, backend):
    parameters, anchors, fishers = tensors(dtype)
    third = torch.autograd.grad(ewc_penalty(parameters, anchors, fishers, 3.0, backend=backend) / 3, parameters)
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    for grad, expected in zip(third, exact(parameters, anchors, fishers, 1.0)[1], strict=True):
        assert ((grad.double() - expected).abs() <= 1.01 * eps * expected.abs() + eps * tiny).all()
    quarter = torch.autograd.grad(ewc_penalty(parameters, anchors, fishers, 4.0, backend=backend) / 4, parameters)
    whole = torch.autograd.grad(ewc_penalty(parameters, anchors, fishers, 1.0, backend=backend), parameters)
    for grad, expected in zip(quarter, whole, strict=True):
        normal = expected.abs() > 8 * tiny
        assert torch.equal(grad[normal], expected[normal])


def test_nothing_waits_for_a_gpu():
    """Tensors on "meta" have no values: whoever asks for one, be it the scale of the loss, raises an error."""
    a, b, information = (t.detach().to("meta") for t in adapter(torch.float32))
    scale = torch.empty((), device="meta")
    parameters, anchors, fishers = ([t.detach().to("meta") for t in ts] for ts in tensors())
    for leaves, penalty in (
        (parameters, lambda: ewc_penalty(parameters, anchors, fishers, 0.5)),
        ([a, b], lambda: lora_ewc_penalty(a, b, 0.25, information, 3.0)),
    ):
        for leaf in leaves:
            leaf.requires_grad_()
        loss = scale * penalty()
        loss.backward(retain_graph=True)
        loss.backward()
        assert all(leaf.grad.device.type == "meta" and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_anchor_nothing_pulls(backend):
    parameters, _, fishers = tensors()
    assert ewc_penalty_(parameters, [p.detach().clone() for p in parameters], fishers, 5.0, backend=backend) == 0
    assert all((p.grad == 0).all() for p in parameters)


def test_strided_tensors():
    weight = torch.randn(6, 8, dtype=torch.float64).T.requires_grad_()
    anchor, fisher = torch.randn(8, 6, dtype=torch.float64), torch.rand(6, 8, dtype=torch.float64).T
    truth = exact([weight], [anchor], [fisher], 2.0)
    assert_within_budget(ewc_penalty_([weight], [anchor], [fisher], 2.0), [weight.grad], truth, torch.float64)
    with pytest.raises(BackendError, match="not contiguous"):
        ewc_penalty([weight], [anchor], [fisher], backend="cpu")
    square = torch.randn(5, 5).requires_grad_()
    square.grad = torch.zeros(5, 5).T[:, ::1].contiguous().T
    truth = exact([square], [anchor[:5, :5].float()], None, 2.0)
    total = ewc_penalty_([square], [anchor[:5, :5].float().contiguous()], None, 2.0)
    assert_within_budget(total, [square.grad], truth, torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    parameters, anchors, fishers = tensors()
    one = ewc_penalty_(parameters, anchors, fishers, backend="cpu")
    grads = [p.grad.clone() for p in parameters]
    torch.set_num_threads(threads)
    try:
        for parameter in parameters:
            parameter.grad = None
        assert torch.equal(ewc_penalty_(parameters, anchors, fishers, backend="cpu"), one)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, grads, strict=True))
    finally:
        torch.set_num_threads(1)


def test_kinds_of_tensors_may_be_mixed():
    """float32 norms among bfloat16 weights, whose anchors are float32."""
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.randn(9, generator=generator).to(d).requires_grad_() for d in (torch.bfloat16, torch.float32)]
    anchors = [torch.randn(9, generator=generator) for _ in range(2)]
    truth = exact(parameters, anchors, None, 1.0)
    total = ewc_penalty_(parameters, anchors, None, backend="cpu")
    for i, parameter in enumerate(parameters):
        assert_within_budget(total, [parameter.grad], (truth[0], truth[1][i : i + 1]), parameter.dtype)


def adapter(dtype, out=37, width=23, rank=3):
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, width), (out, rank)))
    fisher = torch.rand(out, width, generator=generator)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), fisher


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lora_is_the_penalty_on_the_merged_weight(dtype, fisher, monkeypatch):
    monkeypatch.setattr(ewc, "_TILE_BYTES", 10 * 23 * 8)  # several tiles, the last one lower
    a, b, information = adapter(dtype)
    information = information if fisher else None
    total = lora_ewc_penalty(a, b, 0.25, information, 3.0)
    grads = torch.autograd.grad(2 * total, (a, b))
    a64, b64 = (t.detach().double().requires_grad_() for t in (a, b))
    merged = 0.25 * b64 @ a64
    fishers = None if information is None else [information.double()]
    expected = reference.ewc_penalty([merged], [torch.zeros_like(merged)], fishers, 3.0)
    eps = torch.finfo(dtype).eps
    # `B A` sums 3 products, the gradients 37 or 23 of those (8 sqrt(n) eps, Higham and Mary 2019), all of one size.
    assert abs(total.item() - expected.item()) <= 8 * 3 * eps * expected.item()
    for grad, exact_grad in zip(grads, torch.autograd.grad(2 * expected, (a64, b64)), strict=True):
        assert grad.dtype == dtype
        assert (grad - exact_grad).abs().max() <= 8 * 6 * eps * exact_grad.abs().max()


class Largest(TorchDispatchMode):
    """The most bytes that any new tensor takes."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("fisher", [True, False])
def test_the_merged_weight_is_never_whole(fisher, monkeypatch):
    monkeypatch.setattr(ewc, "_TILE_BYTES", 10 * 23 * 4)
    a, b, information = adapter(torch.float32, out=400)
    with Largest(a, b, information) as largest:
        lora_ewc_penalty(a, b, 0.25, information if fisher else None, 3.0).backward()
    assert 0 < largest.bytes <= max(ewc._TILE_BYTES, b.nbytes) < information.nbytes / 7


def test_lora_gradcheck():
    a, b, information = adapter(torch.float64, 5, 4, 2)
    assert torch.autograd.gradcheck(lambda a, b: lora_ewc_penalty(a, b, 0.5, information, 2.0), (a, b))


def test_bad_input_is_named():
    parameters, anchors, fishers = tensors()
    with pytest.raises(InputError, match="There are 5 anchors for 6 parameters"):
        ewc_penalty(parameters, anchors[:-1], fishers)
    with pytest.raises(InputError, match=r"fishers\[0\] is \(5, 3\) .*parameter is \(3, 5\)"):
        ewc_penalty_(parameters, anchors, [fishers[0].T, *fishers[1:]])
    with pytest.raises(InputError, match=r"strength is -1"):
        ewc_penalty(parameters, anchors, fishers, -1.0)
    with pytest.raises(InputError, match="no parameters"):
        ewc_penalty([], [], [])
    with pytest.raises(InputError, match="both must be floating"):
        ewc_penalty([torch.zeros(2)], [torch.zeros(2, dtype=torch.int64)], None)
    with pytest.raises(BackendError, match="backend is 'tpu'; ewc_penalty has"):
        ewc_penalty(parameters, anchors, fishers, backend="tpu")
    a, b, information = adapter(torch.float32)
    with pytest.raises(InputError, match=r"fisher is \(23, 37\); .* must be \(37, 23\)"):
        lora_ewc_penalty(a, b, 1.0, information.T)
    with pytest.raises(InputError, match=r"lora_a is \(37, 3\) and lora_b \(3, 23\)"):
        lora_ewc_penalty(b, a, 1.0)
