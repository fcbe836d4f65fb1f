"""Suite `machine`: what everything else is held against: copy bandwidth, and the rate of bare matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.measure import FRACTION, Checked, Measurement, Outputs, WrongResult, able, measure

ON_GPU = torch.cuda.is_available()
COPY_BYTES = 1 << (30 if ON_GPU else 28)  # far beyond any cache
SIZE = 8192 if ON_GPU else 2048  # of square matrices
CASES = ("copy", "product-float32", "product-bfloat16")
QUICK = CASES[:2]
IMPLEMENTATIONS = ("torch",)


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """One record; `sizes` has the bytes moved (read and written) or the FLOP done. None where that takes too long."""
    device = "cuda" if ON_GPU else "cpu"
    generator = torch.Generator().manual_seed(0)
    if case_name == "copy":
        source = torch.randn(COPY_BYTES // 4, generator=generator).to(device)
        target = torch.empty_like(source)
        few = len(source) // FRACTION
        small: Callable[[], Outputs] = lambda: {"copy": target[:few].copy_(source[:few])}  # noqa: E731
        compute: Callable[[], Outputs] = lambda: {"copy": target.copy_(source)}  # noqa: E731
        exact, budget, sizes = source, 0.0, {"bytes": 2 * COPY_BYTES}
    else:
        dtype = getattr(torch, case_name.split("-")[1])
        a, b = (torch.randn(SIZE, SIZE, generator=generator).to(device, dtype) for _ in range(2))
        small = lambda: {"product": torch.mm(a[: SIZE // FRACTION], b)}  # noqa: E731
        compute = lambda: {"product": torch.mm(a, b)}  # noqa: E731
        exact = a[:64].double() @ b.double()
        budget = 4 * torch.finfo(dtype).eps * exact.abs().max().item() + 1e-3
        sizes = {"flop": 2 * SIZE**3}

    def check(name: str, outputs: Outputs) -> Checked:
        ((output, value),) = outputs.items()
        error = (value[: len(exact)].double() - exact.double()).abs().max().item()
        if not error <= budget:
            raise WrongResult(f"{output} is off by {error:.2g}")
        return Checked({output: error}, "64 rows" if output == "product" else "everything")

    candidates = able(["torch"], lambda _: small, lambda _: compute, limit_s)
    return measure("machine", case_name, sizes, candidates, check, lambda _: None, rounds)
