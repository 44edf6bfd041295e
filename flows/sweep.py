"""A grid of parameters as a Prefect flow over `dvc exp run`: `python -m flows.sweep train.steps=500,1000`.

Each combination is an experiment of DVC, pushed to the repository as soon as it is there: `dvc exp show` lists it and
`dvc exp apply` brings it back. It is a run in MLflow too, below the run of its training. A sweep that was interrupted
is started again with the same grid: DVC has what was finished, and the training under way resumes.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from darkroom.errors import InputError, StageFailed
from darkroom.files import read_json
from darkroom.workspace import Workspace
from flows.command import run_flow
from flows.dvc_stage import dvc
from flows.failures import EXPECTED, failed, if_interrupted
from flows.git import git
from flows.grid import check, combinations, experiment_name, parse, title
from flows.limits import gpu_slot
from flows.notify import ended_badly
from flows.overrides import override
from flows.processes import follow_parent
from flows.settings import Settings
from flows.stage_output import StageLog, failure
from flows.sweep_log import log_run
from flows.transfers import sync
from flows.workspaces import workspace

RETRY_DELAYS = (10, 60)  # seconds before a combination that was stopped from outside carries on
_RUNNING = "Running stage '"


@dataclass(frozen=True)
class Trial:
    """One combination and what came of it."""

    combination: dict[str, Any]
    experiment: str  # its name for DVC
    outcome: str  # Ran, Restored, or the name of the state that it failed with
    seconds: float = 0.0
    record: dict[str, Any] | None = None  # reports/metrics.json
    run: str | None = None  # its id in MLflow
    reason: str = ""  # why there is no record

    @property
    def fid(self) -> float:
        """Of unguided samples; infinite if there is none, so that it sorts last."""
        return float(self.record["unguided"]["fid"]["value"]) if self.record else float("inf")

    @property
    def guided_fid(self) -> float:
        return float(self.record["guided"]["fid"]["value"]) if self.record else float("inf")


@flow(
    name="sweep",
    flow_run_name="sweep",
    persist_result=False,
    on_failure=[ended_badly],
    on_crashed=[ended_badly],
    on_cancellation=[ended_badly],
)
def sweep(grid: dict[str, list[Any]], ref: str = "HEAD", max_runs: int = 50) -> "State[str]":
    """Run the pipeline of `ref` for every combination of the values in `grid`, by dotted keys, one after the other.

    A combination that fails does not stop the others. Ends as Completed if all have a score, with the table as the
    result, else as Incomplete, which is Failed; as BadInput before anything runs if a combination is not allowed.
    """
    follow_parent()
    logger = get_run_logger()
    trials: list[Trial] = []
    try:
        settings = Settings.from_environment()
        todo = combinations(grid, max_runs)
        with workspace(f"sweep-{flow_run.id}", ref, None, logger.info) as root:
            for line in check(root, todo):
                logger.warning("%s", line)
            cast("State[Any]", sync(root, return_state=True)).result()
            for number, combination in enumerate(todo, 1):
                logger.info("combination %s of %s: %s", number, len(todo), title(combination))
                trials.append(_one(root, combination, settings.repository))
            _push_data(root, [trial.experiment for trial in trials if trial.record])
    except EXPECTED as error:
        return failed(error)
    finally:
        if trials:
            show(trials)
    missing = [trial for trial in trials if trial.record is None]
    message = f"{len(trials) - len(missing)} of {len(trials)} combinations have a score"
    if missing:
        message += "; " + "; ".join(f"{title(trial.combination)}: {trial.reason}" for trial in missing)
        return Failed(name="Incomplete", message=message)
    return Completed(message=message, data=text(trials))


def _one(root: Path, combination: dict[str, Any], repository: str) -> Trial:
    """Run a combination, give it a run in MLflow and push it."""
    name = experiment_name(combination)
    with gpu_slot():
        state = cast("State[Trial]", experiment(root, combination, name, title(combination), return_state=True))
    if not state.is_completed():
        return Trial(combination, name, state.name or "Failed", reason=state.message or "")
    trial = state.result()
    _push(root, name, repository)
    logged = cast("State[str]", log_run(root, combination, name, trial.record, return_state=True))
    run = logged.result() if logged.is_completed() else None
    return Trial(combination, name, trial.outcome, trial.seconds, trial.record, run)


@task(
    cache_policy=NO_CACHE,
    task_run_name="{title}",
    persist_result=False,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=list(RETRY_DELAYS),
    retry_condition_fn=if_interrupted,
)
def experiment(root: Path, combination: dict[str, Any], name: str, title: str) -> "State[Trial]":
    """Run the whole pipeline with these parameters as DVC's experiment `name`; the state is called Ran or Restored."""
    began, lines = time.monotonic(), list[str]()
    output = StageLog(get_run_logger().log)

    def hear(line: str) -> None:
        lines.append(line)
        output.line(line)

    try:
        override(root, combination)
        try:
            dvc(root, "exp", "run", "--name", name, log=hear)
        except StageFailed as error:
            raise _of_stage(lines) or error from None
        record = read_json(Workspace(root).metrics_file)
    except EXPECTED as error:
        return failed(error)
    finally:
        output.close()
    outcome = "Ran" if any(line.startswith(_RUNNING) for line in lines) else "Restored"
    trial = Trial(combination, name, outcome, time.monotonic() - began, record)
    return Completed(name=outcome, message=f"FID {trial.fid:.3f}, {trial.seconds:.1f} s", data=trial)


def _of_stage(lines: list[str]) -> Exception | None:
    """What the last stage that ran has failed with; None if none ran."""
    running = next((line for line in reversed(lines) if line.startswith(_RUNNING)), None)
    return None if running is None else failure(running.removeprefix(_RUNNING).rstrip("':"), 255, lines)


def _push(root: Path, name: str, repository: str) -> None:
    """Bring the experiment to the repository that the workspace is of; one that cannot be written is a warning."""
    try:
        refs = git(root, "for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
        mine = [f"+{ref}:{ref}" for ref in refs if ref.endswith(f"/{name}")]
        git(root, "push", "--quiet", "origin", *mine, url=repository)
    except StageFailed as error:
        get_run_logger().warning("experiment %s was not pushed: %s", name, error)


def _push_data(root: Path, names: list[str]) -> None:
    """Bring what the experiments made to DVC's remote, if there is one; here it is in the shared cache."""
    logger = get_run_logger()
    try:
        if names and dvc(root, "remote", "list", log=lambda line: None):
            dvc(root, "exp", "push", "--force", "origin", *names, log=logger.info)
    except StageFailed as error:
        logger.warning("what the experiments made was not pushed: %s", error)


def rows(trials: list[Trial]) -> list[dict[str, Any]]:
    """A row for each combination, the lowest FID first, those without at the end."""
    found = []
    for trial in sorted(trials, key=lambda trial: (trial.fid, trial.guided_fid)):
        row: dict[str, Any] = dict(trial.combination)
        if trial.record:
            for prefix, name in (("", "unguided"), ("guided ", "guided")):
                score = trial.record[name]
                row[f"{prefix}FID"] = _with_spread(score["fid"], 3)
                if score.get("class_accuracy"):
                    row[f"{prefix}class accuracy"] = _with_spread(score["class_accuracy"], 4)
        row |= {"outcome": trial.outcome, "seconds": round(trial.seconds, 1), "experiment": trial.experiment}
        row |= {"MLflow run": trial.run or "none", **({"reason": trial.reason} if trial.reason else {})}
        found.append(row)
    return found


def _with_spread(estimate: dict[str, Any], digits: int) -> str:
    spread = "" if estimate["spread"] is None else f" ± {estimate['spread']:.{digits}f}"
    return f"{estimate['value']:.{digits}f}{spread}"


def show(trials: list[Trial]) -> None:
    """The table that a person opens; also of a sweep that was stopped."""
    columns = list(dict.fromkeys(key for row in rows(trials) for key in row))
    table = [{column: row.get(column, "") for column in columns} for row in rows(trials)]
    create_table_artifact(key="sweep", table=table, description="Every combination, best first; ± is over seeds")


def text(trials: list[Trial]) -> str:
    """The same as lines for a terminal."""
    return "\n".join(
        f"FID {row.get('FID', 'none'):<16} {row['outcome']:<9} {row['seconds']:8.1f} s  {row['experiment']}"
        for row in rows(trials)
    )


def main(arguments: list[str]) -> int:
    """Run the flow for the project that holds the working directory; the exit code says how it ended."""
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description="Try every combination of parameters.")
    parser.add_argument("grid", nargs="+", metavar="KEY=VALUE,…", help="a parameter and its values, as YAML")
    parser.add_argument("--ref", default="HEAD", help="git ref to vary (default: HEAD)")
    parser.add_argument("--max-runs", type=int, default=50, help="refuse larger grids (default: 50)")
    options = parser.parse_args(arguments)
    try:
        grid = parse(options.grid)
    except InputError as error:
        parser.error(str(error))

    def run(workspace: Workspace) -> "State[str]":
        state = cast("State[str]", sweep(grid, options.ref, options.max_runs, return_state=True))
        if state.is_completed():
            print(state.result())
        return state

    return run_flow(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
