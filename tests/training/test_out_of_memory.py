"""Memory that runs out: the micro-batch is split, the update stays, and a row that alone does not fit is named."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from fastalign.errors import TrainingError, is_out_of_memory
from fastalign.regularizers import KLToStart, Replay
from fastalign.training.sft import SFTTrainer

ROWS = [{"prompt": f"row {i}", "completion": "abc" * (1 + i % 3)} for i in range(12)]
TEXT = [{"text": "The river rises in the hills."}]


class _Limited(torch.autograd.Function):
    """The identity. Its backward pass fails where there are more tokens than the limit."""

    @staticmethod
    def forward(ctx, values, limit):
        ctx.limit = limit
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        if grad.shape[:-1].numel() > ctx.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return grad, None


def limit_memory(model, tokens, where):
    """Lets passes of more tokens fail: before the first layer, or on the way back below the last layer."""
    layers = model.get_decoder().layers if hasattr(model, "get_decoder") else model.model.layers

    def before(module, args, kwargs):
        if args[0].shape[:-1].numel() > tokens:
            raise MemoryError

    def after(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        limited = _Limited.apply(hidden, tokens)
        return (limited, *output[1:]) if isinstance(output, tuple) else limited

    if where == "forward":
        layers[0].register_forward_pre_hook(before, with_kwargs=True)
    else:
        layers[0].register_forward_hook(after)


def trained(make_trainer, model, rows, *args, **options):
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **options}
    trainer = make_trainer(model, rows, *args, **options)
    trainer.train()
    return trainer


def off(a, b):
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_update_and_the_metrics_stay_the_same(make_trainer, tiny_llama, caplog, where):
    plain = trained(make_trainer, tiny_llama(), ROWS, SFTTrainer)
    model = tiny_llama()
    limit_memory(model, 40, where)
    split = trained(make_trainer, model, ROWS, SFTTrainer)
    assert split.most_tokens is not None and "computed in parts" in caplog.text
    assert off(plain, split) < 1e-6
    for a, b in zip(plain.state.log_history[:2], split.state.log_history[:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["lengths/chosen"] == b["lengths/chosen"]
    assert plain.tokens_seen == split.tokens_seen


def test_terms_and_references_are_split_alike(make_trainer, tiny_llama, pairs):
    def options():
        return {
            "regularizers": [KLToStart(0.1), Replay(TEXT, 0.3)], "precompute_ref_log_probs": False,
            "peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), "learning_rate": 1e-2,
        }  # fmt: skip

    plain = trained(make_trainer, tiny_llama(), pairs, **options())
    model = tiny_llama()
    limit_memory(model, 250, "backward")
    split = trained(make_trainer, model, pairs, **options())
    assert split.most_tokens is not None
    assert off(plain, split) < 1e-6
    assert plain.terms[1].state["replay"].tolist() == split.terms[1].state["replay"].tolist()


def test_a_row_that_alone_does_not_fit_is_named(make_trainer, tiny_llama):
    model = tiny_llama()
    limit_memory(model, 40, "forward")
    rows = [*ROWS[:7], {"prompt": "the long one", "completion": "x" * 60}]
    with pytest.raises(TrainingError, match=r"one row of 7\d tokens, the one with the prompt 'the long one'"):
        trained(make_trainer, model, rows, SFTTrainer)


@pytest.mark.parametrize("loss", ["kto", "aot"])
def test_a_loss_that_compares_rows_is_not_split(make_trainer, tiny_llama, pairs, labelled, loss):
    model = tiny_llama()
    limit_memory(model, 60, "backward")
    with pytest.raises(TrainingError, match=r"because the loss compares its rows: lower per_device_train_batch_size"):
        trained(make_trainer, model, labelled if loss == "kto" else pairs, loss_type=loss)


def test_only_what_says_that_memory_ran_out_is_caught():
    cpu = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    assert all(map(is_out_of_memory, [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError(cpu)]))
    assert not any(map(is_out_of_memory, [RuntimeError("shapes differ"), ValueError("out of memory")]))


def limit_every_forward(model, tokens):
    """Lets every forward pass of more tokens fail, without and with gradients."""
    limit_memory(model, tokens, "forward")
    return model


def test_an_evaluation_is_computed_in_parts(make_trainer, tiny_llama, caplog):
    options = {"per_device_eval_batch_size": 6}
    plain = make_trainer(tiny_llama(), ROWS, SFTTrainer, eval_rows=ROWS, **options).evaluate()
    trainer = make_trainer(limit_every_forward(tiny_llama(), 40), ROWS, SFTTrainer, eval_rows=ROWS, **options)
    split = trainer.evaluate()
    assert "Evaluation: memory ran out" in caplog.text
    assert split["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert split["eval_lengths/chosen"] == plain["eval_lengths/chosen"]
    limit_every_forward(trainer.model, 4)
    with pytest.raises(TrainingError, match=r"Evaluation: memory ran out on one row of .* tokens, .* prompt 'row"):
        trainer.evaluate()


def test_the_reference_pass_is_computed_in_parts(make_trainer, tiny_llama, pairs, tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 1}
    found = []
    for name, limit in (("whole", 10_000), ("split", 100)):
        cache = {"ref_cache_dir": str(tmp_path / name)}
        model = tiny_llama()
        limit_every_forward(model, limit)
        trainer = make_trainer(model, pairs, **options, **cache)
        found.append(trainer.train_dataset["ref_logprobs"][:])
    for whole, split in zip(*found, strict=True):
        for a, b in zip(whole, split, strict=True):
            assert a == pytest.approx(b, abs=1e-5)
    with pytest.raises(TrainingError, match=r"Reference log-probs: memory ran out on one row of .* tokens"):
        make_trainer(limit_every_forward(tiny_llama(), 40), pairs, ref_cache_dir=str(tmp_path / "none"), **options)
