"""Parts of sources that are files: their bytes, or why there are none."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from darkroom.data.images import MAX_BYTES, Unreadable


@dataclass(frozen=True)
class Files:
    """The contents of files below `root`, in order."""

    root: str
    names: list[str]

    def __iter__(self) -> Iterator[bytes | Unreadable]:
        return (read_file(os.path.join(self.root, name)) for name in self.names)  # noqa: PTH118 (names may be bytes)


def read_file(path: str) -> bytes | Unreadable:
    """A file's bytes. Whatever keeps a regular file of bearable size from being read is a reason, not an exception."""
    size = 0
    try:
        # A pipe or a device could keep the reader for ever; O_NONBLOCK lets it look at what it opened.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            known = os.fstat(descriptor)
            size = known.st_size
            if not stat.S_ISREG(known.st_mode):
                return Unreadable("not a regular file")
            if size > MAX_BYTES:
                return Unreadable(f"{size:,} bytes, over the limit of {MAX_BYTES:,}", size)
            content = os.read(descriptor, size + 1)
        finally:
            os.close(descriptor)
        return content if len(content) == size else Unreadable("changed while it was read", size)
    except OSError as error:
        return Unreadable(f"cannot be read: {error.strerror}", size)


def as_text(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 are spelt out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def identity(form: str, entries: Iterable[tuple[object, ...]]) -> str:
    """`Source.identity`: a digest of the form and of what is known of each file."""
    hasher = hashlib.sha256(form.encode())
    for entry in entries:
        hasher.update("\0".join(map(str, entry)).encode("utf-8", "surrogateescape") + b"\n")
    return hasher.hexdigest()


def file_entry(path: Path) -> tuple[object, ...]:
    """What tells one content of a single file from another without reading it."""
    known = path.stat()
    return path.name, known.st_size, known.st_mtime_ns
