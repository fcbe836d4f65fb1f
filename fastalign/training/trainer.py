"""What the trainers share: `transformers.Trainer` with packed batches, an objective, a reference and regularisers.

`AlignmentTrainer` only wires parts that do one job each:

- `fastalign.data`: rows -> tokens -> `Batch`
- `fastalign.models`: `model(packed=batch)` -> log-probs
- `fastalign.objectives`: log-probs -> loss and metrics
- `fastalign.regularizers`: terms that are added to the loss
- `reference`, `metrics`, `checkpoint`, `preflight`, `callbacks` in this folder: what their names say
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastalign.config.base import AlignmentConfig
from fastalign.config.quantization import Quantization
from fastalign.config.supported import check_arguments
from fastalign.data import tokenization
from fastalign.data.batch import Batch
from fastalign.data.collate import Collator
from fastalign.data.keys import cache_folder
from fastalign.data.loading import Rows, of_each
from fastalign.data.packing import Layout
from fastalign.errors import ConfigError, DataError, printable
from fastalign.models.adapters import causal_lm, has_adapter, lora_layers
from fastalign.models.fit import check_fit
from fastalign.models.linear import limit_onednn_cache
from fastalign.models.loading import load_tokenizer
from fastalign.models.ready import make_ready
from fastalign.models.scoring import prepare
from fastalign.models.snapshot import ReferenceWeights
from fastalign.models.vocabulary import fill_token
from fastalign.objectives.base import ALIGNED, Objective, Totals
from fastalign.options import GivenAdapter
from fastalign.regularizers.base import Regularizer, Step, Term
from fastalign.regularizers.layerwise import split_groups
from fastalign.training.callbacks import install_callbacks
from fastalign.training.evaluation import HeldOutEvaluation
from fastalign.training.guard import FiniteGuard
from fastalign.training.metrics import LoggedMetrics, MetricSums, Throughput
from fastalign.training.out_of_memory import SplitsMicroBatches
from fastalign.training.preflight import check_options, report_lines
from fastalign.training.record import RecordedRuns, given_options
from fastalign.training.reference import Reference, product_dtype, score_with_weights
from fastalign.training.sharded import ShardedTraining
from fastalign.training.start import load_start, start_model, way_of
from fastalign.training.stopping import StopOnSignal, StoppableRuns

if TYPE_CHECKING:
    from fastalign.models.adapters import PeftConfig


def _loaded(
    model: nn.Module | str | Path, dtype: str | torch.dtype, way: GivenAdapter, peft_config: PeftConfig | None,
    quantization: Quantization, double_quantization: bool, quantize_head: bool,
) -> nn.Module:  # fmt: skip
    """The model that training starts from, loaded if it is given by its name."""
    if isinstance(model, (str, Path)):
        return load_start(model, dtype, way, peft_config, quantization, double_quantization, quantize_head)
    if quantization != "none":
        raise ConfigError(f"quantization is {quantization!r}, but the model is loaded already; pass its folder")
    return model


class AlignmentTrainer(
    StoppableRuns, RecordedRuns, SplitsMicroBatches, HeldOutEvaluation, LoggedMetrics, ShardedTraining
):  # fmt: skip
    """What the trainers share; use `PreferenceTrainer`, `SFTTrainer`, `DistillationTrainer` or `RewardTrainer`.

    Args:
        model: A causal language model or PeftModel with its weights, or what `load_model` takes: a folder or a name.
        args: The options.
        train_dataset: Rows in any format of `fastalign.data`, or the path of a file of them.
        eval_dataset: Held-out rows, likewise, or several data sets by name; None: no evaluation.
        processing_class: The tokenizer; None: the one in the model's folder, if `model` is a folder or a name.
        peft_config: Trains an adapter, in float32; None: trains the model, or the adapter that it comes with.
        callbacks: Further callbacks of the Trainer.
        objective: Called with `args`, returns the `Objective` to minimise.
        adapter: "merge" merges an adapter that the model comes with into the weights, which training then starts
            from; "continue" trains it further. None: "merge" with a `peft_config`, else "continue".
        dtype: The dtype of weights that are loaded here; "auto" picks by machine.
        regularizers: What holds the model near what it knew; see `fastalign.regularizers`.
        quantization: Of weights that are loaded here, as for `load_model`; it needs a `peft_config`.
        double_quantization: Likewise.
        quantize_head: Likewise.
        **trainer_options: Further arguments of `transformers.Trainer`.

    Attributes:
        preflight: The report on the training rows.
        layout: How batches are laid out: "shared", "packed" or "padded".
        reference: What the objective compares with; None if it needs no reference.
        origin: What training starts from, in words for the preflight report.
        terms: The regularisers' terms, each called with every micro-batch.
        rates: {id(parameter): factor of its learning rate}, 1 where missing. Regularisers may set it.

    Raises:
        ConfigError: An option or a combination of options would fail later.
        DataError: The rows do not suit the method, or do not fit the model.
        ModelError: The model cannot be loaded or trained.
    """

    # transformers reads this: without it Trainer.training_step divides the loss by the number of micro-batches. The
    # objective has divided it by the totals of the accumulated batch already, see `Totals`.
    loss_is_scaled_for_ga = True
    _load = staticmethod(_loaded)
    args: AlignmentConfig  # this type and those below are wider in transformers.Trainer
    model: nn.Module
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset
    eval_dataset: Dataset | dict[str, Dataset] | None
    data_collator: Collator

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path,
        args: AlignmentConfig,
        train_dataset: Rows | None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        objective: Callable[[Any], Objective],
        adapter: GivenAdapter | None = None,
        dtype: str | torch.dtype = "auto",
        regularizers: Sequence[Regularizer] = (),
        quantization: Quantization = "none",
        double_quantization: bool = False,
        quantize_head: bool = False,
        **trainer_options: Any,
    ):
        limit_onednn_cache()
        check_arguments(trainer_options)
        if train_dataset is None:
            raise ConfigError("train_dataset is None; pass the rows, or the path of a file of them")
        check_options(args, has_eval_rows=eval_dataset is not None)
        way = way_of(adapter, peft_config)
        self.given = given_options(locals(), trainer_options)  # what the caller gave, before it is loaded or changed
        tokenizer = _tokenizer(model, processing_class)
        # Rows before the model, so that a mistake shows before it is loaded; held-out rows first, which are fewer.
        held_out = of_each(eval_dataset, lambda rows, name: self._tokenize(rows, tokenizer, args, name)[0])
        train_dataset, self.preflight = self._tokenize(train_dataset, tokenizer, args)
        model = self._load(model, dtype, way, peft_config, quantization, double_quantization, quantize_head)
        _check_fit(model, train_dataset, held_out)
        model, self.origin = start_model(model, tokenizer, args, peft_config, adapter)
        make_ready(model, tokenizer, disable=args.disable_dropout)
        args = _with_learning_rate(args, model)
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one device; start more with torchrun
        self.objective, self.sums, self.throughput = objective(args), MetricSums(), Throughput()
        super().__init__(model, args, None, train_dataset, held_out, tokenizer, callbacks=callbacks, **trainer_options)
        self.begin_sharded(regularizers)
        self.neftune_noise_alpha = None  # the Trainer would scale its noise by the packed row: see models/noise.py
        # Only now does the model lie on the device where it is trained. `prepare` finds its layout by running it there.
        self.layout: Layout = _layout_of(model, args)
        self.data_collator = self._collator()
        self.writer = install_callbacks(self)
        self.guard, self.stopping = FiniteGuard(self), StopOnSignal(self)
        self.add_callback(self.guard)
        self.add_callback(self.stopping)
        self.reference = self._prepare_reference() if self.objective.needs_reference else None
        self._start: ReferenceWeights | None = None
        self._micro_batches, self._step_rows, self._trained = 0, 0, False
        self.rates: dict[int, float] = {}
        self.terms = [term for term in (regularizer.start(self) for regularizer in regularizers) if term is not None]

    # What a method may change

    def _wanted(self, args: Any) -> str | None:  # args: the method's options, here and below
        """What rows the method trains on; see `wanted` of `fastalign.data.tokenize`."""
        raise NotImplementedError

    def _tokenize(self, rows, tokenizer: PreTrainedTokenizerBase, args: Any, name: str = "train"):
        """The rows as token ids, and the report on them. It runs before `self.args` is set."""
        return tokenized(rows, tokenizer, args, self._wanted(args), name)

    def _collator(self) -> Collator:
        return _collator(self.layout, fill_token(self.processing_class), self.args.device)

    def _prepare_reference(self) -> Reference:
        """The reference: a copy of the weights, scored at every step. `PreferenceTrainer` stores log-probs instead."""
        return Reference(ReferenceWeights(self.model), product_dtype(self.args, self.model))

    def _with_reference(self, dataset: Dataset) -> Dataset:
        """The rows with what the reference has to store for them: nothing, where it is scored at every step."""
        return dataset

    def keep_start(self) -> ReferenceWeights:
        """Returns a copy of the initial weights; reuses the reference's copy if the reference is fixed."""
        if self._start is None:
            shared = self.reference.weights if self.reference and not self.reference.moves else None
            self._start = shared or ReferenceWeights(self.model)
        return self._start

    @property
    def at_start(self) -> bool:
        """Whether the weights are still those that training starts from. A second call of `train` goes on instead."""
        return not self._trained and self.state.global_step == 0

    def preflight_report(self) -> str:
        """What training will start from: rows, tokens, trainable parameters, predicted memory."""
        reference = self.origin.reference if self.reference else "none: the loss compares with nothing"
        lines = [("base", self.origin.base), ("reference", reference), ("trained", self.origin.trained)]
        lines += report_lines(self.model, self.train_dataset, self.args, self.layout)
        return self.preflight.render(lines)

    # Hooks of transformers.Trainer

    def train(self, *args, **kwargs):
        """`transformers.Trainer.train`, after the preflight report is printed."""
        if self.args.should_log and not self.args.disable_tqdm:
            print(printable(self.preflight_report()), flush=True)
        self.throughput.restart()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._trained |= self.state.global_step > 0

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """`transformers.Trainer.create_optimizer`, with a learning rate per layer where a regulariser sets one."""
        optimizer = super().create_optimizer(model)
        if self.rates:
            split_groups(optimizer, self.rates)
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Batch]], device: torch.device) -> Any:
        """The `Totals` of all micro-batches of the coming step; it goes into `compute_loss`, which divides by them."""
        batches = [sample["batch"] for sample in batch_samples]
        if not batches:
            return None
        self._micro_batches, self._step_rows = 0, sum(len(batch.rows) for batch in batches)
        return _step_totals(self.objective, batches, device, self.accelerator)

    def compute_loss(self, model, inputs: Any, return_outputs=False, num_items_in_batch: Any = None):
        """The loss of one micro-batch, a scalar. The losses of a step's micro-batches add up to the step's loss.

        Args:
            model: The model as the Trainer wraps it.
            inputs: `{"batch": Batch}`, what the collator makes.
            return_outputs: Whether to return a pair with an empty dict, as the Trainer expects in evaluations.
            num_items_in_batch: Despite its name the step's `Totals`, which `_get_num_items_in_batch` returned. None:
                the micro-batch counts as a step by itself.
        """
        batch: Batch = inputs["batch"]
        # Reference and regularisers may need scores under the same weights: each copy runs once per micro-batch.
        score_with = functools.cache(partial(score_with_weights, model, batch.packed, **self.args.scoring_options))
        scores = _scores(model, batch, self.args, self.objective, keep_hidden=bool(self.terms))
        reference = None
        if self.reference is not None:
            # The first step checks that the reference gives what the model gives without noise and dropout.
            policy: Any = (score_with(None)[0] if self.at_start and _draws(model, self.args) else scores).logprobs
            reference = self.reference.logprobs(batch, policy, score_with, first=self.at_start)
        totals: Totals = self.objective.totals(batch) if num_items_in_batch is None else num_items_in_batch
        loss, metrics = self.objective(scores.of_objective, reference, batch, totals)
        self.sums.add("train", metrics)
        step = Step(
            model, batch, scores, loss, totals, first=self._micro_batches == 0, rows=self._step_rows or len(batch.rows),
            epoch=self.state.epoch or 0.0, score_start=lambda: score_with(self._start),
        )  # fmt: skip
        self._micro_batches += 1
        loss = _with_terms(step, self.terms, self.sums)
        self.guard.check_loss(loss, batch.rows)
        self.throughput.add(batch)
        return (loss, {}) if return_outputs else loss


def _check_fit(model: nn.Module, train: Dataset, held_out: Any) -> None:
    """Checks that the model can read all rows; the held-out ones may be several data sets by name."""
    inner = causal_lm(model)
    check_fit(train, inner)
    of_each(held_out, lambda rows, _: check_fit(rows, inner))


def _collator(layout: Layout, fill: int, device: torch.device) -> Collator:
    return Collator(layout, fill, multiple=row_multiple(device), device=device)


def _step_totals(objective: Objective, batches: list[Batch], device: torch.device, accelerator: Any) -> Totals:
    """The totals of the micro-batches of one optimiser step, over all processes."""
    columns = zip(*(objective.totals(batch) for batch in batches), strict=True)
    totals = torch.stack([torch.stack(column).sum() for column in columns])
    totals = totals.to(device, non_blocking=True)  # one number per field of Totals
    if accelerator.num_processes > 1:
        # DDP averages gradients over the processes, so each divides by the mean of their totals.
        totals = torch.as_tensor(accelerator.reduce(totals, "sum")) / accelerator.num_processes
    return Totals(*totals.unbind())


def tokenized(
    rows, tokenizer: PreTrainedTokenizerBase, args: AlignmentConfig, wanted: str | None, name: str, **further: Any
):
    """Rows as `fastalign.data.tokenize` makes them with the options of a run. Its errors begin with the rows' name."""
    names = ("max_length", "on_truncate", "on_invalid", "allow_empty_prompt", "apply_chat_template")
    folder = cache_folder(args.token_cache_dir) / "tokens"
    try:
        # Of several processes the first one makes the tokens, and the others find them in the cache.
        with args.main_process_first(desc="tokens"):
            options = {option: getattr(args, option) for option in names}
            return tokenization.tokenize(rows, tokenizer, wanted=wanted, cache_dir=folder, **options, **further)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _layout_of(model: nn.Module, args: AlignmentConfig) -> Layout:
    """Lets the model be called with packed batches; returns how they must be laid out."""
    layout = prepare(model)
    return "packed" if layout == "shared" and not args.share_prompts else layout


def _with_learning_rate(args: AlignmentConfig, model: nn.Module) -> AlignmentConfig:
    """The options with the learning rate that suits what is trained, where none was given; a copy, not in place."""
    if args.learning_rate is None:
        args = copy.copy(args)
        args.learning_rate = args.adapter_rate if has_adapter(model) else args.full_rate
    return args


def _draws(model: nn.Module, args: AlignmentConfig) -> bool:
    """Whether training draws at random on purpose: NEFTune's noise, or the dropout of an adapter."""
    return bool(args.neftune_noise_alpha) or any(lora.dropout > 0 for _, lora in lora_layers(model))


def _scores(model: Any, batch: Batch, args: AlignmentConfig, objective: Objective, *, keep_hidden: bool) -> Any:
    """The `Scores` of a micro-batch; an objective that reads the column `ALIGNED` gets it."""
    scores = model(
        packed=batch.packed, keep_hidden=keep_hidden, statistics=objective.needs_statistics,
        memory_budget=args.memory_budget, noise=args.neftune_noise_alpha, **args.forward_options,
    )  # fmt: skip
    if objective.needs_statistics:
        batch.columns[ALIGNED] = scores.logprobs.detach() - scores.log_sum_sq_probs
    return scores


def _with_terms(step: Step, terms: Sequence[Term], sums: MetricSums) -> Tensor:
    """The loss of a micro-batch plus the regularisers' terms, whose metrics are added to `sums`."""
    loss = step.loss
    for term in terms:
        value, metrics = term(step)
        loss = loss + value
        sums.add("train", metrics)
    return loss


def row_multiple(device: torch.device) -> int:
    """What the length of a packed row is a multiple of. On a GPU, cuBLAS picks its kernels anew for each new length."""
    return 64 if device.type == "cuda" else 1


def _tokenizer(model: nn.Module | str | Path, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one beside a model that is given by its name."""
    if not isinstance(model, (str, Path, nn.Module)):
        raise ConfigError(f"model is of type {type(model).__name__}; pass a model, or the name or folder of one")
    if tokenizer is None and isinstance(model, (str, Path)):
        tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ConfigError("processing_class is None; pass the model's tokenizer")
    return tokenizer
