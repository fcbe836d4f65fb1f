"""Log-probabilities over an output layer that is read in tiles: the op `linear_logprobs` per tile, and the sum of all.

The op takes a tile for a vocabulary. Per row and tile c it returns L_c = logsumexp(z), the entropy H_c, and gradients.
The distribution over the whole vocabulary is the mixture of those of the tiles with the weights `pi_c = exp(L_c - L)`,
where L is the logsumexp over all tiles. With E_c = E_c[slope W] and the tile t that holds the target:

    logprob              = logprob_t + log pi_t
    d logprob / d hidden = d logprob_t / d hidden + sum_{c != t} pi_c (E_t - E_c)
    E_c[log p]           = L_c - H_c - L
    entropy              = -sum_c pi_c E_c[log p]
    d entropy / d hidden = sum_c pi_c (d H_c / d hidden - (E_c[log p] + entropy) E_c)

The sums run over the tiles without the target, so that nothing cancels where p_y is near 1. E_c comes from the gradient
that the op returns: `E_c = slope_y W[y] - d logprob_c / d hidden`, where y is the target in its tile, and the tile's
first entry in others.

**Gradients of an adapter.** With `h (W + s b a)' = [h, h a'] [W, s b]'` the one pass over the frozen [W, s b] gives the
gradients in h and in h a', hence that of a. Only b's needs probabilities again: `d b = s (d u)' (h a')`, (V, r).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from fastalign.ops.backends import cpu_head
from fastalign.ops.head import logprobs_tiles
from fastalign.ops.head.epilogue import TORCH, Stats
from fastalign.ops.head.products import operand
from fastalign.ops.head.rows import ScoredRows, find_rows_with_target
from fastalign.ops.head.tiling import START, pad_rows, row_slices
from fastalign.ops.head.transform import LogitTransform
from fastalign.ops.head.weights import ComposedWeight, Lora, NewRows, PackedWeight, product_dtype


class ChunkedCall(NamedTuple):
    """The arguments of one call that have no gradient."""

    transform: LogitTransform
    entropy: bool
    grads: bool  # whether any gradient will be wanted
    backend: str
    scale: float  # of the adapter
    packed: PackedWeight | None  # the weight, where it is no tensor


class _Part(NamedTuple):
    """What one tile, or the mixture of some, says about R rows. Gradients are None where they are not wanted."""

    shift: Tensor  # (R,) near the largest logit
    total: Tensor  # (R,) sum exp(z - shift)
    logprobs: Tensor  # (R,) of the target in the tile
    slope: Tensor  # (R,) dz/du at the target
    entropy: Tensor | None  # (R,)
    grad: Tensor | None  # (R, H) d logprob / d hidden
    d_entropy: Tensor | None  # (R, H)


class ChunkedResult(NamedTuple):
    """Per row, over the whole vocabulary. The logarithm of the total would be rounded more coarsely than its parts."""

    logprobs: Tensor  # (N,)
    entropy: Tensor | None  # (N,)
    shift: Tensor  # (N,) near the largest logit
    total: Tensor  # (N,) sum exp(z - shift)
    grad: Tensor | None  # (N, H)
    d_entropy: Tensor | None  # (N, H)

    def stats(self, slope: Tensor) -> Stats:
        """What the backward passes of single tiles need; `slope` (N,) is dz/du at the target."""
        mean = torch.zeros_like(self.total) if self.entropy is None else self.total.log() - self.entropy
        others, target = -torch.expm1(self.logprobs) * self.total, self.logprobs.exp() * self.total
        return Stats(self.shift, others, target, slope, mean)

    def rows(self, rows: slice) -> ChunkedResult:
        """Those of some rows."""
        return ChunkedResult._make(None if t is None else t[rows] for t in self)


def _block_rows(device: torch.device) -> int:
    """How many rows are folded at a time. Each needs several sums of width H, and every block reads all tiles."""
    return 1024 if device.type == "cpu" else 4096


def _score(
    hidden: Tensor, tile: Tensor, targets: Tensor, bias: Tensor | None, call: ChunkedCall, *, grads: bool
) -> _Part:
    """The op over one tile."""
    logprobs, entropy, grad, d_entropy, stats, *_ = torch.ops.fastalign.linear_logprobs(
        hidden, tile, targets, bias, *call.transform, None, grads, call.entropy, 0, backend=call.backend
    )
    total = stats[:, 1] + stats[:, 2]
    if bias is not None:  # it may rule out all entries of a tile: 0 / 0
        dead = _column(total == 0)
        logprobs = logprobs.masked_fill(dead[:, 0], -torch.inf)
        entropy = entropy.masked_fill(dead[:, 0], 0.0) if call.entropy else entropy
        grad, d_entropy = (g.masked_fill_(dead, 0.0) if g.numel() else g for g in (grad, d_entropy))
    return _Part(
        stats[:, 0], total, logprobs, stats[:, 3], entropy if call.entropy else None, grad if grads else None,
        d_entropy if grads and call.entropy else None,
    )  # fmt: skip


class _Others:
    """Running sums over the tiles that do not hold a row's target, relative to their largest shift m."""

    def __init__(self, like: Tensor, width: int, call: ChunkedCall, *, grads: bool):
        self.m = torch.full_like(like, START)  # (R,)
        self.s = torch.zeros_like(like)  # (R,) sum_c total_c exp(shift_c - m)
        self.z = torch.zeros_like(like)  # (R,) the same sum of E_c[z - m]
        self.a = like.new_zeros(len(like), width) if grads else None  # (R, H), of E_c
        both = grads and call.entropy
        self.b = like.new_zeros(len(like), width) if both else None  # (R, H), of E_c[(z - m) slope W]

    def add(self, part: _Part, mine: Tensor, first_row: Tensor) -> None:
        """Fold a tile in, for the rows where `mine` (R,) is False. Their target in it is its first row (H,)."""
        shift = part.shift.masked_fill(mine, START)
        m = torch.maximum(self.m, shift)
        change = self.m - m
        shrink, w = change.exp(), (shift - m).exp_() * part.total.masked_fill(mine, 0.0)
        mean = None
        if part.entropy is not None:
            mean = torch.where(w > 0, shift - m + part.total.log() - part.entropy, 0.0)  # E_c[z - m]
            self.z = shrink * (self.z + change * self.s) + w * mean
        if self.a is not None and part.grad is not None:
            if self.b is not None and part.d_entropy is not None and mean is not None:
                # E_c[(z - m) slope W] = E_c[z - m] E_c - d H_c / d hidden
                self.b.addcmul_(self.a, _column(change)).mul_(_column(shrink))
                self.b.addcmul_(part.grad, _column(-w * mean)).addr_(w * mean * part.slope, first_row)
                self.b.addcmul_(part.d_entropy, _column(-w))
            self.a.mul_(_column(shrink)).addcmul_(part.grad, _column(-w)).addr_(w * part.slope, first_row)
        self.m, self.s = m, shrink * self.s + w


class _Own:
    """What the tile that holds a row's target says about the row, and E of that tile."""

    def __init__(self) -> None:
        self.part: _Part | None = None
        self.expected: Tensor | None = None  # (R, H)

    def take(self, part: _Part, mine: Tensor, tile: Tensor, local: Tensor) -> None:
        """Note the rows where `mine` is True; `local` (R,) are their targets in the tile."""
        expected = None
        if part.grad is not None:
            expected = (tile[local].to(part.grad.dtype) * _column(part.slope)).sub_(part.grad)
        if self.part is None:
            self.part, self.expected = part, expected
            return
        self.part = _Part._make(_pick(mine, new, old) for new, old in zip(part, self.part, strict=True))
        self.expected = _pick(mine, expected, self.expected)


def _pick(mine: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    if new is None or old is None:
        return None
    return torch.where(_column(mine) if new.dim() == 2 else mine, new, old)


def _column(t: Tensor) -> Tensor:
    return t.unsqueeze(1)


def _mix(own: _Own, others: _Others) -> ChunkedResult:
    """The formulas at the head of this file, with the tile that holds the target as one part and all others as one."""
    part, expected = own.part, own.expected
    assert part is not None  # a vocabulary has a tile
    apart = others.s.log() - part.total.log() + (others.m - part.shift)  # log of how much likelier the others are
    of_others, of_own = apart.sigmoid(), (-apart).sigmoid()
    shift = torch.maximum(others.m, part.shift)
    total = others.s * (others.m - shift).exp() + part.total * (part.shift - shift).exp()
    some = others.s.clamp(min=torch.finfo(others.s.dtype).tiny)
    grad = d_entropy = entropy = None
    if part.grad is not None and expected is not None and others.a is not None:
        grad = torch.addcmul(part.grad, expected - others.a / _column(some), _column(of_others))
    if part.entropy is not None:
        log_sum = total.log()  # relative to the shift
        own_mean = torch.where(of_own > 0, part.shift - shift + part.total.log() - part.entropy - log_sum, 0.0)
        of_m = torch.where(of_others > 0, others.m - shift - log_sum, 0.0)
        entropy = -(of_own * own_mean + of_others * (others.z / some + of_m))
        if others.b is not None and others.a is not None and part.d_entropy is not None and expected is not None:
            d_entropy = (part.d_entropy - expected * _column(own_mean + entropy)).mul_(_column(of_own))
            d_entropy -= (others.b + others.a * _column(of_m + entropy)) * _column(of_others / some)
    return ChunkedResult(part.logprobs - softplus(apart), entropy, shift, total, grad, d_entropy)


def forward(
    hidden: Tensor, weight: ComposedWeight, targets: Tensor, bias: Tensor | None, call: ChunkedCall, *, grads: bool
) -> ChunkedResult:
    """Log-probabilities, entropies, and with `grads` their gradients in hidden.

    Args:
        hidden: (N, H + r): hidden states, and their product with the adapter's a.
        weight: (V, H + r) in tiles.
        targets: (N,) token ids.
        bias: (V,) or None.
        call: The other arguments.
        grads: Whether the gradients are wanted.
    """
    # Without gradients a row needs a few numbers only, and one walk over the tiles serves all rows.
    step = _block_rows(hidden.device) if grads else max(len(hidden), 1)
    blocks = [
        _fold(hidden[rows], weight, targets[rows], bias, call, grads=grads)
        for rows in row_slices(len(hidden), step) or [slice(0, 0)]
    ]
    if len(blocks) == 1:
        return blocks[0]
    return ChunkedResult._make(None if part[0] is None else torch.cat(part) for part in zip(*blocks, strict=True))


def _fold(
    hidden: Tensor, weight: ComposedWeight, targets: Tensor, bias: Tensor | None, call: ChunkedCall, *, grads: bool
) -> ChunkedResult:
    others, own = None, _Own()
    for start, stop, tile in weight.tiles(hidden):
        mine = (targets >= start) & (targets < stop)
        local = torch.where(mine, targets - start, 0)
        part = _score(hidden, tile, local, None if bias is None else bias[start:stop], call, grads=grads)
        others = others or _Others(part.total, hidden.shape[1], call, grads=grads)
        others.add(part, mine, tile[0].to(part.total.dtype))
        own.take(part, mine, tile, local)
    assert others is not None  # a vocabulary has a tile
    return _mix(own, others)


def factor_gradients(
    d_logprobs: Tensor, d_entropy: Tensor | None, hidden: Tensor, factor: Tensor, weight: ComposedWeight,
    targets: Tensor, bias: Tensor | None, result: ChunkedResult, call: ChunkedCall,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradients in `scale * b` (V, r), and in bias (V,) where there is one, from probabilities formed anew.

    The op that forms the gradient of a trainable weight (T, H + r) of a tile is given `factor` in the place of the
    hidden states, so that it forms the last r columns alone. For rows whose target lies in another tile, the target is
    the tile's spare row, whose gradient is dropped.

    Args:
        d_logprobs: (N,).
        d_entropy: (N,) or None.
        hidden: (N, H + r).
        factor: (N, r), the last columns of hidden.
        weight: As in `forward`.
        targets: (N,).
        bias: (V,) or None.
        result: Of `forward`.
        call: As in `forward`.
    """
    vocab, rank = weight.weight.shape[0], factor.shape[1]
    dtype = d_logprobs.dtype
    d_b = d_logprobs.new_zeros(vocab, rank)
    d_bias = None if bias is None else d_logprobs.new_zeros(vocab)
    for start, stop, tile in weight.tiles(hidden, spare=True):
        of_bias = None if bias is None else torch.cat([bias[start:stop], bias[stop - 1 : stop]])
        for rows in row_slices(len(hidden), _block_rows(hidden.device)):
            y, h = targets[rows], hidden[rows]
            local = torch.where((y >= start) & (y < stop), y - start, stop - start)
            size = _cached_rows(len(h), h.dtype, call.backend) if d_entropy is None else 0
            *_, slope, cache, shifts = _probabilities(h, tile, local, of_bias, call, size)
            stats = result.rows(rows).stats(slope)  # in the place of the tile's own: sums over the whole vocabulary
            needs = [False, rank > 0, bias is not None]
            inputs = factor[rows] if d_entropy is None and rank else h
            _, d_tile, d_tile_bias = torch.ops.fastalign.linear_logprobs_backward(
                d_logprobs[rows], None if d_entropy is None else d_entropy[rows], inputs, tile[:, -inputs.shape[1] :],
                local, of_bias, torch.stack(stats, 1), cache, shifts, *call.transform, None, needs,
                backend=call.backend,
            )  # fmt: skip
            if rank:
                d_b[start:stop] += d_tile[:-1, d_tile.shape[1] - rank :].to(dtype)
            if d_bias is not None:
                d_bias[start:stop] += d_tile_bias[:-1].to(dtype)
    return d_b, d_bias


def _probabilities(hidden, tile, targets, bias, call: ChunkedCall, cache_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """dz/du at the targets (N,), and the cached probabilities of a tile with their shifts."""
    out = torch.ops.fastalign.linear_logprobs(
        hidden, tile, targets, bias, *call.transform, None, False, False, cache_rows, backend=call.backend
    )
    return out[4][:, 3].contiguous(), out[5], out[6]


def _cached_rows(rows: int, dtype: torch.dtype, backend: str) -> int:
    """How many rows a cache of all `rows` has."""
    everything = 1 << 62
    if backend == "cpu":
        return cpu_head.cacheable_rows(rows, dtype, 1, everything)
    return logprobs_tiles.cacheable_rows(rows, 1, everything)


def new_row_gradients(
    d_logprobs: Tensor, d_entropy: Tensor | None, hidden: Tensor, weight: ComposedWeight, factor: Tensor | None,
    targets: Tensor, bias: Tensor | None, result: ChunkedResult, call: ChunkedCall,
) -> Tensor:  # fmt: skip
    """The gradient in the k new rows, (k, H), from their k logits per row.

    The arguments are those of `factor_gradients`, with the hidden states (N, H) alone, and factor (N, r) or None.
    """
    assert weight.new_rows is not None
    ids, rows = weight.new_rows
    dtype = result.logprobs.dtype
    order = ids.sort()
    place = torch.searchsorted(order.values, targets).clamp_(max=len(ids) - 1)  # where a target stands among the ids
    column = torch.where(order.values[place] == targets, order.indices[place], -1)
    h = hidden.to(dtype)
    u = h @ rows.to(hidden.dtype).to(dtype).t()  # (N, k)
    if weight.b is not None and factor is not None:
        u += factor.to(dtype) @ (weight.b[ids].to(dtype) * weight.scale).t()
    of_bias = None if bias is None else bias[ids].to(dtype)
    z = call.transform.logits_(u.clone() if of_bias is None else u + of_bias)
    slope = call.transform.slope(z.gather(1, column.clamp(min=0).unsqueeze(1)).squeeze(1))
    coefficients = logprobs_tiles.gradient_coefficients(result.stats(slope), d_logprobs, d_entropy)
    TORCH.softmax_gradient(u, column, 0, of_bias, call.transform, coefficients, u)
    return u.t() @ h


class ChunkedLogprobs(torch.autograd.Function):
    """Log-probabilities (N,) and entropies (N,) or None; saves d logprob / d [h, h a'], (N, H + r).

    Arguments: hidden (N, H), weight (V, H) or None where it is packed, a (r, H) and b (V, r) or None, ids (k,) and rows
    (k, H) or None, targets (N,), bias (V,) or None, and a `ChunkedCall`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, a, b, ids, rows, targets, bias, call: ChunkedCall):
        """What the class returns."""
        needs = ctx.needs_input_grad
        composed = _composed(weight, b, ids, rows, call)
        wide = _widened(hidden, a)
        result = forward(wide, composed, targets, bias, call, grads=call.grads and (needs[0] or needs[2]))
        again = call.grads and (needs[3] or needs[5] or needs[7])  # what needs probabilities in the backward pass
        hidden_ = hidden if again or (call.grads and needs[2]) else None
        ctx.call, ctx.hidden_dtype = call, hidden.dtype
        ctx.save_for_backward(hidden_, weight, a, b, ids, rows, targets, bias, *result)
        return result.logprobs, result.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy):
        """The gradients of what `forward` was given."""
        hidden, weight, a, b, ids, rows, targets, bias, *numbers = ctx.saved_tensors
        result, call, needs = ChunkedResult(*numbers), ctx.call, ctx.needs_input_grad
        d_entropy = d_entropy if call.entropy else None
        d_hidden = d_a = d_b = d_rows = d_bias = None
        if result.grad is not None:
            wide = result.grad * _column(d_logprobs)
            if d_entropy is not None and result.d_entropy is not None:
                wide.addcmul_(result.d_entropy, _column(d_entropy))
            width = wide.shape[1] - (0 if a is None else a.shape[0])
            d_hidden = wide[:, :width]
            if a is not None:
                d_a = (wide[:, width:].t() @ hidden.to(wide.dtype)).to(a.dtype) if needs[2] else None
                # a as it entered the product
                d_hidden = d_hidden.addmm(wide[:, width:], a.to(ctx.hidden_dtype).to(wide.dtype)) if needs[0] else None
            d_hidden = d_hidden.to(ctx.hidden_dtype) if needs[0] and d_hidden is not None else None
        if needs[3] or needs[5] or needs[7]:
            composed, wide = _composed(weight, b, ids, rows, call), _widened(hidden, a)
            factor = wide[:, hidden.shape[1] :]
            if needs[5]:
                d_rows = new_row_gradients(
                    d_logprobs, d_entropy, hidden, composed, factor, targets, bias, result, call
                ).to(rows.dtype)
            if needs[3] or needs[7]:
                d_b, d_bias = factor_gradients(
                    d_logprobs, d_entropy, wide, factor.contiguous(), composed, targets, bias, result, call
                )
                d_b = d_b.mul_(call.scale).to(b.dtype) if needs[3] else None
                d_bias = d_bias.to(bias.dtype) if needs[7] and d_bias is not None else None
        return d_hidden, None, d_a, d_b, None, d_rows, None, d_bias, None


def _composed(weight, b, ids, rows, call: ChunkedCall) -> ComposedWeight:
    weight = call.packed if weight is None else weight
    assert weight is not None, "a weight is a tensor or packed"
    return ComposedWeight(weight, b, call.scale, None if ids is None else (ids, rows))


def _widened(hidden: Tensor, a: Tensor | None) -> Tensor:
    """[h, h a'] (N, H + r) in the dtype of h; as many rows enter the product as keep a row's bits, see `pad_rows`."""
    if a is None:
        return hidden
    product = operand(pad_rows(hidden)) @ operand(a.to(hidden.dtype)).t()
    return torch.cat([hidden, product[: len(hidden)].to(hidden.dtype)], 1)


def chunked_logprobs(
    hidden: Tensor, weight: Tensor | PackedWeight, targets: Tensor, bias: Tensor | None, lora: Lora | None,
    new_rows: NewRows | None, transform: LogitTransform, *, ignore_index: int | None, entropy: bool, backend: str,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`linear_logprobs` over a packed weight, or with an adapter or new rows on it. The arguments have been checked."""
    dtype = product_dtype(hidden, weight)
    flat, y = hidden.reshape(-1, hidden.shape[-1]).to(dtype), targets.reshape(-1)
    scored, y = find_rows_with_target(y, ignore_index, weight.shape[0])
    if scored.rows is not None:
        flat = flat.index_select(0, scored.rows)
    if scored.ignored is not None:  # they are computed, and must not turn into NaN
        flat = flat.masked_fill(_column(scored.ignored), 0)
    a, b, scale = (None, None, 1.0) if lora is None else lora
    ids, rows = (None, None) if new_rows is None else new_rows
    packed = None if isinstance(weight, Tensor) else weight
    call = ChunkedCall(transform, entropy, torch.is_grad_enabled(), backend, float(scale), packed)
    with torch.autocast(hidden.device.type, enabled=False):
        out = ChunkedLogprobs.apply(flat, None if packed else weight, a, b, ids, rows, y, bias, call)
    found = [_put_back(t, scored, targets) for t in out if t is not None]
    return (found[0], found[1]) if entropy else found[0]


def _put_back(values: Tensor, scored: ScoredRows, targets: Tensor) -> Tensor:
    """The values (S,) in the places of their rows, zeros elsewhere, shaped like targets."""
    if scored.ignored is not None:
        values = values.masked_fill(scored.ignored, 0)
    if scored.rows is not None:
        values = values.new_zeros(targets.numel()).index_copy(0, scored.rows, values)
    return values.view(targets.shape)
