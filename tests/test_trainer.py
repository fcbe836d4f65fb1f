"""The trainers against plain torch: the stock model on separate sequences, the loss written out, one SGD step."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.attention import packed_attention
from fastalign.config import PreferenceConfig, SFTConfig
from fastalign.data import tokenize
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.trainer import PreferenceTrainer, SFTTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LIVE = {"precompute_ref_log_probs": False}
# In float64 rounding reaches 1e-12 of the largest parameter, and any error of a formula is far above this.
EXACT = 1e-9


@pytest.fixture
def make(tokenizer, tmp_path):
    """A trainer of one SGD step after another, with everything that could differ between runs turned off."""

    def make(model, rows, kind=PreferenceTrainer, *, eval_rows=None, peft_config=None, **options):
        config = PreferenceConfig if kind is PreferenceTrainer else SFTConfig
        defaults = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
            "logging_steps": 1, "max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant",
            "learning_rate": 0.01, "max_grad_norm": 0.0, "per_device_train_batch_size": 4,
        }  # fmt: skip
        if kind is PreferenceTrainer:
            defaults["ref_cache_dir"] = str(tmp_path / "cache")
        return kind(model, config(**{**defaults, **options}), rows, eval_rows, tokenizer, peft_config)

    return make


def gpt2(*, tied=True, dtype=torch.float64) -> tf.GPT2LMHeadModel:
    """A model that computes in float64 throughout, which those with RMSNorm in float32 do not."""
    config = tf.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, bos_token_id=None,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.GPT2LMHeadModel(config).to(dtype).eval()


def rows_of_many_lengths(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return "".join(chr(97 + int(i)) for i in torch.randint(26, (length,), generator=generator))

    # An upper-case letter keeps chosen and rejected apart.
    return [{"prompt": text(14), "chosen": "C" + text(12), "rejected": "R" + text(20)} for _ in range(count)]


def logps(model: nn.Module, row: dict) -> list[Tensor]:
    """Per completion of a tokenised row, its tokens' log-probs from the stock model's logits, each sequence alone."""
    values = []
    for completion in row["completion_ids"]:
        ids, start = row["prompt_ids"] + completion, len(row["prompt_ids"])
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        values.append(torch.stack([wide[t - 1, ids[t]] for t in range(start, len(ids))]))
    return values


def by_hand(model: nn.Module, rows, loss, learning_rate: float) -> dict[str, Tensor]:
    """The parameters after one step of SGD on `loss(policy, reference)`, both a list of pairs of token log-probs."""
    with torch.no_grad():
        reference = [logps(model, row) for row in rows]
    loss([logps(model, row) for row in rows], reference).backward()
    return {
        name: (p - learning_rate * p.grad if p.grad is not None else p).detach() for name, p in model.named_parameters()
    }


def margins(policy, reference) -> Tensor:
    pairs = zip(policy, reference, strict=True)
    return torch.stack([(c.sum() - rc.sum()) - (r.sum() - rr.sum()) for (c, r), (rc, rr) in pairs])


def dpo_by_hand(policy, reference):
    return -logsigmoid(0.1 * margins(policy, reference)).mean()


def ipo_by_hand(policy, reference):
    pairs = zip(policy, reference, strict=True)
    means = torch.stack([(c.mean() - rc.mean()) - (r.mean() - rr.mean()) for (c, r), (rc, rr) in pairs])
    return ((means - 1 / (2 * 0.1)) ** 2).mean()


def orpo_by_hand(policy, _):
    def log_odds(x):
        return x.mean() - torch.log(1 - x.mean().exp())

    odds = torch.stack([-0.1 * logsigmoid(log_odds(c) - log_odds(r)) for c, r in policy]).mean()
    chosen = torch.cat([c for c, _ in policy])
    return odds - chosen.mean()


def kto_by_hand(policy, reference):
    """Row i's completion is desirable where i is odd; the baseline is over the completions of the next rows."""
    own, other = (
        torch.stack([p[k].sum() - r[k].sum() for p, r in zip(policy, reference, strict=True)]) for k in (0, 1)
    )
    x = 0.1 * (own - other.mean().clamp(min=0).detach())
    signs = torch.tensor([-1.0, 1.0] * (len(policy) // 2), dtype=x.dtype)
    return (1 - torch.sigmoid(signs * x)).mean()


def largest_difference(model: nn.Module, expected: dict[str, Tensor]) -> float:
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


# Against plain torch


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("loss_type", "loss"), [("dpo", dpo_by_hand), ("ipo", ipo_by_hand), ("orpo", orpo_by_hand)])
def test_one_step_is_the_step_of_plain_torch(make, tokenizer, loss_type, loss, tied):
    rows, model = rows_of_many_lengths(4), gpt2(tied=tied)
    start = copy.deepcopy(dict(model.named_parameters()))
    expected = by_hand(copy.deepcopy(model), tokenize(rows, tokenizer)[0], loss, 0.01)
    trainer = make(model, rows, loss_type=loss_type, **LIVE)
    trainer.train()
    assert trainer.layout == "shared"
    assert largest_difference(model, start) > 1e-4  # so that the next line says something
    assert largest_difference(model, expected) < EXACT


def test_kto_step_is_the_step_of_plain_torch(make, tokenizer, labelled):
    model, rows = gpt2(), labelled[:4]
    tokenised = [dict(row) for row in tokenize(rows, tokenizer)[0]]
    for row, following in zip(tokenised, tokenised[1:] + tokenised[:1], strict=True):
        row["both"] = [row["completion_ids"][0], following["completion_ids"][0]]
    tokenised = [{**row, "completion_ids": row["both"]} for row in tokenised]
    expected = by_hand(copy.deepcopy(model), tokenised, kto_by_hand, 0.01)
    trainer = make(model, rows, loss_type="kto", **LIVE)
    assert [row["completion_ids"] for row in trainer.train_dataset] == [row["completion_ids"] for row in tokenised]
    trainer.train()
    assert largest_difference(model, expected) < EXACT


def test_float32_step_is_within_rounding_of_float64(make, tokenizer, tiny_llama, pairs):
    rows = tokenize(pairs[:4], tokenizer)[0]
    model = tiny_llama()
    plain = by_hand(copy.deepcopy(model), rows, dpo_by_hand, 0.01)
    truth = by_hand(copy.deepcopy(model).double(), rows, dpo_by_hand, 0.01)
    make(model, pairs[:4]).train()
    eps = torch.finfo(torch.float32).eps
    for name, parameter in model.named_parameters():
        # twice what the same step in plain float32 loses, and one rounding of the parameter
        lost = (plain[name] - truth[name]).abs().max() + eps * truth[name].abs().max()
        assert (parameter - truth[name]).abs().max() <= 2 * lost, name


def test_nll_over_prompt_and_completion(make, tokenizer):
    """ORPO with the NLL of prompt and chosen completion as one text (its paper's section 4.1)."""
    rows, model = rows_of_many_lengths(4), gpt2()
    tokenised = tokenize(rows, tokenizer)[0]

    def loss(policy, reference):
        prompts = [
            logps(stock, {"prompt_ids": row["prompt_ids"][:1], "completion_ids": [row["prompt_ids"][1:]]})[0]
            for row in tokenised if len(row["prompt_ids"]) > 1
        ]  # fmt: skip
        chosen = torch.cat([c for c, _ in policy])
        return orpo_by_hand(policy, reference) + chosen.mean() - torch.cat([*prompts, chosen]).mean()

    stock = copy.deepcopy(model)
    expected = by_hand(stock, tokenised, loss, 0.01)
    for share in (True, False):
        trained = copy.deepcopy(model)
        make(trained, rows, loss_type="orpo", nll_over="prompt_and_completion", share_prompts=share).train()
        assert largest_difference(trained, expected) < EXACT, f"share_prompts={share}"


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
def test_update_does_not_depend_on_gradient_accumulation(make, options):
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
        trainer = make(
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
def test_update_does_not_depend_on_the_layout(make, loss_type):
    results = []
    for layout in ("shared", "packed", "padded"):
        model = gpt2()
        trainer = make(model, rows_of_many_lengths(8), loss_type=loss_type, max_steps=2, **LIVE)
        assert trainer.layout == "shared"
        trainer.layout = trainer.data_collator.layout = layout
        trainer.train()
        results.append(dict(model.named_parameters()))
    for result in results[1:]:
        assert max((result[n] - results[0][n]).abs().max().item() for n in result) < EXACT


def test_share_prompts_false_lays_out_a_prompt_a_completion(make):
    rows = rows_of_many_lengths(4)
    shared, apart = (make(gpt2(), rows, share_prompts=share, **LIVE) for share in (True, False))
    lengths = [
        t.data_collator([dict(r) for r in t.train_dataset])["batch"].packed.input_ids.numel() for t in (shared, apart)
    ]
    assert lengths[1] - lengths[0] == sum(len(row["prompt"]) for row in rows)


def test_gradient_checkpointing_gives_the_same_update(make, tiny_llama, pairs):
    results = []
    for checkpointing in (False, True):
        model = tiny_llama()
        calls = []  # inside a layer: hooks of the layer itself are not run again, nor is what follows the last need
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer = make(model, pairs[:4], activation_checkpointing=checkpointing)
        calls.clear()
        trainer.train()
        assert len(calls) == 2 + checkpointing  # policy, reference at step 0, and the recomputation
        results.append(dict(model.named_parameters()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_eval_loss_and_metrics_do_not_depend_on_the_batch_size(make):
    rows, model = rows_of_many_lengths(5), gpt2()
    found = []
    for size in (1, 3, 5):
        trainer = make(model, rows, eval_rows=rows, loss_type="ipo", per_device_eval_batch_size=size, **LIVE)
        found.append({k: v for k, v in trainer.evaluate().items() if "time" not in k and "per_second" not in k})
    sft = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows]
    for size in (1, 3, 5):
        trainer = make(model, sft, SFTTrainer, eval_rows=sft, per_device_eval_batch_size=size)
        found.append({"eval_loss": trainer.evaluate()["eval_loss"]})
    for other in (found[1], found[2]):
        assert other == pytest.approx(found[0], rel=1e-6)
    assert found[4] == pytest.approx(found[3], rel=1e-6)
    assert found[5] == pytest.approx(found[3], rel=1e-6)


# Metrics


def test_metrics_have_the_names_of_the_field_and_the_right_values(make, tokenizer, pairs):
    model = gpt2()
    trainer = make(model, pairs, eval_rows=pairs[:3], beta=0.5, max_steps=2, learning_rate=1e-3, **LIVE)
    start = copy.deepcopy(model)
    trainer.train()
    metrics = trainer.evaluate()
    rows = tokenize(pairs[:3], tokenizer)[0]
    with torch.no_grad():
        now, then = ([[x.sum() for x in logps(m, row)] for row in rows] for m in (model, start))
    rewards = 0.5 * (torch.tensor(now) - torch.tensor(then))  # (3, 2)
    expected = {
        "eval_rewards/chosen": rewards[:, 0].mean(),
        "eval_rewards/rejected": rewards[:, 1].mean(),
        "eval_rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "eval_rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).double().mean(),
        "eval_logps/chosen": torch.tensor(now)[:, 0].mean(),
        "eval_logps/rejected": torch.tensor(now)[:, 1].mean(),
        "eval_loss": -logsigmoid(rewards[:, 0] - rewards[:, 1]).mean(),
        "eval_lengths/chosen": sum(len(r["completion_ids"][0]) for r in rows) / 3,
        "eval_lengths/rejected": sum(len(r["completion_ids"][1]) for r in rows) / 3,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-6), name
    assert abs(metrics["eval_rewards/margins"]) > 1e-3
    assert metrics["eval_kl"] > 0
    logged, second = trainer.state.log_history[:2]
    lengths = [len(row["completion_ids"][0]) for row in tokenize(pairs, tokenizer)[0]]
    # each line is of its own step: the two steps of four rows make up the eight
    assert (logged["lengths/chosen"] + second["lengths/chosen"]) / 2 == sum(lengths) / 8
    assert {"loss", "grad_norm", "learning_rate", "nll_loss", "tokens_per_second", "memory_gb"} <= logged.keys()
    assert {"rewards/margins", "logps/accuracies", "lengths/chosen"} <= logged.keys()


def test_kl_to_the_start_is_exact(make, tokenizer, pairs):
    model = gpt2()
    trainer = make(model, pairs, eval_rows=pairs[:2], max_steps=1, **LIVE)
    start = copy.deepcopy(model)
    assert trainer.evaluate()["eval_kl"] == 0.0
    trainer.train()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in tokenize(pairs[:2], tokenizer)[0]:
            for completion in row["completion_ids"]:
                ids = torch.tensor([row["prompt_ids"] + completion])
                p, q = (
                    m(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1) for m in (model, start)
                )
                total, count = total + (p.exp() * (p - q)).sum().item(), count + len(completion)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(total / count, rel=1e-6)


class _CountScalarReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_metrics_stay_on_the_device_between_logs(make, tiny_llama, pairs):
    """Reading a number off the device waits for it: beyond what the model's body does, a micro-batch must not."""
    trainer = make(tiny_llama(), pairs, loss_type=["dpo", "sft"])
    trainer.state.global_step = 1  # at the first step policy and reference are compared, which does read
    inputs = next(iter(trainer.get_train_dataloader()))
    packed = inputs["batch"].packed
    trainer.model.train()
    with _CountScalarReads() as body, packed_attention(packed.layout):
        trainer.model.model(**packed.model_inputs(), use_cache=False)
    with _CountScalarReads() as whole:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert whole.count == body.count
    assert trainer._sums["train"]["rewards/margins"].shape == (2,)


def test_metrics_file_holds_the_evaluation_before_and_every_step(make, pairs, tmp_path):
    trainer = make(gpt2(), pairs, eval_rows=pairs[:2], max_steps=3, **LIVE)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 99, "loss": 1.0}\n')  # of an earlier run
    trainer.evaluate()
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert "eval_rewards/margins" in lines[0]
    assert all("rewards/margins" in line and line["time"] >= 0 for line in lines[1:4])


# Unpaired losses


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_unpaired_losses_learn_the_labels(make, labelled, loss_type):
    model = gpt2(dtype=torch.float32)
    trainer = make(
        model, labelled, loss_type=loss_type, max_steps=6, per_device_train_batch_size=6, learning_rate=0.01,
        eval_rows=labelled,
    )  # fmt: skip
    before = trainer.evaluate()
    assert before["eval_rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/chosen"] > 0 > after["eval_rewards/rejected"]
    assert after["eval_rewards/margins"] == pytest.approx(after["eval_rewards/chosen"] - after["eval_rewards/rejected"])
    assert after["eval_rewards/accuracies"] == 1.0


# Adapters


def test_adapters_are_float32_on_a_bfloat16_base_and_learn(make, tiny_llama, pairs):
    model = tiny_llama(dtype=torch.bfloat16)
    start = copy.deepcopy(model.state_dict())
    trainer = make(
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


def test_adapter_of_16_bits_that_comes_with_the_model_becomes_float32(make, tiny_llama, pairs):
    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), LoraConfig(**LORA), autocast_adapter_dtype=False)
    trainer = make(model, pairs)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_saved_adapter_is_safetensors_and_loads(make, tiny_llama, pairs, tokenizer, tmp_path):
    trainer = make(tiny_llama(), pairs, peft_config=LoraConfig(**LORA), max_steps=2, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    assert (folder / "adapter_model.safetensors").exists()
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    row = tokenize(pairs[:1], tokenizer)[0][0]
    with torch.no_grad():
        ours, theirs, start = (logps(m.eval(), row)[1] for m in (trainer.model, loaded, tiny_llama()))
    assert torch.equal(ours, theirs)
    assert (ours - start).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_is_safetensors_and_loads(make, tiny_llama, pairs, tokenizer, tmp_path, tied):
    trainer = make(tiny_llama(tied=tied), pairs, max_steps=2)
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


def resume(make, build, rows, tmp_path, **options):
    """Parameters and losses of 4 steps in one go, and of 2 and then 2 more in a new trainer."""
    results = []
    for stops in ((4,), (2, 4)):
        folder = str(tmp_path / f"run{len(stops)}")
        for stop in stops:
            model, peft_config = build()
            trainer = make(
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
def test_resumed_adapter_run_goes_on_as_if_never_stopped(make, tiny_llama, pairs, tmp_path, precompute):
    resume(
        make, lambda: (tiny_llama(), LoraConfig(**LORA, init_lora_weights=False)), pairs, tmp_path,
        precompute_ref_log_probs=precompute, learning_rate=1e-2,
    )  # fmt: skip


def test_resumed_full_run_goes_on_as_if_never_stopped(make, tiny_llama, pairs, tmp_path):
    trainer = resume(make, lambda: (tiny_llama(), None), pairs, tmp_path, learning_rate=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "run2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert trainer.state.global_step == 4


def test_bco_keeps_its_running_rewards_when_resumed(make, tiny_llama, labelled, tmp_path):
    resume(make, lambda: (tiny_llama(), None), labelled, tmp_path, learning_rate=1e-2, loss_type="bco")


def test_moved_reference_is_kept_when_resumed(make, tiny_llama, pairs, tmp_path):
    resume(
        make, lambda: (tiny_llama(), LoraConfig(**LORA)), pairs, tmp_path, learning_rate=1e-2, sync_ref_model=True,
        ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, **LIVE,
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
def test_data_of_another_kind_is_refused(make, tiny_llama, tokenizer, pairs, labelled, kind, rows, error, said):
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
            make(tiny_llama(), rows, kind)
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_pairs_given_to_an_unpaired_loss_are_refused(make, tiny_llama, pairs, labelled, loss_type):
    with pytest.raises(DataError, match="prompt, completion and label"):
        make(tiny_llama(), pairs, loss_type=loss_type)


def test_kto_needs_two_rows_a_batch(make, tiny_llama, labelled):
    with pytest.raises(DataError, match="one row"):
        make(tiny_llama(), labelled[:1], loss_type="kto")


def test_tokenizer_of_another_model_is_refused(make, tiny_llama, pairs):
    with pytest.raises(ModelError, match=r"but the model knows 100.*resize_token_embeddings"):
        make(tiny_llama(vocab_size=100), pairs)


def test_model_without_trainable_parameters_is_refused(make, tiny_llama, pairs, tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(ModelError, match="No parameter of the model is trainable"):
        make(model, pairs)


def test_adapter_on_layers_that_are_not_there_is_refused(make, tiny_llama, pairs):
    with pytest.raises(ModelError, match="no_such_layer"):
        make(tiny_llama(), pairs, peft_config=LoraConfig(target_modules=["no_such_layer"]))


def test_encoder_decoders_are_refused(make, pairs):
    config = tf.T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ModelError, match="encoder-decoder"):
        make(tf.T5ForConditionalGeneration(config), pairs)


def test_missing_tokenizer_and_evaluation_rows_are_said(make, tiny_llama, pairs, tmp_path):
    with pytest.raises(ConfigError, match="pass the model's tokenizer"):
        PreferenceTrainer(tiny_llama(), PreferenceConfig(str(tmp_path), use_cpu=True), pairs)
    with pytest.raises(ConfigError, match="eval_dataset"):
        make(tiny_llama(), pairs, eval_strategy="steps", eval_steps=1)


def test_prompt_nll_needs_a_model_that_packs(make, pairs):
    config = tf.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match="use 'completion'"):
        make(tf.BloomForCausalLM(config), pairs, loss_type="orpo", nll_over="prompt_and_completion")


# The model as it is left


def test_stop_tokens_of_the_model_are_kept(make, tiny_llama, pairs, tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = [7, 9]
    trainer = make(model, pairs)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 7, 9]
    trainer.train()
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id, 7, 9}
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_dropout_of_the_model_is_off_and_of_the_adapter_kept(make, pairs):
    config = tf.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=1, n_head=4, n_positions=128, eos_token_id=2, bos_token_id=None
    )
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = make(tf.GPT2LMHeadModel(config), pairs, peft_config=lora)
    dropouts = {name: m.p for name, m in trainer.model.named_modules() if isinstance(m, nn.Dropout)}
    assert len(dropouts) > 3
    assert {p for name, p in dropouts.items() if "lora_dropout" in name} == {0.5}
    assert {p for name, p in dropouts.items() if "lora_dropout" not in name} == {0.0}
    trainer.train()  # B is 0 at the start, so that the margins are exactly 0 none the less
    assert trainer.state.log_history[0]["rewards/margins"] == 0.0


def test_model_that_draws_at_random_is_refused_at_the_first_step(make, pairs):
    model = gpt2()
    model.transformer.drop = nn.Dropout(0.2)
    with pytest.raises(ModelError, match="set disable_dropout=True"):
        make(model, pairs, disable_dropout=False).train()


def test_predicted_memory_counts_prompts_as_they_are_laid_out(make, tiny_llama, pairs):
    def tokens(**options) -> int:
        report = make(tiny_llama(), pairs, per_device_train_batch_size=8, **options).preflight_report()
        return int(report.split("longest batch (")[1].split()[0].replace(",", ""))

    assert tokens(share_prompts=False) - tokens() == sum(len(row["prompt"]) for row in pairs)


def test_preflight_report_says_what_training_starts_from(make, tiny_llama, pairs):
    trainer = make(
        tiny_llama(), pairs, peft_config=LoraConfig(**LORA), per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    report = trainer.preflight_report()
    assert "8 of 8 kept" in report
    assert "2 x 4 rows a step, packed, each prompt once" in report
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"{trainable:,} of " in report and "predicted memory" in report
