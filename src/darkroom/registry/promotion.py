"""Which version serves: promotion behind the gate, as a transaction, with a history that is only ever added to."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import InputError, StageFailed
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.params import Params
from darkroom.registry import journal
from darkroom.registry.gate import decide
from darkroom.registry.journal import Decision
from darkroom.registry.lineage import score_figures
from darkroom.registry.tracking import connect, first_line, import_mlflow, tracking_uri, unavailable_is_one_line
from darkroom.registry.versions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    PROTOCOL_TAG,
    WEIGHTS_TAG,
    Registered,
    register,
    registry,
    serves_otherwise,
    store_score,
    stored_score,
    version_at,
    version_numbered,
)
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["Decision", "Promotion", "Registered", "history", "promote", "register", "rollback", "status"]

_ROLLED_BACK_TAG = "darkroom.rolled_back"
_SMOKE_SECONDS = 300

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promotion:
    """How a promotion or a rollback ended. `promoted`: `version` serves now; `changed`: it did not before."""

    promoted: bool
    changed: bool
    version: str
    previous: str | None  # the version that served before
    reasons: list[str]
    figures: dict[str, float] = field(default_factory=dict)


def promote(
    workspace: Workspace, version: str | int | None = None, reason: str | None = None, force: bool = False
) -> Promotion:
    """Let a version (default: `@challenger`) serve if it passes the gate. If it serves already, nothing happens.

    `force` passes over the gate's verdict and needs a reason; both are recorded. Raises InputError if there is no such
    version or nothing to compare by, StageFailed if the model does not work when loaded (the aliases are as before
    then), RegistryUnavailable if the server does not answer.
    """
    if force and not (reason or "").strip():
        raise InputError('an override needs a reason, which is recorded: --force --reason "..."')
    params = workspace.params()
    name = params.registry.name
    with registry(workspace) as client:
        champion = version_at(client, name, CHAMPION)
        candidate = _candidate(client, name, version, champion)
        if champion is not None and candidate.version == champion.version:
            line = f"version {candidate.version} is {CHAMPION} already"
            return Promotion(True, False, str(candidate.version), str(champion.version), [line])
        reasons, figures = _judge(client, workspace, params, candidate, champion, force)
        previous = str(champion.version) if champion is not None else None

        def begin(outcome: str) -> journal.Entry:
            to, why = str(candidate.version), reason or ""
            return journal.begin(
                client, workspace, name, outcome, previous, to, reason=why, findings=reasons, figures=figures
            )

        if reasons and not force:
            begin("refused").close()
            return Promotion(False, False, str(candidate.version), previous, reasons, figures)
        _switch(client, workspace, name, candidate, previous, begin("forced" if reasons else "promoted"))
        if (challenger := version_at(client, name, CHALLENGER)) and challenger.version == candidate.version:
            client.delete_registered_model_alias(name, CHALLENGER)
        return Promotion(True, True, str(candidate.version), previous, reasons, figures)


def rollback(workspace: Workspace, reason: str) -> Promotion:
    """Let `@previous` serve again. The version that served is marked, so that only an override promotes it again."""
    if not reason.strip():
        raise InputError('a rollback needs a reason, which is recorded: --reason "..."')
    params = workspace.params()
    name = params.registry.name
    with registry(workspace) as client:
        champion, target = version_at(client, name, CHAMPION), version_at(client, name, PREVIOUS)
        if champion is None or target is None:
            missing = CHAMPION if champion is None else PREVIOUS
            raise InputError(f"model {name!r} has no @{missing}: there is nothing to roll back to")
        left, back = str(champion.version), str(target.version)
        before = journal.served_before(journal.decisions(client, name), back)
        entry = journal.begin(
            client, workspace, name, "rolled back", left, back, reason=reason, findings=[], figures={}
        )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        client.set_model_version_tag(name, left, _ROLLED_BACK_TAG, f"{now}: {reason}")
        _switch(client, workspace, name, target, before, entry)
        return Promotion(True, True, str(target.version), left, [reason])


def history(workspace: Workspace) -> list[Decision]:
    """Every decision, the oldest first."""
    client = connect(workspace)
    with unavailable_is_one_line(tracking_uri(workspace)):
        return journal.decisions(client, workspace.params().registry.name)


def status(workspace: Workspace) -> dict[str, dict[str, Any] | None]:
    """What `@champion`, `@challenger` and `@previous` are: version, weights, commit, protocol and figures."""
    client = connect(workspace)
    name = workspace.params().registry.name
    with unavailable_is_one_line(tracking_uri(workspace)):
        return {alias: _summary(version_at(client, name, alias)) for alias in (CHAMPION, CHALLENGER, PREVIOUS)}


def _summary(version: "ModelVersion | None") -> dict[str, Any] | None:
    if version is None:
        return None
    record = stored_score(version, version.tags.get(PROTOCOL_TAG, ""))
    return {
        "version": str(version.version),
        "weights": version.tags.get(WEIGHTS_TAG),
        "protocol": version.tags.get(PROTOCOL_TAG),
        "git_commit": version.tags.get("darkroom.git_commit"),
        "run_id": version.run_id,
        "figures": score_figures(record) if record else {},
    }


def _candidate(
    client: "MlflowClient", name: str, version: str | int | None, champion: "ModelVersion | None"
) -> "ModelVersion":
    if version is not None:
        return version_numbered(client, name, str(version))
    candidate = version_at(client, name, CHALLENGER) or champion
    if candidate is None:
        raise InputError(f"model {name!r} has no @{CHALLENGER}: `darkroom register` makes one")
    return candidate


def _judge(
    client: "MlflowClient",
    workspace: Workspace,
    params: Params,
    candidate: "ModelVersion",
    champion: "ModelVersion | None",
    force: bool,
) -> tuple[list[str], dict[str, float]]:
    """What stands against the candidate, with the figures; the scores that are missing are made first."""
    reasons = []
    if mark := candidate.tags.get(_ROLLED_BACK_TAG):
        reasons.append(f"version {candidate.version} was rolled back at {mark}")
    try:
        protocol = _current_protocol(workspace, candidate)
        challenger = _score(client, workspace, params, candidate, protocol)
        served = _score(client, workspace, params, champion, protocol) if champion is not None else None
    except InputError as error:
        if not force:
            raise
        return [*reasons, f"not comparable: {error}"], {}
    if differences := serves_otherwise(candidate, challenger):
        reasons.append(f"version {candidate.version} draws by default with {'; '.join(differences)}")
    verdict = decide(params.registry.gate, challenger, served)
    figures = {f"challenger.{key}": value for key, value in score_figures(challenger).items()}
    if served is not None:
        figures |= {f"champion.{key}": value for key, value in score_figures(served).items()}
    return reasons + verdict.reasons, figures


def _current_protocol(workspace: Workspace, candidate: "ModelVersion") -> str:
    """The digest that `dvc repro` measured with last; without reports, the one the candidate was registered with."""
    if workspace.metrics_file.is_file():
        return ScoreRecord.read(workspace.metrics_file).protocol_digest
    if digest := candidate.tags.get(PROTOCOL_TAG):
        return str(digest)
    raise InputError(f"{workspace.metrics_file}: no such file; `dvc repro` makes it")


def _score(
    client: "MlflowClient", workspace: Workspace, params: Params, version: "ModelVersion", protocol: str
) -> ScoreRecord:
    """The version's record under the protocol: the stored one, or the registered weights scored now."""
    stored = stored_score(version, protocol)
    if stored is not None:
        return stored
    from darkroom.diffusion.model import DiffusionModel
    from darkroom.evaluation.features import Extractor
    from darkroom.evaluation.rescore import score_model

    name = params.registry.name
    _logger.info("version %s has no score under protocol %s: scoring it again", version.version, protocol[:12])
    with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
        uri = f"models:/{name}/{version.version}/artifacts/model"
        artifacts = import_mlflow().artifacts
        path = artifacts.download_artifacts(artifact_uri=uri, dst_path=directory)
        model = DiffusionModel.load(Path(path))
        card, extractor = model.card, Extractor.load(workspace.extractor).card
        mine = (card.image_size, card.channels, card.classes)
        if mine != (extractor.image_size, extractor.image_channels, extractor.classes):
            raise InputError(
                f"version {version.version} draws other images or classes than this project's reference knows"
            )
        record = score_model(model, workspace.extractor, params.sample, params.evaluate)
    if record.protocol_digest != protocol:
        raise InputError("params.yaml or models/extractor changed since the last scores; `dvc repro` first")
    client.set_model_version_tag(name, version.version, "darkroom.rescored", protocol)
    store_score(client, name, version, record)
    return record


def _switch(
    client: "MlflowClient",
    workspace: Workspace,
    name: str,
    version: "ModelVersion",
    previous: str | None,
    entry: journal.Entry,
) -> None:
    """Prove that a version works, then move `@champion` to it and `@previous` to another; on any failure put both back.

    The proof comes first: whatever ends this process, `@champion` never points to a version that was not proven.
    """
    before = {alias: version_at(client, name, alias) for alias in (CHAMPION, PREVIOUS)}
    try:
        _smoke(workspace, f"models:/{name}/{version.version}", version.tags[WEIGHTS_TAG])
        _point(client, name, PREVIOUS, previous)
        _point(client, name, CHAMPION, str(version.version))
    except BaseException as error:
        message = str(error) or type(error).__name__
        for alias, old in before.items():
            try:
                _point(client, name, alias, str(old.version) if old is not None else None)
            except Exception as failure:
                _logger.error("@%s could not be put back to %s: %s", alias, old and old.version, first_line(failure))
        with contextlib.suppress(Exception):  # the history is told what went wrong if there is somebody to tell
            entry.close("failed", message)
        raise
    entry.close()


def _point(client: "MlflowClient", name: str, alias: str, version: str | None) -> None:
    if version is not None:
        client.set_registered_model_alias(name, alias, version)
    elif version_at(client, name, alias) is not None:
        client.delete_registered_model_alias(name, alias)


def _smoke(workspace: Workspace, uri: str, weights_digest: str) -> None:
    """Load the model in a clean process and draw; raise StageFailed unless it is these weights and its own code."""
    import_mlflow()  # sets what makes it quiet, for the process below too
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"MLFLOW_TRACKING_URI": tracking_uri(workspace)}
    command = [sys.executable, "-I", "-B", str(Path(__file__).with_name("smoke.py")), uri]
    with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
        try:
            done = subprocess.run(
                command, cwd=directory, env=environment, capture_output=True, text=True, timeout=_SMOKE_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise StageFailed(
                f"{uri} did not load and draw within {_SMOKE_SECONDS} s; the aliases are as before"
            ) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageFailed(f"{uri} does not work when loaded ({last}); the aliases are as before")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["weights_digest"] != weights_digest:
        digests = f"{found['weights_digest'][:12]} instead of {weights_digest[:12]}"
        raise StageFailed(f"{uri} loads other weights than its tag says ({digests}); the aliases are as before")
    if Path(found["code"]).is_relative_to(Path(__file__).parents[1]):
        raise StageFailed(f"{uri} runs this project's code instead of its own; the aliases are as before")
    if found["distinct"] != 2:
        raise StageFailed(f"{uri} draws the same image twice; the aliases are as before")
