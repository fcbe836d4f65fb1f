"""Linear layers: what peft and torch compute, up to the rounding asked for, and where they apply."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalign.models.linear import (  # fmt: skip
    LoraLinearCpu,
    LoraLinearGpu,
    _factor_gradient,
    _is_fast_on_gpu,
    _onednn_for_float32,
    _operand,
    has_native_matmul,
    speed_up_linear,
)

IN, OUT, T, RANK = 24, 40, 7, 3


@pytest.fixture(autouse=True)
def onednn(monkeypatch, request):
    """Whether float32 goes to oneDNN, the same on every machine that tests: no, but where a test asks for it."""
    chosen = getattr(request, "param", False)
    monkeypatch.setattr("fastalign.models.linear._onednn_for_float32", lambda: chosen)
    return chosen


class Body(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.first = nn.Linear(IN, OUT, bias=bias)
        self.second = nn.Linear(OUT, IN, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def lora(*, bias: bool = True, dtype=torch.float32, adapters: int = 1, **options):
    torch.manual_seed(0)
    body = Body(bias).to(dtype)
    model = peft.get_peft_model(body, peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["first"], **options))
    for number in range(1, adapters):
        model.add_adapter(f"other{number}", peft.LoraConfig(r=RANK, target_modules=["first"]))
        model.base_model.set_adapter(["default", f"other{number}"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        if "lora_" in name:
            parameter.data = parameter.data.float() if dtype != torch.float64 else parameter.data.double()
    return model


def outputs(model, x, autocast=None):
    """Result, gradient in x, and gradients of what is trained."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    weights = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    return [y, *torch.autograd.grad((y.double() * torch.randn(y.shape, dtype=torch.float64)).sum(), [x, *weights])]


def fast(model):
    model = copy.deepcopy(model)
    speed_up_linear(model)
    return model


def calls(monkeypatch) -> list:
    """Grows by one whenever one of our products is taken."""
    seen, apply = [], LoraLinearCpu.apply
    monkeypatch.setattr(LoraLinearCpu, "apply", lambda *args: seen.append(args) or apply(*args))
    return seen


def rows(dtype=torch.float32):
    return torch.randn(2, T, IN, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("onednn", [True, False], indirect=True)
@pytest.mark.parametrize("bias", [True, False])
def test_lora_is_peft_s(bias, onednn, monkeypatch):
    model = lora(bias=bias, dtype=torch.float64)
    expected = outputs(model, rows(torch.float64))
    seen = calls(monkeypatch)
    found = outputs(fast(model), rows(torch.float64))
    assert len(seen) == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4), (2, 4), (5, 2)))
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (lambda *t: LoraLinearCpu.apply(*t, 0.7, torch.float64), (x, w, bias, a, b)),
        (lambda x, bias, a, b: LoraLinearGpu.apply(x, w.detach(), bias, a, b, 0.7), (x, bias, a, b)),
        (lambda x, a, b: LoraLinearGpu.apply(x, w.detach(), None, a, b, 0.7), (x, a, b)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_what_a_gpu_computes_is_no_further_from_float64_than_peft_s(bias, dtype):
    """The function of 16-bit weights on a GPU, run on the CPU: rounded as often as peft's at most."""
    model = lora(bias=bias, dtype=dtype)
    layer = model.base_model.model.first
    exact, theirs = (outputs(m.base_model.model.first, rows(dtype).to(like)) for m, like in (
        (copy.deepcopy(model).double(), torch.float64), (model, dtype)))  # fmt: skip
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ours = outputs(Called(lambda x: LoraLinearGpu.apply(x, base.weight, base.bias, a, b, 2.0), a, b), rows(dtype))
    for our, their, truth in zip(ours, theirs, exact, strict=True):
        assert (our.dtype, our.shape) == (their.dtype, their.shape)
        budget = 2 * ((their.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max())
        assert (our.double() - truth).abs().max() <= budget


class Called(nn.Module):
    def __init__(self, function, *trained):
        super().__init__()
        self.function, self.trained = function, nn.ParameterList(trained)

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(("dtype", "native"), [(torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_sixteen_bits_are_no_further_from_float64_than_torch_s_own(dtype, native, how, monkeypatch):
    """Ours multiplies and sums in float32 and rounds once, theirs more often; both round alike where products are of 16
    bits."""
    monkeypatch.setattr("fastalign.models.linear.has_native_matmul", lambda dtype: native or dtype == torch.float32)
    model = lora(dtype=dtype if how == "weights" else torch.float32)
    exact = outputs(copy.deepcopy(model).double(), rows(dtype).double())
    x, autocast = (rows(dtype), None) if how == "weights" else (rows(dtype).float(), dtype)
    theirs = outputs(model, x, autocast)
    seen = calls(monkeypatch)
    ours = outputs(fast(model), x, autocast)
    assert len(seen) == 2 - native  # the layer with an adapter, and the one without, which is torch's own then
    eps = torch.finfo(dtype).eps
    for our, their, truth in zip(ours, theirs, exact, strict=True):
        assert our.dtype == their.dtype
        budget = 2 * ((their.double() - truth).abs().max() + eps * truth.abs().max())
        assert (our.double() - truth).abs().max() <= budget


def test_autocast_trains_weights(monkeypatch):
    """Full fine-tuning under autocast: weight and bias get their gradients, in their own dtype."""
    monkeypatch.setattr("fastalign.models.linear.has_native_matmul", lambda dtype: False)
    torch.manual_seed(0)
    model = Body(True)
    exact = outputs(copy.deepcopy(model).double(), rows().double())
    theirs, ours = outputs(model, rows(), torch.bfloat16), outputs(fast(model), rows(), torch.bfloat16)
    for our, their, truth in zip(ours, theirs, exact, strict=True):
        assert our.dtype == their.dtype
        budget = 2 * ((their.double() - truth).abs().max() + torch.finfo(torch.bfloat16).eps * truth.abs().max())
        assert (our.double() - truth).abs().max() <= budget


def test_what_is_not_plain_goes_its_own_way(monkeypatch):
    seen = calls(monkeypatch)
    for model in (
        lora(lora_dropout=0.5).train(),
        lora(use_dora=True),
        lora(lora_bias=True),
        lora(adapters=2),
    ):
        torch.manual_seed(3)
        expected = model(rows())
        torch.manual_seed(3)
        assert torch.equal(fast(model)(rows()), expected)
    model = fast(lora())
    with model.disable_adapter():
        assert torch.equal(model(rows()), model.get_base_model()(rows()))
    model.merge_adapter()
    model(rows())
    trained = fast(lora())
    trained.base_model.model.first.base_layer.weight.requires_grad_()
    trained(rows())
    watched, told = fast(lora()).base_model.model, []
    watched.first.lora_A["default"].register_forward_hook(lambda *args: told.append(args))
    watched(rows())
    assert len(told) == 1
    speed_up_linear(on_meta := nn.Linear(IN, OUT, device="meta"))
    assert on_meta(rows().to("meta")).shape == (2, T, OUT)
    assert not seen
    fast(lora(lora_dropout=0.5)).eval()(rows())  # dropout that is off is none
    assert len(seen) == 1


def test_without_an_adapter_what_the_cpu_can_multiply_is_left_to_it(monkeypatch):
    seen = calls(monkeypatch)
    torch.manual_seed(0)
    fast(Body(True))(rows())
    monkeypatch.setattr("fastalign.models.linear.has_native_matmul", lambda dtype: True)
    fast(Body(True).bfloat16())(rows(torch.bfloat16))
    assert not seen


@pytest.mark.parametrize("keeps", [True, False])
def test_an_adapter_of_zeros_changes_no_bit_where_products_are_of_16_bits(keeps, monkeypatch):
    """Else margins would not begin at exactly 0. Where zeros could change bits the reference takes the same product."""
    monkeypatch.setattr("fastalign.models.linear.has_native_matmul", lambda dtype: True)
    monkeypatch.setattr("fastalign.models.linear._zeros_keep_bits", lambda: keeps)
    model, seen = fast(lora(dtype=torch.bfloat16)), calls(monkeypatch)
    own = model.get_base_model().first.base_layer
    b = model.get_base_model().first.lora_B["default"].weight
    with model.disable_adapter():
        reference = model(rows(torch.bfloat16))
        assert len(seen) == 1 - keeps
        assert not reference.requires_grad
    nn.init.zeros_(b)
    assert torch.equal(model(rows(torch.bfloat16)), reference)
    assert len(seen) == 2 - keeps
    assert torch.equal(model.get_base_model().second(torch.tanh(own(rows(torch.bfloat16)))), reference)


def test_the_reference_of_a_layer_that_drops_inputs_goes_peft_s_way(monkeypatch):
    """As the policy does while it is trained: margins of another product would not begin at 0."""
    monkeypatch.setattr("fastalign.models.linear.has_native_matmul", lambda dtype: True)
    monkeypatch.setattr("fastalign.models.linear._zeros_keep_bits", lambda: False)
    model, seen = fast(lora(dtype=torch.bfloat16, lora_dropout=0.5)).eval(), calls(monkeypatch)
    with model.disable_adapter():
        model(rows(torch.bfloat16))
    assert not seen


def of_a_gpu(x, weight, bias, a, b, scaling, dtype):
    return LoraLinearGpu.apply(x, weight, bias, a, b, scaling)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("product", "native"), [(LoraLinearCpu.apply, True), (LoraLinearCpu.apply, False), (of_a_gpu, True)]
)
def test_a_young_adapter_is_not_rounded_away(product, native, bias, monkeypatch):
    """Its part of a result is kept on average, however small beside a 16-bit number's last place.

    Regressed on what it should be, the part has slope 1: measured over n entries each off by at most an ulp, 20 times
    the part, it has a standard error below 20 / sqrt(12 n). Summed after rounding its slope is near 0.
    """
    monkeypatch.setattr("fastalign.models.linear.has_native_matmul", lambda dtype: native or dtype == torch.float32)
    torch.manual_seed(0)
    tokens, wide, rank = 4096, 64, 8
    x, weight, grad = (torch.randn(n, wide).bfloat16() for n in (tokens, wide, tokens))
    a, b, bias = torch.randn(rank, wide), torch.randn(wide, rank), torch.randn(wide).bfloat16() if bias else None
    scaling = 2.0**-12  # of results around 8, whose ulp is 2**-5: parts around 2**-12 * 8 * 3

    def taken(scaling):
        at = x.clone().requires_grad_()
        y = product(at, weight, bias, a, b, scaling, torch.bfloat16)
        y.backward(grad)
        return y.detach(), at.grad

    parts = scaling * (x.float() @ a.T @ b.T), scaling * (grad.float() @ b @ a)
    error = 20 / (12 * tokens * wide) ** 0.5
    for with_it, without, part in zip(taken(scaling), taken(0.0), parts, strict=True):
        slope = ((with_it.float() - without.float()) * part).sum() / part.square().sum()
        assert abs(slope - 1) < 4 * error


def test_on_a_gpu_where_16_bits_are_multiplied_fast():
    def applies(dtype=torch.bfloat16, result=torch.bfloat16, rank=8, inputs=16, outputs=24):
        return _is_fast_on_gpu(torch.empty(outputs, inputs, dtype=dtype, device="cuda"), result, rank)

    with FakeTensorMode(), torch.no_grad():
        assert applies() and applies(dtype=torch.float16, result=torch.float16)
        assert not applies(rank=4) and not applies(inputs=20) and not applies(outputs=20)
        assert not applies(dtype=torch.float32) and not applies(dtype=torch.float32, result=torch.float32)
        x, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device="cuda") for n in (5, 24))
        a, b = torch.empty(8, 16, device="cuda"), torch.empty(24, 8, device="cuda")
        y = LoraLinearGpu.apply(x, weight, None, a, b, 2.0)
        ga = torch.empty(5, 8, dtype=torch.bfloat16, device="cuda")
        grad = _factor_gradient(a, ga.t(), x, 0.5)
        assert (grad.dtype, grad.shape) == (torch.float32, a.shape)
        assert (y.dtype, y.shape) == (torch.bfloat16, (5, 24))


@pytest.mark.parametrize("onednn", [True], indirect=True)
@pytest.mark.parametrize("trains", ["adapter", "weights"])
@pytest.mark.parametrize("bias", [True, False])
def test_float32_by_onednn(trains, bias, monkeypatch):
    """Layers with an adapter and without, no further from float64 than MKL's, but for K eps of a sum of K terms."""
    torch.manual_seed(0)
    model = lora(bias=bias) if trains == "adapter" else Body(bias)
    exact = outputs(copy.deepcopy(model).double(), rows().double())
    theirs = outputs(model, rows())
    seen, taken = calls(monkeypatch), onednn_calls(monkeypatch)
    ours = outputs(fast(model), rows())
    assert len(seen) == 2 and len(taken) == (8 if trains == "adapter" else 6)
    for our, their, truth in zip(ours, theirs, exact, strict=True):
        assert our.dtype == torch.float32 and our.shape == their.shape
        budget = 2 * (their.double() - truth).abs().max() + OUT * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (our.double() - truth).abs().max() <= budget


@pytest.mark.skipif(not _onednn_for_float32(), reason="float32 is not multiplied by oneDNN on this processor")
@pytest.mark.parametrize("onednn", [True], indirect=True)
def test_onednn_gives_a_row_the_same_bits_among_any_others(onednn):
    """As of several, of which caches of reference log-probs and margins of exactly 0 are made."""
    torch.manual_seed(0)
    for outputs in (16, 192, 600):
        layer, x = fast(nn.Linear(576, outputs)), torch.randn(300, 576)
        whole = layer(x)
        for count in (2, 3, 8, 65, 128):
            assert torch.equal(layer(x[:count]), whole[:count])
            assert torch.equal(layer(x[-count:]), whole[-count:])


@pytest.mark.parametrize("onednn", [True], indirect=True)
def test_onednn_reads_what_lies_apart(onednn):
    """Every second row and column, one number for a whole bias, and no rows at all."""
    torch.manual_seed(0)
    x, apart = torch.randn(2 * T, 2 * IN)[::2, ::2], torch.randn(2 * OUT, 2 * IN)[::2, ::2]
    one = torch.randn(1).expand(OUT)
    for weight, bias in ((apart, None), (apart.contiguous(), one), (apart, torch.randn(2 * OUT)[::2])):
        layer = nn.Linear(IN, OUT, bias=bias is not None)
        layer.weight, layer.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        speed_up_linear(layer)
        for rows in (x, x[:1], x[:0], x[:1].expand(T, IN)):
            expected = nn.functional.linear(rows, weight, bias)
            torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("onednn", [True, False], indirect=True)
@pytest.mark.parametrize("adapter", [True, False])
def test_no_rows_give_gradients_of_zeros(onednn, adapter):
    model = fast(lora() if adapter else Body(True))
    model(rows()[:0].requires_grad_()).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == (2 if adapter else 4) and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("onednn", [True], indirect=True)
@pytest.mark.parametrize("adapter", [True, False])
def test_gradients_of_what_is_expanded(onednn, adapter):
    """Rows that are one row, and the gradient of a sum, have strides of 0."""
    model, x = lora() if adapter else Body(True), rows()[:1, :1].expand(2, T, IN)
    for mine, theirs in zip(*(sums(m, x) for m in (fast(model), model)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def sums(model, x) -> tuple:
    """Gradients of the first layer's result, summed."""
    first = getattr(model, "base_model", model)
    first = getattr(first, "model", first).first
    return torch.autograd.grad(first(x).sum(), [p for p in first.parameters() if p.requires_grad])


@pytest.mark.parametrize("onednn", [True], indirect=True)
@pytest.mark.parametrize("adapter", [True, False])
def test_second_derivatives(onednn, adapter):
    """Of the squared gradients of inputs and weights, as torch and peft have them."""
    torch.manual_seed(0)
    model = lora() if adapter else Body(True)
    for mine, theirs in zip(*(penalty_gradients(m) for m in (fast(model), model)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def penalty_gradients(model) -> tuple:
    x = rows().requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(model(x).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


@pytest.mark.parametrize("onednn", [True], indirect=True)
def test_onednn_takes_float32_alone(onednn, monkeypatch):
    monkeypatch.setattr("fastalign.models.linear.has_native_matmul", lambda dtype: True)
    seen, taken = calls(monkeypatch), onednn_calls(monkeypatch)
    fast(Body(True).double())(rows(torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast(Body(True))(rows())
    with pytest.raises(RuntimeError, match="dtype"):
        fast(Body(True).double())(rows())
    torch.func.vmap(fast(Body(True)))(rows())
    assert not seen and not taken
    fast(Body(True))(rows())
    assert len(seen) == len(taken) == 2


def onednn_calls(monkeypatch) -> list:
    seen, product = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: seen.append(args) or product(*args))
    return seen


def test_the_layer_s_input_is_kept_once():
    """Three layers of one input keep it once, whatever dtype they multiply in."""
    kept = set()
    model = fast(lora())
    layer = model.base_model.model.first
    x = rows().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        layer(x), layer(x)
    assert x.untyped_storage().data_ptr() in kept
    small = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert len(kept - small) == 3  # x, and x A' of each call


@pytest.mark.parametrize("onednn", [True], indirect=True)
def test_a_frozen_layer_keeps_no_input(onednn):
    kept, layer, x = [], fast(nn.Linear(IN, OUT)).requires_grad_(False), rows().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.shape for t in kept] == [layer.weight.shape]


@pytest.mark.parametrize("adapter", [True, False])
def test_autocast_leaves_float64_alone(adapter):
    model = fast(lora(dtype=torch.float64) if adapter else Body(True).double())
    expected = model(rows(torch.float64))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(model(rows(torch.float64)), expected)


@pytest.mark.parametrize("onednn", [True, False], indirect=True)
def test_functorch_goes_through_all_layers(onednn):
    for model in (lora(), Body(True), lora(dtype=torch.bfloat16), Body(True).half()):
        x = rows(next(model.parameters()).dtype)
        mine, theirs = torch.func.vmap(fast(model))(x), torch.func.vmap(model)(x)
        assert torch.equal(mine, theirs)


def test_has_native_matmul_knows_what_there_is():
    assert has_native_matmul(torch.float32) and has_native_matmul(torch.float64)
    assert not has_native_matmul(torch.float16)


@pytest.mark.parametrize(("native", "enters"), [(True, torch.bfloat16), (False, torch.float32)])
def test_what_enters_a_product(native, enters, monkeypatch):
    monkeypatch.setattr("fastalign.models.linear.has_native_matmul", lambda dtype: native)
    for given in (torch.float32, torch.bfloat16):
        assert _operand(torch.ones(1, dtype=given), torch.bfloat16).dtype == enters
    assert _operand(torch.ones(1, dtype=torch.float64), torch.float64).dtype == torch.float64


@pytest.mark.parametrize("onednn", [True], indirect=True)
@pytest.mark.parametrize(("adapter", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_compiled_layers_compute_what_they_did(dtype, adapter, onednn):
    """A compiler does not look inside the product, which it cannot take where oneDNN computes it."""
    layer = lora(dtype=dtype).base_model.model.first if adapter else Body(True).to(dtype).first
    speed_up_linear(layer)
    weights = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(T, IN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    torch._dynamo.reset()
    found = []
    for run in (layer, torch.compile(layer)):
        out = run(x)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *weights])])
    for ours, exact in zip(*found, strict=True):
        assert torch.equal(ours, exact)
