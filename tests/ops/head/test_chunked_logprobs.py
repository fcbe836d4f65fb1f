"""Output layers that are read in tiles: packed, with an adapter, with new rows; all against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import linear_logprobs
from fastalign.errors import InputError
from fastalign.ops.head import chunked_logprobs, tiling, weights

EPS = torch.finfo(torch.float32).eps
N, H, V, R = 37, 24, 77, 3
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "logit_scale": -0.6, "softcap": 3.0, "temperature": 0.7},
    "bias": {"bias": True},
}
KINDS = ["packed", "lora", "rows", "everything"]


class Packed:
    """A weight in 8 bits with one scale, whose rows can be read from every fifth on."""

    dtype, row_multiple, device = None, 5, torch.device("cpu")

    def __init__(self, weight):
        self.scale = weight.abs().max().item() / 127
        self.bytes = (weight / self.scale).round().to(torch.int8)
        self.shape = tuple(weight.shape)

    def dequantize(self, dtype):
        return (self.bytes.to(torch.float32) * self.scale).to(dtype)

    def dequantize_rows(self, start, stop, out):
        assert start % self.row_multiple == 0
        out.copy_(self.bytes[start:stop].to(torch.float32) * self.scale)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Three blocks of rows, and tiles of 20 entries, the last one ragged."""
    monkeypatch.setattr(tiling, "logprobs_tile_shape", lambda device: (16, 16))
    monkeypatch.setattr(weights, "_entries", lambda *args: 20)
    monkeypatch.setattr(weights, "_ROWS_AT_A_TIME", 8)
    monkeypatch.setattr(chunked_logprobs, "_block_rows", lambda device: 16)


def problem(kind, dtype, *, bias=False, ignored=0.3, spread=1.0):
    """hidden, weight, targets and the options of an output layer, of random numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(N, H) * spread, random(V, H) / H**0.5
    targets = torch.randint(V, (N,), generator=generator)
    ids = torch.tensor([targets[1], V - 1, 0, targets[4]])
    targets[torch.randperm(N, generator=generator)[: round(ignored * N)]] = -100
    options = {"bias": random(V).to(dtype) if bias else None}
    if kind in ("lora", "everything"):
        options["lora"] = random(R, H).to(dtype) / H**0.5, random(V, R).to(dtype), 0.7
    if kind in ("rows", "everything"):
        options["new_rows"] = ids, random(4, H).to(dtype) / H**0.5
    weight = Packed(weight.float()) if kind in ("packed", "everything") else weight.to(dtype)
    return hidden.to(dtype), weight, targets, options


def convert(value, dtype):
    if isinstance(value, tuple):
        return tuple(convert(v, dtype) for v in value)
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().to(dtype).requires_grad_() if is_number else value


def evaluate(backend, dtype, hidden, weight, targets, options, **more):
    """Outputs, then the gradients of a fixed weighted sum of them in hidden, bias, factors and rows."""
    hidden, options = convert(hidden, dtype), {name: convert(value, dtype) for name, value in options.items()}
    if isinstance(weight, torch.Tensor):
        weight = weight.to(dtype)
    out = linear_logprobs(hidden, weight, targets, backend=backend, **options, **more)
    out = out if isinstance(out, tuple) else (out,)
    coefficients = torch.linspace(-1, 2, targets.numel())
    leaves = [hidden, options["bias"], *options.get("lora", ())[:2], *options.get("new_rows", ())[1:]]
    total = sum(((1 + i) * coefficients * o).sum() for i, o in enumerate(out))
    grads = torch.autograd.grad(total, [t for t in leaves if t is not None])
    return [o.detach() for o in out], list(grads)


def assert_within_budget(actual, plain, exact, eps):
    """|actual - exact| <= 2 (|plain - exact| + eps max|exact|), where plain is the reference in the low precision."""
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == p.dtype and a.isfinite().all()
        assert (a - e).abs().max() <= 2 * ((p - e).abs().max() + eps * e.abs().max())


CASES = [(kind, option, torch.float64, "torch") for kind in KINDS for option in OPTIONS]
CASES += [
    (kind, option, dtype, backend)
    for kind in KINDS
    for option in ("plain", "all")
    for dtype in (torch.float32, torch.bfloat16)
    for backend in ("torch", "cpu")
]


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize(("kind", "option", "dtype", "backend"), CASES, ids=str)
def test_error_budget(kind, option, dtype, backend, entropy):
    options = dict(OPTIONS[option], entropy=entropy)
    inputs = problem(kind, dtype, bias=options.pop("bias", False))
    outputs, grads = evaluate(backend, dtype, *inputs, **options)
    plain, plain_grads = evaluate("reference", dtype, *inputs, **options)
    exact, exact_grads = evaluate("reference", torch.float64, *inputs, **options)
    eps = torch.finfo(dtype).eps * (H if dtype == torch.float64 else 1)
    # The products are those of the factors in `dtype`, which the reference does not round to it.
    assert_within_budget(outputs, plain, exact, eps if dtype == torch.bfloat16 else min(eps, EPS))
    assert_within_budget(grads, plain_grads, exact_grads, eps)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("spread", [1e-3, 40.0])
def test_confident_rows_keep_their_relative_accuracy(spread, backend):
    """With p_y near 1 the log-prob and the gradient are tiny, and lost unless the target is kept apart."""
    hidden, weight, targets, options = problem("lora", torch.float32, ignored=0)
    hidden = torch.nn.functional.normalize(weight, dim=1)[targets] * spread
    found, grads = evaluate(backend, torch.float32, hidden, weight, targets, options)
    exact, exact_grads = evaluate("reference", torch.float64, hidden, weight, targets, options)
    assert ((found[0] - exact[0]).abs() <= 1e-4 * exact[0].abs() + 1e-14).all()
    size = exact_grads[0].abs().amax(1)
    assert ((grads[0] - exact_grads[0]).abs().amax(1) <= 1e-4 * size + 1e-14).all()


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_entries_that_the_bias_rules_out(entropy):
    hidden, weight, targets, options = problem("everything", torch.float32, bias=True, ignored=0)
    options["bias"][:40] = -math.inf  # two tiles, and the first entry of none
    targets = 40 + targets % 30
    args = (torch.float32, hidden, weight, targets, options)
    (outputs, grads), (exact, exact_grads) = (evaluate(b, *args, entropy=entropy) for b in ("torch", "reference"))
    for a, e in zip([*outputs, *grads[:1], *grads[2:]], [*exact, *exact_grads[:1], *exact_grads[2:]], strict=True):
        torch.testing.assert_close(a, e.nan_to_num(), rtol=1e-4, atol=1e-5)
    targets[3] = 2  # ruled out itself
    outputs, grads = evaluate("torch", *args, entropy=entropy)
    assert outputs[0][3] == -math.inf and outputs[0][4:].isfinite().all()


def test_a_row_has_the_same_bits_whatever_is_beside_it():
    hidden, weight, targets, options = problem("everything", torch.float32, ignored=0)
    together, alone = (
        linear_logprobs(hidden[rows], weight, targets[rows], entropy=True, **options)
        for rows in (slice(None), slice(20, 21))
    )
    assert torch.equal(together[0][20:21], alone[0]) and torch.equal(together[1][20:21], alone[1])


def test_no_rows_and_all_rows_ignored():
    hidden, weight, _, options = problem("everything", torch.float32)
    leaf = hidden.requires_grad_()
    assert linear_logprobs(leaf[:0], weight, torch.empty(0, dtype=torch.int64), **options).shape == (0,)
    out = linear_logprobs(leaf, weight, torch.full((N,), -100), **options)
    out.sum().backward()
    assert not out.any() and not leaf.grad.any()


def test_what_does_not_fit_is_refused():
    hidden, weight, targets, options = problem("lora", torch.float32)
    a, b, scale = options["lora"]
    for more, match in (
        ({"lora": (a, b[:-1], scale)}, "lora's a is"),
        ({"lora": (a.T, b, scale)}, "lora's a is"),
        ({"lora": (a, b, None)}, "lora's scale is None"),
        ({"lora": (a, b.long(), scale)}, "lora's b is torch.int64"),
        ({"new_rows": (torch.tensor([1]), a)}, "new_rows' ids are"),
    ):
        with pytest.raises(InputError, match=match):
            linear_logprobs(hidden, weight, targets, **more)
    with pytest.raises(InputError, match=r"weight requires a gradient beside lora"):
        linear_logprobs(hidden, weight.requires_grad_(), targets, lora=(a, b, scale))
