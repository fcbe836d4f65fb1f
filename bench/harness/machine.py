"""Suite `machine`: copy bandwidth and the rate of bare matrix products, with which all other results are compared."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.harness.measure import Checked, Measurement, Outputs, WrongResult, able, measure

ON_GPU = torch.cuda.is_available()
COPY_BYTES = 1 << (30 if ON_GPU else 28)  # far larger than any cache
SIZE = 8192 if ON_GPU else 2048  # rows and columns of the matrices
CASES = ("copy", "product-float32", "product-bfloat16")
QUICK = CASES[:2]
PRODUCTS = {
    "torch": torch.mm,
    # torch contains oneDNN beside MKL, but only compiled models use it for float32 products.
    "oneDNN": lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""),
}
IMPLEMENTATIONS = tuple(PRODUCTS)


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """Measures one case. An implementation that takes too long for `limit_s` has no record.

    `sizes` of a record holds the bytes moved (read plus written) of a copy, or the FLOP of a product.
    """
    device, names = "cuda" if ON_GPU else "cpu", ["torch"]
    generator = torch.Generator().manual_seed(0)
    if case_name == "copy":
        source = torch.randn(COPY_BYTES // 4, generator=generator).to(device)
        target = torch.empty_like(source)

        def part(name: str, share: int) -> Callable[[], Outputs]:
            few = len(source) // share
            return lambda: {"copy": target[:few].copy_(source[:few])}

        exact, budget, sizes = source, 0.0, {"bytes": 2 * COPY_BYTES}
    else:
        dtype = getattr(torch, case_name.split("-")[1])
        a, b = (torch.randn(SIZE, SIZE, generator=generator).to(device, dtype) for _ in range(2))
        if dtype == torch.float32 and not ON_GPU and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            names.append("oneDNN")

        def part(name: str, share: int) -> Callable[[], Outputs]:
            return lambda: {"product": PRODUCTS[name](a[: SIZE // share], b)}

        exact = a[:64].double() @ b.double()
        budget = 4 * torch.finfo(dtype).eps * exact.abs().max().item() + 1e-3
        sizes = {"flop": 2 * SIZE**3}

    def check(name: str, outputs: Outputs) -> Checked:
        ((output, value),) = outputs.items()
        error = (value[: len(exact)].double() - exact.double()).abs().max().item()
        if not error <= budget:
            raise WrongResult(f"{output} is off by {error:.2g}")
        return Checked({output: error}, "64 rows" if output == "product" else "everything")

    candidates = able(names, part, limit_s)
    return measure("machine", case_name, sizes, candidates, check, lambda _: None, rounds)
