"""One live view of a run for the person at the terminal; everything that is logged goes to a file instead.

Without a terminal there is no view, and logs are what they are. What the view knows comes from `watched`, which tells
when a part of the run starts and how it ends, and from the log records that the part's output becomes.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from prefect.client.schemas.objects import State
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.stage_output import Progress

KEEP_LOGS = 10  # the newest ones
_STYLES = {
    "waiting": "dim", "not run": "dim", "running": "bold cyan", "stopping": "yellow", "interrupted": "yellow",
    "failed": "bold red", "kept": "yellow",
}  # fmt: skip
_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"

S = TypeVar("S", bound=State[Any])
_current: "View | None" = None


@dataclass
class _Row:
    """A part of the run."""

    name: str
    state: str = "waiting"
    began: float = 0.0
    seconds: float | None = None  # None until it has ended
    said: str = ""  # its last words
    progress: Progress | None = None


class View(logging.Handler):
    """A table of the parts of a run, the running one with its bar and figures. A warning is printed above it."""

    def __init__(self, title: str, parts: Sequence[str], log: str, console: Console) -> None:
        super().__init__()
        self._title, self._log, self._console = title, log, console
        self._rows = {name: _Row(name) for name in parts}
        self._running: _Row | None = None
        self._said = "starting Prefect"  # between two parts
        self._began = time.monotonic()
        self._state = threading.RLock()

    def started(self, name: str) -> None:
        """A part of the run starts, or starts again."""
        with self._state:
            self._running = self._rows.setdefault(name, _Row(name))
            self._running.state, self._running.began = "running", time.monotonic()

    def ended(self, name: str, state: str, words: str = "") -> None:
        """It has ended as `state`: ran, cached, failed …; `words` say what came of it."""
        with self._state:
            row = self._rows[name]
            row.state, row.said, row.seconds = state, words, time.monotonic() - row.began
            self._running = None

    def close_rows(self) -> None:
        """What has not started will not."""
        with self._state:
            for row in self._rows.values():
                row.state = "not run" if row.state == "waiting" else row.state

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of output: how far the work is, a warning, or a sign of life. What Prefect itself says is not."""
        if Path(record.pathname).parent != Path(__file__).parent:
            return
        text = record.getMessage()
        with self._state:
            self._said = text.strip().rpartition("\n")[2]
            if row := self._running:
                row.said = self._said
                if row.progress and row.progress.done >= row.progress.total:
                    row.progress = None  # what comes next counts
                row.progress = Progress.read(text) or row.progress
        if record.levelno >= logging.WARNING:
            self._console.print(Text(text, style="red" if record.levelno >= logging.ERROR else "yellow"))

    def __rich__(self) -> RenderableType:
        with self._state:
            table = Table.grid(padding=(0, 2), expand=True)
            for width, side in ((12, "left"), (11, "left"), (9, "right")):
                table.add_column(min_width=width, no_wrap=True, justify=side)  # type: ignore[arg-type]
            table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
            for row in self._rows.values():
                style = _STYLES.get(row.state, "green")
                shown = Text(row.state, style=style)
                table.add_row(Text(row.name, style=style if row.state != "waiting" else "dim"), shown, *_course(row))
            elapsed = Text.assemble((self._title, "bold"), f"  {_clock(time.monotonic() - self._began)}  ")
            elapsed.append("" if self._running else self._said, style="dim")
            elapsed.truncate(self._console.width, overflow="ellipsis")
            where = Text(f"log: {self._log}", style="dim", overflow="ellipsis", no_wrap=True)
            return Group(Text(), elapsed, table, where)


def _course(row: _Row) -> tuple[Text, RenderableType]:
    """For how long, and how far it is."""
    if row.state == "waiting" or not row.began:
        return Text(), Text()
    took = Text(_clock(time.monotonic() - row.began if row.seconds is None else row.seconds))
    if row.seconds is not None or row.progress is None:
        return took, Text(row.said, style="dim")
    progress = row.progress
    bar = Table.grid(padding=(0, 1))
    left = f", {progress.left} left" if progress.left else ""
    bar.add_row(
        ProgressBar(total=max(progress.total, 1), completed=progress.done, width=24),
        Text(f"{progress.done}/{progress.total} {progress.unit}{left}", no_wrap=True),
    )
    return took, Group(bar, Text(progress.note, style="dim", no_wrap=True, overflow="ellipsis"))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes else f"{seconds:.1f} s"


def watched(name: str, part: Callable[[], S]) -> S:
    """Do a part of the run and return its state; the view, if there is one, shows it."""
    view = _current
    if view is None:
        return part()
    view.started(name)
    try:
        state = part()
    except BaseException as error:
        view.ended(name, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    how, words = (state.name or "").lower(), (state.message or "").partition("\n")[0]
    words = re.sub(r"^[\d.]+ s, ", "", words)  # the table has a column for that
    view.ended(name, how if state.is_completed() or how == "interrupted" else "failed", words)
    return state


@contextlib.contextmanager
def view(title: str, parts: Sequence[str], logs: Path) -> Iterator[Path | None]:
    """Show a view of `parts` while the block runs, if there is a terminal for it; gives the file that has the log."""
    global _current
    console = Console()
    if not sys.stdout.isatty() or console.is_dumb_terminal or not os.environ.get("TERM"):
        yield None
        return
    file = _log_file(logs, title)
    _current = View(title, parts, os.path.relpath(file), console)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    try:
        with _instead_of_consoles(handler, _current), Live(_current, console=console, refresh_per_second=4):
            try:
                yield file
            finally:
                _current.close_rows()
    finally:
        _current = None
        handler.close()


def _log_file(logs: Path, title: str) -> Path:
    """A new file in the directory of logs, of which the newest are kept."""
    logs.mkdir(parents=True, exist_ok=True)
    for old in sorted(logs.glob("*.log"), key=lambda path: path.stat().st_mtime)[: 1 - KEEP_LOGS]:
        old.unlink(missing_ok=True)
    return logs / f"{title}-{datetime.now():%Y-%m-%dT%H%M%S}-{os.getpid()}.log"


@contextlib.contextmanager
def _instead_of_consoles(*handlers: logging.Handler) -> Iterator[None]:
    """Let loggers that write to the terminal, Prefect's and others', write to `handlers` while the block runs."""
    known = [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    before = {logger: logger.handlers[:] for logger in known}
    for logger, own in before.items():
        consoles = [h for h in own if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]
        if consoles or logger is logging.root:
            logger.handlers = [h for h in own if h not in consoles] + list(handlers)
    try:
        yield
    finally:
        for logger, own in before.items():
            logger.handlers = own
