"""In a training step the host never waits for a GPU, except where a line is logged. Counted on the CPU.

Attention takes the path of a GPU here: the index tensors of the collator, and a kernel for segments of different
lengths, which `VarlenAttention` stands for. So what is counted is what a GPU would be told to do.
"""

from __future__ import annotations

import collections

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.models import attention_gpu

# Each of them reads a value on the host, or makes a result whose size depends on values.
WAITS = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select", "is_nonzero", "equal", "item")
# What `torch.tensor(a list or number)` ends with: on a GPU a copy from the host, for which the host waits.
FROM_PYTHON = "lift_fresh"


class Watch(TorchDispatchMode):
    """Counts what waits, by the name of the op."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.ops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.ops += 1
        if name in WAITS or name == FROM_PYTHON:
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))


class WatchSteps(tf.TrainerCallback):
    """Watches from the first micro-batch of every step to the end of the step, the optimiser's step included."""

    def __init__(self):
        self.watches = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.watches.append(Watch())
        self.watches[-1].__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.watches[-1].__exit__(None, None, None)


class VarlenAttention(torch.autograd.Function):
    """What the kernels of a GPU compute, segment by segment: (T, heads, D), (K, kv_heads, D), (K, kv_heads, D)."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, scale):
        with torch.utils._python_dispatch._disable_current_modes(), torch.enable_grad():
            ctx.inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            ctx.out = VarlenAttention.by_segment(*ctx.inputs, cu_q.tolist(), cu_k.tolist(), scale)
        return ctx.out.detach()

    @staticmethod
    def by_segment(q, k, v, cu_q, cu_k, scale):
        groups, out = q.shape[1] // k.shape[1], []
        for i in range(len(cu_q) - 1):
            queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            kk, vv = (t[keys].repeat_interleave(groups, 1).transpose(0, 1) for t in (k, v))
            scores = q[queries].transpose(0, 1) @ kk.transpose(1, 2) * scale
            rows, columns = scores.shape[1:]
            seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
            out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ vv).transpose(0, 1))
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        with torch.utils._python_dispatch._disable_current_modes():
            return *torch.autograd.grad(ctx.out, ctx.inputs, grad), None, None, None


@pytest.fixture
def gpu_attention(monkeypatch):
    """Attention by the path of a GPU, on the CPU."""

    def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, *, scale, window_size):
        assert window_size == (-1, 0)
        return VarlenAttention.apply(q, k, v, cu_q, cu_k, scale)

    monkeypatch.setattr(attention_gpu, "kernel", lambda *args: "torch")
    monkeypatch.setattr(attention_gpu, "_torch_varlen", lambda: varlen)


def train(make_trainer, model, rows, **options):
    """(watches of each step, parameters) of three steps of two micro-batches."""
    watch = WatchSteps()
    trainer = make_trainer(
        model, rows, callbacks=[watch], max_steps=3, logging_steps=100, optim="adamw_torch_fused", max_grad_norm=1.0,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, **options,
    )  # fmt: skip
    trainer.guard.at_once = False  # as on a GPU
    trainer.data_collator.on_gpu, trainer.data_collator.multiple = True, 64
    trainer.train()
    return watch.watches, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("loss", [["dpo", "sft"], "kto", "bco", "aot"], ids=["dpo and sft", "kto", "bco", "aot"])
def test_no_step_waits(make_trainer, tiny_llama, pairs, gpu_attention, loss):
    watches, _ = train(make_trainer, tiny_llama(), pairs, loss_type=loss)
    assert len(watches) == 3 and all(watch.ops > 100 for watch in watches)
    # The first step compares policy and reference, which does read. Later steps must not.
    assert [dict(watch.waits) for watch in watches[1:]] == [{}, {}]
