"""The trainer of online methods: the model answers prompts, rewards judge the answers, the model learns from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastalign.config.online import OnlineConfig
from fastalign.data.loading import Rows
from fastalign.data.packing import lay_out
from fastalign.data.prompt_rows import tokenize_prompts
from fastalign.errors import ConfigError, DataError
from fastalign.losses.advantages import group_relative, leave_one_out
from fastalign.models.adapters import lora_layers
from fastalign.models.fit import positions_of
from fastalign.models.modes import evaluation_mode
from fastalign.objectives.base import Metrics, mean_of
from fastalign.objectives.policy import PolicyObjective
from fastalign.regularizers.base import Regularizer, Step
from fastalign.rewards.functions import RewardFunction, Rewards, load_reward
from fastalign.rollout.engine import Engine, Rollout, Sampling
from fastalign.rollout.in_process import InProcess
from fastalign.training.policy_kl import PolicyKL
from fastalign.training.preflight import check_config, report_lines
from fastalign.training.samples import judged_rows, sample_metrics
from fastalign.training.state_files import load_state
from fastalign.training.trainer import AlignmentTrainer

if TYPE_CHECKING:
    from fastalign.models.adapters import PeftConfig


class OnlineTrainer(AlignmentTrainer):
    """GRPO and its relatives, and RLOO, as `args.loss_type` says; see `OnlineConfig`.

    Each step the model answers prompts `num_generations` times, and reward functions judge the answers. Those that are
    better than the others to the same prompt become more likely.

    Args:
        model: The policy; this and all further arguments are those of `AlignmentTrainer`.
        args: The options; None: the defaults.
        train_dataset: Must be given: rows with a column `prompt`. All columns reach the reward functions.
        eval_dataset: Held-out prompts: one answer to each, at the temperature of training, is judged.
        processing_class: The tokenizer; None: the one beside the model.
        peft_config: Trains an adapter.
        callbacks: Further callbacks.
        reward_funcs: Reward functions in TRL's form, `(prompts, completions, **columns) -> list`, or names as
            `args.reward_funcs` takes them; None: those of the options.
        engine: What samples the answers; None: this process does.
        regularizers: Further regularisers.
        **trainer_options: Further arguments of `AlignmentTrainer`.

    Raises:
        ConfigError: There is no reward, or an option or a combination of options would fail later.
        DataError: The rows have no prompts, or these do not fit the model.
        ModelError: The model cannot be loaded or trained.
    """

    args: OnlineConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path,
        args: OnlineConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str] | None = None,
        engine: Engine | None = None,
        regularizers: Sequence[Regularizer] = (),
        **trainer_options: Any,
    ):
        args = OnlineConfig() if args is None else args
        check_config(args, OnlineConfig)
        given = args.reward_funcs if reward_funcs is None else reward_funcs
        given = [given] if isinstance(given, str) or callable(given) else list(given or ())
        functions = [load_reward(function) if isinstance(function, str) else function for function in given]
        self.rewards = Rewards(functions, args.reward_weights)
        self._given: list[Dataset] = []  # the rows as they were given, for the reward functions
        self._starts: list[int] = [0]  # the number of the first row of each data set
        self._engine = engine
        self._held: list[list[dict]] | None = None  # the judged rows of each micro-batch, while they are trained on
        if args.beta:
            regularizers = [*regularizers, PolicyKL(args.beta, args.kl_target, args.temperature)]
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            objective=PolicyObjective, regularizers=regularizers, **trainer_options,
        )  # fmt: skip
        self.terms.append(_entropy)
        self._check_start()

    def _check_start(self) -> None:
        """ConfigError and DataError for what would fail in the first step, or be wrong without a sign."""
        if self.args.world_size > 1:
            raise ConfigError(
                f"Learning from rewards runs in one process, and {self.args.world_size} were started: their answers "
                "have not been compared with those of one process. Start it without torchrun or accelerate."
            )
        longest, room = max(map(len, self.train_dataset["prompt_ids"])), self.args.max_completion_length
        positions = positions_of(self.model)
        if longest + room > positions:
            raise DataError(
                f"The longest prompt has {longest:,} tokens, and answers up to {room:,}, but the model has "
                f"{positions:,} positions: lower max_completion_length or max_length."
            )
        if any(lora.dropout > 0 for _, lora in lora_layers(self.model)):
            raise ConfigError(
                "The adapter has dropout, so the log-probs that are trained would differ from those that drew the "
                "answers: set lora_dropout=0"
            )

    # Data

    def _tokenize(self, rows, tokenizer: PreTrainedTokenizerBase, args: OnlineConfig, name: str = "train"):
        """The prompts as token ids, each with the number of the row that it comes from."""
        most = None if args.max_length is None else args.max_length - args.max_completion_length
        try:
            dataset, given, report = tokenize_prompts(
                rows, tokenizer, max_prompt_length=most, on_truncate=args.on_truncate, on_invalid=args.on_invalid,
                apply_chat_template=args.apply_chat_template,
            )  # fmt: skip
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        start = self._starts[-1]
        dataset = dataset.remove_columns("row").add_column("row", [number + start for number in dataset["row"]])
        self._given.append(given)
        self._starts.append(start + len(given))
        return dataset, report

    def _row(self, number: int) -> dict[str, Any]:
        """A row as it was given."""
        place = bisect_right(self._starts, number) - 1
        return self._given[place][number - self._starts[place]]

    def preflight_report(self) -> str:
        """What training will start from. The predicted memory is that of answers of the greatest length."""
        size, count = self.args.per_device_train_batch_size, self.args.num_generations
        longest = max(self.train_dataset["prompt_ids"], key=len)
        answers = [[0] * self.args.max_completion_length] * count
        rows: Any = [{"prompt_ids": longest, "completion_ids": answers}] * size
        lines = [("base", self.origin.base), ("trained", self.origin.trained)]
        lines += [("answers", f"{count} to each prompt, judged by {', '.join(self.rewards.names)}")]
        return self.preflight.render(lines + report_lines(self.model, rows, self.args, self.layout))

    # Samples

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimiser step: answers of the model, with their advantages.

        With `num_iterations` above 1 the same answers are used for as many steps.

        Args:
            epoch_iterator: The data loader's iterator.
            num_batches: Micro-batches per optimiser step.
            device: Where the totals go.

        Returns:
            The micro-batches, and the `Totals` that their losses are divided by.
        """
        samples, totals = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, totals
        first = self.state.global_step % self.args.num_iterations == 0
        if first or self._held is None:
            self.restore_random_state()  # a resumed run draws its first answers here
            self._held = self._judged([sample["batch"].rows for sample in samples])
        rows = [[_without_old(row) for row in batch] for batch in self._held] if first else self._held
        samples = [{**self.data_collator(batch)} for batch in rows]
        for sample in samples:
            sample["batch"].sampled = True
        return samples, self._get_num_items_in_batch(samples, device)

    def _judged(self, batches: list[list[dict]]) -> list[list[dict]]:
        """The rows of each micro-batch with sampled answers and their advantages."""
        rows, args = [row for batch in batches for row in batch], self.args
        rollouts = self._answers([row["prompt_ids"] for row in rows], args.num_generations)
        rewards = self._rewarded(rollouts, rows)  # (G, k, functions)
        total = self.rewards.total(rewards.flatten(0, 1)).view(len(rows), -1)
        policy = args.policy
        advantages = leave_one_out(total) if policy.leave_one_out else group_relative(total, policy.scale)
        self._add_metrics("train", sample_metrics(rollouts, rewards, total, self.rewards.names))
        sizes, judged, start = list(map(len, batches)), [], 0
        for size in sizes:
            part = slice(start, start + size)
            judged.append(
                judged_rows(
                    rollouts[part], total[part], advantages[part], keep_all=bool(args.beta),
                    drop_truncated=args.mask_truncated_completions,
                )
            )  # fmt: skip
            start += size
        if args.num_iterations > 1:
            for batch in judged:
                self._add_old(batch)
        return judged

    def _answers(self, prompts: list[list[int]], k: int) -> list[Rollout]:
        """K answers to each prompt under the present weights."""
        model = self.accelerator.unwrap_model(self.model)
        if self._engine is None:
            self._engine = InProcess(model, self.processing_class)
        self._engine.sync(model)
        return self._engine.generate(prompts, k, Sampling(self.args.max_completion_length, self.args.temperature))

    def _rewarded(self, rollouts: list[Rollout], rows: list[dict]) -> Tensor:
        """(G, k, functions) the rewards of all answers."""
        given = [self._row(int(row["row"])) for row, rollout in zip(rows, rollouts, strict=True)
                 for _ in rollout.completion_ids]  # fmt: skip
        ids = [tokens for rollout in rollouts for tokens in rollout.completion_ids]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        prompts = [row["prompt"] for row in given]
        completions: list[Any] = [
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {name: [row[name] for row in given] for name in given[0] if name not in ("prompt", "completion")}
        found = self.rewards(prompts, completions, completion_ids=ids, trainer_state=self.state, **columns)
        return found.view(len(rollouts), -1, found.shape[1])

    @torch.no_grad()
    def _add_old(self, rows: list[dict]) -> None:
        """Adds the log-probs under the present weights, which later steps on these answers compare with."""
        packed = lay_out(rows, self.layout, self.data_collator.pad_token_id).to(self.args.device)
        with evaluation_mode(self.model), self.accelerator.autocast():
            logprobs = self.model(packed=packed, temperature=self.args.temperature).logprobs
        parts = iter(logprobs.split(packed.cu_seqlens.diff().tolist()))
        for row in rows:
            row["old_logprobs"] = [next(parts).tolist() for _ in row["completion_ids"]]

    def _add_metrics(self, mode: Any, metrics: Metrics) -> None:
        device = self.args.device  # where the metrics of the objective are, which join them
        self.sums.add(mode, {name: (a.to(device), b.to(device)) for name, (a, b) in metrics.items()})

    # Held-out prompts

    def prediction_step(self, model, inputs: Any, prediction_loss_only, ignore_keys=None):
        """One answer to each held-out prompt. The loss is minus their mean reward; the metrics wait for `log`.

        Args:
            model: Not used: the engine answers.
            inputs: What the collator returns: {"batch": Batch}.
            prediction_loss_only: Has no effect.
            ignore_keys: Has no effect.

        Returns:
            (loss, None, None).
        """
        rows = inputs["batch"].rows
        rollouts = self._answers([row["prompt_ids"] for row in rows], 1)
        rewards = self._rewarded(rollouts, rows)
        total = self.rewards.total(rewards.flatten(0, 1)).view(len(rows), 1)
        metrics = sample_metrics(rollouts, rewards, total, self.rewards.names)
        reward, count = metrics["reward"]
        self._add_metrics("eval", {**metrics, "loss": (-reward, count)})
        return -reward / count, None, None

    # Checkpoints

    def _process_state(self) -> dict[str, Any]:
        # Between two steps on the same answers, a resumed run needs them.
        held = self._held if self.state.global_step % self.args.num_iterations else None
        return {**super()._process_state(), "held": held}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = load_state(Path(checkpoint), f"process-{self.args.process_index}")
            self._held = state.get("held")


def _entropy(step: Step) -> tuple[Tensor, Metrics]:
    """A term that adds nothing to the loss: the entropy of the distributions that draw tokens, as a metric."""
    assert step.scores.entropy is not None, "the configuration asks for entropies"
    return step.loss.new_zeros(()), {"entropy": mean_of(step.scores.entropy)}


def _without_old(row: dict) -> dict:
    """The row at the first step on its answers: there the old log-probs are the log-probs themselves."""
    return {name: value for name, value in row.items() if name != "old_logprobs"}
