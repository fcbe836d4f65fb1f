"""fisher_diagonal against the plain loop: autograd on one sequence after another, its squares summed."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.fisher import diagonal as module
from fastalign.fisher import output_layer
from fastalign.fisher.diagonal import fisher_diagonal
from fastalign.fisher.storage import Fisher

# Prompts that share tokens with their completions and with each other; 0 is the models' padding token.
ROWS = [
    {"prompt_ids": [5, 6, 0, 5], "completion_ids": [[7, 5, 9, 2]]},
    {"prompt_ids": [8], "completion_ids": [[8, 8, 3, 11, 12, 2], [4, 2]]},
    {"prompt_ids": [], "completion_ids": [[5, 9, 14, 2]]},
    {"prompt_ids": [21, 22, 23], "completion_ids": [[24, 25, 26, 2]], "completion_mask": [[1, 0, 1, 1]]},
    {"prompt_ids": [3], "completion_ids": [[2]]},
]
SEQUENCES = [
    (row["prompt_ids"], completion, (row.get("completion_mask") or [[1] * len(c) for c in row["completion_ids"]])[i])
    for row in ROWS
    for i, completion in enumerate(row["completion_ids"])
]


@pytest.fixture(scope="module")
def tiny_gpt2():
    """Conv1D, LayerNorm, biases, learned positions, tied."""

    def make(dtype=torch.float64):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
            model = GPT2LMHeadModel(config).to(dtype)
            for name, p in model.named_parameters():
                if name.endswith("bias") or "ln_" in name:
                    p.data += 0.3 * torch.randn(p.shape, dtype=dtype)
            return model

    return make


def nll(model, prompt, completion, mask):
    """Summed over the scored tokens, by the model's ordinary forward."""
    ids = torch.tensor([[*prompt, *completion]])
    logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    picked = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
    scored = torch.tensor([0] * len(prompt) + list(mask), dtype=torch.bool)[1:]
    return -picked[scored].sum()


def loop(model, sequences=SEQUENCES):
    """Mean over sequences of the squared gradient, one backward pass each."""
    model.eval()
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for sequence in sequences:
        grads = torch.autograd.grad(nll(model, *sequence), parameters, allow_unused=True)
        for sum_, grad in zip(total, grads, strict=True):
            if grad is not None:
                sum_.add_(grad.double() ** 2)
    return {name: sum_ / len(sequences) for name, sum_ in zip(names, total, strict=True)}


def assert_equal(fisher, expected, rtol):
    """Relative to the largest entry of each parameter's."""
    assert fisher.keys() == expected.keys()
    for name, exact in expected.items():
        assert exact.abs().max() > 0, f"{name} has no gradient: this tests nothing"
        error = (fisher[name].double() - exact).abs().max() / exact.abs().max()
        assert error <= rtol, f"{name} is off by {error:.2e}"


def with_lora(model, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **options))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.3)
        return model


def bloom(dtype):
    """A model that takes no packed rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BloomForCausalLM(
            BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3, pad_token_id=0)
        ).to(dtype)


def build(kind, tiny_llama, tiny_gpt2, dtype=torch.float64):
    if kind == "padded":
        return bloom(dtype)
    if kind == "gpt2":
        return tiny_gpt2(dtype)
    if kind in ("tied", "untied"):
        return tiny_llama(tied=kind == "tied", dtype=dtype)
    targets = ["q_proj", "down_proj", "lm_head"] if kind == "lora on the head" else "all-linear"
    return with_lora(tiny_llama(tied=False, dtype=dtype), target_modules=targets)


KINDS = ["tied", "untied", "gpt2", "padded", "lora", "lora on the head"]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_loop_over_single_sequences(kind, tiny_llama, tiny_gpt2, monkeypatch):
    monkeypatch.setattr(output_layer, "VOCAB_TILE", 50)  # several, the last one smaller
    monkeypatch.setattr(module, "VOCAB_TILE", 50)
    model = build(kind, tiny_llama, tiny_gpt2)
    expected = loop(model)
    for tokens_per_batch in (1, 16, 1000):
        fisher = fisher_diagonal(model, ROWS, tokens_per_batch=tokens_per_batch)
        assert fisher.samples == len(SEQUENCES)
        assert_equal(fisher, expected, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_within_1e_5_of_the_float64_loop(kind, tiny_llama, tiny_gpt2):
    fisher = fisher_diagonal(build(kind, tiny_llama, tiny_gpt2, torch.float32), ROWS)
    assert {values.dtype for values in fisher.values()} == {torch.float32}
    assert_equal(fisher, loop(build(kind, tiny_llama, tiny_gpt2, torch.float32).double()), 1e-5)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_bfloat16_is_as_near_as_the_loop_in_bfloat16(kind, tiny_llama, tiny_gpt2):
    """Summed in float32: the error is that of the model's own gradients."""
    model = build(kind, tiny_llama, tiny_gpt2, torch.bfloat16)
    fisher, plain, exact = fisher_diagonal(model, ROWS), loop(model), loop(model.double())
    assert {values.dtype for values in fisher.values()} == {torch.float32}
    for name, truth in exact.items():
        budget = 2 * ((plain[name] - truth).abs().max() + torch.finfo(torch.bfloat16).eps * truth.abs().max())
        assert (fisher[name] - truth).abs().max() <= budget, name


def test_soft_caps_scales_and_norms_over_heads():
    from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0, query_pre_attn_scalar=8)),
        Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True)),
    ):
        model.double()  # whose norms compute in float32 all the same
        assert_equal(fisher_diagonal(model, ROWS), loop(model), 1e-6)


def test_only_what_is_trainable(tiny_llama):
    """And the model is left as it was found."""
    model = tiny_llama(dtype=torch.float64).train()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    fisher = fisher_diagonal(model, ROWS)
    assert_equal(fisher, loop(model), 1e-11)
    assert all("layers.1" in name for name in fisher)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    model.train()
    fisher_diagonal(model, ROWS)
    assert model.training


def test_batch_is_the_square_of_the_mean_gradient(tiny_llama):
    model = tiny_llama(dtype=torch.float64)
    model.eval()
    names, parameters = zip(*model.named_parameters(), strict=True)
    mean = sum(nll(model, *sequence) for sequence in SEQUENCES) / len(SEQUENCES)
    expected = {n: g**2 for n, g in zip(names, torch.autograd.grad(mean, parameters), strict=True)}
    fisher = fisher_diagonal(model, ROWS, estimator="batch", tokens_per_batch=1000)
    assert fisher.samples == 1
    assert_equal(fisher, expected, 1e-11)


def test_per_token_squares_each_position(tiny_llama):
    """A single sequence's positions: in the linear layers g x' squared, summed; both roles of a tied weight added."""
    model = tiny_llama(dtype=torch.float64).eval()
    prompt, completion, mask = SEQUENCES[0]
    layer, seen = model.model.layers[1].mlp.up_proj, {}

    def watch(module, inputs, output):
        seen["x"] = inputs[0].detach()[0]
        output.register_hook(lambda grad: seen.update(g=grad[0]))

    hook = layer.register_forward_hook(watch)
    nll(model, prompt, completion, mask).backward()
    hook.remove()
    expected = (seen["g"] ** 2).T @ seen["x"] ** 2 / len(completion)
    row = {"prompt_ids": prompt, "completion_ids": [completion]}
    fisher = fisher_diagonal(model, [row], per="token")
    assert fisher.samples == len(completion)
    torch.testing.assert_close(fisher["model.layers.1.mlp.up_proj.weight"], expected, rtol=1e-11, atol=0)

    one = {"prompt_ids": [7], "completion_ids": [[9]]}  # one token: per token and per sequence are the same
    for name, values in fisher_diagonal(model, [one], per="token").items():
        torch.testing.assert_close(values, fisher_diagonal(model, [one])[name], rtol=1e-10, atol=1e-300)


def test_sampled_targets_come_from_the_model(tiny_llama):
    """Of many draws at one position: the mean square of (p - onehot) h is p (1 - p) h^2, whatever the data's token."""
    model = tiny_llama(tied=False, dtype=torch.float64).requires_grad_(False).eval()
    model.lm_head.weight.requires_grad_(True)
    rows = [{"prompt_ids": [5, 6], "completion_ids": [[2]]}] * 4000
    fisher = fisher_diagonal(model, rows, estimator="sampled", seed=3)["lm_head.weight"]
    out = model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)
    p, h = out.logits[0, -1].softmax(-1), out.hidden_states[-1][0, -1]
    variance = p * (1 - p)
    expected = variance.unsqueeze(1) * h**2
    # The share of draws of a token is off by less than five of its standard deviations.
    budget = 5 * (variance / 4000).sqrt().unsqueeze(1) * h**2
    assert ((fisher - expected).abs() <= budget + 1e-12).all()
    again = fisher_diagonal(model, rows[:50], estimator="sampled", seed=3)["lm_head.weight"]
    assert torch.equal(again, fisher_diagonal(model, rows[:50], estimator="sampled", seed=3)["lm_head.weight"])
    assert not torch.equal(again, fisher_diagonal(model, rows[:50], estimator="sampled", seed=4)["lm_head.weight"])


def test_rows_are_tokenised(tiny_llama, tokenizer):
    model = tiny_llama()
    rows = [{"prompt": "Name a colour.", "completion": "Red"}]
    ids = {"prompt_ids": tokenizer("Name a colour.").input_ids, "completion_ids": [[*tokenizer("Red").input_ids, 2]]}
    fisher, expected = fisher_diagonal(model, rows, tokenizer=tokenizer), fisher_diagonal(model, [ids])
    assert all(torch.equal(fisher[name], values) for name, values in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_added_up_in_8_bits(kind, tiny_llama, tiny_gpt2, tmp_path):
    """Matrices are; none of their entries is off by more than its roundings make it, and all together by little."""
    roundings = len(SEQUENCES) if kind == "padded" else 3  # padded sequences are a batch each
    model = build(kind, tiny_llama, tiny_gpt2, torch.float32)
    exact, fisher = fisher_diagonal(model, ROWS), fisher_diagonal(model, ROWS, bits=8)
    assert fisher.keys() == exact.keys() and fisher.samples == exact.samples
    for name, values in exact.items():
        stored = fisher.stored[name]
        if values.dim() == 1:
            torch.testing.assert_close(stored, values)
            continue
        assert stored.codes.dtype == torch.uint8 and stored.scale.shape == (values.shape[0], 1)
        large = values > values.amax(1, keepdim=True) / 2**16
        off = fisher[name][large] / values[large] - 1
        assert 0.001 < off.std() < 0.05 and off.abs().max() < roundings * 0.07, name
        torch.testing.assert_close(fisher[name].sum(), values.sum(), rtol=0.05, atol=0)
    again = fisher_diagonal(model, ROWS, bits=8)
    assert all(torch.equal(again[name], values) for name, values in fisher.items())
    fisher.save(tmp_path / "f", bits=8)
    found = Fisher.load(tmp_path / "f")
    assert all(torch.equal(found[name], values) for name, values in fisher.items())


class Scaler(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.by = torch.nn.Parameter(torch.ones(32))

    def forward(self, x):
        return x * self.by


def test_bad_input_is_named(tiny_llama):
    model = tiny_llama()
    with pytest.raises(DataError, match="holds no rows"):
        fisher_diagonal(model, [])
    with pytest.raises(DataError, match="No token of the data is scored"):
        fisher_diagonal(model, [{"prompt_ids": [], "completion_ids": [[2]]}])
    with pytest.raises(ConfigError, match="estimator is 'true' and per is 'sequence'"):
        fisher_diagonal(model, ROWS, estimator="true")
    with pytest.raises(ConfigError, match="per is 'token', but estimator='batch' squares the gradient of a batch"):
        fisher_diagonal(model, ROWS, estimator="batch", per="token")
    with pytest.raises(ConfigError, match="bits is 16"):
        fisher_diagonal(model, ROWS, bits=16)
    with pytest.raises(ConfigError, match="pass the model's tokenizer"):
        fisher_diagonal(model, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ModelError, match="No parameter of the model requires a gradient"):
        fisher_diagonal(tiny_llama().requires_grad_(False), ROWS)
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(Scaler())
    model.model.layers[0].mlp.act_fn[0].by.data = torch.ones(48)
    with pytest.raises(ModelError, match=r"of 1 parameters \(model.layers.0.mlp.act_fn.0.by, ...\) is not known"):
        fisher_diagonal(model, ROWS)
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = model.model.layers[1].mlp.up_proj
    with pytest.raises(ModelError, match=r"runs more than once a pass"):
        fisher_diagonal(model, ROWS)
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"is shared by several layers"):
        fisher_diagonal(model, ROWS)
