"""Checks that the ops share: what passes, and what each error says. The ops' tests hold the rest of the sentences."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import InputError
from fastalign.ops.head import checks

FLOAT, LONG = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)


def test_what_fits_passes():
    checks.check_linear(FLOAT, torch.zeros(7, 3), torch.zeros(7), 3.0, of="teacher_")
    checks.check_targets(LONG, (2, 5), of="hidden")
    checks.check_token_ids("ids", LONG, 1, op="op")
    checks.check_temperature(0.5)
    checks.check_memory_budget(None)
    checks.check_memory_budget(0)
    checks.check_divergence("jsd", 1.0, 0.5)
    checks.check_divergence("forward_kl", 1.0, 5.0)
    checks.check_tail("drop")
    checks.check_per_token(LONG.bool(), LONG.float(), (2, 5))
    checks.check_same_tokens(FLOAT, torch.zeros(2, 5, 8))
    checks.check_teacher_entries((2,), 5, LONG, LONG.float())
    checks.check_devices(FLOAT, None, LONG)


REFUSED = {
    "side": (lambda: checks.check_linear(LONG, FLOAT[0], None, None, of="teacher_"), r"teacher_hidden is .*int64"),
    "scalar": (lambda: checks.check_linear(torch.tensor(1.0), FLOAT[0], None, None), r"hidden is \(\)"),
    "shift": (
        lambda: checks.check_targets(LONG, (2, 6), of="logits"), r"logits\[..., t\] predicts.*logits\[\.\.\., :-1, :\]",
    ),
    "both differ": (lambda: checks.check_targets(LONG, (3, 6), of="logits"), r"the last, \(3, 6\)$"),
    "shift of no dimension": (lambda: checks.check_targets(LONG[0, 0], (1,), of="hidden"), r"the last, \(1,\)$"),
    "id": (lambda: checks.check_token_ids("ids", LONG - 1, 5, op="op"), r"ids holds -1, but .* 5 entries; .*\[0, 5\)$"),
    "ignored": (
        lambda: checks.check_token_ids("ids", LONG - 1, 5, op="op", ignore_index=-7), r"\[0, 5\) or ignore_index=-7$",
    ),
    "no entries": (
        lambda: checks.check_teacher_entries((), 5, LONG[0, 0], LONG[0, 0].float()), r"\('k',\) with k from 1 to 5",
    ),
    "too many entries": (lambda: checks.check_teacher_entries((2,), 4, LONG, LONG.float()), "with k from 1 to 4"),
    "devices": (lambda: checks.check_devices(FLOAT, LONG.to("meta")), r"\['cpu', 'meta'\]; move them to one device"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name):
    check, said = REFUSED[name]
    with pytest.raises(InputError, match=said):
        check()


def test_elsewhere_than_on_the_cpu_the_device_asserts():
    """Nothing may wait for the values: on meta there are none."""
    checks.check_token_ids("ids", LONG.to("meta"), 1, op="op")
