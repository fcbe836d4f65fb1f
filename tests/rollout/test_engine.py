"""What an engine is asked for is checked with one sentence each."""

from __future__ import annotations

import pytest

from fastalign.errors import InputError
from fastalign.rollout.engine import Sampling, check_request


@pytest.mark.parametrize(
    ("prompts", "k", "sampling", "message"),
    [
        ([[1]], 0, Sampling(4), "k is 0"),
        ([[1]], 1, Sampling(0), "max_new_tokens 0"),
        ([[1]], 1, Sampling(4, 0.0), "temperature is 0.0"),
        ([[1]], 1, Sampling(4, float("nan")), "temperature is nan"),
        ([[1], []], 1, Sampling(4), "Prompt 1 is empty"),
    ],
)
def test_requests_that_make_no_sense(prompts, k, sampling, message):
    with pytest.raises(InputError, match=message):
        check_request(prompts, k, sampling)
