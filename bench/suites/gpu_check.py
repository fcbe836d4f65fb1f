"""Build every GPU kernel for every architecture and compare its machine code with a budget. No GPU is needed.

Where the budgets are:

- Triton kernels (kernels/*.py) list the variants to compile and their budgets in `CHECKS`.
- CUDA kernels (csrc/cuda/*.cu) have a comment above them:
  `// budget: 64 registers, 256 bytes shared, 4 wide loads, 2 wide stores`.

What a budget says:

- A kernel may use at most so many registers and bytes of shared memory.
- It must contain at least so many wide loads and stores, which move 16 bytes per thread. The number is what a thread's
  share of the tile takes.
- `tensor cores` demands that the product uses tensor cores.
- Spilled registers and local memory are never allowed.

The disassembler is the one in the triton package. CUDA kernels need nvcc.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
CUDA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*CUDA, "gfx942")
SHARED_PER_MULTIPROCESSOR = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}


class Budget(NamedTuple):
    """The budget of one kernel.

    Attributes:
        registers: most registers per thread.
        shared: most bytes of shared memory per block.
        loads: fewest wide loads.
        stores: fewest wide stores.
        tensor_cores: whether a tensor-core instruction must appear.
        hgmma: the shape that every tensor-core instruction of Hopper must have, such as 64x256x16; "" for any.
    """

    registers: int
    shared: int
    loads: int = 0
    stores: int = 0
    tensor_cores: bool = False
    hgmma: str = ""


class Built(NamedTuple):
    """What the machine code of one kernel contains.

    Attributes:
        kernel: name, with its variant.
        target: architecture.
        threads: threads per block.
        registers: registers per thread.
        shared: bytes of shared memory per block.
        spilled: bytes of local memory and stack (AMD: spilled registers and private memory).
        loads: 16-byte loads from global memory, asynchronous copies to shared memory included.
        stores: 16-byte stores to global memory.
        products: tensor-core instructions.
        shapes: the shapes of Hopper's tensor-core instructions.
        budget: the budget of the kernel.
    """

    kernel: str
    target: str
    threads: int
    registers: int
    shared: int
    spilled: int
    loads: int
    stores: int
    products: int
    budget: Budget
    shapes: tuple[str, ...] = ()

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that can be active, given registers, shared memory and threads."""
        blocks = SHARED_PER_MULTIPROCESSOR[self.target] // max(self.shared + 1024, 1)  # the system takes 1 KiB
        if self.target == "gfx942":  # 4 SIMDs, each with 512 registers per lane and at most 8 waves of 64 lanes
            waves = -(-self.threads // 64)
            fit = 4 * min(8, 512 // max(8, -(-self.registers // 8) * 8))
            return min(fit // waves, blocks) * waves / 32
        warps = self.threads // 32
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(65536 // per_warp // warps, blocks, 32, 64 // warps) * warps / 64

    def faults(self) -> list[str]:
        """What is outside the budget, one text per fault."""
        found = []
        if self.spilled:
            found.append(f"{self.spilled} spilled")
        if self.registers > self.budget.registers:
            found.append(f"{self.registers} registers, budget {self.budget.registers}")
        if self.shared > self.budget.shared:
            found.append(f"{self.shared} bytes shared, budget {self.budget.shared}")
        if self.loads < self.budget.loads:
            found.append(f"{self.loads} wide loads, {self.budget.loads} needed")
        if self.stores < self.budget.stores:
            found.append(f"{self.stores} wide stores, {self.budget.stores} needed")
        if self.budget.tensor_cores and not self.products:
            found.append("no tensor-core instruction")
        if self.budget.hgmma and self.shapes != (self.budget.hgmma,):
            found.append(f"tensor-core instructions of {', '.join(self.shapes) or 'no shape'}, not {self.budget.hgmma}")
        return found


def _run(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not on the PATH, but this check needs it: install it")
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


# NVIDIA: cuobjdump prints resource usage and disassembly.


def _disassemble(what: str, path: Path) -> str:
    from triton import knobs

    return _run(knobs.nvidia.cuobjdump.path, what, path)


def read_cubin(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(function, its numbers as `Built` names them) of each kernel in a cubin."""
    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(.+)", _disassemble("--dump-resource-usage", path)))
    bodies = re.split(r"Function : (\S+)", _disassemble("--dump-sass", path))
    for name, sass in zip(bodies[1::2], bodies[2::2], strict=True):
        numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage[name])}
        spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
        yield (
            name,
            {
                "registers": numbers["REG"],
                "shared": numbers["SHARED"],
                "spilled": numbers["LOCAL"] + numbers["STACK"] + spills,
                "loads": _wide(r"\b(?:LDG|LDGSTS)\.\S*?\b(128|256)\b|\bUTMALDG", sass),
                "stores": _wide(r"\bSTG\.\S*?\b(128|256)\b|\bUTMASTG", sass),
                "products": len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass)),
                "shapes": tuple(sorted(set(re.findall(r"\bHGMMA\.(\d+x\d+x\d+)", sass)))),
            },
        )


def _wide(pattern: str, sass: str) -> int:
    """The number of 16-byte moves. A 32-byte move, which architecture 10.0 has, counts as two."""
    return sum(2 if match[1] == "256" else 1 for match in re.finditer(pattern, sass))


# AMD: the assembly text contains the metadata.


def read_amdgcn(text: str) -> dict[str, int]:
    """The numbers of the kernel in an assembly text, as `Built` names them."""
    number = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    return {
        "registers": number["vgpr_count"],
        "shared": number["group_segment_fixed_size"],
        "spilled": number["vgpr_spill_count"] + number["sgpr_spill_count"] + number["private_segment_fixed_size"],
        "loads": len(re.findall(r"\b(?:global|buffer)_load_(?:lds_)?dwordx4\b", text)),
        "stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
        "products": len(re.findall(r"\bv_mfma", text)),
    }


# Triton.


def triton_checks() -> Iterator[tuple[str, dict]]:
    """(name, check) of every kernel in kernels/."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for check in importlib.import_module(f"fastalign.kernels.{path.stem}").CHECKS:
            yield f"triton {path.stem}.{check['kernel'].__name__.lstrip('_')}{check.get('variant', '')}", check


def _source(check: dict):
    """The source to compile, from the signature in a check.

    A signature is written as for Triton's ahead-of-time compiler: types, with `:16` after those that are divisible by
    16, and the values of constants.
    """
    import triton.language as tl
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    words = [word.strip() for word in re.split(r",(?![^<]*>)", check["signature"])]  # a descriptor's shape has commas
    for number, (name, word) in enumerate(zip(check["kernel"].arg_names, words, strict=True)):
        kind, _, divisor = word.partition(":")
        if word.startswith("tensordesc"):
            signature[name] = word
        elif re.fullmatch(r"\*?(fp64|fp32|bf16|fp16|i64|i32|i8)", kind):
            signature[name] = kind
            if divisor:
                attributes[number,] = [["tt.divisibility", int(divisor)]]
        else:
            dtype = getattr(tl, word.removeprefix("tl.")) if word.startswith("tl.") else None
            signature[name], constants[name] = "constexpr", dtype or ast.literal_eval(word)
    return ASTSource(check["kernel"], signature, constants, attributes)


def build_triton(name: str, check: dict, target: str) -> Built:
    """Compiles one entry of a kernel file's `CHECKS` for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    nvidia = target.startswith("sm_")
    check = check if nvidia else check | check.get("amd", {})
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    options = {"num_warps": check["warps"], "enable_fp_fusion": True} | check.get("options", {})
    compiled = triton.compile(_source(check), target=gpu, options=options)
    if nvidia:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            ((_, numbers),) = read_cubin(Path(file.name))
    else:
        numbers = read_amdgcn(compiled.asm["amdgcn"])
    numbers["shared"] = compiled.metadata.shared
    budget = Budget(**check["budget"])
    if not nvidia:  # a warp has twice as many threads, so each of them moves half as much
        budget = budget._replace(loads=-(-budget.loads // 2), stores=-(-budget.stores // 2))
    return Built(name, target, check["warps"] * gpu.warp_size, budget=budget, **numbers)


# CUDA C++.

_BUDGET = re.compile(
    r"// budget: ([^\n]+)\n(?:template[^\n]*\n)?__global__ [^(]*?(?:__launch_bounds__\((\w+)[^)]*\) )?(\w+)\("
)


def cuda_budgets(source: str) -> dict[str, tuple[Budget, str]]:
    """Kernel -> (budget, block size as written in the source) of a .cu file.

    Raises:
        SystemExit: a kernel has no budget.
    """
    found = {}
    for words, threads, kernel in _BUDGET.findall(source):
        amount = {key: int(n) for n, key in re.findall(r"(\d+) (registers|bytes shared|wide loads|wide stores)", words)}
        found[kernel] = (
            Budget(
                amount["registers"], amount["bytes shared"], amount.get("wide loads", 0), amount.get("wide stores", 0),
                "tensor cores" in words,
            ),
            threads,
        )  # fmt: skip
    if source.count("__global__ void") != len(found):
        sys.exit(
            "a CUDA kernel has no `// budget: N registers, N bytes shared` above it: write one. These have theirs: "
            + ", ".join(found)
        )
    return found


def _number(name: str) -> int:
    """A block size as a number, from a number or from the name of a constant in csrc/cuda."""
    if name.isdigit():
        return int(name)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()))
    values = dict(re.findall(r"constexpr int (\w+) = ([\w* ]+)[;,]", text))
    return math.prod(_number(factor.strip()) for factor in values[name].split("*"))


def compiled(path: Path, target: str) -> Path:
    """The cubin of a .cu file. It is reused from build/ if the file, the headers, the compiler and its flags match."""
    command = "nvcc", "-std=c++17", "-O3", f"-arch={target}", f"-I{ROOT / 'csrc'}", "-cubin", path
    digest = hashlib.sha256(repr(command).encode() + _run("nvcc", "--version").encode())
    for source in (path, *sorted(SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    cubin = ROOT / "build" / "gpu_check" / f"{path.stem}-{target}-{digest.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        new = cubin.with_suffix(f".{os.getpid()}")
        _run(*command, "-o", new)
        new.replace(cubin)
    return cubin


def build_cuda(path: Path, target: str) -> Iterator[Built]:
    """Compiles the kernels of a .cu file for one architecture."""
    budgets = cuda_budgets(path.read_text(encoding="utf-8"))
    for function, numbers in read_cubin(compiled(path, target)) if budgets else ():
        name = _run("c++filt", function).strip()
        kernel = max((k for k in budgets if re.search(rf"\b{k}\b", name)), key=len)
        arguments = re.search(rf"{kernel}(<.*?>)?\(", name).group(1) or ""
        budget, threads = budgets[kernel]
        if numbers["shared"] and target != "sm_80":
            numbers["shared"] -= 1024  # from architecture 9.0 on the number includes the system's 1 KiB
        yield Built(f"cuda {path.stem}.{kernel}{arguments}", target, _number(threads), budget=budget, **numbers)


def build(targets: tuple[str, ...], only: str = "") -> Iterator[Built]:
    """Builds every kernel whose name, `triton FILE.KERNEL` or `cuda FILE`, contains `only`, for every target."""
    for name, check in triton_checks():
        for target in (t for t in targets if only in name and t in check.get("targets", TARGETS)):
            yield build_triton(name, check, target)
    for path in sorted(SOURCES.glob("*.cu")):
        for target in (t for t in targets if t in CUDA and only in f"cuda {path.stem}"):
            yield from build_cuda(path, target)


HEADER = ("kernel", "target", "threads", "registers", "shared", "spilled", "wide ld/st", "tensor", "occupancy", "")


def row(built: Built) -> tuple[str, ...]:
    """One line of the printed table."""
    return (
        built.kernel, built.target, str(built.threads), f"{built.registers}/{built.budget.registers}",
        f"{built.shared}/{built.budget.shared}", str(built.spilled), f"{built.loads}/{built.stores}",
        str(built.products or "-"), f"{built.occupancy:.0%}", "; ".join(built.faults()) or "ok",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Prints the table of all kernels. Returns 1 if a kernel is outside its budget or no kernel was built."""
    parser = argparse.ArgumentParser("python -m bench.suites.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--only", default="", metavar="NAME", help="part of `triton FILE.KERNEL` or `cuda FILE`")
    options = parser.parse_args(arguments)
    widths = (64, 6, 7, 9, 10, 7, 10, 6, 9, 2)
    print("  ".join(word.ljust(width) for word, width in zip(HEADER, widths, strict=True)))
    count = faulty = 0
    for built in build(tuple(options.target), options.only):
        count += 1
        print("  ".join(word.ljust(width) for word, width in zip(row(built), widths, strict=True)), flush=True)
        faulty += bool(built.faults())
    if faulty:
        print(f"{faulty} kernels are outside their budgets. Registers and shared memory are shown as used/allowed.")
    if not count:
        print(f"no kernel's name holds {options.only!r}")
    return int(faulty > 0 or not count)


if __name__ == "__main__":
    sys.exit(main())
