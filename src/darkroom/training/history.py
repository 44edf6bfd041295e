"""The training history on disk: a JSON object per tick, beside the checkpoints."""

import json
import logging
import os
from pathlib import Path

from darkroom.files import write_text

_log = logging.getLogger(__name__)


class History:
    """Rows with a "step", appended as training goes; a resumed training drops those it is about to repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten = ""

    def append(self, row: dict[str, float | None]) -> None:
        """Write a row, on the disk before a checkpoint that follows it. On a full disk it is kept for the next time."""
        failed_before, self._unwritten = bool(self._unwritten), self._unwritten + json.dumps(row) + "\n"
        try:
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a crash cut the last line short
                        file.write(b"\n")
                file.write(self._unwritten.encode())
                file.flush()
                os.fsync(file.fileno())
            self._unwritten = ""
        except OSError as error:
            if not failed_before:
                _log.warning("%s cannot be written: %s; training goes on, the next row tries again", self.path, error)

    def rows(self) -> list[dict[str, float | None]]:
        """All rows in the order of their steps, each step once; a line that a crash cut short does not count."""
        found: dict[int, dict[str, float | None]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                found[int(row["step"])] = row
        return [found[step] for step in sorted(found)]

    def truncate(self, step: int) -> None:
        """Keep the rows up to `step`."""
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows() if int(row["step"] or 0) <= step))
