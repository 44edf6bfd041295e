"""The watch on a real Prefect server: one retraining for each change of the data, whatever happens to it."""

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from mypy_boto3_s3 import S3Client
from PIL import Image
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running

from flows import watch as watching
from flows.attempts import BUSY
from flows.data_digest import Look
from tests.pipeline.project import change, dvc, make_small
from tests.s3 import empty_bucket, server

pytestmark = pytest.mark.usefixtures("prefect_server", "warm")

REPOSITORY = Path(__file__).parents[2]


class Retraining:
    """A deployment without a worker: its runs stay Scheduled until the test says how they end."""

    def __init__(self, client: SyncPrefectClient) -> None:
        from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions

        self.client = client
        self.name = f"retrain/{uuid4()}"
        self.id = client.create_deployment(
            client.create_flow_from_name("retrain"),
            self.name.removeprefix("retrain/"),
            work_pool_name=_pool(client),
            parameters={"ref": "HEAD", "params": None},
            concurrency_limit=1,
            concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
            enforce_parameter_schema=False,
        )

    def runs(self) -> list[FlowRun]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

        mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[self.id]))
        return sorted(self.client.read_flow_runs(flow_run_filter=mine), key=lambda run: run.expected_start_time)

    def end(self, state: State[Any]) -> None:
        """End the only run that has not ended as a worker would, or only start it if the state says so."""
        (run,) = [run for run in self.runs() if not run.state.is_final()]
        for step in (Pending(), Running(), state) if state.is_final() else (Pending(), state):
            self.client.set_flow_run_state(run.id, step)


def _pool(client: SyncPrefectClient) -> str:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name="watched", type="process"))
    return "watched"


@pytest.fixture
def retraining(prefect_server: None) -> Iterator[Retraining]:
    with get_client(sync_client=True) as client:
        yield Retraining(client)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two classes in a project that a worker could run in."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    monkeypatch.setenv("DARKROOM_PROJECT", str(root))
    folder = root / "data" / "raw" / "images"
    put(folder / "cats" / "1.png", 40)
    put(folder / "dogs" / "1.png", 200)
    return folder


def put(path: Path, grey: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng((grey, seed)).integers(-30, 30, (8, 8))
    Image.fromarray((grey + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def look(images: Path, retraining: Retraining) -> Callable[..., State[str]]:
    """Look once at `images`; what is there counts as settled unless `settle_seconds` says otherwise."""

    def once(**options: Any) -> State[str]:
        options = {"source": "data/raw/images", "deployment": retraining.name, "settle_seconds": 0} | options
        return watching.watch.fn(**options)

    return once


def test_new_data_starts_one_retraining_and_the_same_again_none(
    look: Callable[..., State[str]], images: Path, retraining: Retraining
) -> None:
    assert look().name == "Started"
    (run,) = retraining.runs()
    assert run.state.name == "Scheduled"
    assert [tag for tag in run.tags if tag.startswith("data:")]
    assert look().name == "Running"
    retraining.end(Completed(name="Promoted", message="version 2 of digits serves"))
    told = look()
    assert (told.name, told.is_completed()) == ("Unchanged", True)
    assert "Promoted: version 2 of digits serves" in told.message

    put(images / "cats" / "1.png", 40)
    (images / "README.md").write_text("about")
    assert look().name == "Unchanged"
    assert len(retraining.runs()) == 1

    put(images / "cats" / "2.png", 60)
    assert look().name == "Started"
    assert len(retraining.runs()) == 2


def test_data_that_goes_back_to_what_it_was_before_is_a_change_too(
    look: Callable[..., State[str]], images: Path, retraining: Retraining
) -> None:
    look()
    retraining.end(Completed())
    look()
    put(images / "cats" / "2.png", 60)
    look()
    retraining.end(Completed())
    (images / "cats" / "2.png").unlink()
    assert look().name == "Started"
    assert len(retraining.runs()) == 3


def test_a_change_that_is_undone_before_it_settles_is_none(
    look: Callable[..., State[str]], images: Path, retraining: Retraining
) -> None:
    look()
    retraining.end(Completed())
    look()
    put(images / "cats" / "2.png", 60)
    assert look(settle_seconds=3600).name == "Settling"
    (images / "cats" / "2.png").unlink()
    assert look(settle_seconds=3600).name == "Unchanged"
    assert len(retraining.runs()) == 1


def test_looks_at_the_same_moment_start_one_retraining(look: Callable[..., State[str]], retraining: Retraining) -> None:
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(look().name)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 4
    assert set(names) <= {"Started", "Running"}
    assert len(retraining.runs()) == 1


def test_a_memory_that_another_look_makes_meanwhile_is_no_obstacle(
    look: Callable[..., State[str]], retraining: Retraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look().name == "Started"
    retraining.end(Completed())
    asked: list[str] = []
    read = SyncPrefectClient.read_variable_by_name

    def not_yet(client: SyncPrefectClient, name: str) -> Any:
        asked.append(name)
        return read(client, name) if len(asked) != 2 else None  # the first to remember; then whether there is one

    monkeypatch.setattr(SyncPrefectClient, "read_variable_by_name", not_yet)
    assert look().name == "Unchanged"
    assert len(asked) > 2
    assert watching.recall(asked[0]).verdict


def test_data_that_still_changes_waits_until_it_is_quiet(
    look: Callable[..., State[str]], retraining: Retraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = datetime(2031, 5, 1, 12, tzinfo=UTC)

    def at(seconds: float, digest: str, newest: float, objects: int = 5) -> str:
        times = (start + timedelta(seconds=newest), start + timedelta(seconds=seconds))
        found = Look("s3://b/p", digest, objects, 9, *times)
        monkeypatch.setattr(watching, "look_at", lambda *_: found)
        return look(settle_seconds=60).name

    assert at(0, "a" * 64, newest=-10) == "Settling"
    assert at(40, "b" * 64, newest=35) == "Settling"
    assert at(90, "b" * 64, newest=35) == "Settling"
    assert at(95, "b" * 64, newest=35) == "Started"
    assert len(retraining.runs()) == 1
    retraining.end(Completed())
    # It has been quiet for long when it is first seen; but a removal leaves no trace, so it takes a second look.
    assert at(900, "c" * 64, newest=800) == "Started"
    retraining.end(Completed())
    assert at(1000, "d" * 64, newest=800, objects=4) == "Settling"
    assert at(1060, "d" * 64, newest=800, objects=4) == "Started"


def test_each_change_is_one_event(
    look: Callable[..., State[str]], images: Path, retraining: Retraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(watching, "emit_event", lambda event, **details: events.append({"event": event} | details))
    look()
    look()
    retraining.end(Completed())
    look()
    put(images / "cats" / "2.png", 60)
    look()
    assert [event["event"] for event in events] == ["darkroom.data.changed"] * 2
    assert events[0]["resource"]["prefect.resource.id"] == "darkroom.data.data/raw/images"
    assert [event["payload"]["objects"] for event in events] == [2, 3]
    assert events[0]["id"] != events[1]["id"]


def test_a_run_that_fails_is_followed_by_another_until_it_is_given_up(
    look: Callable[..., State[str]], retraining: Retraining
) -> None:
    assert look(max_attempts=2).name == "Started"
    retraining.end(Crashed(message="the worker is gone"))
    again = look(max_attempts=2)
    assert again.name == "Started"
    assert "after 1 that failed" in again.message
    retraining.end(Failed(message="stage train failed"))
    given_up = look(max_attempts=2)
    assert (given_up.name, given_up.is_failed()) == ("GaveUp", True)
    assert "stage train failed" in given_up.message
    assert len(retraining.runs()) == 2
    told = look(max_attempts=2)
    assert (told.name, told.is_completed()) == ("Unchanged", True)
    assert "GaveUp" in told.message


def test_a_run_that_found_the_data_bad_is_not_repeated(
    look: Callable[..., State[str]], images: Path, retraining: Retraining
) -> None:
    look()
    retraining.end(Failed(name="BadInput", message="prepare: 3 images cannot be decoded"))
    told = look()
    assert (told.name, told.is_failed()) == ("BadInput", True)
    assert "3 images cannot be decoded" in told.message
    assert look().name == "Unchanged"
    put(images / "cats" / "2.png", 60)
    assert look().name == "Started"
    assert len(retraining.runs()) == 2


def test_an_interrupted_run_does_not_count_as_an_attempt(
    look: Callable[..., State[str]], retraining: Retraining
) -> None:
    for _ in range(3):
        assert look(max_attempts=1).name == "Started"
        retraining.end(Failed(name="Interrupted", message="train: saved at step 7"))
    assert len(retraining.runs()) == 3


def test_a_busy_deployment_is_tried_again_without_counting(
    look: Callable[..., State[str]], images: Path, retraining: Retraining
) -> None:
    other = retraining.client.create_flow_run_from_deployment(retraining.id, name="nightly")
    retraining.client.set_flow_run_state(other.id, Pending())
    waiting = look(max_attempts=1)
    assert waiting.name == "Running"
    assert "busy" in waiting.message
    assert len(retraining.runs()) == 1
    retraining.client.set_flow_run_state(other.id, Running())
    retraining.client.set_flow_run_state(other.id, Completed())
    assert look(max_attempts=1).name == "Started"
    # Another one is quicker, so the server cancels the run that was just started.
    third = retraining.client.create_flow_run_from_deployment(retraining.id, name="by hand")
    retraining.client.set_flow_run_state(third.id, Pending())
    mine = next(run for run in retraining.runs() if run.tags)
    answer = retraining.client.set_flow_run_state(mine.id, Pending())
    assert (answer.state.type.value, answer.state.message) == ("CANCELLED", BUSY)
    assert look(max_attempts=1).name == "Running"
    retraining.client.set_flow_run_state(third.id, Cancelled())
    assert look(max_attempts=1).name == "Started"
    assert sum(bool(run.tags) for run in retraining.runs()) == 2


def test_a_missing_deployment_or_source_says_what_to_do(
    look: Callable[..., State[str]], images: Path, retraining: Retraining
) -> None:
    for deployment in ("retrain/absent", "retrain"):
        told = look(deployment=deployment)
        assert told.name == "BadInput"
        assert "`python -m flows.deploy` makes those of prefect.yaml" in told.message
    assert "no such file or folder" in look(source="data/raw/absent").message
    digits = look(source=None)  # what the project names
    assert (digits.name, "nothing to watch" in digits.message) == ("BadInput", True)
    assert retraining.runs() == []


def test_the_report_says_what_was_seen_and_leads_to_the_run(
    look: Callable[..., State[str]], images: Path, retraining: Retraining
) -> None:
    from prefect.artifacts import Artifact

    report = look().result()
    (run,) = retraining.runs()
    assert "| objects | 2 |" in report
    assert "| source | data/raw/images |" in report
    assert f"[{run.name}](" in report
    assert str(run.id) in report
    stored = Artifact.get("watch")
    assert stored is not None
    assert stored.data == report


def test_objects_on_s3_start_one_retraining(
    look: Callable[..., State[str]], retraining: Retraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_object(client: S3Client, name: str, content: bytes) -> None:
        client.put_object(Bucket="watched", Key=f"set/{name}", Body=content)

    with server() as endpoint, empty_bucket(endpoint, "watched", monkeypatch) as client:
        put_object(client, "cats/1.png", b"one")
        assert look(source="s3://watched/set", settle_seconds=3600).name == "Settling"
        assert look(source="s3://watched/set").name == "Started"
        retraining.end(Completed())
        put_object(client, "cats/1.png", b"one")
        assert look(source="s3://watched/set").name == "Unchanged"
        put_object(client, "cats/2.png", b"two")
        assert look(source="s3://watched/set").name == "Started"
        assert "no bucket 'absent'" in look(source="s3://absent/set").message
    assert len(retraining.runs()) == 2


@pytest.fixture
def accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the real pipeline whose accepted data set are the six images in data/raw/images; its root."""
    from darkroom.data.statistics import read_statistics
    from darkroom.data.validation.drift import ACCEPTED_FILE, write_accepted
    from darkroom.workspace import Workspace

    root = make_small(tmp_path / "real")
    for i in range(3):
        put(root / "data" / "raw" / "images" / "cats" / f"{i}.png", 40, i)
        put(root / "data" / "raw" / "images" / "dogs" / f"{i}.png", 200, i)
    change(root, "data", source="data/raw/images", num_classes=2)
    dvc(root, "repro", "prepare")
    workspace = Workspace(root)
    path = workspace.expectations.with_name(ACCEPTED_FILE)
    write_accepted(path, read_statistics(workspace.prepared), "test", "2031-05-01T12:00:00+00:00", "the first")
    for command in (["add", "-A"], ["commit", "-qm", "accepted"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setenv("DARKROOM_PROJECT", str(root))
    return root


@pytest.mark.slow
def test_data_that_is_much_as_it_was_is_skipped(accepted: Path, retraining: Retraining) -> None:
    images = accepted / "data" / "raw" / "images"

    def once() -> State[str]:
        return watching.watch(deployment=retraining.name, settle_seconds=0, min_drift=0.1, return_state=True)

    put(images / "cats" / "3.png", 40, 3)
    put(images / "dogs" / "3.png", 200, 3)
    skipped = once()
    assert skipped.name == "Skipped"
    assert "class drift 0, channel drift 0.0" in skipped.message  # there is some: the data was prepared again
    assert "below min_drift = 0.1" in skipped.message
    assert (once().name, retraining.runs()) == ("Unchanged", [])

    for i in range(4, 12):
        put(images / "cats" / f"{i}.png", 40, i)
    assert once().name == "Started"
    assert once().name == "Running"
    retraining.end(Completed())

    (images / "birds").mkdir()  # a third class, which the parameters do not know
    put(images / "birds" / "1.png", 120)
    bad = once()
    assert (bad.name, bad.is_failed()) == ("BadInput", True)
    assert "data.num_classes = 2" in bad.message
    assert "has 3 classes" in bad.message
    assert once().name == "Unchanged"
    assert len(retraining.runs()) == 1


@pytest.mark.slow
def test_without_an_accepted_data_set_new_data_is_trained_on(accepted: Path, retraining: Retraining) -> None:
    (accepted / "expectations" / "accepted.json").unlink()
    subprocess.run(["git", "commit", "-qam", "none"], cwd=accepted, check=True)
    state = watching.watch(deployment=retraining.name, settle_seconds=0, min_drift=0.1, return_state=True)
    assert state.name == "Started"


def test_the_same_failure_is_told_once_in_a_row(
    images: Path, retraining: Retraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(watching, "ended_badly", lambda flow, run, state: told.append(state.message))

    def run(source: str) -> State[str]:
        return watching.watch(source=source, deployment=retraining.name, settle_seconds=0, return_state=True)

    assert run("data/raw/absent").name == "BadInput"
    assert run("data/raw/absent").name == "BadInput"
    assert run("data/raw/nowhere").name == "BadInput"
    assert run("data/raw/images").name == "Started"
    assert run("data/raw/nowhere").name == "BadInput"
    assert ["absent" in told[0], *("nowhere" in message for message in told[1:])] == [True] * 3
