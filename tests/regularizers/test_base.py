"""What all regularisers have in common: any cut into micro-batches gives the same update, and all can be combined."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastalign.errors import ConfigError
from fastalign.regularizers.base import check_positive, once_a_step
from fastalign.regularizers.distillation import Distillation
from fastalign.regularizers.ewc import EWC, L2SP
from fastalign.regularizers.kl import KLToStart
from fastalign.regularizers.layerwise import LayerWise
from fastalign.regularizers.replay import Replay
from fastalign.training.distillation import DistillationTrainer
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer

# In float64 rounding reaches 1e-12 of the largest parameter, and any error of a formula is far above this.
EXACT = 1e-9
LIVE = {"precompute_ref_log_probs": False}


@pytest.mark.parametrize("kind", [SFTTrainer, PreferenceTrainer])
def test_update_does_not_depend_on_gradient_accumulation(
    make_trainer, text_rows, pairs, kind, gpt2, random_fisher, largest_difference
):
    options = LIVE if kind is PreferenceTrainer else {}
    results = []
    for size, accumulated in ((8, 1), (2, 4), (1, 8)):
        model = gpt2()
        terms = [EWC(random_fisher(model), 50.0), L2SP(1.0), KLToStart(2.0)]
        make_trainer(
            model, pairs if kind is PreferenceTrainer else text_rows, kind, regularizers=terms, max_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **options,
        ).train()  # fmt: skip
        results.append(dict(model.named_parameters()))
    assert largest_difference(gpt2(), results[0]) > 1e-4
    for result in results[1:]:
        assert max((result[n] - results[0][n]).abs().max().item() for n in result) < EXACT


@pytest.mark.parametrize("kind", [PreferenceTrainer, DistillationTrainer])
def test_all_combine(make_trainer, text_rows, pairs, kind, gpt2, random_fisher, largest_difference):
    """Every regulariser at once; still the same for any cut into micro-batches."""
    rows, options = (pairs, LIVE) if kind is PreferenceTrainer else (text_rows, {"teacher": "start", "weight": 0.7})
    text = [{"text": f"Line {i} of a text." + "." * i} for i in range(5)]
    results = []
    for size, accumulated in ((8, 1), (1, 8)):
        model = gpt2()
        everything = [
            EWC(random_fisher(model), 50.0), L2SP(1.0), KLToStart(2.0), Distillation("start", 0.6, 2.0),
            Replay(text, 0.3), LayerWise([1, 2], [0, 0.5], 0.7),
        ]  # fmt: skip
        trainer = make_trainer(
            model, rows, kind, regularizers=everything, max_steps=4, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated, **options,
        )  # fmt: skip
        trainer.train()
        results.append(dict(model.named_parameters()))
        names = {"ewc", "l2_sp", "kl_to_start", "distillation", "replay/nll", "replay/share", "layers_trained"}
        assert names <= trainer.state.log_history[-2].keys()
    assert max((results[0][n] - results[1][n]).abs().max().item() for n in results[0]) < EXACT
    assert largest_difference(gpt2(), results[0]) > 1e-4


def test_a_penalty_is_added_with_the_first_micro_batch_alone():
    weight = torch.ones(2, requires_grad=True)
    term = once_a_step("pull", weight.sum)
    first, later = (SimpleNamespace(first=first, loss=torch.zeros((), dtype=torch.float64)) for first in (True, False))
    value, metrics = term(first)
    assert value.item() == 2.0 and value.dtype == torch.float64 and value.requires_grad
    assert [part.item() for part in metrics["pull"]] == [2.0, 1.0]
    value, metrics = term(later)
    assert value.item() == 0.0 and not metrics


@pytest.mark.parametrize("value", [0.0, -1, math.inf, math.nan, True, "1", None])
def test_what_is_no_positive_number_is_named(value):
    check_positive("EWC", strength=1, decay=0.5)
    with pytest.raises(ConfigError, match=rf"^decay of EWC is {value!r}; it must be a number above 0$"):
        check_positive("EWC", strength=1, decay=value)
