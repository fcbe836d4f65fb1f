"""What alignment costs, and what holds the cost down: one model tuned hard in several ways, each at several strengths.

    python -m fastalign.recipes.tax.compare            # about half an hour on one core

A run that was interrupted goes on where it stopped: the results of every finished run are kept in its folder.

All weights of SmolLM2-135M-Instruct are trained by DPO on the pairs of the `concise` recipe. The tax is
KL(start || tuned) in nats per token, on a third of Python's help topics (`pydoc_data.topics`). The methods that need
text (Fisher information, replay) get the other two thirds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

from fastalign.config.preference import PreferenceConfig
from fastalign.data.loading import load_rows
from fastalign.data.packing import PackedBatch
from fastalign.data.text import text_windows
from fastalign.evaluation.tax import Scorer, TokenScores, compare_tokens, model_scorer, summarise
from fastalign.files import read_json, write_json, write_text
from fastalign.fisher.diagonal import fisher_diagonal
from fastalign.fisher.storage import Fisher
from fastalign.models.loading import load_model, load_tokenizer
from fastalign.models.scoring import prepare
from fastalign.ops.ewc import ewc_penalty
from fastalign.regularizers.distillation import Distillation
from fastalign.regularizers.ewc import EWC
from fastalign.regularizers.layerwise import LayerWise
from fastalign.regularizers.replay import Replay
from fastalign.training.preference import PreferenceTrainer

MODEL = "smollm2-135m-instruct"
DATA = Path(__file__).parent.parent / "concise"
STEPS, ROWS_A_STEP, LEARNING_RATE = 12, 4, 1.5e-4
HELD_OUT_PAIRS, TAX_WINDOWS, FISHER_WINDOWS, WINDOW = 40, 12, 24, 256


@dataclass
class Run:
    """One way to tune: a method, its strength as the table shows it, and the regularisers that it needs."""

    method: str
    strength: str
    regularizers: Callable[[Setting], list]
    rate: float = 1.0  # the learning rate, as a multiple of LEARNING_RATE

    @property
    def name(self) -> str:
        """The name of the run's file of results."""
        return f"{self.method}-{self.strength}".replace(" ", "-").replace("/", "-")


@dataclass
class Setting:
    """What all runs share."""

    folder: Path
    model: nn.Module
    tokenizer: Any
    start: dict[str, torch.Tensor]
    replay: list[dict]
    held_out: list[dict]
    base: Scorer

    def ewc(self, factor: float) -> EWC:
        """EWC whose penalty for the plain run's final weights is `factor` times DPO's loss at the start, log 2."""
        plain = read_json(self.folder / "runs" / "plain-1.json")
        return EWC(str(self.folder / "fisher.safetensors"), factor * math.log(2) / plain["fisher_distance"])


RUNS = (
    Run("plain", "1", lambda s: []),
    Run("plain", "0.4", lambda s: [], rate=0.4),
    Run("plain", "0.15", lambda s: [], rate=0.15),
    *(Run("ewc", f"{c:g}", lambda s, c=c: [s.ewc(c)]) for c in (1, 10, 100)),
    *(Run("distillation", f"{a:g}", lambda s, a=a: [Distillation("start", a)]) for a in (0.5, 0.2, 0.8)),
    *(Run("replay", f"{c:g}", lambda s, c=c: [Replay(s.replay, c, max_length=WINDOW)]) for c in (0.2, 0.4, 0.1)),
    *(Run("layer-wise", f"{n}", lambda s, n=n: [LayerWise([n // 2, n])]) for n in (12, 6, 24)),
)


def rank(run: Run) -> int:
    """The order of the runs: the first strength of every method, then the second of every method, and so on.

    The plain run is the first of all, because EWC's strength is set by it.
    """
    return [other.strength for other in RUNS if other.method == run.method].index(run.strength)


def split_topics() -> tuple[list[dict], list[dict]]:
    """Python's help topics as rows of text: two thirds for Fisher information and replay, a third to measure on."""
    texts = list(dict.fromkeys(topics[name] for name in sorted(topics)))  # some have two names
    return [{"text": t} for i, t in enumerate(texts) if i % 3], [{"text": t} for t in texts[::3]]


def spread(rows: Sequence, count: int) -> list:
    """`count` of the rows, evenly spread from the first to the last."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


def settle(folder: Path) -> Setting:
    """Loads the model and the texts, and scores the texts with the model before any training."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL, dtype="float32", for_adapter=False)
    replay, measured = split_topics()
    held_out = spread(text_windows(measured, tokenizer, length=WINDOW), TAX_WINDOWS)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Setting(folder, model, tokenizer, start, replay, held_out, remember_start(model, held_out))


def compute_fisher(setting: Setting) -> None:
    """Computes the empirical Fisher information of the replay text, unless the folder has it already.

    It is the mean of the squared gradients of single windows.
    """
    path = setting.folder / "fisher.safetensors"
    if path.exists():
        return
    rows = spread(text_windows(setting.replay, setting.tokenizer, length=WINDOW), FISHER_WINDOWS)
    fisher_diagonal(setting.model, rows).save(path)


def train(run: Run, setting: Setting) -> dict[str, Any]:
    """Trains once from the start. Returns the tax on text and the preference on held-out pairs."""
    setting.model.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in setting.model.named_parameters():
            parameter.copy_(setting.start[name])
    config = PreferenceConfig(
        output_dir=str(setting.folder / "scratch"), learning_rate=LEARNING_RATE * run.rate, max_steps=STEPS,
        per_device_train_batch_size=ROWS_A_STEP, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        seed=1, use_cpu=True, disable_tqdm=True, ref_cache_dir=str(setting.folder / "cache"), overwrite_output_dir=True,
    )  # fmt: skip
    train_rows = load_rows(spread(list(load_rows(DATA / "train.jsonl")), STEPS * ROWS_A_STEP))
    eval_rows = load_rows(spread(list(load_rows(DATA / "test.jsonl")), HELD_OUT_PAIRS))
    trainer = PreferenceTrainer(
        setting.model, config, train_rows, eval_rows, setting.tokenizer, regularizers=run.regularizers(setting)
    )
    begin = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - begin
    preference = trainer.evaluate()
    tokens = compare_tokens(setting.base, model_scorer(setting.model), setting.held_out, trainer.layout, progress=False)
    result = {
        "method": run.method, "strength": run.strength, "learning_rate": config.learning_rate, "seconds": seconds,
        "steps": STEPS, "rows_a_step": ROWS_A_STEP, "tax": summarise(tokens),
        "accuracy": preference["eval_rewards/accuracies"], "margin": preference["eval_rewards/margins"],
        "log": [line for line in trainer.state.log_history if "loss" in line],
    }  # fmt: skip
    if run.name == "plain-1":
        result["fisher_distance"] = fisher_distance(setting)
    return result


def fisher_distance(setting: Setting) -> float:
    """`1/2 sum F (theta - theta_start)^2` of the model as it is now: the penalty that EWC of strength 1 would add."""
    fisher = Fisher.load(setting.folder / "fisher.safetensors")
    parameters = dict(setting.model.named_parameters())
    names = list(fisher)
    with torch.no_grad():
        now, start, weights = ([source[name] for name in names] for source in (parameters, setting.start, fisher))
        return ewc_penalty(now, start, weights).item()


def remember_start(model: nn.Module, rows: list[dict]) -> Scorer:
    """A scorer that repeats what the model says now about the held-out text, after the model has changed."""
    scores: dict[bytes, TokenScores] = {}
    score = model_scorer(model)

    def key(packed: PackedBatch) -> bytes:
        assert packed.targets is not None
        return packed.targets.numpy().tobytes()

    def remember(packed: PackedBatch) -> TokenScores:
        now = score(packed)
        # Training changes the weight in place. A dense head has its adapters in the weight, and none beside it.
        head = now.head.dense()
        scores[key(packed)] = now._replace(head=head._replace(weight=head.dense_weight.clone()))
        return now

    compare_tokens(remember, remember, rows, prepare(model))
    return lambda packed: scores[key(packed)]


HEADINGS = ("method", "strength", "tax, nats per token", "perplexity", "prefers chosen, %", "margin", "seconds")


def row_of(result: dict[str, Any]) -> list[str]:
    """A run's row in the table, see HEADINGS."""
    tax = result["tax"]
    return [
        result["method"], result["strength"], f"{tax['kl_mean']:.3f}",
        f"{tax['base_perplexity']:.1f} to {tax['tuned_perplexity']:.1f}", f"{100 * result['accuracy']:.0f}",
        f"{result['margin']:.2f}", f"{result['seconds']:.0f}",
    ]  # fmt: skip


def report(folder: Path) -> None:
    """Writes tax.json, tax.md and tax.png from the runs that are done."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "runs").glob("*.json")]
    methods = list(dict.fromkeys(run.method for run in RUNS))
    results.sort(key=lambda result: (methods.index(result["method"]), -result["tax"]["kl_mean"]))
    rows = [HEADINGS, *(row_of(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = [
        "| " + " | ".join(v.ljust(w) if i < 1 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True)))
        + " |" for row in rows
    ]  # fmt: skip
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    write_text(folder / "tax.md", "\n".join(lines) + "\n")
    write_json(folder / "tax.json", {"model": MODEL, "window": WINDOW, "runs": results})
    plot(results, folder / "tax.png")
    print("\n".join(lines))
    print(f"Written to {folder}: tax.json, tax.md, tax.png")


def plot(results: list[dict], path: Path) -> None:
    """Draws held-out preference against the tax, with one curve per method over its strengths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def value(result: dict, key: str) -> float:
        return {"accuracy": 100 * result["accuracy"], "margin": result["margin"], "kl": result["tax"]["kl_mean"],
                "perplexity": result["tax"]["tuned_perplexity"]}[key]  # fmt: skip

    labels = {
        "accuracy": "held-out pairs preferred correctly, %", "margin": "held-out reward margin",
        "kl": "tax: KL(start || tuned) on held-out text, nats per token", "perplexity": "perplexity of held-out text",
    }  # fmt: skip
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("kl", "accuracy"), ("kl", "margin"), ("perplexity", "margin"))
    for axes, (x, y) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, method in enumerate(dict.fromkeys(result["method"] for result in results)):
            points = [(value(r, x), value(r, y)) for r in results if r["method"] == method]
            style = {"color": "#59616c", "linestyle": "--"} if method == "plain" else {"color": f"C{number - 1}"}
            axes.plot(*zip(*points, strict=True), marker="os^Dv<"[number], markersize=5, label=method, **style)
        axes.set_xlabel(labels[x])
        axes.set_ylabel(labels[y])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if x == "kl":
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"])
            lowest, highest = (pick(value(r, x) for r in results) for pick in (min, max))
            axes.set_xlim(lowest / 1.25, highest * 1.25)
        else:
            axes.axvline(results[0]["tax"]["base_perplexity"], color="#59616c", linewidth=0.8, linestyle=":")
        if y == "accuracy":
            axes.set_ylim(45, 103)
    figure.axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        "python -m fastalign.recipes.tax.compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tax"))
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", help="run these methods alone; the plain run is always included"
    )
    options = parser.parse_args()
    todo = [
        run for run in RUNS
        if not (options.out / "runs" / f"{run.name}.json").exists()
        and (not options.only or run.method in options.only or run.name == "plain-1")
    ]  # fmt: skip
    if todo:
        todo.sort(key=rank)
        setting = settle(options.out)
        compute_fisher(setting)
        for number, run in enumerate(todo, 1):
            if (options.out / "runs" / f"{run.name}.json").exists():
                continue  # another process has finished it meanwhile
            print(f"[{number}/{len(todo)}] {run.method}, strength {run.strength}", flush=True)
            result = train(run, setting)
            write_json(options.out / "runs" / f"{run.name}.json", result)
            print("   " + " ".join(row_of(result)), flush=True)
    report(options.out)


if __name__ == "__main__":
    main()
