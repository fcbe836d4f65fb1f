"""Regularisers against plain torch in float64: the stock model on separate sequences, penalties written out, SGD."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.regularizers.ewc import EWC, L2SP
from fastalign.regularizers.kl import KLToStart
from fastalign.training.sft import SFTTrainer

# In float64 rounding reaches 1e-12 of the largest parameter, and any error of a formula is far above this.
EXACT = 1e-9
LIVE = {"precompute_ref_log_probs": False}
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


def squared_distance(fisher):
    def penalty(model, start, *_):
        then = dict(start.named_parameters())
        return 5.0 * sum(
            ((1.0 if fisher is None else fisher[name].double()) * (p - then[name].detach()) ** 2).sum()
            for name, p in model.named_parameters()
        )

    return penalty


CASES = {
    "l2_sp": (lambda fisher: L2SP(10.0), lambda fisher: squared_distance(None)),
    "ewc": (lambda fisher: EWC(fisher, 10.0), squared_distance),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_plain_torch(
    make_trainer, tokenizer, text_rows, name, gpt2, random_fisher, sft_by_hand, largest_difference
):
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
def test_adapters_are_held_by_the_weight_they_merge_to(
    make_trainer, text_rows, with_fisher, trained_start, gpt2, random_fisher
):
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


def test_nothing_is_added_before_the_first_update(make_trainer, text_rows, gpt2, random_fisher):
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


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_penalties_are_added_once_beside_losses_of_labelled_rows(
    make_trainer, labelled, loss_type, gpt2, random_fisher
):
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


# Bad input


@pytest.mark.parametrize(
    ("regularizer", "error", "said"),
    [
        (lambda fisher: L2SP(-1.0), ConfigError, "strength of L2SP is -1.0; it must be a number above 0"),
        (lambda fisher: L2SP(math.nan), ConfigError, "strength of L2SP is nan"),
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
def test_bad_input_is_one_sentence_before_training(
    make_trainer, text_rows, regularizer, error, said, gpt2, random_fisher
):
    model = gpt2()
    with pytest.raises(error) as raised:
        make_trainer(model, text_rows, SFTTrainer, regularizers=[regularizer(random_fisher(model))])
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_information_of_an_adapters_factors_is_told_what_is_wanted(make_trainer, text_rows, gpt2):
    """EWC holds the weight they merge to."""
    adapted = get_peft_model(gpt2(), LoraConfig(**LORA))
    fisher = {name: torch.ones_like(p) for name, p in adapted.named_parameters() if p.requires_grad}
    with pytest.raises(ModelError, match=r"lacks 4 of the 4 .*c_attn\.weight.*for this model without adapters"):
        make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[EWC(fisher, 1.0)], peft_config=LoraConfig(**LORA))
