"""The diagonal of the Fisher information: how much each parameter matters to what a model knows.

    F_i = mean over sequences s of (d (-log-likelihood of s) / d theta_i)^2

EWC uses it to hold important parameters near their old values. The square is inside the mean, so the gradient of every
single sequence is needed. The plain way is one backward pass per sequence. `fisher_diagonal` gives the same numbers by
ordinary backward passes over packed batches of sequences:

- **Hooks instead of gradients.** For a linear layer the gradient of sequence s is `G_s' X_s`, with its inputs X_s and
  the gradients of its outputs G_s. Hooks on the layer see both, for all sequences of the batch, and hand them to
  `accumulate_fisher_`, which squares each product and adds it up. No sequence's gradient is ever stored. The weights
  themselves require no gradient meanwhile, so this product takes the place of the usual one.
- **The output layer** has no logits that could be hooked, since they are never formed. Its part is recomputed one tile
  of the vocabulary at a time, see `output_layer.py`.
- **Tied embeddings.** Where the output layer shares its weight with the embedding, the weight has one gradient: the sum
  of both roles. They are added per sequence before they are squared; `(a + b)^2` is not `a^2 + b^2`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fastalign.data.batching import batches_within, token_count
from fastalign.data.loading import Rows, load_rows
from fastalign.data.packing import PackedBatch, lay_out
from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.fisher.eight_bit import ByteSums, add_products_, add_rows_
from fastalign.fisher.output_layer import VOCAB_TILE, HeadFisher, Roles, add_sums, logits_tile
from fastalign.fisher.storage import Estimator, Fisher, Per
from fastalign.models.adapters import causal_lm
from fastalign.models.head import Head, output_head
from fastalign.models.modes import evaluation_mode
from fastalign.models.quantization import check_unquantized
from fastalign.models.scoring import prepare
from fastalign.ops.linear_logprobs import linear_logprobs

__all__ = ["Fisher", "fisher_diagonal"]

ESTIMATORS = get_args(Estimator)
PER = get_args(Per)


def fisher_diagonal(
    model: nn.Module,
    data: Rows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    estimator: Estimator = "empirical",
    per: Per = "sequence",
    tokens_per_batch: int = 2048,
    max_length: int | None = None,
    bits: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Fisher:
    """The mean squared gradient of the negative log-likelihood, for every parameter that requires a gradient.

    Args:
        model: a causal language model of transformers, or a PeftModel around one. It is prepared in place, and computes
            in evaluation mode. Covered are linear layers, embeddings, norms (LayerNorm, RMSNorm), their biases, LoRA
            factors, the output layer, and an output layer tied to the embedding.
        data: a file, a list of dicts or a Dataset, with `prompt_ids` and `completion_ids`, or rows in any format of
            `fastalign.data`. Each completion with its prompt is one sequence. The log-likelihoods of its scored tokens
            are summed.
        tokenizer: the model's; needed for rows that are not tokenised.
        estimator: at which tokens gradients are taken, and what is squared.

            - "empirical": gradients at the tokens of the data.
            - "sampled": gradients at tokens drawn from the model's distribution, with `seed`; the data gives the
              contexts. This is unbiased for the Fisher information (Kunstner et al. 2019, arXiv:1905.12558).
            - "batch": the squared gradient of a batch's mean, as in much teaching code. It is biased towards the square
              of the mean gradient, and depends on `tokens_per_batch`.
        per: "sequence" squares the gradients of sequences. "token" squares the contribution of each position to them,
            without its effect through other positions (the "expand" setting of Eschenhagen et al. 2023,
            arXiv:2311.00636), and takes the mean over scored tokens.
        tokens_per_batch: tokens packed at a time. Besides the accumulators, memory is that of a backward pass over as
            many tokens.
        max_length: of rows that are tokenised here, see `fastalign.data.tokenize`.
        bits: 32 or 8, of one entry of the accumulators. With 8, matrices take a quarter of the memory and are rounded
            at random (with `seed`) after each batch. Every entry stays right in the mean. Its standard error is 3 % of
            it after the first batch and 18 % after many, whatever their number. Fewer, larger batches err less and
            take less time to round.
        seed: of the sampled tokens and of the rounding.
        progress: whether a bar shows the progress.

    Returns:
        float32 tensors (float64 for a float64 model) of the parameters' shapes, by name as in `named_parameters`.

    Raises:
        ConfigError: an option has an unknown value, or the rows need a tokenizer.
        DataError: there are no rows, or none of their tokens is scored.
        ModelError: a trainable parameter is of a kind that is not covered; the error names it. Freeze it. Or the model
            is quantised and has no adapter.

    Examples:
        >>> fisher = fisher_diagonal(model, "abilities.jsonl", tokenizer=tokenizer)
        >>> fisher.save("fisher.safetensors")
    """
    if estimator not in ESTIMATORS or per not in PER:
        raise ConfigError(
            f"estimator is {estimator!r} and per is {per!r}; they must be one of {ESTIMATORS} and of {PER}"
        )
    if estimator == "batch" and per == "token":
        raise ConfigError("per is 'token', but estimator='batch' squares the gradient of a batch; leave per out")
    if bits not in (8, 32):
        raise ConfigError(f"bits is {bits}; Fisher information is added up in 32 or 8")
    check_unquantized(model, "load it unquantised")
    rows = _tokenized(data, tokenizer, max_length)
    layout = prepare(model)
    fisher = Fisher(estimator=estimator, per=per)
    backward = _Pass(model, fisher, bits, seed)
    device = next(model.parameters()).device
    with _recording(model, backward):
        # With a budget of one token every batch holds one sequence.
        batches = list(batches_within(_sequences(rows), token_count, 1 if layout == "padded" else tokens_per_batch))
        for examples in tqdm(batches, desc="fisher", unit="batch", leave=False, disable=not progress):
            pad_token_id = causal_lm(model).config.pad_token_id or 0
            backward.run(lay_out(examples, "padded" if layout == "padded" else "packed", pad_token_id).to(device))
    if not fisher.samples:
        raise DataError("No token of the data is scored, so there is no gradient: give rows with completions.")
    for stored in fisher.stored.values():
        stored.div_(fisher.samples)
    return fisher


def _tokenized(data, tokenizer, max_length: int | None):
    """Rows with token ids: the data itself if it has them, else what the tokenizer makes of it."""
    rows = load_rows(data) if not isinstance(data, list) or not data or "completion_ids" not in data[0] else data
    if not len(rows):
        raise DataError("The data for the Fisher information holds no rows: it needs at least one.")
    if "completion_ids" in rows[0]:
        return rows
    if tokenizer is None:
        raise ConfigError(f"The rows hold {sorted(rows[0])}, not token ids: pass the model's tokenizer.")
    return tokenize(rows, tokenizer, max_length=max_length)[0]


def _sequences(rows) -> Iterator[dict]:
    """The rows with one completion each: a row of two completions gives two, each with the prompt."""
    for row in rows:
        masks = row.get("completion_mask") or [None] * len(row["completion_ids"])
        for completion, mask in zip(row["completion_ids"], masks, strict=True):
            sequence = {"prompt_ids": row["prompt_ids"], "completion_ids": [completion]}
            yield sequence if mask is None else {**sequence, "completion_mask": [mask]}


class _Pass:
    """Backward passes over packed batches, and what their hooks need to know about the current batch.

    A *sample* is what is squared separately: a sequence, a token, or (estimator "batch") the whole batch.
    """

    def __init__(self, model: nn.Module, fisher: Fisher, bits: int, seed: int):
        self.model, self.fisher = model, fisher
        self.estimator, self.per, self.sums = fisher.estimator, fisher.per, fisher.stored
        self.base = causal_lm(model)
        names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        if not names:
            raise ModelError("No parameter of the model requires a gradient: set requires_grad on those to measure.")
        device = next(model.parameters()).device
        # Two generators, so that rounding does not change which tokens are sampled.
        self.generator, rounding = (torch.Generator(device).manual_seed(seed + i) for i in range(2))
        for name, p in model.named_parameters():
            if p.requires_grad:
                wide = torch.float64 if p.dtype == torch.float64 else torch.float32
                if bits == 8 and p.dim() == 2:
                    self.sums[name] = ByteSums.zeros(p, wide, rounding)
                else:
                    self.sums[name] = torch.zeros(p.shape, dtype=wide, device=p.device)
        output_layer: Any = self.base.get_output_embeddings()
        self.head = HeadFisher(output_layer, names, self.sums)
        self.layers = _layers(model, self.head.layer, names)
        tied = id(self.base.get_input_embeddings().weight) == id(self.head.weight)
        self.tied = self.base.get_input_embeddings() if tied else None
        self.bounds: Tensor = torch.zeros(1, dtype=torch.int64)  # (samples + 1,), of the current batch
        self.roles: Roles | None = None
        self.calls: Counter[nn.Module] = Counter()
        self.busy = False  # a layer is called by a hook, not by the model

    def run(self, batch: PackedBatch) -> None:
        """Adds the squared gradients of a batch's samples."""
        self.bounds = self._bounds(batch)
        self.calls.clear()
        hidden = self.model(packed=replace(batch, targets=None)).hidden  # (N, H); no logits: nothing is scored yet
        # The graph is cut at the hidden states: the body's backward pass needs their gradient, and the output layer's
        # part needs them as plain numbers.
        leaf, head = hidden.detach().requires_grad_(), output_head(self.base).dense().detach()
        targets: Any = self._sample(leaf.detach(), head) if self.estimator == "sampled" else batch.targets
        logprobs: Any = linear_logprobs(leaf, head.weight, targets, ignore_index=None, **head.options())
        scored = int(batch.cu_seqlens.diff().gt(0).sum())
        share = 1.0
        if self.estimator == "batch":  # squares the gradient of the mean over the batch's sequences
            share, count = 1 / max(scored, 1), 1 if scored else 0
        else:
            count = scored if self.per == "sequence" else targets.numel()
        self.fisher.samples += count
        (grad,) = torch.autograd.grad(logprobs.sum(), leaf)
        self.roles = None
        if hidden.requires_grad:
            hidden.backward(grad.mul_(-share))
        with torch.no_grad():
            # The samples' offsets count tokens of the row. The output layer sees the scored positions alone.
            cu_seqlens = torch.searchsorted(batch.score_index, self.bounds)
            self.head.add(leaf.detach(), targets, logprobs.detach(), head, cu_seqlens, share, self.roles)

    def _bounds(self, batch: PackedBatch) -> Tensor:
        """(S + 1,) int64 offsets of the samples into the batch's tokens."""
        tokens, device = batch.input_ids.numel(), batch.input_ids.device
        if self.estimator == "batch":
            return torch.tensor([0, tokens], device=device)
        if self.per == "token":
            return torch.arange(tokens + 1, device=device)
        if batch.layout is None:  # padded: one row at a time
            return torch.tensor([0, tokens], device=device)
        return torch.tensor([0, *(group.completions[-1][1] for group in batch.layout)], device=device)

    def _sample(self, hidden: Tensor, head: Head) -> Tensor:
        """A token per hidden state (N, H) -> (N,), drawn from the model's distribution without forming all logits.

        The largest of `logit + Gumbel noise` is distributed as the softmax, and a maximum can be taken tile by tile.
        """
        best = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=torch.promote_types(hidden.dtype, torch.float32))
        targets = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        with torch.no_grad():
            for start in range(0, head.weight.shape[0], VOCAB_TILE):
                z, _ = logits_tile(hidden, head, slice(start, start + VOCAB_TILE))
                # -log of an exponential variable has the Gumbel distribution.
                noise = torch.empty_like(z).exponential_(generator=self.generator).log_().neg_()
                value, index = (z + noise).max(1)
                targets = torch.where(value > best, index + start, targets)
                best = torch.maximum(best, value)
        return targets

    def watch(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Forward hook of a layer: adds the layer's part once the gradient of its output is known."""
        if self.busy:
            return output
        self.calls[module] += 1
        if self.calls[module] > 1:
            raise ModelError(
                f"The layer of {next(iter(self.layers[module].values()))} runs more than once a pass, and the "
                "gradients of its uses would be squared separately: freeze its parameters."
            )
        if not output.requires_grad:  # nothing before the layer is trained, so the backward pass ends here
            output = output.detach().requires_grad_()
        x = inputs[0].detach()
        output.register_hook(lambda grad: self._add(module, x, grad.detach()))
        return output

    @torch.no_grad()
    def _add(self, module: nn.Module, x: Tensor, grad: Tensor) -> None:
        """Adds the squares of one layer's gradients; x (..., in) is its input, grad (..., out) that of its output."""
        names = self.layers[module]
        fishers = {own: self.sums[name] for own, name in names.items()}
        tokens = int(self.bounds[-1])
        repeats = grad[..., 0].numel() // tokens  # rows per token: more than one for a norm over each attention head
        if grad.shape[0] * (grad.shape[1] if grad.dim() > 2 else 1) != tokens:
            raise ModelError(
                f"The layer of {next(iter(names.values()))} sees {tuple(grad.shape)} for {tokens} tokens, so its "
                "gradient cannot be split by sequence: freeze its parameters."
            )
        if isinstance(module, nn.Embedding):
            self._add_embedding(module, fishers.get("weight"), x.reshape(-1), grad.reshape(tokens, -1))
            return
        bounds, g = self.bounds * repeats, grad.reshape(-1, grad.shape[-1])  # g (tokens * repeats, out)
        if isinstance(module, (nn.Linear, Conv1D)):
            x = x.reshape(-1, x.shape[-1])
            if "weight" in fishers and isinstance(module, Conv1D):  # stores its weight as (in, out)
                add_products_(fishers["weight"], x, g, bounds)
            elif "weight" in fishers:
                add_products_(fishers["weight"], g, x, bounds)
            if "bias" in fishers:
                add_sums(fishers["bias"], g, bounds)
            return
        self.busy = True
        try:
            for name, values in _elementwise_gradients(module, fishers, x, grad).items():
                add_sums(fishers[name], values.reshape(-1, values.shape[-1]), bounds)
        finally:
            self.busy = False

    def _add_embedding(self, module: nn.Embedding, fisher: Any, ids: Tensor, grad: Tensor) -> None:
        """Adds the squares of an embedding's gradients: of a sample, a row's gradient is the sum over its tokens."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        # Gemma's embedding returns its rows times sqrt(hidden size), so their gradient has that factor as well.
        grad = grad.to(wide) * getattr(module, "scalar_embed_scale", 1.0)
        if module.padding_idx is not None:  # torch gives its row no gradient
            grad = grad.masked_fill((ids == module.padding_idx).unsqueeze(1), 0.0)
        sample = torch.repeat_interleave(self.bounds.diff())  # (tokens,), the sample that each token is in
        pairs, index = torch.unique(sample * module.num_embeddings + ids, return_inverse=True)
        sums = grad.new_zeros(pairs.numel(), grad.shape[1]).index_add_(0, index, grad)  # (pairs, H)
        if module is self.tied:  # squared later, together with the gradient of the role as output layer
            self.roles = pairs // module.num_embeddings, pairs % module.num_embeddings, sums
        else:
            add_rows_(fisher, pairs % module.num_embeddings, sums.square_())


def _elementwise_gradients(module: nn.Module, wanted, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The gradients (..., n) of a norm's weight and bias (n,), for each token alone."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        normalize: Any = nn.functional.layer_norm if isinstance(module, nn.LayerNorm) else nn.functional.rms_norm
        out = {"weight": grad * normalize(x, module.normalized_shape, eps=module.eps), "bias": grad}
        return {name: out[name] for name in wanted}
    # Each norm of transformers computes `f(weight) * normalised(x)` in another way, for example with `1 + weight`. So
    # the module itself is called, with a separate copy of the weight for each token, and autograd does the rest.
    leaves = {name: getattr(module, name).detach().expand(x.shape).requires_grad_() for name in wanted}
    with torch.enable_grad():
        out = functional_call(module, leaves, (x,))
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


def _is_known(module: nn.Module) -> bool:
    """Whether `_Pass` knows how to take the gradients of this module's parameters by sample."""
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or hasattr(module, "scalar_embed_scale")
        return plain and module.max_norm is None and not module.scale_grad_by_freq
    if isinstance(module, (nn.Linear, Conv1D)):
        return module.weight.is_floating_point()
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1
    parameters = list(module.parameters(recurse=False))
    takes_one = len(inspect.signature(type(module).forward).parameters) == 2  # self and the hidden states
    return type(module).__name__.endswith("Norm") and takes_one and all(p.dim() == 1 for p in parameters)


def _layers(model: nn.Module, head: nn.Module, names: Mapping[int, str]) -> dict[nn.Module, dict[str, str]]:
    """The modules with trained parameters -> {the parameter's name in the module: its name in the model}.

    Raises:
        ModelError: a module is of an unknown kind, or a parameter is shared by several modules.
    """
    inside_head, layers, unknown = set(head.modules()), {}, []
    for module in model.modules():
        own = {n: names[id(p)] for n, p in module.named_parameters(recurse=False) if id(p) in names}
        if not own or module in inside_head:
            continue
        layers[module] = own
        if not _is_known(module):
            unknown += own.values()
    if unknown:
        raise ModelError(
            f"How to take the Fisher information of {len(unknown)} parameters ({unknown[0]}, ...) is not known, only "
            "that of linear layers, embeddings, norms and LoRA on linear layers: freeze them with "
            "requires_grad_(False)."
        )
    shared = [name for name, n in Counter(name for own in layers.values() for name in own.values()).items() if n > 1]
    if shared:
        raise ModelError(
            f"{shared[0]} is shared by several layers, whose gradients would be squared separately; only an output "
            "layer may share the embedding's: freeze it with requires_grad_(False)."
        )
    return layers


@contextmanager
def _recording(model: nn.Module, backward: _Pass) -> Iterator[None]:
    """A context with the hooks on the model, which is in evaluation mode and whose weights require no gradient.

    The products in the hooks replace the gradients of the weights, so autograd need not compute those.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [module.register_forward_hook(backward.watch) for module in backward.layers]
    model.requires_grad_(False)
    try:
        with evaluation_mode(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for p in trained:
            p.requires_grad_()
