"""Generation: in the order of the prompts, stopped at EOS, drawn from the whole distribution. Greedy completions are
held to the model's own forward in tests/evaluation/test_answers.py.
"""

from __future__ import annotations

import copy

import pytest
import torch

from fastalign.rollout.engine import Sampling
from fastalign.rollout.in_process import InProcess, generate, stop_tokens

PROMPTS = [[40, 41, 42, 43, 44], [50], [60, 61], [70, 71, 72]]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(tied=False)


def test_completions_are_in_the_order_of_the_prompts(model, tokenizer):
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=5, batch_size=4)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(map(tuple, alone))) > 1


def test_a_completion_ends_with_its_first_eos(model, tokenizer):
    stopping = copy.deepcopy(tokenizer)
    long = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    stopping.eos_token = tokenizer.convert_ids_to_tokens(long[0][2])
    stop = stopping.eos_token_id
    short = generate(model, stopping, PROMPTS, max_new_tokens=6, batch_size=4)
    assert short == [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in long]
    assert len(short[0]) <= 3 and max(map(len, short)) == 6


def test_a_tokenizer_without_a_padding_token_will_do(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert generate(model, bare, PROMPTS, max_new_tokens=3) == generate(model, tokenizer, PROMPTS, max_new_tokens=3)


def test_samples_follow_the_whole_distribution_at_their_temperature(model, tokenizer):
    """The model's own generation config would leave only the most likely token."""
    restricted = copy.deepcopy(model)
    restricted.generation_config.top_k, restricted.generation_config.top_p = 1, 0.01
    draws, temperature = 4000, 2.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = generate(
            restricted, tokenizer, [PROMPTS[0]] * draws, max_new_tokens=1, batch_size=draws, temperature=temperature
        )
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = (logits.double() / temperature).softmax(-1)  # (V,)
    shares = torch.bincount(torch.tensor([ids[0] for ids in found]), minlength=len(expected)).double() / draws
    # Each share is off by less than five of its standard deviations (with one draw to spare for the rarest tokens).
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt() + 2 / draws).all()
    assert (shares > 0).sum() > 10


def test_the_models_mode_comes_back(model, tokenizer):
    model.train()
    generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1)
    assert model.training


def test_every_token_that_the_generation_config_lists_ends_a_completion(tiny_llama, tokenizer):
    """Chat models end a turn with another token than the tokenizer's EOS."""
    model = tiny_llama(tied=False)
    long = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    other = long[0][2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    assert stop_tokens(model, tokenizer) == [tokenizer.eos_token_id, other]
    short = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    assert short == [ids[: ids.index(other) + 1] if other in ids else ids for ids in long]


def test_an_engine_has_the_weights_of_its_last_sync(tiny_llama, tokenizer):
    model = tiny_llama(tied=False)
    engine = InProcess(model, tokenizer, rows=4)
    before = [r.completion_ids for r in engine.generate(PROMPTS, 2, Sampling(5, None))]
    other = tiny_llama(tied=False, seed=5)
    model.load_state_dict(other.state_dict())
    engine.close()
    engine.sync(model)
    after = [r.completion_ids for r in engine.generate(PROMPTS, 2, Sampling(5, None))]
    assert engine.reason is None and before != after
    assert after == [[ids, ids] for ids in generate(other, tokenizer, PROMPTS, max_new_tokens=5)]


def test_the_same_state_of_the_generator_gives_the_same_answers(model, tokenizer):
    engine = InProcess(model, tokenizer)
    with torch.random.fork_rng():
        found = [(torch.manual_seed(4), engine.generate(PROMPTS, 3, Sampling(6)))[1] for _ in range(2)]
        other = engine.generate(PROMPTS, 3, Sampling(6))
    assert found[0] == found[1] != other
    assert all(len(set(map(tuple, r.completion_ids))) > 1 for r in found[0])
