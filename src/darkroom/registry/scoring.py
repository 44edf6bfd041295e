"""Scoring a registered version under this project's protocol: the figures that a comparison or a verdict is missing."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.errors import InputError
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.params import Params
from darkroom.registry.lock import registry
from darkroom.registry.tracking import import_mlflow
from darkroom.registry.versions import PROTOCOL_TAG, find_by_uri, store_score, stored_score
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_RESCORED_TAG = "darkroom.rescored"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """A version and its record under the project's protocol. `created` is False if it had been scored under it."""

    name: str
    version: str
    created: bool
    record: ScoreRecord


def score(workspace: Workspace, uri: str) -> Scored:
    """Measure the version at `uri` under the protocol that `dvc repro` measured with last, and store the record on it.

    A project that has measured nothing yet needs no more than its reference. Raises InputError if there is no such
    version, no reference or the model does not fit it, and RegistryUnavailable if the server does not answer.
    """
    params = workspace.params()
    with registry(workspace) as client:
        version = find_by_uri(client, uri)
        unmeasured = workspace.extractor.is_dir() and not workspace.metrics_file.is_file()
        protocol = _coming(workspace, params) if unmeasured else current_protocol(workspace)
        known = stored_score(version, protocol)
        record = known or score_version(client, workspace, params, version, protocol)
        return Scored(str(version.name), str(version.version), known is None, record)


def current_protocol(workspace: Workspace, version: "ModelVersion | None" = None) -> str:
    """The digest that `dvc repro` measured with last; without reports, the one that `version` was registered with."""
    if workspace.metrics_file.is_file() or version is None or PROTOCOL_TAG not in version.tags:
        return ScoreRecord.read(workspace.metrics_file).protocol_digest
    return str(version.tags[PROTOCOL_TAG])


def _coming(workspace: Workspace, params: Params) -> str:
    """The digest that `dvc repro` would measure with."""
    from darkroom.evaluation.rescore import protocol_of

    return protocol_of(workspace.extractor, params.sample, params.evaluate).digest


def score_version(
    client: "MlflowClient", workspace: Workspace, params: Params, version: "ModelVersion", protocol: str
) -> ScoreRecord:
    """The version's record under the protocol: the stored one, or the registered weights scored now and stored.

    Raises InputError if the model draws other images or classes than the project's reference knows, or if parameters
    or extractor are no longer those of the protocol.
    """
    stored = stored_score(version, protocol)
    if stored is not None:
        return stored
    from darkroom.diffusion.model import DiffusionModel
    from darkroom.evaluation.features import Extractor
    from darkroom.evaluation.rescore import score_model

    _logger.info("version %s has no score under protocol %s: scoring it again", version.version, protocol[:12])
    with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
        uri = f"models:/{version.name}/{version.version}/artifacts/model"
        path = import_mlflow().artifacts.download_artifacts(artifact_uri=uri, dst_path=directory)
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
    client.set_model_version_tag(version.name, version.version, _RESCORED_TAG, protocol)
    store_score(client, version.name, version, record)
    return record
