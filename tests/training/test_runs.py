"""What goes into a trainer and what comes out: adapters, saved models, checkpoints, and input that is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fastalign.config.preference import PreferenceConfig
from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.models.scoring import prepare
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LIVE = {"precompute_ref_log_probs": False}


# Adapters


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


# Bad input


@pytest.mark.parametrize(
    ("kind", "rows", "error", "said"),
    [
        (PreferenceTrainer, "labelled", DataError, "needs chosen and rejected"),
        (SFTTrainer, "pairs", DataError, "text, messages, or prompt and completion"),
        (PreferenceTrainer, "empty", DataError, "no rows"),
        (PreferenceTrainer, "chat", DataError, "chat template"),
        (PreferenceTrainer, "identical", DataError, "identical"),
    ],
)
def test_data_of_another_kind_is_refused(make_trainer, tiny_llama, tokenizer, pairs, labelled, kind, rows, error, said):
    talk = [{"role": "user", "content": "Hi"}]
    rows = {
        "pairs": pairs, "labelled": labelled, "empty": [],
        "chat": [{"prompt": talk, "chosen": [{"role": "assistant", "content": "a"}],
                  "rejected": [{"role": "assistant", "content": "b"}]}],
        "identical": [{"prompt": "a", "chosen": "b", "rejected": "b"}],
    }[rows]  # fmt: skip
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(error, match=said):
            make_trainer(tiny_llama(), rows, kind)
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_pairs_given_to_an_unpaired_loss_are_refused(make_trainer, tiny_llama, pairs, labelled, loss_type):
    with pytest.raises(DataError, match="prompt, completion and label"):
        make_trainer(tiny_llama(), pairs, loss_type=loss_type)


def test_kto_needs_two_rows_a_batch(make_trainer, tiny_llama, labelled):
    with pytest.raises(DataError, match="one row"):
        make_trainer(tiny_llama(), labelled[:1], loss_type="kto")


def test_tokenizer_of_another_model_is_refused(make_trainer, tiny_llama, pairs):
    with pytest.raises(ModelError, match=r"but the model knows 100.*resize_token_embeddings"):
        make_trainer(tiny_llama(vocab_size=100), pairs)


def test_rows_longer_than_the_model_has_positions_are_refused(make_trainer, tiny_llama, pairs):
    rows = [{**pairs[0], "prompt": "long " * 60}]
    with pytest.raises(DataError, match=r"has 3\d\d tokens, but the model has 256 positions: set max_length=256"):
        make_trainer(tiny_llama(), rows)


def test_model_without_trainable_parameters_is_refused(make_trainer, tiny_llama, pairs, tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
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


def test_prompt_nll_needs_a_model_that_packs(make_trainer, pairs):
    config = tf.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match="use 'completion'"):
        make_trainer(tf.BloomForCausalLM(config), pairs, loss_type="orpo", nll_over="prompt_and_completion")


# The model as it is left


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


def test_predicted_memory_counts_prompts_as_they_are_laid_out(make_trainer, tiny_llama, pairs):
    def tokens(**options) -> int:
        report = make_trainer(tiny_llama(), pairs, per_device_train_batch_size=8, **options).preflight_report()
        return int(report.split("longest batch (")[1].split()[0].replace(",", ""))

    assert tokens(share_prompts=False) - tokens() == sum(len(row["prompt"]) for row in pairs)


def test_preflight_report_says_what_training_starts_from(make_trainer, tiny_llama, pairs):
    trainer = make_trainer(
        tiny_llama(), pairs, peft_config=LoraConfig(**LORA), per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    report = trainer.preflight_report()
    assert "8 of 8 kept" in report
    assert "2 x 4 rows a step, packed, each prompt once" in report
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"{trainable:,} of " in report and "predicted memory" in report
