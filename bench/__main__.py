"""`python -m bench`: list the cases, measure a suite, or write the report again from the JSON results."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from bench.harness import machine, model
from bench.harness.measure import load, save, say
from bench.pages import readme, report
from bench.suites import divergences, fisher, gpu, losses, ops, scale, selective, train, trl

RESULTS = Path(__file__).resolve().parent / "results"
SUITES = {
    "machine": machine, "ops": ops, "selective": selective, "divergences": divergences, "losses": losses,
    "train": train, "trl": trl, "scale": scale, "fisher": fisher,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line: one command per suite, and `report`, `gpu` and `model`.

    The commands without a help text (`memory`, `gpu-kernels`, `train-run`) are what the bench starts in processes of
    their own. The help does not list them.
    """
    main = argparse.ArgumentParser("python -m bench", description=__doc__)
    main.add_argument("--list", action="store_true", help="show the suites, their cases and implementations")
    commands = main.add_subparsers(dest="command", metavar="SUITE | gpu | report | model")
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=suite.__doc__.splitlines()[0])
        command.add_argument("--case", nargs="+", metavar="NAME", help="names, or patterns such as 'frozen-*-mask0'")
        quick = "run the small cases only: about a minute, and too small to claim a speed"
        command.add_argument("--quick", action="store_true", help=quick)
        command.add_argument("--rounds", type=int, default=7, help="interleaved runs per implementation (default 7)")
        limit = "skip implementations that seem to need more seconds per run (default 20)"
        command.add_argument("--limit", type=float, default=20, help=limit)
        these = "measure these implementations, plus the bare matrix products where the suite has them"
        command.add_argument("--only", nargs="+", metavar="IMPLEMENTATION", help=these)
        command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
        out = "folder for the results (default bench/results; runs/bench with --quick or --only)"
        command.add_argument("--out", type=Path, help=out)
    again = commands.add_parser("report", help="write tables, plots and report.html from a folder of results")
    again.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    raw = argparse.RawDescriptionHelpFormatter
    on_gpu = commands.add_parser("gpu", help=gpu.__doc__.splitlines()[0], description=gpu.__doc__, formatter_class=raw)
    on_gpu.add_argument("--out", type=Path, required=True, help="folder for the results and report.html")
    on_gpu.add_argument("--seconds", type=int, default=gpu.SECONDS, help=f"for everything (default {gpu.SECONDS})")
    predict = commands.add_parser("model", help=model.__doc__.splitlines()[0])
    predict.add_argument("--device", choices=model.DEVICES, default="h100")
    memory = commands.add_parser("memory")  # run in a fresh process; prints bytes
    memory.add_argument("suite", choices=SUITES)
    memory.add_argument("case")
    memory.add_argument("implementation")
    memory.add_argument("--threads", type=int, required=True)
    commands.add_parser("gpu-kernels")  # the first step of `gpu`; prints one line per kernel
    one = commands.add_parser("train-run")  # one training run in a fresh process; prints JSON
    one.add_argument("case")
    one.add_argument("implementation")
    one.add_argument("--threads", type=int, required=True)
    return main


def list_cases() -> None:
    """Prints every suite with its cases and implementations."""
    for name, suite in SUITES.items():
        print(f"{name}: {suite.__doc__.splitlines()[0]}")
        for case in {**dict.fromkeys(suite.CASES), **dict.fromkeys(suite.QUICK)}:
            print(f"  {case}{'  (quick)' if case in suite.QUICK else ''}")
        print("  implementations: " + ", ".join(suite.IMPLEMENTATIONS))


def chosen(suite, patterns: list[str] | None, quick: bool) -> list[str]:
    """The cases to run: all of them or the quick ones. With patterns, only the cases that match one of them."""
    cases = list(suite.QUICK if quick else suite.CASES)
    if not patterns:
        return cases
    for pattern in patterns:
        if not fnmatch.filter(cases, pattern):
            sys.exit(f"no {'quick ' if quick else ''}case matches {pattern!r}. `python -m bench --list` shows all")
    return [case for case in cases if any(fnmatch.fnmatchcase(case, pattern) for pattern in patterns)]


def only(suite, wanted: list[str]) -> dict[str, str]:
    """Removes all but the wanted implementations from the suite, and returns the removed ones with the reason."""
    unknown = [name for name in wanted if name not in suite.IMPLEMENTATIONS]
    if unknown:
        sys.exit(f"there is no implementation {unknown[0]!r}. There are: {', '.join(suite.IMPLEMENTATIONS)}")
    left_out = {name: "left out (--only)" for name in suite.IMPLEMENTATIONS if name not in wanted}
    kept = {name: suite.IMPLEMENTATIONS[name] for name in wanted} if isinstance(suite.IMPLEMENTATIONS, dict) else wanted
    suite.IMPLEMENTATIONS = kept
    return left_out


def run_suite(name: str, arguments: argparse.Namespace) -> None:
    """Measures one case after the other, and writes the JSON file after each of them.

    Records of earlier runs stay in the file, except those of the cases that are measured again.
    """
    suite, cases = SUITES[name], chosen(SUITES[name], arguments.case, arguments.quick)
    left_out = only(suite, arguments.only) if arguments.only else {}
    folder = arguments.out or (Path("runs/bench") if arguments.quick or arguments.only else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-quick" if arguments.quick else name
    path = folder / f"{stem}.json"
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case}")
        measured = suite.run(case, arguments.rounds, arguments.limit)
        if not measured:
            say(f"    nothing could be measured of {case}. Its earlier records in {path} stay")
            continue
        measured = [replace(m, skipped=m.skipped | left_out) for m in measured]
        earlier = [m for m in load(path) if m.case != case] if path.exists() else []
        save([*earlier, *measured], path)
        print(report.tables(measured), flush=True)
    if not path.exists():
        sys.exit("nothing could be measured, so nothing was written")
    print("written:", path, *report.write({f"{stem}.md": report.tables(load(path)).encode()}, folder))


def make_report(folder: Path) -> None:
    """Writes the tables, plots and report.html of a folder from its JSON files.

    For bench/results it also does so for the folders of other machines inside it, and updates the result tables of the
    README and the documentation.
    """
    suites = {path.stem: load(path) for path in sorted(folder.glob("*.json"))}
    measurements = [m for records in suites.values() for m in records]
    if not measurements:
        sys.exit(f"there are no results (*.json) in {folder}. Run a suite first")
    pages = {f"{name}.md": report.tables(records).encode() for name, records in suites.items()}
    print("written:", *report.write(pages, folder), *report.everything(measurements, folder))
    if folder.resolve() == RESULTS:
        folders = sorted(path.parent for path in folder.glob("*/*.json"))  # of other machines
        for other in dict.fromkeys(folders):
            make_report(other)
        readme.update([*measurements, *(m for path in sorted(folder.glob("*/*.json")) for m in load(path))])


def main() -> None:
    """The command `python -m bench`."""
    try:
        dispatch(parser().parse_args())
        sys.stdout.flush()
    except BrokenPipeError:  # `--list | head` closes the pipe early: discard what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(arguments: argparse.Namespace) -> None:
    """Runs the command that the arguments name."""
    if arguments.list:
        return list_cases()
    if arguments.command is None:
        return parser().print_help()
    if arguments.command == "model":
        return print(model.table(arguments.device))
    if arguments.command == "gpu":
        sys.exit(gpu.main(arguments.out, arguments.seconds))
    if arguments.command == "gpu-kernels":
        sys.exit(gpu.check_kernels())
    if arguments.command == "report":
        return make_report(arguments.folder)
    torch.set_num_threads(arguments.threads)
    if arguments.command == "memory":
        return print(SUITES[arguments.suite].memory(arguments.case, arguments.implementation))
    if arguments.command == "train-run":
        return train.main(arguments.case, arguments.implementation)
    return run_suite(arguments.command, arguments)


if __name__ == "__main__":
    main()
