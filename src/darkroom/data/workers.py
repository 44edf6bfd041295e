"""Processes that decode: as many as there are cores, none of which outlives the one that prepares."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from darkroom.errors import StageFailed

T = TypeVar("T")

_AHEAD = 2  # jobs per process that are handed out before their turn
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def worker_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[..., T], jobs: Iterable[tuple[Any, ...]], count: int) -> Generator[T, None, None]:
    """`work(*job)` for each job, in `count` processes, in the order in which they end; with one, in this process.

    A job is made when its turn comes, so that an iterator of them takes no memory. The first error stops the rest.
    Raises StageFailed when a process is killed.
    """
    if count <= 1:
        yield from (work(*job) for job in jobs)
        return
    # Fresh processes: a copy of this one would carry its threads' locks.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))
    waiting: set[Future[T]] = set()
    remaining = iter(jobs)
    try:
        while True:
            while len(waiting) < count * (1 + _AHEAD) and (job := next(remaining, None)) is not None:
                waiting.add(executor.submit(work, *job))
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise StageFailed(
            "a process that decodes images was killed, for want of memory perhaps; the same command carries on"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Leave signals from the terminal to the parent, and die with it (Linux) however it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os.kill(os.getpid(), signal.SIGKILL)
