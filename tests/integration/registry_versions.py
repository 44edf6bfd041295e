"""Registered versions without a package, for tests of what happens around the proof; and a look at the database."""

import contextlib
import json
import re
import sqlite3
from pathlib import Path

import pytest

from darkroom.files import write_json
from darkroom.registry import promotion
from darkroom.registry.aliases import CHALLENGER
from darkroom.registry.proof import Proof
from darkroom.registry.tracking import connect
from darkroom.registry.versions import PROTOCOL_TAG, VALIDATED_TAG, WEIGHTS_TAG, score_tag
from darkroom.workspace import Workspace
from tests.integration.registry_project import score_record

_TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:+]+")


def add_version(project: Workspace, fid: float = 0.5) -> str:
    """A validated version with a score under the project's protocol, at `@challenger`; return its number."""
    client = connect(project)
    if not client.search_registered_models("name = 'digits'"):
        client.create_registered_model("digits")
    known = len(client.search_model_versions("name = 'digits'"))
    weights = f"{known + 1:064x}"
    record = score_record(weights, fid=fid, code="c" * 64)
    write_json(project.metrics_file, record.to_json_dict())
    tags = {
        WEIGHTS_TAG: weights,
        VALIDATED_TAG: "true",
        PROTOCOL_TAG: record.protocol_digest,
        score_tag(record.protocol_digest): json.dumps(record.to_json_dict()),
    }
    version = client.create_model_version("digits", source=project.state.as_uri(), tags=tags)
    client.set_registered_model_alias("digits", CHALLENGER, version.version)
    return str(version.version)


def pretend_to_prove(patch: pytest.MonkeyPatch) -> None:
    """Every version works, and draws an image in 10 ms."""
    patch.setattr(promotion, "prove", lambda *_: Proof(0.01))


def aliases(project: Workspace) -> dict[str, str]:
    """The aliases as the database has them, without MLflow."""
    rows = _query(project, "select alias, version from registered_model_aliases where name = 'digits'")
    return {alias: str(version) for alias, version in rows}


def locks(project: Workspace) -> list[str]:
    """Registered models that are no models."""
    return [name for (name,) in _query(project, "select name from registered_models where name <> 'digits'")]


def open_entries(project: Workspace) -> int:
    """Decisions in the history that were not closed."""
    ((count,),) = _query(
        project,
        "select count(*) from runs join experiments using (experiment_id) "
        "where experiments.name = 'digits-promotions' and runs.status = 'RUNNING'",
    )
    return int(count)


def tags(project: Workspace) -> dict[tuple[str, str], str]:
    """What promotion wrote on versions, by version and tag, without the times."""
    rows = _query(
        project,
        "select version, key, value from model_version_tags "
        "where key like 'darkroom.verdict%' or key in ('darkroom.relation', 'darkroom.rolled_back')",
    )
    return {(str(version), str(key)): _TIME.sub("", str(value)) for version, key, value in rows}


def _query(project: Workspace, query: str) -> list[tuple[object, ...]]:
    path: Path = project.state / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()
