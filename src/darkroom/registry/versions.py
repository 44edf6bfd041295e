"""Versions of the registered model: named by their weights, tagged with where they come from and how they scored."""

import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from darkroom.errors import InputError
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.params import DrawParams, Params
from darkroom.registry.aliases import CHALLENGER, CHAMPION, NOT_THERE, version_at
from darkroom.registry.journal import user_name
from darkroom.registry.lineage import lineage_tags, score_figures, sync_outputs
from darkroom.registry.lock import registry
from darkroom.registry.outputs import Outputs, read_outputs
from darkroom.registry.snapshot import log_snapshot, pack_project
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

WEIGHTS_TAG, PROTOCOL_TAG = "darkroom.weights", "darkroom.protocol"
RUN_TAG = "darkroom.run"  # the run that holds a version's record, where it is not the one MLflow links to
PROJECT_TAG = "darkroom.project"  # sha256 of the snapshot of the project
VALIDATED_TAG = "darkroom.validated"  # "true" if the data it was trained on passed validation
REGISTERED_BY_TAG = "darkroom.registered_by"
_SCORE_PREFIX = "darkroom.score."  # + the first digits of the protocol's digest
_DEFAULT_PREFIX = "darkroom.default."  # + a parameter of the packaged model, or "code"
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registered:
    """A version of the registered model. `created` is False if these weights had one already."""

    name: str
    version: str
    created: bool
    run_id: str
    lost_run: str | None = None  # the run that it had and the server lost; `run_id` was rebuilt from what is on disk


def register(workspace: Workspace) -> Registered:
    """Make the EMA weights on disk a version of the registered model, or find the one they have.

    Brings the training's run up to date first. A version that does not serve becomes `@challenger`. Scores under
    another protocol are added to the version. A run that the server lost is rebuilt. Raises InputError for outputs that
    are missing or do not belong together, and RegistryUnavailable if the server does not answer; it can be repeated
    then.
    """
    params, outputs = workspace.params(), read_outputs(workspace)
    if not outputs.finite:
        raise InputError("models/ema.safetensors: the weights are not all finite; such a model is not registered")
    project = pack_project(workspace.root)
    with registry(workspace) as client:
        run_id = sync_outputs(client, workspace, params, outputs)
        name = params.registry.name
        found = find_version(client, name, outputs.card.weights_digest)
        if found is None:
            version, lost = _create(client, workspace, params, outputs, run_id, project), None
        else:
            version, lost = found, _update(client, workspace, params, outputs, found, run_id, project)
        store_score(client, name, version, outputs.record)
        champion = version_at(client, name, CHAMPION)
        if champion is None or champion.version != version.version:
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        return Registered(name, str(version.version), found is None, run_id if lost else run_of(version), lost)


def _create(
    client: "MlflowClient", workspace: Workspace, params: Params, outputs: Outputs, run_id: str, project: bytes
) -> "ModelVersion":
    from darkroom.registry.model_card import describe
    from darkroom.registry.package import log_model

    name = params.registry.name
    _ensure_registered_model(client, name)
    tags = lineage_tags(workspace, params, outputs)
    info, card = log_model(run_id, workspace, params, outputs, tags)
    tags |= {key: f"{value:.6g}" for key, value in score_figures(outputs.record).items()}
    tags |= {"darkroom.model_id": info.model_id, REGISTERED_BY_TAG: user_name()}
    tags[PROJECT_TAG] = log_snapshot(client, run_id, project)
    tags[score_tag(outputs.record.protocol_digest)] = _to_tag(outputs.record)
    tags |= {_DEFAULT_PREFIX + key: str(value) for key, value in _defaults(outputs.record).items()}
    return client.create_model_version(
        name,
        source=info.model_uri,
        run_id=run_id,
        tags=tags,
        description=describe(card),
        model_id=info.model_id,
        await_creation_for=60,
    )


def _update(
    client: "MlflowClient",
    workspace: Workspace,
    params: Params,
    outputs: Outputs,
    version: "ModelVersion",
    run_id: str,
    project: bytes,
) -> str | None:
    """Let the tags of a version lead to what is there; return its run if the server lost that.

    A version's lineage is that of the scores it carries. It stays as it is while there is a snapshot for it and the
    scores stay; so registering again, with a later commit checked out, changes nothing.
    """
    tags, record = version.tags, outputs.record
    lost = run_of(version) if run_is_lost(client, run_of(version)) else None
    moves = tags.get(PROTOCOL_TAG) != record.protocol_digest and not serves_otherwise(version, record)
    changed: dict[str, str] = {}
    if lost or moves or PROJECT_TAG not in tags:
        home = run_id if lost else run_of(version)
        changed = lineage_tags(workspace, params, outputs) | {PROJECT_TAG: log_snapshot(client, home, project)}
        changed |= {RUN_TAG: run_id} if lost else {}
        if not moves:
            changed.pop(PROTOCOL_TAG)  # another record than the one that the version carries
    elif tags.get(VALIDATED_TAG) != "true":
        current = lineage_tags(workspace, params, outputs)
        changed = {VALIDATED_TAG: current[VALIDATED_TAG]}
    for key, value in changed.items():
        if tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)
    if lost:
        _logger.info("run %s of version %s is gone; rebuilt from what is on disk as %s", lost, version.version, run_id)
    return lost


def run_of(version: "ModelVersion") -> str:
    """The id of the run that holds a version's record."""
    return str(version.tags.get(RUN_TAG) or version.run_id)


def run_is_lost(client: "MlflowClient", run_id: str) -> bool:
    """Whether a run was deleted, or the server does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage != "active")
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return True
        raise


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


def check_uri(uri: str) -> re.Match[str]:
    """The parts of `models:/NAME@ALIAS` or `models:/NAME/VERSION`. Raises InputError if it is neither."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise InputError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION, such as models:/digits@champion")
    return match


def find_by_uri(client: "MlflowClient", uri: str) -> "ModelVersion":
    """The version that a URI names. Raises InputError if it is garbled, or if there is no such model or version."""
    from mlflow.exceptions import MlflowException

    name, alias, number = check_uri(uri).group("name", "alias", "version")
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        raise InputError(f"{uri}: no model is registered as {name!r}; `darkroom register` makes the first") from None
    if alias is not None and alias not in aliases:
        known = f"there are {', '.join(f'@{alias}' for alias in sorted(aliases))}" if aliases else "it has no alias"
        raise InputError(f"{uri}: model {name!r} has no @{alias}: {known}")
    try:
        return version_numbered(client, name, number or str(aliases[alias]))
    except InputError as error:
        raise InputError(f"{uri}: {error}") from None


def version_numbered(client: "MlflowClient", name: str, version: str) -> "ModelVersion":
    """That version. Raises InputError if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        there = sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
        known = f"there are {', '.join(map(str, there))}" if there else "there is none; `darkroom register` makes one"
        raise InputError(f"model {name!r} has no version {version}: {known}") from None


def score_tag(protocol_digest: str) -> str:
    """The tag of a version that holds its record under a protocol."""
    return _SCORE_PREFIX + protocol_digest[:12]


def stored_score(version: "ModelVersion", protocol_digest: str) -> ScoreRecord | None:
    """The version's record under a protocol, if there is one, and not of an older format."""
    key = score_tag(protocol_digest)
    text = version.tags.get(key)
    record = None if text is None else _read_record(version, key, text)
    return record if record is not None and record.protocol_digest == protocol_digest else None


def stored_scores(version: "ModelVersion") -> dict[str, ScoreRecord]:
    """All records of a version, by the digest of their protocol; those of an older format are left out."""
    keys = sorted(key for key in version.tags if key.startswith(_SCORE_PREFIX))
    records = [record for key in keys if (record := _read_record(version, key, version.tags[key]))]
    return {record.protocol_digest: record for record in records}


def _read_record(version: "ModelVersion", key: str, text: str) -> ScoreRecord | None:
    try:
        return ScoreRecord.model_validate_json(text)
    except ValueError:
        _logger.warning("version %s: %s is not a record that this version of Darkroom reads", version.version, key)
        return None


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
