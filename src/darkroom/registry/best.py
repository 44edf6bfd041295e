"""The best champion so far, which no later one may be worse than: without it, ties would slide."""

import logging
from typing import TYPE_CHECKING

from darkroom.evaluation.protocol import ScoreRecord
from darkroom.params import Params
from darkroom.registry.journal import FORCED, PROMOTED, ROLLED_BACK, Decision, decisions
from darkroom.registry.scoring import score_version
from darkroom.registry.tracking import connect, first_line, tracking_uri, unavailable_is_one_line
from darkroom.registry.versions import stored_score
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_FID = "unguided.fid"

_logger = logging.getLogger(__name__)


def champions(told: list[Decision]) -> list[str]:
    """The versions that passed the gate and served, the oldest first, from the last override on.

    An override sets the bar anew: whoever promoted a worse model had a reason; if it is rolled back, the bar is what it
    was. A version that was rolled back had a reason against it, and sets no bar; nor does one that was moved by hand,
    which no gate has seen.
    """
    found: list[str] = []
    before: dict[str, list[str]] = {}  # overrides: what the bar was made of
    for entry in told:
        if entry.outcome == FORCED and entry.version_to:
            before[entry.version_to], found = found, [entry.version_to]
        elif entry.outcome == PROMOTED and entry.version_to:
            found = [number for number in found if number != entry.version_to] + [entry.version_to]
        elif entry.outcome == ROLLED_BACK and entry.version_from:
            found = before.pop(entry.version_from, found)
            found = [number for number in found if number != entry.version_from]
    return found


def best_version(workspace: Workspace, told: list[Decision]) -> str | None:
    """The best champion so far under the protocol of the last decision; None if there is none."""
    protocol = _last_protocol(told)
    if protocol is None:
        return None
    with unavailable_is_one_line(tracking_uri(workspace)):
        there = _there(connect(workspace), workspace.params().registry.name, told)
    known = _fids_told(told, protocol)
    known |= {number: found.unguided.fid.value for number, found in _scored(there, protocol).items()}
    return min((number for number in there if number in known), key=known.__getitem__, default=None)


def best_champion(
    client: "MlflowClient",
    workspace: Workspace,
    params: Params,
    candidate: "ModelVersion",
    protocol: str,
    served: ScoreRecord | None,
) -> ScoreRecord | None:
    """The record of the best champion so far under `protocol`; None if that is the one that serves, of record `served`.

    Under a new protocol, with new data for instance, what was best under the last one is scored again: otherwise each
    change would forget it. One that cannot be scored any more sets no bar.
    """
    name = str(candidate.name)
    told = decisions(client, name)
    there = _there(client, name, told)
    there.pop(str(candidate.version), None)
    scored = _scored(there, protocol)
    earlier = _last_protocol(told, other_than=protocol)
    known = {number: fid for number, fid in _fids_told(told, earlier).items() if number in there} if earlier else {}
    known |= {number: found.unguided.fid.value for number, found in _scored(there, earlier or "").items()}
    before = min(known, key=known.__getitem__, default=None)
    if before is not None and before not in scored:
        try:
            scored[before] = score_version(client, workspace, params, there[before], protocol)
        except Exception as error:
            client.get_registered_model(name)  # a server that is down is another matter
            _logger.warning("version %s, the best so far, sets no bar any more: %s", before, first_line(error))
    best = min(scored.values(), key=lambda found: found.unguided.fid.value, default=None)
    if best is None or (served is not None and served.unguided.fid.value <= best.unguided.fid.value):
        return None
    return best


def _there(client: "MlflowClient", name: str, told: list[Decision]) -> "dict[str, ModelVersion]":
    there = {str(version.version): version for version in client.search_model_versions(f"name = '{name}'")}
    return {number: there[number] for number in champions(told) if number in there}


def _scored(versions: "dict[str, ModelVersion]", protocol: str) -> dict[str, ScoreRecord]:
    found = {number: stored_score(version, protocol) for number, version in versions.items()}
    return {number: record for number, record in found.items() if record is not None}


def _last_protocol(told: list[Decision], other_than: str | None = None) -> str | None:
    return next((entry.protocol for entry in reversed(told) if entry.protocol not in (None, "", other_than)), None)


def _fids_told(told: list[Decision], protocol: str) -> dict[str, float]:
    """FID by version from the figures of decisions under a protocol: they outlast the records' format."""
    found: dict[str, float] = {}
    for entry in told:
        if entry.protocol == protocol:
            for who, number in (("champion", entry.version_from), ("challenger", entry.version_to)):
                if number and (fid := entry.figures.get(f"{who}.{_FID}")) is not None:
                    found[number] = fid
    return found
