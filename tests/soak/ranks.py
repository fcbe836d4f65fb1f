"""Small runs of every trainer. `torchrun` starts them in two processes, a test in one: the updates must be equal.

    torchrun --nproc_per_node 2 tests/soak/ranks.py FOLDER [CASE ...]

trains each case in FOLDER/<case>, one after the other in the same process group. In one process the same rows are
trained on in as many micro-batches (see `Case.one`), so the sums are the same too, most of them in the same order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import save_file

from fastalign import (
    DistillationConfig,
    DistillationTrainer,
    PreferenceConfig,
    PreferenceTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from fastalign.models.sharding import gathered
from fastalign.regularizers import EWC, L2SP, Distillation, KLToStart, LayerWise, Replay

sys.path.insert(0, str(Path(__file__).parent))
from soak import LABELLED, PAIRS, ROWS, TEXT, byte_tokenizer, tiny_model

# Of eight rows each step takes four: two processes with two rows each, or one process with two micro-batches of two.
LIKED = [{**row, "label": i != 3} for i, row in enumerate(LABELLED)]  # all log-probs rise, so KTO's baseline is above 0
ROWS_OF = {"pairs": PAIRS, "labelled": LABELLED, "liked": LIKED, "completions": ROWS}
SPLIT = {"gradient_accumulation_steps": 2}
# The same, where the loss compares the rows of a micro-batch with each other, over all processes.
WHOLE = {"per_device_train_batch_size": 4}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


@dataclass
class Case:
    """One run.

    Attributes:
        method: "sft", "preference", "distillation" or "reward".
        rows: Which rows it trains on.
        options: Of its configuration.
        regularizers: Makes its regularisers.
        make: Makes the model.
        adapter: Whether an adapter is trained, with all weights otherwise.
        one: Options of one process that trains on the same rows.
        two: Options of two processes alone.
        exact: Whether both runs add the same numbers in the same order, so that all bits agree.
    """

    method: str = "preference"
    rows: str = "pairs"
    options: dict[str, Any] = field(default_factory=dict)
    regularizers: Callable[[], list] = list
    make: Callable[[], torch.nn.Module] = tiny_model
    adapter: bool = False
    one: dict[str, Any] = field(default_factory=lambda: SPLIT)
    two: dict[str, Any] = field(default_factory=dict)
    exact: bool = False


def gpt2(*, tied: bool = True) -> torch.nn.Module:
    """A GPT-2 of two layers."""
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=2,
            pad_token_id=0, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def ones() -> dict[str, torch.Tensor]:
    """Fisher information of 1 everywhere."""
    return {name: torch.ones_like(p) for name, p in tiny_model().named_parameters()}


CASES = {
    "sft": Case("sft", "completions", exact=True),
    "sft, LoRA": Case("sft", "completions", adapter=True, exact=True),
    "sft, a prompt per completion": Case("sft", "completions", {"share_prompts": False}, exact=True),
    "sft, two micro-batches": Case(
        "sft", "completions", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, **SGD},
        one={"gradient_accumulation_steps": 4},
    ),
    "dpo, stored reference": Case(exact=True),
    "dpo, LoRA": Case(adapter=True, exact=True),
    "dpo, live reference": Case(options={"precompute_ref_log_probs": False}, exact=True),
    "dpo, moving reference": Case(
        options={"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 1}, exact=True,
    ),
    "dpo, LoRA, checkpointed layers": Case(options={"gradient_checkpointing": True}, adapter=True, exact=True),
    "ipo": Case(options={"loss_type": "ipo"}, exact=True),
    "orpo": Case(options={"loss_type": "orpo"}, exact=True),
    "simpo": Case(options={"loss_type": "simpo"}, exact=True),
    "dpo + sft": Case(options={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, adapter=True, exact=True),
    "kto": Case(rows="liked", options={"loss_type": "kto", **SGD}, one=WHOLE),
    "kto, LoRA": Case(rows="liked", options={"loss_type": "kto", **SGD}, adapter=True, one=WHOLE),
    "bco": Case(rows="labelled", options={"loss_type": "bco", **SGD}, one=WHOLE),
    "reward": Case("reward", exact=True),
    "reward, LoRA": Case("reward", options={"center_rewards_coefficient": 0.1}, adapter=True, exact=True),
    "distillation, live": Case("distillation", "completions", exact=True),
    "distillation, stored": Case("distillation", "completions", {"top_k": 8}, adapter=True, exact=True),
    "distillation from the start": Case(
        "sft", "completions", regularizers=lambda: [Distillation("start")], adapter=True, exact=True,
    ),
    "dpo, EWC": Case(options=SGD, regularizers=lambda: [EWC(ones(), 0.1)]),
    "dpo, LoRA, EWC": Case(options=SGD, regularizers=lambda: [EWC(ones(), 0.1)], adapter=True),
    "sft, L2-SP": Case("sft", "completions", SGD, lambda: [L2SP(0.1)]),
    "dpo, KL": Case(regularizers=lambda: [KLToStart(0.1)], exact=True),
    "dpo, replay": Case(options=SGD, regularizers=lambda: [Replay(TEXT, 0.3)]),
    "dpo, EWC + KL + replay": Case(
        options=SGD, regularizers=lambda: [EWC(ones(), 0.1), KLToStart(0.1), Replay(TEXT, 0.3)], adapter=True,
    ),
    "sft, layer-wise": Case("sft", "completions", regularizers=lambda: [LayerWise([1, 2], decay=0.5)], exact=True),
}  # fmt: skip
# The same under FSDP2, whose sums are in another order.
SHARDED = {"two": {"fsdp": True}, "exact": False}
CASES |= {
    f"fsdp, {name}": replace(CASES[name], options=CASES[name].options | SGD, **SHARDED)
    for name in (
        "sft", "sft, two micro-batches", "dpo, stored reference", "dpo, live reference", "dpo, moving reference", "ipo",
        "orpo", "simpo",
    )
}  # fmt: skip
CASES["fsdp, AdamW, clipped"] = Case(options={"learning_rate": 1e-3, "adam_epsilon": 1e-3}, **SHARDED)
CASES["fsdp, output layer apart"] = Case(
    options=SGD | {"precompute_ref_log_probs": False}, make=lambda: tiny_model(tied=False), **SHARDED
)
CASES["fsdp, GPT-2"] = Case(options=SGD | {"precompute_ref_log_probs": False}, make=gpt2, **SHARDED)
CASES["fsdp, GPT-2, apart"] = Case(options=SGD, make=lambda: gpt2(tied=False), **SHARDED)
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "preference": (PreferenceTrainer, PreferenceConfig),
    "distillation": (DistillationTrainer, DistillationConfig),
    "reward": (RewardTrainer, RewardConfig),
}
STEPS = 3


def make_trainer(
    case: Case, folder: Path, *, rows: list[dict] | None = None, held_out: int = 0, lora_dropout: float = 0.0,
    **options: Any,
) -> Any:  # fmt: skip
    """The trainer of a case, whose files lie in `folder`; its last `held_out` rows are for evaluation too."""
    kind, config = TRAINERS[case.method]
    cache = {} if case.method in ("sft", "reward") else {"ref_cache_dir": str(folder / "cache")}
    if case.method == "distillation":
        cache = {"cache_dir": str(folder / "cache")}
    given = {
        "output_dir": str(folder / "run"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "max_steps": STEPS, "learning_rate": 1e-2, "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant", "ddp_timeout": 120, **cache, **case.options, **options,
    }  # fmt: skip
    lora = None
    if case.adapter:
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=lora_dropout)
    rows = rows or ROWS_OF[case.rows]
    teacher = {"teacher": tiny_model(1)} if case.method == "distillation" else {}
    return kind(
        case.make(), config(**given), rows, rows[-held_out:] if held_out else None,
        processing_class=byte_tokenizer(), peft_config=lora, regularizers=case.regularizers(), **teacher,
    )  # fmt: skip


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """What was trained, by name."""
    return {
        name: gathered(parameter.detach()).clone().contiguous()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def train_one(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Trains a case in this process alone; returns the weights and the logged lines."""
    case = CASES[name]
    trainer = make_trainer(case, folder, **case.one)
    trainer.train()
    return weights_of(trainer), trainer.state.log_history


def train_rank(name: str, folder: Path) -> None:
    """Trains a case in this process and the others of its group. The first one writes what came out."""
    trainer = make_trainer(CASES[name], folder, **CASES[name].two)
    trainer.train()
    weights = weights_of(trainer)
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values())).hexdigest()
    rank = trainer.args.process_index
    if rank == 0:
        save_file(weights, folder / "weights.safetensors")
    record = {"digest": digest, "steps": trainer.state.global_step, "log": trainer.state.log_history}
    (folder / f"rank-{rank}.json").write_text(json.dumps(record))


def run_rank(name: str, folder: Path) -> None:
    """Runs a case, or a scenario of `scenarios.py`, in this process and the others of its group."""
    from scenarios import SCENARIOS

    if name in CASES:
        train_rank(name, folder)
        return
    rank = int(os.environ["RANK"])
    found = SCENARIOS[name](folder, rank)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def main() -> int:
    """Runs the cases and scenarios named on the command line, or all cases."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("fastalign").setLevel(logging.ERROR)
    PartialState(cpu=True)  # joins the group of processes
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for name in sys.argv[2:] or CASES:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        try:
            run_rank(name, place)
        except BaseException:
            (place / f"error-{rank}.txt").write_text(traceback.format_exc())
            print(f"{name}, process {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
