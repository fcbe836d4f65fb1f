"""The most telling of the faults in `faults.py`: `make soak` runs all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_few_faults_give_one_sentence_and_leave_the_state_intact():
    script = Path(__file__).parent / "faults.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script, "--short"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if "no own mounts" in done.stdout:
        pytest.skip("this system lets nobody but root mount a folder, not even in a namespace of its own")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("good ") == 5
