"""Scoring a registered version by the flow, on a real Prefect server and with the real pipeline, small."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.project import change, make_reproduced, metrics

pytestmark = [pytest.mark.usefixtures("prefect_server", "warm"), pytest.mark.slow]


@pytest.fixture(scope="module")
def registered(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose model is version 1; afterwards its protocol at HEAD has become another one."""
    from darkroom.registry.promotion import register
    from darkroom.workspace import Workspace

    root = make_reproduced(tmp_path_factory.mktemp("evaluate") / "project")
    register(Workspace(root))
    change(root, "sample", steps=3)
    commit(root, "another protocol")
    return root


def commit(root: Path, message: str) -> None:
    for command in (["add", "-A"], ["commit", "-qm", message]):
        subprocess.run(["git", *command], cwd=root, check=True)


@pytest.fixture
def project(registered: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DARKROOM_PROJECT", str(registered))
    return registered


def run(*arguments: Any, **options: Any) -> Any:
    from flows.evaluate import evaluate

    return evaluate(*arguments, return_state=True, **options)


def test_a_version_is_scored_under_the_protocol_of_a_ref_once(project: Path) -> None:
    first = run("models:/digits/1")
    assert (first.name, first.is_completed()) == ("Scored", True)
    assert "unguided" in first.result()
    again = run("models:/digits@challenger")
    assert (again.name, again.result()) == ("Known", first.result())

    # What `dvc repro` measured where it was trained is the same protocol, although nothing has measured there since.
    before = run("models:/digits/1", "HEAD~1")
    assert before.name == "Known"
    measured = metrics(project)
    assert measured["protocol_digest"][:12] in before.message
    assert f"{measured['unguided']['fid']['value']:.4f}".rstrip("0") in before.result()
    assert not list((project / ".darkroom" / "workspaces").glob("*"))


def test_overrides_of_parameters_make_another_protocol(project: Path) -> None:
    assert run("models:/digits/1", params={"sample.steps": 2}).name == "Scored"


def test_what_is_not_there_is_refused_before_anything_is_computed(project: Path) -> None:
    for arguments, message in (
        (["models:/digits/7"], "models:/digits/7"),
        (["models:/cats/1"], "no model is registered as 'cats'"),
        (["digits"], "digits"),
        (["models:/digits/1", "no-such-branch"], "git ref 'no-such-branch' is no branch"),
    ):
        state = run(*arguments)
        assert state.name == "BadInput"
        assert message in state.message
        assert "\n" not in state.message


def test_a_server_that_is_down_is_asked_again_and_then_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import evaluate

    monkeypatch.setattr(evaluate, "find", evaluate.find.with_options(retries=1, retry_delay_seconds=0))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    state = run("models:/digits/1")
    assert state.name == "Unavailable"
    assert "MLflow at http://127.0.0.1:9 does not answer" in state.message
