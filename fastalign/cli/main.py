"""Commands: `fastalign dpo|sft|...`, `fastalign train RECIPE`, `data check FILE`, `tax`, `fisher`, `info`."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fastalign import __version__
from fastalign.errors import ConfigError, FastAlignError

_EPILOG = """examples:
  fastalign train dpo-smollm2                     a ready recipe: DPO of a packaged model, some minutes on a laptop
  fastalign dpo model=./model train=pairs.jsonl eval=held_out.jsonl beta=0.2 learning_rate=5e-5
  fastalign sft --config run.yaml num_train_epochs=2
  fastalign data check pairs.jsonl --model ./model
  fastalign tax ./model runs/mine --text prose.txt --out runs/mine

Options are key=value, in a YAML file or on the command line (which wins): those of the run (model, train, eval,
lora_rank, ...), of the method (beta, loss_type, ...), and every field of transformers.TrainingArguments.
`fastalign dpo --help` lists them.
"""
_OTHER_OPTIONS = """

and every field of transformers.TrainingArguments, for example num_train_epochs, per_device_train_batch_size,
gradient_accumulation_steps, gradient_checkpointing, lr_scheduler_type, warmup_steps, max_steps, seed.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after an error said in one sentence."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries; users can do nothing about them
    warnings.filterwarnings("ignore", message="Could not find a config file")  # peft, of a model that is a GGUF file
    try:
        argv = sys.argv[1:] if argv is None else argv
        args = _parser(argv).parse_args(argv)
        args.run(args)
    except FastAlignError as error:
        print(f"fastalign: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastalign: stopped", file=sys.stderr)
        return 130
    return 0


def methods() -> list[str]:
    """Every loss by name, sft and distill."""
    from fastalign.losses import ALIASES, PAIRWISE, UNPAIRED

    return ["sft", "distill", *PAIRWISE, *UNPAIRED, *ALIASES]


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fastalign", description="Align a language model on this machine.", epilog=_EPILOG, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"fastalign {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="run a recipe: a name that ships with fastalign, or a YAML file")
    train.add_argument("recipe", help=f"one of {', '.join(_recipes())}, or the path of a YAML file")
    _add_options(train)
    train.set_defaults(run=lambda args: _train(_read_recipe(args.recipe), args))

    data = commands.add_parser("data", help="look at a data set without training")
    check = data.add_subparsers(metavar="ACTION", required=True).add_parser("check", help="print the preflight report")
    check.add_argument("file", help="a .jsonl, .json, .parquet or .csv file")
    check.add_argument("--model", default="smollm2-135m-instruct", help="whose tokenizer to use (default: %(default)s)")
    check.add_argument(
        "--max-length",
        type=int,
        default=1024,
        help="most tokens of a prompt with one completion (default: %(default)s)",
    )
    check.set_defaults(run=_check)

    tax = commands.add_parser("tax", help="what tuning changed in a model, token by token, on any text")
    tax.add_argument("base", help="the model before: a folder, a .gguf file, a packaged model, or organisation/name")
    tax.add_argument("tuned", help="the model after: a folder of it, or a run folder, with an adapter or a whole model")
    tax.add_argument("--text", nargs="+", required=True, metavar="FILE", help=".txt, or rows of text or messages")
    tax.add_argument("--out", metavar="DIR", help="write tax.json and tax.html there")
    tax.add_argument("--length", type=int, default=512, help="most tokens of a window (default: %(default)s)")
    tax.add_argument("--max-tokens", type=int, metavar="N", help="the first N tokens of each file alone")
    tax.add_argument("--dtype", default="auto", help="weights in float32, bfloat16, float16 (default: by machine)")
    tax.set_defaults(run=_tax)

    fisher = commands.add_parser("fisher", help="how much each weight matters to some text, for EWC")
    fisher.add_argument("model", help="a folder, a .gguf file, a packaged model, or organisation/name")
    fisher.add_argument("--text", nargs="+", required=True, metavar="FILE", help=".txt, or rows of text or messages")
    fisher.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")
    fisher.add_argument("--length", type=int, default=512, help="most tokens of a window (default: %(default)s)")
    fisher.add_argument("--estimator", default="empirical", help="empirical, sampled or batch (default: %(default)s)")
    fisher.add_argument("--per", default="sequence", help="sequence or token (default: %(default)s)")
    fisher.add_argument("--seed", type=int, default=0, help="of what is sampled (default: %(default)s)")
    fisher.add_argument(
        "--bits", type=int, default=32, help="of each value in the file: 32 or 8 (default: %(default)s)"
    )
    fisher.set_defaults(run=_fisher)

    commands.add_parser("info", help="what is in use: versions, device, kernels").set_defaults(run=_info)

    shown = ("sft", "distill", "dpo", "ipo", "orpo", "kto")  # the rest is in --help of these, under loss_type
    for name in methods():
        asked = name in argv and {"-h", "--help"}.intersection(argv)  # the text is long, and loads transformers
        method = commands.add_parser(
            name,
            help=f"train with {name}" if name in shown else argparse.SUPPRESS,
            formatter_class=raw,
            epilog=_options_help(name) if asked else None,
        )
        method.add_argument("--config", help="a YAML file of options")
        _add_options(method)
        method.set_defaults(method=name, run=_train_method)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("options", nargs="*", metavar="key=value", help="options, over those of the file")


def _options_help(name: str) -> str:
    from transformers import TrainingArguments

    from fastalign.cli.run import RunOptions

    inherited = {f.name for f in fields(TrainingArguments)}
    lines = ["options of the run:"]
    lines += [f"  {f.name:<26}{f.metadata.get('help', '')} [{f.default}]" for f in fields(RunOptions)]
    lines += ["", "options of the method:"]
    for f in fields(_config_class(name)):
        if f.name not in inherited or f.name in ("learning_rate", "output_dir", "logging_steps"):
            default = f.default_factory() if callable(f.default_factory) else f.default
            lines.append(f"  {f.name:<26}{f.metadata.get('help', '')} [{default}]")
    return "\n".join(lines) + _OTHER_OPTIONS


def _config_class(name: str) -> type:
    from fastalign.config.distillation import DistillationConfig
    from fastalign.config.preference import PreferenceConfig
    from fastalign.config.sft import SFTConfig

    return {"sft": SFTConfig, "distill": DistillationConfig}.get(name, PreferenceConfig)


def _recipes() -> list[str]:
    names = (path.name for path in files("fastalign.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _read_recipe(name: str) -> dict[str, Any]:
    from fastalign.options import nearest

    if name in _recipes():
        return _read_yaml(Path(str(files("fastalign.recipes") / f"{name}.yaml")))
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"There is no recipe or file {name!r}; {nearest(name, _recipes())}")
    return _read_yaml(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The options of a YAML file; paths in it that start with ./ or ../ are meant from its folder."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ConfigError(f"The configuration {path} must be a mapping of option names to values")
    regularizers = options.get("regularizers")
    regularizers = regularizers if isinstance(regularizers, list) else []
    for mapping in [options, *(r for r in regularizers if isinstance(r, dict))]:
        for key in ("train", "eval", "model", "teacher", "fisher", "text"):
            if isinstance(mapping.get(key), list):
                mapping[key] = [_from_folder(value, path.parent) for value in mapping[key]]
            elif key in mapping:
                mapping[key] = _from_folder(mapping[key], path.parent)
    return dict(options)


def _from_folder(value: Any, folder: Path) -> Any:
    relative = isinstance(value, str) and value.startswith(("./", "../"))
    return str((folder / value).resolve()) if relative else value


def _train_method(args: argparse.Namespace) -> None:
    _train({**(_read_yaml(Path(args.config)) if args.config else {}), "method": args.method}, args)


def _train(options: dict[str, Any], args: argparse.Namespace) -> None:
    from transformers.utils import logging as transformers_logging

    from fastalign.cli.run import RunOptions, run
    from fastalign.options import from_mapping, nearest

    transformers_logging.disable_progress_bar()  # one bar at a time: ours
    for item in args.options:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"{item!r} is not of the form key=value")
        try:
            options[key] = yaml.safe_load(value) if value else None
        except yaml.YAMLError:
            raise ConfigError(f"{item!r} is not valid YAML after the =; quote the value") from None
    method = options.pop("method", None)
    if method not in methods():
        raise ConfigError(f"method is {method!r}; {nearest(str(method), methods())}")
    config_class = _config_class(method)
    if method not in ("sft", "distill"):
        options.setdefault("loss_type", method)
    of_run = {f.name for f in fields(RunOptions)}
    known = [*of_run, *(f.name for f in fields(config_class) if f.init), "method"]
    for key in options:
        if key not in known:
            raise ConfigError(f"Unknown option {key!r}; {nearest(key, known)}")
    config = from_mapping(config_class, {k: v for k, v in options.items() if k not in of_run})
    run(from_mapping(RunOptions, {k: v for k, v in options.items() if k in of_run}), config)


def _check(args: argparse.Namespace) -> None:
    from fastalign.data.files import load_rows
    from fastalign.data.tokenization import tokenize
    from fastalign.models.loading import load_tokenizer

    rows = load_rows(args.file)
    drop = {"on_truncate": "drop", "on_invalid": "drop"}  # so that the report can say what training would refuse
    _, report = tokenize(rows, load_tokenizer(args.model), max_length=args.max_length, **drop)
    print(report)


def _tax(args: argparse.Namespace) -> None:
    from fastalign.evaluation.tax import measure_tax
    from fastalign.report.tax import show_tax, write_tax

    for name in ("length", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 2:
            raise ConfigError(f"{name} is {value}; it must be 2 or more")
    found = measure_tax(
        args.base, args.tuned, args.text, length=args.length, max_tokens=args.max_tokens, dtype=args.dtype
    )
    show_tax(found)
    if args.out:
        print(f"Written to {write_tax(found, args.out)}")


def _fisher(args: argparse.Namespace) -> None:
    import torch

    from fastalign.data.text import text_windows
    from fastalign.fisher.diagonal import fisher_diagonal
    from fastalign.models.loading import load_model, load_tokenizer

    if args.length < 2 or args.bits not in (8, 32):
        raise ConfigError(f"length is {args.length} and bits {args.bits}; they must be 2 or more, and 8 or 32")
    tokenizer = load_tokenizer(args.model)
    rows = [row for name in args.text for row in text_windows(name, tokenizer, length=args.length)]
    model = load_model(args.model, for_adapter=False).to("cuda" if torch.cuda.is_available() else "cpu")
    fisher = fisher_diagonal(model, rows, estimator=args.estimator, per=args.per, seed=args.seed)
    fisher.save(args.out, bits=args.bits)
    squared = "batches" if args.estimator == "batch" else "tokens" if args.per == "token" else "windows"
    print(f"Fisher information of {len(fisher)} tensors from {fisher.samples} {squared} written to {args.out}")


_X86_KERNELS = ("avx512_bf16", "avx512", "avx2")


def _brgemm(found: Mapping[str, Any]) -> str:
    if found["isa"] == "avx512_bf16":
        return "bf16 BRGEMM in use"
    return f"bf16 BRGEMM {'there, but not used by these' if found['brgemm_bf16'] else 'not in this torch or machine'}"


def _info(args: argparse.Namespace) -> None:
    import platform

    import torch
    import transformers

    from fastalign.models.adapters import peft_version
    from fastalign.models.loading import default_dtype
    from fastalign.ops.backends import cpu, cuda

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    lines = {
        "fastalign": __version__,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "transformers": f"{transformers.__version__}, peft {peft_version()}",
        "device": device,
        "weights": f"{default_dtype(True)} under an adapter, {default_dtype(False)} when trained".replace("torch.", ""),
        "native module": "not built: run `make build`",
    }
    found = cpu.describe()
    if found["built"]:
        lines["native module"] = f"built with {found['compiler']}, for {', '.join(found['kernels_compiled'])}"
        left_out = [isa for isa in _X86_KERNELS if isa not in found["kernels_compiled"]]
        if left_out and found["kernels_compiled"] and platform.machine() in ("x86_64", "AMD64"):
            lines["native module"] += f"; without {', '.join(left_out)}, whose flags this compiler does not take"
        lines["cpu kernels"] = found["unavailable"] or (
            f"{found['isa']}, {found['vector_bits']}-bit vectors, {found['threads']} threads of "
            f"{'torch' if found['thread_pool'] == 'torch' else 'their own'}, {_brgemm(found)}"
        )
    lines["cuda kernels"] = cuda.describe()
    for label, value in lines.items():
        print(f"{label:<16}{value}")


if __name__ == "__main__":
    sys.exit(main())
