"""Versions of the registered model: named by their weights, tagged with where they come from and how they scored."""

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from darkroom.errors import InputError
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.params import DrawParams, Params
from darkroom.registry.lineage import Outputs, lineage_tags, read_outputs, score_figures, sync_outputs
from darkroom.registry.package import log_package
from darkroom.registry.tracking import connect, current, tracking_uri, unavailable_is_one_line
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
WEIGHTS_TAG, PROTOCOL_TAG = "darkroom.weights", "darkroom.protocol"
_SCORE_PREFIX = "darkroom.score."  # + the first digits of the protocol's digest
_DEFAULT_PREFIX = "darkroom.default."  # + a parameter of the packaged model, or "code"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registered:
    """A version of the registered model. `created` is False if these weights had one already."""

    name: str
    version: str
    created: bool
    run_id: str


def register(workspace: Workspace) -> Registered:
    """Make the EMA weights on disk a version of the registered model, or find the one they have.

    Brings the training's run up to date first. A version that does not serve becomes `@challenger`. Scores under
    another protocol are added to the version. Raises InputError for outputs that are missing or do not belong together,
    and RegistryUnavailable if the server does not answer; it can be repeated then.
    """
    params, outputs = workspace.params(), read_outputs(workspace)
    if not outputs.finite:
        raise InputError("models/ema.safetensors: the weights are not all finite; such a model is not registered")
    with registry(workspace) as client:
        run_id = sync_outputs(client, workspace, params, outputs)
        name = params.registry.name
        found = find_version(client, name, outputs.card.weights_digest)
        version = found or _create(client, workspace, params, outputs, run_id)
        store_score(client, name, version, outputs.record)
        champion = version_at(client, name, CHAMPION)
        if champion is None or champion.version != version.version:
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        return Registered(name, str(version.version), found is None, str(version.run_id or run_id))


@contextlib.contextmanager
def registry(workspace: Workspace) -> Iterator["MlflowClient"]:
    """A client for one command that changes the registry; in this project there is one such command at a time."""
    client, uri = connect(workspace), tracking_uri(workspace)
    workspace.state.mkdir(parents=True, exist_ok=True)
    with (workspace.state / "registry.lock").open("w") as file, unavailable_is_one_line(uri), current(uri):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield client


def _create(
    client: "MlflowClient", workspace: Workspace, params: Params, outputs: Outputs, run_id: str
) -> "ModelVersion":
    name, digest = params.registry.name, outputs.card.weights_digest
    _ensure_registered_model(client, name)
    info = log_package(run_id, workspace.models, outputs.card, params.sample, {WEIGHTS_TAG: digest})
    figures = {key: f"{value:.6g}" for key, value in score_figures(outputs.record).items()}
    tags = lineage_tags(workspace, outputs) | figures | {"darkroom.model_id": info.model_id}
    tags[score_tag(outputs.record.protocol_digest)] = _to_tag(outputs.record)
    tags |= {_DEFAULT_PREFIX + key: str(value) for key, value in _defaults(outputs.record).items()}
    return client.create_model_version(
        name, source=info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id, await_creation_for=60
    )


def _ensure_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def find_version(client: "MlflowClient", name: str, weights_digest: str) -> "ModelVersion | None":
    """The first version with these weights."""
    query = f"name = '{name}' and tags.`{WEIGHTS_TAG}` = '{weights_digest}'"
    return min(client.search_model_versions(query), key=lambda version: int(version.version), default=None)


def version_at(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """The version that an alias points to."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def version_numbered(client: "MlflowClient", name: str, version: str) -> "ModelVersion":
    """That version. Raises InputError if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        there = sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
        known = f"there are {', '.join(map(str, there))}" if there else "there is none; `darkroom register` makes one"
        raise InputError(f"model {name!r} has no version {version}: {known}") from None


def score_tag(protocol_digest: str) -> str:
    """The tag of a version that holds its record under a protocol."""
    return _SCORE_PREFIX + protocol_digest[:12]


def stored_score(version: "ModelVersion", protocol_digest: str) -> ScoreRecord | None:
    """The version's record under a protocol, if it has been scored under it."""
    text = version.tags.get(score_tag(protocol_digest))
    if text is None:
        return None
    record = ScoreRecord.model_validate_json(text)
    return record if record.protocol_digest == protocol_digest else None


def serves_otherwise(version: "ModelVersion", record: ScoreRecord) -> list[str]:
    """How the packaged model draws by default and the record was not measured; empty if they agree."""
    differences = []
    for key, measured in _defaults(record).items():
        packaged = version.tags.get(_DEFAULT_PREFIX + key, str(measured))
        if packaged != str(measured):
            differences.append(f"{key} {packaged[:12]}, measured with {str(measured)[:12]}")
    return differences


def _defaults(record: ScoreRecord) -> dict[str, object]:
    drawn = {name: getattr(record.protocol, name) for name in DrawParams.model_fields}
    return drawn | {"code": record.protocol.code}


def store_score(client: "MlflowClient", name: str, version: "ModelVersion", record: ScoreRecord) -> None:
    """Add a record to a version. If it measures what the version draws by default, its figures become the version's."""
    tags = {score_tag(record.protocol_digest): _to_tag(record)}
    if not serves_otherwise(version, record):
        tags |= {PROTOCOL_TAG: record.protocol_digest}
        tags |= {key: f"{value:.6g}" for key, value in score_figures(record).items()}
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)


def _to_tag(record: ScoreRecord) -> str:
    return json.dumps(record.to_json_dict(), sort_keys=True)
