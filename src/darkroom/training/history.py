"""The training history on disk: a JSON object per tick, beside the checkpoints."""

import json
from pathlib import Path

from darkroom.files import write_text


class History:
    """Rows with a "step", appended as training goes; a resumed training drops those it is about to repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, float | None]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

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
