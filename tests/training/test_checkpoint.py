"""Saved models and adapters, and runs that are resumed."""

from __future__ import annotations

import errno
import json
import resource
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel

from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError, DataError, TrainingError
from fastalign.models.scoring import prepare
from fastalign.training import run_folder
from fastalign.training.checkpoint import extra_state, load_extra_state, save_extra_state
from fastalign.training.manifest import find_damage
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.run_folder import checkpoints
from fastalign.training.sft import SFTTrainer

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
    save_extra_state(tmp_path, extra_state(saved))
    before = loaded.objective.state["rewards"]
    load_extra_state(tmp_path, extra_state(loaded))
    assert before is loaded.objective.state["rewards"]  # in place: the run holds on to it
    assert all(
        torch.equal(a, b) for a, b in zip(extra_state(saved).values(), extra_state(loaded).values(), strict=True)
    )
    with pytest.raises(ConfigError, match=r"another loss or other regularisers \(new of"):
        load_extra_state(tmp_path, {**extra_state(loaded), "new": torch.ones(1)})
    with pytest.raises(ConfigError, match="rewards of"):
        load_extra_state(tmp_path, {"reference.0": torch.ones(3, 2)})
    (tmp_path / "other").mkdir()
    save_extra_state(tmp_path / "other", {})  # a checkpoint of a run without any
    load_extra_state(tmp_path / "other", {})


def test_what_changes_in_a_run_is_its_extra_state(make_trainer, tiny_llama, pairs, labelled):
    def names(*args, **options) -> set[str]:
        return set(extra_state(make_trainer(tiny_llama(), *args, **options)))

    assert names(pairs) == names(pairs, **LIVE) == names(labelled, loss_type="kto") == set()
    assert names(labelled, loss_type="bco") == {"rewards"}
    assert names(pairs, sync_ref_model=True, **LIVE) > {"reference.0", "reference.1"}


# Checkpoints on the disk

ROWS = [{"prompt": f"row {i}", "completion": "abc" * (1 + i % 3)} for i in range(16)]


@pytest.fixture
def sft(make_trainer, tiny_llama):
    """A trainer of AdamW that saves every step."""

    def make(**options):
        options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "max_steps": 3, **options}
        return make_trainer(tiny_llama(), ROWS, SFTTrainer, **options)

    return make


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_holds_no_pickle_and_every_file_is_in_the_manifest(sft, tmp_path):
    sft(max_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert find_damage(checkpoint) is None
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert sorted([*listed, "manifest.json"]) == names(checkpoint)
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors", ".jinja"}
    assert {"optimizer.safetensors", "process-0.safetensors", "scheduler.json", "trainer_state.json"} <= listed.keys()


def test_the_one_before_a_damaged_checkpoint_is_used_with_a_sentence(sft, tmp_path, caplog):
    whole = sft()
    whole.train()
    expected = weights(whole)
    file = tmp_path / "run" / "checkpoint-3" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit
    file.write_bytes(content)
    (tmp_path / "run" / "checkpoint-2" / "manifest.json").unlink()
    resumed = sft()
    resumed.train(resume_from_checkpoint="last")
    said = [record.getMessage() for record in caplog.records]
    assert any("checkpoint-3 has a damaged file: the checksum of optimizer.safetensors" in line for line in said)
    assert any("checkpoint-2 has no manifest.json" in line and "goes on from checkpoint-1" in line for line in said)
    assert all(torch.equal(a, b) for a, b in zip(expected, weights(resumed), strict=True))
    assert resumed.state.log_history[0]["step"] == 1
    assert find_damage(tmp_path / "run" / "checkpoint-3") is None  # written anew
    assert "set-aside-checkpoint-3" in names(tmp_path / "run")


def test_a_damaged_checkpoint_that_is_named_is_refused(sft, tmp_path):
    sft(max_steps=1).train()
    (tmp_path / "run" / "checkpoint-1" / "scheduler.json").unlink()
    with pytest.raises(DataError, match=r"lacks the file scheduler.json: give resume_from_checkpoint=last"):
        sft().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    with pytest.raises(DataError, match=r"No checkpoint in .* is whole"):
        sft().train(resume_from_checkpoint=True)


def test_a_checkpoint_of_plain_transformers_is_refused_and_nothing_of_it_is_unpickled(sft, tmp_path, monkeypatch):
    sft(max_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "optimizer.pt").write_bytes(b"pickle")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    with pytest.raises(DataError, match=r"has no manifest.json: it was not finished, or something else wrote it"):
        sft().train(resume_from_checkpoint=str(checkpoint))


def test_rotation_keeps_the_newest_whole_ones(sft, tmp_path):
    sft(max_steps=5, save_total_limit=2).train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize(
    "fails", ["fastalign.training.checkpoint.save_state", "fastalign.training.manifest.write_json"]
)
def test_a_save_that_fails_leaves_the_checkpoint_before_and_nothing_else(sft, tmp_path, monkeypatch, fails):
    module, _, name = fails.rpartition(".")
    trainer, works = sft(), getattr(sys.modules[module], name)

    def full(*args):
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return works(*args)

    monkeypatch.setattr(fails, full)
    with pytest.raises(TrainingError, match=r"step 2 cannot be written .*No space left on device.*checkpoint-1 is as"):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-1", "metrics.jsonl", "preflight.txt", "run.json"]
    assert find_damage(tmp_path / "run" / "checkpoint-1") is None


def test_last_without_a_checkpoint_starts_from_the_beginning(sft, caplog):
    trainer = sft(max_steps=1)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 1
    assert "training starts from the beginning" in caplog.text


def test_a_checkpoint_of_the_last_step_leaves_nothing_to_do(sft):
    first, again = sft(max_steps=3, per_device_train_batch_size=8), sft(max_steps=3, per_device_train_batch_size=8)
    first.train()  # in the middle of an epoch
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))


def test_a_folder_that_holds_a_run_is_refused_or_cleared(sft, tmp_path):
    sft(max_steps=3).train()
    with pytest.raises(ConfigError, match=r"holds a run already \(checkpoint-3\).*overwrite_output_dir=true"):
        sft(max_steps=1, overwrite_output_dir=False).train()
    sft(max_steps=1, overwrite_output_dir=True).train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {1}


def test_the_model_alone_cannot_be_resumed(sft):
    sft(max_steps=1, save_only_model=True).train()
    with pytest.raises(ConfigError, match="holds the model alone"):
        sft(max_steps=2).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_optimiser_is_refused(sft, make_trainer, tiny_llama):
    sft(max_steps=1).train()
    other = make_trainer(tiny_llama(), ROWS, SFTTrainer, peft_config=LoraConfig(**LORA), max_steps=2)
    with pytest.raises(ConfigError, match="was saved with other options"):
        other.train(resume_from_checkpoint=True)


# A disk that is full, too small or read-only


class LimitFiles(tf.TrainerCallback):
    """From a step on no file may grow beyond some bytes: the system refuses to write more, as on a full disk."""

    def __init__(self, step, limit):
        self.step, self.limit = step, limit

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("limit", "what"), [(20_000, "The checkpoint of step 2"), (100, "The (run|checkpoint of step 2)")]
)
def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(sft, tmp_path, limit, what):
    trainer = sft()
    trainer.add_callback(LimitFiles(1, limit))
    try:
        with pytest.raises(TrainingError, match=f"{what} cannot be written into .*large.*checkpoint-1 is as it was"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert find_damage(tmp_path / "run" / "checkpoint-1") is None
    assert not list((tmp_path / "run").glob(".*"))
    sft().train(resume_from_checkpoint="last")
    assert find_damage(tmp_path / "run" / "checkpoint-3") is None


def test_a_disk_too_small_for_one_checkpoint_is_said_before_training(sft, monkeypatch):
    trainer = sft()
    weights = sum(p.numel() for p in trainer.model.parameters()) * 4
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * weights - 1))
    with pytest.raises(ConfigError, match=r"one checkpoint takes at least 0\.00 GB"):
        trainer.train()
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * weights))
    trainer.train()


def test_a_cache_that_cannot_be_written_is_said_before_the_reference_pass(
    make_trainer, tiny_llama, pairs, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    score = PreferenceTrainer._score_rows
    monkeypatch.setattr(PreferenceTrainer, "_score_rows", lambda *given: pytest.fail("it computed"))
    with pytest.raises(ConfigError, match=r"ref_cache_dir .* cannot be written: Not a directory"):
        make_trainer(tiny_llama(), pairs, ref_cache_dir=str(tmp_path / "file"))
    monkeypatch.setattr(PreferenceTrainer, "_score_rows", score)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastalign.data.keyed_parts.write_keyed", full)
    make_trainer(tiny_llama(), pairs).train()
    assert "cannot be stored, so the next run computes them anew" in caplog.text


def test_rows_that_changed_since_a_checkpoint_are_refused(make_trainer, tiny_llama, tmp_path):
    """The position in the data is a number of rows: with other rows training would go on at the wrong place."""
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"row {i}", "completion": "abc"}) + "\n" for i in range(8)]
    file.write_text("".join(lines))
    options = {"save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False}
    whole = make_trainer(tiny_llama(), str(file), SFTTrainer, max_steps=2, **options)
    whole.train()
    again = {**options, "max_steps": 3, "resume_from_checkpoint": "last"}
    for changed, words in (
        (lines[:7], "8 rows then, 7 now"),
        ([lines[0].replace("abc", "abd"), *lines[1:]], "8 rows, of which some have other tokens"),
        (lines[::-1], "8 rows, of which some have other tokens"),
    ):
        file.write_text("".join(changed))
        with pytest.raises(DataError, match=words) as refused:
            make_trainer(tiny_llama(), str(file), SFTTrainer, **again).train()
        assert "rows.jsonl" in str(refused.value) and "checkpoint-2" in str(refused.value)
        assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    file.write_text("".join(lines))
    trainer = make_trainer(tiny_llama(), str(file), SFTTrainer, **again)
    trainer.train()
    assert trainer.state.global_step == 3
