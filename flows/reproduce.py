"""Reproduce the pipeline as a Prefect flow: `python -m flows.reproduce [--force]`."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from darkroom.errors import InputError
from flows.artifacts import human_size, sample_grid, stage_table
from flows.command import parser, run_flow
from flows.dvc_stage import Outcome, stage, stage_order
from flows.failures import failed
from flows.limits import gpu_slot
from flows.processes import follow_parent
from flows.view import watched


@flow(name="reproduce", flow_run_name="reproduce", persist_result=False)
def reproduce(root: Path, force: bool = False) -> "State[list[Outcome]]":
    """Every stage of the DVC project at `root`, in DVC's order, each as a task; with `force` also what is up to date.

    Holds a GPU slot meanwhile. The first stage that fails ends the flow with that stage's state: BadInput, Interrupted
    or Failed.
    """
    follow_parent()
    try:
        with gpu_slot():
            outcomes, ended = _stages(root, force)
    except InputError as error:
        return failed(error)
    if ended is not None:
        name, state = ended
        stage_table(outcomes, failed=(name, state.name or ""))
        return Failed(name=state.name, message=state.message)
    stage_table(outcomes)
    sample_grid(root)
    return Completed(message=summary(outcomes), data=outcomes)


def _stages(root: Path, force: bool) -> tuple[list[Outcome], "tuple[str, State[Outcome]] | None"]:
    """The outcomes of the stages that completed; name and state of the one that did not."""
    outcomes: list[Outcome] = []
    for name in stage_order(root):
        part = partial(stage, root, name, force, return_state=True)
        state = watched(name, cast("Callable[[], State[Outcome]]", part))
        if not state.is_completed():
            return outcomes, (name, state)
        outcomes.append(state.result())
    return outcomes, None


def summary(outcomes: list[Outcome]) -> str:
    """One line: how many stages ran, were cached, were restored."""
    counts = {name: sum(o.name == name for o in outcomes) for name in ("Ran", "Restored", "Cached")}
    return ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count) or "no stages"


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as aligned text."""
    return "\n".join(f"  {o.stage:<12} {o.name:<9} {o.seconds:7.1f} s  {human_size(o.size):>8}" for o in outcomes)


def main(arguments: list[str]) -> int:
    """Run the flow for the project that holds the working directory; the exit code says how it ended."""
    force = parser("flows.reproduce", "Bring every output of the pipeline up to date.").parse_args(arguments).force
    return run_flow(
        lambda workspace: cast("State[list[Outcome]]", reproduce(workspace.root, force, return_state=True)),
        lambda workspace, state: f"{table(state.result())}\n",
        title="reproduce",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
