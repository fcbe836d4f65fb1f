"""The C++ kernels (csrc/cpu) seen from Python: what is built, which instruction set runs, and calls on raw pointers.

The compiled extension `fastalign._cpu` is named `module` here, and "the native module" in messages. It was built
without torch's headers, so everything is passed as an address, and shapes and dtypes are checked in Python before. Its
kernels run in torch's own thread pool, through the stable C function `torch_parallel_for` that is looked up here: no
second OpenMP runtime is started.

FASTALIGN_CPU_ISA in the environment (plain, avx2, avx512 or avx512_bf16) forces one set of kernels. The kernels over an
output layer are called in `cpu_head.py`.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import reference
from fastalign.errors import BackendError
from fastalign.ops.offsets import offsets_error

try:
    from fastalign import _cpu as _extension
except ImportError:  # a checkout that was not built; `fastalign info` says so, and backend="cpu" raises
    _extension = None
module: Any = _extension

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/cpu/base/problem.h
_READABLE = {*_DTYPES, torch.int64, torch.bool}
# A gradient of this size would push everything else out of the caches, so it is written past them.
_STREAMED_BYTES = 8 << 20


@dataclass
class Selection:
    """The kernels in use, or why there are none."""

    kernels: Any = None  # those of one instruction set
    unavailable: str | None = None  # why no kernel can run
    refused: bool = False  # whether FASTALIGN_CPU_ISA is why: then backend="auto" raises instead of falling back
    names: frozenset[str] = frozenset()  # what the kernels, the module and the head's problem offer


in_use = Selection()


def _symbol(name: str) -> int:
    """The address of a function that libtorch exports, or 0."""
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function = getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library)), name)
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


# Without it the kernels start threads themselves.
_parallel_for = _symbol("torch_parallel_for")
_CPUBLAS = "_ZN2at6native7cpublas"  # at::native::cpublas, as compilers other than Microsoft's spell it


def _find_brgemm() -> bool:
    """Hand libtorch's bfloat16 BRGEMM to the kernels, if this torch has one and it runs on this machine."""
    product = _symbol(_CPUBLAS + "6brgemmEllllllbPKN3c108BFloat16ES5_Pfb")
    if not product or not torch.cpu._is_avx512_bf16_supported():
        return False
    return bool(module.set_brgemm(product, _symbol(_CPUBLAS + "14brgemm_releaseEb")))


def host_takes_memory_back() -> bool:
    """Whether this is a virtual machine whose free blocks of 2 MiB go back to its host (virtio-balloon's feature 5).

    There a huge page that the host took is slow to come back. For 200 MiB: 350 ms. Small pages, which stay, take 80 ms,
    and huge ones that the host has not taken yet 13 ms (docs/explanation/cpu-kernels.md).
    """
    balloons = Path("/sys/bus/virtio/drivers/virtio_balloon").glob("virtio*/features")
    try:
        return any(features.read_bytes()[5:6] == b"1" for features in balloons)
    except OSError:  # the folder is hidden from this process: most machines have no balloon
        return False


def select(isa: str | None) -> None:
    """Run the kernels of this instruction set from now on; None: the best one that this machine has.

    Raises:
        BackendError: The module is not built, or has no such kernels, or this machine lacks the instructions.
    """
    why = _why_not_isa(isa)
    if why:
        raise BackendError(why)
    kernels = module.kernels(isa or module.available()[0])
    in_use.kernels, in_use.unavailable, in_use.refused = kernels, None, False
    in_use.names = frozenset([*dir(kernels), *dir(module), *dir(module.ForwardProblem)])


def _why_not_isa(isa: str | None) -> str | None:
    if module is None:
        return "the native module is not built, run `make build`"
    if not hasattr(module, "kernels"):
        return "the native module is older than its sources, run `make build`"
    if isa is None or isa in module.available():
        return None
    if isa in module.compiled():
        return f"this machine lacks the instructions of {isa!r}; it runs {', '.join(module.available())}"
    return f"no kernels named {isa!r} were built; there are {', '.join(module.compiled())}"


def _select_from_environment() -> None:
    isa = os.environ.get("FASTALIGN_CPU_ISA")
    try:
        select(isa or None)
    except BackendError as error:  # said at first use, not at import
        in_use.refused = bool(isa)
        in_use.unavailable = f"FASTALIGN_CPU_ISA={isa} cannot be honoured: {error}" if isa else str(error)


if hasattr(module, "use_huge_pages"):
    module.use_huge_pages(not host_takes_memory_back())
_brgemm = _find_brgemm() if hasattr(module, "set_brgemm") else False
_select_from_environment()


def describe() -> dict[str, Any]:
    """What runs here, for `fastalign info`: instruction set, kernels, threads and their pool, compiler."""
    kernels = in_use.kernels
    return {
        "built": module is not None,
        "isa": kernels.name if kernels else None,
        "unavailable": in_use.unavailable,
        "vector_bits": 8 * kernels.vector_bytes if kernels else None,
        "kernels_available": module.available() if kernels else [],
        "kernels_compiled": module.compiled() if kernels else [],
        "threads": torch.get_num_threads(),
        "thread_pool": "torch" if _parallel_for else "own",
        "brgemm_bf16": _brgemm,
        "compiler": module.compiler if module else None,
        "torch": torch.__version__,
    }


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    if in_use.unavailable:
        return in_use.unavailable
    for t in tensors:
        if t is None:
            continue
        if not t.is_cpu:
            return f"a tensor lies on {t.device}"
        if t.dtype not in _READABLE:
            return f"a tensor is {t.dtype}; it takes float32, float64, bfloat16 and float16"
    return None


def why_no_kernel(name: str) -> str | None:
    """Why this kernel (or what needs this field of the log-probabilities' problem) cannot run, or None."""
    if in_use.unavailable or name in in_use.names:
        return in_use.unavailable
    return "the native module is older than its sources, run `make build`"


def is_fast(dtype: torch.dtype) -> bool:
    """Whether the kernels in use are known to beat the tiled torch driver at this dtype.

    Exceptions are the kernels without vector instructions, and float64 (docs/explanation/cpu-kernels.md).
    """
    return in_use.kernels is not None and in_use.kernels.name != "plain" and dtype != torch.float64


def run(name: str, *arguments: Any) -> Any:
    """Call a kernel of the instruction set in use, in torch's thread pool."""
    return getattr(in_use.kernels, name)(*arguments, torch.get_num_threads(), _parallel_for)


def dtype_code(dtype: torch.dtype) -> int:
    """DType of csrc/cpu/base/problem.h."""
    return _DTYPES[dtype]


def address(t: Tensor | None) -> int:
    """Where a tensor's values begin; 0, a null pointer, for None."""
    return 0 if t is None else t.data_ptr()


def unit_stride(t: Tensor) -> Tensor:
    """A tensor as the kernels take it: any distance between rows, no gaps inside a row."""
    return t if t.stride(-1) == 1 else t.contiguous()


def on_huge_pages(t: Tensor) -> Tensor:
    """The new tensor `t`, whose memory was never written, on huge pages: those come six times as fast as small ones."""
    module.prefer_huge_pages(t.data_ptr(), t.nbytes)
    return t


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The forward op of `segment_sum.py`: values (N,) float32 or float64 -> (S,), added up in float64."""
    values, cu_seqlens = values.contiguous(), cu_seqlens.contiguous()
    out = values.new_empty(cu_seqlens.numel() - 1)
    kernel = module.segment_sum_f64 if values.dtype == torch.float64 else module.segment_sum_f32
    kernel(values.data_ptr(), cu_seqlens.data_ptr(), out.numel(), out.data_ptr())
    return out


def _selective_problem(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int, stats: Tensor
) -> tuple[Any, tuple[Tensor, ...]]:
    """The kernels' problem, and the tensors that must outlive the call.

    Rows may lie at two distances from each other, as those of `logits[:, :-1]` do.
    """
    *outer, vocab = logits.shape
    rows = logits.reshape(math.prod(outer[:-1]), math.prod(outer[-1:]), vocab)  # -1 would be ambiguous without rows
    rows, targets = unit_stride(rows), targets.contiguous()
    problem = module.SelectiveProblem()
    problem.dtype, problem.logits, problem.targets = _DTYPES[logits.dtype], rows.data_ptr(), targets.data_ptr()
    problem.inner, problem.outer_stride, problem.inner_stride = max(rows.shape[1], 1), rows.stride(0), rows.stride(1)
    problem.rows, problem.vocab = targets.numel(), logits.shape[-1]
    problem.ignore_index, problem.temperature, problem.stats = ignore_index, temperature, stats.data_ptr()
    return problem, (rows, targets)


def selective_logprobs(logits: Tensor, targets: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The forward op of `selective_logprobs.py`: log-probs (...) and stats (..., 2)."""
    logprobs = logits.new_empty(targets.shape, dtype=reference.compute_dtype(logits))
    stats = logprobs.new_empty(*targets.shape, 2)
    problem, alive = _selective_problem(logits, targets, temperature, ignore_index, stats)
    problem.logprobs = logprobs.data_ptr()
    run("selective_forward", problem)
    del alive
    return logprobs, stats


def selective_logprobs_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    temperature: float,
    ignore_index: int,
    d_logits: Tensor | None,
) -> None:
    """The backward op of `selective_logprobs.py`: into d_logits, or over the logits where that is None."""
    grad, stats = grad.contiguous(), stats.contiguous()
    problem, alive = _selective_problem(logits, targets, temperature, ignore_index, stats)
    problem.grad, problem.cache_bytes = grad.data_ptr(), _STREAMED_BYTES
    if d_logits is not None:
        problem.d_logits = on_huge_pages(d_logits).data_ptr()
    run("selective_backward", problem)
    del alive


def preference_loss(
    logprobs, cu_seqlens, ref_sums, lengths, labels, kl, form, averaged, alternating, beta, scale, offset, slope
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward op of `preference_loss.py`: losses, rewards, sums, coefficients."""
    inputs = [t if t is None else t.contiguous() for t in (logprobs, cu_seqlens, ref_sums, lengths, labels, kl)]
    tokens, sequences = logprobs.shape[0], cu_seqlens.shape[0] - 1
    losses = logprobs.new_empty(sequences // 2 if labels is None else sequences)
    rewards, sums, coefficients = (logprobs.new_empty(count) for count in (sequences, sequences, tokens))
    kernel = module.preference_loss_f64 if logprobs.dtype == torch.float64 else module.preference_loss_f32
    fits = kernel(
        *map(address, inputs), tokens, sequences, form, averaged, alternating, beta, scale, offset, slope,
        *map(address, (losses, rewards, sums, coefficients)),
    )  # fmt: skip
    if not fits:
        raise offsets_error(cu_seqlens, tokens)
    return losses, rewards, sums, coefficients


def preference_loss_backward(
    grad_losses: Tensor | None,
    grad_sums: Tensor | None,
    coefficients: Tensor,
    cu_seqlens: Tensor,
    items: int,
    alternating: bool,
) -> Tensor:
    """The backward op of `preference_loss.py`."""
    inputs = [t if t is None else t.contiguous() for t in (grad_losses, grad_sums, coefficients, cu_seqlens)]
    out = torch.empty_like(coefficients)
    wide = coefficients.dtype == torch.float64
    kernel = module.preference_loss_backward_f64 if wide else module.preference_loss_backward_f32
    kernel(*map(address, inputs), cu_seqlens.shape[0] - 1, items, alternating, out.data_ptr())
    return out


def accumulate_fisher(fisher: Tensor, grad_output: Tensor, inputs: Tensor, cu_seqlens: Tensor) -> None:
    """`accumulate_fisher_` in one pass; grad_output (T, out) and inputs (T, in) of one dtype."""
    grad_output, inputs, cu_seqlens = unit_stride(grad_output), unit_stride(inputs), cu_seqlens.contiguous()
    run(
        "accumulate_fisher", dtype_code(inputs.dtype), fisher.data_ptr(), fisher.stride(0),
        grad_output.data_ptr(), grad_output.stride(0), inputs.data_ptr(), inputs.stride(0),
        cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, *fisher.shape,
    )  # fmt: skip


def ewc_penalty(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor] | None,
    strength: float,
    grads: Sequence[Tensor] | None = None,
    fresh: Sequence[bool] | None = None,
) -> Tensor:
    """`sum_i F_i (theta_i - theta0_i)^2` over all tensors, a float64 scalar, and its gradient; see `ewc.py`."""
    groups, alive = defaultdict(list), []  # the tensors of the same dtypes go into one call
    for i, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
        fisher = None if fishers is None else fishers[i].to(reference.compute_dtype(parameter))
        grad = None if grads is None else grads[i]
        alive.append(fisher)
        new = bool(grads and fresh and fresh[i])
        if new and grad is not None:  # its pages, mapped one by one, would take longer than what is written to them
            on_huge_pages(grad)
        addresses = [address(t) for t in (parameter, anchor, fisher, grad)]
        groups[parameter.dtype, anchor.dtype].append((parameter.numel(), *addresses, new))
    sums = [run("ewc_penalty", *map(dtype_code, kind), float(strength), rows) for kind, rows in groups.items()]
    del alive
    return torch.tensor(sum(sums), dtype=torch.float64)


def rms_norm(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor | None, eps: float) -> Tensor:
    """Both passes of `rms_norm.py`: without grad the norm, which fills in scale (rows,); with grad d loss / d x."""
    out = torch.empty_like(x)
    addresses = map(address, (x, weight, scale, grad, out))
    run("rms_norm", dtype_code(x.dtype), scale.numel(), weight.numel(), eps, *addresses)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The forward op of `swiglu.py`."""
    out = torch.empty_like(gate)
    run("gated", dtype_code(gate.dtype), gate.numel(), *map(address, (gate, up, out, None, None, None)))
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The backward op of `swiglu.py`: the gradients in gate and up."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    run("gated", dtype_code(gate.dtype), gate.numel(), *map(address, (gate, up, None, grad, d_gate, d_up)))
    return d_gate, d_up


def _heads(t: Tensor | None) -> tuple[int, int, int]:
    """Where the heads of t (heads, T, width) lie: address, distance between heads, distance between tokens."""
    return (0, 0, 0) if t is None else (t.data_ptr(), t.stride(0), t.stride(1))


def segment_attention(
    query: Tensor,  # (heads, T, D)
    key: Tensor,  # (key_heads, T, D)
    value: Tensor,  # (key_heads, T, Dv)
    out: Tensor,  # (T, heads, Dv)
    log_sums: Tensor,  # (T, heads), logarithms of the softmax's normalisers
    segments: Tensor,  # (S, 4)
    window: int,
    scaling: float,
    grad: Tensor | None = None,  # (heads, T, Dv)
    grads: Sequence[Tensor | None] = (None, None, None),  # (T, heads, width) of query, key and value
) -> None:
    """Both passes of `segment_attention.py`: without grad into out and log_sums, with grad into grads."""
    problem = module.AttentionProblem()
    problem.dtype = dtype_code(query.dtype)
    problem.heads, problem.key_heads = len(query), len(key)
    problem.width, problem.value_width = query.shape[2], value.shape[2]
    problem.query, problem.key, problem.value, problem.grad = map(_heads, (query, key, value, grad))
    problem.segments, problem.count = segments.data_ptr(), len(segments)
    problem.scaling, problem.window = scaling, window
    problem.out, problem.log_sums = out.data_ptr(), log_sums.data_ptr()
    problem.d_query, problem.d_key, problem.d_value = map(address, grads)
    run("attention", problem)
