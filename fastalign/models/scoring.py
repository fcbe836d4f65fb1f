"""Token log-probabilities of a packed batch, computed inside the model's own forward.

`prepare(model)` adds one more way to call a model: `model(packed=batch)` runs the body over the batch, picks the hidden
states that predict a scored token, and turns them into log-probabilities without forming logits for the rest. Any other
call does what it did before.

This happens inside the model's own forward because wrappers (DDP, FSDP, peft, accelerate) hook into that call. Had the
trainer called the body and the output layer itself, their gradients would stay unsynchronised without any error.

`restore(model)` takes back everything that `prepare(model)` changed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from fastalign.data.packing import Layout, PackedBatch, last_tokens, lay_out
from fastalign.errors import ModelError
from fastalign.models.adapters import causal_lm, plain_name
from fastalign.models.attention import packed_attention
from fastalign.models.head import output_head
from fastalign.models.layout import prepare_model
from fastalign.models.linear import speed_up_linear
from fastalign.models.modes import evaluation_mode
from fastalign.models.noise import noisy_embeddings
from fastalign.models.norms import speed_up_body
from fastalign.models.quantization import restore_product, use_training_product
from fastalign.models.reward import is_reward_model, score_layer
from fastalign.models.sharding import gather_layer
from fastalign.models.vocabulary import embedding_rows
from fastalign.ops import linear_token_statistics
from fastalign.reference import linear_logits


class Scores(NamedTuple):
    """What `model(packed=batch)` returns, for the S scored tokens of the batch.

    Attributes:
        logprobs: (S,) float32, in nats, of `batch.targets`; None if the batch has no targets.
        entropy: (S,) float32, in nats, of the distributions that predict them; None unless called with `entropy=True`.
        hidden: (S, H), the input of the output layer; None unless called with `keep_hidden=True` or without targets.
        log_sum_sq_probs: (S,) float32, log sum_v p(v)^2 of those distributions, without gradient; None unless called
            with `statistics=True`.
        rewards: (C,) float32, of the batch's completions, from a reward model; None from a language model. A reward
            model gives nothing else.
    """

    logprobs: Tensor | None
    entropy: Tensor | None
    hidden: Tensor | None
    log_sum_sq_probs: Tensor | None = None
    rewards: Tensor | None = None

    @property
    def of_objective(self) -> Tensor | None:
        """What an objective takes: rewards of completions from a reward model, else log-probs of tokens."""
        return self.logprobs if self.rewards is None else self.rewards


def prepare(model: nn.Module) -> Layout:
    """Lets `model(packed=batch)` return `Scores`, and finds how the model's batches must be laid out.

    Linear layers, norms and attention of the model are replaced by faster ones where those compute the same.

    Args:
        model: a transformers causal language model with its weights loaded, a reward model (see
            `fastalign.models.reward`), or a PeftModel around one. It is changed in place; preparing it again changes
            nothing, and `restore` takes everything back.

    Returns:
        "shared", "packed" or "padded", for `fastalign.data.packing.lay_out`. `fastalign.models.layout.prepare_model`
        says what they mean.

    Raises:
        ModelError: the model is not a causal language model, its output layer gives other log-probabilities than
            fastalign computes from its weights, or bitsandbytes has rearranged its weights.

    Examples:
        >>> layout = prepare(model)
        >>> batch = lay_out([{"prompt_ids": [5, 6], "completion_ids": [[7, 8], [9]]}], layout, pad_token_id=0)
        >>> model(packed=batch).logprobs.shape
        torch.Size([3])
    """
    use_training_product(model)
    speed_up_linear(model)
    speed_up_body(model)
    base: Any = causal_lm(model)
    attention = getattr(getattr(base, "config", None), "_attn_implementation", None)
    layout = prepare_model(model)
    if not hasattr(base, "_fastalign_forward"):
        base._fastalign_attention = attention
        base._fastalign_forward = base.forward
        # Not a bound method: that is pickled as the name of an attribute, which the class does not have.
        base.forward = functools.partial(_reward_forward if is_reward_model(base) else _forward, base)
    if is_reward_model(base):
        _check_rewards(base, layout)
    else:
        _check_head(base, layout)
    return layout


def restore(model: nn.Module) -> None:
    """Takes back what `prepare` changed: forwards, attention and the products of quantised layers, in place.

    Hooks on every module fire again. The weights stay as training left them. Other things that a trainer changes stay
    too: dropout that is turned off, the special tokens of the configuration, and the adapter.

    Args:
        model: A model that `prepare` or a trainer has prepared, or a PeftModel around one. On any other model this
            does nothing.
    """
    base: Any = causal_lm(model)
    forward = vars(base).pop("_fastalign_forward", None)
    if forward is not None:
        # A wrapper that accelerate put around ours for mixed precision goes too: it calls ours.
        vars(base).pop("_original_forward", None)
        del base.forward
        if getattr(forward, "__func__", None) is not type(base).forward:  # someone had exchanged it before
            base.forward = forward
        attention = base._fastalign_attention
        del base._fastalign_attention
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
    for module in model.modules():
        patched = vars(module).get("forward")
        function = getattr(patched, "func", None) or getattr(patched, "__func__", None)
        if getattr(function, "__module__", "").startswith("fastalign.models."):
            del module.forward
    restore_product(model)


def _forward(
    self, *args, packed: PackedBatch | None = None, entropy=False, keep_hidden=False, statistics=False,
    memory_budget=None, noise: float | None = None, temperature: float = 1.0, **kw,
):  # fmt: skip
    """The forward of a prepared model; `self` is the transformers model."""
    if packed is None:
        return self._fastalign_forward(*args, **kw)
    with packed_attention(packed.layout, packed.keys), noisy_embeddings(self, packed, noise):
        hidden = self.base_model(**packed.model_inputs(), use_cache=False)[0]
    hidden = hidden.flatten(0, 1)[packed.score_index]  # (S, H)
    if packed.targets is None:
        return Scores(None, None, hidden)
    gather_layer(self.get_output_embeddings())
    head = output_head(self)
    kept = hidden if keep_hidden else None
    if statistics:
        options = {"memory_budget": memory_budget, "entropy": entropy} | head.options()
        values = linear_token_statistics(hidden, head.dense().dense_weight, packed.targets, **options)
        return Scores(values.logprobs, values.entropy, kept, values.log_sum_sq_probs)
    # `score_index` left out every hidden state without a target, so none needs to be compared with ignore_index.
    out = head.logprobs(
        hidden, packed.targets, entropy=entropy, ignore_index=None, memory_budget=memory_budget, temperature=temperature
    )
    logprobs, entropies = out if entropy else (out, None)
    return Scores(logprobs, entropies, kept)


def _reward_forward(self, *args, packed: PackedBatch | None = None, noise: float | None = None, **kw):
    """The forward of a prepared reward model: the reward of a completion is read at its last token."""
    if packed is None:
        return self._fastalign_forward(*args, **kw)
    with packed_attention(packed.layout), noisy_embeddings(self, packed, noise):
        hidden = self.base_model(**packed.model_inputs(), use_cache=False)[0]
    last = hidden.flatten(0, 1)[last_tokens(packed)]  # (C, H)
    # In float32, whatever the dtype of the body: differences of rewards are small beside the rewards.
    with torch.autocast(last.device.type, enabled=False):
        rewards = linear(last.float(), score_layer(self).weight.float())[:, 0]
    return Scores(None, None, None, rewards=rewards)


@torch.no_grad()
def _check_rewards(model: Any, layout: Layout) -> None:
    """ModelError unless packed rewards are those of the model's stock forward, within rounding."""
    vocab = embedding_rows(model)
    example = {"prompt_ids": [vocab // 3], "completion_ids": [[vocab // 3 + 1, vocab // 2], [vocab // 5]]}
    batch = lay_out([example], layout, pad_token_id=0).to(model.device)
    with evaluation_mode(model):
        ours = model(packed=batch).rewards
        rows = [torch.tensor([example["prompt_ids"] + ids], device=model.device) for ids in example["completion_ids"]]
        # A trained score layer is float32, also on a body in bfloat16: the stock forward does not convert between them.
        convert = score_layer(model).register_forward_pre_hook(lambda layer, x: (x[0].to(layer.weight.dtype),))
        try:
            theirs = torch.cat([model(input_ids=row, use_cache=False).logits[:, 0].float() for row in rows])
        finally:
            convert.remove()
    error, limit = (ours - theirs).abs().max().item(), torch.finfo(model.dtype).eps ** 0.5
    limit *= max(1.0, theirs.abs().max().item())
    if not error <= limit:
        _check_finite(model)
        raise ModelError(
            f"{type(model).__name__} gives other rewards than its score layer at the last token (they differ by "
            f"{error:.3g}, at most {limit:.3g} would be rounding): this architecture is not supported."
        )


def _check_finite(model: nn.Module) -> None:
    """ModelError if a weight is NaN or infinite: then the model computes nothing, whatever its architecture."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            found = "NaN" if parameter.isnan().any() else "inf"
            raise ModelError(
                f"The model holds {found} in {plain_name(name)}, so it can compute nothing: take the weights "
                "from before the training that spoilt them."
            )


@torch.no_grad()
def _check_head(model: PreTrainedModel, layout: Layout) -> None:
    """ModelError unless `output_head` reproduces the logits of the model's stock forward, within rounding.

    Architectures scale, shift or cap between body and logits in many ways, and not all of them show in the
    configuration. So the numbers are compared.
    """
    vocab = embedding_rows(model)
    example = {"prompt_ids": [vocab // 3], "completion_ids": [[vocab // 3 + 1, vocab // 2, vocab // 5]]}
    batch = lay_out([example], layout, pad_token_id=0).to(model.device)
    with evaluation_mode(model):
        hidden = model(packed=batch, keep_hidden=True).hidden
        head = output_head(model).dense()
        ours = linear_logits(hidden, head.dense_weight, **head.options())
        inputs = torch.tensor([example["prompt_ids"] + example["completion_ids"][0]], device=model.device)
        theirs = model(input_ids=inputs, use_cache=False).logits[0, :-1].to(ours.dtype)
    error = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
    limit = torch.finfo(hidden.dtype).eps ** 0.5 * max(1.0, theirs.abs().max().item())
    if not error <= limit:
        _check_finite(model)
        raise ModelError(
            f"{type(model).__name__} turns hidden states into logits in a way fastalign does not know (log-probs "
            f"differ by {error:.3g}, at most {limit:.3g} would be rounding): this architecture is not supported."
        )
