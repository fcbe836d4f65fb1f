"""The options of a training run: `transformers.TrainingArguments` plus what alignment adds.

Names follow TRL's where the meaning is the same, so that a configuration can be carried over.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from fastalign.errors import ConfigError, FastAlignError, InputError
from fastalign.losses import ALIASES, PAIRWISE, REFERENCE_FREE, UNPAIRED, canonical, pairwise_loss

ON_TRUNCATE = ("error", "drop", "keep_end")
ON_INVALID = ("error", "drop")


def help_field(default: Any, text: str) -> Any:
    """A dataclass field with a default and the sentence that `--help` shows."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": text})


@dataclass
class AlignmentConfig(TrainingArguments):
    """What every fastalign trainer takes, beside the fields of `transformers.TrainingArguments`."""

    output_dir: str | None = help_field("runs/latest", "The run folder: model or adapter, config, metrics, report.")
    learning_rate: float = help_field(1e-6, "AdamW's initial learning rate; 1e-4 or so suits LoRA.")
    logging_steps: float = help_field(10, "Optimiser steps between two logged lines.")
    report_to: str | list[str] | None = help_field("none", "Experiment trackers; none, so nothing leaves the machine.")
    max_length: int | None = help_field(1024, "Most tokens of a prompt with one completion; None for no limit.")
    on_truncate: str = help_field("error", "Rows that are too long: error, drop, or keep_end (cut the prompt's start).")
    on_invalid: str = help_field("error", "Rows with empty, missing or identical fields: error or drop.")
    disable_dropout: bool = help_field(True, "Turn the model's own dropout off; LoRA's dropout is kept.")
    memory_budget: int | None = help_field(None, "Bytes of probability tiles kept for a trainable head; None: 1 GiB.")
    share_prompts: bool = help_field(True, "Lay out each prompt once for all its completions.")
    dataloader_pin_memory: bool = help_field(torch.cuda.is_available(), "Page-locked batches, for a GPU.")
    run_name: str | None = help_field(None, "A name for the run, shown in the report.")

    def __post_init__(self):
        self.remove_unused_columns = False  # the collator reads columns that no forward signature names
        one_of("on_truncate", self.on_truncate, ON_TRUNCATE)
        one_of("on_invalid", self.on_invalid, ON_INVALID)
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; it must hold a prompt and a completion: 2 or more")
        super().__post_init__()
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(f"max_steps is {self.max_steps}; give 1 or more, or -1 for num_train_epochs instead")
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be a finite number, 0 or more")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; no loss here smooths over the vocabulary: "
                "leave it out (label_smoothing is the preference losses' own)"
            )


@dataclass
class SFTConfig(AlignmentConfig):
    """Options of `SFTTrainer`: supervised fine-tuning on completions, assistant turns or plain text."""

    learning_rate: float = help_field(2e-5, "AdamW's initial learning rate; 2e-4 or so suits LoRA.")


@dataclass
class DistillationConfig(SFTConfig):
    """Options of `DistillationTrainer`: `a NLL + (1 - a) tau^2 D(student, teacher)` on data or the student's own."""

    teacher: str | None = help_field(None, "The teacher: a model, `start`, or a .safetensors file of its log-probs.")
    weight: float = help_field(0.5, "a, the weight of the data's NLL; the teacher's is 1 - a.")
    temperature: float = help_field(1.0, "tau, of both distributions.")
    divergence: str = help_field("forward_kl", "D: forward_kl (teacher || student), reverse_kl, or jsd.")
    jsd_beta: float = help_field(0.5, "The teacher's share in jsd.")
    top_k: int | None = help_field(None, "Compute the teacher's k largest log-probs once, and keep them on disk.")
    cache_dir: str | None = help_field(None, "Where they are kept; None: ~/.cache/fastalign.")
    on_policy: float = help_field(0.0, "Share of steps on the student's own samples, from 0 to 1 (GKD's lambda).")
    sample_temperature: float = help_field(1.0, "Temperature of these samples.")
    sample_tokens: int = help_field(128, "Longest sample, in tokens.")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(f"on_policy is {self.on_policy}; it is a share of the steps, from 0 to 1")
        if self.on_policy and (self.top_k or str(self.teacher).endswith(".safetensors")):
            raise ConfigError("on_policy asks the teacher about new samples: give the teacher itself, without top_k")
        if self.sample_tokens < 1 or not 0 < self.sample_temperature < math.inf:
            raise ConfigError(
                f"sample_tokens is {self.sample_tokens} and sample_temperature {self.sample_temperature}; the first "
                "must be at least 1, the second above 0"
            )


@dataclass
class PreferenceConfig(AlignmentConfig):
    """Options of `PreferenceTrainer`: one preference loss, or a weighted mixture, on pairs or on labelled rows."""

    loss_type: str | list[str] = help_field(
        ["dpo"], "One loss or several (a mixture, as in MPO): " + ", ".join([*PAIRWISE, *UNPAIRED]) + ", sft."
    )
    loss_weights: list[float] | None = help_field(None, "One weight a loss of a mixture; None: 1 each.")
    beta: float | None = help_field(None, "Strength of the pull to the reference; None: the loss's own, mostly 0.1.")
    label_smoothing: float | None = help_field(None, "Probability that a preference label is wrong (dpo, robust, ...).")
    alpha: float | None = help_field(None, "Coefficient of the alpha divergence (dpo_alpha).")
    tau: float | None = help_field(None, "Target of the scaled margin (ipo_tau).")
    discopop_tau: float | None = help_field(None, "Temperature of the log-ratio modulation (discopop).")
    gamma_beta_ratio: float | None = help_field(None, "Target margin over beta (simpo).")
    desirable_weight: float = help_field(1.0, "Weight of desirable rows (kto).")
    undesirable_weight: float = help_field(1.0, "Weight of undesirable rows (kto).")
    nll_weight: float | None = help_field(
        None, "Weight of the chosen completions' NLL per token (RPO's alpha); None: 1 for orpo and cpo, else 0."
    )
    nll_over: str = help_field("completion", "Tokens of that NLL: completion, or prompt_and_completion.")
    precompute_ref_log_probs: bool = help_field(
        True, "Compute the reference log-probs once before training, and keep them on disk; False: at every step."
    )
    ref_cache_dir: str | None = help_field(None, "Where they are kept; None: ~/.cache/fastalign.")
    sync_ref_model: bool = help_field(False, "Move the reference towards the model while training (TR-DPO).")
    ref_model_mixup_alpha: float = help_field(0.6, "Share of the model in each such move.")
    ref_model_sync_steps: int = help_field(512, "Optimiser steps between two such moves.")

    def __post_init__(self):
        super().__post_init__()
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = [1.0] * len(names) if self.loss_weights is None else [float(w) for w in self.loss_weights]
        if not names or len(weights) != len(names):
            raise ConfigError(f"loss_weights is {self.loss_weights} for loss_type {names}; give one weight per loss")
        self.loss_type, self.loss_weights = [_loss_name(name) for name in names], weights
        unpaired = [name for name in self.loss_type if name in UNPAIRED]
        if unpaired and len(names) > 1:
            raise ConfigError(f"loss_type is {names}; {unpaired[0]} takes labelled rows, not pairs, and stands alone")
        if self.loss_type == ["sft"]:
            raise ConfigError("loss_type is sft alone; use SFTTrainer, or `fastalign sft`")
        one_of("nll_over", self.nll_over, ("completion", "prompt_and_completion"))
        self._check_loss_options()
        if self.sync_ref_model:
            self._check_sync()

    def _check_loss_options(self) -> None:
        """The losses know which options they take, and in which range: ask them now, not at the first step."""
        names = self.loss_type
        if len(set(names)) < len(names):
            raise ConfigError(f"loss_type {names} names a loss twice; name it once, with the sum of the weights")
        taken = {key for name in names if name != "sft" for key in (PAIRWISE | UNPAIRED)[name].__kwdefaults__}
        if self.unpaired is None:
            taken.add("nll_weight")
        for key in ("label_smoothing", "alpha", "tau", "discopop_tau", "gamma_beta_ratio", "nll_weight"):
            if getattr(self, key) and key not in taken:
                raise ConfigError(f"{key} is {getattr(self, key)}, but {' + '.join(names)} has no such option")
        if self.unpaired and self.nll_over != "completion":
            raise ConfigError(f"nll_over is {self.nll_over!r}, but {self.unpaired} has no NLL term")
        logp, one = torch.full((1,), -1.0), torch.ones(1)
        try:
            if self.unpaired:
                UNPAIRED[self.unpaired](logp, logp, one.bool(), 0.0, **self.unpaired_options)
            else:
                pairwise_loss(
                    list(self.pairwise), list(self.pairwise.values()), logp, logp, logp, logp,
                    lengths_chosen=one, lengths_rejected=one, options=self.loss_options,
                )  # fmt: skip
        except InputError as error:
            raise ConfigError(str(error)) from None

    def _check_sync(self) -> None:
        if self.precompute_ref_log_probs:
            raise ConfigError("sync_ref_model moves the reference: set precompute_ref_log_probs=False with it")
        if not self.needs_reference:
            raise ConfigError(f"sync_ref_model is True, but {' + '.join(self.loss_type)} has no reference to move")
        if self.ref_model_sync_steps < 1 or not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ConfigError(
                f"ref_model_sync_steps is {self.ref_model_sync_steps} and ref_model_mixup_alpha "
                f"{self.ref_model_mixup_alpha}; the first must be at least 1, the second from 0 to 1"
            )

    @property
    def pairwise(self) -> dict[str, float]:
        """Weight of each loss over pairs."""
        return {n: w for n, w in zip(self.loss_type, self.loss_weights, strict=True) if n in PAIRWISE}

    @property
    def unpaired(self) -> str | None:
        """The loss over labelled rows, if it is one."""
        return self.loss_type[0] if self.loss_type[0] in UNPAIRED else None

    @property
    def needs_reference(self) -> bool:
        return self.unpaired is not None or not REFERENCE_FREE.issuperset(self.pairwise)

    @property
    def nll_coefficient(self) -> float:
        """Weight of the NLL term, `sft` of a mixture included."""
        named = sum(w for n, w in zip(self.loss_type, self.loss_weights, strict=True) if n == "sft")
        if self.nll_weight is not None:
            return self.nll_weight + named
        return named + (1.0 if {"orpo", "cpo"} & set(self.loss_type) else 0.0)

    @property
    def loss_options(self) -> dict[str, float]:
        """What the losses over pairs are called with: the options that were set."""
        names = ("beta", "label_smoothing", "alpha", "tau", "discopop_tau", "gamma_beta_ratio")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def unpaired_options(self) -> dict[str, Any]:
        """What the loss over labelled rows is called with."""
        beta = {} if self.beta is None else {"beta": self.beta}
        weights = {"weights": (self.desirable_weight, self.undesirable_weight)} if self.unpaired == "kto" else {}
        return beta | weights

    @property
    def reward_beta(self) -> float:
        """beta of the implicit rewards that are logged: the first loss's own where none is set."""
        first = next(name for name in self.loss_type if name != "sft")
        return (PAIRWISE | UNPAIRED)[first].__kwdefaults__["beta"] if self.beta is None else self.beta


def _loss_name(name: str) -> str:
    if name in UNPAIRED or name == "sft":
        return name
    try:
        return canonical(name)
    except InputError:
        known = [*PAIRWISE, *UNPAIRED, "sft", *ALIASES]
        raise ConfigError(f"loss_type {name!r} is unknown; {nearest(name, known)}") from None


def one_of(option: str, value: object, allowed: Iterable[str]) -> None:
    """ConfigError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(f"{option} is {value!r}; {nearest(str(value), allowed)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?', or the list of what there is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"


def from_mapping(cls: type, options: Mapping[str, Any]) -> Any:
    """An instance of a config dataclass from plain values (YAML, command line), each checked and converted.

    ConfigError names an unknown key with the nearest known one, and a value that does not fit its type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls) if f.init}
    values = {}
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"Unknown option {key!r} of {cls.__name__}; {nearest(key, known)}")
        values[key] = convert(key, value, known[key])
    if missing := [key for key in needed if key not in values]:
        raise ConfigError(f"{missing[0]} of {cls.__name__} is missing; give {', '.join(needed)}")
    try:
        return cls(**values)
    except FastAlignError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # of TrainingArguments
        raise ConfigError(" ".join(str(error).split())) from error


def convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` says, where nothing is lost: 1 to 1.0, "1e-4" (a string to YAML) to 0.0001."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = [typing.get_origin(option) or option for option in options]
    if value is None and type(None) in plain:
        return None
    for option, of in zip(options, plain, strict=True):
        if of is list and isinstance(value, list) and typing.get_args(option):
            return [convert(key, item, *typing.get_args(option)) for item in value]
        if isinstance(of, type) and isinstance(value, of) and (of is bool or not isinstance(value, bool)):
            return value
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        for target in (int, float):
            if target in plain:
                try:
                    return target(value)
                except ValueError:
                    continue
    members = {name for of in plain for name in getattr(of, "__members__", ())}
    if value is False and "NO" in members:
        return "no"  # which YAML reads as False
    if all(isinstance(of, type) for of in plain) and not members:
        expected = " or ".join("None" if of is type(None) else of.__name__ for of in plain)
        raise ConfigError(f"{key} is {value!r}; expected {expected}")
    return value  # an enumeration or a rarer type: TrainingArguments converts and checks it
