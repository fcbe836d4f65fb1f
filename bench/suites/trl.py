"""Suite `trl`: one step of TRL's DPOTrainer on SmolLM2-135M-Instruct, as it is and after `fastalign.compat.trl.enable`.

A step is `training_step`: forward of policy and reference, all metrics, backward. The optimiser is left out, because
the weights must stay the same for the next run. The runs of one case take turns on the same batch. The loss of every
implementation must agree with TRL's, and so must each metric that is not switched off.
"""

from __future__ import annotations

import copy
import importlib
import math
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from bench.harness.measure import Checked, Measurement, Missing, Outputs, WrongResult, measure
from bench.harness.suite import by_name
from bench.suites.train import LORA, MODEL, PROFILES, rows
from fastalign.compat.trl import enable

PAIRS = 2
AGREE = 1e-5  # nats, and for metrics relative to their size: one wrong token in 500 would be 2e-3
WITHOUT_ENTROPY = "TRL + fastalign, no entropy"
IMPLEMENTATIONS: dict[str, Callable[[], Any]] = {
    "TRL": nullcontext,
    "TRL + fastalign": enable,
    WITHOUT_ENTROPY: lambda: enable(entropy=False),
}


@dataclass(frozen=True)
class Case:
    """A case: `tuning` is "lora" or "full", in float32; `checkpointing` is TRL's default."""

    tuning: str
    profile: str
    checkpointing: bool

    @property
    def name(self) -> str:
        """The name in records and on the command line."""
        return f"{self.tuning}-{self.profile}{'-checkpointing' if self.checkpointing else ''}"


CASES = by_name(Case(*parts) for parts in product(("lora", "full"), PROFILES, (False, True)))
QUICK = {"lora-dialogue": CASES["lora-dialogue"]}


def make_trainer(case: Case, model: Any, tokenizer: Any, data: list[dict[str, str]], folder: str) -> Any:
    """TRL's trainer, with the reference computed in each step, as by default.

    Raises:
        Missing: TRL is not installed.
    """
    try:
        trl = importlib.import_module("trl")
    except ImportError as error:
        raise Missing(f"{error}; pip install 'fastalign[bench]'") from error
    from datasets import Dataset
    from peft import LoraConfig

    config = trl.DPOConfig(
        output_dir=folder, per_device_train_batch_size=PAIRS, bf16=False, use_cpu=True, max_length=None,
        gradient_checkpointing=case.checkpointing, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    lora = case.tuning == "lora"
    return trl.DPOTrainer(
        model=model, ref_model=None if lora else copy.deepcopy(model), args=config,
        train_dataset=Dataset.from_list(data), processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if lora else None,
    )  # fmt: skip


def candidate(name: str, trainer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], Outputs]:
    """A function that computes one step, and returns its loss and its metrics."""

    def run() -> Outputs:
        trainer.model.zero_grad(set_to_none=True)
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0  # a count over all steps
        with IMPLEMENTATIONS[name]():
            loss = trainer.training_step(trainer.model, dict(batch))
        metrics = {name: torch.tensor(values) for name, values in trainer._metrics["train"].items()}
        return {"loss": loss.reshape(1)} | metrics

    return run


def check(name: str, outputs: Outputs, trls: Outputs) -> Checked:
    """The largest distances from TRL's outputs.

    Raises:
        WrongResult: one is too large, or an output is missing.
    """
    if outputs.keys() != trls.keys():
        raise WrongResult(f"it has {sorted(outputs)}, TRL {sorted(trls)}")
    errors = {}
    for output, value in outputs.items():
        if output == "entropy" and name == WITHOUT_ENTROPY:
            continue
        scale = 1.0 if output == "loss" else max(1.0, float(trls[output].abs().max()))
        errors[output] = float((value - trls[output]).abs().max()) / scale
        if not errors[output] <= AGREE or math.isnan(errors[output]):
            raise WrongResult(f"{output} is off by {errors[output]:.2g}, more than {AGREE:.2g}")
    return Checked(errors, "loss and metrics of a step against TRL's")


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """Measures a step in turns; returns one record per implementation."""
    from fastalign.models.loading import load_model, load_tokenizer

    case = (CASES | QUICK)[case_name]
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL, dtype="float32")
    data = rows(case.profile, tokenizer, PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = make_trainer(case, model, tokenizer, data, folder)
        except Missing as reason:
            raise SystemExit(f"{case_name} cannot be measured: {reason}") from reason
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # `train` sets it, of which a step is measured alone
        runs = {name: candidate(name, trainer, batch) for name in IMPLEMENTATIONS}
        trls = runs["TRL"]()
        sizes = {"pairs": PAIRS, "positions": batch["input_ids"].numel(), "scored": int(batch["completion_mask"].sum())}
        return measure(
            "trl",
            case_name,
            sizes,
            dict(runs),
            lambda name, outputs: check(name, outputs, trls),
            lambda _: None,
            rounds,
        )
