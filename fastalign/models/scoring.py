"""Token log-probabilities of a packed batch, computed inside the model's own forward.

`prepare(model)` teaches a model one more way to be called: `model(packed=batch)` runs the body over the batch, picks
the hidden states that predict a scored token, and takes them straight to log-probabilities. Called any other way the
model does what it did before. It has to be the model's own forward, since wrappers (DDP, FSDP, peft, accelerate)
hook into that call and synchronise what went through it.
"""

from __future__ import annotations

import types
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.data.packing import PackedBatch, lay_out
from fastalign.errors import ModelError
from fastalign.models.adapters import causal_lm
from fastalign.models.attention import packed_attention
from fastalign.models.head import output_head
from fastalign.models.layout import prepare_model
from fastalign.models.linear import speed_up_linear
from fastalign.models.modes import evaluation_mode
from fastalign.models.norms import speed_up_body
from fastalign.ops import linear_logprobs
from fastalign.reference import linear_logits


class Scores(NamedTuple):
    """What `model(packed=batch)` returns."""

    logprobs: Tensor | None  # (S,) float32, of `batch.targets`; None without those
    entropy: Tensor | None  # (S,) float32
    hidden: Tensor | None  # (S, H), what the output layer was given


def prepare(model: nn.Module) -> str:
    """Lets `model(packed=batch)` return `Scores`; returns how its batches must be laid out.

    model: a transformers causal language model, or a PeftModel around one, with its weights loaded; changed in place.
    Returns "shared", "packed" or "padded" (see `attention.prepare_model`). ModelError for models that are not causal
    language models, or whose output layer gives other log-probabilities than fastalign's reading of it.
    """
    speed_up_linear(model)
    speed_up_body(model)
    layout = prepare_model(model)
    base = causal_lm(model)
    if not hasattr(base, "_fastalign_forward"):
        base._fastalign_forward = base.forward
        base.forward = types.MethodType(_forward, base)
    _check_head(base, layout)
    return layout


def _forward(
    self, *args, packed: PackedBatch | None = None, entropy=False, keep_hidden=False, memory_budget=None, **kw
):
    if packed is None:
        return self._fastalign_forward(*args, **kw)
    with packed_attention(packed.layout):
        hidden = self.base_model(**packed.model_inputs(), use_cache=False)[0]
    hidden = hidden.flatten(0, 1)[packed.score_index]  # (S, H)
    if packed.targets is None:
        return Scores(None, None, hidden)
    head = output_head(self)
    options = {"ignore_index": None, "memory_budget": memory_budget} | head.options()  # each of them has a target
    out = linear_logprobs(hidden, head.weight, packed.targets, entropy=entropy, **options)
    logprobs, entropies = out if entropy else (out, None)
    return Scores(logprobs, entropies, hidden if keep_hidden else None)


@torch.no_grad()
def _check_head(model: PreTrainedModel, layout: str) -> None:
    """Compare with the logits of the model's own forward, so that no unknown output layer goes unnoticed."""
    vocab = model.get_input_embeddings().weight.shape[0]
    example = {"prompt_ids": [vocab // 3], "completion_ids": [[vocab // 3 + 1, vocab // 2, vocab // 5]]}
    batch = lay_out([example], layout, pad_token_id=0).to(model.device)
    with evaluation_mode(model):
        # Models scale or cap between body and logits in ways of their own: compare the logits, not the code.
        hidden = model(packed=batch, keep_hidden=True).hidden
        head = output_head(model)
        ours = linear_logits(hidden, head.weight, **head.options())
        inputs = torch.tensor([example["prompt_ids"] + example["completion_ids"][0]], device=model.device)
        theirs = model(input_ids=inputs, use_cache=False).logits[0, :-1].to(ours.dtype)
    error = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
    limit = torch.finfo(hidden.dtype).eps ** 0.5 * max(1.0, theirs.abs().max().item())
    if not error <= limit:
        raise ModelError(
            f"{type(model).__name__} turns hidden states into logits in a way fastalign does not know (log-probs "
            f"differ by {error:.3g}, at most {limit:.3g} would be rounding): this architecture is not supported."
        )
