"""Kills a process at a moment that a file operation marks, or writes down all such moments: see `tests/kills.py`.

Python's audit events name every file that is opened, renamed or removed before it happens. No clock is involved.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OPERATIONS = {
    "os.rename": 1,  # the place in the event's arguments of the path that it is about
    "os.remove": 0,
    "os.mkdir": 0,
    "os.rmdir": 0,
    "os.chmod": 0,
    "os.link": 1,
    "os.symlink": 1,
    "os.truncate": 0,
}
_WRITES = os.O_WRONLY | os.O_RDWR


def install(module: str, arguments: Sequence[str]) -> None:
    """Watch this process if what `TESTS_KILL` asks for is meant for `python -m module`."""
    asked = json.loads(os.environ["TESTS_KILL"])
    if asked.get("pid_of") == module:
        Path(asked["pid_file"]).write_text(str(os.getpid()))
    if re.fullmatch(asked["module"], module):
        sys.addaudithook(_Watch(asked, " ".join([module, *arguments])))


class _Watch:
    """Counts the operations on files whose path matches; at the one that is asked for, the kill."""

    def __init__(self, asked: dict[str, Any], command: str) -> None:
        self._asked, self._path = asked, re.compile(asked["path"])
        self._count, self._inside, self._process = 0, False, os.getpid()
        # Which process this one is: two that run side by side start in any order, so by what it runs, then by number.
        with Path(asked["processes"]).open("a+") as file:
            file.write(f"{command}\n")
            file.seek(0)
            self._which = f"{command} #{file.read().splitlines().count(command)}"

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITES:
                return
        elif event in _OPERATIONS:
            path = arguments[_OPERATIONS[event]]
        else:
            return
        if self._inside or os.getpid() != self._process or not isinstance(path, (str, bytes, os.PathLike)):
            return
        self._inside = True  # what is done here is no event of the process
        try:
            name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (pathlib is slow)
            if self._path.search(name):
                self._count += 1
                self._reached(event, name)
        finally:
            self._inside = False

    def _reached(self, event: str, name: str) -> None:
        if log := self._asked.get("trace"):
            with Path(log).open("a") as file:
                file.write(json.dumps([self._which, self._count, event]) + "\n")
        elif [self._which, self._count] == self._asked["at"] and not Path(self._asked["done"]).exists():
            Path(self._asked["done"]).write_text(f"{event} {name}")
            if event == "open":
                _tear(Path(name), self._asked["how"])
            pid_file = self._asked.get("pid_file")
            pid = int(Path(pid_file).read_text()) if pid_file else os.getpid()
            os.kill(pid, getattr(signal, self._asked["signal"]))


def _tear(path: Path, how: str) -> None:
    """Leave the file as a kill does between its opening and its last write: empty, or half of what it was."""
    if how == "before":
        return
    old = path.read_bytes() if path.exists() else b""
    path.write_bytes(b"" if how == "empty" else old[: len(old) // 2] or b'{"half')
