"""Items over several processes, in order, from scripts without a guard too."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from fastalign.data import workers
from fastalign.data.workers import in_order, worker_count


def test_results_come_in_the_order_of_the_items_and_from_other_processes():
    offset = {"what": lambda n: n + 1}  # a lambda cannot be pickled, and need not be
    results = list(in_order(lambda n: (offset["what"](n), os.getpid()), range(5), 2))
    assert [value for value, _ in results] == [1, 2, 3, 4, 5]
    assert os.getpid() not in {process for _, process in results}
    assert list(in_order(lambda n: os.getpid(), range(2), 1)) == [os.getpid()] * 2


def test_an_error_in_a_worker_reaches_the_caller():
    def fail(n):
        raise KeyError(n)

    with pytest.raises(KeyError, match="3"):
        list(in_order(fail, [3], 2))


def test_what_a_killed_worker_leaves_is_done_here(caplog):
    parent = os.getpid()

    def work(n):
        if os.getpid() != parent and n == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return n * n

    with caplog.at_level("WARNING", "fastalign"):
        assert list(in_order(work, range(4), 2)) == [0, 1, 4, 9]
    assert "A worker was killed" in caplog.text


def test_no_more_workers_than_items_and_none_where_a_fork_is_not_safe(monkeypatch):
    assert worker_count(1) == 1 and worker_count(8, 3) == 3
    assert worker_count(1000) == min(len(os.sched_getaffinity(0)), workers.MAX_WORKERS)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert worker_count(1000, 4) == 1


def test_a_script_without_a_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from fastalign.data.workers import in_order
        print("started")
        print(sum(in_order(abs, range(-3, 1), 2)))
    """)
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["started", "6"] and not run.stderr
