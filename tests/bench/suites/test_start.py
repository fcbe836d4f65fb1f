"""The rows of a start, and the memory of all its processes. A start takes as long as its imports: see bench."""

import json
import os
import subprocess
import sys

from bench.suites import start


def test_rows_are_pairs_and_the_same_each_time(tmp_path):
    paths = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for path in paths:
        start.write_pairs(path, 3)
    assert paths[0].read_text() == paths[1].read_text()
    rows = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert len(rows) == 3 and all(row.keys() == {"prompt", "chosen", "rejected"} for row in rows)
    assert rows[0] != rows[1] and rows[0]["chosen"] != rows[0]["rejected"]


def test_memory_is_that_of_all_processes():
    alone = start.proportional_bytes(os.getpid())
    script = "held = bytearray(b'x') * 200_000_000; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert start.proportional_bytes(os.getpid()) > alone + 150e6
        child.communicate(b"\n")
    assert start.proportional_bytes(2**31 - 1) == 0
