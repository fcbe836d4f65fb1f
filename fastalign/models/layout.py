"""How the batches of a model may be laid out. A run of the model on a few tokens (the probe) decides.

Whether a model can be packed depends on code that differs from architecture to architecture: how it makes its masks,
whether it reads `position_ids`, whether it carries a state along the row. A list of architectures would miss new ones,
and a wrong layout gives no error, only wrong numbers. So the probe compares numbers: the hidden states of a packed row
must equal those of separate rows, in which nothing can leak between sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.data.packing import Layout, PackedBatch, pack, pad
from fastalign.errors import ModelError
from fastalign.models.adapters import causal_lm, check_packable
from fastalign.models.attention import NAME, logger, packed_attention
from fastalign.models.linear import has_native_matmul
from fastalign.models.modes import evaluation_mode
from fastalign.models.vocabulary import embedding_rows


def prepare_model(model: nn.Module) -> Layout:
    """Sets the attention of a causal model, and runs it on a few tokens to find how its batches may be laid out.

    Args:
        model: a transformers model with its weights loaded, or a PeftModel around one. It is changed in place (its
            attention implementation), except where the model needs the implementation it has.

    Returns:
        The best layout that gives the results of separate sequences:

        - "shared": `pack(examples)`; the model honours positions and keeps completions apart.
        - "packed": `pack(examples, share_prompts=False)`; the model keeps whole sequences apart by itself.
        - "padded": `pad(examples, pad_token_id)`; for instance models with recurrent state.

        For "packed" and "padded" the logger "fastalign" gives one warning with the reason.

    Raises:
        ModelError: the model is no transformers model, is an encoder-decoder, is not causal, or has an adapter that
            adds virtual tokens.
    """
    base = _base_model(model)
    with evaluation_mode(base):
        layout, reason = _find_layout(base)
    if layout != "shared":
        how = "packed without sharing" if layout == "packed" else "padded"
        logger.warning("%s cannot share prompts (%s): batches will be %s.", type(base).__name__, reason, how)
    return layout


def _find_layout(base: PreTrainedModel) -> tuple[Layout, str | None]:
    """The layout, and why it is not "shared"."""
    body: Any = base.base_model
    stock: Any = base.config._attn_implementation  # transformers annotates it wider than its setter takes
    if type(base)._can_set_attn_implementation() and base.device.type == "cpu" and not has_native_matmul(base.dtype):
        # fastalign's attention widens to float32 here. The stock attention rounds more coarsely, and that difference
        # would look like a wrong layout, so the baseline is computed by fastalign's attention as well.
        base.set_attn_implementation(NAME)
    baseline = _Baseline(body)
    # Recurrent blocks carry a short convolution over time, which runs across sequence boundaries as their state does.
    if any(isinstance(module, nn.Conv1d) for module in base.get_decoder().modules()):
        return "padded", "it has layers with recurrent state"
    reason = "it does not use transformers' AttentionInterface"
    if type(base)._can_set_attn_implementation():
        base.set_attn_implementation(NAME)
        reason = baseline.mismatch(body, share_prompts=True)
        if reason is None:
            return "shared", None
        base.set_attn_implementation(stock)
    return "padded" if baseline.mismatch(body, share_prompts=False) else "packed", reason


def _base_model(model: nn.Module) -> PreTrainedModel:
    check_packable(model)
    base = causal_lm(model)
    if not isinstance(base, PreTrainedModel):
        raise ModelError(f"Expected a transformers PreTrainedModel or a PeftModel, got {type(base).__name__}.")
    if base.config.is_encoder_decoder:
        raise ModelError(f"{type(base).__name__} is an encoder-decoder: only causal language models are supported.")
    return base


# Two groups of (prompt, completions); tokens count from a third of the vocabulary, away from special tokens.
_PROBE = (
    ([0, 1, 2], [[3, 4, 5], [6, 7]]),
    ([8, 9], [[10], [11, 12, 13]]),
)

# The same with other tokens before the last of each prompt, to see how much the context matters to the model at hand.
_OTHER_CONTEXT = (
    ([14, 15, 2], [[3, 4, 5], [6, 7]]),
    ([16, 9], [[10], [11, 12, 13]]),
)


def _examples(body: PreTrainedModel, probe: tuple) -> list[dict]:
    vocabulary = embedding_rows(body)

    def tokens(offsets):
        return [(vocabulary // 3 + offset) % vocabulary for offset in offsets]

    return [{"prompt_ids": tokens(p), "completion_ids": [tokens(c) for c in completions]} for p, completions in probe]


@torch.no_grad()
def _hidden(body: PreTrainedModel, batch: PackedBatch, *, positions: bool = True) -> Tensor:
    """Hidden states (S, H) that predict the batch's scored tokens; without `positions` the model counts them itself."""
    batch = batch.to(next(body.get_input_embeddings().parameters()).device)
    inputs = batch.model_inputs() if positions else {"input_ids": batch.input_ids}
    with packed_attention(batch.layout, batch.keys):
        hidden = body(**inputs, use_cache=False)[0]
    return hidden.flatten(0, 1)[batch.score_index]  # (S, H)


def _alone(body: PreTrainedModel) -> Tensor:
    """Hidden states of the probe (S, H), with each sequence in a separate row and without `position_ids`."""
    rows = [
        {"prompt_ids": example["prompt_ids"], "completion_ids": [completion]}
        for example in _examples(body, _PROBE)
        for completion in example["completion_ids"]
    ]
    return torch.cat([_hidden(body, pack([row]), positions=False) for row in rows])


class _Baseline:
    """Hidden states of the probe in padded rows, as a rule by the model's stock attention, and what counts as equal."""

    def __init__(self, body: PreTrainedModel):
        batch = pad(_examples(body, _PROBE), pad_token_id=0)
        self.hidden = _hidden(body, batch)
        others = _hidden(body, pad(_examples(body, _OTHER_CONTEXT), pad_token_id=0))
        # Differences are measured as a share of what another context changes, since the size of hidden states differs
        # from model to model. Shares that were seen:
        # - a wrong layout (one visible token too many, or a wrong position): 0.1 to 2;
        # - rounding, by the same attention: under 5e-6 in float32, 1.3 eps in bfloat16, over 30 layers;
        # - rounding, by two kinds of attention, which round differently at every layer: 9 eps in bfloat16.
        # Both thresholds lie between rounding and a wrong layout:
        # - `same`, for two results of the same attention: 4 eps, three times what was seen;
        # - `close`, for results of two kinds of attention: 16 eps, nearly twice what was seen.
        # In float32, whose eps is tiny, both are 1e-4.
        context, eps = _distance(self.hidden, others).mean(), torch.finfo(others.dtype).eps
        self.same, self.close = (max(1e-4, share * eps) * context for share in (4, 16))
        # The first scored token of both completions is predicted from the same prompt; only later tokens differ.
        before_first, before_second = self.hidden[batch.cu_seqlens[:2]]
        if _distance(before_first, before_second) > self.same:
            raise ModelError(
                f"{type(body).__name__} is not causal (a token's hidden state depends on later tokens): "
                "only causal language models are supported."
            )

    def mismatch(self, body: PreTrainedModel, *, share_prompts: bool) -> str | None:
        """Reason why the current attention gives wrong hidden states for a packed row, or None.

        Two comparisons, so that the reason can be named: separate rows with the baseline (is the attention the same
        function?), and the packed row with separate rows (does the layout keep sequences apart?).
        """
        try:
            alone = _alone(body)
            packed = _hidden(body, pack(_examples(body, _PROBE), share_prompts=share_prompts))
        except Exception as error:  # whatever error the model's code raises, it cannot take packed input
            return f"{type(error).__name__}: {error}"
        if not (_distance(alone, self.hidden) <= self.close).all():
            return "its hidden states with fastalign's attention differ from those with the model's"
        if not (_distance(packed, alone) <= self.same).all():
            return "its hidden states in a packed row differ from those of separate rows"
        return None


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """(S, H), (S, H) -> (S,): the length of each row's difference."""
    return (a - b).double().norm(dim=-1)
