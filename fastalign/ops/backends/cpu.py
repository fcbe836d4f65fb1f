"""The C++ kernels (csrc/cpu) seen from Python: what is built, which instruction set runs, and calls on raw pointers.

The kernels run in torch's own thread pool, through the stable C function `torch_parallel_for`, looked up here: no
second OpenMP runtime, and a module that was built without torch's headers. FASTALIGN_CPU_ISA in the environment, plain,
avx2, avx512 or avx512_bf16, forces one set of kernels.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

from fastalign import reference
from fastalign.errors import BackendError, InputError

try:
    from fastalign import _cpu as module
except ImportError:  # a checkout that was not built; `fastalign info` says so, and backend="cpu" raises
    module = None

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/cpu/base/problem.h
# A gradient of this size would push everything else out of the caches, so it is written past them.
_STREAMED_BYTES = 8 << 20
_kernels = None
# Why no kernel can run, or None.
unavailable: str | None = None
# The same where FASTALIGN_CPU_ISA asked for kernels that are not to be had: then even backend="auto" refuses.
refused: str | None = None
# Layout of the kept probabilities: tokens side by side in one panel, by dtype, and vocabulary entries of one tile.
_panels: dict[torch.dtype, int] = {}
_tile = 0


def _symbol(name: str) -> int:
    """Address of a function that libtorch exports, or 0."""
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function = getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library)), name)
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


# Without it the kernels start threads of their own.
_parallel_for = _symbol("torch_parallel_for")
_CPUBLAS = "_ZN2at6native7cpublas"  # at::native::cpublas, as compilers other than Microsoft's spell it


def _find_brgemm() -> bool:
    """Hand libtorch's bfloat16 BRGEMM to the kernels, if this torch has one and it runs on this machine."""
    product = _symbol(_CPUBLAS + "6brgemmEllllllbPKN3c108BFloat16ES5_Pfb")
    if not product or not torch.cpu._is_avx512_bf16_supported():
        return False
    return bool(module.set_brgemm(product, _symbol(_CPUBLAS + "14brgemm_releaseEb")))


def _host_takes_memory_back() -> bool:
    """Whether this is a virtual machine whose free blocks of 2 MiB go back to its host (virtio-balloon's feature 5).

    There a huge page that the host took is slow to come back: 350 ms for 200 MiB, where small pages, which stay, take
    80, and huge ones that it has not taken yet 13 (bench/LOG.md).
    """
    balloons = Path("/sys/bus/virtio/drivers/virtio_balloon").glob("virtio*/features")
    try:
        return any(features.read_bytes()[5:6] == b"1" for features in balloons)
    except OSError:  # hidden from us: as on most machines
        return False


def select(isa: str | None) -> None:
    """Run the kernels of this instruction set from now on; None: the best that this machine has.

    BackendError where the module is not built, or the kernels are not in it, or this machine lacks the instructions.
    """
    global _kernels, _tile, unavailable
    why = _why_not(isa)
    if why:
        raise BackendError(why)
    _kernels, unavailable = module.kernels(isa or module.available()[0]), None
    _tile = _kernels.tile
    for dtype in _DTYPES:
        _panels[dtype] = _kernels.panel_f64 if dtype == torch.float64 else _kernels.panel_f32


def _why_not(isa: str | None) -> str | None:
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
    global refused, unavailable
    isa = os.environ.get("FASTALIGN_CPU_ISA")
    try:
        select(isa or None)
    except BackendError as error:  # said at first use, not at import
        unavailable = str(error)
        refused = f"FASTALIGN_CPU_ISA={isa} cannot be honoured: {error}" if isa else None


if hasattr(module, "use_huge_pages"):
    module.use_huge_pages(not _host_takes_memory_back())
_brgemm = _find_brgemm() if hasattr(module, "set_brgemm") else False
_select_from_environment()


def describe() -> dict[str, object]:
    """What runs here, for `fastalign info`: instruction set, kernels, threads and their pool, compiler."""
    return {
        "built": module is not None,
        "isa": _kernels.name if _kernels else None,
        "unavailable": unavailable,
        "vector_bits": 8 * _kernels.vector_bytes if _kernels else None,
        "kernels_available": module.available() if _kernels else [],
        "kernels_compiled": module.compiled() if _kernels else [],
        "threads": torch.get_num_threads(),
        "thread_pool": "torch" if _parallel_for else "own",
        "brgemm_bf16": _brgemm,
        "compiler": module.compiler if module else None,
        "torch": torch.__version__,
    }


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    if unavailable:
        return unavailable
    for t in tensors:
        if t is None:
            continue
        if t.device.type != "cpu":
            return f"a tensor lies on {t.device}"
        if t.dtype not in _DTYPES and t.dtype != torch.int64:
            return f"a tensor is {t.dtype}; it takes float32, float64, bfloat16 and float16"
    return None


def why_no_kernel(name: str) -> str | None:
    """Why this kernel, or what needs this field of the log-probabilities' problem, cannot run, or None."""
    if unavailable or hasattr(_kernels, name) or hasattr(module.ForwardProblem, name):
        return unavailable
    return "the native module is older than its sources, run `make build`"


def run(name: str, *arguments):
    """Calls a kernel of the instruction set in use, in torch's thread pool."""
    return getattr(_kernels, name)(*arguments, torch.get_num_threads(), _parallel_for)


def dtype_code(dtype: torch.dtype) -> int:
    """DType of csrc/cpu/base/problem.h."""
    return _DTYPES[dtype]


def is_fast(dtype: torch.dtype) -> bool:
    """Whether the kernels in use are known to beat the plain torch driver at this dtype (measured: bench/LOG.md)."""
    return _kernels is not None and _kernels.name != "plain" and dtype != torch.float64


def cacheable_rows(rows: int, dtype: torch.dtype, row_bytes: int, memory_budget: int) -> int:
    """How many of `rows` have their probabilities kept within the budget: all, or as many whole panels as fit."""
    panel = _panels[dtype]
    return min(-(-rows // panel), memory_budget // row_bytes // panel) * panel


def cache_shifts(vocab: int) -> int:
    """Shifts per row of kept probabilities: one a tile."""
    return -(-vocab // _tile)


def on_huge_pages(t: Tensor) -> Tensor:
    """`t`, of new memory: asked for before it is written, 2 MiB at a time come six times as fast as 4 KiB."""
    module.prefer_huge_pages(t.data_ptr(), t.nbytes)
    return t


def _head_problem(problem, hidden, weight, targets, rows, bias, logit_scale, softcap, temperature, cache, shifts):
    """Fill in what both passes share. Returns the tensors that must outlive the call."""
    acc = reference.compute_dtype(hidden)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    targets = targets.contiguous()
    bias = None if bias is None else bias.to(acc).contiguous()
    problem.dtype = _DTYPES[hidden.dtype]
    problem.hidden, problem.hidden_stride = hidden.data_ptr(), hidden.stride(0)
    problem.weight, problem.weight_stride = weight.data_ptr(), weight.stride(0)
    problem.targets = targets.data_ptr()
    if targets.dim() > 1:
        problem.targets_per_token = targets.shape[1]
    problem.bias = 0 if bias is None else bias.data_ptr()
    problem.rows = 0 if rows is None else rows.data_ptr()
    problem.scored = len(targets) if rows is None else rows.numel()
    problem.vocab, problem.width = weight.shape
    problem.logit_scale, problem.softcap, problem.temperature = logit_scale, softcap or 0.0, temperature
    if cache.numel():
        problem.cache, problem.shifts, problem.cache_rows = cache.data_ptr(), shifts.data_ptr(), cache.shape[0]
    return hidden, weight, targets, bias, rows


def linear_logprobs(
    hidden, weight, targets, rows, bias, logit_scale, softcap, temperature, grads, entropy, cache_rows
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op of `linear_logprobs.py`; rows (S,): the scored ones, None for all."""
    (n, width), vocab = hidden.shape, weight.shape[0]
    new = hidden.new_zeros if rows is not None else hidden.new_empty
    acc = reference.compute_dtype(hidden)
    logprobs, stats = new(n, dtype=acc), new(n, 5, dtype=acc)
    entropies = new(n if entropy else 0, dtype=acc)
    grad_logprobs = new((n, width) if grads else 0, dtype=acc)
    grad_entropy = new((n, width) if grads and entropy else 0, dtype=acc)
    cache = on_huge_pages(hidden.new_empty((cache_rows, vocab) if cache_rows else 0))
    shifts = hidden.new_empty((cache_rows, cache_shifts(vocab)) if cache_rows else 0, dtype=acc)
    scored = cacheable_rows(n if rows is None else rows.numel(), hidden.dtype, 1, 1 << 62)
    cache[scored:], shifts[scored:] = 0, 0  # rows that turned out not to be scored
    problem = module.ForwardProblem()
    alive = _head_problem(
        problem, hidden, weight, targets, rows, bias, logit_scale, softcap, temperature, cache, shifts
    )
    problem.logprobs, problem.stats = logprobs.data_ptr(), stats.data_ptr()
    problem.entropy = entropies.data_ptr() if entropy else 0
    problem.grad_logprobs = grad_logprobs.data_ptr() if grads else 0
    problem.grad_entropy = grad_entropy.data_ptr() if grads and entropy else 0
    if problem.scored:
        _kernels.forward(problem, torch.get_num_threads(), _parallel_for)
    del alive
    return logprobs, entropies, grad_logprobs, grad_entropy, stats, cache, shifts


def linear_logprobs_backward(
    grad_logprobs, grad_entropy, hidden, weight, targets, rows, bias, stats, cache, shifts,
    logit_scale, softcap, temperature, needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The backward op of `linear_logprobs.py`: gradients in hidden, weight and bias, as far as `needs` asks."""
    acc = reference.compute_dtype(hidden)
    g_logprobs = grad_logprobs.to(acc).contiguous()
    g_entropy = None if grad_entropy is None else grad_entropy.to(acc).contiguous()
    d_hidden = hidden.new_zeros(hidden.shape, dtype=acc) if needs[0] else None
    d_weight = on_huge_pages(weight.new_empty(weight.shape)) if needs[1] else None
    d_bias = weight.new_empty(weight.shape[0], dtype=acc) if needs[2] else None
    problem = module.BackwardProblem()
    kept = cache if g_entropy is None else cache.new_empty(0)  # the entropy's gradient needs the logits themselves
    alive = _head_problem(problem, hidden, weight, targets, rows, bias, logit_scale, softcap, temperature, kept, shifts)
    problem.grad_logprobs, problem.stats = g_logprobs.data_ptr(), stats.data_ptr()
    problem.grad_entropy = 0 if g_entropy is None else g_entropy.data_ptr()
    for name, t in (("d_hidden", d_hidden), ("d_weight", d_weight), ("d_bias", d_bias)):
        setattr(problem, name, 0 if t is None else t.data_ptr())
    if problem.scored:
        _kernels.backward(problem, torch.get_num_threads(), _parallel_for)
    else:
        for t in (d_weight, d_bias):
            if t is not None:
                t.zero_()
    del alive
    return (
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        d_weight,
        None if d_bias is None else d_bias.to(bias.dtype),
    )


def linear_topk_logprobs(hidden, weight, targets, rows, bias, head, grads) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of `sparse_divergence.py`; targets (N, k): rising in a row.

    Logits of the targets (N, k), d log tail / d hidden (N, H) or empty, and (N, 2): shift and sum of the tail.
    """
    acc, none = reference.compute_dtype(hidden), hidden.new_empty(0)
    new = hidden.new_zeros if rows is not None else hidden.new_empty
    picked, stats = new(targets.shape, dtype=acc), new(len(hidden), 2, dtype=acc)
    expected = new(hidden.shape if grads else 0, dtype=acc)
    problem = module.ForwardProblem()
    alive = _head_problem(problem, hidden, weight, targets, rows, bias, *head, none, none)
    problem.picked, problem.stats = picked.data_ptr(), stats.data_ptr()
    problem.grad_logprobs = expected.data_ptr() if grads else 0
    if problem.scored:
        run("forward", problem)
    del alive
    return picked, expected, stats


def linear_topk_logprobs_backward(
    grad_targets, grad_tail, hidden, weight, targets, rows, bias, stats, head, needs
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in weight and bias, from those in the targets' `h W' + b` (N, k) and in the tail's logarithm (N,)."""
    d_weight = on_huge_pages(weight.new_empty(weight.shape)) if needs[0] else None
    d_bias = stats.new_empty(len(weight)) if needs[1] else None
    problem, none = module.BackwardProblem(), hidden.new_empty(0)
    kept = grad_targets.contiguous(), grad_tail.contiguous(), stats.contiguous()
    alive = _head_problem(problem, hidden, weight, targets, rows, bias, *head, none, none)
    problem.grad_targets, problem.grad_logprobs, problem.stats = (t.data_ptr() for t in kept)
    problem.d_weight, problem.d_bias = _address(d_weight), _address(d_bias)
    if problem.scored:
        run("backward", problem)
    else:
        for t in (d_weight, d_bias):
            if t is not None:
                t.zero_()
    del alive, kept
    return d_weight, None if d_bias is None else d_bias.to(bias.dtype)


def linear_divergence(
    student, teacher, rows, kind, jsd_beta, grads, budget, coefficients=None, needs=(False, False)
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The forward op of `linear_divergence.py`; student, teacher: (hidden, weight, bias, head), of the same vocabulary.

    values (N,), grad_hidden (N, H) or empty, stats (N, 5); and, as far as `needs` asks for each, the gradients of
    `sum(coefficients * values)` in the student's weight and bias, in float32 or float64. coefficients: (N,).
    """
    hidden = student[0]
    (n, width), acc = hidden.shape, reference.compute_dtype(hidden)
    new = hidden.new_zeros if rows is not None else hidden.new_empty
    values, stats = new(n, dtype=acc), new(n, 5, dtype=acc)
    grad_hidden = new((n, width) if grads else 0, dtype=acc)
    vocab, lanes = len(student[1]), _kernels.vector_bytes // values.element_size()
    padded = -(-width // _panels[hidden.dtype]) * _panels[hidden.dtype]
    d_weight = on_huge_pages(values.new_empty(vocab, padded)).zero_() if needs[0] else None
    d_bias = values.new_zeros(vocab, lanes) if needs[1] else None
    coefficients = coefficients.to(acc).contiguous() if any(needs) else None
    problem, none = module.DivergenceProblem(), hidden.new_empty(0)
    places = torch.empty(n, dtype=torch.int64)  # in the place of targets, of which only the number is read
    alive = [
        _head_problem(part, h, w, places, rows, bias, *head, none, none)
        for part, (h, w, bias, head) in ((problem.student, student), (problem.teacher, teacher))
    ]
    problem.dtype, problem.kind = dtype_code(hidden.dtype), reference.DIVERGENCES.index(kind)
    problem.beta, problem.budget = jsd_beta, budget
    problem.values, problem.stats = values.data_ptr(), stats.data_ptr()
    problem.grad_hidden = grad_hidden.data_ptr() if grads else 0
    if any(needs):
        problem.coefficients = coefficients.data_ptr()
        problem.d_weight, problem.d_bias = _address(d_weight), _address(d_bias)
    if problem.student.scored:
        run("divergence", problem)
    del alive
    return (
        values,
        grad_hidden,
        stats,
        None if d_weight is None else d_weight[:, :width].contiguous(),
        None if d_bias is None else d_bias.sum(1),
    )


def _selective_problem(logits, targets, temperature, ignore_index, stats):
    """Rows in two strides, as of `logits[:, :-1]`. Returns the problem and the tensors that must outlive the call."""
    rows = (
        logits.unsqueeze(0) if logits.dim() == 2 else logits.reshape(-1, logits.shape[-2:-1].numel(), logits.shape[-1])
    )
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    targets = targets.contiguous()
    problem = module.SelectiveProblem()
    problem.dtype, problem.logits, problem.targets = _DTYPES[logits.dtype], rows.data_ptr(), targets.data_ptr()
    problem.inner, problem.outer_stride, problem.inner_stride = max(rows.shape[1], 1), rows.stride(0), rows.stride(1)
    problem.rows, problem.vocab = targets.numel(), logits.shape[-1]
    problem.ignore_index, problem.temperature, problem.stats = ignore_index, temperature, stats.data_ptr()
    return problem, (rows, targets)


def selective_logprobs(logits, targets, temperature, ignore_index) -> tuple[Tensor, Tensor]:
    """The forward op of `selective_logprobs.py`."""
    logprobs = logits.new_empty(targets.shape, dtype=reference.compute_dtype(logits))
    stats = logprobs.new_empty(*targets.shape, 2)
    problem, alive = _selective_problem(logits, targets, temperature, ignore_index, stats)
    problem.logprobs = logprobs.data_ptr()
    _kernels.selective_forward(problem, torch.get_num_threads(), _parallel_for)
    del alive
    return logprobs, stats


def selective_logprobs_backward(grad, logits, targets, stats, temperature, ignore_index, d_logits) -> None:
    """The backward op of `selective_logprobs.py`: into d_logits, or over the logits where that is None."""
    grad, stats = grad.contiguous(), stats.contiguous()
    problem, alive = _selective_problem(logits, targets, temperature, ignore_index, stats)
    problem.grad, problem.cache_bytes = grad.data_ptr(), _STREAMED_BYTES
    if d_logits is not None:
        problem.d_logits = on_huge_pages(d_logits).data_ptr()
    _kernels.selective_backward(problem, torch.get_num_threads(), _parallel_for)
    del alive


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def preference_loss(
    logprobs, cu_seqlens, ref_sums, lengths, labels, kl, form, averaged, alternating, beta, scale, offset, slope
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward op of `preference_loss.py`."""
    inputs = [t if t is None else t.contiguous() for t in (logprobs, cu_seqlens, ref_sums, lengths, labels, kl)]
    tokens, sequences = logprobs.shape[0], cu_seqlens.shape[0] - 1
    counts = (sequences // 2 if labels is None else sequences, sequences, sequences, tokens)
    out = tuple(logprobs.new_empty(count) for count in counts)
    run = module.preference_loss_f64 if logprobs.dtype == torch.float64 else module.preference_loss_f32
    if not run(
        *map(_address, inputs), tokens, sequences, form, averaged, alternating, beta, scale, offset, slope,
        *map(_address, out),
    ):  # fmt: skip
        raise InputError(f"cu_seqlens is {cu_seqlens.tolist()[:8]}...; it must rise from 0 to S={tokens}")
    return out


def preference_loss_backward(grad_losses, grad_sums, coefficients, cu_seqlens, items, alternating) -> Tensor:
    """The backward op of `preference_loss.py`."""
    inputs = [t if t is None else t.contiguous() for t in (grad_losses, grad_sums, coefficients, cu_seqlens)]
    out = torch.empty_like(coefficients)
    wide = coefficients.dtype == torch.float64
    run = module.preference_loss_backward_f64 if wide else module.preference_loss_backward_f32
    run(*map(_address, inputs), cu_seqlens.shape[0] - 1, items, alternating, _address(out))
    return out
