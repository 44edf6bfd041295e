"""Progress for people, by time and not by steps: a bar on a terminal, one line every few seconds in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

EVERY_SECONDS = 5.0  # between two lines
_BAR_SECONDS = 0.5  # between two states of a bar
_SILENT_SECONDS = 7.5  # after which the last line is repeated
_LOOK_SECONDS = 0.5  # between two looks at whether a line is due although nothing was done


class Advance:
    """Call it with the units that are done, as often as you like: it says how far the work is when that is due.

    `show` gets units done, the time left ("" if unknown) and a note or the speed. `wait` is called before: a GPU may
    still have to do what it was asked for.
    """

    def __init__(
        self, total: int, unit: str, every: float, show: Callable[[int, str, str], None], wait: Callable[[], None]
    ) -> None:
        self._total, self._unit, self._every, self._show, self._wait = total, unit, every, show, wait
        self._due = float("-inf")
        self.begin(0)

    def begin(self, done: int) -> None:
        """`done` units are done and the work starts now: what was before says nothing about its speed."""
        self._since, self._warm = (time.monotonic(), done), False

    def __call__(self, done: int, note: str = "") -> None:
        """`done` units of the total are done; `note` says in a few words how it goes."""
        if done < self._total and time.monotonic() < self._due:
            return
        self._wait()
        now = time.monotonic()
        self._due = now + self._every
        took, made, left = now - self._since[0], done - self._since[1], ""
        if made and took:
            left = _duration(took / made * (self._total - done)) if done < self._total else ""
            note = note or f"{_figure(made / took)} {self._unit}/s"
        if not self._warm:  # the first units take longer than all others
            self._since, self._warm = (now, done), True
        self._show(done, left, note)


@contextmanager
def progress(description: str, total: int, unit: str, wait: Callable[[], None] = lambda: None) -> Iterator[Advance]:
    """Show work of `total` units while the block runs; `wait` returns when a device has done what it was asked for."""
    with _bar(description, total, unit, wait) if sys.stdout.isatty() else _lines(description, total, unit, wait) as it:
        yield it


@contextmanager
def _bar(description: str, total: int, unit: str, wait: Callable[[], None]) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total, note="")

        def show(done: int, left: str, note: str) -> None:
            bar.update(task, completed=done, note=f"{left} left  {note}" if left else note)

        yield Advance(total, unit, _BAR_SECONDS, show, wait)


@contextmanager
def _lines(description: str, total: int, unit: str, wait: Callable[[], None]) -> Iterator[Advance]:
    pulse = _Pulse(f"{description}: starting")

    def show(done: int, left: str, note: str) -> None:
        words = f"{description}: {done}/{total} {unit}" + (f", {left} left" if left else "")
        pulse.say(words + (f"  {note}" if note else ""))

    with pulse.beating():
        yield Advance(total, unit, EVERY_SECONDS, show, wait)


@contextmanager
def signs_of_life(description: str) -> Iterator[None]:
    """Say that work without a measure starts, and every few seconds that it goes on, while the block runs."""
    with _Pulse(f"{description}: starting").beating():
        yield


class _Pulse:
    """Prints lines, and the last one again, with its age, when the work is silent for longer than it should be."""

    def __init__(self, first: str) -> None:
        self._lock = threading.Lock()
        self.say(first)

    def say(self, line: str) -> None:
        """Print a line."""
        with self._lock:
            self._line = line
            self._said = self._printed = time.monotonic()
            _print(line)

    def beat(self) -> None:
        """Repeat the last line if it is time."""
        with self._lock:
            now = time.monotonic()
            if now - self._printed >= _SILENT_SECONDS:
                self._printed = now
                _print(f"{self._line}  ({_duration(now - self._said)} ago)")

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Look from a thread of its own whether it is time, while the block runs."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_LOOK_SECONDS):
                self.beat()

        thread = threading.Thread(target=look, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _print(line: str) -> None:
    with suppress(BrokenPipeError):  # whoever read this is gone; the work, which may be about to save, is not
        print(line, flush=True)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
