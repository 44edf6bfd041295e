"""Progress for people: a bar on a terminal, one line every few seconds in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

EVERY_SECONDS = 5.0


class Advance(Protocol):
    """Tell how far the work is: `done` of the total, and a few words on how it goes."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Show work of `total` units while the block runs."""
    if sys.stdout.isatty():
        with _bar(description, total, unit) as advance:
            yield advance
    else:
        yield _lines(description, total, unit)


@contextmanager
def _bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield advance


def _lines(description: str, total: int, unit: str) -> Advance:
    first: tuple[float, int] | None = None  # when the first word came, and how far the work was then
    printed = -EVERY_SECONDS

    def advance(done: int, note: str = "") -> None:
        nonlocal printed, first
        now = time.monotonic()
        first = first or (now, done)
        if done < total and now - printed < EVERY_SECONDS:
            return
        printed = now
        left = ""
        if first[1] < done < total:
            left = f", {_duration((now - first[0]) / (done - first[1]) * (total - done))} left"
        with suppress(BrokenPipeError):  # whoever read this is gone; the work, which may be about to save, is not
            print(f"{description}: {done}/{total} {unit}{left}{'  ' + note if note else ''}", flush=True)

    return advance


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
