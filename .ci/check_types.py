"""Runs pyright and compares its number of errors with type_errors.json.

Each folder or file directly in fastalign/ may have as many errors as type_errors.json says, and none if it is not named
there. With `--update` the script writes the counts that have fallen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COUNTS = Path(__file__).with_name("type_errors.json")
# What users call, or what everything else stands on: never an error here.
CLEAN = ("losses", "ops", "data", "cli", "reference.py", "fused.py", "options.py", "files.py", "lazy.py", "__init__.py")


def main() -> int:
    """Returns 0 if no count has risen, else 1."""
    errors = _pyright_errors()
    found = Counter(_part(error) for error in errors)
    allowed: dict[str, int] = json.loads(COUNTS.read_text(encoding="utf-8"))
    if wrong := sorted(allowed.keys() & set(CLEAN)):
        print(f"{COUNTS.name} allows errors in {', '.join(wrong)}, which must have none")
        return 1
    risen = [part for part in sorted(found) if found[part] > allowed.get(part, 0)]
    for error in errors:
        if _part(error) in risen:
            line = error["range"]["start"]["line"] + 1
            print(f"{Path(error['file']).relative_to(ROOT)}:{line}: {error['message'].splitlines()[0]}")
    for part in risen:
        print(f"fastalign/{part}: {found[part]} errors, {allowed.get(part, 0)} allowed")
    fallen = {part: found[part] for part in allowed if found[part] < allowed[part]}
    if fallen and "--update" in sys.argv:
        counts = {part: min(found[part], count) for part, count in sorted(allowed.items()) if found[part]}
        COUNTS.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    elif fallen:
        print(f"pyright finds fewer errors in {', '.join(fallen)}: lower the counts by .ci/check_types.py --update")
    print(f"pyright: {sum(found.values())} errors in all, {sum(allowed.values())} allowed")
    return 1 if risen else 0


def _pyright_errors() -> list[dict]:
    # Without --project, pyright prefers a pyrightconfig.json in any folder above this one, and checks what that says.
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.stdout.startswith("{"):
        sys.exit(f"pyright failed: {done.stdout}{done.stderr}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    # torch annotates an autograd function's backward as `(ctx, *grads)`.
    # Ours name their gradients, as torch's manual does.
    return [one for one in found if one["severity"] == "error" and '"_SingleLevelFunction"' not in one["message"]]


def _part(error: dict) -> str:
    """The folder or file directly in fastalign/ that an error lies in."""
    return Path(error["file"]).relative_to(ROOT / "fastalign").parts[0]


if __name__ == "__main__":
    sys.exit(main())
