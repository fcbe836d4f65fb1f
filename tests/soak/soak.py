"""Kills real runs of every trainer at random moments, inside saves too, and resumes each to its end.

    make soak
    make soak SOAK="--kills 200 --minutes 60 --seed 1"

For each case a run that is never stopped gives the bits that are expected. Then the same run is started again and
again, each time from the newest whole checkpoint, and is killed with SIGKILL after a random time. When it has ended by
itself, its weights and its logged lines must be those bits, and nothing that was half written may be left. The script
prints a table, and exits with 1 if a run differs.

The processes are forked, so that none of them has to import torch again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastalign import (
    DistillationConfig,
    DistillationTrainer,
    PreferenceConfig,
    PreferenceTrainer,
    SFTConfig,
    SFTTrainer,
)
from fastalign.files import read_metrics
from fastalign.regularizers import EWC, Distillation, KLToStart, LayerWise, Replay
from fastalign.training.run_folder import checkpoints, find_checkpoint

PAIRS = [
    {"prompt": f"Question {i}" + "?" * i, "chosen": f"the answer is {i}" * (1 + i % 2), "rejected": f"no idea {i}"}
    for i in range(8)
]
ROWS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
LABELLED = [{**row, "label": i % 2 == 0} for i, row in enumerate(ROWS)]
TEXT = [{"text": "The river rises in the hills. " * 2}, {"text": "A second text."}]

# Trainer, configuration, rows, options, regularisers, whether an adapter is trained.
CASES = {
    "sft": (SFTTrainer, SFTConfig, ROWS, {}, list, False),
    "sft, LoRA": (SFTTrainer, SFTConfig, ROWS, {}, list, True),
    "dpo, stored reference": (PreferenceTrainer, PreferenceConfig, PAIRS, {}, list, False),
    "dpo, LoRA, moving reference": (
        PreferenceTrainer, PreferenceConfig, PAIRS,
        {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 1}, list, True,
    ),
    "orpo": (PreferenceTrainer, PreferenceConfig, PAIRS, {"loss_type": "orpo"}, list, False),
    "kto, LoRA": (PreferenceTrainer, PreferenceConfig, LABELLED, {"loss_type": "kto"}, list, True),
    "bco": (PreferenceTrainer, PreferenceConfig, LABELLED, {"loss_type": "bco"}, list, False),
    "dpo, ewc + kl + replay, LoRA": (
        PreferenceTrainer, PreferenceConfig, PAIRS, {},
        lambda: [EWC(_ones(), 0.1), KLToStart(0.1), Replay(TEXT, 0.3)], True,
    ),
    "sft, layer-wise": (SFTTrainer, SFTConfig, ROWS, {}, lambda: [LayerWise([1, 2], decay=0.5)], False),
    "sft, distillation from the start": (
        SFTTrainer, SFTConfig, ROWS, {}, lambda: [Distillation("start")], True,
    ),
    "distillation, live": (DistillationTrainer, DistillationConfig, ROWS, {}, list, True),
    "distillation, stored": (DistillationTrainer, DistillationConfig, ROWS, {"top_k": 8}, list, False),
    "distillation, on-policy": (
        DistillationTrainer, DistillationConfig, ROWS, {"on_policy": 0.5, "sample_tokens": 4}, list, True,
    ),
}  # fmt: skip
STEPS = 8


def tiny_model(seed: int = 0, *, tied: bool = True) -> LlamaForCausalLM:
    """A Llama of two layers, the same each time."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, bos_token_id=None,
            eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def _ones() -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(p) for name, p in tiny_model().named_parameters()}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def train(case: str, folder: Path) -> None:
    """Trains a case to its end, from the newest checkpoint in the folder."""
    kind, config, rows, options, regularizers, adapter = CASES[case]
    cache = {"cache_dir": str(folder / "cache")} if kind is DistillationTrainer else {}
    if kind is PreferenceTrainer:
        cache = {"ref_cache_dir": str(folder / "cache")}
    args = config(
        output_dir=str(folder / "run"), use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=1,
        save_total_limit=2, logging_steps=3, max_steps=STEPS, learning_rate=1e-2, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, resume_from_checkpoint="last", **cache, **options,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM") if adapter else None
    teacher = {"teacher": tiny_model(1)} if kind is DistillationTrainer else {}
    trainer = kind(
        tiny_model(), args, rows, processing_class=byte_tokenizer(), peft_config=lora, regularizers=regularizers(),
        **teacher,
    )  # fmt: skip
    trainer.train()
    digest = hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        digest.update(f"{name} ".encode() + parameter.detach().contiguous().numpy().tobytes())
    trainer.save_model()
    (folder / "weights").write_text(digest.hexdigest())


def start(case: str, folder: Path) -> int:
    """Forks a process that trains; returns its id."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        status = 1
        try:
            with (folder / "output.txt").open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                train(case, folder)
                status = 0
        except BaseException:
            (folder / "error.txt").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    return child


def logged(folder: Path) -> list[dict]:
    """What was logged, without what a clock says."""
    clocks = ("time", "tokens_per_second", "memory_gb", "total_flos", "train_loss")
    lines = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


def killed_run(case: str, folder: Path, seconds: float, draw: random.Random) -> tuple[int, int, int]:
    """Kills and resumes a run until it ends by itself.

    Returns:
        How often it was killed, how many of these kills left a half-written folder, and how many found the checkpoints
        that were whole before whole no more, or none at all.
    """
    kills = inside = lost = 0
    newest = 0
    while True:
        child = start(case, folder)
        # Four kills per run at most, so that it ends some day; the moments are those of the whole run.
        after = draw.uniform(0.1, 1.0) * seconds if kills < 4 else 600.0
        deadline = time.monotonic() + after
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                if status:
                    raise RuntimeError((folder / "error.txt").read_text())
                return kills, inside, lost
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        run = folder / "run"
        inside += any(path.name.startswith(".") for path in run.glob("*")) if run.exists() else 0
        found = find_checkpoint(run, "last", early=True) if run.exists() and checkpoints(run) else None
        step = int(found.name.rpartition("-")[2]) if found else 0
        lost += step < newest
        newest = max(step, newest)


def main() -> int:
    """Runs the cases in turn until there were enough kills, or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("fastalign").setLevel(logging.ERROR)
    draw, began, rows, bad = random.Random(given.seed), time.monotonic(), [], 0
    expected: dict[str, tuple[str, list[dict], float]] = {}
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        cases = list(CASES)
        while sum(row[1] for row in rows) < given.kills and time.monotonic() - began < given.minutes * 60:
            case = cases[len(rows) % len(cases)]
            folder = Path(place) / str(len(rows))
            if case not in expected:
                whole = Path(place) / f"whole {case}"
                whole.mkdir()
                since = time.monotonic()
                if os.waitpid(start(case, whole), 0)[1]:
                    raise RuntimeError((whole / "error.txt").read_text())
                expected[case] = (whole / "weights").read_text(), logged(whole), time.monotonic() - since
            folder.mkdir()
            kills, inside, lost = killed_run(case, folder, expected[case][2], draw)
            same = ((folder / "weights").read_text(), logged(folder)) == expected[case][:2]
            left = [path.name for path in (folder / "run").iterdir() if path.name.startswith((".", "set-aside"))]
            good = same and not left and not lost
            bad += not good
            rows.append((case, kills, inside, lost, good))
            print(json.dumps({"case": case, "kills": kills, "inside saves": inside, "same bits": same, "left": left}))
            shutil.rmtree(folder)
    print(f"\n| {'case':<34} | kills | inside a save | same bits |\n|{'-' * 36}|-------|---------------|-----------|")
    for case in CASES:
        of = [row for row in rows if row[0] == case]
        if of:
            verdict = "yes" if all(row[4] for row in of) else "NO"
            kills, inside = (sum(row[i] for row in of) for i in (1, 2))
            print(f"| {case:<34} | {kills:>5} | {inside:>13} | {verdict:>9} |")
    kills, inside = (sum(row[i] for row in rows) for i in (1, 2))
    print(f"\n{kills} kills, {inside} of them inside a save; {bad} of {len(rows)} runs differ")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
