"""Who holds DVC's locks: to say whom a stage waits for, and to clear what a process left that is gone.

DVC writes `rwlock` and `dvc.lock` in place, so a kill at that moment leaves them empty or cut short, and every later
command of DVC would end with that.

DVC has two: the repository's, which ends with its process, and `rwlock`, a file that says which process reads and
writes which paths. An entry of a killed process stays there; DVC removes it once that process id is free, but takes
any process that has got the same id since (in a container, ids are few) for the holder.
"""

import contextlib
import fcntl
import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

_BLOCKER = re.compile(r"  \(PID (?P<pid>\d+)\): (?P<command>.*)")
_PROGRAM = re.compile(r"^.*?dvc(?:/__main__\.py)? ")
_BUSY = re.compile(r"ERROR: .* is busy, it is being blocked by:$")
_GUARD = re.compile(r"ERROR: failed to reproduce '.*': Unable to acquire lock")
_UNREADABLE = re.compile(r"ERROR: .*Unable to read RWLock-file")


@dataclass(frozen=True)
class Holder:
    """A process that DVC says holds a path."""

    pid: int
    command: str  # DVC's `sys.argv`, joined

    def __str__(self) -> str:
        return f"process {self.pid} ({_PROGRAM.sub('dvc ', self.command)})"


def blockers(lines: list[str]) -> list[Holder]:
    """Whom DVC named when it ended because another process reads or writes what the stage needs."""
    busy = next((place for place, line in enumerate(lines) if _BUSY.match(line)), len(lines))
    found = [match for line in lines[busy:] if (match := _BLOCKER.fullmatch(line))]
    return [Holder(int(match["pid"]), match["command"]) for match in found]


def guard_was_busy(lines: list[str]) -> bool:
    """Whether DVC gave up on the lock around `rwlock`, which others hold for moments only."""
    return any(_GUARD.match(line) for line in lines)


def rwlock_is_unreadable(lines: list[str]) -> bool:
    """Whether DVC ended because a process was killed while it wrote `rwlock`; it would end like that for ever."""
    return any(_UNREADABLE.match(line) for line in lines)


def holds(root: Path, holder: Holder) -> bool:
    """Whether a process that lives still has an entry in `rwlock`. The entry of one that is gone is removed."""
    path = _rwlock(root)
    content = _load(path)
    entries = [*content.get("write", {}).values(), *itertools.chain(*content.get("read", {}).values())]
    if {"pid": holder.pid, "cmd": holder.command} not in entries:
        return False
    if _lives(holder):
        return True
    _forget(root, holder)
    return False


def clear_unreadable(root: Path) -> bool:
    """Remove `rwlock` if no DVC can read it; whether it did."""
    path = _rwlock(root)
    with _guarded(root), contextlib.suppress(FileNotFoundError):
        try:
            json.loads(path.read_text())
        except ValueError:
            path.unlink()
            return True
    return False


def mend_lock_file(root: Path) -> str | None:
    """Put the committed `dvc.lock` in the place of one that was cut short, or none; a line that says so, else None.

    DVC finds the outputs of stages that are in neither in its cache. A merge that is not finished is left alone, and
    so is a lock that a DVC at work may be writing.
    """
    path = root / "dvc.lock"
    with contextlib.suppress(OSError), (root / ".dvc" / "tmp" / "lock").open("a+") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        content = path.read_bytes()
        if _is_whole(content) or b"<<<<<<<" in content:
            return None
        path.rename(root / ".dvc" / "tmp" / "dvc.lock.cut-short")
        committed = subprocess.run(["git", "show", "HEAD:./dvc.lock"], cwd=root, capture_output=True).stdout
        if _is_whole(committed):
            path.write_bytes(committed)
            return "dvc.lock was cut short by a kill: the committed one is back"
        return "dvc.lock was cut short by a kill: a new one is made"
    return None


def _is_whole(content: bytes) -> bool:
    """Whether DVC takes it for a lock file."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(content))
    except (yaml.YAMLError, UnicodeDecodeError, Invalid):
        return False
    return True


def repository_holder(root: Path) -> int | None:
    """The process that took the repository's lock last, if it lives."""
    try:
        pid = int((root / ".dvc" / "tmp" / "lock").read_text())
        return None if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else pid
    except (OSError, ValueError, psutil.Error):
        return None


def _rwlock(root: Path) -> Path:
    return root / ".dvc" / "tmp" / "rwlock"


def _lives(holder: Holder) -> bool:
    """Whether the process id still belongs to that command. In doubt it does: a lock is not taken from a process."""
    try:
        process = psutil.Process(holder.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        words = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
    return not words or holder.command.endswith(words[-1])


def _forget(root: Path, holder: Holder) -> None:
    """Take every entry of a process out of `rwlock`."""
    path, gone = _rwlock(root), {"pid": holder.pid, "cmd": holder.command}
    with _guarded(root):
        content = _load(path)
        if not content:
            return
        writers = {name: entry for name, entry in content.get("write", {}).items() if entry != gone}
        readers = {name: [e for e in entries if e != gone] for name, entries in content.get("read", {}).items()}
        kept = {"write": writers, "read": {name: entries for name, entries in readers.items() if entries}}
        path.write_text(json.dumps(kept))


@contextlib.contextmanager
def _guarded(root: Path) -> Iterator[None]:
    """Hold the lock under which DVC reads and writes `rwlock`."""
    with (root / ".dvc" / "tmp" / "rwlock.lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as DVC does it, through zc.lockfile
        yield


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # being written, or unreadable: DVC will say
        return {}
    return content if isinstance(content, dict) else {}
