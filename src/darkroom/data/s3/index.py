"""What of a source lies here, and in which version: JSON beside the data, so that DVC sees a change."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from darkroom.data.s3.listing import Remote
from darkroom.files import read_json, replacing


class Entry(TypedDict):
    """An object whose file is whole."""

    etag: str
    size: int  # bytes
    version: str | None  # S3's version id, where the bucket keeps versions


class Index:
    """Path -> entry. What is added is in a journal at once and in the index when it is closed: a kill loses nothing,
    and a million objects do not write the index a thousand times."""

    def __init__(self, data: Path) -> None:
        self._file = data.with_name(f"{data.name}.json")
        self._journal = data.with_name(f".{data.name}.journal")
        self.entries = _read(self._file, self._journal)
        self._added: Any = None

    def has(self, remote: Remote) -> bool:
        """Whether this very content of the object was fetched."""
        entry = self.entries.get(remote.path)
        return entry is not None and (entry["etag"], entry["size"]) == (remote.etag, remote.size)

    def add(self, remote: Remote, version: str | None) -> None:
        """Record an object whose file is whole."""
        entry = Entry(etag=remote.etag, size=remote.size, version=version)
        self.entries[remote.path] = entry
        if self._added is None:
            self._added = self._journal.open("a", encoding="utf-8")
        # A line begins with its end: the last one of a killed process may be cut short.
        self._added.write("\n" + json.dumps([remote.path, entry]))
        self._added.flush()

    def close(self) -> None:
        """Write the index, sorted by path, an object a line."""
        if self._added is not None:
            self._added.close()
        with replacing(self._file) as temporary, temporary.open("w", encoding="utf-8") as file:
            separator = "{\n"
            for path in sorted(self.entries):
                file.write(f"{separator}  {json.dumps(path)}: {json.dumps(self.entries[path], sort_keys=True)}")
                separator = ",\n"
            file.write("\n}\n" if self.entries else "{}\n")
        self._journal.unlink(missing_ok=True)


def _read(file: Path, journal: Path) -> dict[str, Entry]:
    """What is damaged or of another form is left out; its objects are fetched again."""
    found: list[Any] = []
    with suppress(OSError, ValueError):
        index = read_json(file)
        found += index.items() if isinstance(index, dict) else []
    for line in journal.read_bytes().splitlines() if journal.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return dict(item for item in found if _is_whole(*item))


def _is_whole(path: Any, entry: Any) -> bool:
    return isinstance(path, str) and isinstance(entry, dict) and entry.keys() == {"etag", "size", "version"}
