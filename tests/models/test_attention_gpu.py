"""What the variable-length kernels are given: which key each one is, and the gradient of laying them out."""

from __future__ import annotations

import pytest
import torch

from fastalign.data.segments import Segment, gathered_keys
from fastalign.models import attention_gpu

# Two groups, of three completions and of one, then a completion without a prompt.
SEGMENTS = [Segment(5, 0, 0), Segment(3, 2, 0), Segment(1, 2, 0), Segment(4, 0, 3), Segment(2, 3, 3), Segment(1, 0, 5)]


def test_the_gradient_of_keys_is_that_of_indexing():
    layout = gathered_keys(SEGMENTS)
    inputs = [torch.randn(16, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    upstream = [torch.randn(len(layout.key_index), 2, 3, dtype=torch.float64) for _ in range(2)]
    ours, plain = attention_gpu._Keys.apply(*inputs, layout), [x[layout.key_index] for x in inputs]
    assert all(map(torch.equal, ours, plain))
    grads, expected = (torch.autograd.grad(out, inputs, upstream) for out in (ours, plain))
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def found(monkeypatch):
    """`_torch_varlen`, without what it remembers, on a torch that was built with its kernel."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    return attention_gpu._torch_varlen.__wrapped__


def test_torchs_kernel_is_asked_for_grouped_keys(found):
    assert found().keywords == {"enable_gqa": True}


def test_torchs_kernel_is_left_alone_where_it_was_not_built_or_is_rocms(found, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        assert found() is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert found() is None


@pytest.mark.parametrize("name", ["torch", "flash-attn"])
def test_without_a_prefix_nothing_is_gathered(name, monkeypatch):
    def kernel(q, k, v, *sizes, **options):
        told.append((k.data_ptr(), v.data_ptr()))
        return q

    told = []
    monkeypatch.setattr(attention_gpu, "_torch_varlen", lambda: kernel)
    monkeypatch.setattr(attention_gpu, "_flash_attn", lambda: kernel)
    layout = gathered_keys([Segment(5, 0, 0), Segment(3, 0, 1)])
    assert layout.key_index.tolist() == list(range(8)) and not layout.repeats
    query, key, value = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)
    attention_gpu.attend(name, query, key, value, layout, window=None, dropout=0.0, scaling=0.5, softcap=None)
    assert told == [(key.data_ptr(), value.data_ptr())]


def test_no_kernel_for_what_it_cannot_take(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_gpu, "_flash_attn", lambda: None)
    monkeypatch.setattr(attention_gpu, "_torch_varlen", lambda: print)

    def chosen(dtype=torch.bfloat16, width=64, value_width=None, dropout=0.0, softcap=None, sinks=None, device="cuda"):
        query, value = (torch.empty(1, 4, 3, w, dtype=dtype, device=device) for w in (width, value_width or width))
        return attention_gpu.kernel(query, value, dropout, softcap, sinks)

    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert chosen() == "torch"
        assert (
            chosen(dtype=torch.float32) is chosen(device="cpu") is chosen(width=320) is chosen(value_width=32) is None
        )
        assert chosen(sinks=torch.empty(4)) is None
        for options in ({"dropout": 0.1}, {"softcap": 30.0}, {"width": 12}):
            assert chosen(**options) is None
        monkeypatch.setattr(attention_gpu, "_flash_attn", lambda: print)
        for options in ({}, {"dropout": 0.1}, {"softcap": 30.0}, {"width": 12}):
            assert chosen(**options) == "flash-attn"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert chosen() is None


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", ["torch", "flash-attn"])
def test_what_the_kernels_are_told(name, window, monkeypatch):
    told = {}

    def kernel(q, k, v, cu_q, cu_k, longest_q, longest_k, **options):
        told.update(options, shapes=[tuple(t.shape) for t in (q, k, v)], sizes=(longest_q, longest_k))
        return q

    monkeypatch.setattr(attention_gpu, "_torch_varlen", lambda: kernel)
    monkeypatch.setattr(attention_gpu, "_flash_attn", lambda: kernel)
    layout = gathered_keys(SEGMENTS)
    query, key = torch.randn(1, 4, 16, 8), torch.randn(1, 2, 16, 8)
    out = attention_gpu.attend(name, query, key, key, layout, window=window, dropout=0.0, scaling=0.5, softcap=None)
    assert torch.equal(out, query.transpose(1, 2))
    assert told["shapes"] == [(16, 4, 8), (23, 2, 8), (23, 2, 8)] and told["sizes"] == (5, 5)
    causal = {"torch": (-1, 0), "flash-attn": (-1, -1)}[name]
    assert told["window_size"] == (causal if window is None else (3, 0))
    assert told["scale" if name == "torch" else "softmax_scale"] == 0.5
    assert name == "torch" or (told["causal"] and (told["dropout_p"], told["softcap"]) == (0.0, 0.0))
    if name == "flash-attn":  # which alone takes them
        attention_gpu.attend(name, query, key, key, layout, window=window, dropout=0.25, scaling=0.5, softcap=30.0)
        assert (told["dropout_p"], told["softcap"]) == (0.25, 30.0)
