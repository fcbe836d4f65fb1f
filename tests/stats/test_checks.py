"""What the checks of statistics refuse, by the sentence that a user reads."""

from __future__ import annotations

import numpy as np
import pytest

from fastalign.errors import InputError
from fastalign.stats.checks import numbers, outcomes, same_length, share


def test_what_fits_comes_back_as_float64():
    assert numbers("x", [1, 2]).dtype == np.float64
    assert outcomes("x", [True, False]).tolist() == [1.0, 0.0]
    assert share("rate", 0.1) == 0.1
    same_length(a=np.zeros(2), b=np.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: numbers("x", [[1]]), r"x has the shape \(1, 1\); expected 1 dimension$"),
        (lambda: numbers("x", [1], least=2), "x has 1 value; at least 2 are needed"),
        (lambda: numbers("x", [np.inf, np.nan]), "x holds 2 NaN or infinite values"),
        (lambda: outcomes("x", [0.5]), "x holds 0.5; expected 0 or 1"),
        (lambda: share("rate", 1), "rate is 1; expected a number between 0 and 1"),
        (lambda: same_length(a=np.zeros(2), b=np.ones(3)), r"lengths differ \(a 2, b 3\)"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
