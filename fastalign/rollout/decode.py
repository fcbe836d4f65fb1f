"""A decode loop for Llama-like models: each prompt once for all of its answers, and merged weights.

`model.generate` runs the whole prompt for every answer, lets a cache grow by concatenation at every token, and calls
each LoRA layer as it is trained. This loop

- computes the keys and values of a prompt once, and lets its k answers share them,
- writes the keys and values of answers into a cache of fixed size, and
- multiplies by merged weights (see `weights`).

It only knows one kind of decoder layer: RMSNorm, rotary attention, RMSNorm, gated MLP. Whether a model is of that kind
is not read off its name: `Decoder` compares log-probs with the model's own, and refuses a model that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.errors import ModelError
from fastalign.models.adapters import causal_lm
from fastalign.models.head import Head, output_head
from fastalign.models.linear import HALF_DTYPES, has_native_matmul
from fastalign.models.modes import evaluation_mode
from fastalign.models.vocabulary import embedding_rows
from fastalign.rollout.sampling import pick
from fastalign.rollout.weights import Matrix, NotDecodable, product

# Rotary embeddings whose frequencies depend on how long the sequence is: they would change while an answer grows.
_CHANGING_ROPE = ("dynamic", "longrope")


class Answer(NamedTuple):
    """One answer: its tokens, a stop token included if it ended with one, and their log-probs in nats."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


class Decoder:
    """Answers prompts with a model's present weights, or those that it had at the last `refresh`.

    Args:
        model: A transformers causal language model, or a PeftModel around one.

    Raises:
        NotDecodable: The model has a part that this loop does not know, or the loop's log-probs differ from the
            model's own by more than rounding.
    """

    def __init__(self, model: nn.Module):
        self.base: Any = causal_lm(model)
        _check_config(self.base)
        try:
            self.body: Any = self.base.model
            self.layers = [_Layer(layer) for layer in self.body.layers]
            parts = (self.body.embed_tokens, self.body.norm, self.body.rotary_emb)
        except AttributeError as error:
            raise NotDecodable(str(error)) from error
        if type(parts[0]) is not nn.Embedding:
            raise NotDecodable(f"its embedding is a {type(parts[0]).__name__}")
        self.refresh()
        with evaluation_mode(self.base):
            self._compare()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the model's present weights."""
        for layer in self.layers:
            for matrix in layer.matrices:
                matrix.refresh()
        try:
            self.head: Head = output_head(self.base).dense().detach()
        except ModelError as error:
            raise NotDecodable(str(error)) from error

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], k: int, *, max_new_tokens: int, temperature: float | None,
        stops: Sequence[int],
    ) -> list[list[Answer]]:  # fmt: skip
        """Gives k answers to each prompt.

        Args:
            prompts: G token lists, each with at least one token.
            k: Answers to each prompt.
            max_new_tokens: The most tokens of an answer.
            temperature: Divides the logits before a draw from the whole distribution; None: the most likely token.
            stops: Tokens that end an answer.

        Returns:
            For each prompt its k answers. Log-probs are at the temperature; of greedy answers at 1.
        """
        device = self.head.dense_weight.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (G,)
        width, groups = max(map(len, prompts)), len(prompts)
        ids = torch.tensor([[*p, *([0] * (width - len(p)))] for p in prompts], device=device)  # (G, L)
        cos, sin = self._rotations(width + max_new_tokens)
        hidden, cache = self._read_prompts(ids, lengths, k, max_new_tokens, cos, sin)
        logits = self._logits(hidden).repeat_interleave(k, 0)  # (G k, V)
        stop = torch.tensor(list(stops), device=device, dtype=torch.int64)
        out = torch.zeros(groups * k, max_new_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(groups * k, max_new_tokens, device=device)
        rows = torch.arange(groups * k, device=device)  # the answers that are still computed
        lasts = torch.full((groups * k,), max_new_tokens, device=device)  # tokens of each answer
        ended = torch.zeros(groups * k, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            tokens, chosen = pick(logits, temperature)  # (R,) both
            out[rows, step], logprobs[rows, step] = tokens, chosen
            new = torch.isin(tokens, stop) & ~ended[rows]
            lasts[rows[new]] = step + 1
            ended[rows[new]] = True
            if step + 1 == max_new_tokens or bool(ended.all()):
                break
            # A group is computed until its last answer has ended. Groups are dropped when half of them have ended.
            live = ~ended[rows].view(-1, k).all(1)  # (groups left,)
            if 2 * int(live.sum()) <= len(live):
                keep = live.nonzero()[:, 0]
                cache = cache.of_groups(keep)
                tokens, rows = tokens.view(-1, k)[keep].flatten(), rows.view(-1, k)[keep].flatten()
            logits = self._logits(self._step(tokens, step, cache, cos, sin))
        ends, done = lasts.tolist(), ended.tolist()
        answers = [
            Answer(ids[:end], values[:end], finished)
            for ids, values, end, finished in zip(out.tolist(), logprobs.tolist(), ends, done, strict=True)
        ]
        return [answers[i : i + k] for i in range(0, len(answers), k)]

    # One pass

    def _rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine (P, D) of the rotary embedding at every position."""
        positions = torch.arange(length, device=self.head.dense_weight.device)[None]
        cos, sin = self.body.rotary_emb(self.head.dense_weight.new_zeros(1, 1, 1), positions)
        return cos[0], sin[0]

    def _read_prompts(
        self, ids: Tensor, lengths: Tensor, k: int, room: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, _Cache]:
        """The hidden states (G, H) that predict the first tokens of the answers, and the prompts' keys and values.

        Prompts are padded behind their end. No token sees one behind it, so padding changes nothing.
        """
        groups, width = ids.shape
        x = self.body.embed_tokens(ids.flatten())  # (G L, H)
        cos, sin = (t[:width].repeat(groups, 1)[:, None] for t in (cos, sin))  # (G L, 1, D)
        cache = _Cache.empty(len(self.layers), lengths, k, room)
        for layer in self.layers:
            q, key, value = layer.queries_keys_values(x, cos, sin)  # (G L, heads, D)
            q, key, value = (t.unflatten(0, (groups, width)).transpose(1, 2) for t in (q, key, value))
            cache.add_prompts(key, value)
            seen = F.scaled_dot_product_attention(
                q, key, value, is_causal=True, scale=layer.scaling, enable_gqa=True
            )  # (G, heads, L, D)
            x = layer.rest(x, seen.transpose(1, 2).flatten(0, 1).flatten(1))
        last = x.view(groups, width, -1)[torch.arange(groups, device=x.device), lengths - 1]
        return self.body.norm(last), cache

    def _step(self, tokens: Tensor, step: int, cache: _Cache, cos: Tensor, sin: Tensor) -> Tensor:
        """The hidden states (R, H) behind one more token of each answer."""
        x = self.body.embed_tokens(tokens)  # (R, H)
        positions = cache.lengths.repeat_interleave(cache.k) + step
        cos, sin = cos[positions][:, None], sin[positions][:, None]  # (R, 1, D)
        for i, layer in enumerate(self.layers):
            q, key, value = layer.queries_keys_values(x, cos, sin)
            x = layer.rest(x, cache.attend(i, step, q, key, value, layer.scaling))
        return self.body.norm(x)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(R, H) -> (R, V) float32."""
        logits = product(hidden, self.head).float()
        return logits if self.head.logit_scale == 1.0 else logits * self.head.logit_scale

    # The comparison with the model

    @torch.no_grad()
    def _compare(self) -> None:
        """NotDecodable unless log-probs of answers equal those of the model's own forward, within rounding."""
        vocabulary = embedding_rows(self.base)
        prompts = [[vocabulary // 3 + i for i in range(n)] for n in (1, 7)]
        prompts = [[token % vocabulary for token in prompt] for prompt in prompts]
        try:
            answers = self.generate(prompts, 2, max_new_tokens=4, temperature=None, stops=())
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise NotDecodable(f"{type(error).__name__}: {error}") from error
        # accelerate wraps a model's forward with autocast, which would round more coarsely than the loop does.
        forward = getattr(self.base, "_original_forward", self.base.forward)
        worst, largest = 0.0, 1.0
        for prompt, (answer, _) in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer.tokens]], device=self.head.dense_weight.device)
            logits = forward(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            theirs = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
            worst = max(worst, *(abs(a - b) for a, b in zip(theirs, answer.logprobs, strict=True)))
            largest = max(largest, logits.abs().max().item())
        limit = torch.finfo(self.head.dense_weight.dtype).eps ** 0.5 * largest
        if not worst <= limit:
            raise NotDecodable(f"its log-probs differ from the loop's by {worst:.2g}, more than {limit:.2g}")


def _check_config(base: PreTrainedModel) -> None:
    """NotDecodable for what a comparison over a few tokens would not notice."""
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds or (window is not None and not getattr(config, "layer_types", None)):
        raise NotDecodable("its attention has a window")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in _CHANGING_ROPE:
        raise NotDecodable(f"its positions change with the length of the text (rope type {kind})")
    dtype = base.dtype
    if base.device.type == "cpu" and dtype in HALF_DTYPES and not has_native_matmul(dtype):
        raise NotDecodable(f"this CPU has no instructions for {dtype}")


class _Layer:
    """One decoder layer: its matrices and norms."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.q, self.k, self.v = (Matrix(getattr(attention, f"{name}_proj")) for name in "qkv")
        self.o, self.down = Matrix(attention.o_proj), Matrix(mlp.down_proj)
        self.gate, self.up = Matrix(mlp.gate_proj), Matrix(mlp.up_proj)
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.activation, self.width, self.scaling = mlp.act_fn, attention.head_dim, attention.scaling
        self.matrices = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R, H) -> queries (R, heads, D), and keys and values (R, key_heads, D); the first two are rotated."""
        h = self.before_attention(x)
        q, k, v = (product(h, m).view(len(h), -1, self.width) for m in (self.q, self.k, self.v))
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return _rotated(q, cos, sin), _rotated(k, cos, sin), v

    def rest(self, x: Tensor, seen: Tensor) -> Tensor:
        """(R, H) behind the layer, from its input and what attention saw (R, heads * D)."""
        x = x + product(seen, self.o)
        h = self.before_mlp(x)
        gated = self.activation(product(h, self.gate))
        gated = gated * product(h, self.up)
        return x + product(gated, self.down)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(R, heads, D) turned by its position."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class _Cache:
    """Keys and values: of each prompt once, and of each answer in a place of its own.

    Attributes:
        lengths: (G,) tokens of each prompt.
        k: Answers to each prompt.
    """

    def __init__(self, lengths: Tensor, k: int, room: int, prompts: list, answers: list):
        self.lengths, self.k, self.room = lengths, k, room
        self._prompts, self._answers = prompts, answers
        self._bias: Tensor | None = None

    @classmethod
    def empty(cls, layers: int, lengths: Tensor, k: int, room: int) -> _Cache:
        """A cache for prompts of these lengths, with room for so many tokens of each answer."""
        return cls(lengths, k, room, [], [])

    def add_prompts(self, key: Tensor, value: Tensor) -> None:
        """Stores one layer's keys and values (G, key_heads, L, D) of the prompts."""
        groups, heads, _, width = key.shape
        self._prompts.append((key.contiguous(), value.contiguous()))
        room = (groups * self.k, heads, self.room, width)
        self._answers.append((key.new_empty(room), key.new_empty(room)))

    def of_groups(self, keep: Tensor) -> _Cache:
        """The cache of some groups alone."""
        rows = (keep[:, None] * self.k + torch.arange(self.k, device=keep.device)).flatten()
        prompts = [(key[keep], value[keep]) for key, value in self._prompts]
        answers = [(key[rows], value[rows]) for key, value in self._answers]
        return _Cache(self.lengths[keep], self.k, self.room, prompts, answers)

    def attend(self, layer: int, step: int, q: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """What each answer's newest token sees, (R, heads * D); its key and value are stored first.

        Args:
            layer: Number of the layer.
            step: Tokens that the answers had before this one.
            q: (R, heads, D).
            key: (R, key_heads, D).
            value: (R, key_heads, D).
            scaling: Multiplies the scores.
        """
        (pk, pv), (ak, av) = self._prompts[layer], self._answers[layer]
        ak[:, :, step], av[:, :, step] = key, value
        groups, heads, length, width = pk.shape
        rows, per = len(q), q.shape[1] // heads  # queries per key head
        own = q.view(rows, heads, per, width) * scaling
        # All queries of a group meet the prompt's keys in one product.
        shared = own.view(groups, self.k, heads, per, width).transpose(1, 2).reshape(groups, heads, -1, width)
        scores = (shared @ pk.transpose(-1, -2)).view(groups, heads, self.k, per, length)
        if (bias := self._padding(length)) is not None:
            scores = scores + bias
        scores = scores.transpose(1, 2).reshape(rows, heads, per, length)
        scores = torch.cat([scores, own @ ak[:, :, : step + 1].transpose(-1, -2)], -1)
        weights = scores.float().softmax(-1).to(q.dtype)
        of_prompt = weights[..., :length].view(groups, self.k, heads, per, length).transpose(1, 2)
        seen = of_prompt.reshape(groups, heads, -1, length) @ pv  # (G, key_heads, k per, D)
        seen = seen.view(groups, heads, self.k, per, width).transpose(1, 2).reshape(rows, heads, per, width)
        return (seen + weights[..., length:] @ av[:, :, : step + 1]).flatten(1)

    def _padding(self, length: int) -> Tensor | None:
        """(G, 1, 1, 1, L): -inf at the padding of prompts, else 0; None where all prompts are equally long."""
        if self._bias is None:
            padded = torch.arange(length, device=self.lengths.device) >= self.lengths[:, None]  # (G, L)
            bias = torch.zeros(padded.shape, device=padded.device).masked_fill_(padded, float("-inf"))
            self._bias = bias[:, None, None, None]
            self._padded = bool(padded.any())
        return self._bias if self._padded else None
