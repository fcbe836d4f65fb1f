"""Attention over packed rows: right to the rounding, gradients too, and blind to what a token must not see."""

from __future__ import annotations

import pytest
import torch

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.backends import cpu
from fastalign.ops.segment_attention import beats_sdpa, segment_attention

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (length, prefix) of segments; one without a prefix begins a group
SHORT = [(5, 0), (3, 2), (1, 2), (4, 0), (2, 3), (1, 0)]
LONG = [(300, 0), (140, 270), (1, 129), (7, 0), (260, 4)]  # several tiles of keys, several blocks of queries


def attend(query, key, value, segments, window, scaling):
    return segment_attention(query, key, value, segments, window, scaling, backend="cpu")


def table(lengths):
    """Segments as the kernel takes them."""
    rows, start, head = [], 0, 0
    for length, prefix in lengths:
        head = head if prefix else start
        rows.append((start, length, head, prefix))
        start += length
    return torch.tensor(rows)


def make(lengths, dtype, heads=4, key_heads=2, width=16, value_width=16, seed=0):
    """q, k, v and the output's gradient; scores have standard deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(length for length, _ in lengths)
    shapes = [(heads, tokens, width), (key_heads, tokens, width), (key_heads, tokens, value_width)]
    inputs = [torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs[0] *= 2
    grad = torch.randn(1, tokens, heads, value_width, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in inputs], grad.to(dtype)


def run(function, inputs, grad, segments, window, scaling):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves, segments, window, scaling)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def budgets(inputs, grad, segments, window, scaling, *, rounds_probs):
    """How far rounding may take output and gradients from their truth: each intermediate's rounding, carried on."""
    dtype = inputs[0].dtype
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    unit = torch.finfo(dtype).eps / 2  # of storing a result
    probs_unit = unit if rounds_probs else 0.0
    shared = inputs[0].shape[1] // inputs[1].shape[1]
    q, k, v = (t.double() for t in inputs)
    k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
    g = grad.double().transpose(1, 2)
    seen = reference.seen_keys(segments, window)
    scores = (scaling * q @ k.mT).masked_fill(~seen, -torch.inf)
    p = scores.softmax(-1)
    out, d_p = p @ v, g @ v.mT
    sizes = scaling * q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).mT
    relative = (8 * eps * (1 + sizes.masked_fill(~seen, 0).amax(-1, keepdim=True))).expand_as(p)  # of a probability
    errors = [p * (relative + probs_unit + 8 * eps) @ v.abs()]
    delta = (g * out).sum(-1, keepdim=True)
    slope = scaling * p * (d_p - delta)
    slope_error = probs_unit * slope.abs() + scaling * p * (
        relative * (d_p - delta).abs()
        + 8 * eps * g.norm(dim=-1, keepdim=True) * v.norm(dim=-1, keepdim=True).mT
        + (unit + 8 * eps) * (g.abs() * out.abs()).sum(-1, keepdim=True)
        + (g.abs() * errors[0]).sum(-1, keepdim=True)
    )
    summed = (slope_error + 8 * eps * slope.abs(), p * (relative + probs_unit + 8 * eps))

    def per_key_head(t):
        return t.unflatten(1, (-1, shared)).sum(2)

    errors[0] = errors[0].transpose(1, 2)
    errors.append(summed[0] @ k.abs())
    errors.append(per_key_head(summed[0].mT @ q.abs()))
    errors.append(per_key_head(summed[1].mT @ g.abs()))
    tiny = torch.finfo(dtype).smallest_normal
    return [e + tiny for e in errors], unit


def check(lengths, dtype, isa, window=None, scaling=0.25, **shape):
    inputs, grad = make(lengths, dtype, **shape)
    segments = table(lengths)
    found = run(attend, inputs, grad, segments, window, scaling)
    truth = run(reference.segment_attention, [t.double() for t in inputs], grad, segments, window, scaling)
    bf16_products = isa == "avx512_bf16" and dtype == torch.bfloat16
    limits, unit = budgets(inputs, grad, segments, window, scaling, rounds_probs=bf16_products)
    for name, ours, exact, limit in zip(("out", "d_query", "d_key", "d_value"), found, truth, limits, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        error = (ours.double() - exact).abs()
        excess = error - unit * exact.abs() - limit
        assert (excess <= 0).all(), f"{name}: {error.max():.1e} off, {excess.max():.1e} too much"


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_short_segments(dtype, window, isa):
    check(SHORT, dtype, isa, window)


@pytest.mark.parametrize("window", [None, 200, 290])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_segments(dtype, window, isa):
    check(LONG, dtype, isa, window, heads=2, key_heads=1)


def test_windows_that_end_where_tiles_do(isa):
    """A tile of 256 keys is left out from the block on that does not see its last, and masked from the panel on whose
    last query does not see its first."""
    panel = cpu.module.kernels(isa).panel_f32
    last = -(-255 // panel) * panel + panel - 1  # query of the first panel that sees all of the first tile
    for window in (*range(253, 260), *range(last - 1, last + 3)):
        check([(540, 0)], torch.float32, isa, window, heads=1, key_heads=1, width=4, value_width=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    {"width": 1, "value_width": 1}, {"width": 7, "value_width": 5}, {"width": 80, "value_width": 72},
    {"heads": 3, "key_heads": 3, "width": 64, "value_width": 64}, {"heads": 6, "key_heads": 1},
    {"width": 5, "value_width": 40},
])  # fmt: skip
def test_shapes(shape, dtype, isa):
    check([(40, 0), (30, 33), (70, 0), (1, 0)], dtype, isa, **shape)


def test_one_token(isa):
    check([(1, 0)], torch.float32, isa)


def test_gradcheck(isa):
    inputs, _ = make(SHORT, torch.float64, heads=2, key_heads=1, width=3, value_width=2)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: attend(*t, table(SHORT), 3, 0.5), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart(dtype, isa):
    inputs, grad = make(SHORT, dtype)
    inputs[0] *= 200
    out = run(attend, inputs, grad, table(SHORT), None, 0.25)
    assert all(t.isfinite().all() for t in out)
    truth = reference.segment_attention(*(t.double() for t in inputs), table(SHORT), None, 0.25)
    scores = 200 * 2 * 16**0.5 * 4  # of their size, as far as they are rounded before the exponential
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert (out[0].double() - truth).abs().max() < 8 * eps * scores + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype, isa):
    inputs, grad = make(LONG, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(attend, inputs, grad, table(LONG), None, 0.25))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_has_the_same_bits_in_any_row(dtype, isa):
    inputs, grad = make(LONG, dtype)
    whole = run(attend, inputs, grad, table(LONG), None, 0.25)
    first = sum(length for length, _ in LONG[:3])
    alone = run(attend, [t[:, :, first:] for t in inputs], grad[:, first:], table(LONG[3:]), None, 0.25)
    assert torch.equal(whole[0][:, first:], alone[0])
    assert all(torch.equal(w[:, :, first:], a) for w, a in zip(whole[1:], alone[1:], strict=True))


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_completion_has_the_same_bits_with_a_shared_prompt_or_its_own(dtype, window, isa):
    (q, k, v), _ = make([(300, 0), (140, 270)], dtype)
    tokens = [*range(270), *range(300, 440)]
    shared = attend(q, k, v, table([(300, 0), (140, 270)]), window, 0.25)
    own = attend(*(t[:, :, tokens] for t in (q, k, v)), table([(410, 0)]), window, 0.25)
    assert torch.equal(shared[:, tokens], own)


def test_what_a_token_does_not_see_does_not_reach_it(isa):
    inputs, _ = make(LONG, torch.float32)
    segments, token = table(LONG), 290  # of the first segment, behind every prefix
    plain = attend(*inputs, segments, None, 0.25)
    inputs[1][:, :, token] *= -3
    inputs[2][:, :, token] = 1e30
    out = attend(*inputs, segments, None, 0.25)
    seen = reference.seen_keys(segments)[:, token]
    assert torch.equal(out[:, ~seen], plain[:, ~seen])
    assert (out[:, seen].abs().amax(-1) > 1e3).all() and seen.sum() == 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_an_expanded_gradient(dtype, isa):
    (q, k, v), _ = make(SHORT, dtype)
    ones = torch.ones(1, q.shape[2], q.shape[1], v.shape[3])
    expected = run(attend, (q, k, v), ones, table(SHORT), None, 0.25)
    joined = torch.cat([q, k, v], 1).transpose(1, 2).contiguous().transpose(1, 2)  # (T, heads, width) in memory
    parts = [t.requires_grad_() for t in joined.split([4, 2, 2], 1)]
    out = attend(*parts, table(SHORT), None, 0.25)
    assert torch.equal(out, expected[0])
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), parts), expected[1:]))
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)  # no unit stride along the width
    assert torch.equal(attend(turned, k, v, table(SHORT), None, 0.25), expected[0])


def test_gradients_of_some_inputs_alone_and_no_second_derivative():
    (q, k, v), grad = make(SHORT, torch.float32)
    expected = run(attend, (q, k, v), grad, table(SHORT), None, 0.25)
    q.requires_grad_()
    out = attend(q, k, v, table(SHORT), None, 0.25)
    assert torch.equal(torch.autograd.grad(out, q, grad, retain_graph=True)[0], expected[1])
    (again,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


def test_which_calls_it_takes():
    (q, k, v), _ = make(SHORT, torch.float32)
    assert beats_sdpa(q, k, v) == cpu.is_fast(torch.float32)
    assert not beats_sdpa(torch.cat([q, q]), torch.cat([k, k]), torch.cat([v, v]))
    assert not beats_sdpa(q, k[:, :, 1:], v[:, :, 1:]) and not beats_sdpa(q, k, v[:, :1])
    assert not beats_sdpa(q[:, :3], k, v) and not beats_sdpa(q[..., 1:], k, v)
    assert not beats_sdpa(q, k.bfloat16(), v)
    assert not beats_sdpa(q.double(), k.double(), v.double())
    assert not beats_sdpa(*(t.to("meta") for t in (q, k, v)))
    found = []
    torch.vmap(lambda t: (found.append(beats_sdpa(t, t, t)), t)[1])(q)
    assert found == [False]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends(backend, window):
    inputs, grad = make(SHORT, torch.float64)

    def other(*args):
        return segment_attention(*args, backend=backend)

    found, truth = (run(f, inputs, grad, table(SHORT), window, 0.25) for f in (other, reference.segment_attention))
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_defaults():
    (q, k, v), _ = make(SHORT, torch.float32)
    if cpu.is_fast(torch.float32):
        assert torch.equal(segment_attention(q, k, v, table(SHORT)), attend(q, k, v, table(SHORT), None, 0.25))
    wide = [t.double() for t in (q, k, v)]
    torch_s = segment_attention(*wide, table(SHORT), backend="torch")
    assert torch.equal(segment_attention(*wide, table(SHORT)), torch_s), "float64 is no faster in C++"


def test_opcheck():
    (q, k, v), _ = make(SHORT, torch.float32)
    op, segments, options = torch.ops.fastalign, table(SHORT), (3, 0.25)
    args = (q[0], k[0], v[0], segments, *options)
    torch.library.opcheck(op.segment_attention.default, args)
    out, log_sums = op.segment_attention(*args)
    grad = torch.ones(out.shape).transpose(0, 1)
    torch.library.opcheck(
        op.segment_attention_backward.default, (grad, q[0], k[0], v[0], out, log_sums, segments, *options)
    )


def test_compiles_in_one_graph_to_the_same_bits():
    inputs, grad = make(SHORT, torch.float32)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, expected = (run(f, inputs, grad, table(SHORT), None, 0.25) for f in (compiled, attend))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(4, 16, 16)}, ("(4, 16, 16)", "(1, heads, T, width)")),
        ({"key": torch.zeros(1, 3, 16, 16)}, ("(1, 3, 16, 16)", "key_heads divides heads")),
        ({"value": torch.zeros(1, 2, 15, 16)}, ("(1, 2, 15, 16)", "(1, key_heads, T, Dv)")),
        ({"key": torch.zeros(1, 2, 16, 16).bfloat16()}, ("torch.bfloat16", "one dtype")),
        ({"segments": torch.zeros(6, 3).long()}, ("(6, 3)", "(S, 4) int64 on the CPU")),
        ({"segments": torch.zeros(6, 4)}, ("torch.float32", "(S, 4) int64 on the CPU")),
    ],
    ids=str,
)
def test_errors_say_what_was_found_and_what_to_do(change, words):
    (q, k, v), _ = make(SHORT, torch.float32)
    with pytest.raises(InputError) as error:
        segment_attention(**{"query": q, "key": k, "value": v, "segments": table(SHORT)} | change)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_backend_lists_the_known():
    (q, k, v), _ = make(SHORT, torch.float32)
    with pytest.raises(BackendError, match=r"'tpu'; segment_attention has auto, reference, torch, cpu"):
        segment_attention(q, k, v, table(SHORT), backend="tpu")
