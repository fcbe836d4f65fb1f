"""Diagnostics in the log while a run goes on, and what they need: the norm of the adapters."""

from __future__ import annotations

import json
import logging

import pytest
from peft import LoraConfig

from fastalign.files import read_metrics
from fastalign.training.watch import Watch, adapter_norm


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_a_fault_is_said_once_when_it_is_first_seen(make_trainer, tiny_llama, pairs, caplog):
    with caplog.at_level(logging.WARNING, logger="fastalign"):
        trainer = make_trainer(tiny_llama(), pairs, peft_config=lora(), learning_rate=0.0, max_steps=6)
        trainer.train()
    said = [record.message for record in caplog.records if "adapter does not move" in record.message]
    assert len(said) == 1 and "from step 1 to 3" in said[0] and "What to try" in said[0]


def test_a_run_that_moves_is_quiet(make_trainer, tiny_llama, pairs, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, logger="fastalign"):
        trainer = make_trainer(tiny_llama(), pairs, peft_config=lora(), max_steps=4)
        trainer.train()
    assert "What to try" not in caplog.text
    norms = [
        line["adapter_norm"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "adapter_norm" in line
    ]
    assert len(norms) == 4 and 0 < norms[0] < norms[-1]
    squares = sum(p.detach().square().sum() for n, p in trainer.model.named_parameters() if "lora_B" in n)
    assert norms[-1] == pytest.approx(squares.sqrt().item(), rel=1e-5)
    assert adapter_norm(trainer.model) == pytest.approx(norms[-1])
    assert adapter_norm(tiny_llama()) is None


def test_long_runs_are_looked_at_more_and_more_rarely(monkeypatch):
    class State:
        is_world_process_zero, global_step = True, 0

    looks, watch = [], Watch()
    monkeypatch.setattr(watch, "look", lambda: looks.append(len(watch.records)))
    for step in range(1, 1001):
        State.global_step = step
        watch.on_log(None, State, None, logs={"loss": 1.0})
    assert looks[:49] == list(range(1, 50)) and 60 < len(looks) < 100
    assert json.dumps(watch.records[-1]) == '{"step": 1000, "loss": 1.0}'
    State.is_world_process_zero = False
    watch.on_log(None, State, None, logs={"loss": 1.0})
    assert len(watch.records) == 1000
