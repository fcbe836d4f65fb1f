"""The trainer of preferences against plain torch: the stock model on separate sequences, the loss written out, SGD."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError, DataError

LIVE = {"precompute_ref_log_probs": False}
# In float64 rounding reaches 1e-12 of the largest parameter, and any error of a formula is far above this.
EXACT = 1e-9


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


# Against plain torch


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("loss_type", "loss"), [("dpo", dpo_by_hand), ("ipo", ipo_by_hand), ("orpo", orpo_by_hand)])
def test_one_step_is_the_step_of_plain_torch(
    make_trainer, gpt2, rows_of_many_lengths, by_hand, largest_difference, tokenizer, loss_type, loss, tied
):
    rows, model = rows_of_many_lengths(4), gpt2(tied=tied)
    start = copy.deepcopy(dict(model.named_parameters()))
    expected = by_hand(copy.deepcopy(model), tokenize(rows, tokenizer)[0], loss, 0.01)
    trainer = make_trainer(model, rows, loss_type=loss_type, **LIVE)
    trainer.train()
    assert trainer.layout == "shared"
    assert largest_difference(model, start) > 1e-4  # so that the next line says something
    assert largest_difference(model, expected) < EXACT


def test_kto_step_is_the_step_of_plain_torch(make_trainer, gpt2, by_hand, largest_difference, tokenizer, labelled):
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


def test_float32_step_is_within_rounding_of_float64(make_trainer, by_hand, tokenizer, tiny_llama, pairs):
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


def test_nll_over_prompt_and_completion(
    make_trainer, gpt2, rows_of_many_lengths, logps, by_hand, largest_difference, tokenizer
):
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


# Unpaired losses


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_unpaired_losses_learn_the_labels(make_trainer, gpt2, labelled, loss_type):
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


# Bad input


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("labelled", "pairs, with chosen and rejected"),
        ("empty", "no rows"),
        ("chat", "chat template"),
        ("identical", "identical"),
    ],
)
def test_data_of_another_kind_is_refused(make_trainer, tiny_llama, tokenizer, labelled, rows, said):
    talk = [{"role": "user", "content": "Hi"}]
    rows = {
        "labelled": labelled, "empty": [],
        "chat": [{"prompt": talk, "chosen": [{"role": "assistant", "content": "a"}],
                  "rejected": [{"role": "assistant", "content": "b"}]}],
        "identical": [{"prompt": "a", "chosen": "b", "rejected": "b"}],
    }[rows]  # fmt: skip
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(DataError, match=said):
            make_trainer(tiny_llama(), rows)
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_an_unpaired_loss_takes_pairs_as_labelled_rows(make_trainer, tiny_llama, pairs, labelled, loss_type):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    trainers = [make_trainer(tiny_llama(), given, loss_type=loss_type) for given in (pairs, rows)]
    assert trainers[0].train_dataset.to_list() == trainers[1].train_dataset.to_list()
    assert "two labelled rows of each pair" in trainers[0].preflight_report()
    with pytest.raises(
        DataError, match="eval: The data set is 'text, plain strings'; rows with prompt, completion and"
    ):
        make_trainer(tiny_llama(), pairs, eval_rows=[{"text": "a"}], loss_type=loss_type)


def test_kto_needs_two_rows_a_batch(make_trainer, tiny_llama, labelled):
    with pytest.raises(DataError, match="one row"):
        make_trainer(tiny_llama(), labelled[:1], loss_type="kto")


def test_prompt_nll_needs_a_model_that_packs(make_trainer, pairs):
    config = tf.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match="use 'completion'"):
        make_trainer(tf.BloomForCausalLM(config), pairs, loss_type="orpo", nll_over="prompt_and_completion")


def test_wpo_step_is_the_step_of_plain_torch(make_trainer, gpt2, rows_of_many_lengths, tokenizer, largest_difference):
    rows, model = rows_of_many_lengths(4), gpt2()
    plain, start = copy.deepcopy(model), copy.deepcopy(model)

    def scores(of, prompt, completion):
        z = of(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logp = z.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
        return logp, (logp - z.exp().square().sum(-1).log()).detach().mean().exp()

    losses = []
    for row in tokenize(rows, tokenizer)[0]:
        (chosen, w_c), (rejected, w_r) = (scores(plain, row["prompt_ids"], ids) for ids in row["completion_ids"])
        with torch.no_grad():
            reference = [scores(start, row["prompt_ids"], ids)[0].sum() for ids in row["completion_ids"]]
        margin = (chosen.sum() - reference[0]) - (rejected.sum() - reference[1])
        losses.append(-logsigmoid(0.1 * margin) * w_c * w_r)
    torch.stack(losses).mean().backward()
    expected = {name: p.detach() - 0.01 * p.grad for name, p in plain.named_parameters()}
    make_trainer(model, rows, use_weighting=True, **LIVE).train()
    assert largest_difference(model, expected) < EXACT
