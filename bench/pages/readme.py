"""Tables of results in README and in the documentation, between markers, made from the records alone.

README has one short table, `docs/benchmarks.md` has all of them, `docs/how-to/keeping-abilities.md` the tax recipe's.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

from bench.harness.measure import FLOOR, ROOT, Measurement
from bench.pages.report import aligned, groups, seconds
from fastalign.files import write_text

BEGIN, END = "<!-- results: python -m bench report -->", "<!-- end of results -->"
TAX_BEGIN, TAX_END = "<!-- tax: python -m bench report -->", "<!-- end of tax -->"
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
ABILITIES = ROOT / "docs" / "how-to" / "keeping-abilities.md"
TAX = ROOT / "fastalign" / "recipes" / "tax" / "results" / "tax.json"
# (case of `ops`, what to call it)
OPS = (
    ("frozen-float32-2048x576x49152-mask0", "log-probs and gradient, frozen head"),
    ("frozen-float32-2048x576x49152-mask50", "the same, half of the tokens are prompt tokens"),
    ("frozen-bfloat16-2048x576x49152-mask50", "half of the tokens are prompt tokens, bfloat16"),
)
GPU_OPS = (  # the same on a GPU, whose results lie in a folder of their own
    ("frozen-bfloat16-2048x576x49152-mask0", "2048 tokens, width 576, vocabulary 49152"),
    ("frozen-bfloat16-2048x2048x49152-mask0", "2048, 2048, 49152"),
    ("frozen-bfloat16-1024x4096x128256-mask0", "1024, 4096, 128256"),
)
GPU_OURS = {"fastalign, CUDA": "fastalign cuda", "fastalign, Triton": "fastalign triton"}
PEERS = {  # column -> what names it among the implementations
    "TRL": "TRL", "Liger": "Liger", "Cut Cross Entropy": "Cut Cross Entropy", "torch": "torch linear_cross_entropy",
}  # fmt: skip
TRAIN = (
    ("lora-float32-dialogue", "LoRA float32, dialogue"),
    ("lora-bfloat16-dialogue", "LoRA bfloat16, dialogue"),
    ("lora-float32-long", "LoRA float32, long prompts"),
    ("lora-bfloat16-long", "LoRA bfloat16, long prompts"),
    ("full-float32-dialogue", "all weights float32, dialogue"),
    ("full-bfloat16-dialogue", "all weights bfloat16, dialogue"),
    ("full-float32-long", "all weights float32, long prompts"),
    ("full-bfloat16-long", "all weights bfloat16, long prompts"),
)
# (suite, case, what to call it): beside the fastest of the others alone
OTHERS = (
    (
        "divergences",
        "forward_kl-float32-2048x576x49152-mask50",
        "forward KL to a teacher and gradient, half prompt tokens",
    ),
    ("divergences", "reverse_kl-float32-2048x576x49152-mask50", "reverse KL, the same"),
    ("divergences", "jsd-float32-2048x576x49152-mask50", "JSD, the same"),
    ("fisher", "body-32x64", "Fisher information of 4 layers, 32 sequences of 64 tokens"),
    ("fisher", "ewc", "EWC's penalty and gradient, 135M weights"),
)
_HALF = "float32-2048x576x49152-mask50"
# README's rows: (suite, case, what to call it)
SHORT = (
    *(("train", case, f"DPO step, {name}") for case, name in TRAIN[:4]),
    ("ops", "frozen-float32-2048x576x49152-mask0", "`linear_logprobs` and gradient, frozen output layer"),
    ("ops", "trainable-float32-2048x576x49152-mask0", "`linear_logprobs` and gradients, trained output layer"),
    (
        "ops",
        "frozen-bfloat16-2048x576x49152-mask50",
        "`linear_logprobs`, bfloat16, half of the tokens are prompt tokens",
    ),
    ("divergences", f"forward_kl-{_HALF}", "forward KL to a teacher, half of the tokens are prompt tokens"),
    ("divergences", f"reverse_kl-{_HALF}", "reverse KL to a teacher, half of the tokens are prompt tokens"),
    ("divergences", f"jsd-{_HALF}", "JSD to a teacher, half of the tokens are prompt tokens"),
)
SHOWN = {case: name for *_, case, name in (*OPS, *TRAIN, *OTHERS)}
PLOT = "zen5/memory-frozen-float32-2048x576-mask0.png"  # where all of it was measured with two threads
SHOWN_PLOT = f"![Memory against vocabulary](../bench/results/{PLOT})"


def update(measurements: list[Measurement]) -> None:
    """Rewrites what stands between the markers, each file atomically.

    Raises:
        SystemExit: the measurements hold none of the cases that are shown, or a file lacks its markers.
    """
    tables = by_machine(measurements)
    if not tables:
        sys.exit("the results hold none of the cases that are shown: " + ", ".join(SHOWN))
    runs = json.loads(TAX.read_text(encoding="utf-8"))["runs"]
    texts = {
        README: between(README, BEGIN, END, short_section(measurements)),
        BENCHMARKS: between(BENCHMARKS, BEGIN, END, "\n\n".join([*tables, SHOWN_PLOT])),
        ABILITIES: between(ABILITIES, TAX_BEGIN, TAX_END, tax_table(runs)),
    }
    for path, text in texts.items():
        write_text(path, text)


def between(path: Path, begin: str, end: str, new: str) -> str:
    """The text of a file with `new` between its two markers."""
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        sys.exit(f"{path} must hold {begin!r} and then {end!r}, once each; what is between them is written here")
    return f"{text.split(begin)[0]}{begin}\n\n{new}\n\n{end}{text.split(end)[1]}"


def short_section(measurements: list[Measurement]) -> str:
    """README's one table: fastalign beside the fastest of the others, on the CPU that was measured last."""
    for device in dict.fromkeys(m.device for m in sorted(measurements, key=lambda m: m.date, reverse=True)):
        of_device = [m for m in measurements if m.device == device]
        rows = [row for suite, case, name in SHORT if (row := _short_row(groups(of_device), suite, case, name))]
        if " cores, " in device and rows:
            break
    else:
        sys.exit("the results hold none of the cases of README's table: " + ", ".join(case for _, case, _ in SHORT))
    heading = ("time, or pairs/s (memory)", "fastalign", "the fastest of the others", "times as fast")
    shown = {case for _, case, _ in SHORT}
    days = sorted({m.date[:10] for m in of_device if m.case in shown})
    about = (
        "Training steps are DPO of SmolLM2-135M-Instruct (memory: the whole process). Single calls are of 2048 tokens, "
        "width 576,\nvocabulary 49152 (memory: beyond the inputs). "
        f"{device}; {' to '.join(dict.fromkeys((days[0], days[-1])))}."
    )
    return f"{aligned([heading, *rows])}\n\n{about}"


def _short_row(cases: dict, suite: str, case: str, name: str) -> tuple[str, ...] | None:
    """One row of the short table, or None where the case was not measured beside another implementation."""
    rows = cases.get((suite, case), [])
    if suite == "train":
        row = _train_row(rows, name)
        return row and (row[0], row[1], f"TRL: {row[2]}", row[3])
    ours = [m for m in rows if m.implementation.startswith("fastalign")]
    others = [m for m in rows if not m.implementation.startswith("fastalign") and FLOOR not in m.implementation]
    if not ours or not others:
        return None
    best, other = (min(found, key=lambda m: m.median_s) for found in (ours, others))
    return name, _cell(best), f"{other.implementation}: {_cell(other)}", f"{other.median_s / best.median_s:.1f}x"


def tax_table(runs: list[dict]) -> str:
    """The hardest plain run, and of each method the run whose margin is nearest to half of that one's."""
    hard = max((run for run in runs if run["method"] == "plain"), key=lambda run: run["learning_rate"])
    shown = [hard]
    for method in dict.fromkeys(run["method"] for run in runs):
        of_method = [run for run in runs if run["method"] == method and run is not hard]
        shown += sorted(of_method, key=lambda run: abs(run["margin"] - hard["margin"] / 2))[:1]
    rows = [("method (strength)", "held-out margin", "perplexity of other text", "KL from the start, nats per token")]
    for run in shown:
        tax = run["tax"]
        perplexity = f"{tax['base_perplexity']:.1f} to {tax['tuned_perplexity']:.1f}"
        name = f"{run['method']} ({run['strength']})"
        rows.append((name, f"{run['margin']:.1f}", perplexity, f"{tax['kl_mean']:.3f}"))
    return aligned(rows)


def section(measurements: list[Measurement]) -> str:
    """The tables, and what they were measured on."""
    cases = groups(measurements)
    columns = {"fastalign": "fastalign cpu", **PEERS}
    op_rows = [("`linear_logprobs`, time (extra memory)", *columns, "bare products")]
    op_rows += [_op_row(cases["ops", case], name, columns) for case, name in OPS if ("ops", case) in cases]
    train_rows = [("DPO steps, pairs/s (peak memory)", "fastalign", "TRL", "ratio")]
    train_rows += [row for case, name in TRAIN if (row := _train_row(cases.get(("train", case), []), name))]
    other_rows = [("time (extra memory)", "fastalign", "the fastest of the others", "floor: bare products, or a copy")]
    other_rows += [row for *key, name in OTHERS if (row := _other_row(cases.get(tuple(key), []), name))]
    parts = [aligned(rows) for rows in (train_rows, op_rows, other_rows) if len(rows) > 1]
    used = [m for (_, case), rows in cases.items() if case in SHOWN for m in rows]
    parts.append(_about(used, train_rows))
    parts[-1] += _two_products(cases.get(("machine", "product-float32"), []))
    if any("-" in row for row in (*op_rows, *other_rows)):
        parts[-1] += "\n-: not measured." + "".join(
            _skipped(cases["ops", case][0], name) for case, name in OPS if ("ops", case) in cases
        )
    return "\n\n".join(parts)


def by_machine(measurements: list[Measurement]) -> list[str]:
    """Tables of each machine with a case that they show and a line that names it, what was measured last first."""
    machines, parts = defaultdict(list), []
    for m in sorted(measurements, key=lambda m: m.date, reverse=True):
        machines[m.device].append(m)  # times of two stand in no one table
    for device, own in machines.items():
        if " cores, " not in device:  # as `measure.cpu_name` names a CPU
            parts += _of_gpu(own)
        elif any(m.case in SHOWN for m in own):
            parts.append(section(own))
    return parts


def _of_gpu(measurements: list[Measurement]) -> list[str]:
    cases = {case: rows for (suite, case), rows in groups(measurements).items() if suite == "ops"}
    shown = [(cases[case], name) for case, name in GPU_OPS if case in cases]
    if not shown:
        return []
    columns = {**GPU_OURS, "eager": "eager", **PEERS}
    rows = [("on a GPU, bfloat16, frozen head: log-probs and gradient", *columns, "bare products")]
    rows += [_op_row(of_case, name, columns) for of_case, name in shown]
    used = [column for column in range(len(rows[0])) if any(row[column] != "-" for row in rows[1:])]
    everyone = [m for of_case, _ in shown for m in of_case if FLOOR not in m.implementation]

    def worst(ours: bool) -> str:
        errors = [m.errors["logprobs"] for m in everyone if m.implementation.startswith("fastalign") == ours]
        return f"{max(errors):.1e}" if errors else "-"

    newest = max((m for of_case, _ in shown for m in of_case), key=lambda m: m.date)
    named = {n: newest.versions.get(n) for n in ("torch", "trl", "liger-kernel", "cut-cross-entropy")}
    versions = ", ".join(f"{n} {version}" for n, version in named.items() if version)
    return [
        aligned([tuple(row[column] for column in used) for row in rows]),
        f"{newest.device}; {versions};\n{newest.date[:10]}. Log-probs are off by at most {worst(True)} nats "
        f"(fastalign), {worst(False)} (the others).",
    ]


def _about(used: list[Measurement], train_rows: list[tuple[str, ...]]) -> str:
    """Of what, on what and when, of how many runs, and what the figures of training are."""
    newest, runs = max(used, key=lambda m: m.date), sorted({m.runs for m in used})
    days = sorted({m.date[:10] for m in used})
    versions = ", ".join(f"{n} {v}" for n, v in newest.versions.items() if n in ("torch", "trl", "liger-kernel"))
    text = (
        f"Steps are of SmolLM2-135M-Instruct, single calls of random values in its shapes. {newest.device}, "
        f"{newest.threads} threads;\n{versions}; {days[0] if days[0] == days[-1] else f'{days[0]} to {days[-1]}'}.\n"
        f"Medians of {runs[0]} to {runs[-1]} interleaved runs.\n"
        "More, with errors against float64, in `bench/results`."
    )
    if len(train_rows) > 1:
        text += (
            "\nWhere both of TRL's settings were run (activations stored, or recomputed), each figure is the better "
            "one:\nthe pairs/s of the faster setting, and the memory of the one that needs less, the model included."
        )
    if any(row[0].startswith("LoRA bfloat16") for row in train_rows):
        text += "\nLoRA bfloat16: the weights of both are bfloat16. TRL also multiplies under autocast, its default."
    if any("bfloat16" in m.case for m in used) and newest.device.endswith("AVX2"):
        text += (
            "\nThis CPU has no bfloat16 instructions. torch's products in bfloat16 are slow here, so fastalign "
            "converts to float32."
        )
    return text


def _two_products(rows: list[Measurement]) -> str:
    """Why fastalign is faster than the bare float32 products, where it is; nothing elsewhere."""
    rates = {m.implementation: m.sizes["flop"] / m.median_s / 1e9 for m in rows}
    if rates.get("oneDNN", 0) < 1.2 * rates.get("torch", math.inf):
        return ""
    return (
        f"\nThe bare products in float32 are torch.mm's. They run at {rates['torch']:.0f} GFLOP/s, because MKL does "
        f"not use AVX-512 on this CPU.\nfastalign's layers use oneDNN's products ({rates['oneDNN']:.0f} GFLOP/s), and "
        "the output layer uses fastalign's kernels."
    )


def _skipped(first: Measurement, row: str) -> str:
    """Why some cells of a row are empty, where its records say so."""
    reasons = [
        f"{column}: {reason.rstrip('.')}"
        for column, word in PEERS.items()
        for name, reason in first.skipped.items()
        if word in name
    ]
    return f" {row[0].upper()}{row[1:]}: {'; '.join(reasons)}." if reasons else ""


def _op_row(rows: list[Measurement], name: str, columns: dict[str, str]) -> tuple[str, ...]:
    def cell(word: str) -> str:
        found = [m for m in rows if word in m.implementation]
        return _cell(min(found, key=lambda m: m.median_s)) if found else "-"

    return name, *map(cell, columns.values()), cell(FLOOR)


def _cell(m: Measurement) -> str:
    memory = "" if m.peak_extra_bytes is None else f" ({m.peak_extra_bytes / 2**20:,.0f} MiB)"
    return seconds(m.median_s) + memory


def _other_row(rows: list[Measurement], name: str) -> tuple[str, ...] | None:
    """None without another implementation that returns what ours does: a floor returns something else."""
    ours = min((m for m in rows if m.implementation.startswith("fastalign")), key=lambda m: m.median_s, default=None)
    if ours is None:
        return None
    same = [m for m in rows if m.errors.keys() == ours.errors.keys() and not m.implementation.startswith("fastalign")]
    if not same:
        return None
    best = min(same, key=lambda m: m.median_s)
    floor = next((_cell(m) for m in rows if FLOOR in m.implementation), "-")
    if "copy_bytes_per_s" in ours.sizes:
        floor = seconds(ours.sizes["bytes"] / ours.sizes["copy_bytes_per_s"])
    return name, _cell(ours), f"{best.implementation}: {_cell(best)}", floor


def _train_row(rows: list[Measurement], name: str) -> tuple[str, ...] | None:
    """None unless both trainers were measured."""
    ours = next((m for m in rows if m.implementation == "fastalign"), None)
    theirs = [m for m in rows if m.implementation.startswith("TRL")]
    if ours is None or not theirs:
        return None

    def cell(pairs: float, resident: int) -> str:
        return f"{pairs:.2f} ({resident / 2**30:.1f} GiB)"

    fastest = min(theirs, key=lambda m: m.median_s)
    leanest = min(m.sizes["resident_bytes"] for m in theirs)
    pairs = ours.sizes["pairs"]
    return (
        name,
        cell(pairs / ours.median_s, ours.sizes["resident_bytes"]),
        cell(pairs / fastest.median_s, leanest),
        f"{fastest.median_s / ours.median_s:.1f}x",
    )
