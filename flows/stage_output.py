"""What DVC and a stage print, read: the outcome, the error, how far the work is, and what of it belongs in a log."""

import logging
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from darkroom.errors import InputError, Interrupted, StageFailed

LOG_EVERY = 4.0  # seconds between two lines of the same work's progress in the log; `darkroom.progress` takes 5

_EXITED = re.compile(r"failed to run: .*exited with (-?\d+)$")
_ERROR = "ERROR: "  # how DVC begins its own errors
_PROGRESS = re.compile(
    r"(?P<description>\S.*?): (?P<done>\d+)/(?P<total>\d+) (?P<unit>\w+)(?:, (?P<left>.+?) left)?(?:  (?P<note>.*))?"
)
_PERCENTAGE = re.compile(r"(?P<description>.*?)\s*\d{1,3}%(?:\||$)")  # a progress bar of tqdm, DVC's included
_LEVELS = (
    (logging.INFO, re.compile(r"WARNING: Process .* in RWLock-file .* had been killed\. Auto removed it")),  # mended
    (logging.ERROR, re.compile(r"(?:ERROR|CRITICAL|FATAL)\b")),
    (logging.WARNING, re.compile(r"WARNING\b|\S.*:\d+: \w*Warning: ")),
)
_TRACEBACK = re.compile(r"(?:  \+ Exception Group )?Traceback \(most recent call last\):$")
# DVC's advice for those who run it by hand. A flow pushes and records by itself, or its report says what to do.
_ADVICE = re.compile(
    r"To track the changes with git, run:|\s+git add .*|To enable auto staging, run:"
    r"|\s+dvc config core\.autostage true|Use `dvc push` to send your updates to remote storage\."
)
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)


def classify(stage: str, lines: list[str]) -> Literal["Ran", "Cached", "Restored"]:
    """The outcome of a successful `dvc repro`; DVC's first word counts, later lines may be the stage's own."""
    for line in lines:
        if line == f"Running stage '{stage}':":
            return "Ran"
        if line == f"Stage '{stage}' is cached - skipping run, checking out outputs":
            return "Restored"
        if line == f"Stage '{stage}' didn't change, skipping":
            return "Cached"
    raise StageFailed(f"stage {stage}: DVC ended without saying what it did: {lines[-1] if lines else 'nothing'}")


def failure(stage: str, exit_code: int, lines: list[str]) -> Exception:
    """The exception for a failed `dvc repro`; the stage's own exit code is inside DVC's last message."""
    code = next((int(match[1]) for line in reversed(lines) if (match := _EXITED.search(line))), None)
    if code is not None and code > 128:
        code = 128 - code  # how a shell reports that a signal ended its command
    own = [line for line in lines if line and not line.startswith(_ERROR)]
    said = list(takewhile(lambda line: line.startswith(f"{stage}: "), reversed(own)))[::-1]  # what it said at the end
    last = own[-1] if own else "no output"
    if code == 2:
        return InputError("\n".join(said) or f"{stage}: {last}")
    if code in (75, -signal.SIGTERM, -signal.SIGINT):
        return Interrupted(said[-1] if said else f"{stage}: interrupted")
    if code is None:
        return StageFailed(f"stage {stage}: DVC ended with {exit_code}: {dvc_message(lines)}")
    if said and code == 1:
        return StageFailed(said[-1])
    what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return StageFailed(f"stage {stage} failed ({what}): {last}")


def dvc_message(lines: list[str]) -> str:
    """What DVC said when it failed: its last error, else its last words. It may add advice after an error."""
    said = [line for line in reversed(lines) if line]
    return next((line.removeprefix(_ERROR) for line in said if line.startswith(_ERROR)), said[0] if said else "nothing")


@dataclass(frozen=True)
class Progress:
    """How far a stage's work is, as `darkroom.progress` prints it: `training: 120/1000 steps, 40 s left  loss 0.12`."""

    description: str
    done: int
    total: int
    unit: str
    left: str = ""  # time, for people; "" while it is not known
    note: str = ""

    @property
    def percent(self) -> float:
        """0 to 100."""
        return min(100.0, 100.0 * self.done / self.total) if self.total else 100.0

    @classmethod
    def read(cls, line: str) -> "Progress | None":
        """None if the line is about something else."""
        match = _PROGRESS.fullmatch(line)
        if match is None:
            return None
        done, total = int(match["done"]), int(match["total"])
        return cls(match["description"], done, total, match["unit"], match["left"] or "", match["note"] or "")


class StageLog:
    """Passes on what a stage prints, line by line, as a log wants it: `emit(level, text)`.

    A traceback is one entry, an error. DVC's advice is left out. Of progress, the first line, the last and one every
    few seconds reach the log; `on_progress` gets every one that says how far the work is.
    """

    def __init__(
        self,
        emit: Callable[[int, str], None],
        on_progress: Callable[[Progress], None] = lambda progress: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._emit, self._on_progress, self._clock = emit, on_progress, clock
        self._traceback: list[str] = []
        self._level = logging.INFO  # of the line before
        self._work: str | None = None  # whose progress the line before was
        self._logged_at = 0.0
        self._held: str | None = None  # the newest line of progress, if it was not logged

    def line(self, text: str) -> None:
        """Take one line."""
        if self._traceback or _TRACEBACK.match(text):
            self._take_traceback(text)
        elif (work := _work(text)) is not None:
            self._take_progress(work, text)
        elif not _ADVICE.fullmatch(text):
            self._end_progress()
            # An indented line belongs to the warning or error before it: the source line of a Python warning.
            if not (text.startswith(" ") and self._level > logging.INFO):
                self._level = _level(text)
            self._emit(self._level, text)

    def close(self) -> None:
        """Pass on what is still held back."""
        self._end_progress()
        self._end_traceback()

    def _take_traceback(self, text: str) -> None:
        self._end_progress()
        self._traceback.append(text)
        if not (text.startswith(" ") or _TRACEBACK.match(text)):
            self._end_traceback()  # this was the exception itself

    def _end_traceback(self) -> None:
        if self._traceback:
            self._level = logging.ERROR
            self._emit(logging.ERROR, "\n".join(self._traceback))
            self._traceback = []

    def _take_progress(self, work: str, text: str) -> None:
        if work != self._work:
            self._end_progress()
        progress = Progress.read(text)
        if progress:
            self._on_progress(progress)
        now = self._clock()
        ended = progress is not None and progress.done >= progress.total
        if work != self._work or ended or now - self._logged_at >= LOG_EVERY:
            self._emit(logging.INFO, text)
            self._logged_at, self._held = now, None
        else:
            self._held = text
        self._work, self._level = work, logging.INFO

    def _end_progress(self) -> None:
        if self._held is not None:
            self._emit(logging.INFO, self._held)
        self._work = self._held = None


def _work(text: str) -> str | None:
    """Whose progress a line is; None if it is no progress."""
    match = _PROGRESS.fullmatch(text) or _PERCENTAGE.match(text)
    return match["description"] if match else None


def _level(text: str) -> int:
    if text in _CHAINED:
        return logging.ERROR
    return next((level for level, pattern in _LEVELS if pattern.match(text)), logging.INFO)
