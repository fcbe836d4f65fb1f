"""Reward models: their loss and gradient, and scores that plain transformers reads from what was saved."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastalign.data.packing import lay_out
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.models.reward import with_score_layer
from fastalign.models.scoring import prepare
from fastalign.regularizers.ewc import EWC, L2SP
from fastalign.training.reward import RewardTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def own_scores(model, tokenized):
    """Scores by transformers' own forward, each sequence alone, at its last token."""
    return torch.stack([
        model(input_ids=torch.tensor([row["prompt_ids"] + ids]), use_cache=False).logits[0, 0]
        for row in tokenized for ids in row["completion_ids"]
    ])  # fmt: skip


@pytest.fixture(params=["lora", "full", "lora on bfloat16"])
def trained(request, make_trainer, tiny_llama, pairs, tmp_path):
    """A trainer after two steps, and the folder that it saved its model to."""
    lora = LoraConfig(**LORA) if "lora" in request.param else None
    body = tiny_llama().to(torch.bfloat16 if "bfloat16" in request.param else torch.float32)
    trainer = make_trainer(
        body, pairs, RewardTrainer, peft_config=lora, eval_rows=pairs[:3], learning_rate=0.3, max_steps=2
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    return trainer, tmp_path / "saved"


def test_plain_transformers_loads_what_was_saved_and_scores_the_same(trained):
    trainer, folder = trained
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        ours = trainer.model.eval()(packed=lay_out(rows, "shared", 0)).rewards
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not (info["missing_keys"] or info["unexpected_keys"]) and model.config.num_labels == 1
    # In one padded batch, on either side, as a pipeline calls it; the tokenizer's padding token is the configuration's.
    texts = [row["prompt_ids"] + ids for row in rows for ids in row["completion_ids"]]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        with torch.no_grad():
            theirs = model.eval()(**batch).logits[:, 0]
        half = next(trainer.model.parameters()).dtype == torch.bfloat16
        rounding = 0.05 * ours.abs().max().item() if half else 2e-5
        torch.testing.assert_close(theirs.float(), ours, rtol=0, atol=rounding)
    assert model.config.pad_token_id == tokenizer.pad_token_id not in {ids[-1] for ids in texts}
    assert trainer.evaluate()["eval_rewards/accuracies"] >= 0


def test_scores_are_the_same_packed_padded_and_alone_and_with_pad_as_eos(tiny_llama, make_trainer, pairs, tokenizer):
    """The score is read by place, never by looking for a padding token."""
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    trainer = make_trainer(tiny_llama(), pairs, RewardTrainer)
    rows, model = list(trainer.train_dataset), trainer.model.eval()
    with torch.no_grad():
        alone = own_scores(model, rows)
        for layout in ("shared", "packed", "padded"):
            for fill in (same.pad_token_id, tokenizer.pad_token_id, 77):
                found = model(packed=lay_out(rows, layout, fill)).rewards
                torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("margin", [False, True])
def test_the_gradient_is_that_of_bradley_terry_by_plain_transformers(tiny_llama, make_trainer, pairs, margin):
    rows = [{**row, "margin": 0.3 * i - 1} for i, row in enumerate(pairs)] if margin else pairs
    options = {"center_rewards_coefficient": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(
        tiny_llama(), rows, RewardTrainer, learning_rate=1.0, train_sampling_strategy="sequential", **options
    )
    plain = copy.deepcopy(trainer.model)
    plain.forward = type(plain).forward.__get__(plain)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    scores = own_scores(plain, list(trainer.train_dataset))
    chosen, rejected = scores[0::2], scores[1::2]
    wanted = torch.tensor([row["margin"] for row in rows]) if margin else 0.0
    loss = torch.nn.functional.softplus(wanted - chosen + rejected) + 0.1 * (chosen + rejected) ** 2
    loss.mean().backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        step = before[name] - dict(trainer.model.named_parameters())[name].detach()
        torch.testing.assert_close(step, parameter.grad, rtol=1e-3, atol=2e-5)


def test_a_reward_model_is_trained_further_from_its_folder(trained, make_trainer, pairs):
    _, folder = trained
    again = make_trainer(str(folder), pairs, RewardTrainer, peft_config=LoraConfig(**LORA))
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(again.model.get_base_model().score.original_module.weight.data, stored["score.weight"])


def test_resumed_training_gives_the_same_bits(make_trainer, tiny_llama, pairs, tmp_path):
    def run(steps, **options):
        trainer = make_trainer(
            tiny_llama(), pairs, RewardTrainer, peft_config=LoraConfig(**LORA), save_strategy="steps", save_steps=1,
            max_steps=2, optim="adamw_torch", overwrite_output_dir=False, output_dir=str(tmp_path / "resumed"),
        )  # fmt: skip
        trainer.train(**options)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    whole = run(2)
    again = run(2, resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-1"))
    assert any("score" in name for name in whole) and all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_a_reward_model_cannot_start_from(tiny_llama, make_trainer, pairs, tokenizer):
    with pytest.raises(DataError, match=r"'margin' is None"):
        make_trainer(tiny_llama(), [{**row, "margin": None if i == 2 else 1.0} for i, row in enumerate(pairs)],
                     RewardTrainer)  # fmt: skip
    with pytest.raises(ConfigError, match="adapter is 'continue'"):
        make_trainer(tiny_llama(), pairs, RewardTrainer, adapter="continue")
    with pytest.raises(ConfigError, match="no log-probs that a regulariser"):
        make_trainer(tiny_llama(), pairs, RewardTrainer, regularizers=[EWC("fisher.safetensors", 1.0)])
    make_trainer(tiny_llama(), pairs, RewardTrainer, regularizers=[L2SP(0.1)]).train()
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    for token in ("<pad>", "<|im_start|>"):  # nothing special is left but EOS
        bare.add_tokens([token])
    with pytest.raises(ConfigError, match="center_rewards_coefficient"):
        make_trainer(tiny_llama(), pairs, RewardTrainer, center_rewards_coefficient=-1.0)


def test_score_layers_need_an_architecture_that_transformers_has(tiny_llama):
    model = with_score_layer(tiny_llama(), seed=0)
    assert prepare(model) == "shared"
    assert torch.equal(model.score.weight, with_score_layer(tiny_llama(), seed=0).score.weight)
    with pytest.raises(ModelError, match="no sequence classification"):
        other = tiny_llama()
        other.config = type("Other", (), {})()
        with_score_layer(other, seed=0)
