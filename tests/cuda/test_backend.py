"""The CUDA extension as a whole: backend="cuda" end to end on the emulation, and what is said where it is missing."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import linear_divergence, linear_logprobs, preference_loss, reference, selective_logprobs
from fastalign.errors import BackendError, InputError
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.backends import cuda

N, V, H = 19, 601, 24


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of rows and of the vocabulary even of a small problem."""
    monkeypatch.setattr("fastalign.ops.head.tiling.logprobs_tile_shape", lambda device: (16, 256))


def head_problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator).to(dtype) for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    targets[3] = targets[11] = -100
    return hidden, weight, targets


def evaluate(hidden, weight, targets, *, trainable, **options):
    """Log-probs (and entropy), and gradients of a fixed weighted sum of them."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trainable)
    out = linear_logprobs(hidden, weight, targets, **options)
    out = out if isinstance(out, tuple) else (out,)
    sum((t * torch.linspace(-1, 2, N, dtype=t.dtype)).sum() for t in out).backward()
    return [*(t.detach() for t in out), hidden.grad, *([weight.grad] if trainable else [])]


@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_logprobs(cuda, dtype, trainable, options):
    """|ours - exact| <= 2 (|plain code in that dtype - exact| + eps max|exact|)."""
    problem = head_problem(dtype)
    ours = evaluate(*problem, trainable=trainable, backend="cuda", **options)
    plain = evaluate(*problem, trainable=trainable, backend="reference", **options)
    wide = problem[0].double(), problem[1].double(), problem[2]
    exact = evaluate(*wide, trainable=trainable, backend="reference", **options)
    for got, low, true in zip(ours, plain, exact, strict=True):
        eps = torch.finfo(got.dtype).eps
        assert (got - true).abs().max() <= 2 * ((low - true).abs().max() + 4 * eps * true.abs().max())


@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_with_and_without_gradients(cuda, dtype, options):
    """Or the margins of preference training would not begin at exactly 0."""
    hidden, weight, targets = head_problem(dtype)
    frozen, trainable, recomputed = (
        evaluate(hidden, weight, targets, trainable=trainable, backend="cuda", **options | more)
        for trainable, more in ((False, {}), (True, {}), (True, {"memory_budget": 0}))
    )
    without = linear_logprobs(hidden, weight, targets, backend="cuda", **options)
    for i, plain in enumerate(without if isinstance(without, tuple) else (without,)):
        assert torch.equal(plain, frozen[i]) and torch.equal(plain, trainable[i]) and torch.equal(plain, recomputed[i])


def test_kept_and_recomputed_probabilities_agree(cuda):
    kept = evaluate(*head_problem(), trainable=True, backend="cuda")
    recomputed = evaluate(*head_problem(), trainable=True, backend="cuda", memory_budget=0)
    for a, b in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_the_order_of_blocks_changes_nothing(cuda, emulated):
    first = evaluate(*head_problem(), trainable=True, backend="cuda")
    emulated.last_block_first(True)
    try:
        assert all(map(torch.equal, first, evaluate(*head_problem(), trainable=True, backend="cuda")))
    finally:
        emulated.last_block_first(False)


@pytest.mark.parametrize("grads", [False, True], ids=["", "gradients"])
def test_opcheck(cuda, grads):
    """With a whole block of rows, which nothing is cut off from: results are tensors of their own none the less."""
    hidden, weight = torch.randn(16, H), torch.randn(V, H)
    args = (hidden, weight, torch.arange(16), torch.randn(V), 1.3, 5.0, 0.7, -100, grads, True, 0)
    torch.library.opcheck(torch.ops.fastalign.linear_logprobs.default, args, {"backend": "cuda"})


@pytest.mark.parametrize("n", [16, 32], ids=["a block", "two"])
def test_logprobs_may_be_changed_in_place(cuda, n):
    weight, targets = torch.randn(V, H), torch.arange(n)
    leaf = torch.randn(n, H, requires_grad=True)
    apart = torch.autograd.grad((-linear_logprobs(leaf, weight, targets, backend="cuda")).sum(), leaf)
    in_place = torch.autograd.grad(linear_logprobs(leaf, weight, targets, backend="cuda").neg_().sum(), leaf)
    assert torch.equal(*apart, *in_place)


def test_a_transposed_weight_is_read_as_it_is_and_only_copied_for_gradients(cuda, monkeypatch):
    hidden, weight, targets = head_problem()
    transposed, picked, pick_rows = weight.T.contiguous().T, [], cuda.pick_rows
    assert transposed.stride(1) != 1
    monkeypatch.setattr(cuda, "pick_rows", lambda *args: picked.append(args) or pick_rows(*args))
    expected = linear_logprobs(hidden, weight, targets, backend="cuda")
    got = linear_logprobs(hidden, transposed, targets, backend="cuda")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not picked
    for trainable in (False, True):
        expected = evaluate(hidden, weight, targets, trainable=trainable, backend="cuda")
        got = evaluate(hidden, transposed, targets, trainable=trainable, backend="cuda")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert picked


def test_selective_logprobs_in_any_layout(cuda):
    logits = torch.randn(4, 5, 37, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    targets = torch.randint(37, (5, 4))
    got = selective_logprobs(logits, targets, backend="cuda")
    torch.testing.assert_close(got, reference.selective_logprobs(logits, targets), rtol=1e-5, atol=1e-5)


def test_targets_outside_give_nan_and_a_gradient_of_zero(cuda):
    logits, targets = torch.randn(3, 40), torch.tensor([1, 40, -7])
    logprobs, stats = cuda.selective_logprobs(logits, targets, 1.0, -100)
    assert logprobs.isnan().tolist() == [False, True, True]
    grad = cuda.selective_logprobs_backward(torch.ones(3), logits, targets, stats, 1.0, -100)
    assert grad[0].any() and not grad[1:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_emulation_rounds_as_torch_does(cuda, dtype):
    """Every 16-bit value through float32 and back, and the float32 values between: the gradient of a kept tile."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].view(-1, 1)
    n = len(every)
    out, ones, none = torch.empty_like(every), torch.ones(n), torch.full((n,), -1)
    small = slice(0, n, 97)  # a block each
    cuda.kept_gradient(every[small], none[small], 0, ones[small], ones[small], out[small])
    assert torch.equal(out[small], every[small])
    values = (every[small].float() * 1.0007).squeeze(1)
    cuda.kept_gradient(torch.ones(len(values), 1, dtype=dtype), none[: len(values)], 0, values, values, out[small])
    assert torch.equal(out[small], values.to(dtype).unsqueeze(1))


def test_not_built_says_so_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(cuda, "module", None)
    with pytest.raises(
        BackendError, match=r"backend='cuda' cannot run linear_logprobs here: .*install nvcc .*make build"
    ):
        linear_logprobs(*head_problem(), backend="cuda")
    assert cuda.describe() == "built without CUDA: install nvcc (the CUDA toolkit) and run `make build`"


def test_built_but_on_another_device(cuda, monkeypatch, emulated):
    class Built:
        device_type, compiler = "cuda", "NVIDIA"

    monkeypatch.setattr(cuda, "module", Built)
    assert cuda.why_not(torch.ones(1)) == "a tensor lies on cpu, and the kernels run on cuda"
    assert cuda.describe() == "built with NVIDIA"


def test_float64_and_mixed_devices_are_refused(cuda):
    hidden, weight, targets = head_problem()
    with pytest.raises(BackendError, match=r"a tensor is torch.float64; it takes float32, bfloat16 and float16"):
        linear_logprobs(hidden.double(), weight.double(), targets, backend="cuda")
    with pytest.raises(InputError, match="move them to one device"):
        linear_logprobs(hidden, weight.to("meta"), targets, backend="cuda")
    assert "lies on meta" in cuda.why_not(hidden, weight.to("meta"))


def test_a_device_that_is_not_there(emulated):
    problem = emulated.Gather()
    problem.rows = problem.vocab = 1
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        emulated.selective_logprobs(problem, 7, 0)


def apart(t):
    """The same values with another between any two."""
    return torch.stack([t, torch.full_like(t, -7 if t.dtype == torch.int64 else math.nan)], -1)[..., 0]


def gradients(function, *inputs):
    """What the function gives, and the gradients of its sum in what is floating."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    out = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    return [out.detach(), *(g for g in torch.autograd.grad(out.sum(), wanted, allow_unused=True) if g is not None)]


LAYOUTS = {
    "linear_logprobs": (lambda h, w, y: linear_logprobs(h, w, y, backend="cuda"), head_problem),
    "selective_logprobs": (
        lambda z, y: selective_logprobs(z, y, backend="cuda"), lambda: (head_problem()[1], torch.arange(V) % H),
    ),
    "linear_divergence": (
        lambda h, w, g, x: linear_divergence(h, w, g, x, divergence="jsd", backend="cuda"),
        lambda: (*head_problem()[:2], head_problem()[0] * 0.5, head_problem()[1]),
    ),
    "preference_loss": (
        lambda lp, offsets, ref: preference_loss(lp, offsets, ref, backend="cuda").losses,
        lambda: (-torch.rand(9), torch.tensor([0, 2, 5, 8, 9]), -torch.rand(4)),
    ),
    "accumulate_fisher_": (
        lambda g, x, offsets: accumulate_fisher_(torch.zeros(5, 7), g, x, offsets, backend="cuda"),
        lambda: (torch.rand(9, 5), torch.rand(9, 7), torch.tensor([0, 4, 9])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", LAYOUTS)
def test_tensors_that_are_not_contiguous_are_read_as_what_they_are(cuda, op):
    function, problem = LAYOUTS[op]
    inputs = problem()
    run = function if op == "accumulate_fisher_" else lambda *inputs: gradients(function, *inputs)
    torch.testing.assert_close(run(*map(apart, inputs)), run(*inputs), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_logits_that_share_their_memory(cuda):
    """Rows of an expanded tensor lie in one place; those of its gradient do not."""
    logits, targets = torch.randn(37).expand(5, 37), torch.arange(5)
    got = gradients(lambda z, y: selective_logprobs(z, y, backend="cuda"), logits, targets)
    torch.testing.assert_close(got, gradients(reference.selective_logprobs, logits, targets), rtol=1e-5, atol=1e-5)
