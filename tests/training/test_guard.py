"""A loss or a gradient that is not finite stops the run, and the weights stay as after the last good step."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import TrainerCallback

from fastalign.errors import TrainingError
from fastalign.files import read_jsonl
from fastalign.training.guard import FILE_NAME, FiniteGuard
from fastalign.training.sft import SFTTrainer

ROWS = [{"prompt": f"row {i}", "completion": "abc" * (1 + i % 3)} for i in range(16)]


class Spoil:
    """A regulariser that adds a term: NaN, or 0 with a gradient of NaN, in one micro-batch."""

    def __init__(self, what: str, call: int):
        self.what, self.call, self.calls = what, call, 0

    def start(self, trainer):
        self.trainer = trainer
        return self

    def __call__(self, step):
        self.calls += 1
        parameter = next(p for p in step.model.parameters() if p.requires_grad)
        zero = parameter.sum() * 0
        if self.calls != self.call:
            return zero, {}
        if self.what == "loss":
            return zero * float("nan"), {}
        return (parameter - parameter).sum().sqrt(), {}  # 0, whose gradient is inf * 0 = NaN


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def good_steps(make_trainer, tiny_llama, steps, **options):
    """The weights after so many steps of the same run without a fault."""
    model = tiny_llama()
    good = make_trainer(model, ROWS, SFTTrainer, **options)
    good.add_callback(StopAfter(steps))
    good.train()
    return weights(model)


class StopAfter(TrainerCallback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("norm", [0.0, 1.0])
@pytest.mark.parametrize(
    ("optim", "at_once"), [("sgd", True), ("adamw_torch_fused", True), ("adamw_torch_fused", False)]
)
def test_what_is_not_finite_never_reaches_the_weights(make_trainer, tiny_llama, tmp_path, what, norm, optim, at_once):
    options = {"max_steps": 8, "logging_steps": 5, "optim": optim, "max_grad_norm": norm, "learning_rate": 1e-2}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    expected = good_steps(make_trainer, tiny_llama, 2, **options)
    model = tiny_llama()
    # the fifth micro-batch is the first of the third step
    trainer = make_trainer(model, ROWS, SFTTrainer, regularizers=[Spoil(what, 5)], **options)
    trainer.guard.at_once = at_once
    with pytest.raises(TrainingError, match=f"Step 3: the {what} is not finite .*the weights stay as after step 2"):
        trainer.train()
    # Without a read at once, step 3 and those up to the end of the epoch are made, but they change nothing.
    assert trainer.state.global_step == (2 if at_once else 4)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), expected, strict=True))
    rows = read_jsonl(tmp_path / "run" / FILE_NAME)
    assert len(rows) == (2 if what == "loss" else 4)
    assert {row["prompt"] for row in rows} <= {row["prompt"] for row in ROWS}
    assert all(row["step"] == 3 and row["not_finite"] == what and row["completions"] for row in rows)


def test_checks_are_read_before_a_checkpoint_is_saved(make_trainer, tiny_llama, tmp_path):
    options = {"max_steps": 8, "logging_steps": 100, "optim": "adamw_torch_fused", "save_strategy": "steps"}
    trainer = make_trainer(tiny_llama(), ROWS, SFTTrainer, regularizers=[Spoil("loss", 3)], save_steps=2, **options)
    trainer.guard.at_once = False
    with pytest.raises(TrainingError, match="Step 3"):
        trainer.train()
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_run_that_diverges_is_not_reported_as_loss_0(make_trainer, tiny_llama, pairs):
    model = tiny_llama()
    trainer = make_trainer(model, pairs, max_steps=6, learning_rate=1e30, precompute_ref_log_probs=False)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        trainer.train()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not [line for line in trainer.state.log_history if line.get("loss") == 0.0]


def test_a_run_can_go_on_after_it_was_stopped(make_trainer, tiny_llama):
    model = tiny_llama()
    options = {"max_steps": 4, "logging_steps": 2, "optim": "adamw_torch_fused"}
    trainer = make_trainer(model, ROWS, SFTTrainer, regularizers=[Spoil("loss", 1)], **options)
    trainer.guard.at_once = False
    with pytest.raises(TrainingError, match="Step 1"):
        trainer.train()
    before = weights(model)
    trainer.train()
    assert not all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_ten_skipped_steps_in_a_row_stop_a_run_in_float16(make_trainer, tiny_llama):
    guard = FiniteGuard(make_trainer(tiny_llama(), ROWS, SFTTrainer))
    state = types.SimpleNamespace(global_step=11)

    def step(skipped):
        guard.on_optimizer_step(None, state, None, optimizer=types.SimpleNamespace(step_was_skipped=skipped))

    for skipped in [True] * 9 + [False] + [True] * 9:
        step(skipped)
    with pytest.raises(TrainingError, match="overflowed float16 in 10 steps in a row"):
        step(True)
