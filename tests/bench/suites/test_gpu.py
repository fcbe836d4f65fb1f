"""The run on a GPU, without one: its plan, its budget, what it says here, and the checks of its kernels."""

from __future__ import annotations

import os

import pytest
import torch

from bench import __main__ as bench
from bench.harness.measure import save
from bench.suites import gpu, gpu_check
from bench.suites.gpu import Step
from fastalign.models import linear

PLAN = gpu.plan()


def test_the_plan_fits_into_ten_minutes():
    assert sum(step.seconds for step in PLAN) + gpu.REPORT_S <= gpu.SECONDS <= 600
    assert gpu.fitting(PLAN, gpu.SECONDS) == (PLAN, [])


def test_time_that_is_not_planned_is_dealt_out():
    dealt = gpu.stretched([Step("a", 50, ("x",)), Step("b", 100)], 330)
    assert dealt == [Step("a", 100, ("x",)), Step("b", 200)]
    assert sum(step.seconds for step in gpu.stretched(PLAN, gpu.SECONDS)) <= gpu.SECONDS - gpu.REPORT_S


def test_the_first_step_may_take_its_share_of_the_time(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_step", lambda arguments, limit_s: limits.append(limit_s))
    assert gpu.main(tmp_path, 600) == 1, "no case has a record"
    assert limits[0] == pytest.approx(gpu.stretched(PLAN, 600)[0].seconds, abs=1)
    assert len(limits) == len(PLAN) + 1


def test_kernels_are_checked_before_anything_is_timed():
    assert PLAN[0].command == "gpu-kernels"
    assert {step.command for step in PLAN[1:]} == {"machine", "ops", "selective", "losses", "train"}


def test_what_is_measured():
    planned = {(step.command, case) for step in PLAN for case in step.cases}
    ops = {case for suite, case in planned if suite == "ops"}
    sizes = ("2048x576x49152", "2048x2048x49152", "1024x4096x128256")
    assert ops == {f"{k}-bfloat16-{s}-mask{m}" for k in ("frozen", "forward") for s in sizes for m in (0, 50)}
    assert {case for suite, case in planned if suite == "train"} == {"lora-bfloat16-dialogue"}
    assert {case.split("-")[0] for suite, case in planned if suite == "losses"} == {"dpo"}
    assert {case for suite, case in planned if suite == "machine"} == {"copy", "product-float32", "product-bfloat16"}
    assert len([case for suite, case in planned if suite == "selective"]) == 4


def test_help_says_what_is_left_out(capsys):
    with pytest.raises(SystemExit):
        bench.parser().parse_args(["gpu", "--help"])
    text = capsys.readouterr().out
    left_out = text[text.index("Left out are") : text.index("measures those")]
    planned = {(step.command, case) for step in PLAN for case in step.cases}
    said = {
        "float32": ("ops", "-float32-"), "trainable heads": ("ops", "trainable-"), "80 % prompt": ("ops", "-mask80"),
        "long prompts": ("train", "-long"), "tuning of all weights": ("train", "full-"),
        "divergences": ("divergences", ""), "Fisher": ("fisher", ""),
    }  # fmt: skip
    for words, (suite, part) in said.items():
        assert words in left_out
        assert any(part in case for case in bench.SUITES[suite].CASES), "there is something to leave out"
        assert not any(command == suite and part in case for command, case in planned), f"{words}: it is planned"
    assert max(map(len, text.splitlines())) <= 120


def test_every_step_is_a_command_that_the_bench_takes(tmp_path):
    for step in PLAN:
        arguments = bench.parser().parse_args(step.arguments(tmp_path))
        if step.cases:
            suite = bench.SUITES[step.command]
            assert bench.chosen(suite, arguments.case, False) == [c for c in suite.CASES if c in step.cases]
            assert arguments.out == tmp_path
            assert set(arguments.only or []) <= set(suite.IMPLEMENTATIONS)
    compared = bench.parser().parse_args(next(step for step in PLAN if step.command == "ops").arguments(tmp_path)).only
    assert {"fastalign triton", "fastalign cuda", "fastalign torch", "eager", "Cut Cross Entropy"} <= set(compared)


def test_with_less_time_the_last_steps_that_do_not_fit_are_left():
    steps = [Step("a", 50), Step("b", 100), Step("c", 20)]
    assert gpu.fitting(steps, 170 + gpu.REPORT_S) == (steps, [])
    assert gpu.fitting(steps, 169 + gpu.REPORT_S) == (steps[:2], steps[2:])
    assert gpu.fitting(steps, 80 + gpu.REPORT_S) == ([steps[0], steps[2]], [steps[1]])
    assert gpu.fitting(steps, gpu.REPORT_S) == ([], steps)


def test_time_that_a_step_leaves_goes_to_the_next_and_what_it_overdraws_too(monkeypatch):
    now, took, limits = [100.0], iter([10.0, 130.0, 0.0]), []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def run(step, limit_s):
        limits.append(limit_s)
        now[0] += next(took)
        return "cut off" if step.command == "b" else None

    assert gpu.follow([Step("a", 50), Step("b", 100), Step("c", 20)], run) == ["b: cut off"]
    assert limits == [50.0, 140.0, 30.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path, capsys):
    assert gpu.main(tmp_path / "out") == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("There is no GPU here") and said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_step_is_a_process_that_is_ended_with_its_children(tmp_path, monkeypatch):
    package, pipe = tmp_path / "bench", tmp_path / "pipe"
    package.mkdir()
    (package / "__init__.py").touch()  # else a package of that name further down the path would win
    (package / "child.py").write_text("import time\nwith open('pipe', 'w') as f: time.sleep(3); f.write('alive')\n")
    (package / "__main__.py").write_text(
        "import subprocess, sys\n"
        "if sys.argv[1] == 'fail': sys.exit(3)\n"
        "if sys.argv[1] == 'hang': subprocess.run([sys.executable, 'bench/child.py'])\n"
    )
    os.mkfifo(pipe)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.run_step(["work"], 30) is None
    assert gpu.run_step(["fail"], 30) == "ended with 3"
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        assert gpu.run_step(["hang"], 1) == "cut off after 1 s"
        os.set_blocking(reader.fileno(), True)
        assert reader.read() == b"", "the child lived on"


def test_cases_without_a_record_of_this_run_are_named(record, tmp_path):
    steps = [Step("gpu-kernels", 1), Step("ops", 1, ("a", "b", "c"))]
    started = "2026-01-02T00:00:00Z"
    save([record(case="a", date="2026-01-02T00:00:05Z"), record(case="b")], tmp_path / "ops.json")
    assert gpu.missing(steps, tmp_path, started) == [("ops", "b"), ("ops", "c")]


def test_the_checks_pass_what_is_right(capsys):
    assert gpu.check_kernels(("torch",), n=40, v=101) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("of its budget" in line for line in lines)
    ops = {line.split()[0] for line in lines} - {"lora"}
    on_gpu = {name.split()[1].split(".")[0] for name, _ in gpu_check.triton_checks()}  # "triton OP.KERNEL"
    on_gpu.remove("anchored_logprobs")  # a backend of linear_logprobs
    assert {op.replace("ewc_penalty_", "ewc").replace("ewc_penalty", "ewc") for op in ops} == on_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_checks_name_a_kernel_that_cannot_run(capsys):
    assert gpu.check_kernels(("triton",), n=40, v=101) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("CANNOT RUN" in line for line in lines)


def test_an_adapter_that_is_rounded_away_is_seen(monkeypatch):
    """As peft's own layers round it."""

    def shares() -> list[float]:
        return [gpu.young_adapter(dtype, "cpu", 500, 64, 192) for dtype in (torch.bfloat16, torch.float16)]

    kept = shares()
    monkeypatch.setattr(linear, "speed_up_linear", lambda model: None)
    assert max(kept) <= 1 < min(shares())


@pytest.mark.parametrize("wrong", [lambda y: y + 0.1, lambda y: y * 1.05, lambda y: y * float("nan")])
def test_a_comparison_sees_what_is_wrong(wrong):
    def op(x, backend):
        y = x.square().sum(1)
        return wrong(y) if backend == "wrong" else y

    x = torch.linspace(-1, 1, 60).view(4, 15)
    assert gpu.compare(op, [x], "right") <= 1
    assert not gpu.compare(op, [x], "wrong") <= 1


def test_a_comparison_sees_a_wrong_gradient():
    def op(x, backend):
        y = x.square().sum(1)
        return y.detach() + (1.05 * (y - y.detach())) if backend == "wrong" else y

    x = torch.linspace(-1, 1, 60).view(4, 15)
    assert not gpu.compare(op, [x], "wrong") <= 1
