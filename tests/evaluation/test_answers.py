import copy

import pytest
import torch

from fastalign.evaluation.answers import Answers, answer, comparison
from fastalign.models.scoring import prepare

PROMPTS = [[40, 41, 42, 43, 44], [50], [60, 61], [70, 71, 72]]
BUDGET = 6


def greedy(model, prompt) -> list[int]:
    """The most likely tokens one by one, by the model's own forward without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(BUDGET):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def stopping(tiny_llama, tokenizer):
    """A model, and a tokenizer whose EOS is a token that the model gives as the third of its first answer."""
    model = tiny_llama(tied=False).eval()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(greedy(model, PROMPTS[0])[2])
    return model, tokenizer


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("prepared", [False, True])
def test_answers_are_greedy_whatever_shares_their_batch(stopping, batch_size, prepared):
    model, tokenizer = stopping
    stop, expected = tokenizer.eos_token_id, []
    for prompt in PROMPTS:
        tokens = greedy(model, prompt)
        expected.append(tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)
    if prepared:
        prepare(model)
    found = answer(model, tokenizer, PROMPTS, max_new_tokens=BUDGET, batch_size=batch_size)
    assert found.lengths == [len(tokens) for tokens in expected]
    assert found.finished == [stop in tokens for tokens in expected]
    assert found.texts == [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in expected]
    assert found.finished[0] and found.lengths[0] <= 3
    assert not all(found.finished)


def test_model_is_left_in_its_mode_and_random_numbers_alone(stopping):
    model, tokenizer = stopping
    model.train()
    state = torch.get_rng_state()
    answer(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_means_of_answers():
    answers = Answers(["a", "b"], [4, 7], [True, False])
    assert answers.mean_length == 5.5
    assert answers.finished_share == 0.5


def test_comparison_holds_what_the_run_has():
    before = {"eval_loss": 0.69, "eval_rewards/accuracies": 0.25, "eval_rewards/margins": -0.5}
    after = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.5}
    old, new = Answers([""], [8], [False]), Answers([""], [4], [True])
    rows = comparison(before, after, (old, new))
    assert [(row["before"], row["after"], row["unit"], row["better"]) for row in rows] == [
        (0.69, 0.5, "", "down"),
        (25.0, 75.0, "%", "up"),
        (-0.5, 1.5, "", "up"),
        (8.0, 4.0, "tokens", None),
        (0.0, 100.0, "%", "up"),
    ]
    assert all(isinstance(row["metric"], str) and row["metric"] for row in rows)
    before["eval_rewards/margins"] = 0.0  # at the start no answer is preferred, which is not an accuracy of 0
    assert [row["before"] for row in comparison(before, after, None)] == [0.69, None, 0.0]
    assert [row["metric"] for row in comparison({"eval_loss": 2.0}, {"eval_loss": 1.0}, None)] == ["Held-out loss"]
