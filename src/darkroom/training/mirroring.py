"""Copies of the checkpoints elsewhere, for machines that can vanish: when to make them; `Mirror` says how."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from threading import Lock, Thread
from typing import Protocol

from darkroom.errors import InputError, StageFailed

_log = logging.getLogger(__name__)


class Mirror(Protocol):
    """A place that holds copies of the files of one training."""

    def push(self, files: Sequence[Path]) -> None:
        """Copy the files, in this order: the last one, a voucher in the training's directory, vouches for the rest."""

    def drop(self, names: Collection[str]) -> None:
        """Remove the copies of these names; one that is not there is no error."""

    def pull(self, directory: Path) -> None:
        """Fetch the newest whole checkpoint and its companions, unless the directory holds one as new."""


class Mirroring:
    """Pushes checkpoints, one after the other, in a thread of its own.

    A slow or dead network holds up neither the training nor the next save: what was saved meanwhile is skipped, the
    newest is pushed next. A failure is one line in the log.
    """

    def __init__(self, mirror: Mirror, directory: Path) -> None:
        self._mirror, self._directory = mirror, directory
        self._lock = Lock()
        self._thread: Thread | None = None
        self._next: tuple[Path, Path] | None = None  # tensors and voucher, to be pushed
        self._pushing: tuple[Path, Path] | None = None
        self._removed: set[str] = set()  # here, and not yet there

    def busy(self) -> set[str]:
        """Names of files that are wanted until they are pushed."""
        with self._lock:
            return {path.name for pair in (self._next, self._pushing) if pair for path in pair}

    def offer(self, files: tuple[Path, Path], removed: Collection[str]) -> None:
        """Push a checkpoint (tensors and voucher) soon, then drop what was removed."""
        with self._lock:
            self._next = files
            self._removed = (self._removed | set(removed)) - {path.name for path in files}
            if self._thread is None:
                self._thread = Thread(target=self._run, name="checkpoint mirror")
                self._thread.start()

    def close(self) -> None:
        """Wait until everything that was offered is pushed."""
        with self._lock:
            thread = self._thread
        if thread:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._pushing, self._next = self._next, None
                removed = set(self._removed)
                if self._pushing is None:
                    self._thread = None
                    return
                tensors, voucher = self._pushing
            try:
                self._mirror.push([tensors, *_companions(self._directory), voucher])
                self._mirror.drop(removed)
            except Exception as error:  # of any client library
                kind = "" if isinstance(error, InputError | StageFailed) else f"{type(error).__name__}: "
                reason = " ".join(f"{kind}{error}".split())
                _log.warning(
                    "%s was not mirrored: %s; training goes on, the next save tries again", tensors.name, reason
                )
            else:
                with self._lock:
                    self._removed -= removed


def _companions(directory: Path) -> list[Path]:
    """What a resumed training needs beside a checkpoint (history, snapshots of averages); an index after its files."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    own = ("step-", "lock")
    found = [path for path in files if path.parent != directory or not path.name.startswith(own)]
    return sorted(found, key=lambda path: (path.suffix != ".safetensors", path))
