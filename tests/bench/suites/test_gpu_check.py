"""The reader of machine code: on one real kernel, on text of each assembler, and on what must not pass."""

from __future__ import annotations

import pytest

from bench.suites import gpu_check
from bench.suites.gpu_check import Budget, Built


def check_named(name):
    return next(check for found, check in gpu_check.triton_checks() if found == name)


def test_a_kernel_for_sm_90_keeps_its_budget():
    built = gpu_check.build_triton("kept", check_named("triton linear_logprobs.kept_gradient"), "sm_90")
    assert not built.faults()
    assert built.threads == 512 and built.registers > 8 and (built.loads, built.stores) == (4, 4)


def test_misaligned_rows_are_noticed():
    check = check_named("triton linear_logprobs.kept_gradient")
    check = check | {"signature": check["signature"].replace("i32:16, i32:16, 16384", "i32, i32, 16384")}
    built = gpu_check.build_triton("kept", check, "sm_90")
    assert "0 wide stores, 4 needed" in built.faults()


@pytest.mark.parametrize("name", ["scan Hopper", "rescue cap, entropy", "finish frozen"])
def test_the_anchored_kernels_compile_for_hopper_as_budgeted(name):
    """The interpreter runs them elsewhere, but accepts what the compiler refuses."""
    built = gpu_check.build_triton(name, check_named(f"triton anchored_logprobs.{name}"), "sm_90")
    assert not built.faults()
    if name == "scan Hopper":
        assert built.shapes == ("64x256x16",) and built.loads == 8 and built.stores == 4


def built(**numbers):
    defaults = {"kernel": "k", "target": "sm_90", "threads": 256, "registers": 32, "shared": 0, "spilled": 0,
                "loads": 2, "stores": 2, "products": 0, "budget": Budget(40, 64, 2, 2)}  # fmt: skip
    return Built(**{**defaults, **numbers})


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ({"registers": 41}, "41 registers, budget 40"),
        ({"shared": 65}, "65 bytes shared, budget 64"),
        ({"spilled": 8}, "8 spilled"),
        ({"loads": 1}, "1 wide loads, 2 needed"),
        ({"stores": 0}, "0 wide stores, 2 needed"),
        ({"budget": Budget(40, 64, tensor_cores=True)}, "no tensor-core instruction"),
        (
            {"budget": Budget(40, 64, hgmma="64x256x16"), "shapes": ("64x128x16",)},
            "tensor-core instructions of 64x128x16, not 64x256x16",
        ),
    ],
)
def test_each_fault_is_named_and_fails_the_run(numbers, fault, monkeypatch, capsys):
    assert built(**numbers).faults() == [fault]
    monkeypatch.setattr(gpu_check, "build", lambda *_: [built(), built(**numbers)])
    assert gpu_check.main([]) == 1
    assert fault in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "build", lambda *_: [built()])
    assert gpu_check.main([]) == 0


def test_a_name_that_no_kernel_has_fails(capsys):
    assert gpu_check.main(["--only", "cuda nothing"]) == 1
    assert "no kernel's name holds 'cuda nothing'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("numbers", "share"),
    [
        ({}, 1.0),
        ({"registers": 64}, 0.5),
        ({"registers": 65}, 0.375),  # 72 by granularity: 3 blocks of 8 warps
        ({"shared": 100 << 10}, 0.25),
        ({"target": "gfx942", "threads": 512, "registers": 64}, 1.0),
        ({"target": "gfx942", "threads": 512, "registers": 128}, 0.5),
    ],
)
def test_occupancy(numbers, share):
    assert built(**numbers).occupancy == share


SASS = {
    "--dump-resource-usage": "Resource usage:\n Function k:\n  REG:20 STACK:0 SHARED:8 LOCAL:0 CONSTANT[0]:9",
    "--dump-sass": """Function : k
        LDG.E.128.CONSTANT R4, [R2] ; LDG.E R1, [R2] ; LDG.E.64 R1, [R2] ; STG.E.128 [R2], R4 ;
        LDG.E.ENL2.256 R8, R4, [R2] ; LDL R3, [R1] ;
        LDGSTS.E.BYPASS.128 [R1], [R2] ; HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ; STL.64 [R1], R2 ;""",
}


def test_what_is_read_from_sass(monkeypatch):
    monkeypatch.setattr(gpu_check, "_disassemble", lambda what, path: SASS[what])
    ((name, numbers),) = gpu_check.read_cubin("k.cubin")
    assert name == "k"
    expected = {"registers": 20, "shared": 8, "spilled": 2, "loads": 4, "stores": 1, "products": 1}
    assert numbers == expected | {"shapes": ("64x128x16",)}


def test_what_is_read_from_amdgcn():
    text = """
        global_load_dwordx4 v[2:5], v[0:1], off
        global_load_dword v2, v[0:1], off
        buffer_store_dwordx4 v[2:5], v0, s[0:3], 0 offen
        v_mfma_f32_32x32x8_bf16_1k v[0:15], v[0:1], v[2:3], 0
    .group_segment_fixed_size: 64
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 1
    .vgpr_count:     30
    .vgpr_spill_count: 2
    """
    numbers = gpu_check.read_amdgcn(text)
    assert numbers == {"registers": 30, "shared": 64, "spilled": 3, "loads": 1, "stores": 1, "products": 1}


def test_budgets_of_cuda_sources():
    source = """
// budget: 64 registers, 256 bytes shared, 4 wide loads, 2 wide stores, tensor cores
template <typename U>
__global__ void __launch_bounds__(kThreads, 2) first(P p) {}
// budget: 32 registers, 0 bytes shared
__global__ void __launch_bounds__(128) second(P p) {}
"""
    assert gpu_check.cuda_budgets(source) == {
        "first": (Budget(64, 256, 4, 2, True), "kThreads"),
        "second": (Budget(32, 0), "128"),
    }
    with pytest.raises(SystemExit, match="no `// budget"):
        gpu_check.cuda_budgets(source + "__global__ void third() {}")


def test_every_cuda_kernel_has_a_budget():
    for path in gpu_check.SOURCES.glob("*.cu"):
        for _, threads in gpu_check.cuda_budgets(path.read_text(encoding="utf-8")).values():
            assert 32 <= gpu_check._number(threads) <= 1024
