"""Means of logged values and their noise."""

from __future__ import annotations

import math

import pytest

from fastalign.report.numbers import change_of, first_quarter, is_finite, last_quarter, noise_of


def test_quarters_have_at_least_three_values():
    values = list(range(16))
    assert (first_quarter(values), last_quarter(values)) == (values[:4], values[-4:])
    assert (first_quarter(values[:5]), last_quarter(values[:5])) == ([0, 1, 2], [2, 3, 4])


def test_the_noise_is_two_standard_errors_of_the_difference():
    assert noise_of([0.0, 2.0], [1.0, 1.0]) == pytest.approx(2 * math.sqrt(2 / 2))
    assert noise_of([5.0]) == 0
    assert change_of([1.0, 1.0, 1.0, 3.0, 3.0, 3.0]) == (2.0, 0.0)


def test_only_numbers_are_finite():
    assert is_finite(1) and is_finite(0.5)
    assert not any(map(is_finite, (True, None, "1", math.nan, math.inf)))
