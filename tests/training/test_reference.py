"""The reference is the weights in hand; its log-probs are stored by content, and a wrong one does not go unnoticed."""

from __future__ import annotations

import copy
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fastalign.config.preference import PreferenceConfig
from fastalign.data.packing import pack
from fastalign.errors import DataError, ModelError
from fastalign.models.snapshot import ReferenceWeights
from fastalign.training import reference as reference_module
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.reference import check_start, check_stored, precompute, start_rounding

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def make(tokenizer, tmp_path):
    def make(model, rows, eval_rows=None, peft_config=None, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
            "logging_steps": 1, "max_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "ref_cache_dir": str(tmp_path / "cache"),
            "overwrite_output_dir": True,
        }  # fmt: skip
        args = PreferenceConfig(**{**defaults, **options})
        return PreferenceTrainer(model, args, rows, eval_rows, tokenizer, peft_config)

    return make


def trained_adapter(model, seed=0) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))  # B is random, as after training


def stock_logps(model, row) -> list[torch.Tensor]:
    values = []
    for completion in row["completion_ids"]:
        ids, start = row["prompt_ids"] + completion, len(row["prompt_ids"])
        with torch.no_grad():
            logprobs = model.eval()(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        values.append(torch.stack([logprobs[t - 1, ids[t]] for t in range(start, len(ids))]))
    return values


def assert_reference_is(trainer, model):
    """Stored log-probs are those of `model`, within the rounding of log-probs of up to 30 in float32."""
    for row in trainer.train_dataset:
        for stored, expected in zip(row["ref_logprobs"], stock_logps(model, row), strict=True):
            assert torch.allclose(torch.tensor(stored), expected, rtol=0, atol=30 * 32 * torch.finfo(torch.float32).eps)


# Margins at the start


@pytest.mark.parametrize("precompute_first", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["lora", "full", "trained adapter", "lora on the head"])
def test_margins_are_exactly_zero_before_the_first_step(make, tiny_llama, pairs, how, tied, precompute_first):
    model, peft_config = tiny_llama(tied=tied), None
    if how == "trained adapter":
        model = trained_adapter(model)
    elif how == "lora":
        peft_config = LoraConfig(**LORA, lora_dropout=0.1)
    elif how == "lora on the head":
        peft_config = LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]})
    trainer = make(model, pairs, peft_config=peft_config, precompute_ref_log_probs=precompute_first, max_steps=2)
    trainer.train()
    first, second = [line for line in trainer.state.log_history if "rewards/margins" in line][:2]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == 0.0
        assert second[name] != 0.0
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2


def test_margins_are_zero_in_bfloat16(make, tiny_llama, pairs):
    trainer = make(tiny_llama(dtype=torch.bfloat16), pairs, peft_config=LoraConfig(**LORA))
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0.0


def test_before_the_first_step_policy_and_reference_agree(monkeypatch):
    values = torch.tensor([-3.0, -0.5])
    check_start(values.clone(), values)
    with pytest.raises(ModelError, match=r"differ from the reference's by 1e-06; they must be equal\. The"):
        check_start(values.double() + 1e-6, values.double())
    with pytest.raises(ModelError, match="by nan"):
        check_start(values * torch.nan, values)
    assert start_rounding(torch.device("cpu")) == 0
    on_a_gpu = start_rounding(torch.device("cuda"))
    monkeypatch.setattr(reference_module, "start_rounding", lambda device: on_a_gpu)
    check_start(values + 2e-6, values)  # measured on an H200
    with pytest.raises(ModelError, match=r"by 0\.001; they must be equal within 0\.0001\. "):
        check_start(values + 1e-3, values)


def test_stored_log_probs_may_be_off_by_rounding_alone():
    values = torch.tensor([-3.0, -0.5])
    limit = 10 * torch.finfo(torch.float32).eps ** 0.5
    check_stored(values + 0.9 * limit, values, torch.float32, None)
    with pytest.raises(DataError, match=r"off by 0\.00\d+ \(at most 0\.00345 .*~/\.cache/fastalign"):
        check_stored(values + 1.1 * limit, values, torch.float32, None)
    check_stored(values + 1.1 * limit, values, torch.bfloat16, None)
    with pytest.raises(DataError, match=r"off by nan .*delete the cache folder here"):
        check_stored(values * torch.nan, values, torch.float32, "here")


# The reference is what was given


def test_reference_of_a_model_with_a_trained_adapter_includes_it(make, tiny_llama, pairs):
    model = trained_adapter(tiny_llama())
    given = copy.deepcopy(model)
    trainer = make(model, pairs)
    assert_reference_is(trainer, given)
    with given.disable_adapter():
        bare = stock_logps(given, trainer.train_dataset[0])[1]
    assert (torch.tensor(trainer.train_dataset[0]["ref_logprobs"][1]) - bare).abs().max() > 0.1


def test_reference_is_the_weights_in_hand_not_those_on_disk(make, model_dir, pairs):
    model = tf.AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    given = copy.deepcopy(model)
    trainer = make(model, pairs, eval_rows=pairs[:3])
    assert_reference_is(trainer, given)
    trainer.train()
    metrics = trainer.evaluate()
    rows = [trainer.eval_dataset[i] for i in range(3)]
    now, then = (torch.tensor([[x.sum() for x in stock_logps(m, row)] for row in rows]) for m in (model, given))
    rewards = (0.1 * (now - then)).mean(0)
    assert metrics["eval_rewards/margins"] == pytest.approx((rewards[0] - rewards[1]).item(), rel=1e-4)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_live_reference_stays_where_training_started(make, tiny_llama, pairs, how):
    given = tiny_llama()
    trainer = make(
        tiny_llama(), pairs, eval_rows=pairs[:3], max_steps=3, precompute_ref_log_probs=False,
        peft_config=LoraConfig(**LORA) if how == "lora" else None,
    )  # fmt: skip
    trainer.train()
    rewards = trainer.evaluate()["eval_rewards/chosen"]
    rows = [trainer.eval_dataset[i] for i in range(3)]
    now, then = (torch.stack([stock_logps(m, row)[0].sum() for row in rows]) for m in (trainer.model, given))
    assert rewards == pytest.approx((0.1 * (now - then)).mean().item(), rel=1e-4)
    assert abs(rewards) > 1e-3


def test_synchronised_reference_moves_towards_the_model(make, tiny_llama, pairs):
    trainer = make(
        tiny_llama(), pairs, peft_config=LoraConfig(**LORA), max_steps=3, precompute_ref_log_probs=False,
        sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25,
    )  # fmt: skip
    start = [value.clone() for value in trainer.reference.weights.values]
    after_two = []
    trainer.add_callback(
        _AtStep(2, lambda: after_two.extend(p.detach().clone() for p in trainer.reference.weights.parameters))
    )
    trainer.train()
    for value, first, second in zip(trainer.reference.weights.values, start, after_two, strict=True):
        assert torch.allclose(value, 0.25 * second + 0.75 * first, rtol=1e-6, atol=1e-8)
    assert any(
        (value - first).abs().max() > 1e-4 for value, first in zip(trainer.reference.weights.values, start, strict=True)
    )


class _AtStep(tf.TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def test_reference_weights_are_put_back_whatever_happens():
    model = torch.nn.Linear(3, 2)
    weights = ReferenceWeights(model)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    trained = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), weights.in_place():
        assert torch.equal(model.weight, start)
        raise RuntimeError("stop")
    assert torch.equal(model.weight, trained)
    with weights.in_place():
        assert torch.equal(model.weight, start)


# The cache


def passes(trainer_of, model) -> int:
    """Forward passes of the body while `trainer_of(model)` builds a trainer."""
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    trainer_of(model)
    handle.remove()
    return len(calls)


def test_cache_is_used_by_other_losses_and_betas_and_adapters(make, tiny_llama, pairs):
    probes = passes(lambda m: make(m, pairs, loss_type="orpo"), tiny_llama())  # the layout's probe alone
    assert passes(lambda m: make(m, pairs), tiny_llama()) > probes
    for options in (
        {},
        {"loss_type": "ipo", "beta": 0.7, "per_device_train_batch_size": 1, "max_length": 512},
        {"peft_config": LoraConfig(**LORA)},
    ):
        assert passes(lambda m, options=options: make(m, pairs, **options), tiny_llama()) == probes
    assert passes(lambda m: make(m, pairs), tiny_llama(seed=1)) > probes
    # more rows: the new ones alone
    more = [*pairs, {"prompt": "x", "chosen": "y", "rejected": "z"}]
    assert passes(lambda m: make(m, more), tiny_llama()) == probes + 1


def test_cached_values_are_those_computed(make, tiny_llama, pairs):
    first, second = (make(tiny_llama(), pairs) for _ in range(2))
    assert first.train_dataset["ref_logprobs"][:] == second.train_dataset["ref_logprobs"][:]
    assert_reference_is(second, tiny_llama())


def test_other_precision_is_another_reference(make, tiny_llama, pairs, tmp_path):
    make(tiny_llama(), pairs)
    make(tiny_llama(), pairs, bf16=True).train()
    assert len(list((tmp_path / "cache" / "ref_logprobs").iterdir())) == 2


def test_stored_values_have_the_precision_of_training(make, tiny_llama, pairs):
    rounded, exact = (make(tiny_llama(), pairs, bf16=bf16).train_dataset["ref_logprobs"][:] for bf16 in (True, False))
    assert rounded != exact


def test_wrong_entry_is_found_at_the_first_step(make, tiny_llama, pairs, tmp_path):
    make(tiny_llama(), pairs)
    (path,) = (tmp_path / "cache" / "ref_logprobs").iterdir()
    tensors = load_file(path)
    tensors["logprobs"] -= 0.01
    save_file(tensors, path)
    trainer = make(tiny_llama(), pairs)
    with pytest.raises(DataError, match=r"off by 0\.01.*delete the cache"):
        trainer.train()


def test_damaged_file_is_computed_again(make, tiny_llama, pairs, tmp_path, caplog):
    whole = make(tiny_llama(), pairs).train_dataset["ref_logprobs"][:]
    (path,) = (tmp_path / "cache" / "ref_logprobs").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING, "fastalign"):
        again = make(tiny_llama(), pairs)
    assert "cannot be read" in caplog.text
    assert again.train_dataset["ref_logprobs"][:] == whole
    assert path.read_bytes() == content
    tensors = load_file(path)
    save_file({**tensors, "logprobs": tensors["logprobs"][:-1].clone()}, path)  # whole, but of another content
    assert make(tiny_llama(), pairs).train_dataset["ref_logprobs"][:] == whole


def a_dataset(**columns) -> Dataset:
    rows = {"prompt_ids": [[1, 2], [3]], "completion_ids": [[[4, 5], [6]], [[7], [8, 9, 10]]]}
    return Dataset.from_dict({**rows, **columns})


def by_token(rows):
    """A score that is a function of the tokens: as good as a model here, and its values are known."""
    batch = pack(rows)
    return batch, -batch.targets.float() - 0.5


def test_precompute_keeps_a_number_a_token(tmp_path):
    dataset = precompute(a_dataset(), by_token, "weights", tmp_path)
    assert dataset["ref_logprobs"][:] == [[[-4.5, -5.5], [-6.5]], [[-7.5], [-8.5, -9.5, -10.5]]]
    assert [path.name for path in (tmp_path / "ref_logprobs").iterdir()] == ["weights.safetensors"]


def test_precompute_tells_masks_apart(tmp_path):
    precompute(a_dataset(), by_token, "weights", tmp_path)
    masks = [[[0, 1], [1]], [[1], [1, 0, 1]]]
    dataset = precompute(a_dataset(completion_mask=masks), by_token, "weights", tmp_path)
    assert dataset["ref_logprobs"][:] == [[[-5.5], [-6.5]], [[-7.5], [-8.5, -10.5]]]


def test_precompute_cuts_long_data_into_batches(tmp_path):
    rows = [[i % 250] * 700 for i in range(7)]
    dataset = Dataset.from_dict({"prompt_ids": rows, "completion_ids": [[[i, i]] for i in range(7)]})
    seen = []

    def score(rows):
        seen.append(sum(len(row["prompt_ids"]) + 2 for row in rows))
        return by_token(rows)

    values = precompute(dataset, score, "weights", tmp_path)["ref_logprobs"][:]
    assert values == [[[-i - 0.5, -i - 0.5]] for i in range(7)]  # in the order of the rows
    assert len(seen) == 4 and max(seen) <= 2048


STOPPED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from fastalign.data import keyed_log
from test_reference import by_batch, many_rows, precompute
keyed_log.WRITE_SECONDS = 0
passes = []

def score(rows):
    if len(passes) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    passes.append(len(rows))
    return by_batch(rows)

precompute(many_rows(), score, "weights", Path({cache!r}), show=False)
"""


def many_rows() -> Dataset:
    """Rows of several lengths, and completions that several rows have."""
    prompts = [[i % 5] * (150 + 37 * (i % 11)) for i in range(24)]
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": [[[i % 5, 1], [i, 2]] for i in range(24)]})


def by_batch(rows):
    """A score that also depends on the other rows of the batch, as the rounding of a model does."""
    batch = pack(rows)
    return batch, -batch.targets.float() - 1e-3 * len(batch.input_ids[0])


def test_a_pass_that_was_killed_goes_on_bit_for_bit(tmp_path):
    def run(folder) -> tuple[list, int]:
        passes = []
        dataset = precompute(many_rows(), lambda rows: passes.append(1) or by_batch(rows), "weights", tmp_path / folder)
        return dataset["ref_logprobs"][:], len(passes)

    whole, passes = run("whole")
    script = STOPPED.format(folder=str(Path(__file__).parent), cache=str(tmp_path / "stopped"))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "stopped" / "ref_logprobs" / "weights.parts").iterdir())) == 3
    again, rest = run("stopped")
    assert again == whole and rest == passes - 3 > 0
    files = [tmp_path / name / "ref_logprobs" for name in ("whole", "stopped")]
    assert [entry.name for entry in files[1].iterdir()] == ["weights.safetensors"]
    assert run("stopped") == (whole, 0)


def test_the_bar_of_the_reference_pass_obeys_disable_tqdm(make, tiny_llama, pairs, capsys):
    make(tiny_llama(), pairs)
    assert "reference log-probs" not in capsys.readouterr().err
    make(tiny_llama(seed=1), pairs, disable_tqdm=False)
    assert "reference log-probs" in capsys.readouterr().err
