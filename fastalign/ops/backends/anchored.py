"""The kernels of the anchored driver (kernels/anchored_logprobs.py) seen from it: can they run, and their launches.

`fastalign/ops/head/anchored.py` is the driver, and explains the mathematics.
"""

from __future__ import annotations

import logging
import math
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.backends import triton
from fastalign.ops.head.transform import LogitTransform

# Copies by descriptor, which the scan's loads are, came with this compute capability (Hopper).
CAPABILITY = (9, 0)
# `triton.tools.tensor_descriptor` with strided descriptors on the host.
TRITON = (3, 4)
_BYTES = 16  # what rows must begin at a multiple of
# GPU -> why these kernels are not used there, or None, from the first use on.
_tried: dict[torch.device, str | None] = {}

logger = logging.getLogger("fastalign")


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the driver cannot take these tensors, hidden states and the output layer's weight first, or None."""
    if why := triton.why_not(*tensors):
        return why
    found = version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < TRITON:
        return f"triton is {found}; it needs {TRITON[0]}.{TRITON[1]} or newer: pip install -U triton"
    hidden, weight = tensors[0], tensors[1] if len(tensors) > 1 else None
    if hidden is None or weight is None:
        return "it takes hidden states and the output layer's weight"
    if hidden.dtype != weight.dtype or weight.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden is {hidden.dtype} and weight {weight.dtype}; it takes both bfloat16 or both float16"
    if hidden.is_cuda:
        capability = torch.cuda.get_device_capability(hidden.device)
        if torch.version.hip or capability < CAPABILITY:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}; it needs 9.0 or more"
    per_row = _BYTES // weight.element_size()
    if weight.stride(1) != 1 or weight.stride(0) % per_row or weight.storage_offset() % per_row or hidden.shape[-1] < 8:
        return (
            f"weight has the strides {weight.stride()}; its rows must be dense and begin at multiples of {_BYTES} "
            f"bytes: the width of the hidden states must be a multiple of {per_row}"
        )
    # Shapes without memory (FakeTensor) cannot be tried.
    return _why_distrusted(hidden.device) if hidden.is_cuda and type(hidden) in (Tensor, torch.nn.Parameter) else None


def _why_distrusted(device: torch.device) -> str | None:
    """Why the kernels are not used on this GPU, or None. The first call tries them, the others remember."""
    if device not in _tried:
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured, and the kernels have not been tried on this GPU yet"
        if why := try_out(device):
            logger.warning("The anchored kernels are not used on %s: %s. The tiled kernels run instead.", device, why)
        _tried[device] = why
    return _tried[device]


@torch.no_grad()
def try_out(device: torch.device) -> str | None:
    """Runs the forward kernels on a small problem; returns what is wrong with their results, or None.

    The kernels are proved without a GPU. A GPU or a compiler that computes something else must not go unnoticed.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(device, torch.bfloat16) for n in (48, 700))
    targets = torch.arange(48, device=device) * 13
    layer = Layer(hidden, weight, targets, None, LogitTransform())
    e = hidden.new_empty(48, 704)[:, :700]
    try:
        sums = scan(layer, e, entropy=False)
        gradient = e.float() @ weight.float()
        logprobs = finish(layer, sums, a=gradient)[0]
    except Exception as error:  # whatever a compiler or a driver raises
        return f"they fail ({type(error).__name__}: {error})"
    rows, table = hidden.double(), weight.double()
    exact = (rows @ table.T).log_softmax(-1)  # (48, 700)
    off = (logprobs - exact.gather(1, targets[:, None])[:, 0]).abs().max().item()
    off_gradient = (gradient - (table[targets] - exact.exp() @ table)).abs().max().item()
    # Log-probs are float32 sums; the gradient is made of exponentials that are rounded to bfloat16.
    if off <= 1e-3 and off_gradient <= 0.05:
        return None
    return f"their log-probs are off by {off:.3g} and their gradients by {off_gradient:.3g} on a small problem"


class Layer(NamedTuple):
    """The inputs of some rows, as all kernels here take them."""

    hidden: Tensor  # (R, H) bfloat16 or float16; rows begin at multiples of 16 bytes
    weight: Tensor  # (V, H) of the same dtype; rows begin at multiples of 16 bytes
    targets: Tensor  # (R,) int64, each of them in the vocabulary
    bias: Tensor | None  # (V,)
    transform: LogitTransform

    def numbers(self) -> tuple[float, float | None, float | None]:
        """The kernels' factor2, inner and outer2."""
        t, log2e = self.transform, math.log2(math.e)
        if t.softcap is None:
            return t.factor * log2e, None, None
        return t.factor * log2e, t.logit_scale / t.softcap, t.softcap / t.temperature * log2e


class Sums(NamedTuple):
    """What the forward kernels leave per row (R,), and per vocabulary tile and row (tiles, R)."""

    own: Tensor  # the target's logit, in units of log2
    anchor: Tensor
    base: Tensor  # what the entropy's logarithms are relative to
    partial: Tensor
    zpartial: Tensor | None  # for the entropy only


def _kernels() -> Any:
    from fastalign.kernels import anchored_logprobs

    return anchored_logprobs


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int, *, least: int, most: int = 1 << 30) -> int:
    """The smallest power of two that is not below n, within bounds."""
    return min(max(least, 1 << (n - 1).bit_length()), most)


def _tiles_of(layer: Layer) -> tuple[Any, int]:
    """The tiles of the scan, and how many programs share them: one per multiprocessor, which stays."""
    device, capped = layer.hidden.device, layer.transform.softcap is not None
    if device.type != "cuda":  # interpreted
        return _kernels().tiles_for((0, 0), capped=capped), 3
    properties = torch.cuda.get_device_properties(device)
    tiles = _kernels().tiles_for((properties.major, properties.minor), capped=capped)
    return tiles, properties.multi_processor_count


def _launch_scan(layer: Layer, e: Tensor | None, anchor: Tensor, first: int, tensors: tuple, **constants) -> None:
    """Launches `scan`; tensors: base, partial, zpartial, slope_1, slope_2 and at_target."""
    (rows, width), vocab = layer.hidden.shape, layer.weight.shape[0]
    kernels, (tiles, programs) = _kernels(), _tiles_of(layer)
    # Where nothing is kept, the descriptor is of memory that nothing is written to.
    out = layer.hidden.new_empty(tiles.m, tiles.n, dtype=torch.bfloat16) if e is None else e
    blocks = (layer.hidden, tiles.m, tiles.k), (layer.weight, tiles.n, tiles.k), (out, tiles.m, tiles.n // tiles.parts)
    descriptors = [kernels.TensorDescriptor.from_tensor(t, [height, across]) for t, height, across in blocks]
    base, *rest = tensors
    programs = min(programs, _cdiv(rows, tiles.m) * _cdiv(vocab, tiles.n))
    kernels.scan[(programs,)](
        *descriptors, anchor, base, layer.targets, first, layer.bias, *layer.numbers(), *rest, rows, vocab, width,
        int(e is not None), programs, BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, FLATTEN=tiles.flatten,
        PARTS=tiles.parts, num_warps=tiles.warps, num_stages=tiles.stages, **constants,
    )  # fmt: skip


def scan(layer: Layer, e: Tensor | None, *, entropy: bool) -> Sums:
    """Exponentials of all entries relative to each row's anchor, and their sums.

    Args:
        layer: The inputs.
        e: (R, V) bfloat16, whose rows begin at multiples of 16 bytes, receives the exponentials (with a soft cap times
            1 - tanh^2), 0 at the target. None: only the sums are wanted.
        entropy: Whether the sums for the entropy are wanted.
    """
    (rows, width), vocab = layer.hidden.shape, layer.weight.shape[0]
    kernels, tiles = _kernels(), _tiles_of(layer)[0]
    count = _cdiv(vocab, tiles.n)
    own, anchor, base = layer.hidden.new_empty(3, rows, dtype=torch.float32).unbind(0)
    partial = own.new_empty(count, rows)
    zpartial = own.new_empty(count, rows) if entropy else None
    ends = layer.hidden, layer.hidden.stride(0), layer.weight, layer.weight.stride(0), layer.targets, layer.bias
    block = _power_of_2(width, least=16, most=1024)
    kernels.anchor[(rows,)](*ends, *layer.numbers(), own, anchor, base, width, BLOCK=block, num_warps=4)
    _launch_scan(layer, e, anchor, 0, (base, partial, zpartial, None, None, None), GRADIENT=False, ENTROPY=entropy)
    kernels.rescue[(rows,)](
        *ends, *layer.numbers(), partial, zpartial, count, rows, anchor, base, e, 0 if e is None else e.stride(0),
        int(e is not None), vocab, width, TILES=_power_of_2(count, least=2), TILE=tiles.n,
        BLOCK=min(32, tiles.n), CHUNK=64, ENTROPY=entropy, num_warps=4,
    )  # fmt: skip
    return Sums(own, anchor, base, partial, zpartial)


def finish(
    layer: Layer, sums: Sums, *, a: Tensor | None = None, e: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Results of R rows: log-probs (R,), entropies (R,) or None, and stats (R, 5).

    Args:
        layer: The inputs.
        sums: What `scan` returned.
        a: (R, H) float32 or None: e W, which becomes d logprob / d hidden in place.
        e: (R, V) or None: receives the target's entry, so that e' times coefficients is the gradient in W.

    Returns:
        Stats are per row: the logarithm to base 2 of the sum of exponentials, the sum relative to the anchor, 1 - p_y,
        dz/du at the target, and the entropy (0 unless wanted).
    """
    rows, width = layer.hidden.shape
    kernels, count, entropy = _kernels(), sums.partial.shape[0], sums.zpartial is not None
    logprobs, entropies, stats = sums.own.new_empty(rows), sums.own.new_empty(rows), sums.own.new_empty(rows, 5)
    kernels.finish[(rows,)](
        sums.partial, sums.zpartial, count, rows, sums.own, sums.anchor, sums.base, layer.targets, layer.weight,
        layer.weight.stride(0), layer.transform.factor, layer.numbers()[2], a, 0 if a is None else a.stride(0), width,
        e, 0 if e is None else e.stride(0), logprobs, entropies, stats, TILES=_power_of_2(count, least=2),
        BLOCK=_power_of_2(width, least=16, most=1024), ENTROPY=entropy, num_warps=4,
    )  # fmt: skip
    return logprobs, entropies if entropy else None, stats


def gradient(
    layer: Layer, first: int, lse2: Tensor, slope_1: Tensor, slope_2: Tensor | None, at_target: Tensor, du: Tensor
) -> None:
    """The gradient in u of R rows: p_j (slope_1 + slope_2 log2 p_j) (1 - tanh^2), but at_target at the target.

    Args:
        layer: The inputs; its weight and bias may be a part of the vocabulary.
        first: The vocabulary entry that this part begins with.
        lse2: (R,) logarithm to base 2 of the sum of exponentials over the whole vocabulary.
        slope_1: (R,).
        slope_2: (R,), or None for 0.
        at_target: (R,).
        du: (R, V), receives the gradient.
    """
    tensors = (None, None, None, slope_1, slope_2, at_target)
    _launch_scan(layer, du, lse2, first, tensors, GRADIENT=True, ENTROPY=False)
