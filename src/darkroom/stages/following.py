"""A stage ends with the DVC that started it, and a new trainer waits for one that is ending.

SIGTERM or SIGKILL to DVC alone reaches no stage: it would compute on for nobody. So a thread looks whether DVC is still
there, and if not, the stage gets SIGTERM: a trainer saves, others leave nothing half-written.
"""

import contextlib
import fcntl
import logging
import os
import signal
import threading
import time
from pathlib import Path

import psutil

LAUNCHER = "DARKROOM_LAUNCHER"  # in the environment of a rank: the process id of the stage that started it
_STAGE = "DVC_STAGE"  # DVC sets it for the stage, so the stage's shell has it as well; DVC itself has not
_EVERY = 0.25  # seconds between two looks
_SAVING = 300.0  # seconds that a trainer without its DVC may take to save
_ENDING = 5.0  # seconds in which any trainer may turn out to be ending
_log = logging.getLogger("darkroom.stages")


def follow() -> None:
    """Have this process get SIGTERM when the DVC that started it is gone, now or later; without DVC, do nothing.

    A rank hears of it from its launcher.
    """
    if _STAGE not in os.environ or LAUNCHER in os.environ:
        return
    if (above := starters(psutil.Process())) is None:
        signal.raise_signal(signal.SIGTERM)
    else:
        end_after(above, signal.SIGTERM)


def end_after(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Send this process a signal as soon as one of `processes` has ended."""

    def watch() -> None:
        while not any(map(_is_gone, processes)):
            time.sleep(_EVERY)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, name="follow", daemon=True).start()


def starters(process: psutil.Process) -> list[psutil.Process] | None:
    """The processes from the parent of a stage up to its DVC: DVC alone, or shells between; None if DVC is gone.

    What an orphan gets as its parent is not of its process group. A stage that leads a group was put there by somebody
    else, and so was a rank; then the parent is taken for what started it.
    """
    found = []
    try:
        while (parent := process.parent()) is not None:
            group = os.getpgid(process.pid)
            if group not in (process.pid, os.getpgid(parent.pid)):
                return None
            found.append(parent)
            with contextlib.suppress(psutil.AccessDenied):  # macOS shows no environment of its own programs
                if _STAGE not in parent.environ():
                    return found
            process = parent
    except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):  # the last: of another user's group
        pass
    return None


def wait_for_ending(lock: Path) -> None:
    """Return when no trainer holds `lock` any more, or when the one that does is not about to end.

    One whose DVC is gone saves and ends; one that was told to by a signal cannot be told from one at work, so it is
    given a few seconds.
    """
    began, waits = time.monotonic(), False
    while (holder := _holder(lock)) is not None:
        alone = _is_left_alone(holder)
        if time.monotonic() - began > (_SAVING if alone else _ENDING):
            return
        if not waits:
            waits = True
            why = "its DVC is gone, so it saves and ends" if alone else "it may be ending"
            _log.info("waiting for process %s, which trains this model: %s", holder, why)
        time.sleep(_EVERY)


def _is_left_alone(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return _STAGE in process.environ() and starters(process) is None
    return False


def _holder(lock: Path) -> int | None:
    """The process that holds a trainer's lock, if one does."""
    try:
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or b"0")
    except (OSError, ValueError):  # there is none, or it is not to be used, which the trainer says
        pass
    return None


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
