"""The trainers: `transformers.Trainer` with packed batches, log-probs from the model's own forward, an objective."""

from __future__ import annotations

import functools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastalign.config.base import AlignmentConfig
from fastalign.data import tokenization
from fastalign.data.batch import Batch
from fastalign.data.collate import Collator
from fastalign.data.packing import PackedBatch, lay_out, pad_to_multiple
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.memory import measure
from fastalign.models.adapters import add_adapter, causal_lm, has_adapter
from fastalign.models.fit import check_fit
from fastalign.models.head import output_head, token_divergence
from fastalign.models.linear import keep_few_primitives
from fastalign.models.loading import load_model, load_tokenizer
from fastalign.models.modes import evaluation_mode
from fastalign.models.ready import adopt_special_tokens, check_trainable, disable_dropout
from fastalign.models.scoring import prepare
from fastalign.models.snapshot import ReferenceWeights, fingerprint
from fastalign.objectives.base import Totals
from fastalign.regularizers.base import Step, count_of
from fastalign.regularizers.layerwise import split_groups
from fastalign.training.callbacks import MetricsWriter, Progress
from fastalign.training.reference import precompute

if TYPE_CHECKING:
    from fastalign.models.adapters import PeftConfig

_MOVING = "fastalign.safetensors"  # in a checkpoint


logger = logging.getLogger("fastalign")


class AlignmentTrainer(Trainer):
    """What the trainers share; use `PreferenceTrainer` or `SFTTrainer`.

    model: a causal language model with its weights, or what `load_model` takes (a folder, a hub name, a packaged
        model). peft_config: trains an adapter, kept in float32; None trains the model, or the adapter it comes with.
    dtype: of the weights that are loaded here. train_dataset, eval_dataset: rows in any format of `fastalign.data`, or
        the path of a file of them.
    processing_class: the tokenizer; None loads the one beside the model.
    objective: builds what is minimised from `args`. regularizers: what holds the model near what it knew, see
        `fastalign.regularizers`.

    FastAlignError, before any training step, for whatever would fail later; `preflight` holds the data report.
    """

    # The objective has divided by the totals of the accumulated batch already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path,
        args: AlignmentConfig,
        train_dataset,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        objective: Callable,
        dtype: str | torch.dtype = "auto",
        regularizers: Sequence = (),
        **trainer_options,
    ):
        keep_few_primitives()
        if processing_class is None and isinstance(model, (str, Path)):
            processing_class = load_tokenizer(model)
        if processing_class is None:
            raise ConfigError("processing_class is None; pass the model's tokenizer")
        if eval_dataset is None and args.eval_strategy != "no":
            raise ConfigError(f"eval_strategy is {args.eval_strategy.value!r}, but there is no eval_dataset: give one")
        _check_optimizer(args)
        # The data before the model, which takes longer to load.
        train_dataset, self.preflight = self._tokenise(train_dataset, processing_class, args)
        if eval_dataset is not None:
            eval_dataset, _ = self._tokenise(eval_dataset, processing_class, args)
        if isinstance(model, (str, Path)):
            model = load_model(model, dtype=dtype, for_adapter=peft_config is not None)
        for dataset in (train_dataset, eval_dataset or ()):
            check_fit(dataset, causal_lm(model))
        if peft_config is not None:
            model = add_adapter(model, peft_config, args.seed)
        check_trainable(model)
        if args.disable_dropout:
            disable_dropout(model)
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one device; start more with torchrun
        adopt_special_tokens(causal_lm(model), processing_class)
        self.objective = objective(args)
        self._sums: dict[str, dict] = {"train": defaultdict(lambda: 0), "eval": defaultdict(lambda: 0)}
        self._tokens, self._clock, self.tokens_seen = 0, time.monotonic(), 0
        super().__init__(
            model, args, None, train_dataset, eval_dataset, processing_class, callbacks=callbacks, **trainer_options
        )
        # Once it lies where it will be trained: what fits it is found by running it, by the kernels that training uses.
        self.layout = self._find_layout(model)
        self.data_collator = self._collator()
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.add_callback(MetricsWriter(Path(args.output_dir) / "metrics.jsonl"))
        if not args.disable_tqdm:
            self.add_callback(Progress())
        self.reference = self._prepare_reference() if self.objective.needs_reference else None
        self._start: ReferenceWeights | None = None
        self._micro_batches, self._step_rows = 0, None
        self.rates: dict[int, float] = {}  # of the learning rate, by a parameter's id
        self.terms = [term for term in (regularizer.start(self) for regularizer in regularizers) if term is not None]

    # Data

    def _find_layout(self, model: nn.Module) -> str:
        layout = prepare(model)
        return "packed" if layout == "shared" and not self.args.share_prompts else layout

    def _collator(self) -> Collator:
        tokenizer = self.processing_class
        pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
        score_prompts = getattr(self.args, "nll_over", "completion") == "prompt_and_completion"
        if score_prompts and self.layout == "padded":
            raise ConfigError("nll_over='prompt_and_completion' needs a model that can be packed; use 'completion'")
        multiple = 64 if self.args.device.type == "cuda" else 1
        return Collator(self.layout, pad_token_id, score_prompts=score_prompts, multiple=multiple)

    def _tokenise(self, rows, tokenizer, args: AlignmentConfig):
        dataset, report = tokenization.tokenize(
            rows, tokenizer, max_length=args.max_length, on_truncate=args.on_truncate, on_invalid=args.on_invalid
        )
        self._check_rows(dataset, report.format)
        return dataset, report

    def _check_rows(self, dataset, found: str) -> None:
        raise NotImplementedError

    # Reference

    def _prepare_reference(self) -> ReferenceWeights | None:
        """Keep the weights in hand as the reference: a copy where adapters make it small, log-probs of every row."""
        args = self.args
        adapter = has_adapter(self.model)
        weights = ReferenceWeights(self.model) if adapter or not args.precompute_ref_log_probs else None
        if args.precompute_ref_log_probs:
            key = fingerprint(self.model, str(self._autocast_dtype()))
            self.train_dataset = precompute(self.train_dataset, self._score, key, args.ref_cache_dir)
            if self.eval_dataset is not None and weights is None:  # a copy is asked anyway, for the KL
                self.eval_dataset = precompute(self.eval_dataset, self._score, key, args.ref_cache_dir)
        return weights

    def _autocast_dtype(self) -> torch.dtype | None:
        """What products are rounded to (bf16=True, fp16=True), if not to the weights' dtype."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    @torch.no_grad()
    def _score(self, rows: list[dict]) -> tuple[PackedBatch, Tensor]:
        packed = lay_out(rows, self.layout, self.data_collator.pad_token_id)
        packed = pad_to_multiple(packed, self.data_collator.multiple)
        # Autocast wraps the model's forward only once training starts.
        with evaluation_mode(self.model), self.accelerator.autocast():
            scores = self.model(packed=packed.to(self.args.device))
        return packed, scores.logprobs

    def keep_start(self) -> ReferenceWeights:
        """The weights that training starts from, kept for regularisers to compare with."""
        if self._start is None:
            moves = getattr(self.args, "sync_ref_model", False)
            self._start = self.reference if self.reference and not moves else ReferenceWeights(self.model)
        return self._start

    @torch.no_grad()
    def _under(self, model: nn.Module, packed: PackedBatch, weights: ReferenceWeights | None):
        """Scores and output layer under other weights, by a forward pass over the same batch, without dropout."""
        with evaluation_mode(model), weights.in_place() if weights else nullcontext():
            scores = model(packed=packed, keep_hidden=True)
            return scores, output_head(causal_lm(model)).detach()

    def _reference_logprobs(self, batch: Batch, logprobs: Tensor, under: Callable) -> Tensor | None:
        if not self.objective.needs_reference:
            return None
        scored = logprobs.shape[0] - batch.prompt_tokens
        if batch.ref_logprobs is not None and self.state.global_step > 0:
            return batch.ref_logprobs
        now = under(self.reference)[0].logprobs[:scored]
        if self.state.global_step == 0:
            self._check_start(now, logprobs.detach()[:scored], batch.ref_logprobs)
        return now

    def _check_start(self, reference: Tensor, policy: Tensor, stored: Tensor | None) -> None:
        """Before the first update, policy and reference are the same weights: margins are exactly 0. On a GPU they may
        be 0 within rounding: the library that multiplies chooses kernels by more than the numbers.
        """
        off, limit = (policy - reference).abs().max().item(), start_rounding(policy.device)
        if not off <= limit:
            within = f" within {limit:.3g}" if limit else ""
            raise ModelError(
                f"Before the first step the model's log-probs differ from the reference's by {off:.3g}; they must be "
                f"equal{within}. The model is not deterministic: set disable_dropout=True, "
                "or turn off what draws at random."
            )
        if stored is None:
            return
        # Another batch, another rounding: what eps leaves of log-probs after a deep model in its dtype.
        dtype = self._autocast_dtype() or next(self.model.parameters()).dtype
        limit = max(torch.finfo(dtype).eps, torch.finfo(stored.dtype).eps) ** 0.5 * 10
        off = (stored - reference).abs().max().item()
        if not off <= limit:
            raise DataError(
                f"Stored reference log-probs are off by {off:.3g} (at most {limit:.3g} would be rounding): delete the "
                f"cache folder {self.args.ref_cache_dir or '~/.cache/fastalign'} and start again."
            )

    # Loss and metrics

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """`transformers.Trainer.create_optimizer`, with a learning rate a layer where one is set."""
        optimizer = super().create_optimizer(model)
        if self.rates:
            split_groups(optimizer, self.rates)
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Totals | None:
        totals = [self.objective.totals(sample["batch"]) for sample in batch_samples]
        if not totals:
            return None
        self._micro_batches, self._step_rows = 0, sum(len(sample["batch"].rows) for sample in batch_samples)
        sums = [torch.stack(list(column)).sum().to(device) for column in zip(*totals, strict=True)]
        if self.args.world_size > 1:
            sums = [self.accelerator.reduce(total, "sum") / self.args.world_size for total in sums]
        return Totals(*sums)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch: Batch = inputs["batch"]
        under = functools.cache(partial(self._under, model, batch.packed))
        scores = model(packed=batch.packed, keep_hidden=bool(self.terms), memory_budget=self.args.memory_budget)
        reference = self._reference_logprobs(batch, scores.logprobs, under)
        totals = num_items_in_batch or self.objective.totals(batch)
        loss, metrics = self.objective(scores.logprobs, reference, batch, totals)
        self._record("train", metrics)
        if self.terms:
            loss = self._regularise(model, batch, scores, loss, totals, under)
        tokens = batch.packed.input_ids.numel() - batch.packed.filling
        self._tokens += tokens
        self.tokens_seen += tokens
        return (loss, {}) if return_outputs else loss

    def _regularise(self, model, batch, scores, loss, totals, under) -> Tensor:
        step = Step(
            model, batch, scores, loss, totals,
            first=self._micro_batches == 0, rows=self._step_rows or len(batch.rows), epoch=self.state.epoch or 0.0,
            at_start=lambda: under(self._start),
        )  # fmt: skip
        self._micro_batches += 1
        for term in self.terms:
            value, metrics = term(step)
            loss = loss + value
            self._record("train", metrics)
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss and metrics of one held-out batch; with a copy of the reference at hand, the exact KL to it as well."""
        batch: Batch = self._prepare_inputs(inputs)["batch"]
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = model(packed=batch.packed, keep_hidden=True)
            ref_logprobs = batch.ref_logprobs
            if self.reference is not None:
                reference, ref_head = self._under(model, batch.packed, self.reference)
                ref_logprobs = reference.logprobs[: scores.logprobs.shape[0] - batch.prompt_tokens]
                head = output_head(causal_lm(model))
                kl = token_divergence(scores.hidden, head, reference.hidden, ref_head, divergence="reverse_kl")
                self._record("eval", {"kl": (kl.sum(dtype=torch.float64), count_of(kl))})
            totals = self.objective.totals(batch)
            loss, metrics = self.objective(scores.logprobs, ref_logprobs, batch, totals)
            # the Trainer's own mean gives a short last batch a full one's weight
            weight = self.objective.weight(totals)
            self._record("eval", {**metrics, "loss": (loss * weight, weight)})
        return loss.detach(), None, None

    def _record(self, mode: str, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, pair in metrics.items():
            self._sums[mode][name] = self._sums[mode][name] + torch.stack([part.detach().double() for part in pair])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics gathered since the last line: the one place where they leave the device."""
        mode, prefix = ("eval", "eval_") if "eval_loss" in logs else ("train", "")
        sums = self._sums[mode]
        if sums:
            values = torch.stack(list(sums.values())).tolist()
            means = {prefix + n: s / c for n, (s, c) in zip(sums, values, strict=True) if c}
            chosen, rejected = (means.get(f"{prefix}rewards/{side}") for side in ("chosen", "rejected"))
            if chosen is not None and rejected is not None:
                means.setdefault(f"{prefix}rewards/margins", chosen - rejected)
            logs = {**logs, **means}
            sums.clear()
        if mode == "train" and "loss" in logs:
            now = time.monotonic()
            logs["tokens_per_second"] = self._tokens / max(now - self._clock, 1e-9)
            logs["memory_gb"] = measure.peak_bytes(self.args.device) / 1e9
            self._tokens, self._clock = 0, now
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """`transformers.Trainer.evaluate`; the metrics returned include the objective's, as they were logged."""
        metrics = super().evaluate(*args, **kwargs)
        return {**metrics, **{k: v for k, v in self.state.log_history[-1].items() if k.startswith("eval_")}}

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle

    def _moving(self) -> dict[str, Tensor]:
        """What changes while training beside what a checkpoint holds."""
        return {name: value for term in self.terms for name, value in getattr(term, "state", {}).items()}

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save and (tensors := self._moving()):
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_file({name: value.contiguous() for name, value in tensors.items()}, folder / _MOVING)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / _MOVING
        saved = load_file(path) if path.exists() else {}
        for name, value in self._moving().items():
            if name in saved:
                value.copy_(saved[name])

    def train(self, *args, **kwargs):
        """`transformers.Trainer.train`, with the preflight report in front."""
        if self.args.should_log and not self.args.disable_tqdm:
            print(self.preflight_report(), flush=True)
        self._clock = time.monotonic()
        return super().train(*args, **kwargs)

    def _tokens_of(self, row: dict) -> int:
        prompts = 1 if self.layout == "shared" else len(row["completion_ids"])
        return prompts * len(row["prompt_ids"]) + sum(map(len, row["completion_ids"]))

    def preflight_report(self) -> str:
        """What training will start from: rows, tokens, trainable parameters, predicted memory."""
        rows = [self.train_dataset[i] for i in range(len(self.train_dataset))]
        size = self.args.per_device_train_batch_size
        longest = sorted(map(self._tokens_of, rows))[-size:]
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        predicted = measure.predict(self.model, tokens=sum(longest), checkpointing=self.args.gradient_checkpointing)
        how = {"shared": "packed, each prompt once", "packed": "packed, a prompt a completion", "padded": "padded rows"}
        return self.preflight.render([
            ("batches", f"{size} x {self.args.gradient_accumulation_steps} rows a step, {how[self.layout]}"),
            ("trainable", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"),
            ("predicted memory", f"{predicted / 1e9:.2f} GB at the longest batch ({sum(longest):,} tokens)"),
        ])  # fmt: skip


def start_rounding(device: torch.device) -> float:
    """How far log-probs of the same weights, with and without gradients, may be apart: nothing on the CPU."""
    return 0.0 if device.type == "cpu" else 1e-4


def _check_optimizer(args: AlignmentConfig) -> None:
    """Whatever `optim` needs is there: the Trainer would look only when training starts."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ConfigError(
            f"optim is {str(args.optim)!r}, and cannot run here: {' '.join(str(error).split())}"
        ) from error
    except ValueError:  # it is asked without the model here, which some optimisers want
        return
