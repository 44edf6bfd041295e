"""The flows on a real Prefect server: states, reports, and what a command line ends with."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("prefect_server")

Project = Callable[..., Path]

REPOSITORY = Path(__file__).parents[2]
BAD = """
open("runs", "a").write("x")
print("second: params.yaml: train.steps = 0: expected at least 1")
raise SystemExit(2)
"""


def stages() -> dict[str, tuple[str, dict[str, object]]]:
    return {
        "first": ("open('a', 'w').write('1')", {"deps": ["first.py"], "outs": ["a"]}),
        "second": ("open('b', 'w').write(open('a').read())", {"deps": ["a"], "outs": ["b"]}),
    }


def task_states(flow_run_name: str) -> dict[str, str]:
    """Names of the task runs of the latest flow run of that name, with their states' names."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name])),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )[0]
        of_it = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        return {run.name: run.state.name for run in client.read_task_runs(flow_run_filter=of_it) if run.state}


def artifact(key: str) -> Any:
    from prefect.artifacts import Artifact

    found = Artifact.get(key)
    assert found is not None
    return found.data


def test_a_second_reproduction_shows_every_stage_as_cached(dvc_project: Project) -> None:
    from flows.reproduce import reproduce

    root = dvc_project(**stages())
    first = reproduce(root, return_state=True)
    assert first.is_completed()
    assert [(outcome.stage, outcome.name) for outcome in first.result()] == [("first", "Ran"), ("second", "Ran")]
    assert task_states("reproduce") == {"first": "Ran", "second": "Ran"}

    second = reproduce(root, return_state=True)
    assert second.message == "2 cached"
    assert task_states("reproduce") == {"first": "Cached", "second": "Cached"}
    assert '"outcome": "Cached"' in artifact("stages")


def test_a_restored_stage_is_shown_as_restored(dvc_project: Project) -> None:
    from flows.reproduce import reproduce

    root = dvc_project(**stages())
    reproduce(root, return_state=True)
    source = (root / "first.py").read_text()
    (root / "first.py").write_text(source.replace("'1'", "'2'"))
    reproduce(root, return_state=True)
    (root / "first.py").write_text(source)
    reproduce(root, return_state=True)
    assert task_states("reproduce") == {"first": "Restored", "second": "Restored"}


def test_bad_input_ends_the_flow_at_that_stage_and_is_not_retried(dvc_project: Project) -> None:
    from flows.reproduce import reproduce

    project = stages()
    project["second"] = (BAD, {"deps": ["a"], "outs": ["b"]})
    project["third"] = ("open('c', 'w').write('1')", {"deps": ["b"], "outs": ["c"]})
    root = dvc_project(**project)
    state = reproduce(root, return_state=True)
    assert (state.name, state.type.value) == ("BadInput", "FAILED")
    assert state.message == "second: params.yaml: train.steps = 0: expected at least 1"
    assert (root / "runs").read_text() == "x"
    assert task_states("reproduce") == {"first": "Ran", "second": "BadInput"}


FIGURES = {"unguided.fid": 0.31, "floor.fid": 0.72, "unguided.class_accuracy": 0.97, "guided.class_accuracy": 0.999}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The registry's functions replaced by what the test wants them to return or raise."""
    from darkroom.registry import promotion
    from darkroom.registry.promotion import Promotion, Registered

    answers = SimpleNamespace(
        register=Registered("digits", "2", True, "run"),
        promote=Promotion(True, True, "2", "1", []),
        champion={"version": "2", "weights": "ab" * 32, "figures": FIGURES},
    )

    def answer(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(promotion, "register", lambda workspace: answer(answers.register))
    monkeypatch.setattr(promotion, "promote", lambda workspace, version: answer(answers.promote))
    monkeypatch.setattr(promotion, "status", lambda workspace: {"champion": answer(answers.champion)})
    return answers


@pytest.fixture
def retrain(dvc_project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    from flows.retrain import retrain

    root = dvc_project(**stages())
    (root / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    return lambda: retrain(root, return_state=True)


def test_a_promoted_challenger_is_reported_with_its_figures(registry: SimpleNamespace, retrain: Any) -> None:
    state = retrain()
    assert (state.name, state.type.value) == ("Promoted", "COMPLETED")
    assert "version 2, weights abababababab" in state.result()
    assert "FID 0.310 (floor, held-out real images: 0.720), class accuracy 0.9700" in state.result()
    assert artifact("retrain") == state.result()


def test_a_refused_challenger_leaves_the_champion_and_says_why(registry: SimpleNamespace, retrain: Any) -> None:
    from darkroom.registry.promotion import Promotion

    registry.promote = Promotion(False, False, "2", "1", ["unguided.fid is 1.2: expected at most 0.8 (max_fid)"])
    registry.champion = registry.champion | {"version": "1"}
    state = retrain()
    assert (state.name, state.type.value) == ("Kept", "COMPLETED")
    assert "version 1 stays" in state.result()
    assert "unguided.fid is 1.2: expected at most 0.8" in state.result()


def test_a_refusal_that_leaves_nothing_to_serve_is_a_failure(registry: SimpleNamespace, retrain: Any) -> None:
    from darkroom.registry.promotion import Promotion

    registry.promote = Promotion(False, False, "1", None, ["unguided.fid is 1.2: expected at most 0.8 (max_fid)"])
    registry.champion = None
    state = retrain()
    assert (state.name, state.type.value) == ("Refused", "FAILED")
    assert "unguided.fid is 1.2" in state.message


def test_an_unreachable_registry_is_one_line_after_the_pipeline_was_saved(
    registry: SimpleNamespace, retrain: Any
) -> None:
    from darkroom.registry.tracking import RegistryUnavailable

    registry.register = RegistryUnavailable("MLflow at http://127.0.0.1:9 does not answer: refused")
    state = retrain()
    assert state.name == "Unavailable"
    assert state.message.startswith("MLflow at http://127.0.0.1:9 does not answer: refused")
    registry.register = type("Registered", (), {"name": "digits", "version": "2", "created": False})()
    assert retrain().name == "Promoted"
    assert task_states("reproduce") == {"first": "Cached", "second": "Cached"}


@pytest.mark.parametrize("module", ["flows.reproduce", "flows.retrain"])
def test_bad_parameters_stop_the_command_before_any_server_starts(dvc_project: Project, module: str) -> None:
    root = dvc_project(**stages())
    text = (REPOSITORY / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("label_dropout:", "lable_dropout:"))
    (root / "below").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=root / "below",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert 'unknown key; did you mean "label_dropout"?' in done.stderr
    assert done.stdout == ""
