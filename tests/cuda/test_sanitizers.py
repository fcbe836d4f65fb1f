"""The kernels under the address, undefined-behaviour and thread sanitizers; faults planted to show that they see."""

from __future__ import annotations

import pytest

OPS = ["selective_logprobs", "online_softmax", "softmax_gradient", "preference_loss", "accumulate_fisher"]
FAULTS = {
    "no barrier before the warps' sums are read": (
        "selective_logprobs", "thread", "    __syncthreads();\n    T all", "    T all", "data race",
    ),
}  # fmt: skip


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("op", OPS)
def test_clean(sanitized, op, sanitizer):
    done = sanitized(op, sanitizer)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(sanitized, fault):
    op, sanitizer, old, new, words = FAULTS[fault]
    done = sanitized(op, sanitizer, (old, new))
    assert done.returncode != 0 and words in done.stderr, done.stderr[-4000:]
