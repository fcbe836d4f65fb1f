"""Saved models and adapters, and runs that are resumed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel

from fastalign.data.tokenization import tokenize
from fastalign.models.scoring import prepare
from fastalign.training.checkpoint import extra_state, load_extra_state, save_extra_state

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LIVE = {"precompute_ref_log_probs": False}


def test_saved_adapter_is_safetensors_and_loads(make_trainer, tiny_llama, pairs, tokenizer, tmp_path):
    trainer = make_trainer(tiny_llama(), pairs, peft_config=LoraConfig(**LORA), max_steps=2, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    assert (folder / "adapter_model.safetensors").exists()
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    prepare(loaded)  # the same passes, for the same bits
    row = tokenize(pairs[:1], tokenizer)[0][0]
    with torch.no_grad():
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"][0]])
        ours, theirs, start = (m.eval()(input_ids=ids).logits for m in (trainer.model, loaded, tiny_llama()))
    assert torch.equal(ours, theirs)
    assert (ours - start).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_is_safetensors_and_loads(make_trainer, tiny_llama, pairs, tokenizer, tmp_path, tied):
    trainer = make_trainer(tiny_llama(tied=tied), pairs, max_steps=2)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    assert (folder / "model.safetensors").exists()
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    loaded = tf.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config._attn_implementation != "fastalign"
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    assert tf.AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


# Resuming


def resume(make_trainer, build, rows, tmp_path, **options):
    """Parameters and losses of 4 steps in one go, and of 2 and then 2 more in a new trainer."""
    results = []
    for stops in ((4,), (2, 4)):
        folder = str(tmp_path / f"run{len(stops)}")
        for stop in stops:
            model, peft_config = build()
            trainer = make_trainer(
                model, rows, peft_config=peft_config, output_dir=folder, max_steps=4, save_strategy="steps",
                save_steps=2, per_device_train_batch_size=2, optim="adamw_torch", lr_scheduler_type="linear", **options,
            )  # fmt: skip
            if stop == 2:
                trainer.add_callback(_StopAt(2))
            trainer.train(resume_from_checkpoint=stop == 4 and len(stops) == 2)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
        results.append((trained, losses, trainer))
    (whole, losses, _), (resumed, other_losses, trainer) = results
    assert len(losses) == 4 and losses == other_losses
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    return trainer


class _StopAt(tf.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("precompute", [True, False])
def test_resumed_adapter_run_goes_on_as_if_never_stopped(make_trainer, tiny_llama, pairs, tmp_path, precompute):
    resume(
        make_trainer, lambda: (tiny_llama(), LoraConfig(**LORA, init_lora_weights=False)), pairs, tmp_path,
        precompute_ref_log_probs=precompute, learning_rate=1e-2,
    )  # fmt: skip


def test_resumed_full_run_goes_on_as_if_never_stopped(make_trainer, tiny_llama, pairs, tmp_path):
    trainer = resume(make_trainer, lambda: (tiny_llama(), None), pairs, tmp_path, learning_rate=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "run2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert trainer.state.global_step == 4


def test_bco_keeps_its_running_rewards_when_resumed(make_trainer, tiny_llama, labelled, tmp_path):
    resume(make_trainer, lambda: (tiny_llama(), None), labelled, tmp_path, learning_rate=1e-2, loss_type="bco")


def test_moved_reference_is_kept_when_resumed(make_trainer, tiny_llama, pairs, tmp_path):
    resume(
        make_trainer, lambda: (tiny_llama(), LoraConfig(**LORA)), pairs, tmp_path, learning_rate=1e-2,
        sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, **LIVE,
    )  # fmt: skip


class _Part:
    def __init__(self, **state):
        self.state = state


def test_extra_state_is_of_the_parts_that_have_one(tmp_path):
    def run(value: float) -> SimpleNamespace:
        tensors = {"rewards": torch.full((2,), value), "reference.0": torch.full((3, 2), value).t()}
        return SimpleNamespace(objective=_Part(rewards=tensors["rewards"]), reference=None,
                               terms=[object(), _Part(**{"reference.0": tensors["reference.0"]})])  # fmt: skip

    saved, loaded = run(1.5), run(0.0)
    (tmp_path / "checkpoint-4").mkdir()
    save_extra_state(tmp_path, 4, extra_state(saved))
    before = loaded.objective.state["rewards"]
    load_extra_state(tmp_path / "checkpoint-4", {**extra_state(loaded), "new": (other := torch.ones(1))})
    assert before is loaded.objective.state["rewards"]  # in place: the run holds on to it
    assert all(
        torch.equal(a, b) for a, b in zip(extra_state(saved).values(), extra_state(loaded).values(), strict=True)
    )
    assert other == 1
    load_extra_state(tmp_path, extra_state(loaded))  # a checkpoint of a run without any
    save_extra_state(tmp_path / "nowhere", 4, {})


def test_what_changes_in_a_run_is_its_extra_state(make_trainer, tiny_llama, pairs, labelled):
    def names(*args, **options) -> set[str]:
        return set(extra_state(make_trainer(tiny_llama(), *args, **options)))

    assert names(pairs) == names(pairs, **LIVE) == names(labelled, loss_type="kto") == set()
    assert names(labelled, loss_type="bco") == {"rewards"}
    assert names(pairs, sync_ref_model=True, **LIVE) > {"reference.0", "reference.1"}
