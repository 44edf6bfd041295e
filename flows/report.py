"""The report of a retraining: Markdown that a person reads in Prefect, and in a terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from darkroom.params import GatePolicy
from darkroom.registry.lineage import SCORES
from flows.release import Promotion, Registered

_CHECKS = (  # figure, bound, key of the policy
    ("unguided.fid", "at most", "max_fid"),
    ("unguided.class_accuracy", "at least", "min_class_accuracy"),
    ("guided.class_accuracy", "at least", "min_guided_class_accuracy"),
    ("guided.worst_class_accuracy", "at least", "min_worst_class_accuracy"),
    ("unguided.near_copies", "at most", "max_near_copies"),
    ("guided.near_copies", "at most", "max_near_copies"),
    ("seconds_per_image", "at most", "max_seconds_per_image"),
)
_COMPARED = ("unguided.fid", "unguided.class_accuracy", "guided.class_accuracy")  # with the champion's
_REASON = re.compile(r"(?P<figure>\S+) is (?P<value>\S+): expected (?P<expected>.+)")


def verdict(name: str, registered: Registered, promotion: Promotion) -> str:
    """What was decided, in a sentence."""
    version = f"version {promotion.version} of {registered.name}"
    if name == "Promoted":
        before = f"; before: version {promotion.previous}" if promotion.previous else ""
        return f"Promoted: {version} passed the gate and serves now{before}."
    if name == "Unchanged":
        return f"Unchanged: {version} serves already."
    stays = f"version {promotion.previous} stays" if promotion.previous else "nothing serves"
    return f"Kept: {version} was refused, {stays}:\n\n" + "\n".join(f"- {reason}" for reason in promotion.reasons)


def figures_of(challenger: bool, promotion: Promotion) -> dict[str, float]:
    """The figures of the version that was judged, or of the one that it was compared with; empty if there are none."""
    prefix = "challenger." if challenger else "champion."
    return {key.removeprefix(prefix): value for key, value in promotion.figures.items() if key.startswith(prefix)}


def gate_table(policy: GatePolicy, promotion: Promotion) -> str:
    """Each check of the gate: figure, what was expected, whether it passed. Empty if nothing was judged."""
    if not promotion.figures:
        return ""
    mine, seconds = figures_of(True, promotion), "seconds_per_image"
    if seconds in promotion.figures:
        mine[seconds] = promotion.figures[seconds]
    failed = [match.groupdict() for reason in promotion.reasons if (match := _REASON.match(reason))]
    rows: list[Sequence[str]] = []
    for figure, bound, key in _CHECKS:
        if figure in mine:
            refused = any(found["figure"] == figure and f"({key})" in found["expected"] for found in failed)
            rows.append((figure, f"{mine[figure]:.4g}", f"{bound} {getattr(policy, key):.4g} ({key})", _mark(refused)))
    for figure in _COMPARED:
        champion = promotion.figures.get(f"champion.{figure}")
        if champion is not None and figure in mine:
            refusal = next((f for f in failed if f["figure"] == figure and "(champion" in f["expected"]), None)
            expected = refusal["expected"] if refusal else f"not worse than the champion's {champion:.4g}"
            rows.append((figure, f"{mine[figure]:.4g}", expected, _mark(refusal is not None)))
    best, figure = promotion.figures.get(f"best.{_COMPARED[0]}"), _COMPARED[0]
    if best is not None and figure in mine:
        refused = any(found["figure"] == figure and "best champion" in found["expected"] for found in failed)
        expected = f"not worse than the best champion's {best:.4g}"
        rows.append((figure, f"{mine[figure]:.4g}", expected, _mark(refused)))
    return _table(("check", "figure", "expected", "passed"), rows)


def figures_table(mine: Mapping[str, float], before: Mapping[str, float], titles: tuple[str, str]) -> str:
    """Scores with their spread over seeds, of this version and the one before, and of real images: the floor."""
    rows = []
    for kind in ("unguided", "guided"):
        for score in SCORES:
            key = f"{kind}.{score}"
            if key in mine or key in before:
                other = [_spread(before, key)] if before else []
                rows.append((key, _spread(mine, key), *other, _figure((mine or before), f"floor.{score}")))
    return _table(("score", *titles[: 2 if before else 1], "real images"), rows) if rows else ""


def links(tracking: str, registered: Registered) -> str:
    """Where MLflow shows the version and its run; empty without a server."""
    parts = urlsplit(tracking)
    if parts.scheme not in ("http", "https"):
        return ""
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    version = f"[version {registered.version}]({server}/#/models/{registered.name}/versions/{registered.version})"
    return f"MLflow: {version}, [its run]({server}/#/runs/{registered.run_id})"


def stages_table(rows: Sequence[tuple[str, str, float, str]]) -> str:
    """How each stage ended: name, outcome, seconds, size."""
    return _table(
        ("stage", "outcome", "seconds", "size"), [(name, how, f"{took:.1f}", size) for name, how, took, size in rows]
    )


def _mark(refused: bool) -> str:
    return "**no**" if refused else "yes"


def _spread(figures: Mapping[str, float], key: str) -> str:
    spread = figures.get(f"{key}_spread")
    return _figure(figures, key) + (f" ± {spread:.2g}" if spread is not None and key in figures else "")


def _figure(figures: Mapping[str, float], key: str) -> str:
    return f"{figures[key]:.4g}" if key in figures else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns are aligned as text, too."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
