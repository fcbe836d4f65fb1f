"""The decode loop against the model's own forward and `generate`, over architectures, adapters and ragged prompts."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from fastalign.models.adapters import lora_layers
from fastalign.rollout.decode import Decoder
from fastalign.rollout.engine import Sampling
from fastalign.rollout.in_process import InProcess
from fastalign.rollout.weights import NotDecodable

PROMPTS = [[40, 41, 42, 43, 44], [50], [60, 61], [70, 71, 72]]
SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip


def make(name: str, **options):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in model.parameters():  # biases and norms that begin at 0 and 1 would hide a mistake
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def with_adapter(model, **options):
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options))
    for _, lora in lora_layers(model):
        lora.b.data.normal_(std=0.1)
    return model.eval()


def own_logprobs(model, prompt, tokens, temperature=1.0):
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def check_answers(model, *, temperature, k=3):
    """Every answer's log-probs are those of the model's own forward."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        groups = Decoder(model).generate(PROMPTS, k, max_new_tokens=7, temperature=temperature, stops=(9,))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == k
        for answer in group:
            own = own_logprobs(model, prompt, answer.tokens, temperature or 1.0)
            torch.testing.assert_close(torch.tensor(answer.logprobs).double(), own, rtol=0, atol=1e-4)
    return groups


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Llama", {"head_dim": 16, "mlp_bias": True, "attention_bias": True}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Mistral", {"sliding_window": None, "head_dim": 8}),
    ],
)
def test_log_probs_are_the_models_own(name, options):
    check_answers(make(name, **options), temperature=1.3)


def test_adapters_are_merged_and_follow_the_model_at_refresh():
    model = with_adapter(make("Llama", tie_word_embeddings=True), modules_to_save=None)
    check_answers(model, temperature=0.7)
    decoder = Decoder(model)
    for _, lora in lora_layers(model):
        lora.a.data.normal_(std=0.2)
    decoder.refresh()
    ((answer,),) = decoder.generate([PROMPTS[0]], 1, max_new_tokens=5, temperature=None, stops=())
    own = own_logprobs(model, PROMPTS[0], answer.tokens)
    torch.testing.assert_close(torch.tensor(answer.logprobs).double(), own, rtol=0, atol=1e-4)


def test_greedy_tokens_are_those_of_generate():
    model = make("Llama")
    groups = Decoder(model).generate(PROMPTS, 2, max_new_tokens=12, temperature=None, stops=(2,))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        own = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=[2],
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert [a.tokens for a in group] == [own, own]


def test_answers_end_at_every_stop_token_and_only_there():
    """An EOS inside the prompt does not end an answer. Groups that have ended are dropped from the computation."""
    model = make("Llama")
    prompts = [[2, 40, 2], [50], [60, 2], [70, 71], [80], [81, 82]]
    long = Decoder(model).generate(prompts, 1, max_new_tokens=10, temperature=None, stops=())
    # Stops for all but one of the prompts come early, so that groups are dropped twice.
    stops = {group[0].tokens[i % 3] for i, group in enumerate(long[:-1])}
    short = Decoder(model).generate(prompts, 1, max_new_tokens=10, temperature=None, stops=tuple(stops))
    for (whole,), (cut,) in zip(long, short, strict=True):
        end = next((n for n, token in enumerate(whole.tokens, 1) if token in stops), 10)
        assert cut.tokens == whole.tokens[:end] and cut.finished == (whole.tokens[end - 1] in stops)
        torch.testing.assert_close(torch.tensor(cut.logprobs), torch.tensor(whole.logprobs[:end]), rtol=0, atol=1e-5)
    assert len({len(cut.tokens) for (cut,) in short}) > 1


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Mistral", {"sliding_window": 4}, "window"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("Gemma2", {"head_dim": 8}, None),
        ("GPTNeoX", {}, None),
    ],
)
def test_other_models_are_generated_by_their_own_code(name, options, reason, tokenizer):
    """The engine gives the same kind of answers, with log-probs by the model's own forward."""
    model = make(name, **options)
    with pytest.raises(NotDecodable, match=reason):
        Decoder(model)
    engine = InProcess(model, tokenizer)
    assert engine.decoder is None and engine.reason
    for rollout in engine.generate(PROMPTS[:2], 2, Sampling(5, 0.8)):
        for tokens, logprobs in zip(rollout.completion_ids, rollout.logprobs, strict=True):
            own = own_logprobs(model, rollout.prompt_ids, tokens, 0.8)
            torch.testing.assert_close(torch.tensor(logprobs).double(), own, rtol=0, atol=1e-4)


def test_a_model_that_computes_something_else_is_found_by_the_comparison():
    """A hook adds to a layer's output: nothing in the configuration tells of it."""
    model = make("Llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output + 0.3)
    with pytest.raises(NotDecodable, match="differ from the loop's"):
        Decoder(model)
