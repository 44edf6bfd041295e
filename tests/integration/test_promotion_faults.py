"""Registry or artifact store fail at any call: nothing is half-promoted, one line says so, the next try works."""

import contextlib
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from darkroom.cli import main
from darkroom.errors import StageFailed
from darkroom.files import write_bytes
from darkroom.registry.journal import decisions
from darkroom.registry.lock import registry
from darkroom.registry.promotion import disagreements, history, promote, register, rollback
from darkroom.registry.tracking import connect
from darkroom.workspace import Workspace
from tests.integration.registry_calls import ALL, CHANGING, Calls
from tests.integration.registry_project import empty_database, make_project, workspace
from tests.integration.registry_versions import (
    add_version,
    aliases,
    locks,
    open_entries,
    pretend_to_prove,
    tags,
)
from tests.s3 import empty_bucket, server

__all__ = ["empty_database", "workspace"]  # fixtures

COMMANDS: dict[str, Callable[[Workspace], Any]] = {
    "promote": promote,
    "rollback": lambda project: rollback(project, "sevens are mirrored"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> Workspace:
    """Version 3 waits, 2 serves, 1 served before."""
    made = make_project(tmp_path_factory.mktemp("faults"))
    write_bytes(made.state / "mlflow.db", empty_database)
    with pytest.MonkeyPatch.context() as patch:
        pretend_to_prove(patch)
        for _ in range(2):
            add_version(made)
            promote(made)
        add_version(made)
    return made


@pytest.fixture
def restore(project: Workspace, tmp_path: Path) -> Callable[[], None]:
    """Puts the database back to where it was when the test began."""
    saved, database = tmp_path / "saved.db", project.state / "mlflow.db"

    def copy(source: Path, target: Path) -> None:
        with contextlib.closing(sqlite3.connect(source)) as a, contextlib.closing(sqlite3.connect(target)) as b:
            a.backup(b)

    copy(database, saved)
    return lambda: copy(saved, database)


def refused() -> Exception:
    return ConnectionRefusedError(111, "Connection refused")


def internal() -> Exception:
    from mlflow.exceptions import MlflowException

    return MlflowException("API request to http://registry/api failed with error code 500\nTraceback ...")


def fail(patch: pytest.MonkeyPatch, mode: str, at: int) -> Calls:
    """`once`: the call fails; `down`: it and all after it; `lost`: the call works and its answer does not arrive."""

    def before(number: int) -> None:
        if mode == "once" and number == at:
            raise internal()
        if mode == "down" and number >= at:
            raise refused()

    def after(number: int) -> None:
        if mode == "lost" and number == at:
            raise refused()

    return Calls(patch, ALL, before, after)


def failure(run: Callable[[Workspace], Any], project: Workspace) -> str | None:
    """What the command says that could not be done."""
    try:
        run(project)
    except StageFailed as error:
        return str(error)
    return None


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("command", "mode", "prefixes"),
    [
        ("promote", "once", ALL),
        ("promote", "down", CHANGING),  # where a call that reads fails first, nothing differs from `once`
        ("promote", "lost", CHANGING),
        ("rollback", "down", CHANGING),
        ("rollback", "lost", CHANGING),
    ],
)
def test_a_registry_that_fails_at_any_call_leaves_nothing_half_done(
    command: str,
    mode: str,
    prefixes: tuple[str, ...],
    every: bool,
    project: Workspace,
    restore: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_to_prove(monkeypatch)
    run, was, client = COMMANDS[command], aliases(project), connect(project)
    with pytest.MonkeyPatch.context() as patch:
        calls = fail(patch, "never", 0).names
        run(project)
    becomes, marks = aliases(project), tags(project)
    assert becomes != was
    chosen = [number for number, name in enumerate(calls) if name.startswith(prefixes)]
    assert len(chosen) > 8
    if not every:  # those that move an alias, and some between
        moves = {number for number in chosen if calls[number] == "set_registered_model_alias"}
        chosen = sorted({*chosen[:: 2 + len(chosen) // 5], *moves, chosen[-1]})
    for number in chosen:
        restore()
        with pytest.MonkeyPatch.context() as patch:
            fail(patch, mode, number)
            error = failure(run, project)
        now = aliases(project)
        assert now.get("previous") != now["champion"]
        if error is None:  # what failed was the return of the lock
            assert now == becomes
            with registry(project):
                pass
        else:
            assert len(error.splitlines()) == 1
            assert "Connection refused" in error or "error code 500" in error
            assert now["champion"] in (was["champion"], becomes["champion"])
            assert mode == "down" or now == was, calls[number]
            run(project)
        assert aliases(project) == becomes, calls[number]
        assert tags(project) == marks
        assert (locks(project), open_entries(project)) == ([], 0)
        told = [(entry.outcome, entry.version_to) for entry in decisions(client, "digits")][2:]
        assert told[-1] == ({"promote": "promoted", "rollback": "rolled back"}[command], becomes["champion"])
        assert {outcome for outcome, _ in told[:-1]} <= {"failed", "interrupted"}
        assert disagreements(client, "digits") == []
    restore()


def says_one_line_and_fails(capsys: pytest.CaptureFixture[str], project: Workspace, words: str) -> None:
    capsys.readouterr()  # what MLflow said while the model was registered
    with pytest.raises(SystemExit) as done:
        main(["promote"])
    assert done.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert "the aliases are as before" in line
    assert aliases(project) == {"challenger": "1"}
    assert (locks(project), open_entries(project)) == ([], 0)


def test_artifacts_that_are_gone_in_the_proof_stop_a_promotion_until_they_are_back(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(workspace)
    monkeypatch.chdir(workspace.root)
    kept = workspace.state / "artifacts"
    kept.rename(workspace.state / "elsewhere")
    says_one_line_and_fails(capsys, workspace, "models:/digits/1 does not work when loaded")
    (workspace.state / "elsewhere").rename(kept)
    assert promote(workspace).promoted
    assert [entry.outcome for entry in history(workspace)] == ["failed", "promoted"]


def test_an_s3_endpoint_that_is_down_in_the_proof_stops_a_promotion_until_it_is_back(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as listener, server() as endpoint, empty_bucket(endpoint, "models", monkeypatch):
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DARKROOM_ARTIFACT_ROOT", "s3://models/darkroom")
        register(workspace)
        monkeypatch.chdir(workspace.root)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        says_one_line_and_fails(capsys, workspace, "Could not connect to the endpoint")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert promote(workspace).promoted
