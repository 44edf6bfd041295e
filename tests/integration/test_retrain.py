"""The retrain flow on a real Prefect server, with real git and DVC, and a registry that answers as the test wants."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort

from tests.integration.retrain_project import (
    REFUSAL,
    STAGES,
    Answers,
    champion,
    git,
    make_ready,
    promotion,
    registered,
)
from tests.task_runs import settled_task_runs

pytestmark = pytest.mark.usefixtures("prefect_server", "warm")


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    monkeypatch.setenv("ANSWERS", str(tmp_path / "answers"))
    return Answers(tmp_path / "answers")


@pytest.fixture
def project(dvc_project: Callable[..., Path], answers: Answers, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_ready(dvc_project(**STAGES))
    monkeypatch.setenv("DARKROOM_PROJECT", str(root))
    return root


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the webhook was told."""
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("DARKROOM_WEBHOOK", f"http://127.0.0.1:{server.server_address[1]}/hook")
    yield told
    server.shutdown()
    server.server_close()


def retrain(*arguments: Any, **more: Any) -> State[Any]:
    from flows.retrain import retrain

    return retrain(*arguments, **more, return_state=True)


def latest() -> tuple[FlowRun, dict[str, str]]:
    """The latest retrain run, and the names of its tasks' states."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=10)
        run = next(run for run in runs if run.name.startswith("retrain-"))
        of_it = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        tasks = settled_task_runs(client, of_it)
        return run, {found.name.removesuffix("-0"): found.state.name for found in tasks if found.state}


def artifact(key: str) -> Any:
    from prefect.artifacts import Artifact

    found = Artifact.get(key)
    assert found is not None
    return found.data


def left(project: Path) -> list[str]:
    directory = project / ".darkroom" / "workspaces"
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


def test_a_promotion_from_a_ref_is_reported_told_and_recorded(
    project: Path, answers: Answers, webhook: list[dict[str, Any]]
) -> None:
    commit = git(project, "rev-parse", "HEAD")
    state = retrain("master", {"train.steps": 7})
    assert (state.name, state.type.value) == ("Promoted", "COMPLETED"), state.message
    run, tasks = latest()
    assert run.name.startswith("retrain-20")
    assert commit[:8] in run.name
    assert tasks == {
        "workspace": "Completed",
        "preflight": "Completed",
        "sync": "Completed",
        "restore": "Completed",
        "reproduce": "Completed",
        "register": "Registered",
        "promote": "Promoted",
        "record": "Recorded",
    }
    assert sorted(answers.calls) == [
        "params",
        "promote --version 2 --json",
        "register --json",
        "status --json",
    ]
    text = artifact("retrain")
    assert text == state.result()
    assert "Promoted: version 2 of digits passed the gate and serves now; before: version 1." in text
    assert "version 2, weights abababababab" in text
    assert "FID 0.310 (floor, held-out real images: 0.720), class accuracy 0.9700" in text
    assert "| unguided.fid            | 0.31   | at most 2.5 (max_fid)" in text
    assert "| unguided.fid            | 0.31 ± 0.02" in text

    branch = f"retrain/{run.name.removeprefix('retrain-')}"
    assert git(project, "show", f"{branch}:params.yaml").count("  steps: 7\n") == 1
    assert git(project, "diff", "--name-only", commit, branch).split() == ["dvc.lock", "params.yaml"]
    message = git(project, "log", "-1", "--format=%B%an", branch)
    assert "retrain: promoted: version 2 of digits" in message
    assert run.name in message

    (told,) = webhook
    assert (told["event"], told["version"], told["previous"]) == ("promoted", "2", "1")
    assert told["run"]["name"] == run.name
    assert told["run"]["id"] == str(run.id)
    assert told["figures"]["unguided.fid"] == 0.31
    assert "promoted version 2 of digits" in told["text"]
    assert left(project) == []
    assert git(project, "status", "--porcelain") == ""
    assert not (project / "a").exists()


def test_a_second_run_finds_all_of_it_done(project: Path, answers: Answers, webhook: list[dict[str, Any]]) -> None:
    retrain("master")
    first, _ = latest()
    git(project, "merge", "-q", f"retrain/{first.name.removeprefix('retrain-')}")
    answers.say("register", {"stdout": registered("2", created=False)})
    answers.say("status", {"stdout": {"champion": champion("2")}})
    state = retrain("master")
    assert state.name == "Unchanged"
    run, tasks = latest()
    assert run.name != first.name
    assert (tasks["register"], tasks["promote"], tasks["record"]) == ("Known", "Unchanged", "Unchanged")
    assert '"outcome": "Cached"' in artifact("stages")
    assert '"outcome": "Restored"' not in artifact("stages")
    assert [told["event"] for told in webhook] == ["promoted"]
    assert [call.split()[0] for call in answers.calls].count("promote") == 1
    assert f"retrain/{run.name.removeprefix('retrain-')}" not in git(project, "branch", "--list", "retrain/*")


def test_a_refusal_leaves_the_champion_and_is_told(
    project: Path, answers: Answers, webhook: list[dict[str, Any]]
) -> None:
    answers.say("promote", {"stdout": promotion(False, False, "2", "1", [REFUSAL]), "code": 1})
    state = retrain("HEAD")
    assert (state.name, state.type.value) == ("Kept", "COMPLETED")
    assert "version 1 stays" in state.result()
    assert REFUSAL in state.result()
    (row,) = (line for line in state.result().splitlines() if "(max_fid)" in line and line.startswith("|"))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "unguided.fid",
        "0.31",
        "at most 2.5 (max_fid)",
        "**no**",
    ]
    assert [(told["event"], told["reasons"]) for told in webhook] == [("refused", [REFUSAL])]
    assert left(project) == []


def test_a_refusal_that_leaves_nothing_to_serve_is_a_failure(
    project: Path, answers: Answers, webhook: list[dict[str, Any]]
) -> None:
    answers.say("promote", {"stdout": promotion(False, False, "2", None, [REFUSAL]), "code": 1})
    answers.say("status", {"stdout": {"champion": None}})
    state = retrain("HEAD")
    assert (state.name, state.type.value) == ("Refused", "FAILED")
    assert REFUSAL in state.message
    assert [told["event"] for told in webhook] == ["refused"]


def test_all_that_is_wrong_is_refused_at_once_before_anything_runs(
    project: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch, webhook: list[dict[str, Any]]
) -> None:
    monkeypatch.setenv("DARKROOM_GPU_LIMIT", "no-such-limit")
    monkeypatch.setattr("flows.preflight.MIN_FREE", 10**18)
    state = retrain("mian")
    assert (state.name, state.type.value) == ("BadInput", "FAILED")
    lines = state.message.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"git ref 'mian' is no branch, tag or commit of {project}",
        "DARKROOM_GPU_LIMIT = 'no-such-limit'",
        str(project / ".darkroom"),
        str(project / ".dvc" / "cache"),
    ]
    assert "`python -m flows.deploy` creates it" in state.message
    assert answers.calls == []
    _, tasks = latest()
    assert tasks == {"workspace": "BadInput", "preflight": "BadInput"}
    assert [(told["event"], told["reasons"]) for told in webhook] == [("bad_input", lines)]
    assert left(project) == []


def test_parameters_need_a_workspace(project: Path) -> None:
    state = retrain(params={"train.steps": 7})
    assert (state.name, "needs a ref" in state.message) == ("BadInput", True)


def test_a_setting_that_makes_no_sense_is_bad_input(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_KEEP_WORKSPACES", "many")
    state = retrain("HEAD")
    assert (state.name, state.message) == (
        "BadInput",
        "DARKROOM_KEEP_WORKSPACES = 'many': expected a whole number, at least 0",
    )


def test_a_webhook_that_is_none_is_refused_without_being_shown(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_WEBHOOK", "hooks.example.org/T0KEN")
    state = retrain("HEAD")
    assert state.name == "NotReady"
    assert state.message.startswith("DARKROOM_WEBHOOK: expected a URL")
    assert "T0KEN" not in state.message


def test_a_server_that_is_away_for_a_while_is_asked_again(
    project: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import release

    for task in (release.register, release.promote):
        monkeypatch.setattr(task, "retry_delay_seconds", [0.1])
    away = {"stderr": "darkroom: MLflow at http://127.0.0.1:9 does not answer: refused", "code": 69}
    answers.say("register", away, away, {"stdout": registered()})
    answers.say("promote", away, {"stdout": promotion(True, True, "2", "1", [])})
    assert retrain("HEAD").name == "Promoted"
    assert sorted(call.split()[0] for call in answers.calls) == ["promote"] * 2 + ["register"] * 3 + ["status"] * 3

    answers.say("register", away)
    state = retrain("HEAD")
    assert (state.name, state.type.value) == ("Unavailable", "FAILED")
    assert state.message.startswith("MLflow at http://127.0.0.1:9 does not answer: refused; nothing is lost")
    assert left(project) == [latest()[0].name]


def test_what_waiting_does_not_change_is_not_tried_again(
    project: Path, answers: Answers, webhook: list[dict[str, Any]]
) -> None:
    answers.say("register", {"stderr": "darkroom: models/ema.safetensors: no such file", "code": 2})
    state = retrain("HEAD")
    assert (state.name, state.message) == ("BadInput", "models/ema.safetensors: no such file")
    answers.say("register", {"stderr": "darkroom: it does not work", "code": 1})
    state = retrain("HEAD")
    assert (state.name, state.message) == ("Failed", "it does not work")
    assert [told["event"] for told in webhook] == ["bad_input", "failed"]
    assert len([call for call in answers.calls if call.startswith("register")]) == 2


def test_a_repository_that_takes_no_push_is_a_warning(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = project / ".git" / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'this repository is read-only' >&2\nexit 1\n")
    hook.chmod(0o755)
    assert retrain("HEAD").name == "Promoted"
    _, tasks = latest()
    assert tasks["record"] == "NotRecorded"


def test_outputs_go_to_the_remote_and_a_remote_that_is_full_is_a_warning(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import retrain as module
    from tests.pipeline.project import dvc

    dvc(project, "remote", "add", "-d", "storage", "../storage")
    git(project, "commit", "-qam", "remote")
    assert retrain("HEAD").name == "Promoted"
    assert latest()[1]["push"] == "Pushed"
    assert list((project.parent / "storage" / "runs").rglob("*"))

    monkeypatch.setattr(module.push, "retry_delay_seconds", [0.1])
    (project.parent / "storage").rename(project.parent / "moved")
    (project.parent / "storage").write_text("no directory")
    assert retrain("HEAD", {"train.steps": 8}).name == "Promoted"
    assert latest()[1]["push"] == "NotPushed"


def test_in_place_it_works_in_the_checkout_and_records_nothing(project: Path, answers: Answers) -> None:
    state = retrain(root=project)
    assert state.name == "Promoted"
    assert (project / "b").read_text() == "1"
    assert git(project, "branch", "--list", "retrain/*") == ""
    _, tasks = latest()
    assert set(tasks) == {"preflight", "reproduce", "register", "promote"}


def test_a_stage_that_fails_keeps_its_workspace_for_a_look(
    project: Path, answers: Answers, webhook: list[dict[str, Any]]
) -> None:
    pipeline = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(pipeline.replace("python second.py", "\"echo 'second: bad'; exit 2\""))
    git(project, "commit", "-qam", "broken")
    state = retrain("HEAD")
    assert (state.name, state.message) == ("BadInput", "second: bad")
    run, _ = latest()
    assert left(project) == [run.name]
    assert (project / ".darkroom" / "workspaces" / run.name / "a").read_text() == "1"
    assert answers.calls == []
    assert [told["event"] for told in webhook] == ["bad_input"]
