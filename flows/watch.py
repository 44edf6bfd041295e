"""Retraining when new data arrives, as a Prefect flow that a schedule runs every few minutes.

Each run looks once and ends. What it has to know of earlier looks is on the Prefect server, a variable for each source,
so it does not matter which host looks next, and two looks at once start one retraining.
"""

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, cast
from uuid import NAMESPACE_URL, uuid5

from prefect import Flow, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events import emit_event
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Completed, Failed
from prefect.utilities.urls import url_for
from prefect.variables import Variable

from darkroom.files import digest_json
from darkroom.workspace import Workspace
from flows.attempts import DECIDED, Attempts, attempts, find_deployment, is_busy, start
from flows.data_digest import Look, look_at
from flows.drift import Drift, measure_drift
from flows.failures import EXPECTED, failed
from flows.notify import ended_badly
from flows.processes import follow_parent
from flows.settings import Settings

EVENT = "darkroom.data.changed"


@dataclass(frozen=True)
class Memory:
    """What is known of a source from earlier looks."""

    digest: str = ""  # of the last look
    objects: int = 0
    since: str = ""  # when the data became what it is, ISO 8601
    change: int = 0  # number of the last event
    announced: str = ""  # its digest
    verdict: str = ""  # what was done for that, once nothing more is to be done


@dataclass(frozen=True)
class Verdict:
    """What a look came to. After a final one, later looks at the same data have nothing to do."""

    name: str
    message: str
    final: bool = False
    failed: bool = False
    run: FlowRun | None = None  # the latest one for this data


def told_once(flow: "Flow[..., Any]", flow_run: FlowRun, state: State[Any]) -> None:
    """A hook like `ended_badly`, for a flow that runs every few minutes: says the same only once in a row."""
    ended = FlowRunFilterState(type=FlowRunFilterStateType(any_=[*TERMINAL_STATES]))
    mine = FlowRunFilterDeploymentId(any_=[flow_run.deployment_id]) if flow_run.deployment_id else None
    with get_client(sync_client=True) as client:
        latest = client.read_flow_runs(
            flow_filter=FlowFilter(id=FlowFilterId(any_=[flow_run.flow_id])),
            flow_run_filter=FlowRunFilter(state=ended, deployment_id=mine),
            sort=FlowRunSort.START_TIME_DESC,
            limit=2,
        )
    before = next((run.state for run in latest if run.id != flow_run.id), None)
    if before is None or (before.name, before.message) != (state.name, state.message):
        ended_badly(flow, flow_run, state)


@flow(
    name="watch",
    flow_run_name="watch",
    persist_result=False,
    on_failure=[told_once],
    on_crashed=[told_once],
)
def watch(
    source: str | None = None,
    deployment: str = "retrain/retrain",
    parameters: dict[str, Any] | None = None,
    settle_seconds: float = 60,
    min_drift: float = 0.0,
    max_attempts: int = 3,
) -> "State[str]":
    """Start one run of `deployment` with `parameters` for each change of the data at `source`.

    `source` is s3://bucket/prefix, a folder or a file, by default `data.source` of the project. Data that changed less
    than `settle_seconds` ago waits for a later look. With `min_drift`, data whose class drift and channel drift from
    the accepted data set are both below it is skipped. A run that fails is followed by another, up to `max_attempts`.

    Ends as Started, Running, Settling, Skipped or Unchanged, or Failed as BadInput or GaveUp: for the same data those
    two once, and then Unchanged.
    """
    follow_parent()
    verdict: Verdict | None
    try:
        settings = Settings.from_environment()
        source = source or Workspace(settings.project).params().data.source
        with get_client(sync_client=True) as client:
            target = find_deployment(client, deployment)
            look = look_at(source, settings.project, settings.state / "watch")
            name = f"darkroom_watch_{digest_json([source, deployment])[:16]}"
            memory = recall(name)
            now = _seen(memory, look)
            if look.digest == memory.announced and memory.verdict:
                verdict = Verdict("Unchanged", memory.verdict)
            elif _age(look, now) < settle_seconds:
                verdict = Verdict("Settling", f"changed {_age(look, now):.0f} s ago: waiting for {settle_seconds:g} s")
            else:
                now, tag = _announce(look, now), f"data:{look.digest[:12]}"
                before = attempts(client, target, f"{name}-{now.change}-{look.digest[:16]}", tag)
                verdict = (
                    _judge(before, max_attempts)
                    or _skip(before, target, parameters or {}, min_drift, name)
                    or _start(client, target, before, parameters or {}, tag)
                )
    except EXPECTED as error:
        return failed(error)
    if verdict.final:
        now = replace(now, verdict=f"{verdict.name}: {verdict.message}"[:1000])
    if now != memory:
        _remember(name, {**asdict(now), "source": source})
    return _end(look, now, verdict)


def recall(name: str) -> Memory:
    """What earlier looks left in the variable `name`."""
    found = Variable.get(name, default=None)
    if not isinstance(found, dict):
        return Memory()
    return Memory(**{key: value for key, value in found.items() if key in Memory.__dataclass_fields__})


def _remember(name: str, value: dict[str, Any]) -> None:
    try:
        Variable.set(name, value, tags=["darkroom"], overwrite=True)
    except ObjectAlreadyExists:
        # Another look made it between Prefect's question whether it is there and its creation: now it is overwritten.
        Variable.set(name, value, tags=["darkroom"], overwrite=True)


def _seen(memory: Memory, look: Look) -> Memory:
    """The memory with this look in it."""
    if look.digest == memory.digest:
        return memory
    # What was removed has left no time of change behind: then this look is all that is known.
    since = look.at if look.objects < memory.objects else min(look.newest, look.at)
    return replace(memory, digest=look.digest, objects=look.objects, since=since.isoformat(timespec="seconds"))


def _age(look: Look, memory: Memory) -> float:
    return (look.at - datetime.fromisoformat(memory.since)).total_seconds()


def _announce(look: Look, memory: Memory) -> Memory:
    """Say once that there is new data; of two looks that do so at the same time, the server keeps one event."""
    if memory.announced == look.digest:
        return memory
    change = memory.change + 1
    emit_event(
        EVENT,
        resource={"prefect.resource.id": f"darkroom.data.{look.source}", "prefect.resource.name": look.source},
        payload={"digest": look.digest, "objects": look.objects, "bytes": look.bytes, "since": memory.since},
        id=uuid5(NAMESPACE_URL, f"{look.source}#{change}-{look.digest}"),
    )
    return replace(memory, change=change, announced=look.digest, verdict="")


def _judge(before: Attempts, max_attempts: int) -> Verdict | None:
    """What the runs for this data say; None if there has to be one, or one more."""
    run = before.last
    if run is None or run.state is None:
        return None
    name, message = run.state.name, run.state.message or "no message"
    if not run.state.is_final():
        return Verdict("Running", f"{run.name} is {name}", run=run)
    if run.state.is_completed():
        return Verdict("Unchanged", f"{run.name} ended as {name}: {message}", final=True, run=run)
    if name in DECIDED:
        return Verdict(name, f"{run.name}: {message}", final=True, failed=True, run=run)
    if before.failed >= max_attempts:
        said = f"{before.failed} runs failed, the last one, {run.name}, as {name}: {message}"
        return Verdict("GaveUp", f"{said}; start one by hand when that is mended", final=True, failed=True, run=run)
    return None


def _skip(
    before: Attempts, target: DeploymentResponse, parameters: dict[str, Any], min_drift: float, name: str
) -> Verdict | None:
    """Why there is no run now: the deployment is busy, or the data is bad or much as it was."""
    if is_busy(target):
        return Verdict("Running", f"{target.name} is busy with another run; this data is next", run=before.last)
    if min_drift <= 0 or before.runs:
        return None
    state = cast(
        "State[Drift]", drift(name, parameters.get("ref", "HEAD"), parameters.get("params"), return_state=True)
    )
    if state.name == "BadInput":
        return Verdict("BadInput", state.message or "", final=True, failed=True)
    found = state.result()
    if found.is_below(min_drift):
        return Verdict("Skipped", f"{found}: below min_drift = {min_drift:g}", final=True)
    return None


@task(cache_policy=NO_CACHE, task_run_name="drift", persist_result=False)
def drift(name: str, ref: str, params: dict[str, Any] | None) -> "State[Drift]":
    """Prepare the data as it is now and compare it with the accepted data set."""
    try:
        found = measure_drift(name, ref, params or {}, get_run_logger().info)
    except EXPECTED as error:
        return failed(error)
    return Completed(message=str(found), data=found)


def _start(
    client: SyncPrefectClient,
    target: DeploymentResponse,
    before: Attempts,
    parameters: dict[str, Any],
    tag: str,
) -> Verdict:
    run = start(client, target, before, parameters, [tag])
    again = f", after {before.failed} that failed" if before.failed else ""
    return Verdict("Started", f"{run.name}{again}", run=run)


def _end(look: Look, memory: Memory, verdict: Verdict) -> "State[str]":
    """The state of the flow, and the artifact that a person opens."""
    run = verdict.run
    link = url_for(run) if run else None
    rows = {
        "source": look.source,
        "digest": look.digest[:12],
        "objects": f"{look.objects:,}",
        "size": f"{look.bytes / 1e6:,.1f} MB",
        "as it is since": memory.since,
        "looked at": look.at.isoformat(timespec="seconds"),
        "run": f"[{verdict.run.name}]({link})"
        if verdict.run and link
        else (verdict.run.name if verdict.run else "none"),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    report = f"**{verdict.name}**: {verdict.message}\n\n| | |\n|---|---|\n{table}\n"
    create_markdown_artifact(key="watch", markdown=report, description="The data as it is, and what was done for it")
    if verdict.failed:
        return Failed(name=verdict.name, message=verdict.message)
    return Completed(name=verdict.name, message=verdict.message, data=report)
