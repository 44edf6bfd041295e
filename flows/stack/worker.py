"""A Prefect worker whose runs never outlive it: `python -m flows.stack.worker`, with DARKROOM_POOL and PREFECT_API_URL.

Prefect's own worker waits for its runs when it is asked to stop, for hours if need be, and leaves them running when it
is killed. Here they are told to stop in both cases: they save, end as Interrupted, and the next run carries on.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

import psutil

from flows.processes import GRACE, end_group, leash

_LOOK = 0.5  # seconds


def main() -> int:
    """Run the worker until it ends or SIGTERM or SIGINT comes; its exit code, or 0 if it was asked to stop."""
    pool = os.environ.get("DARKROOM_POOL") or "process"
    command = [sys.executable, "-m", "flows.stack.prefect_worker", "worker", "start", "--pool", pool]
    command += ["--with-healthcheck", "--install-policy", "never", "--no-create-pool-if-not-found"]
    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    worker = subprocess.Popen(command, start_new_session=True)
    groups: set[int] = set()
    with leash(f"-{worker.pid}", GRACE):
        while worker.poll() is None and not asked:
            groups = groups_below(worker.pid, groups)
            time.sleep(_LOOK)
        with suppress(ProcessLookupError):
            worker.send_signal(signal.SIGSTOP)  # it takes no more runs; told to stop, it would kill those that it has
        groups = groups_below(worker.pid, groups)
        stop_runs(groups, GRACE + 5)
        with suppress(ProcessLookupError):
            worker.send_signal(signal.SIGCONT)
            worker.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            worker.wait(10)  # it records how the runs ended
        end_group(worker.pid, 0)
        worker.wait()
    return 0 if asked else worker.returncode


def groups_below(pid: int, known: set[int]) -> set[int]:
    """The process groups of a worker's runs that are alive: each run leads one. Those of a dead worker are `known`."""
    found = set(known)
    with suppress(psutil.NoSuchProcess):
        found |= {child.pid for child in psutil.Process(pid).children()}
    return {group for group in found if _lives(group) and _leads(group)}


def _leads(pid: int) -> bool:
    with suppress(ProcessLookupError):
        return os.getpgid(pid) == pid
    return False


def _lives(pid: int) -> bool:
    """Not so of a process that has ended and that its parent has not asked for yet."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def stop_runs(groups: set[int], grace: float) -> None:
    """Tell all runs to stop, then wait for each; a run passes the signal on to its stage, which saves."""
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(_lives(group) for group in groups):
        time.sleep(0.1)
    for group in groups:
        end_group(group, 0)


if __name__ == "__main__":
    sys.exit(main())
