"""metrics.jsonl, the progress bar, and a reference that follows the model."""

from __future__ import annotations

import json

import torch
from transformers import TrainerControl, TrainerState

from fastalign.files import read_metrics
from fastalign.models.snapshot import ReferenceWeights
from fastalign.training.callbacks import MetricsWriter, MoveReference

LIVE = {"precompute_ref_log_probs": False}


def test_metrics_file_holds_the_evaluation_before_and_every_step(make_trainer, gpt2, pairs, tmp_path):
    trainer = make_trainer(gpt2(), pairs, eval_rows=pairs[:2], max_steps=3, **LIVE)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 99, "loss": 1.0}\n')  # of an earlier run
    trainer.evaluate()
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert "eval_rewards/margins" in lines[0]
    assert all("rewards/margins" in line and line["time"] >= 0 for line in lines[1:4])


def test_a_resumed_run_cuts_its_file_at_its_step_and_appends(tmp_path):
    """A run that was killed had logged steps beyond its checkpoint, which then stood there twice."""
    writer, state, control = MetricsWriter(tmp_path / "metrics.jsonl"), TrainerState(), TrainerControl()
    state.is_world_process_zero = True
    old = [{"step": 7, "time": 100.0}, {"step": 7, "train_runtime": 3.0, "time": 101.0}, {"step": 8, "time": 102.0}]
    writer.path.write_text("".join(json.dumps(line) + "\n" for line in old) + '{"step": 9, "ti')
    writer.on_log(None, state, control, logs={"eval_loss": 2.0})  # an evaluation before it goes on
    state.global_step = 7
    writer.on_train_begin(None, state, control)
    state.global_step = 8
    writer.on_log(None, state, control, logs={"loss": 1.0})
    lines = read_metrics(writer.path)
    assert [line["step"] for line in lines] == [7, 8]
    assert not any("train_runtime" in line or "eval_loss" in line for line in lines)
    assert 100 <= lines[1]["time"] < 160  # the clock goes on too


def test_an_evaluation_alone_leaves_the_file_of_an_older_run(make_trainer, gpt2, pairs, tmp_path):
    trainer = make_trainer(gpt2(), pairs, eval_rows=pairs[:2], **LIVE)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 99, "loss": 1.0}\n')
    trainer.evaluate()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 99, "loss": 1.0}\n'


def test_the_bar_shows_what_it_knows_of_a_line(make_trainer, tiny_llama, pairs, capsys):
    make_trainer(tiny_llama(), pairs, disable_tqdm=False).train()
    out = capsys.readouterr()
    assert "Preflight: preference" in out.out
    assert all(f"{label}=" in out.err for label in ("loss", "margin", "acc", "tok/s", "GB"))
    assert "'loss'" not in out.out  # the Trainer's own line


def test_a_reference_moves_every_so_many_steps():
    layer = torch.nn.Linear(2, 1)
    weights = ReferenceWeights(layer)
    start = [value.clone() for value in weights.values]
    with torch.no_grad():
        layer.weight.add_(1.0)
    state, move = TrainerState(), MoveReference(weights, share=0.25, every=3)
    for step in (1, 2, 3):
        assert torch.equal(weights.values[0], start[0])
        state.global_step = step
        move.on_step_end(None, state, TrainerControl())
    assert torch.allclose(weights.values[0], start[0] + 0.25)
