"""The whole of a retraining, small: the real pipeline and registry, in workspaces of their own.

`make soak`: tests/stack does the same for every change, through a worker.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from darkroom.registry.promotion import history, status
from darkroom.registry.tracking import connect
from darkroom.workspace import Workspace
from tests.integration.retrain_project import git
from tests.pipeline.project import ENVIRONMENT, change, make_small

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.soak]

REPOSITORY = Path(__file__).parents[2]
OPEN_GATE = {
    "max_fid": 1e6,
    "min_class_accuracy": 0.0,
    "min_guided_class_accuracy": 0.0,
    "min_worst_class_accuracy": 0.0,
    "max_near_copies": 1.0,
    "margin": 1e6,
    "max_seconds_per_image": 1e3,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_small(tmp_path / "project")
    change(root, "registry.gate", **OPEN_GATE)
    git(root, "commit", "-qam", "a gate that lets all pass")
    monkeypatch.setenv("DARKROOM_PROJECT", str(root))
    monkeypatch.setenv("DARKROOM_KEEP_WORKSPACES", "1")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return root


def stages(text: str) -> dict[str, str]:
    """Stage -> outcome, of a report."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1] for row in rows if len(row) == 4 and row[1] in ("Ran", "Cached", "Restored")}


def left(project: Path) -> list[str]:
    return sorted(path.name for path in (project / ".darkroom" / "workspaces").iterdir())


def test_from_nothing_to_a_champion_again_and_with_other_parameters(project: Path, report: Any) -> None:
    from flows.retrain import retrain

    def run(params: dict[str, Any] | None = None) -> Any:
        began = time.monotonic()
        state = retrain("HEAD", params, return_state=True)
        assert state.is_completed(), state.message
        took.append(f"{state.name:<10} {time.monotonic() - began:6.1f} s")
        return state

    took: list[str] = []
    first = run()
    assert first.name == "Promoted"
    assert set(stages(first.result()).values()) == {"Ran"}
    serving = status(Workspace(project))["champion"]
    assert serving is not None
    assert serving["version"] == "1"

    (branch,) = git(project, "branch", "--list", "--format=%(refname:short)", "retrain/*").splitlines()
    git(project, "merge", "-q", branch)
    second = run()
    assert second.name == "Unchanged"
    assert set(stages(second.result()).values()) == {"Cached"}

    third = run({"train.steps": 50})
    assert third.name == "Promoted"
    outcomes = stages(third.result())
    assert (outcomes["prepare"], outcomes["train"]) == ("Cached", "Ran")
    assert [decision.version_to for decision in history(Workspace(project))] == ["1", "2"]
    report("retraining the small project on a running server", took)

    champion = status(Workspace(project))["champion"]
    assert champion is not None
    client = connect(Workspace(project))
    assert {"dvc.lock", "params.yaml"} <= {file.path for file in client.list_artifacts(champion["run_id"])}
    assert left(project) == []
    assert git(project, "status", "--porcelain") == ""


def start(project: Path, log: Path) -> "subprocess.Popen[bytes]":
    """A retraining in a process of its own, as a worker starts it; what it says goes to `log`."""
    from prefect.settings import PREFECT_API_URL

    source = "from flows.retrain import retrain; retrain('HEAD')"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": PREFECT_API_URL.value() or ""}
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, "-c", source], cwd=project, env=environment, stdout=file, stderr=file)


def test_a_killed_run_is_carried_on_by_the_next_in_another_workspace(project: Path, tmp_path: Path) -> None:
    change(project, "train", steps=400)
    git(project, "commit", "-qam", "longer")
    log, checkpoints = tmp_path / "killed.log", project / ".darkroom" / "checkpoints"
    killed = start(project, log)
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("*/step-*.json")):
        assert killed.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(left(project)) == 1

    log = tmp_path / "next.log"
    assert start(project, log).wait(200) == 0, log.read_text()
    (resumed,) = re.findall(r"resuming at step (\d+) of 400", log.read_text())
    assert int(resumed) > 0
    assert [decision.version_to for decision in history(Workspace(project))] == ["1"]
    assert len(left(project)) == 1  # of the killed one, for a look
