"""TRL's selective_log_softmax under our name, and the seam where TRL's trainers score, against plain torch."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from fastalign.compat.trl import disable, enable, selective_log_softmax

B, T, V = 2, 5, 13
INDICES = {"one a position": (B, T), "K a position": (B, T, 4)}


def problem(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(V, shape, generator=generator)


def naive(logits, index, temperature=1.0):
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(-1, index) if index.dim() == 3 else logprobs.gather(-1, index.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", INDICES.values(), ids=INDICES)
def test_values_and_gradients(shape, temperature):
    logits, index = problem(shape)
    logprobs, expected = selective_log_softmax(logits, index, temperature), naive(logits, index, temperature)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    coefficients = torch.linspace(-1, 2, index.numel(), dtype=torch.float64).view(shape)
    grads = [torch.autograd.grad((out * coefficients).sum(), logits)[0] for out in (logprobs, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", INDICES.values(), ids=INDICES)
def test_row_mask(shape):
    logits, index = problem(shape)
    mask = torch.arange(index.numel()).view(shape) % 3
    logprobs = selective_log_softmax(logits, index, row_mask=mask)
    torch.testing.assert_close(logprobs, naive(logits, index).masked_fill(mask == 0, 0.0), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(logprobs[mask == 0].sum(), logits)
    assert not grad.any()


@pytest.mark.parametrize("shape", INDICES.values(), ids=INDICES)
def test_low_precision_is_as_good_as_float32(shape):
    logits, index = problem(shape, torch.bfloat16)
    logprobs = selective_log_softmax(logits, index)
    assert logprobs.dtype == torch.float32
    # A difference of numbers as large as the logits, each rounded in float32, and V exponentials summed.
    bound = torch.finfo(torch.float32).eps * (4 * logits.abs().max().item() + V)
    assert (logprobs - naive(logits.double(), index)).abs().max() <= bound


def test_masked_vocabulary_entries():
    logits, index = problem((B, T, 4))
    logits = logits.detach().index_fill(-1, torch.arange(0, V, 2), -math.inf)
    logprobs = selective_log_softmax(logits, index)
    assert torch.equal(logprobs.isneginf(), index % 2 == 0) and not logprobs.isnan().any()
    torch.testing.assert_close(logprobs, naive(logits, index), rtol=1e-12, atol=1e-12)


# The seam. TRL is not installed here: modules with the signatures of TRL 1.16 stand in for it, and their functions are
# plain torch. bench/suites/trl.py runs the real DPOTrainer, whose losses and metrics stayed the same to 1e-5.
# Against the real functions (float32, 50 tokens, 40,000 entries; with and without bias, soft cap, scale, temperature):
# log-probs within 4e-6, entropies 1e-5, divergences 2e-6; gradients, relative to their largest entry, within 2e-5. The
# gradients of the divergences: 5e-4, and 1e-3 for the JSD, where TRL takes a difference of logarithms in float32.


class ChunkedLogProbFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):  # fmt: skip
        return tuple(plain_scores(hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale))


class ChunkedDivergenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, beta,
        temperature=1.0, student_logit_scale=1.0, student_final_logit_softcapping=None, teacher_logit_scale=1.0,
        teacher_final_logit_softcapping=None,
    ):  # fmt: skip
        raise AssertionError("replaced on the CPU")


def plain_logits(hidden, weight, bias, temperature, softcap, scale):
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def plain_scores(hidden, weight, bias, targets, temperature, softcap, scale):
    z = plain_logits(hidden, weight, bias, temperature, softcap, scale)
    log_p, p = torch.log_softmax(z, -1), torch.softmax(z, -1)
    at_target = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return at_target, -(p * log_p).sum(-1), p.square().sum(-1).log(), z.mean(-1), z.argmax(-1) == targets


@pytest.fixture
def stand_in(monkeypatch):
    """The modules of TRL that `enable` changes, by their names."""
    names = "trl", "trl.kernels", "trl.kernels.chunked_logprob", "trl.kernels.chunked_divergence", "trl.trainer"
    modules = {name: types.ModuleType(name) for name in names}
    modules["trl.kernels.chunked_logprob"].ChunkedLogProbFunction = ChunkedLogProbFunction
    modules["trl.kernels.chunked_divergence"].ChunkedDivergenceFunction = ChunkedDivergenceFunction
    for name in ("trl.trainer.utils", "trl.trainer.distillation_trainer"):
        modules[name] = types.ModuleType(name)
        modules[name]._use_triton = lambda device: device.type == "cuda"
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield modules
    disable()


def head(frozen):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(300, 16, generator=generator)
    bias, targets = torch.randn(300, generator=generator), torch.randint(300, (9,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(not frozen), bias, targets


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_scores_and_gradients_are_those_of_trl(stand_in, frozen):
    hidden, weight, bias, targets = head(frozen)
    how = (0.7, 128, 5.0, 0.5)
    expected = plain_scores(hidden, weight, bias, targets, 0.7, 5.0, 0.5)
    with enable() as on:
        assert on.active
        out = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *how)
        some = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *how, ("log_probs", "is_top1"))
        one = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *how, ("log_probs",))
    for actual, value in zip(out, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)
    assert [value is None for value in some] == [False, True, True, True, False]
    assert [value is None for value in one] == [False, True, True, True, True] and torch.equal(one[0], out[0])
    leaves = [hidden] if frozen else [hidden, weight]
    for loss in (lambda o: o[0].sum(), lambda o: (o[0] * o[1]).sum()):
        grads = [torch.autograd.grad(loss(o), leaves, retain_graph=True) for o in (out, expected)]
        for actual, value in zip(*grads, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences_are_those_of_trl(stand_in, beta):
    hidden, weight, bias, _ = head(False)
    teacher = [tensor.detach().flip(0) for tensor in (hidden, weight)]
    with enable():
        values, entropies = ChunkedDivergenceFunction.apply(hidden, weight, bias, *teacher, None, beta, 2.0)
    log_s = torch.log_softmax(plain_logits(hidden, weight, bias, 2.0, None, 1.0), -1)
    log_t = torch.log_softmax(plain_logits(*teacher, None, 2.0, None, 1.0), -1)
    log_m = torch.log((1 - beta) * log_s.exp() + beta * log_t.exp())
    kl_t, kl_s = ((log_p.exp() * (log_p - log_m)).sum(-1) for log_p in (log_t, log_s))
    kinds = {0.0: lambda: (log_t.exp() * (log_t - log_s)).sum(-1), 1.0: lambda: (log_s.exp() * (log_s - log_t)).sum(-1)}
    expected = kinds.get(beta, lambda: beta * kl_t + (1 - beta) * kl_s)()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropies, -(log_s.exp() * log_s).sum(-1), rtol=1e-5, atol=1e-5)
    assert not entropies.requires_grad
    grads = [torch.autograd.grad(v.sum(), [hidden, weight], retain_graph=True) for v in (values, expected)]
    for actual, value in zip(*grads, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-5)


def test_entropies_that_are_only_logged_may_be_left_out(stand_in):
    hidden, weight, bias, targets = head(True)
    with enable(entropy=False):
        of_dpo = ("log_probs", "entropy", "mean_logits", "is_top1")
        out = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 128, None, 1.0, of_dpo)
        assert out[1].isnan().all() and out[3].isfinite().all()
        out = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 128, None, 1.0, ("log_probs", "entropy"))
        assert out[1].isfinite().all(), "GRPO trains with it"


def test_on_off_and_inside_one_another(stand_in):
    places = [stand_in[name] for name in ("trl.trainer.utils", "trl.trainer.distillation_trainer")]
    theirs = [place._use_triton for place in places]

    def is_on():
        on = {"apply" in vars(ChunkedLogProbFunction), "apply" in vars(ChunkedDivergenceFunction)}
        on |= {place._use_triton is not before for place, before in zip(places, theirs, strict=True)}
        assert len(on) == 1, "all of them or none"
        return on.pop()

    disable()
    assert not is_on()
    enable()
    assert is_on() and places[0]._use_triton(torch.device("cpu")) and not places[0]._use_triton(torch.device("meta"))
    with enable(entropy=False):
        with enable():
            pass
        hidden, weight, bias, targets = head(True)
        out = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 128)
        assert out[1].isnan().all(), "the outer one counts here"
    assert is_on()
    disable()
    assert not is_on()
    with enable():
        assert is_on()
    assert not is_on()


def test_what_the_kernels_are_not_made_for_stays_with_trl(stand_in):
    hidden, weight, bias, targets = head(True)
    double = hidden.detach().double(), weight.double(), bias.double()
    with enable():
        out = ChunkedLogProbFunction.apply(*double, targets, 1.0, 128)
    assert out[0].dtype == torch.float64 and "log_probs" not in vars(ChunkedLogProbFunction)
    assert torch.equal(out[0], plain_scores(*double, targets, 1.0, None, 1.0)[0]), "the stand-in's own result"


def test_autocast(stand_in):
    hidden, weight, bias, targets = head(True)
    exact = plain_scores(hidden, weight, bias, targets, 1.0, None, 1.0)[0]
    for trained in (False, True):
        with enable(), torch.autocast("cpu", torch.bfloat16):
            out = ChunkedLogProbFunction.apply(hidden, weight.requires_grad_(trained), bias, targets, 1.0, 128)
        off = (out[0] - exact).abs().max().item()
        assert (off < 1e-5) if trained else (1e-5 < off < 0.1), "a trained weight's gradient keeps float32"


@pytest.mark.parametrize("change", ["signature", "missing", "not installed"])
def test_another_trl_is_left_alone(stand_in, monkeypatch, change):
    module = stand_in["trl.kernels.chunked_logprob"]
    if change == "signature":

        class Later(torch.autograd.Function):
            @staticmethod
            def forward(ctx, hidden, weight, bias, targets, temperature, block):
                raise AssertionError

        module.ChunkedLogProbFunction = Later
    elif change == "missing":
        del module.ChunkedLogProbFunction
    else:
        monkeypatch.setitem(sys.modules, "trl.kernels.chunked_logprob", None)
    with pytest.warns(UserWarning, match=r"enable\(\) changes nothing: .*trl==1\.16") as warned, enable() as on:
        assert not on.active and "apply" not in vars(ChunkedDivergenceFunction)
    assert len(warned) == 1
