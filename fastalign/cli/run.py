"""One training run from options to run folder: model, data, training, comparison, report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastalign.cli.methods import build_regularizers, load_class, method_of
from fastalign.cli.run_options import RunOptions
from fastalign.config.base import AlignmentConfig
from fastalign.data.files import load_rows
from fastalign.errors import ConfigError
from fastalign.evaluation.answers import Answers, answer, comparison
from fastalign.files import append_metrics, write_json, write_text
from fastalign.memory import measure
from fastalign.models.adapters import adapter_base, has_adapter, lora_config
from fastalign.models.freed import return_freed_memory_at_once
from fastalign.models.loading import load_tokenizer
from fastalign.report.page import write_report
from fastalign.report.rendering import format_number


def run_training(options: RunOptions, config: AlignmentConfig) -> Path:
    """Trains as the options say, and leaves everything in the run folder `config.output_dir`.

    Args:
        options: The model, the data, the adapter and what is shown at the end.
        config: The options of the method; its class decides which trainer runs.

    Returns:
        The run folder. It holds the adapter, or a whole model in model/ (safetensors), and run.json, metrics.jsonl,
        preflight.txt, summary.json, samples.jsonl and report.html.

    Raises:
        FastAlignError: An option, the data or the model cannot be used. This is raised before the first training step.
    """
    console = Console(highlight=False)
    folder, model, train = Path(str(config.output_dir)), str(options.model), str(options.train)
    regularizers = build_regularizers(options.regularizers)
    if config.resume_from_checkpoint and not Path(config.resume_from_checkpoint).is_dir():
        raise ConfigError(f"resume_from_checkpoint is {config.resume_from_checkpoint!r}, which is no folder")
    train_rows = load_rows(train)
    eval_rows = load_rows(options.eval) if options.eval else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {str(folder)!r} cannot be made: {error.strerror}; name another one") from error
    if options.memory_limit is not None:
        return_freed_memory_at_once()  # the plan counts on it
    console.print(f"Loading {model}")
    tokenizer = load_tokenizer(model)
    lora, adapter = None, options.adapter
    if not options.lora_rank and adapter_base(model) is not None:
        adapter = adapter or "merge"  # lora_rank=0 trains all weights, so the old adapter becomes part of them
    if options.lora_rank and adapter != "continue":
        lora = lora_config(
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            targets=options.lora_targets,
        )
    trainer = load_class(method_of(config).trainer)(
        model, config, train_rows, eval_rows, tokenizer, peft_config=lora, adapter=adapter, dtype=options.dtype,
        regularizers=regularizers, quantization=options.quantization, double_quantization=options.double_quantization,
    )  # fmt: skip
    write_json(folder / "run.json", {**vars(options), **trainer.args.to_dict()})
    write_text(folder / "preflight.txt", trainer.preflight_report() + "\n")

    prompts, questions = _prompts(trainer, tokenizer, eval_rows, options.samples)
    before, old = _evaluate_and_answer(trainer, tokenizer, prompts, options, "before")
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    seconds = time.monotonic() - start
    after, new = _evaluate_and_answer(trainer, tokenizer, prompts, options, "after")
    # A complete model goes into a separate folder, so that its many files do not hide the report.
    trainer.save_model(str(folder if has_adapter(trainer.model) else folder / "model"))

    answers = (old, new) if old and new else None
    summary = _summary(trainer, options, seconds, comparison(before, after, answers))
    write_json(folder / "summary.json", summary)
    _write_samples(folder / "samples.jsonl", questions, answers)
    report = write_report(folder)
    _show(console, summary)
    if answers:
        _show_answers(console, questions, *answers)
    console.print()
    console.print(f"Run folder {folder}, report {report}")
    return folder


def _prompts(trainer: Any, tokenizer: Any, rows: Any, count: int) -> tuple[list[list[int]], list[str]]:
    """The first `count` different prompts of the held-out rows: tokens, and the text of the last question."""
    if trainer.eval_dataset is None:
        return [], []
    tokens = [row["prompt_ids"] for row in trainer.eval_dataset]
    if len(rows) == len(tokens) and "prompt" in rows.column_names:
        texts = [_last_question(prompt) for prompt in rows["prompt"]]
    else:  # rows were dropped, or the prompt is implicit
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    different = {tuple(ids): text.strip() for ids, text in zip(tokens, texts, strict=True) if ids}
    chosen = list(different.items())[:count]
    return [list(ids) for ids, _ in chosen], [text for _, text in chosen]


def _last_question(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else next((m["content"] for m in reversed(prompt) if m.get("content")), "")


def _evaluate_and_answer(
    trainer: Any, tokenizer: Any, prompts: list[list[int]], options: RunOptions, when: str
) -> tuple[dict[str, float], Answers | None]:
    """Held-out metrics and answers of the model with its present weights."""
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if not prompts:
        return metrics, None
    label = f"answers {when} training"
    return metrics, answer(trainer.model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, label=label)


def _summary(trainer: Any, options: RunOptions, seconds: float, rows: list[dict]) -> dict:
    state, config = trainer.state, trainer.args
    method = method_of(config)
    losses = " + ".join(config.loss_type) if method.losses else method.title
    losses = " + ".join([losses, *(str(r["name"]) for r in options.regularizers or [])])
    how = "all weights"
    if has_adapter(trainer.model):
        how = "the adapter, further" if options.adapter == "continue" else f"LoRA of rank {options.lora_rank}"
    return {
        "title": options.title or f"{losses} of {options.model}",
        "model": options.model,
        "dataset": Path(str(options.train)).name,
        "method": losses,
        "rows": rows,
        "facts": {
            "method": f"{losses}, {how}, learning rate {config.learning_rate:g}",
            "training": f"{len(trainer.train_dataset):,} rows, {state.epoch:.2g} epochs, {state.global_step} steps",
            "training time": f"{seconds / 60:.1f} min on {config.device}",
            "tokens/s": f"{trainer.tokens_seen / seconds:,.0f} (each prompt counted once)",
            "rows/s": f"{len(trainer.train_dataset) * state.epoch / seconds:.2f}",
            "peak memory": f"{measure.peak_bytes(config.device) / 1e9:.2f} GB, of the whole process",
        },
    }


def _write_samples(path: Path, questions: list[str], answers: tuple[Answers, Answers] | None) -> None:
    path.unlink(missing_ok=True)
    if answers:
        for question, before, after in zip(questions, answers[0].texts, answers[1].texts, strict=True):
            append_metrics(path, {"prompt": question, "before": before, "after": after})


def _show(console: Console, summary: dict) -> None:
    table = Table(title=summary["title"], title_justify="left", title_style="bold")
    table.add_column("held-out")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("")
    for row in summary["rows"]:
        values = [format_number(row[when]) for when in ("before", "after")]
        table.add_row(row["metric"], *values, row["unit"])
    console.print()
    console.print(table)
    for label, value in summary["facts"].items():
        console.print(f"  {label:<16}{value}", markup=False)


def _show_answers(console: Console, questions: list[str], old: Answers, new: Answers) -> None:
    shown = quartiles(old, new)
    console.print(f"\n{len(shown)} of {len(questions)} held-out answers, at the quartiles of the change in length:")
    for i in shown:
        console.print(f"\n{_short(questions[i])}", markup=False, style="bold")
        console.print(f"   before ({old.lengths[i]} tokens): {_short(old.texts[i])}", markup=False)
        console.print(f"   after  ({new.lengths[i]} tokens): {_short(new.texts[i])}", markup=False)


def quartiles(old: Answers, new: Answers) -> list[int]:
    """The answers at the quartiles of the change in length: neither the best nor the worst are picked."""
    change = [after - before for before, after in zip(old.lengths, new.lengths, strict=True)]
    order = sorted(range(len(change)), key=change.__getitem__)
    return list(dict.fromkeys(order[round(part * (len(order) - 1) / 4)] for part in (1, 2, 3)))


def _short(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
