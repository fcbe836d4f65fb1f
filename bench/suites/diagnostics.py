"""Planted faults and sound runs: which diagnostics fire. `python -m bench.suites.diagnostics` prints the table.

Every run is a real one of a command, of a model of 2 layers that was trained on the same kind of rows before. A fault
is planted in the options or in the rows, as it happens to people. The table says for each run what was planted and what
fired; a planted fault must fire, and a sound run must stay quiet.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastalign.cli.main import main as command
from fastalign.report.diagnostics import diagnose

WORDS = [
    "red", "blue", "green", "amber", "river", "stone", "cloud", "meadow", "copper", "violin", "harbour", "lantern",
]  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COMMON = [
    "use_cpu=true", "disable_tqdm=true", "save_strategy=no", "logging_steps=1", "per_device_train_batch_size=8",
    "max_new_tokens=24", "samples=8",
]  # fmt: skip
FULL, LORA = ["lora_rank=0", "dtype=float32"], ["lora_rank=8", "dtype=float32"]


# Rows


def _rng(seed: int) -> random.Random:
    return random.Random(seed)


def _prompt(rng: random.Random) -> str:
    return "Say " + " ".join(rng.sample(WORDS, 2)) + ":"


def _answer(prompt: str, rng: random.Random) -> str:
    """What a row's prompt names, in one of two ways."""
    first, second = prompt.removeprefix("Say ").rstrip(":").split()
    return rng.choice([f" {first} and {second}", f" {second}, then {first}"])


def completions(seed: int, count: int = 96) -> list[dict]:
    """Prompts with an answer that follows from them."""
    rng = _rng(seed)
    prompts = [_prompt(rng) for _ in range(count)]
    return [{"prompt": prompt, "completion": _answer(prompt, rng)} for prompt in prompts]


def pairs(seed: int, count: int = 96) -> list[dict]:
    """Prompts with an answer that joins the words by `and`, preferred to one that joins them by `then`."""
    rng, rows = _rng(seed), []
    while len(rows) < count:
        prompt = _prompt(rng)
        first, second = prompt.removeprefix("Say ").rstrip(":").split()
        rows.append({"prompt": prompt, "chosen": f" {first} and {second}", "rejected": f" {second}, then {first}"})
    return rows


def chosen(seed: int) -> list[dict]:
    """The answers of the pairs that are preferred."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(seed)]


def half_noise(seed: int) -> list[dict]:
    """Answers with random letters behind them: what can be learnt is learnt in a few steps."""
    rng = _rng(seed)
    return [{**row, "completion": row["completion"] + _noise(rng, 8)} for row in completions(seed, 1280)]


def free_choice(seed: int) -> list[dict]:
    """Answers of one of five words, whatever the prompt: which words is learnt in a few steps, nothing else can be."""
    rng = _rng(seed)
    words = ["amber", "river", "stone", "cloud", "green"]
    return [{"prompt": _prompt(rng), "completion": f" try {rng.choice(words)}"} for _ in range(1280)]


def labelled(seed: int) -> list[dict]:
    """The same with a label each."""
    rows = pairs(seed)
    return [
        {"prompt": r["prompt"], "completion": r["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, r in enumerate(rows)
    ]


def random_labels(seed: int) -> list[dict]:
    """Pairs of which half are swapped."""
    rng, rows = _rng(seed), pairs(seed, 400)
    return [
        {"prompt": f"{i} {r['prompt']}", "chosen": r[a], "rejected": r[b]}
        for i, r in enumerate(rows)
        for a, b in [rng.sample(["chosen", "rejected"], 2)]
    ]


def _noise(rng: random.Random, length: int) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))


def noise(seed: int, count: int = 12) -> list[dict]:
    """Completions of random letters: there is nothing to learn but the rows themselves."""
    rng = _rng(seed)
    return [{"prompt": _prompt(rng), "completion": _noise(rng, 30)} for _ in range(count)]


def poisoned(seed: int) -> list[dict]:
    """One batch of foreign characters among ordinary rows, behind the 24th step."""
    rng, rows = _rng(seed), completions(seed, 320)
    for i in range(192, 200):
        rows[i] = {"prompt": "Say", "completion": "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(20))}
    return rows


def near_pairs(seed: int) -> list[dict]:
    """Pairs that differ in one letter at the end."""
    return [{"prompt": r["prompt"], "chosen": r["chosen"] + ".", "rejected": r["chosen"] + "!"} for r in pairs(seed)]


def one_answer(seed: int) -> list[dict]:
    """The same completion for every prompt."""
    return [{"prompt": r["prompt"], "completion": " I cannot say that."} for r in completions(seed)]


def one_letter(seed: int) -> list[dict]:
    """Completions of one letter."""
    return [{"prompt": r["prompt"], "completion": r["completion"][1]} for r in completions(seed)]


def endless(seed: int) -> list[dict]:
    """Completions that go on and on."""
    return [{"prompt": r["prompt"], "completion": (r["completion"] + ",") * 8} for r in completions(seed)]


# Runs


class Case(NamedTuple):
    """One run: its method, rows, options, and the diagnostic that must fire."""

    name: str
    method: str
    rows: Callable[[int], list[dict]]
    options: list[str]
    expected: str | None = None
    held_out: Callable[[int], list[dict]] | None = None


_EVAL = ["eval_strategy=steps", "eval_steps=8"]
PLANTED = (
    Case("rate-of-1e30", "sft", completions,
         [*FULL, "learning_rate=1e30", "max_grad_norm=0", "max_steps=10"], "not_finite"),
    Case("poisoned-batch", "sft", poisoned,
         [*FULL, "learning_rate=1e-3", "train_sampling_strategy=sequential", "num_train_epochs=1"], "loss_spike"),
    Case("no-clipping", "sft", completions,
         [*FULL, "learning_rate=3", "max_grad_norm=0", "optim=sgd", "max_steps=30",
          "lr_scheduler_type=constant_with_warmup", "warmup_steps=60"], "exploding_gradient"),
    Case("rate-of-10000", "sft", completions, [*LORA, "learning_rate=1e4", "max_steps=40"], "vanishing_gradient"),
    Case("constant-rate", "sft", free_choice,
         [*FULL, "learning_rate=2e-3", "lr_scheduler_type=constant", "num_train_epochs=1"], "plateau"),
    Case("rate-of-1e-7", "dpo", pairs, [*LORA, "learning_rate=1e-7", "max_steps=24"], "learning_rate_idle"),
    Case("sft-rate-of-1e-7", "sft", chosen, [*LORA, "learning_rate=1e-7", "max_steps=24"], "learning_rate_idle"),
    Case("rate-of-0", "dpo", pairs, [*LORA, "learning_rate=0", "max_steps=10"], "adapter_still"),
    Case("near-pairs", "dpo", near_pairs, [*LORA, "learning_rate=3e-3", "max_steps=36"], "chosen_falls"),
    Case("beta-of-0.005", "dpo", pairs,
         [*LORA, *_EVAL, "learning_rate=1e-2", "beta=0.005", "max_steps=36"], "kl_runaway", pairs),
    Case("twelve-rows-forty-times", "sft", noise,
         [*FULL, *_EVAL, "learning_rate=3e-3", "num_train_epochs=40"], "eval_worsens", noise),
    Case("random-labels", "dpo", random_labels,
         [*LORA, "learning_rate=1e-3", "num_train_epochs=1"], "accuracy_at_chance"),
    Case("too-many-epochs", "dpo", pairs,
         [*FULL, "learning_rate=2e-3", "beta=1", "num_train_epochs=5"], "margins_saturated"),
    Case("one-letter-rows", "sft", one_letter,
         [*FULL, "learning_rate=3e-3", "num_train_epochs=5"], "length_collapse", completions),
    Case("endless-rows", "sft", endless,
         [*FULL, "learning_rate=3e-3", "num_train_epochs=3"], "answers_do_not_end", completions),
    Case("one-answer", "sft", one_answer,
         [*FULL, "learning_rate=3e-3", "num_train_epochs=5"], "diversity_collapse", completions),
)  # fmt: skip

SOUND = (
    Case("sft-full", "sft", completions, [*FULL, "learning_rate=5e-4", "num_train_epochs=3"]),
    Case("sft-full-held-out", "sft", chosen, [*FULL, *_EVAL, "learning_rate=5e-4", "num_train_epochs=2"], None, chosen),
    Case("sft-lora", "sft", chosen, [*LORA, "learning_rate=2e-3", "num_train_epochs=3"], None, chosen),
    Case("sft-constant", "sft", chosen,
         [*LORA, "learning_rate=1e-3", "lr_scheduler_type=constant", "num_train_epochs=2"]),
    Case("sft-cosine", "sft", chosen,
         [*FULL, "learning_rate=1e-3", "lr_scheduler_type=cosine", "warmup_steps=5", "num_train_epochs=4"],
         None, chosen),
    Case("sft-one-epoch", "sft", half_noise, [*FULL, "learning_rate=1e-3", "num_train_epochs=1", "logging_steps=4"]),
    Case("sft-batch-of-2", "sft", chosen,
         [*FULL, "learning_rate=3e-4", "per_device_train_batch_size=2", "num_train_epochs=2"]),
    Case("dpo-lora", "dpo", pairs, [*LORA, "learning_rate=1e-3", "num_train_epochs=2"], None, pairs),
    Case("dpo-full", "dpo", pairs, [*FULL, *_EVAL, "learning_rate=1e-4", "num_train_epochs=2"], None, pairs),
    Case("dpo-accumulated", "dpo", pairs,
         [*LORA, "learning_rate=1e-3", "per_device_train_batch_size=4", "gradient_accumulation_steps=2",
          "num_train_epochs=2"], None, pairs),
    Case("dpo-batch-of-2", "dpo", pairs,
         [*LORA, "learning_rate=3e-4", "per_device_train_batch_size=2", "num_train_epochs=1"]),
    Case("ipo", "ipo", pairs, [*LORA, "learning_rate=1e-3", "num_train_epochs=2"], None, pairs),
    Case("simpo", "simpo", pairs, [*LORA, "learning_rate=1e-3", "num_train_epochs=2"], None, pairs),
    Case("orpo", "orpo", pairs, [*FULL, "learning_rate=2e-4", "num_train_epochs=2"], None, pairs),
    Case("apo_zero", "apo_zero", pairs, [*LORA, "learning_rate=1e-3", "num_train_epochs=2"], None, pairs),
    Case("hinge", "hinge", pairs, [*LORA, "learning_rate=1e-3", "num_train_epochs=2"], None, pairs),
    Case("robust", "robust", pairs, [*LORA, "label_smoothing=0.1", "learning_rate=1e-3", "num_train_epochs=2"]),
    Case("kto", "kto", labelled, [*LORA, "learning_rate=1e-3", "num_train_epochs=3"], None, labelled),
    Case("bco", "bco", labelled, [*LORA, "learning_rate=1e-3", "num_train_epochs=3"]),
    Case("dpo-with-sft", "dpo", pairs,
         [*LORA, "loss_type=[dpo, sft]", "learning_rate=1e-3", "num_train_epochs=2"], None, pairs),
)  # fmt: skip
CASES = {case.name: case for case in (*PLANTED, *SOUND)}


def start_model(folder: Path) -> Path:
    """A model of 2 layers that answers prompts of this kind, in one of the two ways, as the folder of a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = CHATML
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
                bos_token_id=None, eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
    model.save_pretrained(folder / "untrained")
    tokenizer.save_pretrained(folder / "untrained")
    options = [*FULL, "learning_rate=4e-3", "lr_scheduler_type=cosine", "max_steps=400", "logging_steps=50"]
    made = Case("start", "sft", lambda seed: completions(seed, 800), options)
    return run(made, folder, folder / "untrained")[0] / "model"


def run(case: Case, folder: Path, model: Path, seed: int = 1) -> tuple[Path, list[str]]:
    """Runs a case on the rows of a seed; returns its run folder and the names of the diagnostics that fire."""
    out = folder / case.name
    files = {"train": case.rows(seed)} | ({"eval": case.held_out(seed + 1)} if case.held_out else {})
    words = []
    for key, rows in files.items():
        path = folder / f"{case.name}-{key}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words.append(f"{key}={path}")
    if case.method != "sft":
        words.append(f"ref_cache_dir={folder / 'cache'}")
    with contextlib.redirect_stdout(io.StringIO()):
        status = command(
            [case.method, f"model={model}", f"output_dir={out}", *words, *COMMON, f"seed={41 + seed}", *case.options]
        )
    if status and not (out / "nonfinite_rows.jsonl").exists():
        raise RuntimeError(f"{case.name} ended with status {status}")
    return out, [finding.name for finding in diagnose(out)]


def main(words: list[str]) -> int:
    """Prints the table; 1 if a planted fault stays unseen or a sound run is called faulty."""
    parser = argparse.ArgumentParser("python -m bench.suites.diagnostics", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="RUN", help="runs by name; all of them without any")
    parser.add_argument("--seed", type=int, default=1, help="of the rows and of the training (default 1)")
    args = parser.parse_args(words)
    cases, wrong = [case for case in CASES.values() if case.name in (args.names or CASES)], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = start_model(folder)
        print(f"{'run':<26}{'planted':<22}fired")
        for case in cases:
            _, fired = run(case, folder, model, args.seed)
            good = case.expected in fired if case.expected else not fired
            wrong += not good
            said = f"{case.name:<26}{case.expected or '-':<22}{', '.join(fired) or '-'}{'' if good else '   WRONG'}"
            print(said, flush=True)
    print(f"{wrong} wrong of {len(cases)}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
