"""Settings of flows come from the environment, and paths in them are absolute."""

from pathlib import Path

import pytest

from darkroom.errors import InputError
from flows.settings import Settings


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).touch()
    monkeypatch.chdir(root / ".dvc")
    return root


def test_without_settings_everything_is_in_the_project(project: Path) -> None:
    found = Settings.from_environment()
    assert (found.project, found.state, found.repository) == (project, project / ".darkroom", str(project))
    assert found.dvc_cache == project / ".dvc" / "cache"
    assert (found.gpu_limit, found.webhook, found.keep_workspaces, found.keep_checkpoints) == (None, None, 3, 3)


def test_the_repository_is_a_url_or_a_path_from_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.parent / "it.git").mkdir()
    for given, meant in {"../it.git": str(project.parent / "it.git"), "git@host:it.git": "git@host:it.git"}.items():
        monkeypatch.setenv("DARKROOM_REPOSITORY", given)
        assert Settings.from_environment().repository == meant


def test_the_cache_is_the_one_that_dvc_uses(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / ".dvc" / "config").write_text("[cache]\n    dir = ../../shared\n")
    assert Settings.from_environment().dvc_cache == project.parent / "shared"
    (project / ".dvc" / "config.local").write_text("[cache]\n    dir = /mnt/cache\n")
    assert Settings.from_environment().dvc_cache == Path("/mnt/cache")
    monkeypatch.setenv("DARKROOM_DVC_CACHE", "/mnt/other")
    assert Settings.from_environment().dvc_cache == Path("/mnt/other")


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "²"])
def test_a_number_that_makes_no_sense_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DARKROOM_KEEP_WORKSPACES", value)
    with pytest.raises(InputError, match=r"DARKROOM_KEEP_WORKSPACES = .*: expected a whole number"):
        Settings.from_environment()


def test_a_project_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_PROJECT", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="not inside a Darkroom project"):
        Settings.from_environment()
