"""The one place that runs DVC: one stage per Prefect task, in processes that never outlive the run.

DVC alone decides whether a stage has work to do, so tasks are never cached by Prefect. The first half of this file
knows nothing of Prefect; `stage` at its end is the task.
"""

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import takewhile
from pathlib import Path
from typing import Literal

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from darkroom.errors import InputError, Interrupted, StageFailed
from flows.processes import GRACE, run

_EXITED = re.compile(r"failed to run: .*exited with (-?\d+)$")
_BUSY = "is busy, it is being blocked by"
_BUSY_WAIT = 2.0  # seconds


@dataclass(frozen=True)
class Outcome:
    """How one stage ended: it ran, its outputs were there (Cached), or DVC took them from its cache (Restored)."""

    stage: str
    name: Literal["Ran", "Cached", "Restored"]
    seconds: float


def stage_order(root: Path) -> list[str]:
    """The stages of the DVC project at `root`, each after those it depends on; ties as in `dvc.yaml`.

    Raises InputError when DVC cannot read the project.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with contextlib.closing(Repo(str(root))) as repo:
            graph = repo.index.graph
            sorter = TopologicalSorter({stage: graph.successors(stage) for stage in repo.index.stages})
            order = [stage for stage in sorter.static_order() if stage.cmd]
    except DvcException as error:
        raise InputError(f"{root}: DVC cannot read the pipeline: {' '.join(str(error).split())}") from error
    # `stage.addressing` depends on the working directory; this is the name as seen from the root.
    return [s.name if s.path_in_repo == "dvc.yaml" else f"{s.path_in_repo}:{s.name}" for s in order]


def run_stage(
    root: Path,
    stage: str,
    *,
    force: bool = False,
    log: Callable[[str], None] = print,
    grace: float = GRACE,
) -> Outcome:
    """Reproduce one stage with DVC, passing each line of its output to `log`.

    Whatever ends this call, an exception raised in the middle of it included, no process of the stage is left.
    Raises InputError (the stage found its input or parameters bad), Interrupted (it saved its state and stopped) or
    StageFailed (anything else, with its last line; all lines have gone to `log`).
    """
    began = time.monotonic()
    exit_code, lines = _repro(root, stage, force, log, grace)
    while exit_code != 0 and any(_BUSY in line for line in lines):
        # --wait-for-lock waits for the repository; that another process runs this very stage is an error to DVC.
        time.sleep(_BUSY_WAIT)
        exit_code, lines = _repro(root, stage, force, log, grace)
    if exit_code != 0:
        raise failure(stage, exit_code, lines)
    return Outcome(stage, classify(stage, lines), time.monotonic() - began)


def _repro(root: Path, stage: str, force: bool, log: Callable[[str], None], grace: float) -> tuple[int, list[str]]:
    """The exit code and the output of one `dvc repro`."""
    # -P: a file of the project must not stand in for a module of the same name that DVC imports.
    command = [sys.executable, "-P", "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    ended = run([*command, "--force"] if force else command, root, log=log, grace=grace)
    return ended.code, ended.lines


def classify(stage: str, lines: list[str]) -> Literal["Ran", "Cached", "Restored"]:
    """The outcome of a successful `dvc repro`; DVC's first word counts, later lines may be the stage's own."""
    for line in lines:
        if line == f"Running stage '{stage}':":
            return "Ran"
        if line == f"Stage '{stage}' is cached - skipping run, checking out outputs":
            return "Restored"
        if line == f"Stage '{stage}' didn't change, skipping":
            return "Cached"
    raise StageFailed(f"stage {stage}: DVC ended without saying what it did: {lines[-1] if lines else 'nothing'}")


def failure(stage: str, exit_code: int, lines: list[str]) -> Exception:
    """The exception for a failed `dvc repro`; the stage's own exit code is inside DVC's last message."""
    code = next((int(match[1]) for line in reversed(lines) if (match := _EXITED.search(line))), None)
    if code is not None and code > 128:
        code = 128 - code  # how a shell reports that a signal ended its command
    own = [line for line in lines if line and not line.startswith("ERROR: ")]
    said = list(takewhile(lambda line: line.startswith(f"{stage}: "), reversed(own)))[::-1]  # what it said at the end
    last = own[-1] if own else "no output"
    if code == 2:
        return InputError("\n".join(said) or f"{stage}: {last}")
    if code in (75, -signal.SIGTERM, -signal.SIGINT):
        return Interrupted(said[-1] if said else f"{stage}: interrupted")
    if code is None:  # DVC itself failed; its message, if there is one, comes last
        last = next((line.removeprefix("ERROR: ") for line in reversed(lines) if line), last)
        return StageFailed(f"stage {stage}: DVC ended with {exit_code}: {last}")
    if said and code == 1:
        return StageFailed(said[-1])
    what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return StageFailed(f"stage {stage} failed ({what}): {last}")


@task(cache_policy=NO_CACHE, task_run_name="{name}", persist_result=False)
def stage(root: Path, name: str, force: bool = False) -> "State[Outcome]":
    """Reproduce the DVC stage `name`; the state is called Ran, Cached or Restored, or BadInput, Interrupted or Failed.

    Expected errors become states, not exceptions: their message is the last thing to read, not a traceback. Called
    directly, not submitted, it stays on the main thread, where an interruption reaches it.
    """
    logger = get_run_logger()
    try:
        outcome = run_stage(root, name, force=force, log=logger.info)
    except InputError as error:
        return Failed(name="BadInput", message=str(error), data=error)
    except Interrupted as error:
        return Failed(name="Interrupted", message=str(error), data=error)
    except StageFailed as error:
        return Failed(message=str(error), data=error)
    return Completed(name=outcome.name, message=f"{outcome.seconds:.1f} s", data=outcome)
