"""kill -9 at any moment of a promotion and a rollback, and two at once: one state, one history, no lock left.

A kill after a call that changes something is the same as one before the next: nothing outside the database changes.
`make test` kills at the moments that differ in kind, `make soak` at every one.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from darkroom.files import read_json, write_bytes, write_json
from darkroom.registry.promotion import history, promote, register
from darkroom.workspace import Workspace
from tests.integration.registry_project import (
    REPOSITORY,
    empty_database,
    make_project,
    workspace,
)
from tests.integration.registry_versions import aliases, locks, open_entries, tags

__all__ = ["empty_database", "workspace"]  # fixtures

KILLED = -9
PARTS = 4  # side by side

EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)])

Ask = Callable[[list[dict[str, Any]]], list[Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> Iterator[Ask]:
    """`ask(parts)` has the driver run parts side by side; a part that was killed returns None, else what is in JSON."""
    directory = tmp_path_factory.mktemp("driver")
    warm = make_project(directory / "warm")
    write_bytes(warm.state / "mlflow.db", empty_database)
    command = [sys.executable, "-m", "tests.integration.promotion_driver", str(warm.root)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout

        def ask(parts: list[dict[str, Any]]) -> list[Any]:
            returned = []
            for start in range(0, len(parts), PARTS):
                batch = [
                    {"result": str(directory / f"{number}.json"), **part}
                    for number, part in enumerate(parts[start : start + PARTS])
                ]
                process.stdin.write(json.dumps(batch) + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                codes = json.loads(process.stdout.readline())  # type: ignore[union-attr]
                assert set(codes) <= {0, KILLED}
                returned += [
                    read_json(Path(part["result"])) if code == 0 else None
                    for part, code in zip(batch, codes, strict=True)
                ]
            return returned

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes, ask: Ask) -> Workspace:
    """Version 2 serves, 1 served before, 3 waits."""
    project = make_project(tmp_path_factory.mktemp("waiting"))
    write_bytes(project.state / "mlflow.db", empty_database)
    ask([{"root": str(project.root), "commands": ["add 0.5", "promote", "add 0.5", "promote", "add 0.5"]}])
    assert aliases(project) == {"champion": "2", "previous": "1", "challenger": "3"}
    return project


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, waiting: Workspace, ask: Ask) -> Workspace:
    """Version 3 serves, 2 served before."""
    project = copied(waiting, tmp_path_factory.mktemp("serving") / "project")
    ask([{"root": str(project.root), "commands": ["promote"]}])
    assert aliases(project) == {"champion": "3", "previous": "2"}
    return project


@pytest.fixture
def start(request: pytest.FixtureRequest, command: str) -> Workspace:
    return request.getfixturevalue({"promote": "waiting", "rollback": "serving"}[command])


def copied(project: Workspace, root: Path) -> Workspace:
    shutil.copytree(project.root, root)
    return Workspace(root)


def told(decisions: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(entry["outcome"], entry["version_from"], entry["version_to"]) for entry in decisions]


def after(result: Any) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """What the registry disagreed with before and after a second command, and the history."""
    before, _, decisions, left = result["returned"]
    return before, decisions, left


def moments(calls: list[str], every: bool) -> list[int]:
    """The calls to kill before: each, or the first, those that move an alias, the one after these, and the last."""
    moves = [number for number, name in enumerate(calls) if name == "set_registered_model_alias"]
    last = len(calls) - 1
    chosen = range(len(calls)) if every else {0, *moves, *(number + 1 for number in moves), last}
    return [number for number in sorted(chosen) if number <= last]


@EVERY
@pytest.mark.parametrize("command", ["promote", "rollback"])
def test_killed_before_any_change_the_next_command_leaves_it_as_if_nothing_had_happened(
    command: str, every: bool, start: Workspace, ask: Ask, tmp_path: Path
) -> None:
    undisturbed = copied(start, tmp_path / "undisturbed")
    (reference,) = ask([{"root": str(undisturbed.root), "commands": [command, "history"]}])
    expected = told(reference["returned"][1])
    was, becomes = aliases(start), aliases(undisturbed)
    assert len(reference["calls"]) > 8
    steps = moments(reference["calls"], every)

    projects = [copied(start, tmp_path / str(number)) for number in steps]
    killed = [
        {"root": str(project.root), "commands": [command], "kill": number}
        for number, project in zip(steps, projects, strict=True)
    ]
    assert ask(killed) == [None] * len(steps)
    found = [(aliases(project), open_entries(project)) for project in projects]
    for now, _ in found:
        assert now["champion"] in (was["champion"], becomes["champion"])
        assert now.get("previous") != now["champion"]
    assert {now["champion"] for now, _ in found} == {was["champion"], becomes["champion"]}

    # a rollback whose entry is closed was told to nobody, but it is done: repeating it would be a second one
    repeated = [
        "settle" if command == "rollback" and now == becomes and not unfinished else command
        for now, unfinished in found
    ]
    results = ask(
        [
            {"root": str(project.root), "commands": ["disagreements", again, "history", "disagreements"]}
            for project, again in zip(projects, repeated, strict=True)
        ]
    )
    for project, (now, unfinished), result in zip(projects, found, results, strict=True):
        said, decisions, left = after(result)
        assert aliases(project) == becomes
        assert (locks(project), open_entries(project), left) == ([], 0, [])
        assert tags(project) == tags(undisturbed)
        assert len([line for line in said if "is not finished" in line]) == unfinished
        if unfinished and now["champion"] == was["champion"]:
            assert told(decisions) == [*expected[:-1], ("interrupted", *expected[-1][1:]), expected[-1]]
        else:
            assert told(decisions) == expected
            assert ("completed after an interruption" in decisions[-1]["findings"]) == bool(unfinished)


@EVERY
@pytest.mark.parametrize(("command", "moved"), [("promote", False), ("rollback", True)])
def test_a_recovery_that_is_killed_itself_is_taken_up_by_the_next(
    command: str, every: bool, moved: bool, start: Workspace, ask: Ask, tmp_path: Path
) -> None:
    undisturbed = copied(start, tmp_path / "undisturbed")
    (reference,) = ask([{"root": str(undisturbed.root), "commands": [command]}])
    alias_moves = [i for i, name in enumerate(reference["calls"]) if name == "set_registered_model_alias"]
    died = copied(start, tmp_path / "died")
    ask([{"root": str(died.root), "commands": [command], "kill": alias_moves[0] + moved}])
    assert (aliases(died)["champion"] != aliases(start)["champion"]) == moved

    recovered = copied(died, tmp_path / "recovered")
    (recovery,) = ask([{"root": str(recovered.root), "commands": ["settle"]}])
    becomes = aliases(undisturbed if moved else start)
    assert aliases(recovered) == becomes
    steps = moments(recovery["calls"], every)
    projects = [copied(died, tmp_path / str(number)) for number in steps]
    second = [
        {"root": str(project.root), "commands": ["settle"], "kill": number}
        for number, project in zip(steps, projects, strict=True)
    ]
    assert ask(second) == [None] * len(projects)
    for project in projects:
        assert aliases(project)["champion"] in (aliases(start)["champion"], aliases(undisturbed)["champion"])
        assert aliases(project).get("previous") != aliases(project)["champion"]
    third = ask([{"root": str(project.root), "commands": ["settle", "history"]} for project in projects])
    for project, result in zip(projects, third, strict=True):
        assert aliases(project) == becomes
        assert (locks(project), open_entries(project)) == ([], 0)
        assert tags(project) == tags(recovered)
        outcome = {"promote": "promoted", "rollback": "rolled back"}[command] if moved else "interrupted"
        last = result["returned"][1][-1]
        assert (last["outcome"], len(last["findings"])) == (outcome, 1)


@EVERY
def test_two_promotions_at_once_from_two_projects_leave_one_result(
    every: bool, waiting: Workspace, ask: Ask, tmp_path: Path
) -> None:
    for number, delay in enumerate((0.0, 0.02, 0.05, 0.1, 0.2) if every else (0.0, 0.05)):
        project = copied(waiting, tmp_path / str(number))
        other = make_project(tmp_path / f"{number}-other")
        write_json(other.metrics_file, read_json(project.metrics_file))
        shared = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.state / 'mlflow.db'}"}
        part = {"environment": shared, "patch": {"POLL_SECONDS": 0.05}}
        first, second = ask(
            [
                {"root": str(project.root), "commands": ["promote 3"], **part},
                {"root": str(other.root), "commands": [f"sleep {delay}", "promote 1"], **part},
            ]
        )
        ((promoted,), (_, again)) = first["returned"], second["returned"]
        assert isinstance(promoted, dict), promoted
        assert isinstance(again, dict), again
        assert promoted["promoted"]
        assert again["promoted"]
        (result,) = ask([{"root": str(project.root), "commands": ["history", "disagreements"]}])
        decisions, left = result["returned"]
        made = told(decisions)[2:]
        assert sorted(to for _, _, to in made) == ["1", "3"]
        assert [came_from for _, came_from, _ in made] == ["2", made[0][2]]
        assert aliases(project) == {"champion": made[1][2], "previous": made[0][2]}
        assert (locks(project), open_entries(project), left) == ([], 0, [])


@pytest.mark.soak
def test_killed_in_the_proof_for_real(workspace: Workspace) -> None:
    register(workspace)
    with subprocess.Popen(
        [sys.executable, "-m", "darkroom", "promote"],
        cwd=workspace.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as command:
        process = psutil.Process(command.pid)
        while not (proofs := [child for child in process.children() if "smoke.py" in " ".join(child.cmdline())]):
            assert command.poll() is None, command.stdout and command.stdout.read()
            time.sleep(0.05)
        command.kill()
    proofs[0].wait(60)
    assert aliases(workspace) == {"challenger": "1"}
    assert open_entries(workspace) == 1
    assert locks(workspace) == ["digits.lock"]
    assert promote(workspace).promoted
    assert aliases(workspace) == {"champion": "1"}
    assert [entry.outcome for entry in history(workspace)] == ["interrupted", "promoted"]
    assert (locks(workspace), open_entries(workspace)) == ([], 0)
