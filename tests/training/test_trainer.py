"""What all trainers share: updates that do not depend on how the batch is cut, adapters, and input that is refused."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from fastalign.config.base import AlignmentConfig
from fastalign.config.preference import PreferenceConfig
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.objectives.sft import SFTObjective
from fastalign.training import trainer as trainer_module
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer
from fastalign.training.trainer import AlignmentTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LIVE = {"precompute_ref_log_probs": False}
# In float64 rounding reaches 1e-12 of the largest parameter, and any error of a formula is far above this.
EXACT = 1e-9


# The update does not depend on how the batch is cut up or laid out


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dpo"},
        {"loss_type": "orpo"},
        {"loss_type": ["dpo", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": "dpo", "nll_weight": 0.7},
        {"kind": SFTTrainer},
    ],
    ids=lambda options: str(options.get("loss_type", "sft")),
)
def test_update_does_not_depend_on_gradient_accumulation(
    make_trainer, gpt2, rows_of_many_lengths, largest_difference, options
):
    kind = options.get("kind", PreferenceTrainer)
    rows = rows_of_many_lengths(24)
    if kind is SFTTrainer:
        rows = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows]
    options = {key: value for key, value in options.items() if key != "kind"} | (
        LIVE if kind is PreferenceTrainer else {}
    )
    results, losses = [], []
    for size, accumulated in ((8, 1), (2, 4), (1, 8)):
        model = gpt2()
        trainer = make_trainer(
            model, rows, kind, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
            **options,
        )  # fmt: skip
        trainer.train()
        results.append(dict(model.named_parameters()))
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert largest_difference(gpt2(), results[0]) > 1e-4
    for result, loss in zip(results[1:], losses[1:], strict=True):
        assert max((result[n] - results[0][n]).abs().max().item() for n in result) < EXACT
        # the Trainer adds up losses as they come, in float32 at worst
        assert loss == pytest.approx(losses[0], rel=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("loss_type", ["dpo", "orpo"])
def test_update_does_not_depend_on_the_layout(make_trainer, gpt2, rows_of_many_lengths, loss_type):
    results = []
    for layout in ("shared", "packed", "padded"):
        model = gpt2()
        trainer = make_trainer(model, rows_of_many_lengths(8), loss_type=loss_type, max_steps=2, **LIVE)
        assert trainer.layout == "shared"
        trainer.layout = trainer.data_collator.layout = layout
        trainer.train()
        results.append(dict(model.named_parameters()))
    for result in results[1:]:
        assert max((result[n] - results[0][n]).abs().max().item() for n in result) < EXACT


def test_share_prompts_false_lays_out_a_prompt_a_completion(make_trainer, gpt2, rows_of_many_lengths):
    rows = rows_of_many_lengths(4)
    shared, apart = (make_trainer(gpt2(), rows, share_prompts=share, **LIVE) for share in (True, False))
    lengths = [
        t.data_collator([dict(r) for r in t.train_dataset])["batch"].packed.input_ids.numel() for t in (shared, apart)
    ]
    assert lengths[1] - lengths[0] == sum(len(row["prompt"]) for row in rows)


def test_gradient_checkpointing_gives_the_same_update(make_trainer, tiny_llama, pairs):
    results = []
    for checkpointing in (False, True):
        model = tiny_llama()
        calls = []  # inside a layer: hooks of the layer itself are not run again, nor is what follows the last need
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer = make_trainer(model, pairs[:4], activation_checkpointing=checkpointing)
        calls.clear()
        trainer.train()
        assert len(calls) == 2 + checkpointing  # policy, reference at step 0, and the recomputation
        results.append(dict(model.named_parameters()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# The model before training


@pytest.mark.parametrize(("said", "kept"), [(None, "64"), ("7", "7")])
def test_few_compiled_products_are_kept_unless_the_environment_says_otherwise(
    make_trainer, gpt2, pairs, monkeypatch, said, kept
):
    """Before the model runs: oneDNN reads it once, at its first product."""
    name, seen = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", []
    monkeypatch.setenv(name, said or "")
    if said is None:
        monkeypatch.delenv(name)
    prepare = trainer_module.prepare
    monkeypatch.setattr(trainer_module, "prepare", lambda model: seen.append(os.environ.get(name)) or prepare(model))
    make_trainer(gpt2(dtype=torch.float32), pairs)
    assert seen == [kept]


def test_a_model_is_placed_before_it_is_tried_out(make_trainer, gpt2, pairs, monkeypatch):
    """What fits it is found by running it, on the kernels that it will train on."""
    done, prepare = [], trainer_module.prepare
    monkeypatch.setattr(tf.Trainer, "_move_model_to_device", lambda *_: done.append("placed"))
    monkeypatch.setattr(trainer_module, "prepare", lambda model: done.append("tried") or prepare(model))
    make_trainer(gpt2(dtype=torch.float32), pairs)
    assert done == ["placed", "tried"]


def test_adapters_are_float32_on_a_bfloat16_base_and_learn(make_trainer, tiny_llama, pairs):
    model = tiny_llama(dtype=torch.bfloat16)
    start = copy.deepcopy(model.state_dict())
    trainer = make_trainer(
        model, pairs, peft_config=LoraConfig(**LORA), max_steps=2, optim="adamw_torch", learning_rate=1e-6
    )  # fmt: skip
    adapters = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    # AdamW's first steps move every number by the learning rate, which bfloat16 would round away.
    assert all((after[n] != p).any() for n, p in adapters.items() if "lora_B" in n)
    frozen = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in after.items() if "lora" not in n
    }
    assert all(torch.equal(frozen[n], value) for n, value in start.items() if n in frozen)


def test_adapter_of_16_bits_that_comes_with_the_model_becomes_float32(make_trainer, tiny_llama, pairs):
    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), LoraConfig(**LORA), autocast_adapter_dtype=False)
    trainer = make_trainer(model, pairs)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_stop_tokens_of_the_model_are_kept(make_trainer, tiny_llama, pairs, tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = [7, 9]
    trainer = make_trainer(model, pairs)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 7, 9]
    trainer.train()
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id, 7, 9}
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_dropout_of_the_model_is_off_and_of_the_adapter_kept(make_trainer, pairs):
    config = tf.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=1, n_head=4, n_positions=128, eos_token_id=2, bos_token_id=None
    )
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = make_trainer(tf.GPT2LMHeadModel(config), pairs, peft_config=lora)
    dropouts = {name: m.p for name, m in trainer.model.named_modules() if isinstance(m, nn.Dropout)}
    assert len(dropouts) > 3
    assert {p for name, p in dropouts.items() if "lora_dropout" in name} == {0.5}
    assert {p for name, p in dropouts.items() if "lora_dropout" not in name} == {0.0}
    trainer.train()  # B is 0 at the start, so that the margins are exactly 0 none the less
    assert trainer.state.log_history[0]["rewards/margins"] == 0.0


def test_model_that_draws_at_random_is_refused_at_the_first_step(make_trainer, tiny_llama, pairs):
    model = tiny_llama()
    model.model.norm = nn.Sequential(model.model.norm, nn.Dropout(0.2))
    with pytest.raises(ModelError, match="set disable_dropout=True"):
        make_trainer(model, pairs, disable_dropout=False).train()


# Bad input


def test_tokenizer_of_another_model_is_refused(make_trainer, tiny_llama, pairs):
    with pytest.raises(ModelError, match=r"but the model knows 100.*resize_token_embeddings"):
        make_trainer(tiny_llama(vocab_size=100), pairs)


def test_rows_longer_than_the_model_has_positions_are_refused(make_trainer, tiny_llama, pairs):
    rows = [{**pairs[0], "prompt": "long " * 60}]
    with pytest.raises(DataError, match=r"has 3\d\d tokens, but the model has 256 positions: set max_length=256"):
        make_trainer(tiny_llama(), rows)


def test_model_without_trainable_parameters_is_refused(make_trainer, tiny_llama, pairs):
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ModelError, match="No parameter of the model is trainable"):
        make_trainer(model, pairs)


def test_adapter_on_layers_that_are_not_there_is_refused(make_trainer, tiny_llama, pairs):
    with pytest.raises(ModelError, match="no_such_layer"):
        make_trainer(tiny_llama(), pairs, peft_config=LoraConfig(target_modules=["no_such_layer"]))


def test_encoder_decoders_are_refused(make_trainer, pairs):
    config = tf.T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ModelError, match="encoder-decoder"):
        make_trainer(tf.T5ForConditionalGeneration(config), pairs)


def test_missing_tokenizer_and_evaluation_rows_are_said(make_trainer, tiny_llama, pairs, tmp_path):
    with pytest.raises(ConfigError, match="pass the model's tokenizer"):
        PreferenceTrainer(tiny_llama(), PreferenceConfig(str(tmp_path), use_cpu=True), pairs)
    with pytest.raises(ConfigError, match="eval_dataset"):
        make_trainer(tiny_llama(), pairs, eval_strategy="steps", eval_steps=1)


def test_rows_without_a_prompt_are_refused_unless_they_are_asked_for(make_trainer, tiny_llama):
    rows = [{"prompt": "", "completion": "red"}, {"prompt": "", "completion": "blue"}]
    with pytest.raises(DataError, match="prompt"):
        make_trainer(tiny_llama(), rows, SFTTrainer)
    trainer = make_trainer(tiny_llama(), rows, SFTTrainer, allow_empty_prompt=True)
    assert [row["prompt_ids"] for row in trainer.train_dataset] == [[], []]


def test_plain_strings_become_a_chat_where_it_is_asked_for(make_trainer, tiny_llama, tokenizer):
    rows = [{"prompt": "Name a colour.", "completion": "Red."}]
    plain, chat = (make_trainer(tiny_llama(), rows, SFTTrainer, apply_chat_template=way) for way in (False, True))
    assert "apply_chat_template" in plain.preflight_report()
    prompt = tokenizer.decode(chat.train_dataset[0]["prompt_ids"])
    assert prompt == "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"


# Calls of `train` one after another


@pytest.mark.parametrize("kind", ["lora", "all weights", "sft"])
def test_training_again_goes_on(make_trainer, tiny_llama, pairs, kind):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs] if kind == "sft" else pairs
    trainer = make_trainer(
        tiny_llama(), rows, *([SFTTrainer] if kind == "sft" else []), max_steps=2, learning_rate=0.05,
        peft_config=LoraConfig(**LORA) if kind == "lora" else None,
    )  # fmt: skip
    trainer.train()
    before = copy.deepcopy([p for p in trainer.model.parameters() if p.requires_grad])
    trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if kind != "sft":  # the rewards still count from where the first call started
        logged = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
        assert logged[0] != 0.0


@pytest.mark.parametrize(
    ("kind", "lora", "rate"),
    [
        (PreferenceTrainer, True, 1e-4),
        (PreferenceTrainer, False, 1e-6),
        (SFTTrainer, True, 2e-4),
        (SFTTrainer, False, 1e-5),
    ],
)
def test_the_learning_rate_follows_what_is_trained(make_trainer, tiny_llama, pairs, kind, lora, rate):
    rows = pairs if kind is PreferenceTrainer else [{"text": row["chosen"]} for row in pairs]
    adapter = LoraConfig(**LORA) if lora else None
    trainer = make_trainer(tiny_llama(), rows, kind, peft_config=adapter, learning_rate=None)
    assert trainer.args.learning_rate == rate and f"{rate:g}" in trainer.preflight_report()
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == rate
    given = make_trainer(tiny_llama(), rows, kind, peft_config=adapter, learning_rate=0.25)
    assert given.args.learning_rate == 0.25


# The base reads no option of one method


class Plain(AlignmentTrainer):
    """A method with the options of `AlignmentConfig` alone, and an objective that needs a reference."""

    def __init__(self, model, args: AlignmentConfig, *arguments, **options):
        super().__init__(model, args, *arguments, objective=lambda args: Drift(), **options)

    def _wanted(self, args):
        return None  # any rows


class Drift(SFTObjective):
    needs_reference = True

    def __call__(self, logprobs, ref_logprobs, batch, totals):
        assert torch.equal(logprobs.detach(), ref_logprobs)
        return super().__call__(logprobs, None, batch, totals)


def test_the_base_trainer_needs_no_option_of_a_method(make_trainer, tiny_llama, pairs):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    trainer = make_trainer(tiny_llama(), rows, Plain, learning_rate=0.1)
    assert type(trainer.args) is AlignmentConfig and not hasattr(trainer.args, "precompute_ref_log_probs")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
