"""What every loss refuses, and in which words."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import InputError
from fastalign.losses.checks import describe
from fastalign.losses.pointwise import nca
from fastalign.losses.preference import dpo, hinge, ipo, robust
from fastalign.losses.transport import aot

BAD_CALLS = [
    (dpo, (torch.zeros(3), torch.zeros(2)), {}, r"rejected is a \(2,\) float32 tensor on cpu but chosen is a \(3,\)"),
    (dpo, (torch.zeros(3), torch.zeros(3).double()), {}, r"rejected is a \(3,\) float64 .* expected the same shape"),
    (dpo, (torch.zeros(3, 1), torch.zeros(3, 1)), {}, r"chosen is a \(3, 1\) .* one log-probability per sequence"),
    (ipo, (torch.zeros(3).bfloat16(), torch.zeros(3)), {}, "chosen is a .* bfloat16 .* sum the token log-prob"),
    (ipo, (-1.0, torch.zeros(3)), {}, "chosen is a float; expected one log-probability per sequence"),
    (hinge, (torch.zeros(3), torch.zeros(3)), {"beta": 0.0}, r"beta is 0\.0; expected a finite number above 0"),
    (nca, (torch.zeros(3), torch.zeros(3)), {"beta": float("nan")}, "beta is nan; expected a finite number above 0"),
    (aot, (torch.zeros(3), torch.zeros(3)), {"label_smoothing": 0.5}, r"label_smoothing is 0\.5; .* swap chosen"),
    (robust, (torch.zeros(3), torch.zeros(3)), {"label_smoothing": -0.1}, r"label_smoothing is -0\.1"),
]


@pytest.mark.parametrize(("loss", "pair", "options", "sentence"), BAD_CALLS)
def test_bad_input_is_refused_in_one_sentence(loss, pair, options, sentence):
    with pytest.raises(InputError, match=sentence):
        loss(*pair, torch.zeros(3), torch.zeros(3), **options)


def test_what_an_argument_is_in_the_words_of_an_error():
    assert describe(torch.zeros(2, 3).bfloat16()) == "a (2, 3) bfloat16 tensor on cpu"
    assert describe(None) == "a NoneType"
