"""Layer-wise tuning: what is trained when, how fast, and that what is frozen costs nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig

from fastalign.errors import ConfigError, ModelError
from fastalign.regularizers.layerwise import LayerWise
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LIVE = {"precompute_ref_log_probs": False}


@pytest.fixture(scope="module")
def text_rows():
    return [{"prompt": "ab"[: 1 + i % 2] * (1 + i), "completion": "cde" * (1 + i % 3) + "f" * i} for i in range(8)]


class Changed(tf.TrainerCallback):
    """What each step has changed: layer numbers from the bottom, "norm", "embed", "head"."""

    def __init__(self):
        self.steps, self.before = [], None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        names = [n for n, p in model.named_parameters() if not torch.equal(p, self.before[n])]
        self.steps.append(sorted({_part(name) for name in names}))


def _part(name: str) -> str:
    if "layers." in name:
        return name.split("layers.")[1].split(".")[0]
    return next(part for part in ("embed", "norm", "head") if part in name)


@pytest.mark.parametrize(
    ("tied", "options", "expected"),
    [
        (True, {"stages": [1, 2]}, [["1", "norm"]] * 2 + [["0", "1", "norm"]] * 2),
        (False, {"stages": 2}, [["1", "head", "norm"]] * 2 + [["0", "1", "head", "norm"]] * 2),
        (True, {"stages": [1, 2], "begins": [0, 0.75]}, [["1", "norm"]] * 3 + [["0", "1", "norm"]]),
        (True, {"stages": [1, 2], "embeddings": True}, [["1", "norm"]] * 2 + [["0", "1", "embed", "norm"]] * 2),
        (True, {"stages": [1]}, [["1", "norm"]] * 4),
    ],
)
def test_layers_are_unfrozen_from_the_top_in_stages(make_trainer, tiny_llama, text_rows, tied, options, expected):
    changed = Changed()
    trainer = make_trainer(
        tiny_llama(tied=tied), text_rows, SFTTrainer, regularizers=[LayerWise(**options)], max_steps=4,
        callbacks=[changed], optim="adamw_torch", weight_decay=0.1,
    )  # fmt: skip
    trainer.train()
    # the callback runs before the freezer, so that it sees each step as it was
    assert changed.steps == expected
    layers = [sum(part.isdigit() for part in step) for step in expected]
    assert [line["layers_trained"] for line in trainer.state.log_history if "layers_trained" in line] == layers


def test_every_layer_learns_at_its_own_rate(make_trainer, tiny_llama, text_rows):
    models = []
    for regularizers in ([], [LayerWise([2], decay=0.5, embeddings=True)]):
        models.append(tiny_llama())
        make_trainer(models[-1], text_rows, SFTTrainer, regularizers=regularizers).train()
    start, (plain, ours) = dict(tiny_llama().named_parameters()), (dict(m.named_parameters()) for m in models)
    factors = {"norm": 1.0, "1": 1.0, "0": 0.5, "embed": 0.25}
    for name, value in start.items():
        moved = (plain[name] - value) * factors[_part(name)]
        assert torch.allclose(ours[name] - value, moved, rtol=1e-4, atol=1e-7), name
        assert moved.abs().max() > 1e-5


def test_rates_follow_the_schedule(make_trainer, tiny_llama, text_rows):
    trainer = make_trainer(
        tiny_llama(), text_rows, SFTTrainer, regularizers=[LayerWise(decay=0.5, stages=2)], max_steps=4,
        lr_scheduler_type="linear",
    )  # fmt: skip
    trainer.train()
    assert sorted({group["lr"] / group["initial_lr"] for group in trainer.optimizer.param_groups}) == [0.0]
    assert sorted({group["initial_lr"] for group in trainer.optimizer.param_groups}) == [0.005, 0.01]


def saved_bytes(trainer, batch) -> int:
    """Bytes that the loss's graph holds for the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    held = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.compute_loss(trainer.model, copy.copy(batch)).backward()
    return sum(held.values())


@pytest.mark.parametrize("how", ["full", "lora", "lora, recomputed"])
def test_frozen_layers_have_no_graph_and_no_gradients(make_trainer, tiny_llama, text_rows, how):
    config = LoraConfig(**LORA) if "lora" in how else None
    trainer = make_trainer(
        tiny_llama(), text_rows, SFTTrainer, regularizers=[LayerWise([1, 2])], peft_config=config, max_steps=2,
        activation_checkpointing="recomputed" in how,
    )  # fmt: skip
    layers = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    seen = []

    class Look(tf.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append([any(p.grad is not None for p in layer.parameters()) for layer in layers])

    entered = [[], []]
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _, args, i=i: entered[i].append(args[0].requires_grad))
    trainer.add_callback(Look())
    trainer.train()
    assert seen == [[False, True], [True, True]]
    assert entered[0][0] is entered[1][0] is False  # the first stage: nothing below the top layer is kept
    assert entered[1][-1] is True


def test_frozen_layers_cost_no_memory(make_trainer, tiny_llama, text_rows):
    held = []
    for stages in ([1, 2], [2]):
        trainer = make_trainer(tiny_llama(), text_rows, SFTTrainer, regularizers=[LayerWise(stages)])
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        held.append(saved_bytes(trainer, trainer.data_collator(list(trainer.train_dataset))))
    assert held[0] < 0.65 * held[1]  # one layer of two, and what is above them


@pytest.mark.parametrize("adapter", [False, True])
def test_resumed_run_goes_on_as_if_never_stopped(make_trainer, tiny_llama, pairs, tmp_path, adapter):
    class Stop(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 2

    results = []
    for stops in ((None,), (Stop(), None)):
        for stop in stops:
            trainer = make_trainer(
                tiny_llama(), pairs, PreferenceTrainer, regularizers=[LayerWise([1, 2], [0, 0.75], 0.5)],
                output_dir=str(tmp_path / f"{len(stops)}"), max_steps=4, save_strategy="steps", save_steps=2,
                optim="adamw_torch", per_device_train_batch_size=2, callbacks=[stop] if stop else None,
                peft_config=LoraConfig(**LORA) if adapter else None, **LIVE,
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=stop is None and len(stops) == 2)
        results.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("regularizer", "lora", "error", "said"),
    [
        (LayerWise(0), {}, ConfigError, "stages of LayerWise is 0"),
        (LayerWise([]), {}, ConfigError, "must unfreeze something"),
        (LayerWise([0]), {}, ConfigError, "stages of LayerWise is [0]; give numbers of layers that grow, from 1"),
        (LayerWise([2, 1]), {}, ConfigError, "that grow"),
        (LayerWise([1, 1]), {}, ConfigError, "must unfreeze something"),
        (LayerWise([3]), {}, ConfigError, "the model's 2"),
        (LayerWise([1, 2], [0]), {}, ConfigError, "begins of LayerWise is [0] for 2 stages"),
        (LayerWise([1, 2], [0.1, 0.5]), {}, ConfigError, "begins of LayerWise"),
        (LayerWise([1, 2], [0, 1.0]), {}, ConfigError, "begins of LayerWise"),
        (LayerWise([1, 2]), {**LORA, "layers_to_transform": [0]}, ModelError,
         "Stage 1 of 2 unfreezes nothing: none of layers 1 to 1 of 2, counted from the top"),
        (LayerWise([1, 2]), {**LORA, "layers_to_transform": [1]}, ModelError,
         "Stage 2 of 2 unfreezes nothing: none of layers 2 to 2 of 2, counted from the top"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_training(make_trainer, tiny_llama, text_rows, regularizer, lora, error, said):
    with pytest.raises(error) as raised:
        make_trainer(
            tiny_llama(), text_rows, SFTTrainer, regularizers=[regularizer],
            peft_config=LoraConfig(**lora) if lora else None,
        )  # fmt: skip
    assert said in str(raised.value) and "\n" not in str(raised.value)
