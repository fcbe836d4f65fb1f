"""`model(packed=batch)` against the stock model's own logits."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from fastalign.data.packing import lay_out, pack, pad_to_multiple
from fastalign.errors import ModelError
from fastalign.models.norms import speed_up_body
from fastalign.models.scoring import prepare, restore

EXAMPLES = [
    {"prompt_ids": [11, 12, 13], "completion_ids": [[14, 15, 2], [16, 2]]},
    {"prompt_ids": [21], "completion_ids": [[22, 23, 24, 2], [25, 2]]},
]
TOKENS = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
SIZES = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EPS = torch.finfo(torch.float32).eps


def llama(**options):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **options))


HEADS = {
    "plain": (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES)),
    "bias": (tf.PhiForCausalLM, tf.PhiConfig(**SIZES)),
    "soft cap": (
        tf.Gemma2ForCausalLM,
        tf.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
    ),
    "logit scale": (tf.CohereForCausalLM, tf.CohereConfig(**SIZES, logit_scale=0.25)),
    "logits scaling": (tf.GraniteForCausalLM, tf.GraniteConfig(**SIZES, logits_scaling=4.0)),
}


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def stock(model, dtype=torch.float32) -> torch.Tensor:
    """(S,) log-probs from the model's own forward over separate sequences."""
    values = []
    for example in EXAMPLES:
        for completion in example["completion_ids"]:
            ids, start = example["prompt_ids"] + completion, len(example["prompt_ids"])
            logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].to(dtype).log_softmax(-1)
            values += [logprobs[t - 1, ids[t]] for t in range(start, len(ids))]
    return torch.stack(values)


@torch.no_grad()
def budget(model, expected: torch.Tensor) -> float:
    """Twice what float32 may lose in the stock forward itself, and one rounding.

    The most it loses of eight models whose weights differ in the last bits: one alone may be lucky. Against float64, of
    norms too.
    """
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(8):
        other = copy.deepcopy(model)
        for p in other.parameters():
            p.mul_(1 + EPS * torch.randint(-1, 2, p.shape, generator=generator))
        wide = copy.deepcopy(other)
        speed_up_body(wide)  # a stock RMSNorm is in float32 whatever it is given
        losses.append((stock(other) - stock(wide.double(), torch.float64)).abs().max().item())
    return 2 * (max(losses) + EPS * expected.abs().max().item())


@torch.no_grad()
def assert_scores_are_the_models_own(model, batch=None):
    model = model.eval()
    expected = stock(model)
    allowed = budget(model, expected)
    layout = prepare(model)
    scores = model(packed=batch or lay_out(EXAMPLES, layout, pad_token_id=0))
    assert (scores.logprobs - expected).abs().max().item() <= allowed
    # Called as ever, it answers as ever, up to the order and number of roundings.
    assert (stock(model) - expected).abs().max().item() <= allowed


@pytest.mark.parametrize("kind", HEADS)
def test_logprobs_are_those_of_the_models_own_logits(kind):
    model_class, config = HEADS[kind]
    model = model_class(config)
    if kind == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    assert_scores_are_the_models_own(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "use_rslora": True, "r": 4, "lora_alpha": 3},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "rslora", "modules_to_save"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_on_the_output_layer(lora, tied):
    model = get_peft_model(llama(tie_word_embeddings=tied), LoraConfig(**lora, init_lora_weights=False))
    if "modules_to_save" in lora:
        with torch.no_grad():
            model.get_output_embeddings().modules_to_save["default"].weight.mul_(-0.5)
    with model.disable_adapter():
        bare = stock(model.eval())
    assert (stock(model) - bare).abs().max() > 0.05
    assert_scores_are_the_models_own(model)
    with model.disable_adapter(), torch.no_grad():
        scores = model(packed=pack(EXAMPLES))
        assert torch.allclose(scores.logprobs, bare, rtol=0, atol=budget(model, bare))
    if "modules_to_save" not in lora:
        model.merge_adapter()
        with torch.no_grad():
            scores, merged = model(packed=pack(EXAMPLES)), stock(model)
        assert (scores.logprobs - merged).abs().max().item() <= budget(model, merged)


def test_gradients_reach_an_adapter_on_the_output_layer():
    model = get_peft_model(llama(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
    stock(model).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    prepare(model)
    model(packed=pack(EXAMPLES)).logprobs.sum().backward()
    assert len(expected) == 2
    for name, grad in expected.items():
        found = dict(model.named_parameters())[name].grad
        # sums over 10 tokens and 67 or 32 numbers each
        assert torch.allclose(found, grad, rtol=0, atol=1000 * EPS * grad.abs().max().item()), name


class DoubledLogits(tf.LlamaForCausalLM):
    """An output layer that no option in the configuration tells of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_unknown_output_layer_is_refused():
    with pytest.raises(ModelError, match="DoubledLogits turns hidden states into logits in a way"):
        prepare(DoubledLogits(tf.LlamaConfig(**SIZES)))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_model_whose_weights_are_not_finite_is_called_that(value):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float(value)
    with pytest.raises(ModelError, match=f"holds (?i:{value}) in model.layers.1.mlp.up_proj.weight"):
        prepare(model)


def test_models_without_output_layer_are_refused():
    with pytest.raises(ModelError, match="load it as a causal language model"):
        prepare(tf.LlamaModel(tf.LlamaConfig(**SIZES)))
    with pytest.raises(ModelError, match="PreTrainedModel"):
        prepare(torch.nn.Linear(2, 2))


def test_preparing_twice_changes_nothing():
    model = llama().eval()
    first = prepare(model), model.forward
    assert (prepare(model), model.forward) == first
    assert prepare(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) == "shared"


def test_entropy_and_hidden_come_when_asked_for():
    model = llama().eval()
    prepare(model)
    batch = pack(EXAMPLES)
    with torch.no_grad():
        plain, scores = model(packed=batch), model(packed=batch, entropy=True, keep_hidden=True)
        logprobs = (scores.hidden @ model.lm_head.weight.T).log_softmax(-1)
    assert plain.entropy is None and plain.hidden is None
    assert torch.equal(plain.logprobs, scores.logprobs)
    assert scores.hidden.shape == (len(batch.targets), 32)
    expected = -(logprobs.exp() * logprobs).sum(-1)
    assert torch.allclose(scores.entropy, expected, rtol=1e-5)


def test_prompts_and_padding_do_not_reach_the_output_layer():
    model = llama().eval()
    layout = prepare(model)
    assert layout == "shared"
    scored = sum(len(c) for example in EXAMPLES for c in example["completion_ids"])
    for how in ("shared", "packed", "padded"):
        batch = lay_out(EXAMPLES, how, pad_token_id=0)
        assert model(packed=batch, keep_hidden=True).hidden.shape[0] == scored


@pytest.mark.parametrize("how", ["packed", "padded"])
def test_other_layouts_give_the_same(how):
    model = llama()
    assert_scores_are_the_models_own(model, lay_out(EXAMPLES, how, pad_token_id=0))


def test_what_fills_a_row_up_changes_no_log_prob():
    """Nor a gradient, of tokens that no score depends on."""
    model = llama()
    prepare(model)
    found = []
    for batch in (pack(EXAMPLES), pad_to_multiple(pack(EXAMPLES), 64)):
        scores = model(packed=batch)
        found.append([scores.logprobs, *torch.autograd.grad(scores.logprobs.sum(), list(model.parameters()))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def state_of(model):
    """Everything that the modules of a model and its configuration hold, and how the modules are called."""
    return {
        name: {key: id(value) for key, value in vars(module).items()} | {"is": id(module)}
        for name, module in model.named_modules()
    }, {key: str(value) for key, value in vars(model.config).items()}


def own_names(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("kind", ["plain", "adapter", "forward of somebody else"])
def test_restore_leaves_no_trace(kind):
    model = llama().eval()
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    if kind == "forward of somebody else":
        model.forward = functools.partial(type(model).forward, model)
    names, state, parameters = own_names(model), state_of(model), dict(model.named_parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        restore(model)  # of a model that nobody has prepared: nothing happens
        for _ in range(2):
            layout = prepare(model)
            prepare(model)
            assert own_names(model) != names
            restore(model)
            assert own_names(model) == names
            assert state_of(model) == state
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    with pytest.raises(ValueError, match="input_ids"):
        model(packed=lay_out(EXAMPLES, layout, pad_token_id=0))


def test_hooks_inside_a_block_fire_before_and_after_restore():
    """The fused block does not call `act_fn`, so a block with a hook there runs its own code."""
    model, fired = llama().eval(), []
    layout = prepare(model)
    batch = lay_out(EXAMPLES, layout, pad_token_id=0)
    expected = model(packed=batch).logprobs
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, inputs, output: fired.append(module))
    found = model(packed=batch).logprobs
    assert len(fired) == 2
    torch.testing.assert_close(found, expected)
    restore(model)
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(fired) == 4


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_a_prepared_model_survives_copying(way, adapter):
    model = llama().eval()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    layout = prepare(model)
    copied = COPIES[way](model)
    packed = lay_out(EXAMPLES, layout, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(copied(packed=packed).logprobs, model(packed=packed).logprobs)
        for parameter in copied.parameters():
            parameter.mul_(2)  # the copy computes with its own weights
        assert not torch.equal(copied(packed=packed).logprobs, model(packed=packed).logprobs)
        restore(copied)
        assert "forward" not in vars(copied)
        assert model(packed=packed).logprobs is not None, "the original stays prepared"


@pytest.mark.slow
def test_a_prepared_model_reaches_a_spawned_process(tmp_path):
    """A process that has imported nothing of fastalign reads the file, and computes the same bits."""
    model = llama().eval()
    layout = prepare(model)
    batch = lay_out(EXAMPLES, layout, pad_token_id=0)
    torch.save((model, batch), tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "model, batch = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "torch.save(model(packed=batch).logprobs.detach(), sys.argv[1] + '/logprobs.pt')\n"
    )
    threads = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", script, str(tmp_path), threads], check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "logprobs.pt"), model(packed=batch).logprobs)
