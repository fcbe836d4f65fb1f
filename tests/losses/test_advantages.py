"""Advantages against plain formulas, with missing rewards and groups without spread."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import InputError
from fastalign.losses.advantages import group_relative, leave_one_out, without_spread


def test_advantages_by_plain_formulas():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, float("nan"), 3.5], [7.0, 7.0, 7.0]])
    found = group_relative(rewards)
    first = rewards[0]
    torch.testing.assert_close(found[0], (first - first.mean()) / (first.std() + 1e-4))
    assert found[1, 1] == 0 and found[1, 0] == -found[1, 2] and (found[2] == 0).all()
    loo = leave_one_out(rewards)
    torch.testing.assert_close(loo[0], torch.tensor([1 - 3.0, 2 - 2.5, 4 - 1.5]))
    torch.testing.assert_close(loo[1], torch.tensor([-0.5, 0.0, 0.5]))


def test_scales():
    rewards = torch.tensor([[1.0, 2.0], [5.0, 9.0]])
    centred = torch.tensor([[-0.5, 0.5], [-2.0, 2.0]])
    torch.testing.assert_close(group_relative(rewards, "none"), centred)
    torch.testing.assert_close(group_relative(rewards, "batch"), centred / (rewards.std() + 1e-4))
    torch.testing.assert_close(leave_one_out(rewards), 2 * centred)


def test_equal_rewards_give_exactly_0_whatever_their_mean_rounds_to():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [float("nan"), 0.3, float("nan")], [0.1, 0.2, float("nan")]])
    assert without_spread(rewards).tolist() == [True, True, False]
    for found in (group_relative(rewards), group_relative(rewards, "none"), leave_one_out(rewards)):
        assert (found[:2] == 0).all() and found.isfinite().all()


def test_one_answer_has_no_baseline():
    for function in (group_relative, leave_one_out):
        with pytest.raises(InputError, match="at least k = 2 answers"):
            function(torch.zeros(3, 1))
    with pytest.raises(InputError, match="scale is 'row'"):
        group_relative(torch.zeros(1, 2), "row")
