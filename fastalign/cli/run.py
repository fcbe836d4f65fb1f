"""One training run from options to run folder: model, data, training, comparison, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastalign.cli.methods import build_regularizers, load_class, method_of
from fastalign.cli.record import run_record
from fastalign.cli.run_options import RunOptions, paths_of
from fastalign.cli.trl import Translation
from fastalign.config.base import AlignmentConfig
from fastalign.data.loading import Source, load_rows, of_each
from fastalign.errors import DataError, printable
from fastalign.evaluation.answers import Answers, answer, comparison
from fastalign.files import write_json, write_jsonl, write_text
from fastalign.models.adapters import adapter_base, has_adapter, lora_config
from fastalign.models.freed import return_freed_memory_at_once
from fastalign.models.loading import load_tokenizer
from fastalign.report.page import write_report
from fastalign.report.rendering import format_number
from fastalign.training.preflight import check_options
from fastalign.training.record import facts
from fastalign.training.run_folder import check_folder
from fastalign.training.stopping import model_folder


def run_training(
    options: RunOptions, config: AlignmentConfig, command: str | None = None, translation: Translation | None = None
) -> Path:
    """Trains as the options say, and leaves everything in the run folder `config.output_dir`.

    Args:
        options: The model, the data, the adapter and what is shown at the end.
        config: The options of the method; its class decides which trainer runs.
        command: The command that goes on with the run, which is printed if a signal stops it.
        translation: What the options were read from, if that is a configuration of TRL.

    Returns:
        The run folder. It holds the adapter, or a whole model in model/ (safetensors), and run.json, metrics.jsonl,
        preflight.txt, summary.json, samples.jsonl and report.html.

    Raises:
        FastAlignError: An option, the data or the model cannot be used. This is raised before the first training step.
    """
    first = config.process_index == 0  # the only process that prints, generates and writes the report
    console = Console(highlight=False, markup=False, quiet=not first)  # names and texts may hold brackets
    folder, model = Path(str(config.output_dir)), str(options.model)
    if translation is not None:
        console.print(printable(translation.note), soft_wrap=True)
    regularizers = build_regularizers(options.regularizers)
    given, overwrite = config.resume_from_checkpoint, config.overwrite_output_dir
    check_folder(folder, given, overwrite=overwrite, writes=config.should_save)
    check_options(config, has_eval_rows=bool(options.eval))  # the trainer would say it, but after the rows are read
    # The rows to train on are not read here: their tokens may be stored.
    train_rows = Source(options.train, options.columns)
    eval_rows = of_each(options.eval or None, lambda source, name: _load(name, source, options.columns))
    if options.memory_limit is not None:
        return_freed_memory_at_once()  # the plan counts on it
    console.print(printable(f"Loading {model}"))
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
        quantize_head=options.quantize_head,
    )  # fmt: skip
    if first:
        write_json(folder / "run.json", run_record(options, trainer.args))
        write_text(folder / "preflight.txt", _preflight(trainer, translation))
    trainer.recorded = True
    trainer.given.options["train"] = options.train  # the trainer was given the rows of these files

    shown = options.samples if first and method_of(config).answers else 0
    prompts, questions = _prompts(trainer, tokenizer, eval_rows, shown) if shown else ([], [])
    before, old = _evaluate_and_answer(trainer, tokenizer, prompts, options, "before")
    trainer.how_to_go_on = command or trainer.how_to_go_on
    try:
        trainer.train()
    except BaseException:
        if trainer.stopping.saved and first:
            write_json(folder / "summary.json", _summary(trainer, options, []))
            write_report(folder)
        raise
    # Before the evaluation: whoever stops that one has the model.
    trainer.save_model(str(model_folder(folder, trainer.model)))
    after, new = _evaluate_and_answer(trainer, tokenizer, prompts, options, "after")

    answers = (old, new) if old and new else None
    summary = _summary(trainer, options, _comparison(trainer, before, after, answers))
    if not first:
        return folder
    write_json(folder / "summary.json", summary)
    _write_samples(folder / "samples.jsonl", questions, answers)
    report = write_report(folder)
    _show(console, summary)
    if answers:
        _show_answers(console, questions, *answers)
    console.print()
    console.print(printable(f"Run folder {folder}, report {report}"))
    return folder


def _prompts(trainer: Any, tokenizer: Any, rows: Any, count: int) -> tuple[list[list[int]], list[str]]:
    """The first `count` different prompts of the held-out rows: tokens, and the text of the last question."""
    if trainer.eval_dataset is None or trainer.is_fsdp_enabled:  # with FSDP each token would need all processes
        return [], []
    tokenized, rows = (next(iter(x.values())) if isinstance(x, dict) else x for x in (trainer.eval_dataset, rows))
    tokens = tokenized["prompt_ids"][:]
    texts: list[Any] = (
        [_last_question(prompt) for prompt in rows["prompt"]] if "prompt" in rows.column_names else [None]
    )
    if len(texts) != len(tokens) or None in texts:  # rows were dropped or converted, or the prompt is implicit
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    different = {tuple(ids): text.strip() for ids, text in zip(tokens, texts, strict=True) if ids}
    chosen = list(different.items())[:count]
    return [list(ids) for ids, _ in chosen], [text for _, text in chosen]


def _last_question(prompt: Any) -> str | None:
    """What a person asked, in a column of prompts; None if it is in another form than text or messages of text."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = next((turn["content"] for turn in reversed(prompt) if turn.get("content")), None)
    return prompt if isinstance(prompt, str) else None


def _comparison(trainer: Any, before: dict, after: dict, answers: tuple[Answers, Answers] | None) -> list[dict]:
    """The table of metrics before and after training; of several data sets by name, each with its name."""
    if not isinstance(trainer.eval_dataset, dict):
        return comparison(before, after, answers)
    rows = []
    for name in trainer.eval_dataset:
        old, new = ({f"eval_{key.removeprefix(f'eval_{name}_')}": value for key, value in metrics.items()
                     if key.startswith(f"eval_{name}_")} for metrics in (before, after))  # fmt: skip
        rows += [{**row, "metric": f"{row['metric']} ({name})"} for row in comparison(old, new, None)]
    return rows + comparison({}, {}, answers)


def _load(name: str, source: Any, columns: Any) -> Any:
    try:
        return load_rows(source, columns)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _preflight(trainer: Any, translation: Translation | None) -> str:
    """The preflight report as a file; its first line says that the options were read as TRL's, if they were."""
    return "".join(f"{text}\n" for text in (translation and translation.note, trainer.preflight_report()) if text)


def _evaluate_and_answer(
    trainer: Any, tokenizer: Any, prompts: list[list[int]], options: RunOptions, when: str
) -> tuple[dict[str, float], Answers | None]:
    """Held-out metrics and answers of the model with its present weights."""
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if not prompts:
        return metrics, None
    label = f"answers {when} training"
    return metrics, answer(trainer.model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, label=label)


def _summary(trainer: Any, options: RunOptions, rows: list[dict]) -> dict:
    config = trainer.args
    method = method_of(config)
    losses = " + ".join(config.loss_type) if method.losses else config.loss_type if method.names else method.title
    losses = " + ".join([losses, *(str(r["name"]) for r in options.regularizers or [])])
    how = "all weights"
    if has_adapter(trainer.model):
        how = "the adapter, further" if options.adapter == "continue" else f"LoRA of rank {options.lora_rank}"
    return {
        "title": options.title or f"{losses} of {options.model}",
        "model": options.model,
        "dataset": " + ".join(Path(path).name for path in paths_of(options.train)),
        "method": losses,
        "rows": rows,
        "facts": {
            "method": f"{losses}, {how}, learning rate {config.learning_rate:g}",
            **facts(trainer),
        },
    }


def _write_samples(path: Path, questions: list[str], answers: tuple[Answers, Answers] | None) -> None:
    if not answers:
        path.unlink(missing_ok=True)
        return
    shown = zip(questions, answers[0].texts, answers[1].texts, strict=True)
    write_jsonl(path, ({"prompt": question, "before": before, "after": after} for question, before, after in shown))


def _show(console: Console, summary: dict) -> None:
    console.print()
    if summary["rows"]:
        console.print(_table(summary))
    else:  # without held-out rows there is nothing to compare
        console.print(printable(summary["title"]), style="bold")
    for label, value in summary["facts"].items():
        console.print(printable(f"  {label:<16}{value}"))


def _table(summary: dict) -> Table:
    table = Table(title=printable(summary["title"]), title_justify="left", title_style="bold")
    table.add_column("held-out")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("")
    for row in summary["rows"]:
        values = [format_number(row[when]) for when in ("before", "after")]
        table.add_row(printable(row["metric"]), *values, row["unit"])
    return table


def _show_answers(console: Console, questions: list[str], old: Answers, new: Answers) -> None:
    shown = quartiles(old, new)
    console.print(f"\n{len(shown)} of {len(questions)} held-out answers, at the quartiles of the change in length:")
    for i in shown:
        console.print(f"\n{_short(questions[i])}", style="bold")
        console.print(f"   before ({old.lengths[i]} tokens): {_short(old.texts[i])}")
        console.print(f"   after  ({new.lengths[i]} tokens): {_short(new.texts[i])}")


def quartiles(old: Answers, new: Answers) -> list[int]:
    """The answers at the quartiles of the change in length: neither the best nor the worst are picked."""
    change = [after - before for before, after in zip(old.lengths, new.lengths, strict=True)]
    order = sorted(range(len(change)), key=change.__getitem__)
    return list(dict.fromkeys(order[round(part * (len(order) - 1) / 4)] for part in (1, 2, 3)))


def _short(text: str, limit: int = 300) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."
