"""The table of losses: what holds for every row, and that a row is all that a new loss needs."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastalign import losses
from fastalign.errors import InputError
from fastalign.losses import (
    ALIASES,
    LENGTH_NORMALISED,
    PAIRWISE,
    REFERENCE_FREE,
    UNPAIRED,
    canonical,
    loss_function,
    options_of,
)


def test_sets_and_aliases_name_losses_that_exist():
    assert PAIRWISE.keys() >= REFERENCE_FREE | LENGTH_NORMALISED
    assert set(ALIASES.values()) <= PAIRWISE.keys() and not ALIASES.keys() & PAIRWISE.keys()


@pytest.mark.parametrize("name", PAIRWISE)
def test_signatures_are_what_the_sets_say(name):
    parameters = inspect.signature(PAIRWISE[name].function).parameters.values()
    tensors = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    references = [] if name in REFERENCE_FREE else ["ref_chosen", "ref_rejected"]
    assert tensors == ["chosen", "rejected", *references]
    assert len(parameters) <= 6
    assert "arXiv:" in (PAIRWISE[name].function.__doc__ or "")


def test_every_loss_type_of_trl_is_known():
    trl = (
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop "
        "sigmoid_norm"
    )
    for name in trl.split():
        assert canonical(name) in PAIRWISE


def logprobs(name: str, batch: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = 2 if name in REFERENCE_FREE else 4
    return [
        (-4 * torch.rand(batch, dtype=torch.float64, generator=generator) - 0.01).requires_grad_() for _ in range(count)
    ]


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_are_those_of_the_values(name):
    assert torch.autograd.gradcheck(PAIRWISE[name].function, logprobs(name, batch=3), check_undefined_grad=False)


@pytest.mark.parametrize("name", sorted(PAIRWISE.keys() - REFERENCE_FREE - {"aot", "aot_unpaired"}))
def test_gradients_where_the_policy_is_the_reference(name):
    chosen, rejected, _, _ = logprobs(name, batch=3)
    references = chosen.detach().clone().requires_grad_(), rejected.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(PAIRWISE[name].function, (chosen, rejected, *references), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRWISE)
def test_values_and_gradients_are_finite_at_large_margins_in_the_dtype_given(name, dtype):
    chosen, rejected = torch.tensor(
        [(a, b) for a in (-1e4, -3.0, 0.0) for b in (-1e4, -3.0, 0.0)], dtype=dtype
    ).T.contiguous()
    inputs = [chosen.requires_grad_(), rejected.requires_grad_()]
    if name not in REFERENCE_FREE:
        inputs += [chosen.detach().flip(0), rejected.detach().roll(1)]
    values = PAIRWISE[name].function(*inputs)
    grads = torch.autograd.grad(values.sum(), inputs[:2])
    assert values.shape == (9,) and values.dtype == dtype
    assert torch.isfinite(torch.stack((values, *grads))).all()


@pytest.mark.parametrize("name", PAIRWISE)
def test_no_loss_looks_at_tensor_values(name):
    values = PAIRWISE[name].function(*(tensor.detach().to("meta") for tensor in logprobs(name)))
    assert values.shape == (6,)


@pytest.mark.parametrize("name", PAIRWISE)
def test_every_loss_validates(name):
    inputs = [tensor.detach() for tensor in logprobs(name)]
    with pytest.raises(InputError, match="expected the same shape"):
        PAIRWISE[name].function(*inputs[:-1], inputs[-1][:5])
    with pytest.raises(InputError, match="beta is -1"):
        PAIRWISE[name].function(*inputs, beta=-1)


@pytest.mark.parametrize("name", [*PAIRWISE, *UNPAIRED])
def test_every_function_is_a_name_of_the_package_and_fully_documented(name):
    function = loss_function(name)
    assert getattr(losses, function.__name__) is function
    doc = inspect.getdoc(function) or ""
    _, _, arguments = doc.partition("Args:\n")
    assert all(f"\n    {parameter}: " in f"\n{arguments}" for parameter in inspect.signature(function).parameters)
    assert all(section in doc for section in ("\n    L = ", "\nReturns:", "\nRaises:", "\nReferences:"))


def test_options_are_the_keyword_defaults():
    assert options_of("simpo") == {"beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.0}
    assert options_of("kto") == {"beta": 0.1, "weights": (1.0, 1.0)}
    assert all("beta" in options_of(name) for name in [*PAIRWISE, *UNPAIRED])
