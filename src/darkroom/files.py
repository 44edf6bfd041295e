"""Writing files so that a reader never sees half of one, and naming their content by digest."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from darkroom.disk import disk_error

_CHUNK = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success sync it and rename it over `path`, on any error remove it.

    What a killed process left is removed by the next: a file in use is locked by its process. Raises OSError, which
    names `path`, when the disk takes no more, whatever a library makes of that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    lock, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        with _naming(path, temporary):
            yield temporary
        # mkstemp makes private files; outputs get what the umask grants, as if they had been opened plainly.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory beside `path`; on success sync its files and put it in `path`'s place.

    On any error, Ctrl-C included, it is removed and `path` is what it was. What a killed process left is removed by the
    next: a directory in use is locked by its process. Raises OSError for a full disk, as `replacing` does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new, old = temporary / "new", temporary / "old"
        new.mkdir()  # with the permissions that the umask grants; mkdtemp's own are private
        with _naming(path, temporary):
            yield new
        for file in new.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        sync_directory(new)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Raise what the disk says as an OSError that names `path`: writing to an open file, or a library, names none."""
    try:
        yield
    except Exception as error:
        found = disk_error(error)
        if found is None:
            raise
        elsewhere = found.filename is not None and not Path(found.filename).is_relative_to(temporary)
        raise OSError(found.errno, found.strerror, found.filename if elsewhere else str(path)) from error


@contextmanager
def alone_in(directory: Path, otherwise: Exception) -> Iterator[None]:
    """Keep other processes out of `directory`, which is made if need be; raise `otherwise` when one is there."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise otherwise from None
        yield
    finally:
        os.close(lock)


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left that were writing `path`."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # it has just gone, or it is another user's
            is_directory = stale.is_dir()
            lock = os.open(stale, os.O_RDONLY if is_directory else os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale, ignore_errors=True) if is_directory else stale.unlink()
            except OSError:
                pass  # another process is at work in it
            finally:
                os.close(lock)


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all. NaN and infinities raise ValueError."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def digest_bytes(content: bytes) -> str:
    """sha256 of `content`, as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's content, as 64 hexadecimal digits."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of the canonical JSON of `value` (sorted keys, no spaces), as 64 hexadecimal digits."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def digest_tree(root: Path, paths: Iterable[Path]) -> str:
    """sha256 over the names (relative to `root`) and contents of Python source files below `paths`."""
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))
    return digest_json({str(file.relative_to(root)): digest_file(file) for file in files})
