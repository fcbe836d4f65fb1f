"""The trainers against plain torch: the stock model on separate sequences, the loss written out, one SGD step."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.data.tokenization import tokenize
from fastalign.errors import ModelError
from fastalign.models.attention import packed_attention
from fastalign.training import trainer as trainer_module
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer

LIVE = {"precompute_ref_log_probs": False}
# In float64 rounding reaches 1e-12 of the largest parameter, and any error of a formula is far above this.
EXACT = 1e-9


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
def test_one_step_is_the_step_of_plain_torch(make_trainer, tokenizer, loss_type, loss, tied):
    rows, model = rows_of_many_lengths(4), gpt2(tied=tied)
    start = copy.deepcopy(dict(model.named_parameters()))
    expected = by_hand(copy.deepcopy(model), tokenize(rows, tokenizer)[0], loss, 0.01)
    trainer = make_trainer(model, rows, loss_type=loss_type, **LIVE)
    trainer.train()
    assert trainer.layout == "shared"
    assert largest_difference(model, start) > 1e-4  # so that the next line says something
    assert largest_difference(model, expected) < EXACT


def test_kto_step_is_the_step_of_plain_torch(make_trainer, tokenizer, labelled):
    model, rows = gpt2(), labelled[:4]
    tokenised = [dict(row) for row in tokenize(rows, tokenizer)[0]]
    for row, following in zip(tokenised, tokenised[1:] + tokenised[:1], strict=True):
        row["both"] = [row["completion_ids"][0], following["completion_ids"][0]]
    tokenised = [{**row, "completion_ids": row["both"]} for row in tokenised]
    expected = by_hand(copy.deepcopy(model), tokenised, kto_by_hand, 0.01)
    trainer = make_trainer(model, rows, loss_type="kto", **LIVE)
    assert [row["completion_ids"] for row in trainer.train_dataset] == [row["completion_ids"] for row in tokenised]
    trainer.train()
    assert largest_difference(model, expected) < EXACT


def test_float32_step_is_within_rounding_of_float64(make_trainer, tokenizer, tiny_llama, pairs):
    rows = tokenize(pairs[:4], tokenizer)[0]
    model = tiny_llama()
    plain = by_hand(copy.deepcopy(model), rows, dpo_by_hand, 0.01)
    truth = by_hand(copy.deepcopy(model).double(), rows, dpo_by_hand, 0.01)
    make_trainer(model, pairs[:4]).train()
    eps = torch.finfo(torch.float32).eps
    for name, parameter in model.named_parameters():
        # twice what the same step in plain float32 loses, and one rounding of the parameter
        lost = (plain[name] - truth[name]).abs().max() + eps * truth[name].abs().max()
        assert (parameter - truth[name]).abs().max() <= 2 * lost, name


def test_before_the_first_step_policy_and_reference_agree(make_trainer, monkeypatch):
    trainer, reference = make_trainer(gpt2(), rows_of_many_lengths(2)), torch.tensor([-3.0, -0.5])
    trainer._check_start(reference, reference.clone(), None)
    with pytest.raises(ModelError, match=r"differ from the reference's by 1e-06; they must be equal\. The"):
        trainer._check_start(reference.double(), reference.double() + 1e-6, None)
    with pytest.raises(ModelError, match="by nan"):
        trainer._check_start(reference, reference * torch.nan, None)
    assert trainer_module.start_rounding(torch.device("cpu")) == 0
    on_a_gpu = trainer_module.start_rounding(torch.device("cuda"))
    monkeypatch.setattr(trainer_module, "start_rounding", lambda device: on_a_gpu)
    trainer._check_start(reference, reference + 2e-6, None)  # measured on an H200
    with pytest.raises(ModelError, match=r"by 0\.001; they must be equal within 0\.0001\. "):
        trainer._check_start(reference, reference + 1e-3, None)


@pytest.mark.parametrize(("said", "kept"), [(None, "64"), ("7", "7")])
def test_few_compiled_products_are_kept_unless_the_environment_says_otherwise(
    make_trainer, pairs, monkeypatch, said, kept
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


def test_tokens_that_fill_a_row_up_are_not_counted(make_trainer, pairs):
    seen = []
    for multiple in (1, 64):
        trainer = make_trainer(gpt2(dtype=torch.float32), pairs, max_steps=1)
        trainer.data_collator.multiple = multiple
        trainer.train()
        seen.append(trainer.tokens_seen)
    assert seen[0] == seen[1] > 0


def test_a_model_is_placed_before_it_is_tried_out(make_trainer, pairs, monkeypatch):
    """What fits it is found by running it, on the kernels that it will train on."""
    done, prepare = [], trainer_module.prepare
    monkeypatch.setattr(trainer_module.Trainer, "_move_model_to_device", lambda *_: done.append("placed"))
    monkeypatch.setattr(trainer_module, "prepare", lambda model: done.append("tried") or prepare(model))
    make_trainer(gpt2(dtype=torch.float32), pairs)
    assert done == ["placed", "tried"]


def test_nll_over_prompt_and_completion(make_trainer, tokenizer):
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
        make_trainer(trained, rows, loss_type="orpo", nll_over="prompt_and_completion", share_prompts=share).train()
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
def test_update_does_not_depend_on_gradient_accumulation(make_trainer, options):
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
def test_update_does_not_depend_on_the_layout(make_trainer, loss_type):
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


def test_share_prompts_false_lays_out_a_prompt_a_completion(make_trainer):
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


def test_eval_loss_and_metrics_do_not_depend_on_the_batch_size(make_trainer):
    rows, model = rows_of_many_lengths(5), gpt2()
    found = []
    for size in (1, 3, 5):
        trainer = make_trainer(model, rows, eval_rows=rows, loss_type="ipo", per_device_eval_batch_size=size, **LIVE)
        found.append({k: v for k, v in trainer.evaluate().items() if "time" not in k and "per_second" not in k})
    sft = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows]
    for size in (1, 3, 5):
        trainer = make_trainer(model, sft, SFTTrainer, eval_rows=sft, per_device_eval_batch_size=size)
        found.append({"eval_loss": trainer.evaluate()["eval_loss"]})
    for other in (found[1], found[2]):
        assert other == pytest.approx(found[0], rel=1e-6)
    assert found[4] == pytest.approx(found[3], rel=1e-6)
    assert found[5] == pytest.approx(found[3], rel=1e-6)


# Metrics


def test_metrics_have_the_names_of_the_field_and_the_right_values(make_trainer, tokenizer, pairs):
    model = gpt2()
    trainer = make_trainer(model, pairs, eval_rows=pairs[:3], beta=0.5, max_steps=2, learning_rate=1e-3, **LIVE)
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


def test_kl_to_the_start_is_exact(make_trainer, tokenizer, pairs):
    model = gpt2()
    trainer = make_trainer(model, pairs, eval_rows=pairs[:2], max_steps=1, **LIVE)
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


def test_metrics_stay_on_the_device_between_logs(make_trainer, tiny_llama, pairs):
    """Reading a number off the device waits for it: beyond what the model's body does, a micro-batch must not."""
    trainer = make_trainer(tiny_llama(), pairs, loss_type=["dpo", "sft"])
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


def test_metrics_file_holds_the_evaluation_before_and_every_step(make_trainer, pairs, tmp_path):
    trainer = make_trainer(gpt2(), pairs, eval_rows=pairs[:2], max_steps=3, **LIVE)
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
def test_unpaired_losses_learn_the_labels(make_trainer, labelled, loss_type):
    model = gpt2(dtype=torch.float32)
    trainer = make_trainer(
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
