"""Signals: the first one ends a run with everything saved, the second one at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from transformers import TrainerCallback

from fastalign.training.sft import SFTTrainer

ROWS = [{"prompt": f"row {i}", "completion": "abc" * (1 + i % 3)} for i in range(16)]


class Send(TrainerCallback):
    """Sends signals to this process, each at a moment of the run: {(event, step): signal}."""

    def __init__(self, moments):
        self.moments = moments

    def send(self, event, state):
        if (event, state.global_step) in self.moments:
            os.kill(os.getpid(), self.moments[event, state.global_step])

    def on_step_begin(self, args, state, control, **kwargs):
        self.send("begin", state)

    def on_substep_end(self, args, state, control, **kwargs):
        self.send("inside", state)

    def on_evaluate(self, args, state, control, **kwargs):
        self.send("evaluate", state)


@pytest.fixture
def trainer(make_trainer, tiny_llama):
    def make(moments, **options):
        options = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, **options}
        return make_trainer(tiny_llama(), ROWS, SFTTrainer, callbacks=[Send(moments)], **options)

    return make


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_step_and_saves_everything(trainer, tmp_path, capsys, number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    stopped = trainer({("inside", 2): number}, gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as raised:
        stopped.train()
    assert number == signal.SIGINT or raised.value.code == 143
    assert {n: signal.getsignal(n) for n in before} == before
    run = tmp_path / "run"
    assert stopped.state.global_step == 3 and stopped.stopping.saved
    assert (run / "checkpoint-3" / "model.safetensors").exists()
    assert (run / "model" / "model.safetensors").exists() and (run / "report.html").exists()
    said = capsys.readouterr().out
    assert f"Stopped by {number.name} after step 3 of 6" in said and "train(resume_from_checkpoint=True)" in said


def test_a_handler_from_before_gets_the_signal(trainer):
    got = []
    before = signal.signal(signal.SIGTERM, lambda *given: got.append(given[0]))
    try:
        trainer({("begin", 1): signal.SIGTERM}).train()  # this handler raises nothing, so `train` returns
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]


def test_the_second_signal_stops_at_once(trainer, tmp_path):
    stopped = trainer({("begin", 1): signal.SIGINT, ("inside", 1): signal.SIGINT}, gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.state.global_step == 1 and not stopped.stopping.saved
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_signal_in_an_evaluation_needs_no_further_step(make_trainer, tiny_llama, tmp_path):
    stopped = make_trainer(
        tiny_llama(), ROWS, SFTTrainer, eval_rows=ROWS[:2], callbacks=[Send({("evaluate", 2): signal.SIGINT})],
        max_steps=6, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.state.global_step == 2
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_what_is_due_at_the_end_of_an_epoch_is_not_due_in_the_middle(make_trainer, tiny_llama):
    stopped = make_trainer(
        tiny_llama(), ROWS, SFTTrainer, eval_rows=ROWS[:2], callbacks=[Send({("begin", 1): signal.SIGINT})],
        max_steps=9, eval_strategy="epoch", save_strategy="epoch",
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert not [line for line in stopped.state.log_history if "eval_loss" in line]


def test_a_signal_that_is_ignored_stays_ignored(trainer):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = trainer({("begin", 1): signal.SIGINT}, max_steps=2)
        run.train()
        assert run.state.global_step == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread_sets_no_handler(trainer):
    run, found = trainer({}, max_steps=1), []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: found.append(run.train()))
    thread.start()
    thread.join()
    assert found and signal.getsignal(signal.SIGINT) is before
