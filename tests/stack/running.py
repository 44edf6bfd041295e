"""A stack of its own for tests: a small project, `python -m flows.stack` in it on free ports, and what tests ask it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import httpx
import psutil
from mypy_boto3_s3 import S3Client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, LogFilter, TaskRunFilter
from prefect.client.schemas.objects import Artifact, FlowRun, State
from prefect.client.schemas.schedules import CronSchedule

from flows.stack.database import find_postgres
from flows.stack.settings import StackSettings, read_env
from tests.pipeline.project import REPOSITORY, change, make_small
from tests.servers import free_port
from tests.stack.webhooks import Webhooks, receiver

if TYPE_CHECKING:
    from mlflow import MlflowClient

PORTS = ("POSTGRES_PORT", "MLFLOW_PORT", "PREFECT_PORT", "S3_PORT", "WORKER_PORT")
_MARK = "DARKROOM_TEST_STACK"  # every process of a stack has it in its environment, wherever it has got to
# Everything as often as it can be, so that tests wait for little else than what they test.
_QUICK = {
    "DARKROOM_CHECKPOINT_SECONDS": "0.2",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
}


_ACCURACIES = ("min_class_accuracy", "min_guided_class_accuracy", "min_worst_class_accuracy")


@dataclass
class Stack:
    """A stack in the project at `root`; start and stop it as often as needed."""

    root: Path
    environment: dict[str, str]
    webhooks: Webhooks
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def directory(self) -> Path:
        return self.root / ".darkroom" / "stack"

    @property
    def output(self) -> str:
        """What the supervisor has said."""
        return (self.root.parent / "stack.out").read_text()

    # Running it

    def start(self, timeout: float = 300) -> None:
        """Run it until all of it is well."""
        with (self.root.parent / "stack.out").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows.stack"],
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        pid = self.process.pid
        self.until(lambda: self._state()["supervisor"] == pid and self.is_well(), timeout, "the stack to be well")

    def stop(self, timeout: float = 120) -> int:
        """Ask it to stop; returns its exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(timeout)
        self.process = None
        return code

    def destroy(self) -> None:
        """End whatever is left."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        while left := self.processes():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, 1)
        # Root's PostgreSQL is outside of a directory that its user cannot enter.
        postgres = find_postgres(StackSettings(self.root, self.root / ".darkroom", self.environment))
        if postgres is not None:
            shutil.rmtree(postgres.directory, ignore_errors=True)

    def is_well(self) -> bool:
        return all(self.condition(name) in ("well", "done") for name in self._state()["services"])

    def condition(self, service: str) -> str:
        return str(self._state()["services"][service]["condition"])

    def processes(self) -> list[psutil.Process]:
        """All that live: every process that has the mark, and what is below it (PostgreSQL drops its environment)."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_MARK) == self.environment[_MARK] and process.status() != psutil.STATUS_ZOMBIE:
                    for one in (process, *process.children(recursive=True)):
                        found[one.pid] = one
        return list(found.values())

    def running(self, *words: str) -> list[psutil.Process]:
        """Processes of the stack whose command has all these words in it: `running("darkroom.stages.train")`."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if all(word in command for word in words):
                    found.append(process)
        return found

    # Breaking it

    def pid(self, service: str) -> int | None:
        """The process that the supervisor has started for a service."""
        pid: int | None = self._state()["services"][service]["pid"]
        return pid

    def kill(self, service: str) -> None:
        """kill -9; of the worker, Prefect's own process."""
        if service == "worker":
            for process in self.running("flows.stack.prefect_worker"):
                process.kill()
        else:
            pid = self.pid(service)
            assert pid is not None, f"{service} does not run"
            os.killpg(pid, signal.SIGKILL)

    def stop_service(self, service: str, timeout: float = 60) -> None:
        """Let the supervisor stop a service until `start_service`."""
        (self.directory / "stopped" / service).touch()
        self.until(lambda: self.condition(service) == "stopped", timeout, f"{service} to be stopped")

    def start_service(self, service: str, timeout: float = 120) -> None:
        (self.directory / "stopped" / service).unlink()
        self.until(lambda: self.condition(service) == "well", timeout, f"{service} to be well")

    # Prefect

    @property
    def client_environment(self) -> dict[str, str]:
        """What the stack tells a person's shell; no value here needs a shell's quotes."""
        return read_env(self.directory / "client.env")

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.environment['PREFECT_PORT']}/api"

    @contextmanager
    def prefect(self) -> Iterator[SyncPrefectClient]:
        with SyncPrefectClient(
            self.prefect_url, auth_string=self.client_environment["PREFECT_API_AUTH_STRING"]
        ) as client:
            yield client

    def run(self, deployment: str, **parameters: Any) -> FlowRun:
        """Ask for a run of `flow/deployment`."""
        with self.prefect() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters)

    def schedule(self, deployment: str, cron: str) -> None:
        """Give a deployment this schedule and no other."""
        with self.prefect() as client:
            found = client.read_deployment_by_name(deployment)
            for schedule in client.read_deployment_schedules(found.id):
                client.delete_deployment_schedule(found.id, schedule.id)
            if cron:
                client.create_deployment_schedules(found.id, [(CronSchedule(cron=cron), True)])

    def cancel(self, run: FlowRun) -> None:
        from prefect.states import Cancelling

        with self.prefect() as client:
            client.set_flow_run_state(run.id, Cancelling())

    def state(self, run: FlowRun) -> State[Any]:
        with self.prefect() as client:
            state = client.read_flow_run(run.id).state
        assert state is not None
        return state

    def wait(self, run: FlowRun, *names: str, timeout: float = 180) -> State[Any]:
        """The run's state once it has one of these names, or has ended if none is given."""

        def reached() -> bool:
            state = self.state(run)
            return state.name in names if names else state.is_final()

        wanted = " or ".join(names) or "its end"
        self.until(
            reached,
            timeout,
            f"run {run.name} to reach {wanted}",
            lambda: "\n".join([repr(self.state(run)), *self.logs(run)[-40:]]),
        )
        return self.state(run)

    def runs(self, deployment: str) -> list[FlowRun]:
        """Every run of a deployment that is more than planned, the oldest first."""
        with self.prefect() as client:
            found = client.read_deployment_by_name(deployment)
            runs = client.read_flow_runs(
                flow_run_filter=FlowRunFilter.model_validate({"deployment_id": {"any_": [found.id]}}), limit=200
            )
        begun = [run for run in runs if run.state is not None and run.state.name != "Scheduled"]
        return sorted(begun, key=lambda run: run.created or run.expected_start_time)

    def with_subflows(self, run: FlowRun) -> list[FlowRun]:
        """The run and all runs below it."""
        with self.prefect() as client:
            below = client.read_flow_runs(
                flow_run_filter=FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [run.id]}})
            )
        return [run, *(inner for one in below for inner in self.with_subflows(one))]

    def task_states(self, run: FlowRun) -> dict[str, str]:
        """The state of each task of a run, those of its subflows included, in the order in which they began."""
        ids = [one.id for one in self.with_subflows(run)]
        with self.prefect() as client:
            tasks = client.read_task_runs(
                flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": ids}}),
                task_run_filter=TaskRunFilter.model_validate({"subflow_runs": {"exists_": False}}),
                limit=200,
            )
        tasks.sort(key=lambda task: (task.start_time is None, task.start_time or task.created))
        return {task.name: task.state.name or "" for task in tasks if task.state is not None}

    def logs(self, run: FlowRun) -> list[str]:
        """What a run has logged, its subflows included."""
        ids = [one.id for one in self.with_subflows(run)]
        lines: list[str] = []
        with self.prefect() as client:
            while True:
                log_filter = LogFilter.model_validate({"flow_run_id": {"any_": ids}})
                page = client.read_logs(log_filter, limit=200, offset=len(lines))
                lines += [entry.message for entry in page]
                if len(page) < 200:
                    return lines

    def artifacts(self, run: FlowRun) -> dict[str, Artifact]:
        """The run's artifacts by key, its subflows' included."""
        from prefect.client.schemas.filters import ArtifactFilter

        ids = [one.id for one in self.with_subflows(run)]
        with self.prefect() as client:
            found = client.read_artifacts(
                artifact_filter=ArtifactFilter.model_validate({"flow_run_id": {"any_": ids}}), limit=200
            )
        return {artifact.key or artifact.type or "": artifact for artifact in found}

    def taken_slots(self) -> dict[str, int]:
        """Slots taken now, of the GPU's limit and of every deployment."""
        with self.prefect() as client:
            limits = client.read_global_concurrency_limits(limit=100, offset=0)
        return {limit.name: limit.active_slots for limit in limits if limit.active_slots}

    # MLflow and S3

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.environment['MLFLOW_PORT']}"

    def mlflow(self) -> "MlflowClient":
        from mlflow import MlflowClient

        return MlflowClient(self.mlflow_url)

    @property
    def bucket(self) -> str:
        return self.environment["S3_BUCKET"]

    def s3(self) -> S3Client:
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.environment['S3_PORT']}",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    # Waiting

    def until(
        self, condition: Callable[[], bool], timeout: float, what: str, details: Callable[[], str] = lambda: ""
    ) -> None:
        """Wait for something; fail with what the stack said if it does not come."""
        deadline = time.monotonic() + timeout
        while True:
            with suppress(OSError, KeyError, json.JSONDecodeError, httpx.TransportError):
                if condition():
                    return
            ended = self.process is None or self.process.poll() is not None
            late = time.monotonic() > deadline
            stopped = ended or late
            assert not stopped, f"waited {timeout:g} s for {what}\n{details()}\nThe stack said:\n{self.output}"
            time.sleep(0.2)

    def _state(self) -> Any:
        return json.loads((self.directory / "running.json").read_text())


def make_project(root: Path) -> Path:
    """A small project with flows and deployments, committed; its gate lets every model pass."""
    make_small(root)
    change(root, "registry.gate", max_fid=1e6, max_near_copies=1.0, margin=1e6)
    change(root, "registry.gate", **dict.fromkeys(_ACCURACIES, 0.0))
    for name in ("flows", "prefect.yaml", "stack.env", "pyproject.toml"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    for command in (["git", "add", "-A"], ["git", "commit", "-qm", "flows"]):
        subprocess.run(command, cwd=root, check=True)
    return root


@contextmanager
def start_stack(root: Path, **environment: str) -> Iterator[Stack]:
    """A stack that runs and is well, in a new project at `root`; nothing of it is left afterwards."""
    make_project(root)
    with receiver() as webhooks:
        ports = {name: str(free_port()) for name in PORTS}
        ours = {_MARK: uuid.uuid4().hex, "S3_BUCKET": "incoming", "DARKROOM_WEBHOOK": webhooks.url}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        stack = Stack(root, inherited | _QUICK | ports | ours | environment, webhooks)
        try:
            stack.start()
            yield stack
        finally:
            stack.destroy()
