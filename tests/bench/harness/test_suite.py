"""What the suites share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.harness.measure import Missing
from bench.harness.suite import by_name, draw_head, peer


def test_cases_keep_their_order():
    cases = [SimpleNamespace(name=name) for name in ("b", "a")]
    assert list(by_name(cases).items()) == [("b", cases[0]), ("a", cases[1])]


def test_a_missing_package_is_named_with_the_remedy():
    assert peer("math", len) is len
    with pytest.raises(Missing, match=r"no_such_package.*pip install 'fastalign\[bench\]'"):
        peer("no_such_package", len)


def test_logits_of_a_drawn_head_have_standard_deviation_3():
    hidden, weight = draw_head(torch.Generator().manual_seed(0), 200, 48, 500)
    assert hidden.shape == (200, 48) and weight.shape == (500, 48)
    assert (hidden @ weight.T).std() == pytest.approx(3, rel=0.05)
    again, _ = draw_head(torch.Generator().manual_seed(0), 200, 48, 500)
    assert torch.equal(hidden, again)
