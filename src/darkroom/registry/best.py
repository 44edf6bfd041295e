"""The best champion so far, which no later one may be worse than: without it, ties would slide."""

import logging
from typing import TYPE_CHECKING

from darkroom.errors import InputError
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.params import Params
from darkroom.registry.journal import FORCED, PROMOTED, ROLLED_BACK, Decision, decisions
from darkroom.registry.recovery import ROLLED_BACK_TAG
from darkroom.registry.scoring import score_version
from darkroom.registry.tracking import connect, tracking_uri, unavailable_is_one_line
from darkroom.registry.versions import stored_score
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_logger = logging.getLogger(__name__)


def champions(told: list[Decision]) -> list[str]:
    """The versions that passed the gate and served, the oldest first, from the last override on.

    An override sets the bar anew: whoever promoted a worse model had a reason. A version that was rolled back had one
    against it, and sets no bar; nor does one that was moved by hand, which no gate has seen.
    """
    found: list[str] = []
    for entry in told:
        if entry.outcome == FORCED and entry.version_to:
            found = [entry.version_to]
        elif entry.outcome == PROMOTED and entry.version_to:
            found.append(entry.version_to)
        elif entry.outcome == ROLLED_BACK:
            found = [number for number in found if number != entry.version_from]
    return list(dict.fromkeys(found))


def best_version(workspace: Workspace, told: list[Decision]) -> str | None:
    """The best champion so far under the protocol of the last decision; None if there is none."""
    protocol = next((entry.protocol for entry in reversed(told) if entry.protocol), None)
    if protocol is None:
        return None
    with unavailable_is_one_line(tracking_uri(workspace)):
        found = _best(_there(connect(workspace), workspace.params().registry.name, told), protocol)
    return None if found is None else str(found[0].version)


def best_champion(
    client: "MlflowClient",
    workspace: Workspace,
    params: Params,
    champion: "ModelVersion",
    served: ScoreRecord,
) -> ScoreRecord | None:
    """The record of the best champion so far, under the protocol of `served`; None if that, the champion's, is it.

    Under a new protocol, with new data for instance, what was best under the last one is scored again: otherwise each
    change would forget it.
    """
    protocol = served.protocol_digest
    told = decisions(client, str(champion.name))
    versions = _there(client, str(champion.name), told)
    others = [version for version in versions if version.version != champion.version]
    found = _best(others, protocol)
    if found is None:
        earlier = next((entry.protocol for entry in reversed(told) if entry.protocol not in (None, protocol)), None)
        before = _best(versions, earlier) if earlier else None
        if before is None or before[0].version == champion.version:
            return None
        try:
            found = before[0], score_version(client, workspace, params, before[0], protocol)
        except InputError as error:  # it draws other images or classes than today's reference knows
            _logger.warning("version %s sets no bar any more: %s", before[0].version, error)
            return None
    return found[1] if found[1].unguided.fid.value < served.unguided.fid.value else None


def _there(client: "MlflowClient", name: str, told: list[Decision]) -> "list[ModelVersion]":
    there = {str(version.version): version for version in client.search_model_versions(f"name = '{name}'")}
    found = [there[number] for number in champions(told) if number in there]
    return [version for version in found if ROLLED_BACK_TAG not in version.tags]


def _best(versions: "list[ModelVersion]", protocol: str) -> "tuple[ModelVersion, ScoreRecord] | None":
    scored = [(version, record) for version in versions if (record := stored_score(version, protocol))]
    return min(scored, key=lambda pair: pair[1].unguided.fid.value, default=None)
