"""What happens to unattended runs: schedules, new data, refusals, cancellations, kills, servers that are down.

`pytest -m "stack and not soak"` runs what every change runs: a schedule whose model serves, and what is refused before
anything runs. `make soak` adds cancelled runs, killed workers, vanishing machines, minutes without MLflow or Prefect's
server, and ten runs in a row with kills at random. The run ends with the time that each took.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Pending

from tests.stack.running import Stack

pytestmark = pytest.mark.timeout(900)

RETRAIN, WATCH = "retrain/retrain", "watch/watch"
LONG = 4000  # training steps: enough to be met in the middle of them
SAVED = {"promoted": "Promoted", "refused": "Kept"}

_lines: list[str] = []


@pytest.fixture(autouse=True)
def timed(request: pytest.FixtureRequest, report: Callable[[str, list[str]], None], stack: Stack) -> Iterator[None]:
    """The table at the end; and every test leaves nothing running and no slot taken."""
    began = time.monotonic()
    yield
    name = request.node.name.removeprefix("test_").replace("_", " ")
    _lines.append(f"{time.monotonic() - began:6.1f} s  {name}")
    report("faults", _lines)
    stack.until(lambda: not stack.running("darkroom."), 60, "every process of a run to be gone")
    stack.until(lambda: not stack.taken_slots(), 120, "every slot to be free")


def retrain(stack: Stack, **params: Any) -> FlowRun:
    return stack.run(RETRAIN, ref="HEAD", params=params)


def aliases(stack: Stack) -> dict[str, str]:
    return dict(stack.mlflow().get_registered_model("digits").aliases)


def weights(stack: Stack, version: str) -> str:
    return str(stack.mlflow().get_model_version("digits", version).tags["darkroom.weights"])


def checkpoints(stack: Stack) -> set[Path]:
    return {path for path in (stack.root / ".darkroom" / "checkpoints").glob("*/*.safetensors") if path.stat().st_size}


def in_training(stack: Stack, run: FlowRun) -> None:
    """Wait until the run's training has saved something."""
    before = checkpoints(stack)
    stack.wait(run, "Running")
    trains = lambda: bool(stack.running("darkroom.stages.train")) and bool(checkpoints(stack) - before)  # noqa: E731
    stack.until(trains, 180, "a checkpoint of the training", lambda: "\n".join(stack.logs(run)))


def resumed(stack: Stack, run: FlowRun) -> bool:
    return any("resuming at step" in line for line in stack.logs(run))


def told(stack: Stack, event: str, run: FlowRun) -> bool:
    return any(isinstance(n, dict) and n["event"] == event and str(run.id) in str(n) for n in stack.webhooks.received)


def under_way(stack: Stack, deployment: str) -> list[FlowRun]:
    """Runs with the deployment's slot: of several that a slow worker takes at once, the server cancels all but one."""
    return [run for run in stack.runs(deployment) if run.state and run.state.type.value in ("PENDING", "RUNNING")]


@contextmanager
def often(stack: Stack, deployment: str) -> Iterator[None]:
    stack.schedule(deployment, "* * * * * */10")  # the sixth field: seconds
    try:
        yield
    finally:
        stack.schedule(deployment, "")


def test_a_cron_schedule_fires_and_its_model_serves(stack: Stack) -> None:
    with often(stack, RETRAIN):
        stack.until(lambda: bool(under_way(stack, RETRAIN)), 120, "the schedule to fire", lambda: stack.output)
        run = under_way(stack, RETRAIN)[0]
    state = stack.wait(run, timeout=600)
    assert state.name == "Promoted", "\n".join(stack.logs(run))
    assert run.auto_scheduled
    stages = ("prepare", "validate", "reference", "train", "sample", "evaluate")
    states = stack.task_states(run)
    assert {states[name] for name in stages} == {"Ran"}
    assert (states["register"], states["promote"]) == ("Registered", "Promoted")
    artifacts = stack.artifacts(run)
    assert {"retrain", "stages", "mlflow-run"} <= set(artifacts)
    assert f"{stack.mlflow_url}/#/experiments/" in str(artifacts["mlflow-run"].data)
    assert aliases(stack)["champion"] == "1"
    assert told(stack, "promoted", run)
    branches = subprocess.run(
        ["git", "branch", "--list", "retrain/*"], cwd=stack.root, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(branches) == 1
    assert list((stack.root / ".darkroom" / "workspaces").iterdir()) == []


@pytest.mark.soak  # without a worker: tests/integration/test_retrain.py
def test_a_run_with_nothing_to_do_finds_everything_in_the_cache(stack: Stack) -> None:
    stack.wait(retrain(stack), timeout=600)  # in a session without the schedule's it is the first
    run = retrain(stack)
    assert stack.wait(run).name == "Unchanged"
    states = stack.task_states(run)
    assert "Ran" not in states.values()
    ended = stack.runs(RETRAIN)[-1]
    _lines.append(
        f"{ended.total_run_time.total_seconds():6.1f} s    of which the run itself, from its start to its end"
    )


@pytest.mark.soak  # without a worker: tests/integration/test_reproduce.py
def test_of_two_runs_one_is_refused_and_one_that_is_cancelled_leaves_no_process_and_is_resumed(stack: Stack) -> None:
    before = aliases(stack)
    run = retrain(stack, **{"train.steps": LONG, "train.seed": 1})
    in_training(stack, run)
    state = stack.wait(retrain(stack), timeout=60)
    assert state.type.value == "CANCELLED"
    assert "concurrency limit" in (state.message or "")

    stack.cancel(run)
    state = stack.wait(run, timeout=60)
    assert state.type.value == "CANCELLED"
    stack.until(lambda: not stack.running("darkroom."), 10, "every process of the run to be gone")
    assert aliases(stack) == before

    again = retrain(stack, **{"train.steps": LONG, "train.seed": 1})
    stack.until(lambda: resumed(stack, again), 120, "training to resume", lambda: "\n".join(stack.logs(again)))
    stack.cancel(again)
    stack.wait(again, timeout=60)


@pytest.mark.soak
def test_a_worker_that_is_killed_takes_its_run_with_it_and_the_next_resumes(stack: Stack) -> None:
    run = retrain(stack, **{"train.steps": LONG, "train.seed": 2})
    in_training(stack, run)
    stack.kill("worker")
    state = ended_within(stack, run, 60)  # it saves for at most 25 s, and says how it ended
    assert state.type.value in ("CRASHED", "FAILED")
    stack.until(lambda: not stack.running("darkroom.stages"), 60, "every process of the run to be gone")
    stack.until(stack.is_well, 90, "the worker to be back")
    again = retrain(stack, **{"train.steps": LONG, "train.seed": 2})
    stack.until(lambda: resumed(stack, again), 180, "training to resume", lambda: "\n".join(stack.logs(again)))
    stack.cancel(again)
    stack.wait(again, timeout=60)


@pytest.mark.soak  # without a worker: tests/integration/test_retrain.py
def test_a_refused_model_leaves_the_champion_and_is_told(stack: Stack) -> None:
    champion = aliases(stack)["champion"]
    run = retrain(stack, **{"train.seed": 3, "registry.gate.max_fid": 1e-6})
    state = stack.wait(run)
    assert (state.name, state.type.value) == ("Kept", "COMPLETED")
    assert aliases(stack)["champion"] == champion
    assert told(stack, "refused", run)
    assert "max_fid" in str(stack.artifacts(run)["retrain"].data)


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [90])  # longer than the retries of MLflow's own client
def test_mlflow_may_be_down_in_training_and_in_registration(stack: Stack, seconds: int) -> None:
    run = retrain(stack, **{"train.seed": seconds, "train.steps": 400})
    stack.wait(run, "Running")
    stack.until(lambda: bool(stack.running("darkroom.stages.train")), 120, "the training to begin")
    stack.stop_service("mlflow")
    stack.until(lambda: stack.task_states(run).get("register") == "AwaitingRetry", 240, "registration to be retried")
    time.sleep(seconds)
    stack.start_service("mlflow")
    state = stack.wait(run, timeout=300)
    assert state.is_completed(), "\n".join(stack.logs(run))
    version = stack.mlflow().get_model_version("digits", aliases(stack)["champion"])
    assert version.run_id is not None
    history = stack.mlflow().get_metric_history(version.run_id, "loss")
    assert history[0].step <= 10
    assert history[-1].step == 400


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [0, 100])
def test_prefects_server_may_die_in_training_and_be_away_for_more_than_three_heartbeats(
    stack: Stack, seconds: int
) -> None:
    run = retrain(stack, **{"train.seed": 1000 + seconds, "train.steps": 400})
    in_training(stack, run)
    stack.kill("prefect")
    stack.until(lambda: not stack.is_well(), 30, "the server to be missed")
    if seconds:
        stack.stop_service("prefect")
        stack.until(lambda: not stack.running("darkroom.stages.train"), 180, "the training to end")
        time.sleep(seconds)
        stack.start_service("prefect")
    stack.until(stack.is_well, 120, "the server to be back")
    # For a moment it may take the run for dead, which is an end as well.
    done = lambda: stack.state(run).name in ("Promoted", "Kept")  # noqa: E731
    stack.until(done, 400, "the run to end", lambda: "\n".join([stack.state(run).name or "", *stack.logs(run)]))
    assert aliases(stack)["champion"] in str(stack.artifacts(run)["retrain"].data)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"ref": "HEAD", "params": {"train.lable_dropout": 0.1}}, 'did you mean "label_dropout"'),
        pytest.param(
            {"ref": "HEAD", "params": {"data.source": "s3://no-such-bucket/digits"}},
            "NotReady: s3://no-such-bucket",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(stack: Stack, params: dict[str, Any], words: str) -> None:
    run = stack.run(RETRAIN, **params)
    state = stack.wait(run)
    assert state.type.value == "FAILED"
    assert words in f"{state.name}: {state.message}"
    assert not {"prepare", "train"} & set(stack.task_states(run))
    assert told(stack, "bad_input" if state.name == "BadInput" else "failed", run)


@pytest.mark.soak
def test_a_machine_that_vanishes_is_noticed_and_the_next_run_resumes(stack: Stack) -> None:
    run = retrain(stack, **{"train.steps": LONG, "train.seed": 4})
    in_training(stack, run)
    vanish(stack)
    state = ended_within(stack, run, 120)  # three beats of 30 s, and the server's own pauses
    assert state.type.value == "CRASHED"
    stack.until(lambda: any("crashed" in str(notice) for notice in stack.webhooks.received), 30, "the webhook")
    stack.until(lambda: stack.is_well() and not stack.taken_slots(), 180, "worker and slots")
    again = retrain(stack, **{"train.steps": LONG, "train.seed": 4})
    stack.until(lambda: resumed(stack, again), 180, "training to resume", lambda: "\n".join(stack.logs(again)))
    stack.cancel(again)
    stack.wait(again, timeout=60)


@pytest.mark.soak
def test_a_run_that_is_cancelled_after_its_machine_has_vanished_ends(stack: Stack) -> None:
    run = retrain(stack, **{"train.steps": LONG, "train.seed": 5})
    in_training(stack, run)
    vanish(stack)
    stack.cancel(run)
    assert ended_within(stack, run, 120).type.value == "CANCELLED"
    stack.until(stack.is_well, 120, "the worker to be back")


@pytest.mark.soak
def test_a_run_whose_worker_died_before_starting_it_ends(stack: Stack) -> None:
    stack.stop_service("worker")
    run = retrain(stack)
    with stack.prefect() as client:  # as a worker does that takes it
        client.set_flow_run_state(run.id, Pending())
    stack.start_service("worker")
    state = ended_within(stack, run, 220)  # three minutes, and the server's own pauses
    assert state.type.value == "CRASHED"
    assert "not started within 3 minutes" in (state.message or "")


def ended_within(stack: Stack, run: FlowRun, seconds: float) -> Any:
    """The run's state at its end, once its subflows and the slot of its deployment are right as well."""
    began = time.monotonic()
    stack.wait(run, timeout=seconds)
    runs = stack.with_subflows(run)
    free = lambda: all(stack.state(one).is_final() for one in runs) and not deployment_slots(stack)  # noqa: E731
    stack.until(free, began + seconds - time.monotonic(), "the run's subflows to end and its slot to be free")
    _lines.append(f"{time.monotonic() - began:6.1f} s    of which until the server knew, and the slot was free")
    return stack.state(run)


def deployment_slots(stack: Stack) -> dict[str, int]:
    """Without the GPU's, whose lease ends a minute later."""
    return {name: taken for name, taken in stack.taken_slots().items() if name != "gpu"}


def vanish(stack: Stack) -> None:
    """Kill, at once and for good, all that a worker's machine would take with it: nobody can say goodbye."""
    doomed = [p for p in stack.running() if "darkroom." in " ".join(p.cmdline()) or "dvc" in " ".join(p.cmdline())]
    doomed += stack.running("prefect")
    doomed = [p for p in doomed if "server" not in " ".join(p.cmdline())] + stack.running("flows.stack.worker")
    for process in doomed:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
