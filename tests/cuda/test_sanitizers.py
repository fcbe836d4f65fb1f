"""The kernels under the address, undefined-behaviour and thread sanitizers; faults planted to show that they see.

ThreadSanitizer keeps the last few accesses of each word. What it misses more often than not (measured: 16 runs of 18)
is a fast warp that writes a reduction's memory again while slow ones read it: each reduction of a kernel has its own.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

OPS = [
    "selective_logprobs",
    "online_softmax",
    "finish",
    "softmax_gradient",
    "preference_loss",
    "accumulate_fisher",
    "ewc",
    "linear_divergence",
]
RACE, OVERFLOW = "data race", "AddressSanitizer"


class Fault(NamedTuple):
    op: str
    sanitizer: str
    old: str
    new: str
    words: str  # of the sanitizer's report


FAULTS = {
    "no barrier before the sums of the warps are read": Fault(
        "selective_logprobs", "thread", "    __syncthreads();\n    T all", "    T all", RACE
    ),
    "one value too many at the end of a row is read": Fault(
        "selective_logprobs", "address", "tail + thread < vocab) add_one", "tail + thread <= vocab) add_one", OVERFLOW
    ),
}
MORE_FAULTS = {
    "one value too many is written": Fault(
        "selective_logprobs", "address", "tail + thread < vocab) one", "tail + thread <= vocab) one", OVERFLOW
    ),
    "a target is not looked at before it is used": Fault(
        "selective_logprobs", "address", "inside = target >= 0 && target < p.vocab", "inside = true", OVERFLOW
    ),
    "16 bytes are stored where a row of the result does not allow it": Fault(
        "selective_logprobs", "address", "alike ? unaligned_head(logits, vocab) : vocab",
        "unaligned_head(logits, vocab)", "misaligned address",
    ),
    "a gradient is written past its last column": Fault(
        "finish", "address", "i < p.width; i +=", "i <= p.width; i +=", OVERFLOW
    ),
    "a tile is read past its last column": Fault(
        "online_softmax", "address", "i < left ? to_float", "i <= left ? to_float", OVERFLOW
    ),
    "a tile is written past its last column": Fault(
        "softmax_gradient", "address", "if (i < left) at", "if (i <= left) at", OVERFLOW
    ),
    "a narrow result is written in place before all is read": Fault(
        "softmax_gradient", "thread", "    __syncthreads();  // du may", "    // du may", RACE
    ),
    "a narrow result without options is written in place before all is read": Fault(
        "softmax_gradient", "thread", "    __syncthreads();  // as in gradient_kernel", "    // as in it", RACE
    ),
    "a warp leaves the shuffle early": Fault(
        "online_softmax", "address", "    const float before = p.shift[row];\n    float",
        "    if (threadIdx.x == 5) return;\n    const float before = p.shift[row];\n    float",
        "takes no part in an exchange",
    ),
    "no barrier before the slopes are read": Fault(
        "preference_loss", "thread", "    __syncthreads();\n    spread", "    spread", RACE
    ),
    "offsets are believed": Fault("preference_loss", "address", "right ? end : begin", "end", OVERFLOW),
    "a chunk is overwritten while it is multiplied": Fault(
        "accumulate_fisher", "thread", "        __syncthreads();  // the next chunk", "        // the next chunk", RACE
    ),
    "no barrier between a patch and its reading": Fault(
        "accumulate_fisher", "thread", "    __syncwarp();\n    for (int pack", "    for (int pack", RACE
    ),
    "an operand is read past its last column": Fault(
        "accumulate_fisher", "address", "if (column + i < columns) pack", "if (column + i <= columns) pack", OVERFLOW
    ),
    "a tensor's last block is taken for a whole one": Fault(
        "ewc", "address", "t.size - start < kHeldBlock ? t.size - start : kHeldBlock", "kHeldBlock", OVERFLOW
    ),
    "a gradient is written in place before all is read": Fault(
        "linear_divergence", "thread", "    __syncthreads();  // c may", "    // c may", RACE
    ),
}  # fmt: skip


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("op", OPS)
def test_clean(sanitized, op, sanitizer):
    done = sanitized(op, sanitizer)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]


def assert_caught(sanitized, fault: Fault):
    done = sanitized(fault.op, fault.sanitizer, (fault.old, fault.new))
    assert done.returncode != 0 and fault.words in done.stderr, done.stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(sanitized, fault):
    assert_caught(sanitized, FAULTS[fault])


@pytest.mark.slow
@pytest.mark.parametrize("fault", MORE_FAULTS)
def test_each_other_fault_is_caught(sanitized, fault):
    assert_caught(sanitized, MORE_FAULTS[fault])
