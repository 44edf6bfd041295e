"""Where runs are kept, whatever the working directory."""

from pathlib import Path

import pytest

from darkroom.errors import StageFailed
from darkroom.registry.tracking import RegistryUnavailable, artifact_root, connect, tracking_uri
from darkroom.workspace import Workspace


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DARKROOM_ARTIFACT_ROOT", "DARKROOM_STATE"):
        monkeypatch.delenv(name, raising=False)


def test_default_is_sqlite_and_files_under_the_project(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert tracking_uri(workspace) == f"sqlite:///{tmp_path}/.darkroom/mlflow.db"
    assert artifact_root(workspace) == f"file://{tmp_path}/.darkroom/artifacts"


def test_state_elsewhere_moves_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_STATE", str(tmp_path / "state"))
    workspace = Workspace(tmp_path / "project")
    assert tracking_uri(workspace) == f"sqlite:///{tmp_path}/state/mlflow.db"
    assert artifact_root(workspace) == f"file://{tmp_path}/state/artifacts"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///runs.db", "sqlite:///{root}/runs.db"),
        ("sqlite:///sub/runs.db", "sqlite:///{root}/sub/runs.db"),
        ("sqlite:////var/runs.db", "sqlite:////var/runs.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
    ],
)
def test_environment_overrides_and_relative_files_are_the_projects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri(Workspace(tmp_path)) == expected.format(root=tmp_path)


def test_a_server_chooses_its_own_artifact_root_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert artifact_root(workspace) is None
    monkeypatch.setenv("DARKROOM_ARTIFACT_ROOT", "s3://bucket/prefix")
    assert artifact_root(workspace) == "s3://bucket/prefix"


def test_a_damaged_database_is_a_failure_not_something_to_try_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.state.mkdir()
    (workspace.state / "mlflow.db").write_bytes(b"garbage" * 10_000)
    with pytest.raises(StageFailed, match=r"mlflow\.db is damaged .*put a backup in its place") as raised:
        connect(workspace)
    assert not isinstance(raised.value, RegistryUnavailable)
    assert "\n" not in str(raised.value)
