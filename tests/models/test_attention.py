"""Packed rows against separate, unpadded passes of the stock model: hidden states, log-probs and gradients."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.masking_utils import create_causal_mask

from fastalign import reference
from fastalign.data.packing import pack, pad
from fastalign.errors import ModelError
from fastalign.models import attention
from fastalign.models.attention import NAME, AttentionOptions, PackedMask, explicit_attention, packed_attention
from fastalign.models.layout import prepare_model

WINDOW = 4
TOKENS = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {**TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
LLAMA = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS = {
    "llama": tf.LlamaConfig(**LLAMA),
    "qwen2": tf.Qwen2Config(**LLAMA),
    "qwen3": tf.Qwen3Config(**LLAMA, head_dim=16),
    "mistral": tf.MistralConfig(**LLAMA, sliding_window=WINDOW),
    "gemma2": tf.Gemma2Config(**GEMMA, attn_logit_softcapping=0.5),
    "gemma3": tf.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "phi3": tf.Phi3Config(**LLAMA),
    "gpt2": tf.GPT2Config(**GPT2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "gpt_neox": tf.GPTNeoXConfig(**SIZES, num_attention_heads=4),
    "gpt_oss": tf.GptOssConfig(
        **LLAMA,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}
FALLBACKS = {
    "gpt_neo": (
        tf.GPTNeoConfig(
            **TOKENS,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            window_size=WINDOW,
            max_position_embeddings=128,
            attention_types=[[["global", "local"], 1]],
        ),
        "packed",
    ),
    "bloom": (tf.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4), "padded"),
    "mamba": (tf.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4), "padded"),
    "lfm2": (tf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]), "padded"),
    "llama4": (
        tf.Llama4TextConfig(
            **LLAMA, head_dim=8, attention_chunk_size=WINDOW, num_local_experts=2, intermediate_size_mlp=32
        ),
        "packed",
    ),
}
# Completions of one prompt: 1, 2, 3 and 5; an empty prompt; single tokens; prompts longer and shorter than the window.
SHAPES = [(7, (9,)), (6, (5, 8)), (0, (6, 3)), (2, (1, 4, 1)), (9, (2, 1, 6, 3, 5))]


def make_examples(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(3, TOKENS["vocab_size"], (n,), generator=generator).tolist()

    return [{"prompt_ids": tokens(p), "completion_ids": [tokens(c) for c in cs]} for p, cs in shapes]


class DoubleRMSNorm(nn.Module):
    """The models' own norms compute in float32 whatever the weights are."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.offset = norm.weight, 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def make_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).eval()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    for parent in list(model.modules()) if dtype == torch.float64 else ():
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, DoubleRMSNorm(child))
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from the initial state, where every token is nearly its own embedding and attention nearly uniform.
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def get_body(model):
    return model.model if model.base_model is model else model.base_model  # Llama 4 names no base model


def score(model, hidden, targets):
    """Log-probs and the gradients of a weighted sum of them, so that every token counts differently."""
    logprobs = model.get_output_embeddings()(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    model.zero_grad()
    (logprobs * torch.cos(torch.arange(len(logprobs), dtype=logprobs.dtype))).sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"hidden": hidden.detach(), "logprobs": logprobs.detach(), **gradients}


def separate(model, examples):
    hidden, targets = [], []
    for example in examples:
        prompt = example["prompt_ids"]
        for completion in example["completion_ids"]:
            row = torch.tensor([prompt + completion])
            states = get_body(model)(input_ids=row, use_cache=False)[0][0]
            first = max(len(prompt), 1)
            hidden.append(states[first - 1 : -1])
            targets.append(row[0, first:])
    return score(model, torch.cat(hidden), torch.cat(targets))


def batched(model, batch):
    with packed_attention(batch.layout):
        hidden = get_body(model)(**batch.model_inputs(), use_cache=False)[0]
    return score(model, hidden.flatten(0, 1)[batch.score_index], batch.targets)


def assert_equal(got, expected, dtype):
    """Within one rounding for each addend of a dot product (width 32 to 48) in each matrix product of two layers."""
    for name, value in expected.items():
        bound = 512 * torch.finfo(dtype).eps * value.abs().max().item()
        error = (got[name] - value).abs().max().item()
        assert error <= bound, f"{name}: error {error:.2e} exceeds {bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_separate_passes_of_the_stock_model(name, dtype):
    stock, examples = make_model(CONFIGS[name], dtype), make_examples()
    model = copy.deepcopy(stock)
    assert prepare_model(model) == "shared"
    assert model.config._attn_implementation == NAME != stock.config._attn_implementation
    results = [batched(model, b) for b in (pack(examples), pack(examples, share_prompts=False), pad(examples, 0))]
    expected = separate(stock, examples)
    for result in results:
        # Gemma 2's own attention takes its softmax in float32.
        assert_equal(result, expected, torch.float32 if name == "gemma2" else dtype)
    expected = separate(model, examples)
    for result in results:
        assert_equal(result, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing_recomputes_with_the_layout(name, use_reentrant, dtype):
    model, examples = make_model(CONFIGS[name], dtype), make_examples()
    expected = separate(model, examples)
    prepare_model(model)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    dtype = torch.float32 if name == "gemma2" else dtype
    assert_equal(batched(model, pack(examples)), expected, dtype)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_group_sizes_with_unscored_tokens(k):
    model = make_model(CONFIGS["mistral"], torch.float64)
    examples = make_examples([(5, range(1, k + 1)), (3, [4] * k)])
    full = batched(model, pad(examples, 0))
    for example in examples:
        example["completion_mask"] = [[i % 2 for i in range(len(c))] for c in example["completion_ids"]]
    batch = pack(examples)
    keep = torch.cat([torch.tensor(m) for e in examples for m in e["completion_mask"]]).bool()
    prepare_model(model)
    got = batched(model, batch)
    for name in ("hidden", "logprobs"):
        assert_equal({name: got[name]}, {name: full[name][keep]}, torch.float64)


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallbacks_are_said_once_and_give_the_same_results(name, caplog):
    config, layout = FALLBACKS[name]
    model, examples = make_model(config), make_examples([s for s in SHAPES if s[0]])
    stock = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, logger="fastalign"):
        assert prepare_model(model) == layout
    [record] = [r for r in caplog.records if r.name == "fastalign"]
    assert record.getMessage().startswith(f"{type(model).__name__} cannot share prompts (")
    assert model.config._attn_implementation == stock
    batch = pad(examples, 0) if layout == "padded" else pack(examples, share_prompts=False)
    assert_equal(batched(model, batch), separate(model, examples), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", *FALLBACKS])
def test_low_precision_does_not_change_the_verdict(name, dtype):
    config, layout = FALLBACKS.get(name) or (CONFIGS[name], "shared")
    torch.manual_seed(0)
    assert prepare_model(tf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype)) == layout


def test_autocast_decides_in_what_attention_is_computed():
    layout = pack(make_examples()).layout
    packed = PackedMask(layout, None)
    query, key, value = (torch.randn(1, heads, packed.length, 8) for heads in (4, 2, 2))
    options = AttentionOptions(0.0, 0.3, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention._packed_attention(query, key, value, packed, options)
    halves = (t.bfloat16() for t in (query, key, value))
    assert torch.equal(out, attention._packed_attention(*halves, packed, options)) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss"])
def test_generation_is_unchanged(name, padding):
    model = make_model(CONFIGS[name])
    ids = torch.arange(5, 17).view(2, 6)
    ids[0, :padding] = 0
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**inputs, **options)
    prepare_model(model)
    after = model.generate(**inputs, **options)
    assert after.sequences.tolist() == before.sequences.tolist()
    assert_equal(dict(enumerate(after.logits)), dict(enumerate(before.logits)), torch.float32)


def test_layers_share_one_mask_per_window():
    model = make_model(CONFIGS["gemma3"])
    prepare_model(model)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    batch = pack(make_examples())
    for _ in range(2):
        with packed_attention(batch.layout):
            model(**batch.model_inputs(), use_cache=False)
    assert [mask.window for mask in seen] == [WINDOW, None, WINDOW, None]
    masks = seen[0].masks(torch.device("cpu"))
    assert masks is seen[0].masks(torch.device("cpu"))


@pytest.mark.parametrize("window", [None, 1, 3, 5, 16])
def test_varlen_arguments_describe_the_same_attention(window):
    """What flash-attn is told, carried out segment by segment with its bottom-right aligned causal mask."""
    packed = PackedMask(pack(make_examples()).layout, window)
    keys = packed.varlen(torch.device("cpu"))
    key_index, cu_q, cu_k, max_q, max_k = (
        keys.key_index, keys.cu_seqlens_q, keys.cu_seqlens_k, keys.longest_q, keys.longest_k
    )  # fmt: skip
    masks = packed.masks(torch.device("cpu"))
    starts = [0]
    for segment in packed.segments:
        starts.append(starts[-1] + segment.length)
    assert cu_q.tolist() == starts and len(masks) == len(cu_k) - 1
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max() and cu_k[-1] == len(key_index)
    visible = torch.zeros(packed.length, packed.length, dtype=torch.bool)
    for i in range(len(masks)):
        q, k = torch.arange(starts[i], starts[i + 1]), key_index[cu_k[i] : cu_k[i + 1]]
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (distance >= 0) & (distance < (window or packed.length))
        assert torch.equal(seen, torch.ones_like(seen).tril() if masks[i] is None else masks[i])
        visible[q[:, None], k] = seen
    assert torch.equal(visible, visible_by_definition(window))
    assert torch.equal(reference.seen_keys(packed.table, window), visible)


def visible_by_definition(window):
    batch = pack(make_examples())
    owner = torch.empty(batch.input_ids.shape[1], 2, dtype=torch.int64)  # (group, completion or -1)
    for g, (prompt, completions) in enumerate(batch.layout):
        owner[slice(*prompt)] = torch.tensor([g, -1])
        for c, span in enumerate(completions):
            owner[slice(*span)] = torch.tensor([g, c])
    group, part, position = owner[:, 0], owner[:, 1], batch.position_ids[0]
    distance = position[:, None] - position
    related = (group[:, None] == group) & ((part == -1) | (part[:, None] == part))
    return related & (distance >= 0) & (distance < (window or len(group)))


def test_attention_dropout_is_respected():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.ones(1, 2, 3, 8)
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_dropout = 0.5
    model = make_model(config)
    prepare_model(model)
    batch = pack(make_examples())

    def run():
        with packed_attention(batch.layout), torch.no_grad():
            return model.base_model(**batch.model_inputs(), use_cache=False)[0]

    assert torch.equal(run(), run())
    model.train()
    assert not torch.equal(run(), run())
    # Dropped probabilities are scaled up: with values of one, rows sum to multiples of 1 / (1 - p) parts.
    kept = explicit_attention(query, key, value, None, AttentionOptions(0.5, 1.0, 5.0, None))[0, :, 0, 0]
    assert set(kept.tolist()) <= {0.0, 2.0}


def test_what_a_layout_cannot_express_is_named(caplog):
    prepare_model(make_model(FALLBACKS["llama4"][0]))
    assert "The model attends in chunks" in caplog.text
    model, batch = make_model(CONFIGS["llama"]), pack(make_examples())
    prepare_model(model)
    embeddings = torch.zeros(*batch.input_ids.shape, 1)
    with packed_attention(batch.layout):
        with pytest.raises(ModelError, match="adds a rule"):
            create_causal_mask(model.config, embeddings, None, None, and_mask_function=lambda *_: torch.tensor(True))
        model.config.is_causal = False
        with pytest.raises(ModelError, match="non-causal"):
            model(**batch.model_inputs(), use_cache=False)
    with pytest.raises(ModelError, match="passes 'position_bias'"):
        query = torch.zeros(1, 4, batch.input_ids.shape[1], 8)
        attend = tf.AttentionInterface()[NAME]
        attend(model, query, query, query, PackedMask(batch.layout, None), position_bias=torch.zeros(1))


def test_rows_that_do_not_fit_the_layout_are_refused():
    model = make_model(CONFIGS["llama"])
    prepare_model(model)
    batch, other = pack(make_examples()), pack(make_examples()[:2])
    with packed_attention(batch.layout):
        with pytest.raises(ModelError, match=r"layout describes one row of \d+ tokens.*1 row\(s\) of 35 tokens"):
            model(**other.model_inputs(), use_cache=False)
        with pytest.raises(ModelError, match="no padding"):
            zeros = torch.zeros_like(batch.input_ids)
            model(**batch.model_inputs(), attention_mask=zeros, use_cache=False)
    with torch.no_grad(), packed_attention(None):
        model(**other.model_inputs(), use_cache=False)
