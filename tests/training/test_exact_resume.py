"""A run that is stopped and resumed ends with the bits of one that never stopped: every trainer and regulariser."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from fastalign.config.preference import PreferenceConfig
from fastalign.files import read_metrics
from fastalign.regularizers import EWC, L2SP, Distillation, KLToStart, LayerWise, Replay
from fastalign.training.distillation import DistillationTrainer
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer

STEPS = 3
TEXT = [{"text": "The river rises in the hills and falls to the sea. " * 2}, {"text": "A second text."}]


# All weights, with dropout in the layers where the loss has no reference; or an adapter with dropout.
WAYS = {
    "full": None,
    "LoRA": {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.2},
}


def ones(model):
    return {name: torch.ones_like(p) for name, p in model.named_parameters()}


# Trainer, which rows, options, regularisers by a function of the model.
CASES = {
    "sft": (SFTTrainer, "completions", {}, None),
    "sft with NEFTune": (SFTTrainer, "completions", {"neftune_noise_alpha": 5.0}, None),
    "dpo, stored reference": (PreferenceTrainer, "pairs", {"precompute_ref_log_probs": True}, None),
    "dpo, live reference": (PreferenceTrainer, "pairs", {"precompute_ref_log_probs": False}, None),
    "dpo, moving reference": (
        PreferenceTrainer, "pairs",
        {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 1}, None,
    ),
    "dpo, a prompt per completion": (PreferenceTrainer, "pairs", {"share_prompts": False}, None),
    "dpo, padded rows": (PreferenceTrainer, "pairs", {}, None),
    "orpo": (PreferenceTrainer, "pairs", {"loss_type": "orpo"}, None),
    "aot": (PreferenceTrainer, "pairs", {"loss_type": "aot"}, None),
    "kto": (PreferenceTrainer, "labelled", {"loss_type": "kto"}, None),
    "bco": (PreferenceTrainer, "labelled", {"loss_type": "bco"}, None),
    "ewc, kl and replay": (
        PreferenceTrainer, "pairs", {},
        lambda model: [EWC(ones(model), 0.1), KLToStart(0.1), Replay(TEXT, 0.3)],
    ),
    "l2_sp and distillation from the start": (
        SFTTrainer, "completions", {}, lambda model: [L2SP(0.1), Distillation("start", weight=0.5)],
    ),
    "layer-wise": (SFTTrainer, "completions", {}, lambda model: [LayerWise([1, 2], decay=0.5)]),
    "distillation, live teacher": (DistillationTrainer, "completions", {}, None),
    "distillation, stored teacher": (DistillationTrainer, "completions", {"top_k": 8}, None),
    "on-policy distillation": (DistillationTrainer, "completions", {"on_policy": 1.0, "sample_tokens": 4}, None),
    "now and then on-policy": (DistillationTrainer, "completions", {"on_policy": 0.5, "sample_tokens": 4}, None),
}  # fmt: skip


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or state.global_step == self.step
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


@pytest.fixture
def run(make_trainer, tiny_llama, pairs, labelled, tmp_path):
    """f(case, way, stops): the trainer after a run that was stopped and resumed at each of these steps."""
    completions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    rows = {"pairs": pairs, "labelled": labelled, "completions": completions}

    def run(case, way, stops):
        kind, kind_of_rows, options, regularizers = CASES[case]
        folder = tmp_path / f"run-{len(stops)}"
        if kind is DistillationTrainer:
            options = {**options, "cache_dir": str(tmp_path / "topk")}
        for number, stop in enumerate([*stops, None]):
            torch.manual_seed(number)  # whatever another process has drawn
            model = tiny_llama(attention_dropout=0.1)
            trainer = make_trainer(
                model, rows[kind_of_rows], kind, peft_config=LoraConfig(**WAYS[way]) if WAYS[way] else None,
                regularizers=regularizers(model) if regularizers else (), output_dir=str(folder), max_steps=STEPS,
                teacher=tiny_llama(seed=1) if kind is DistillationTrainer else None, optim="adamw_torch",
                lr_scheduler_type="cosine", warmup_steps=1, per_device_train_batch_size=3, max_grad_norm=1.0,
                gradient_accumulation_steps=2, logging_steps=2, learning_rate=1e-2,
                disable_dropout=kind is PreferenceTrainer, **options,
            )  # fmt: skip
            if "padded" in case:  # as for a model whose attention cannot be packed
                trainer.layout = "padded"
                trainer.data_collator = trainer._collator()
            if stop is not None:
                trainer.add_callback(StopAt(stop))
            trainer.train(resume_from_checkpoint="last" if number else None)
        return trainer

    return run


def bits(trainer):
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def lines(trainer):
    """What was logged, without what a clock says."""
    clocks = ("time", "tokens_per_second", "memory_gb", "train_runtime", "train_samples_per_second")
    clocks += ("train_steps_per_second", "total_flos", "train_loss")
    found = read_metrics(f"{trainer.args.output_dir}/metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in clocks} for line in found]


def check(whole, resumed):
    assert whole.state.global_step == resumed.state.global_step == STEPS
    expected, found = bits(whole), bits(resumed)
    off = {name: (expected[name] - found[name]).abs().max().item() for name in expected}
    assert not any(off.values()), off
    assert lines(whole) == lines(resumed)
    assert whole.tokens_seen == resumed.tokens_seen


# Cases that are run in both ways. The others are run in one way each, in turn.
BOTH = ("sft", "dpo, stored reference", "ewc, kl and replay", "on-policy distillation")


@pytest.mark.parametrize(
    ("case", "way"),
    [(case, way) for i, case in enumerate(CASES) for j, way in enumerate(WAYS) if case in BOTH or i % 2 == j],
)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(run, case, way):
    """8 rows make three micro-batches and two steps an epoch. Step 1 ends inside an epoch, step 2 with it.

    A line is logged every second step, so that the first stop is between two of them.
    """
    check(run(case, way, []), run(case, way, [1, 2]))


def test_the_config_takes_the_checkpoint_too():
    assert PreferenceConfig(output_dir="x", resume_from_checkpoint=True).resume_from_checkpoint is True
