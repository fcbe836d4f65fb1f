"""Runs every fuzzer for long, and prints a table: inputs, refused ones, crashes, foreign exceptions, wrong results.

    python tests/fuzz/soak.py --inputs 20000

Each fuzzer runs in a process of its own: what kills the process counts as a crash. The exit status is 0 if nothing was
found, else 1; then each kind of fault is printed once, with the call that repeats it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
MODULES = ("fuzz_ops", "fuzz_losses", "fuzz_readers", "fuzz_options")
COLUMNS = ("inputs", "refused", "crashes", "foreign", "wrong")


def run_check(name: str, inputs: int, seed: int, report: Path) -> None:
    """Runs one fuzzer in this process, and writes its counts and the first fault of each kind to `report`."""
    import importlib

    import torch
    from comparing import Draw, Wrong
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as with_seed
    from hypothesis import strategies as st

    from fastalign.errors import FastAlignError

    torch.set_num_threads(1)
    module, _, check = name.partition(".")
    function, counts, faults = importlib.import_module(module).CHECKS[check], Counter(), {}

    @with_seed(seed)
    @settings(
        max_examples=inputs, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def many(data):
        counts["inputs"] += 1
        try:
            function(Draw(data))
        except FastAlignError:
            counts["refused"] += 1
        except Wrong as error:
            counts["wrong"] += 1
            faults.setdefault(f"wrong: {error}"[:60], str(error)[:400])
        except Exception as error:
            if type(error).__module__.startswith("hypothesis"):  # it stops an example that draws too much
                counts["inputs"] -= 1
                raise
            counts["foreign"] += 1
            faults.setdefault(f"{type(error).__name__}: {error}"[:60], f"{type(error).__name__}: {error}"[:400])
        if counts["inputs"] % 50 == 0:
            report.write_text(json.dumps([counts, faults]), encoding="utf-8")

    many()
    report.write_text(json.dumps([counts, faults]), encoding="utf-8")


def main() -> int:
    """Runs all fuzzers, or those named, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--inputs", type=int, default=20000, help="inputs of all fuzzers together (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is generated (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="names of fuzzers, or parts of them")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if args.one:
        run_check(args.one[0], args.inputs, args.seed, Path(args.one[1]))
        return 0
    import importlib

    names = [f"{module}.{check}" for module in MODULES for check in importlib.import_module(module).CHECKS]
    names = [name for name in names if not args.only or any(part in name for part in args.only)]
    total, found = Counter(), []
    print(f"{'':<42}" + "".join(f"{column:>10}" for column in (*COLUMNS, "seconds")))
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            words = [sys.executable, __file__, "--inputs", str(-(-args.inputs // len(names))), "--seed", str(args.seed)]
            done = subprocess.run([*words, "--one", name, str(report)], capture_output=True, text=True, check=False)
            counts, faults = json.loads(report.read_text()) if report.exists() else ({}, {})
        counts = Counter(counts)
        if done.returncode:
            counts["crashes"] += 1
            faults["crash"] = f"the process ended with {done.returncode}: {done.stderr.strip()[-400:]}"
        total += counts
        found += [f"{name} --seed {args.seed}: {fault}" for fault in faults.values()]
        print(
            f"{name:<42}" + "".join(f"{counts[c]:>10,}" for c in COLUMNS) + f"{time.monotonic() - start:>10.0f}",
            flush=True,
        )
    print(f"{'all':<42}" + "".join(f"{total[c]:>10,}" for c in COLUMNS))
    print("".join(f"\n{fault}" for fault in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
