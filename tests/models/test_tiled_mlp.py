"""MLPs in tiles of tokens: the same results, and less kept for the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastalign.data.packing import lay_out
from fastalign.errors import ModelError
from fastalign.models.scoring import prepare
from fastalign.models.tiled_mlp import tile_mlps

EXAMPLES = [{"prompt_ids": [5, 6, 7, 8, 9], "completion_ids": [[8, 9, 4, 3], [10, 11, 12]]}]


def step(model, layout):
    """The loss, its gradients, and the bytes that autograd keeps."""
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = -model(packed=lay_out(EXAMPLES, layout, pad_token_id=0)).logprobs.mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}, sum(kept.values())


def test_results_are_equal_and_less_is_kept(tiny_llama):
    plain = tiny_llama()
    tiled = copy.deepcopy(plain)
    layouts = [prepare(model) for model in (plain, tiled)]
    tile_mlps(tiled, 5)
    tile_mlps(tiled, 5)  # again: changes nothing
    (loss, grads, kept), (tiled_loss, tiled_grads, tiled_kept) = step(plain, layouts[0]), step(tiled, layouts[1])
    assert tiled_loss == pytest.approx(loss, abs=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(tiled_grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)
    inner = plain.config.num_hidden_layers * 12 * 3 * plain.config.intermediate_size * 4  # 12 tokens
    assert kept - tiled_kept > 0.9 * inner
    tile_mlps(tiled, None)
    assert step(tiled, layouts[1])[2] > 0.9 * kept


def test_without_gradients_and_without_tokens(tiny_llama):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 7, model.config.hidden_size)
    expected = mlp(x)
    tile_mlps(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)
        assert mlp(x[:, :0]).shape == (2, 0, model.config.hidden_size)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ModelError, match="mlp_tile is 4, but Sequential has no MLP"):
        tile_mlps(nn.Sequential(nn.Linear(2, 2)), 4)
