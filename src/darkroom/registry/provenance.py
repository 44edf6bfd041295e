"""Where a version comes from: from its name back to commit, parameters, data, lock, run, scores and decisions.

Everything is read from the registry; nothing here needs torch or the model's weights. What is missing or does not fit
together becomes a warning, never an error: the rest can still be told.
"""

import json
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from darkroom.errors import StageFailed
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.files import digest_bytes
from darkroom.registry.aliases import NOT_THERE
from darkroom.registry.dvc_config import parse_config
from darkroom.registry.journal import Decision, decisions
from darkroom.registry.lineage import score_figures
from darkroom.registry.recovery import disagreements
from darkroom.registry.snapshot import CONFIG, LOCK, PARAMS, fetch_snapshot
from darkroom.registry.tracking import (
    connect,
    current,
    first_line,
    import_mlflow,
    tracking_uri,
    unavailable_is_one_line,
)
from darkroom.registry.versions import (
    PROJECT_TAG,
    PROTOCOL_TAG,
    REGISTERED_BY_TAG,
    VALIDATED_TAG,
    WEIGHTS_TAG,
    find_by_uri,
    run_of,
    stored_scores,
)
from darkroom.workspace import Workspace
from darkroom.yaml_text import parse_yaml

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_ABSENT = "absent"


@dataclass(frozen=True)
class RunState:
    """The run that holds a version's record. `status` is MLflow's, or DELETED (it can be restored), or LOST."""

    run_id: str
    status: str


@dataclass(frozen=True)
class Data:
    """What a version was trained on."""

    source: str | None
    digest: str | None
    images: dict[str, int]  # split -> number, as far as known
    validated: bool


@dataclass(frozen=True)
class Verdict:
    """The gate's last word about a version."""

    verdict: str  # passed or refused
    when: str  # UTC, ISO 8601
    relation: str | None  # to the version that served then
    reasons: list[str]


@dataclass(frozen=True)
class Provenance:
    """All that is known about a version. Digests are sha256; what is None or empty is not known."""

    name: str
    version: str
    aliases: list[str]
    registered_at: str  # UTC, ISO 8601
    registered_by: str | None
    weights: str | None
    fingerprint: str | None  # of the training
    commit: str | None
    dirty: bool
    run: RunState
    data: Data
    lock: str | None  # dvc.lock
    project: str | None  # the snapshot
    remote: str | None  # URL of DVC's default remote
    params: dict[str, Any] | None  # params.yaml as it was
    changed: dict[str, tuple[Any, Any]] | None  # parameter -> then, in this project now; None outside a project
    record: ScoreRecord | None  # the scores that the version carries
    other_protocols: list[str]  # digests of further protocols that it was scored under
    verdict: Verdict | None
    history: list[Decision]  # of this version, the oldest first
    warnings: list[str] = field(default_factory=list)


def trace(workspace: Workspace, uri: str) -> Provenance:
    """Where the version at `models:/NAME@alias` or `models:/NAME/3` comes from.

    Raises InputError if there is no such version, RegistryUnavailable if the server does not answer.
    """
    client, tracking = connect(workspace), tracking_uri(workspace)
    with unavailable_is_one_line(tracking), current(tracking):
        version = find_by_uri(client, uri)
        tags, name = version.tags, str(version.name)
        run, records = _run(client, version), stored_scores(version)
        protocol = tags.get(PROTOCOL_TAG, "")
        warnings = disagreements(client, name) + _run_warnings(run)
        files, found = read_project(client, version)
        warnings += found + _package_warnings(version) + _score_warnings(version, records.get(protocol))
        params = params_of(files)
        return Provenance(
            name=name,
            version=str(version.version),
            aliases=sorted(version.aliases),
            registered_at=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
            registered_by=tags.get(REGISTERED_BY_TAG),
            weights=tags.get(WEIGHTS_TAG),
            fingerprint=tags.get("darkroom.fingerprint"),
            commit=tags.get("darkroom.git_commit"),
            dirty=tags.get("darkroom.git_dirty") == "true",
            run=run,
            data=_data(version),
            lock=tags.get("darkroom.dvc_lock"),
            project=tags.get(PROJECT_TAG),
            remote=_remote(files),
            params=params,
            changed=_changed(params, workspace),
            record=records.get(protocol),
            other_protocols=sorted(records.keys() - {protocol}),
            verdict=_verdict(version),
            history=[d for d in decisions(client, name) if str(version.version) in (d.version_from, d.version_to)],
            warnings=warnings,
        )


def read_project(client: "MlflowClient", version: "ModelVersion") -> tuple[dict[str, bytes], list[str]]:
    """The files of a version's project, empty if they are not to be had, and what is wrong with them."""
    digest = version.tags.get(PROJECT_TAG)
    if digest is None:
        return {}, ["registered before versions kept their project: there is nothing to check out"]
    try:
        files = fetch_snapshot(client, run_of(version), digest)
    except StageFailed as error:
        return {}, [f"the project cannot be brought back: {error}"]
    lock = digest_bytes(files[LOCK]) if LOCK in files else None
    if lock != version.tags.get("darkroom.dvc_lock"):
        return files, ["the tag darkroom.dvc_lock is not the digest of the project's dvc.lock: it was altered by hand"]
    return files, []


def params_of(files: dict[str, bytes]) -> dict[str, Any] | None:
    """The values of a project's params.yaml; not checked, since an older one has other keys."""
    try:
        values = parse_yaml(files[PARAMS].decode())
    except (KeyError, ValueError, yaml.YAMLError):
        return None
    return values if isinstance(values, dict) else None


def differences(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The parameters that differ, by their full name: `train.steps` -> the two values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found[prefix + key] = (one, other)
    return found


def _changed(params: dict[str, Any] | None, workspace: Workspace) -> dict[str, tuple[Any, Any]] | None:
    if params is None or not workspace.params_file.is_file():
        return None
    now = params_of({PARAMS: workspace.params_file.read_bytes()})
    return None if now is None else differences(params, now)


def _run(client: "MlflowClient", version: "ModelVersion") -> RunState:
    from mlflow.exceptions import MlflowException

    run_id = run_of(version)
    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return RunState(run_id, "LOST")
        raise
    return RunState(run_id, str(info.status) if info.lifecycle_stage == "active" else "DELETED")


def _run_warnings(run: RunState) -> list[str]:
    if run.status == "DELETED":
        how = f"`mlflow runs restore --run-id {run.run_id}` brings it back, or `darkroom register` rebuilds it"
        return [f"run {run.run_id} was deleted: {how}"]
    if run.status == "LOST":
        return [f"the server knows no run {run.run_id}: `darkroom register`, where its outputs are, rebuilds it"]
    return []


def _package_warnings(version: "ModelVersion") -> list[str]:
    """Whether the package is there and states the weights that the tag names."""
    from mlflow.exceptions import MlflowException

    uri = f"models:/{version.name}/{version.version}/MLmodel"
    try:
        with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
            path = import_mlflow().artifacts.download_artifacts(artifact_uri=uri, dst_path=directory)
            stated = parse_yaml(Path(path).read_text(encoding="utf-8"))["metadata"]["weights_digest"]
    except (MlflowException, OSError) as error:
        return [f"the package cannot be read: {first_line(error)}"]
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        return ["the package names no weights: darkroom did not make it, or it was altered"]
    tagged = str(version.tags.get(WEIGHTS_TAG))
    if stated != tagged:
        return [f"the package states weights {str(stated)[:12]}, the tag {WEIGHTS_TAG} says {tagged[:12]}"]
    return []


def _score_warnings(version: "ModelVersion", record: ScoreRecord | None) -> list[str]:
    """Whether the scores are of these weights, and the figures among the tags are the record's."""
    if record is None:
        return ["no readable score: `darkroom score` measures one under the current protocol"]
    warnings = []
    if record.weights_digest != version.tags.get(WEIGHTS_TAG):
        warnings.append(f"the scores are those of weights {record.weights_digest[:12]}")
    if record.protocol.digest != record.protocol_digest:
        warnings.append("the scores' protocol does not have the digest that it is stored under: it was altered")
    figures = {key: f"{value:.6g}" for key, value in score_figures(record).items()}
    altered = sorted(key for key, value in figures.items() if version.tags.get(key, value) != value)
    return warnings + [f"tag {key} is {version.tags[key]}; measured was {figures[key]}" for key in altered]


def _data(version: "ModelVersion") -> Data:
    tags = version.tags
    try:
        images = {str(split): int(number) for split, number in json.loads(tags["darkroom.data_images"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        images = {}
    source, digest = tags.get("darkroom.data_source"), tags.get("darkroom.data_digest")
    return Data(source, digest, images, tags.get(VALIDATED_TAG) == "true")


def _remote(files: dict[str, bytes]) -> str | None:
    try:
        config = parse_config(files[CONFIG].decode())
        return config[f'remote "{config["core"]["remote"]}"']["url"]
    except (KeyError, ValueError):
        return None


def _verdict(version: "ModelVersion") -> Verdict | None:
    tags = version.tags
    if "darkroom.verdict" not in tags:
        return None
    try:
        reasons = [str(reason) for reason in json.loads(tags.get("darkroom.verdict_reasons", "[]"))]
    except (ValueError, TypeError):
        reasons = [tags["darkroom.verdict_reasons"]]
    when, relation = tags.get("darkroom.verdict_at", ""), tags.get("darkroom.relation")
    return Verdict(tags["darkroom.verdict"], when, relation, reasons)
