"""Arguments that no op can use: each is refused by one sentence of ours, on every backend. None is computed with."""

from __future__ import annotations

import math
import re

import pytest
import torch

import fastalign as fa
from fastalign.errors import FastAlignError, InputError

INF, NAN = math.inf, math.nan
BACKENDS = ("torch", "cpu", "reference", "auto")


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


TARGETS = torch.tensor([0, 1])
ENTRIES = {"teacher_indices": torch.tensor([[0], [1]]), "teacher_logprobs": torch.tensor([[-0.5], [-0.5]])}
LOGPROBS = {"hidden": rand(2, 3), "weight": rand(4, 3), "targets": TARGETS}
DIVERGENCE = {"hidden": rand(2, 3), "weight": rand(4, 3), "teacher_hidden": rand(2, 5), "teacher_weight": rand(4, 5)}
SPARSE = {"hidden": rand(2, 3), "weight": rand(4, 3), **ENTRIES}
SELECTIVE = {"logits": rand(2, 4), "targets": TARGETS}

# Changes of the arguments, and what the sentence says.
OF_THE_HEAD = [
    ({"weight": rand(0, 3)}, "vocabulary"),
    ({"hidden": rand(2, 0), "weight": rand(4, 0)}, "width"),
    ({"softcap": INF}, "softcap is inf.*None"),
    ({"softcap": 1e-300}, "softcap is 1e-300"),
    ({"softcap": "30"}, "softcap is '30'"),
    ({"logit_scale": NAN}, "logit_scale is nan"),
    ({"logit_scale": INF}, "logit_scale is inf"),
    ({"logit_scale": None}, "logit_scale is None"),
    ({"logit_scale": 0.0}, "logit_scale is 0.0; it must be finite, at most"),
    ({"temperature": 1e-300}, "temperature is 1e-300"),
    ({"temperature": INF}, "temperature is inf"),
    ({"temperature": "1"}, "temperature is '1'"),
    ({"bias": [1.0, 2.0, 3.0, 4.0]}, "bias is a list"),
    ({"weight": [[1.0]]}, "weight is a list"),
    ({"weight": rand(4, 3).to(torch.float8_e4m3fn)}, "weight is torch.float8_e4m3fn"),
    ({"weight": rand(4, 3).to_sparse()}, "weight is .*sparse"),
]
OF_LINEAR_LOGPROBS = [
    ({"ignore_index": 1.5}, "ignore_index is 1.5"),
    ({"ignore_index": 2**70}, "ignore_index is 1180591620717411303424"),
    ({"memory_budget": INF}, "memory_budget is inf"),
    ({"memory_budget": 1.5}, "memory_budget is 1.5"),
    ({"memory_budget": "1"}, "memory_budget is '1'"),
    ({"targets": torch.tensor([0, 9])}, "targets holds 9"),
    ({"targets": [0, 1]}, "targets is a list"),
]
OF_SELECTIVE = [
    ({"logits": rand(2, 0)}, "vocabulary"),
    ({"ignore_index": 2**70}, "ignore_index is 1180591620717411303424"),
    ({"ignore_index": True}, "ignore_index is True"),
    ({"temperature": "1"}, "temperature is '1'"),
    ({"temperature": 1e-300}, "temperature is 1e-300"),
    ({"targets": torch.tensor([0, 9])}, "targets holds 9"),
    ({"logits": [[1.0]]}, "logits is a list"),
]
TEACHER = [
    ({"teacher_weight": rand(0, 5)}, "vocabulary"),
    ({"teacher_softcap": INF}, "teacher_softcap is inf"),
    ({"teacher_logit_scale": NAN}, "teacher_logit_scale is nan"),
    ({"memory_budget": 1.5}, "memory_budget is 1.5"),
    ({"jsd_beta": "x", "divergence": "jsd"}, "jsd_beta is 'x'"),
]
CASES = [
    *((fa.linear_logprobs, LOGPROBS, *case) for case in OF_THE_HEAD + OF_LINEAR_LOGPROBS),
    *((fa.selective_logprobs, SELECTIVE, *case) for case in OF_SELECTIVE),
    *((fa.linear_divergence, DIVERGENCE, *case) for case in OF_THE_HEAD + TEACHER),
    *((fa.sparse_divergence, SPARSE, *case) for case in OF_THE_HEAD),
    (fa.logits_divergence, {"student_logits": rand(2, 0), "teacher_logits": rand(2, 4)}, {}, "vocabulary"),
    (fa.logits_divergence, {"student_logits": rand(2, 4), "teacher_logits": rand(2, 0)}, {}, "vocabulary"),
    (fa.logits_divergence, {"student_logits": rand(2, 4), "teacher_logits": [1.0]}, {}, "teacher_logits is a list"),
    (fa.sparse_logits_divergence, {"student_logits": rand(2, 0), **ENTRIES}, {}, "vocabulary"),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sentence_names_what_is_wrong(backend):
    unlike = []
    for op, arguments, change, words in CASES:
        if op in (fa.logits_divergence, fa.sparse_logits_divergence) and backend == "cpu":
            continue
        try:
            result = op(**{**arguments, **change}, backend=backend)
        except InputError as error:
            if not re.search(words, str(error)):
                unlike.append(f"{op.__name__} {change}: {error}")
        except Exception as error:
            unlike.append(f"{op.__name__} {change}: {type(error).__name__}: {error}")
        else:
            unlike.append(f"{op.__name__} {change}: computed {result}")
    assert not unlike, "\n".join(unlike)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 2), (0, 0), (0,)])
def test_no_rows_are_no_error(backend, shape):
    targets = torch.zeros(shape, dtype=torch.int64)
    logits = rand(*shape, 5).requires_grad_()
    out = fa.selective_logprobs(logits, targets, backend=backend)
    out.sum().backward()
    assert out.shape == shape and logits.grad is not None and logits.grad.shape == logits.shape
    hidden, weight = rand(*shape, 3).requires_grad_(), rand(5, 3).requires_grad_()
    out = fa.linear_logprobs(hidden, weight, targets, backend=backend)
    out.sum().backward()
    assert out.shape == shape and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_target_of_selective_logprobs_may_count(backend):
    with_index = fa.selective_logprobs(rand(2, 4), TARGETS, backend=backend)
    assert torch.equal(fa.selective_logprobs(rand(2, 4), TARGETS, ignore_index=None, backend=backend), with_index)
    with pytest.raises(InputError, match="targets holds -100"):
        fa.selective_logprobs(rand(2, 4), TARGETS - 100, ignore_index=None, backend=backend)


@pytest.mark.parametrize("op", ["linear_logprobs", "selective_logprobs"])
def test_function_transforms_are_refused(op):
    """torch's own error names an internal method of autograd. The reference, which torch sees into, takes them."""

    def loss(x, backend):
        if op == "linear_logprobs":
            return fa.linear_logprobs(x, rand(4, 3), TARGETS, backend=backend).sum()
        return fa.selective_logprobs(x, TARGETS, backend=backend).sum()

    with pytest.raises(FastAlignError, match=r"torch\.func.*backend='reference'"):
        torch.func.grad(lambda x: loss(x, "auto"))(rand(2, 3))


@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
def test_no_pairs_have_no_losses(backend):
    logprobs = torch.zeros(0, requires_grad=True)
    out = fa.preference_loss(logprobs, torch.zeros(1, dtype=torch.int64), torch.zeros(0), backend=backend)
    out.losses.sum().backward()
    assert out.losses.shape == (0,) and logprobs.grad is not None
