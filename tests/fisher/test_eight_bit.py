"""Sums in 8 bits: right in the mean, with the errors that are stated, however small the portions they are made of."""

from __future__ import annotations

import pytest
import torch

from fastalign.fisher import eight_bit
from fastalign.fisher.eight_bit import STEP, ByteSums, add_products_, add_rows_
from fastalign.ops.accumulate_fisher import accumulate_fisher_

ROWS, COLUMNS = 64, 96


def zeros(rows=ROWS, columns=COLUMNS, dtype=torch.float32):
    return ByteSums.zeros(torch.empty(rows, columns), dtype, torch.Generator().manual_seed(0))


def squares(generator, rows=ROWS, columns=COLUMNS):
    """Of gradients whose sizes differ by entry, the squares' over ten octaves."""
    sizes = torch.exp2(-5 * torch.rand(rows, columns, generator=torch.Generator().manual_seed(9)))
    return (sizes * (0.5 + torch.rand(rows, columns, generator=generator))).square()


def errors(sums, exact):
    return (sums.values().double() / exact - 1).flatten()


# Of sums of random squares. After many batches: sqrt((2^STEP - 1) / 2) = 0.184, for a sum in equal portions.
@pytest.mark.parametrize(("batches", "stated"), [(1, 0.03), (30, 0.1), (300, 0.18), (1500, 0.18)])
def test_right_in_the_mean_and_off_by_what_is_stated(batches, stated):
    sums, generator = zeros(), torch.Generator().manual_seed(1)
    exact = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for _ in range(batches):
        portion = squares(generator)
        exact += portion
        with sums.opened(slice(None)) as values:
            values.add_(portion)
    off = errors(sums, exact)
    assert 0.7 * stated < off.square().mean().sqrt() < 1.05 * stated
    assert off.mean().abs() < 4 * off.std() / off.numel() ** 0.5


def test_portions_smaller_than_a_step_are_not_lost():
    sums = zeros()
    for portion in [1.0, *[0.002] * 500]:
        with sums.opened(slice(None)) as values:
            values.add_(portion)
    off = errors(sums, 2.0)
    assert off.mean().abs() < 4 * 0.18 / off.numel() ** 0.5 and off.std() < 0.18


def test_entries_to_which_nothing_is_added_stay_as_they_are():
    sums = zeros()
    with sums.opened(slice(None)) as values:
        values.add_(squares(torch.Generator().manual_seed(2)))
    before = sums.values()
    for _ in range(40):  # the scale of every row grows, by 40 times
        with sums.opened(slice(None)) as values:
            values[:, 0] += before.amax()
    stayed = (sums.values() / before - 1).abs()[:, 1:] < 1e-5
    assert stayed.float().mean() > 0.999  # rounding of the scale lets one go a step, once in a million times
    assert (sums.values()[:, 0] / (before[:, 0] + 40 * before.amax()) - 1).abs().max() < 0.5


def test_nothing_and_what_is_far_below_the_largest():
    sums = zeros(2, 5000)
    with sums.opened(slice(0, 1)) as values:
        values.add_(2.0**-30)
        values[0, 0] = 1.0
    assert not sums.values()[1].any() and sums.values()[0, 0] == 1
    small = sums.values()[0, 1:]  # below the least code, 2^-24: that or 0, in the mean right
    assert set(small.unique().tolist()) == {0.0, 2.0 ** (-254 * STEP)}
    assert abs(small.mean() * 2**30 - 1) < 4 * (64 / 5000) ** 0.5


def test_what_is_no_number_is_not_hidden():
    sums = zeros(3, 4)
    with sums.opened(slice(None)) as values:
        values[1, 2] = float("nan")
    assert sums.values()[1].isnan().all() and not sums.values()[::2].any()


def test_codes_nearest_to_values():
    values = torch.exp(8 * torch.randn(37, 61, generator=torch.Generator().manual_seed(0)))  # over thirty octaves
    values[3:9], values[0, :5] = 0.0, 0.0
    found = ByteSums.nearest(values).values()
    budget = torch.maximum(0.034 * values, 6e-8 * values.amax(1, keepdim=True))
    assert ((found - values).abs() <= budget).all() and torch.equal(found.amax(1), values.amax(1))
    assert ByteSums.nearest(torch.zeros(3, 0)).values().shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_and_rows_are_added_as_to_a_tensor(dtype, monkeypatch):
    monkeypatch.setattr(eight_bit, "_TILE", 10 * COLUMNS)  # several tiles of rows, the last one lower
    generator = torch.Generator().manual_seed(3)
    g, x = (torch.randn(20, n, generator=generator, dtype=dtype) for n in (ROWS, COLUMNS))
    bounds, index = torch.tensor([0, 7, 20]), torch.tensor([50, 2, 50])
    rows = 9 * torch.rand(3, COLUMNS, generator=generator, dtype=dtype)
    exact, sums = torch.zeros(ROWS, COLUMNS, dtype=dtype), zeros(dtype=dtype)
    for total in (exact, sums):
        add_products_(total, g, x, bounds)
        add_products_(total[8:30], g[:, 8:30], x, bounds)  # a part of it, in the same memory
        add_rows_(total, index, rows)
    assert sums.values().dtype == dtype and sums.codes.dtype == torch.uint8
    expected = accumulate_fisher_(torch.zeros_like(exact), g, x, bounds)
    expected[8:30] *= 2
    expected.index_add_(0, index, rows)
    torch.testing.assert_close(exact, expected)
    near = exact > exact.amax(1, keepdim=True) / 2**20
    assert (errors(sums, exact.double())[near.flatten()].abs() < 3 * (2**STEP - 1)).all()  # rounded three times at most
