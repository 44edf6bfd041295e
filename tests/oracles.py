"""The oracle table: what of ours was compared with which reference, how far apart they were and how far they may be.

A test takes the fixture `oracle` and calls it with (ours, reference, measured, tolerance); the run ends with the table.
"""

import math
from collections.abc import Iterable, Iterator

import pytest


class OracleTable:
    """One row per pair of names, with the comparison that came closest to failing, in the order of the tests."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], tuple[float, float]] = {}

    def __call__(self, ours: str, reference: str, measured: float, tolerance: float) -> None:
        """Record the row, then fail unless measured <= tolerance; NaN fails."""
        measured, tolerance = float(measured), float(tolerance)
        self.add([(ours, reference, measured, tolerance)])
        assert measured <= tolerance, f"{ours} differs from {reference} by {measured:.3g}, allowed is {tolerance:.3g}"

    def add(self, rows: Iterable[tuple[str, str, float, float]]) -> None:
        """Take in comparisons, those of another process of the same run too."""
        for ours, reference, measured, tolerance in rows:
            known = self._rows.get((ours, reference))
            if known is None or _room(measured, tolerance) < _room(*known):
                self._rows[ours, reference] = (measured, tolerance)

    def rows(self) -> list[tuple[str, str, float, float]]:
        """What `add` takes."""
        return [(*names, *figures) for names, figures in self._rows.items()]

    def lines(self) -> Iterator[str]:
        """The table as text, a header first; nothing when nothing was compared."""
        if not self._rows:
            return
        rows = [("ours", "reference", "measured", "tolerance")]
        rows += [(*names, f"{measured:.2g}", f"{limit:.2g}") for names, (measured, limit) in self._rows.items()]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        for ours, reference, measured, tolerance in rows:
            yield f"{ours:<{first}}  {reference:<{second}}  {measured:>9}  {tolerance:>9}"


def _room(measured: float, tolerance: float) -> float:
    """What is left of the tolerance, as a share of it; for a tolerance of 0 the difference itself."""
    if math.isnan(measured):
        return -math.inf
    return (tolerance - measured) / tolerance if tolerance else -measured


TABLE = pytest.StashKey[OracleTable]()
