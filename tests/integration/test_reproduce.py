"""The reproduce flow on a real Prefect server: states, retries, artifacts, slots, and that nothing is left running."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from darkroom.workspace import Workspace
from tests.task_runs import settled_task_runs

pytestmark = pytest.mark.usefixtures("prefect_server", "warm")

Project = Callable[..., Path]

REPOSITORY = Path(__file__).parents[2]
BAD = """
open("runs", "a").write("x")
print("second: params.yaml: train.steps = 0: expected at least 1")
raise SystemExit(2)
"""
# Ends in the same way until the file `runs` says that it was started three times.
TRIES = """
import os, pathlib, sys
runs = pathlib.Path("runs")
runs.write_text((runs.read_text() if runs.exists() else "") + "x")
if len(runs.read_text()) < 3:
    {end}
pathlib.Path("a").write_text("1")
"""
# Saves when it is asked to stop, and carries on from there.
TRAINER = """
import os, pathlib, signal, sys, time
saved = pathlib.Path("saved")
print(f"resuming at {saved.read_text()}" if saved.exists() else "from the start", flush=True)
def stop(number, frame):
    time.sleep(0.5)
    saved.write_text("step 7")
    print("train: saved at step 7")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if not saved.exists():
    pathlib.Path("pid").write_text(str(os.getpid()))
    time.sleep(300)
pathlib.Path("model").write_text(saved.read_text())
"""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.dvc_stage import stage

    monkeypatch.setattr(stage, "retry_delay_seconds", [0.2, 0.2])


def stages() -> dict[str, tuple[str, dict[str, object]]]:
    return {
        "first": ("open('a', 'w').write('1')", {"deps": ["first.py"], "outs": ["a"]}),
        "second": ("open('b', 'w').write(open('a').read())", {"deps": ["a"], "outs": ["b"]}),
    }


def reproduce(root: Path, force: bool = False) -> Any:
    """The state in which the flow ends."""
    from flows.reproduce import reproduce

    return reproduce(root, force, return_state=True)


def task_runs() -> list[Any]:
    """The stages of the latest flow run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=["reproduce"])),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )[0]
        of_it = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        return settled_task_runs(client, of_it)


def task_states() -> dict[str, str]:
    return {run.name: run.state.name for run in task_runs()}


def state_names(task_run: Any, wanted: str) -> list[str]:
    """The states that a run was in; what it did reaches the server with a delay, so `wanted` is waited for."""
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + 20
    with get_client(sync_client=True) as client:
        while True:
            found = client.request("GET", "/task_run_states/", params={"task_run_id": str(task_run.id)}).json()
            names = [state["name"] for state in found]
            if wanted in names or time.monotonic() > deadline:
                return names
            time.sleep(0.5)


def artifact(key: str) -> Any:
    from prefect.artifacts import Artifact

    return Artifact.get(key)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_second_reproduction_shows_every_stage_as_cached(dvc_project: Project) -> None:
    root = dvc_project(**stages())
    first = reproduce(root)
    assert first.is_completed()
    assert [(outcome.stage, outcome.name) for outcome in first.result()] == [("first", "Ran"), ("second", "Ran")]
    assert task_states() == {"first": "Ran", "second": "Ran"}

    second = reproduce(root)
    assert second.message == "2 cached"
    assert task_states() == {"first": "Cached", "second": "Cached"}
    assert [run.state.message.partition(" s, ")[2] for run in task_runs()] == ["1 file, 1 B"] * 2
    rows = json.loads(artifact("stages").data)
    assert [(row["stage"], row["outcome"], row["files"], row["size"]) for row in rows] == [
        ("first", "Cached", 1, "1 B"),
        ("second", "Cached", 1, "1 B"),
    ]


def test_a_restored_stage_is_shown_as_restored(dvc_project: Project) -> None:
    root = dvc_project(**stages())
    reproduce(root)
    source = (root / "first.py").read_text()
    (root / "first.py").write_text(source.replace("'1'", "'2'"))
    reproduce(root)
    (root / "first.py").write_text(source)
    reproduce(root)
    assert task_states() == {"first": "Restored", "second": "Restored"}


def test_bad_input_ends_the_flow_at_that_stage_and_is_not_retried(dvc_project: Project) -> None:
    project = stages()
    project["second"] = (BAD, {"deps": ["a"], "outs": ["b"]})
    project["third"] = ("open('c', 'w').write('1')", {"deps": ["b"], "outs": ["c"]})
    root = dvc_project(**project)
    state = reproduce(root)
    assert (state.name, state.type.value) == ("BadInput", "FAILED")
    assert state.message == "second: params.yaml: train.steps = 0: expected at least 1"
    assert (root / "runs").read_text() == "x"
    assert task_states() == {"first": "Ran", "second": "BadInput"}
    assert [(row["stage"], row["outcome"]) for row in json.loads(artifact("stages").data)] == [
        ("first", "Ran"),
        ("second", "BadInput"),
    ]


@pytest.mark.parametrize(
    "end",
    [
        "sys.exit(1)",
        "print('first: saved at step 7'); sys.exit(75)",
        "os.kill(os.getppid(), 9)",
        pytest.param("os.kill(os.getpid(), 9)", marks=pytest.mark.soak),
    ],
    ids=["failed", "interrupted from elsewhere", "its parent killed", "killed"],
)
def test_a_stage_that_fails_is_tried_again_where_one_can_see_it(dvc_project: Project, end: str) -> None:
    root = dvc_project(first=(TRIES.format(end=end), {"deps": ["first.py"], "outs": ["a"]}))
    state = reproduce(root)
    assert state.is_completed(), state.message
    (run,) = task_runs()
    assert (root / "runs").read_text() == "xxx"
    assert run.state.name == "Ran"
    names = state_names(run, wanted="Ran")
    assert names.count("AwaitingRetry") == 2


def test_after_the_last_try_the_flow_fails_with_one_line_and_no_traceback(
    dvc_project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    source = "open('runs', 'a').write('x'); print('first: accuracy 0.5: expected 0.97'); raise SystemExit(1)"
    root = dvc_project(first=(source, {"deps": ["first.py"], "outs": ["a"]}))
    with caplog.at_level(logging.INFO):
        state = reproduce(root)
    assert (state.name, state.type.value) == ("Failed", "FAILED")
    assert state.message == "first: accuracy 0.5: expected 0.97"
    assert (root / "runs").read_text() == "xxx"
    assert not any("Traceback" in record.getMessage() or record.exc_info for record in caplog.records)


def test_what_a_stage_prints_reaches_the_log_at_its_level(
    dvc_project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    source = "print('WARNING: few images'); print('plain'); open('a', 'w').write('1')"
    root = dvc_project(first=(source, {"deps": ["first.py"], "outs": ["a"]}))
    with caplog.at_level(logging.INFO):
        reproduce(root)
    levels = {record.getMessage(): record.levelno for record in caplog.records}
    assert levels["WARNING: few images"] == logging.WARNING
    assert levels["plain"] == logging.INFO


def test_progress_is_an_artifact_that_ends_at_100(dvc_project: Project) -> None:
    source = """
import sys, time
for step in range(4):
    print(f"training: {step}/9 steps, 3 s left  loss 0.{step}", flush=True)
    time.sleep(0.5)
open("a", "w").write("1")
"""
    root = dvc_project(my_train=(source, {"deps": ["my_train.py"], "outs": ["a"]}))
    assert reproduce(root).is_completed()
    shown = artifact("my-train")
    assert shown.type == "progress"
    assert float(shown.data) == 100.0
    assert shown.description == "training: 3/9 steps, 3 s left, loss 0.3"
    (run,) = task_runs()
    assert shown.task_run_id == run.id


def test_an_api_that_refuses_artifacts_costs_nothing_but_these(
    dvc_project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flows import artifacts

    def refuse(*arguments: object, **named: object) -> None:
        raise RuntimeError("503 Service Unavailable")

    for name in ("create_progress_artifact", "create_table_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(artifacts, name, refuse)
    root = dvc_project(first=("print('w: 1/2 steps'); open('a', 'w').write('1')", {"outs": ["a"]}))
    assert reproduce(root).message == "1 ran"
    assert [record.getMessage() for record in caplog.records if "503" in record.getMessage()] == [
        "Progress cannot be shown: RuntimeError: 503 Service Unavailable",
        "An artifact is missing: RuntimeError: 503 Service Unavailable",
    ]


def test_the_sample_grid_is_a_picture_of_bounded_size(dvc_project: Project) -> None:
    import base64
    import io

    import numpy as np
    from PIL import Image

    from flows.artifacts import PICTURE_BYTES

    root = dvc_project(**stages())
    (root / "reports").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    Image.fromarray(noise).save(root / "reports" / "samples.png")
    reproduce(root)
    start = "![samples](data:image/png;base64,"
    shown = artifact("samples").data
    assert shown.startswith(start)
    picture = base64.b64decode(shown.removeprefix(start).removesuffix(")"))
    assert len(picture) <= PICTURE_BYTES
    with Image.open(io.BytesIO(picture)) as image:
        assert image.width * 3 == image.height * 4

    (root / "reports" / "samples.png").write_text("no picture")
    assert reproduce(root).is_completed()


def slots(name: str) -> int:
    """How many slots of a limit are taken."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        response = client.request("GET", f"/v2/concurrency_limits/{name}")
        return int(response.json()["active_slots"])


@pytest.fixture
def gpu_limit(monkeypatch: pytest.MonkeyPatch) -> str:
    """A limit of one slot, named in the environment."""
    from prefect.client.orchestration import get_client

    name = f"gpu-{uuid4().hex[:8]}"
    with get_client(sync_client=True) as client:
        client.request("POST", "/v2/concurrency_limits/", json={"name": name, "limit": 1})
    monkeypatch.setenv("DARKROOM_GPU_LIMIT", name)
    return name


def test_a_slot_is_held_while_stages_run_and_given_back(dvc_project: Project, gpu_limit: str) -> None:
    source = "import time; open('started', 'w').write('1'); time.sleep(2); open('a', 'w').write('1')"
    root = dvc_project(first=(source, {"deps": ["first.py"], "outs": ["a"]}))
    seen: list[int] = []

    def look() -> None:
        wait_for((root / "started").is_file)
        seen.append(slots(gpu_limit))

    thread = threading.Thread(target=look)
    thread.start()
    assert reproduce(root).is_completed()
    thread.join()
    assert seen == [1]
    assert slots(gpu_limit) == 0


def test_without_the_limit_that_is_named_nothing_runs(dvc_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_GPU_LIMIT", "no-such-gpu")
    root = dvc_project(**stages())
    state = reproduce(root)
    assert state.name == "BadInput"
    assert "DARKROOM_GPU_LIMIT = 'no-such-gpu'" in state.message
    assert not (root / "a").exists()


FLOW = "import pathlib, sys; from flows.reproduce import reproduce; reproduce(pathlib.Path(sys.argv[1]))"
# Starts its arguments as a worker would, and waits.
WORKER = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()"


def in_a_process(root: Path, *before: str, **environment: str) -> "subprocess.Popen[bytes]":
    """The flow in a process of its own, on the server of the tests."""
    from prefect.settings import PREFECT_API_URL

    command = [*before, sys.executable, "-c", FLOW, str(root)]
    known = {"PREFECT_API_URL": str(PREFECT_API_URL.value()), **environment}
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | known)


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("how", ["flow terminated", "flow killed", "worker killed"])
def test_whatever_ends_a_flow_its_trainer_saves_and_the_next_run_resumes(dvc_project: Project, how: str) -> None:
    root = dvc_project(train=(TRAINER, {"deps": ["train.py"], "outs": ["model"]}))
    if how == "worker killed":
        worker = in_a_process(root, sys.executable, "-c", WORKER, PREFECT__FLOW_RUN_ID=str(uuid4()))
    else:
        worker = in_a_process(root)
    with worker:
        wait_for((root / "pid").is_file)
        everyone = psutil.Process(worker.pid).children(recursive=True)
        worker.send_signal(signal.SIGTERM if how == "flow terminated" else signal.SIGKILL)
        worker.wait(60)
        wait_for(lambda: (root / "saved").exists())
        wait_for(lambda: not any(running(process.pid) for process in everyone))
    if how != "flow killed":  # that one could not say so
        wait_for(lambda: task_runs()[0].state.name == "Crashed")
    assert reproduce(root).message == "1 ran"
    assert (root / "model").read_text() == "step 7"


@pytest.mark.usefixtures("cold")  # DVC's locks name processes by id and command line
def test_two_runs_in_the_same_workspace_both_end_well_and_the_stage_ran_once(dvc_project: Project) -> None:
    source = "import time; open('runs', 'a').write('x'); time.sleep(3); open('a', 'w').write('1')"
    root = dvc_project(first=(source, {"deps": ["first.py"], "outs": ["a"]}))
    flows = [in_a_process(root) for _ in range(2)]
    assert [flow.wait(120) for flow in flows] == [0, 0]
    assert (root / "runs").read_text() == "x"


def test_the_flow_and_dvc_repro_write_the_same_lock(dvc_project: Project, tmp_path: Path) -> None:
    from flows.dvc_stage import dvc

    project = stages()
    project["zeta"] = ("open('z', 'w').write('9')", {"deps": ["a", "b"], "metrics": ["z"], "params": ["size"]})
    project["alpha"] = ("import os; os.mkdir('d'); open('d/x', 'w').write('1')", {"deps": ["a"], "outs": ["d"]})
    root = dvc_project(**dict(reversed(project.items())))
    (root / "params.yaml").write_text("size: 3\n")
    plain = tmp_path / "plain"
    shutil.copytree(root, plain)
    for size in (3, 4):
        for place in (root, plain):
            (place / "params.yaml").write_text(f"size: {size}\n")
        assert reproduce(root).is_completed()
        dvc(plain, "repro")
        assert (root / "dvc.lock").read_bytes() == (plain / "dvc.lock").read_bytes()


@pytest.mark.slow
@pytest.mark.soak  # with small stages: the test above
def test_the_pipeline_itself_gives_the_same_lock_wherever_it_runs(tmp_path: Path) -> None:
    from tests.pipeline.project import make_reproduced, make_small

    root, plain = make_small(tmp_path / "flow"), make_reproduced(tmp_path / "plain")
    assert reproduce(root).message == "6 ran"
    assert (root / "dvc.lock").read_bytes() == (plain / "dvc.lock").read_bytes()


def test_a_training_links_its_mlflow_run(dvc_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from darkroom.registry import tracking
    from tests.pipeline.project import make_small

    source = """
import os, pathlib, time
lock = pathlib.Path(".darkroom/checkpoints/f1/lock")
lock.parent.mkdir(parents=True)
lock.write_text(str(os.getpid()))
print("training: 1/2 steps", flush=True)
time.sleep(5)
open("a", "w").write("1")
"""
    root = dvc_project(train=(source, {"deps": ["train.py"], "outs": ["a"]}))
    shutil.copy(REPOSITORY / "params.yaml", root)
    client = tracking.connect(Workspace(make_small(tmp_path / "small")))
    experiment = client.create_experiment(Workspace(root).params().registry.name)
    client.create_run(experiment, tags={"darkroom.fingerprint": "another"})
    run = client.create_run(experiment, tags={"darkroom.fingerprint": "f1"})
    # As if that database were behind a server: starting one takes forty seconds of processor time.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow.example.org:5000")
    monkeypatch.setattr(tracking, "connect", lambda workspace: client)
    assert reproduce(root).is_completed()
    link = f"http://mlflow.example.org:5000/#/experiments/{experiment}/runs/{run.info.run_id}"
    assert artifact("mlflow-run").data == f"[MLflow run]({link})"
