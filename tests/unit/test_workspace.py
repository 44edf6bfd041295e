import pytest

from darkroom.errors import InputError
from darkroom.workspace import Workspace


@pytest.fixture
def project(tmp_path):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").touch()
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("inside", [".", "a", "a/b"])
@pytest.mark.parametrize(("value", "expected"), [(None, ".darkroom"), ("", ".darkroom"), ("state", "state")])
def test_state_is_in_one_place_whatever_the_working_directory(project, monkeypatch, inside, value, expected):
    monkeypatch.chdir(project / inside)
    if value is None:
        monkeypatch.delenv("DARKROOM_STATE", raising=False)
    else:
        monkeypatch.setenv("DARKROOM_STATE", value)
    assert Workspace.find().state == project / expected


def test_an_absolute_state_directory_is_taken_as_it_is(project, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("DARKROOM_STATE", str(elsewhere))
    assert Workspace(project).state == elsewhere


def test_a_state_directory_that_is_made_is_private_and_one_that_exists_is_left_alone(project, monkeypatch):
    assert Workspace.find(project).state.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("DARKROOM_STATE", "new/state")
    assert Workspace.find(project).state.stat().st_mode & 0o777 == 0o700
    (project / "shared").mkdir(mode=0o755)
    monkeypatch.setenv("DARKROOM_STATE", "shared")
    assert Workspace.find(project).state.stat().st_mode & 0o777 == 0o755
    monkeypatch.setenv("DARKROOM_STATE", "dvc.yaml/state")
    assert not Workspace.find(project).state.exists()


def test_outside_a_project_the_directory_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: not inside a Darkroom project"):
        Workspace.find(tmp_path)
