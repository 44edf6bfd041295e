"""Score a registered version under the current protocol as a Prefect flow: `python -m flows.evaluate models:/NAME/4`.

The protocol is that of a git ref: its parameters, code, data and reference. What the version scores under it is kept
with the version, so it can be compared with others that were measured in the same way.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from darkroom.registry.lineage import SCORES
from darkroom.workspace import Workspace
from flows.command import run_flow
from flows.darkroom_command import answer
from flows.dvc_stage import Outcome, stage
from flows.failures import EXPECTED, failed, if_unavailable
from flows.limits import gpu_slot
from flows.notify import ended_badly
from flows.processes import follow_parent
from flows.release import DELAYS
from flows.settings import Settings
from flows.transfers import sync
from flows.workspaces import workspace

STAGES = ("prepare", "validate", "reference")  # all that a score needs beside the version


@flow(
    name="evaluate",
    flow_run_name="evaluate {uri}",
    persist_result=False,
    on_failure=[ended_badly],
    on_crashed=[ended_badly],
    on_cancellation=[ended_badly],
)
def evaluate(uri: str, ref: str = "HEAD", params: dict[str, Any] | None = None) -> "State[str]":
    """Score the version at `uri` (models:/NAME/VERSION or models:/NAME@ALIAS) under the protocol of `ref`.

    `params` replace parameters of `ref`, by dotted keys. Ends as Scored, or as Known if the version had that score,
    with a table as the result; Failed as BadInput, Unavailable, Interrupted or Failed.
    """
    follow_parent()
    logger = get_run_logger()
    try:
        settings = Settings.from_environment()
        cast("State[str]", find(settings.project, uri, return_state=True)).result()
        with workspace(f"evaluate-{flow_run.id}", ref, params, logger.info) as root:
            cast("State[Any]", sync(root, return_state=True)).result()
            with gpu_slot():
                for name in STAGES:
                    cast("State[Outcome]", stage(root, name, return_state=True)).result()
                scored = cast("State[dict[str, Any]]", score(root, uri, return_state=True)).result()
    except EXPECTED as error:
        return failed(error)
    record = scored["record"]
    rows, protocol = figures(record), record["protocol_digest"][:12]
    message = f"version {scored['version']} of {scored['name']} under protocol {protocol}"
    create_table_artifact(
        key="scores", table=rows, description=f"{message} of {ref}; the floor is what held-out real images get"
    )
    return Completed(name="Scored" if scored["created"] else "Known", message=message, data=text(message, rows))


@task(
    cache_policy=NO_CACHE,
    task_run_name="find",
    persist_result=False,
    retries=len(DELAYS),
    retry_delay_seconds=list(DELAYS),
    retry_condition_fn=if_unavailable,
)
def find(project: Path, uri: str) -> "State[str]":
    """Whether there is such a version, before anything is computed."""
    from darkroom.registry.tracking import connect, tracking_uri, unavailable_is_one_line
    from darkroom.registry.versions import find_by_uri

    workspace = Workspace(project)
    try:
        with unavailable_is_one_line(tracking_uri(workspace)):
            version = find_by_uri(connect(workspace), uri)
    except EXPECTED as error:
        return failed(error)
    return Completed(message=f"version {version.version} of {version.name}", data=str(version.version))


@task(
    cache_policy=NO_CACHE,
    task_run_name="score",
    persist_result=False,
    retries=len(DELAYS),
    retry_delay_seconds=list(DELAYS),
    retry_condition_fn=if_unavailable,
)
def score(root: Path, uri: str) -> "State[dict[str, Any]]":
    """Draw from the version and measure, or find that it has been measured; the record is stored on the version."""
    try:
        scored = answer(root, "score", uri, log=get_run_logger().info)
    except EXPECTED as error:
        return failed(error)
    return Completed(name="Scored" if scored["created"] else "Known", message=uri, data=scored)


def figures(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each figure of a score record: unguided and guided with their spread over seeds, and the floor."""
    rows = []
    for key in SCORES:
        row: dict[str, Any] = {"figure": key}
        for name in ("unguided", "guided"):
            estimate = record[name].get(key)
            if estimate is not None:
                row |= {name: round(estimate["value"], 4)}
                if estimate["spread"] is not None:
                    row |= {f"{name} spread": round(estimate["spread"], 4)}
        if record["floor"].get(key) is not None:
            row["floor"] = round(record["floor"][key], 4)
        if len(row) > 1:
            rows.append(row)
    near = {name: round(record[name]["memorisation"]["near_copies"], 4) for name in ("unguided", "guided")}
    return [*rows, {"figure": "near_copies", **near}]


def text(title: str, rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    columns = ("figure", "unguided", "unguided spread", "guided", "guided spread", "floor")
    lines = ["  ".join(f"{column:<{max(14, len(column))}}" for column in columns).rstrip()]
    for row in rows:
        cells = (str(row.get(column, "")) for column in columns)
        lines.append("  ".join(f"{cell:<{max(14, len(column))}}" for cell, column in zip(cells, columns, strict=True)))
    return "\n".join([title, *(line.rstrip() for line in lines)])


def main(arguments: list[str]) -> int:
    """Run the flow for the project that holds the working directory; the exit code says how it ended."""
    parser = argparse.ArgumentParser(prog="python -m flows.evaluate", description="Score a registered version.")
    parser.add_argument("uri", metavar="URI", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--ref", default="HEAD", help="git ref whose protocol counts (default: HEAD)")
    options = parser.parse_args(arguments)

    def run(workspace: Workspace) -> "State[str]":
        state = cast("State[str]", evaluate(options.uri, options.ref, return_state=True))
        if state.is_completed():
            print(state.result())
        return state

    return run_flow(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
