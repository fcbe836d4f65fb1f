"""Regularisers against plain torch in float64: the stock model on separate sequences, penalties written out, SGD."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.reference import logits_divergence
from fastalign.regularizers.distillation import Distillation
from fastalign.regularizers.ewc import EWC, L2SP
from fastalign.regularizers.kl import KLToStart
from fastalign.regularizers.layerwise import LayerWise
from fastalign.regularizers.replay import Replay
from fastalign.training.distillation import DistillationTrainer
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer

# In float64 rounding reaches 1e-12 of the largest parameter, and any error of a formula is far above this.
EXACT = 1e-9
LIVE = {"precompute_ref_log_probs": False}
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


def gpt2() -> tf.GPT2LMHeadModel:
    """A model that computes in float64 throughout, with a tied head."""
    config = tf.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def text_rows():
    return [{"prompt": "ab"[: 1 + i % 2] * (1 + i), "completion": "cde" * (1 + i % 3) + "f" * i} for i in range(8)]


def random_fisher(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}


def completion_logits(model: nn.Module, row: dict) -> Tensor:
    """The logits that predict the completion's tokens, of the stock model."""
    ids, start = row["prompt_ids"] + row["completion_ids"][0], len(row["prompt_ids"])
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]


def sft_by_hand(model, start, rows, penalty, *, steps=3, learning_rate=0.01):
    """Parameters after some steps of SGD on the mean NLL plus `penalty(model, start, logits now, logits then)`."""
    for _ in range(steps):
        logits = torch.cat([completion_logits(model, row) for row in rows])
        with torch.no_grad():
            then = torch.cat([completion_logits(start, row) for row in rows])
        targets = torch.tensor([token for row in rows for token in row["completion_ids"][0]])
        loss = nn.functional.cross_entropy(logits, targets) + penalty(model, start, logits, then)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p -= learning_rate * p.grad
    return {name: p.detach() for name, p in model.named_parameters()}


def largest_difference(model: nn.Module, expected: dict[str, Tensor]) -> float:
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


def squared_distance(fisher):
    def penalty(model, start, *_):
        then = dict(start.named_parameters())
        return 5.0 * sum(
            ((1.0 if fisher is None else fisher[name].double()) * (p - then[name].detach()) ** 2).sum()
            for name, p in model.named_parameters()
        )

    return penalty


def kl_by_hand(divergence, **options):
    return lambda model, start, now, then: 2.0 * logits_divergence(now, then, divergence=divergence, **options).mean()


CASES = {
    "l2_sp": (lambda fisher: L2SP(10.0), lambda fisher: squared_distance(None)),
    "ewc": (lambda fisher: EWC(fisher, 10.0), squared_distance),
    "reverse_kl": (lambda fisher: KLToStart(2.0), lambda fisher: kl_by_hand("reverse_kl")),
    "forward_kl": (lambda fisher: KLToStart(2.0, "forward_kl"), lambda fisher: kl_by_hand("forward_kl")),
    "jsd": (lambda fisher: KLToStart(2.0, "jsd", 0.3), lambda fisher: kl_by_hand("jsd", jsd_beta=0.3)),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_plain_torch(make_trainer, tokenizer, text_rows, name):
    model, rows = gpt2(), text_rows[:4]
    make, by_hand = CASES[name]
    fisher = random_fisher(model)
    tokens = tokenize(rows, tokenizer)[0]
    expected = sft_by_hand(copy.deepcopy(model), gpt2(), tokens, by_hand(fisher))
    without = sft_by_hand(copy.deepcopy(model), gpt2(), tokens, lambda *_: 0.0)
    make_trainer(model, rows, SFTTrainer, regularizers=[make(fisher)], max_steps=3, num_train_epochs=3).train()
    assert largest_difference(model, without) > 1e-5  # so that the next line says something
    assert largest_difference(model, expected) < EXACT


@pytest.mark.parametrize("trained_start", [False, True])
@pytest.mark.parametrize("with_fisher", [False, True])
def test_adapters_are_held_by_the_weight_they_merge_to(make_trainer, text_rows, with_fisher, trained_start):
    model = gpt2()
    fisher = random_fisher(model)
    kept = {n: f for n, f in fisher.items() if n.endswith(("c_attn.weight", "c_fc.weight"))}
    regularizer = EWC(kept, 3.0) if with_fisher else L2SP(3.0)
    trainer = make_trainer(
        model, text_rows, SFTTrainer, regularizers=[regularizer],
        peft_config=LoraConfig(**LORA, init_lora_weights=not trained_start), max_steps=3,
    )  # fmt: skip
    layers = {n: layer for n, layer in trainer.model.named_modules() if hasattr(layer, "lora_A") and layer.lora_A}
    assert len(layers) == 4

    def merged():
        return {n: layer.get_delta_weight("default").detach().double() for n, layer in layers.items()}

    start = merged()
    trainer.train()
    expected = 0.0
    for name, now in merged().items():
        weight = kept[name.removeprefix("base_model.model.") + ".weight"].double() if with_fisher else 1.0
        expected += 1.5 * (weight * (now - start[name]) ** 2).sum().item()
    step = _step_after(trainer)
    value = trainer.terms[0](step)[0]
    # adapters are float32: what eps leaves of products of their two factors
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    value.backward()
    assert all(p.grad is not None for n, p in trainer.model.named_parameters() if "lora_B" in n)


def _step_after(trainer):
    """The first micro-batch of a further step, as terms see it."""
    seen = []
    trainer.terms.append(lambda step: (seen.append(step), (step.loss * 0.0, {}))[1])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer._micro_batches = 0
    trainer.compute_loss(trainer.model, batch)
    trainer.terms.pop()
    return seen[0]


def test_nothing_is_added_before_the_first_update(make_trainer, text_rows):
    model = gpt2()
    terms = [EWC(random_fisher(model), 10.0), L2SP(1.0), KLToStart(1.0)]
    trainer = make_trainer(model, text_rows, SFTTrainer, regularizers=terms, max_steps=2)
    plain = make_trainer(gpt2(), text_rows, SFTTrainer, max_steps=2)
    trainer.train()
    plain.train()
    first, second = trainer.state.log_history[:2]
    assert first["ewc"] == first["l2_sp"] == 0.0
    assert first["kl_to_start"] == pytest.approx(0.0, abs=1e-12)
    assert first["loss"] == plain.state.log_history[0]["loss"]
    assert min(second[name] for name in ("ewc", "l2_sp", "kl_to_start")) > 0
    total = plain.state.log_history[1]["loss"] + sum(second[name] for name in ("ewc", "l2_sp", "kl_to_start"))
    assert second["loss"] == pytest.approx(total, rel=1e-6)  # the first step was the same


@pytest.mark.parametrize("kind", [SFTTrainer, PreferenceTrainer])
def test_update_does_not_depend_on_gradient_accumulation(make_trainer, text_rows, pairs, kind):
    options = LIVE if kind is PreferenceTrainer else {}
    results = []
    for size, accumulated in ((8, 1), (2, 4), (1, 8)):
        model = gpt2()
        terms = [EWC(random_fisher(model), 50.0), L2SP(1.0), KLToStart(2.0)]
        make_trainer(
            model, pairs if kind is PreferenceTrainer else text_rows, kind, regularizers=terms, max_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **options,
        ).train()  # fmt: skip
        results.append(dict(model.named_parameters()))
    assert largest_difference(gpt2(), results[0]) > 1e-4
    for result in results[1:]:
        assert max((result[n] - results[0][n]).abs().max().item() for n in result) < EXACT


@pytest.mark.parametrize("kind", [PreferenceTrainer, DistillationTrainer])
def test_all_combine(make_trainer, text_rows, pairs, kind):
    """Every regulariser at once; still the same for any cut into micro-batches."""
    rows, options = (pairs, LIVE) if kind is PreferenceTrainer else (text_rows, {"teacher": "start", "weight": 0.7})
    text = [{"text": f"Line {i} of a text." + "." * i} for i in range(5)]
    results = []
    for size, accumulated in ((8, 1), (1, 8)):
        model = gpt2()
        everything = [
            EWC(random_fisher(model), 50.0), L2SP(1.0), KLToStart(2.0), Distillation("start", 0.6, 2.0),
            Replay(text, 0.3), LayerWise([1, 2], [0, 0.5], 0.7),
        ]  # fmt: skip
        trainer = make_trainer(
            model, rows, kind, regularizers=everything, max_steps=4, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated, **options,
        )  # fmt: skip
        trainer.train()
        results.append(dict(model.named_parameters()))
        names = {"ewc", "l2_sp", "kl_to_start", "distillation", "replay/nll", "replay/share", "layers_trained"}
        assert names <= trainer.state.log_history[-2].keys()
    assert max((results[0][n] - results[1][n]).abs().max().item() for n in results[0]) < EXACT
    assert largest_difference(gpt2(), results[0]) > 1e-4


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_penalties_are_added_once_beside_losses_of_labelled_rows(make_trainer, labelled, loss_type):
    """Whose shift depends on the cut into micro-batches: the second step with them against that without, cut alike."""
    fisher = random_fisher(gpt2())

    def trained(steps, terms=()):
        model = gpt2()
        make_trainer(
            model, [*labelled, *labelled[:2]], regularizers=terms, max_steps=steps, loss_type=loss_type,
            gradient_accumulation_steps=2, **LIVE,
        ).train()  # fmt: skip
        return {name: p.detach() for name, p in model.named_parameters()}

    start, first, plain = dict(gpt2().named_parameters()), trained(1), trained(2)
    pulls = {name: 0.01 * (50 * fisher[name].double() + 1) * (first[name] - p.detach()) for name, p in start.items()}
    assert max(pull.abs().max() for pull in pulls.values()) > 1e-5
    held = trained(2, [EWC(fisher, 50.0), L2SP(1.0)])
    assert max((plain[name] - pull - held[name]).abs().max() for name, pull in pulls.items()) < EXACT


def test_online_fisher_forgets_the_older_ones():
    old, new = {"w": torch.tensor([4.0, 0.0])}, {"w": torch.tensor([1.0, 2.0])}
    assert EWC([old, new], 1.0, decay=0.5)._fishers()["w"].tolist() == [3.0, 2.0]
    assert EWC([old, new, new], 1.0, decay=0.5)._fishers()["w"].tolist() == [2.5, 3.0]
    assert EWC(new, 1.0)._fishers()["w"].tolist() == [1.0, 2.0]


def test_a_moved_reference_is_not_the_start(make_trainer, pairs):
    """KL is to where training began, though TR-DPO's reference has moved on."""
    trainer = make_trainer(
        gpt2(), pairs, regularizers=[KLToStart(1.0)], max_steps=2, sync_ref_model=True, ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0, **LIVE,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[1]["kl_to_start"] > 1e-6
    start = dict(gpt2().named_parameters())
    kept = zip(trainer.keep_start().parameters, trainer.keep_start().values, strict=True)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    assert all(torch.equal(start[names[id(p)]], value) for p, value in kept)


# Bad input


@pytest.mark.parametrize(
    ("regularizer", "error", "said"),
    [
        (lambda fisher: L2SP(-1.0), ConfigError, "strength of L2SP is -1.0; it must be a number above 0"),
        (lambda fisher: L2SP(math.nan), ConfigError, "strength of L2SP is nan"),
        (lambda fisher: KLToStart(1.0, "reverse"), ConfigError, "did you mean 'reverse_kl'"),
        (lambda fisher: EWC(fisher, 0.0), ConfigError, "strength of EWC is 0.0"),
        (lambda fisher: EWC(fisher, 1.0, decay=2.0), ConfigError, "decay of EWC is 2.0"),
        (lambda fisher: EWC([], 1.0), ConfigError, "empty list"),
        (lambda fisher: EWC("nowhere.safetensors", 1.0), DataError, "nowhere.safetensors is not a file"),
        (lambda fisher: EWC({**fisher, "gone.weight": torch.ones(1)}, 1.0), ModelError,
         "holds 1 parameters that the model does not have (gone.weight"),
        (lambda fisher: EWC(dict(list(fisher.items())[1:]), 1.0), ModelError, "lacks 1 of the"),
        (lambda fisher: EWC({**fisher, "transformer.ln_f.bias": torch.ones(5)}, 1.0), ModelError,
         "transformer.ln_f.bias is (5,), the weight (32,)"),
        (lambda fisher: EWC([fisher, {"a": torch.ones(1)}], 1.0), ModelError, "compute both for the same model"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_training(make_trainer, text_rows, regularizer, error, said):
    model = gpt2()
    with pytest.raises(error) as raised:
        make_trainer(model, text_rows, SFTTrainer, regularizers=[regularizer(random_fisher(model))])
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_information_of_an_adapters_factors_is_told_what_is_wanted(make_trainer, text_rows):
    """EWC holds the weight they merge to."""
    adapted = get_peft_model(gpt2(), LoraConfig(**LORA))
    fisher = {name: torch.ones_like(p) for name, p in adapted.named_parameters() if p.requires_grad}
    with pytest.raises(ModelError, match=r"lacks 4 of the 4 .*c_attn\.weight.*for this model without adapters"):
        make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[EWC(fisher, 1.0)], peft_config=LoraConfig(**LORA))
