"""Which norms and gated blocks of a model take the ops, and that they compute the same there."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from fastalign import reference
from fastalign.models import norms
from fastalign.models.norms import speed_up_body
from fastalign.ops.backends import cpu

EPS = 1e-5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def numbers(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradients(function, tensors, grad):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def calls(monkeypatch) -> list[str]:
    """Grows by the name of each pass that runs."""
    seen, run = [], cpu.run
    monkeypatch.setattr(cpu, "run", lambda name, *rest: seen.append(name) or run(name, *rest))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_takes_them_and_is_no_further_from_float64(tiny_llama, dtype, monkeypatch):
    """Than its own way is. float64 by the passes checked above: a Llama's own norm is in float32 always."""
    model = tiny_llama().to(dtype)
    fast, layers = copy.deepcopy(model), model.config.num_hidden_layers
    speed_up_body(fast)
    wide = copy.deepcopy(fast).double()
    seen, found = calls(monkeypatch), []
    ids = torch.arange(30).view(2, 15)
    for m in (fast, model, wide):
        out = m(input_ids=ids, labels=ids)
        out.loss.backward()
        found.append([out.logits, *(p.grad for p in m.parameters())])
    assert seen.count("rms_norm") == 2 * 2 * (2 * layers + 1) and seen.count("gated") == 2 * 2 * layers
    for ours, own, exact in zip(*found, strict=True):
        error, other = ((t.double() - exact).abs().max() for t in (ours, own))
        assert error <= 2 * other + torch.finfo(dtype).eps * exact.abs().max()


class Norm(nn.Module):
    """A norm whose formula the subclass names."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(numbers(8, dtype=torch.float32)), EPS

    def forward(self, x):
        return reference.rms_norm(x, self.offset + self.weight, EPS).to(x.dtype)


class PlainRMSNorm(Norm):
    offset = 0


class GemmaRMSNorm(Norm):
    offset = 1


class Block(nn.Module):
    def __init__(self, act_fn, swapped=False):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn, self.swapped = act_fn, swapped

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gate * self.act_fn(up) if self.swapped else self.act_fn(gate) * up)


class Scaled(Block):
    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


def test_what_computes_something_else_goes_its_own_way(monkeypatch):
    seen, x = calls(monkeypatch), numbers(3, 8, dtype=torch.float32)
    for module in (
        GemmaRMSNorm(),
        Norm(),
        nn.LayerNorm(8),
        Block(nn.GELU()),
        Block(nn.SiLU(), swapped=True),
        Scaled(nn.SiLU()),
    ):
        module.offset = getattr(module, "offset", 0)
        expected = module(x)
        speed_up_body(module)
        assert "forward" not in vars(module) and torch.equal(module(x), expected)
    assert not seen
    for module, name in ((PlainRMSNorm(), "rms_norm"), (Block(nn.SiLU()), "gated")):
        expected = module(x)
        speed_up_body(module)
        torch.testing.assert_close(module(x), expected)
        assert seen.pop() == name and not seen


def test_what_it_cannot_take_goes_its_own_way(monkeypatch):
    norm = PlainRMSNorm()
    block = Block(nn.SiLU())
    speed_up_body(nn.ModuleList([norm, block]))
    seen = calls(monkeypatch)
    x = numbers(3, 8, dtype=torch.bfloat16)
    assert torch.equal(norm(x), PlainRMSNorm.forward(norm, x)), "weights of another dtype"
    each = {"weight": numbers(3, 8, dtype=torch.float32)}
    found = torch.func.functional_call(norm, each, (x.float(),))
    assert torch.equal(found, reference.rms_norm(x.float(), each["weight"], EPS)), "a weight for each token"
    for module in (norm, block):
        one_by_one = torch.func.vmap(module)(x.float())
        torch.testing.assert_close(one_by_one, type(module).forward(module, x.float()))
    with torch.device("meta"):
        assert block.to("meta")(torch.empty(3, 8)).shape == (3, 8)
        assert norm.to("meta")(torch.empty(3, 8)).shape == (3, 8)
    assert not seen


def test_without_the_kernels_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(cpu.in_use, "unavailable", "not built")
    norm = PlainRMSNorm()
    speed_up_body(norm)
    assert "forward" not in vars(norm)


@pytest.fixture
def gpu(monkeypatch):
    """What a GPU's tensors take, taken by the CPU's."""
    monkeypatch.setattr(norms, "_on_gpu", lambda t: t.device.type == "cpu")
    for op in ("rms_norm", "swiglu"):  # what "auto" picks there
        monkeypatch.setattr(norms, op, functools.partial(getattr(norms, op), backend="torch"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_gpu_s_tensors_take(dtype, gpu, monkeypatch):
    """torch's norm, and its passes of the gate: no further from float64 than the model's own."""
    seen = calls(monkeypatch)
    norm, block = PlainRMSNorm().to(dtype), Block(nn.SiLU()).to(dtype)
    x, grad = numbers(7, 8, dtype=dtype, seed=1), numbers(7, 8, dtype=dtype, seed=2)
    fast = copy.deepcopy(nn.Sequential(norm, block))
    speed_up_body(fast)
    assert all("forward" in vars(module) for module in fast)
    exact = with_gradients(nn.Sequential(norm, block).double(), [x.double()], grad)
    norm.to(dtype), block.to(dtype)
    own, ours = (with_gradients(m, [x], grad) for m in (nn.Sequential(norm, block), fast))
    for mine, theirs, truth in zip(ours, own, exact, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        budget = 2 * ((theirs.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max())
        assert (mine.double() - truth).abs().max() <= budget
    assert not seen


def test_quantised_blocks_go_their_own_way(gpu):
    """bitsandbytes packs a weight into a column of any dtype, or keeps its shape; others are subclasses."""

    class Other(torch.Tensor):
        pass

    column, whole = torch.zeros(48, 1), torch.zeros(12, 8)
    for weight in (column.byte(), column.bfloat16(), whole.char(), whole.as_subclass(Other)):
        block = Block(nn.SiLU())
        del block.gate_proj.weight
        block.gate_proj.weight = weight
        speed_up_body(block)
        assert "forward" not in vars(block)


def test_a_gpu_s_norm_keeps_its_dtype_under_autocast(gpu, monkeypatch):
    """Which takes norms in float32, on a GPU."""
    norm, own = PlainRMSNorm().bfloat16(), nn.functional.rms_norm
    speed_up_body(norm)
    wide = []
    monkeypatch.setattr(
        nn.functional,
        "rms_norm",
        lambda x, shape, weight, eps: wide.append(x) or own(x.float(), shape, weight.float(), eps),
    )
    assert norm(numbers(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16 and wide
