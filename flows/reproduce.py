"""Reproduce the pipeline as a Prefect flow: `python -m flows.reproduce [--force]`."""

import sys
from pathlib import Path
from typing import cast

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from darkroom.workspace import Workspace
from flows.command import command
from flows.dvc_stage import Outcome, stage, stage_order


@flow(name="reproduce", flow_run_name="reproduce", persist_result=False)
def reproduce(root: Path, force: bool = False) -> "State[list[Outcome]]":
    """Every stage of the DVC project at `root`, in DVC's order, each as a task; with `force` also what is up to date.

    The first stage that fails ends the flow with that stage's state: BadInput, Interrupted or Failed.
    """
    outcomes: list[Outcome] = []
    failed: State[Outcome] | None = None
    for name in stage_order(root):
        state = cast("State[Outcome]", stage(root, name, force, return_state=True))
        if not state.is_completed():
            failed = state
            break
        outcomes.append(state.result())
    create_table_artifact(
        key="stages",
        table=[{"stage": o.stage, "outcome": o.name, "seconds": round(o.seconds, 1)} for o in outcomes],
        description="How each stage ended: Ran, Cached (up to date) or Restored (taken from DVC's cache)",
    )
    if failed is not None:
        return Failed(name=failed.name, message=failed.message)
    return Completed(message=summary(outcomes), data=outcomes)


def summary(outcomes: list[Outcome]) -> str:
    """One line: how many stages ran, were cached, were restored."""
    counts = {name: sum(o.name == name for o in outcomes) for name in ("Ran", "Restored", "Cached")}
    return ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count) or "no stages"


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as aligned text."""
    return "\n".join(f"  {o.stage:<12} {o.name:<9} {o.seconds:7.1f} s" for o in outcomes)


def main(arguments: list[str]) -> int:
    """Run the flow for the project that holds the working directory; the exit code says how it ended."""
    return command("flows.reproduce", "Bring every output of the pipeline up to date.", _run, arguments)


def _run(workspace: Workspace, force: bool) -> State[list[Outcome]]:
    state = cast("State[list[Outcome]]", reproduce(workspace.root, force, return_state=True))
    if state.is_completed():
        print(table(state.result()))
    return state


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
