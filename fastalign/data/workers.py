"""One function over many items in several processes, with the results in order.

The processes are forks of this one: they start in a moment, share its memory, and need nothing of the caller's script
(other ways to start a process import the script anew, which runs it twice where it has no `__main__` guard). Where an
operating system cannot fork safely, everything runs in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

logger = logging.getLogger("fastalign")

MAX_WORKERS = 16
_COLLECT_AFTER = 100_000  # new objects; Python's own limit is some hundred
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  # of a worker, set when it starts


def worker_count(items: int, wanted: int | None = None) -> int:
    """How many processes to use.

    Args:
        items: how many items there are; more workers than items have nothing to do.
        wanted: how many the caller wants; None: one per processor, at most `MAX_WORKERS`.
    """
    # On macOS a fork of a process with threads may crash. A daemon must not have children.
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return 1
    return max(1, min(wanted or min(len(os.sched_getaffinity(0)), MAX_WORKERS), items))


def in_order(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """`work(item)` of each item, in the order of the items.

    Args:
        work: the function. It reaches the workers by the fork, so it may hold what cannot be pickled.
        items: its arguments, which are pickled, as the results are.
        workers: how many processes compute; 1: this one does.
    """
    if workers < 2:
        yield from map(work, items)
        return
    done = 0
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(work,))
    try:
        with warnings.catch_warnings():
            # Python warns of forks of a process with threads. The workers use no lock that another thread may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            results = pool.map(_do, items)
        for result in results:
            done += 1
            yield result
    except BrokenProcessPool:
        logger.warning("A worker was killed, as when memory runs out: the other rows are tokenised in one process.")
        yield from map(work, items[done:])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(work: Callable[[Any], Any]) -> None:
    global _work  # noqa: PLW0603 - a worker has one task, and the pool hands nothing from its start to its calls
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of tokenizers do not survive the fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):  # without it a worker would wait for a parent that was killed
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    gc.freeze()  # what the parent made stays in pages that all share, as no collection writes into it
    gc.set_threshold(_COLLECT_AFTER)  # lists of tokens hold no circles, and to search them takes a quarter of the time


def _do(item: Any) -> Any:
    return _work(item)
