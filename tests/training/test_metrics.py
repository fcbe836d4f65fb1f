"""What is logged: names and values of metrics, and that they stay on the device until then."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.data.batch import Batch
from fastalign.data.packing import pack
from fastalign.data.tokenization import tokenize
from fastalign.models.attention import packed_attention
from fastalign.training.metrics import MetricSums, Throughput
from fastalign.training.sft import SFTTrainer

LIVE = {"precompute_ref_log_probs": False}


def test_metrics_have_the_names_of_the_field_and_the_right_values(make_trainer, gpt2, logps, tokenizer, pairs):
    model = gpt2()
    trainer = make_trainer(model, pairs, eval_rows=pairs[:3], beta=0.5, max_steps=2, learning_rate=1e-3, **LIVE)
    start = copy.deepcopy(model)
    trainer.train()
    metrics = trainer.evaluate()
    rows = tokenize(pairs[:3], tokenizer)[0]
    with torch.no_grad():
        now, then = ([[x.sum() for x in logps(m, row)] for row in rows] for m in (model, start))
    rewards = 0.5 * (torch.tensor(now) - torch.tensor(then))  # (3, 2)
    expected = {
        "eval_rewards/chosen": rewards[:, 0].mean(),
        "eval_rewards/rejected": rewards[:, 1].mean(),
        "eval_rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "eval_rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).double().mean(),
        "eval_logps/chosen": torch.tensor(now)[:, 0].mean(),
        "eval_logps/rejected": torch.tensor(now)[:, 1].mean(),
        "eval_loss": -logsigmoid(rewards[:, 0] - rewards[:, 1]).mean(),
        "eval_lengths/chosen": sum(len(r["completion_ids"][0]) for r in rows) / 3,
        "eval_lengths/rejected": sum(len(r["completion_ids"][1]) for r in rows) / 3,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-6), name
    assert abs(metrics["eval_rewards/margins"]) > 1e-3
    assert metrics["eval_kl"] > 0
    logged, second = trainer.state.log_history[:2]
    lengths = [len(row["completion_ids"][0]) for row in tokenize(pairs, tokenizer)[0]]
    # each line is of its own step: the two steps of four rows make up the eight
    assert (logged["lengths/chosen"] + second["lengths/chosen"]) / 2 == sum(lengths) / 8
    assert {"loss", "grad_norm", "learning_rate", "nll_loss", "tokens_per_second", "memory_gb"} <= logged.keys()
    assert {"rewards/margins", "logps/accuracies", "lengths/chosen"} <= logged.keys()


def test_kl_to_the_start_is_exact(make_trainer, gpt2, tokenizer, pairs):
    model = gpt2()
    trainer = make_trainer(model, pairs, eval_rows=pairs[:2], max_steps=1, **LIVE)
    start = copy.deepcopy(model)
    assert trainer.evaluate()["eval_kl"] == 0.0
    trainer.train()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in tokenize(pairs[:2], tokenizer)[0]:
            for completion in row["completion_ids"]:
                ids = torch.tensor([row["prompt_ids"] + completion])
                p, q = (
                    m(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1) for m in (model, start)
                )
                total, count = total + (p.exp() * (p - q)).sum().item(), count + len(completion)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(total / count, rel=1e-6)


def test_eval_loss_and_metrics_do_not_depend_on_the_batch_size(make_trainer, gpt2, rows_of_many_lengths):
    rows, model = rows_of_many_lengths(5), gpt2()
    found = []
    for size in (1, 3, 5):
        trainer = make_trainer(model, rows, eval_rows=rows, loss_type="ipo", per_device_eval_batch_size=size, **LIVE)
        found.append({k: v for k, v in trainer.evaluate().items() if "time" not in k and "per_second" not in k})
    sft = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows]
    for size in (1, 3, 5):
        trainer = make_trainer(model, sft, SFTTrainer, eval_rows=sft, per_device_eval_batch_size=size)
        found.append({"eval_loss": trainer.evaluate()["eval_loss"]})
    for other in (found[1], found[2]):
        assert other == pytest.approx(found[0], rel=1e-6)
    assert found[4] == pytest.approx(found[3], rel=1e-6)
    assert found[5] == pytest.approx(found[3], rel=1e-6)


class _CountScalarReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_metrics_stay_on_the_device_between_logs(make_trainer, tiny_llama, pairs):
    """Reading a number off the device waits for it: beyond what the model's body does, a micro-batch must not."""
    trainer = make_trainer(tiny_llama(), pairs, loss_type=["dpo", "sft"])
    trainer.guard.at_once = False  # as on a GPU
    trainer.state.global_step = 1  # at the first step policy and reference are compared, which does read
    inputs = next(iter(trainer.get_train_dataloader()))
    packed = inputs["batch"].packed
    trainer.model.train()
    with _CountScalarReads() as body, packed_attention(packed.layout):
        trainer.model.model(**packed.model_inputs(), use_cache=False)
    with _CountScalarReads() as whole:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert whole.count == body.count
    assert trainer.sums.sums["train"]["rewards/margins"].shape == (2,)


def test_tokens_that_fill_a_row_up_are_not_counted(make_trainer, gpt2, pairs):
    seen = []
    for multiple in (1, 64):
        trainer = make_trainer(gpt2(dtype=torch.float32), pairs, max_steps=1)
        trainer.data_collator.multiple = multiple
        trainer.train()
        seen.append(trainer.tokens_seen)
    assert seen[0] == seen[1] > 0


def test_means_are_of_all_micro_batches_since_the_last_line():
    sums = MetricSums()
    for values in ([1.0, 2.0, 3.0], [10.0]):
        sums.add("train", {"x": (torch.tensor(values).sum(), torch.tensor(len(values)))})
    sums.add("train", {"nothing": (torch.tensor(0.0), torch.tensor(0))})
    sums.add("eval", {"x": (torch.tensor(5.0), torch.tensor(2))})
    assert sums.take_means("train") == {"x": 4.0}  # not 6, the mean of the means 2 and 10
    assert sums.take_means("train") == {}
    assert sums.take_means("eval", prefix="eval_") == {"eval_x": 2.5}


def test_margins_of_labelled_rows_are_the_difference_of_the_means():
    sums, two = MetricSums(), torch.tensor(2)
    sums.add("train", {"rewards/chosen": (torch.tensor(3.0), two), "rewards/rejected": (torch.tensor(1.0), two)})
    assert sums.take_means("train")["rewards/margins"] == 1.0
    margins = {"rewards/margins": (torch.tensor(8.0), two)}  # of pairs, which are known one by one
    sums.add("train", {"rewards/chosen": (torch.tensor(3.0), two), "rewards/rejected": (torch.tensor(1.0), two)})
    sums.add("train", margins)
    assert sums.take_means("train")["rewards/margins"] == 4.0


def test_throughput_starts_anew_with_each_line(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fastalign.training.metrics.time.monotonic", lambda: now[0])
    throughput, batch = Throughput(), Batch(pack([{"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5]]}]))
    throughput.add(batch)
    throughput.add(batch)
    now[0] += 2.0
    assert throughput.per_second() == 5.0
    throughput.add(batch)
    now[0] += 1.0
    assert throughput.per_second() == 5.0 and throughput.total == 15
