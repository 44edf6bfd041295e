"""The one place that runs DVC: one stage per Prefect task, in processes that never outlive the run.

DVC alone decides whether a stage has work to do, so tasks are never cached by Prefect. The first half of this file
knows nothing of Prefect; `stage` at its end is the task.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed

from darkroom.errors import InputError, StageFailed
from flows import dvc_locks
from flows.artifacts import StageProgress, human_size
from flows.failures import EXPECTED, failed
from flows.processes import GRACE, Ended, run
from flows.stage_output import StageLog, classify, dvc_message, failure

RETRY_DELAYS = (10, 60)  # seconds before a stage is tried again; a training carries on from its checkpoint
LOCK_LIMIT = 6 * 3600.0  # seconds that a stage waits for another process that holds DVC's locks
_LOCK_EVERY = 1.0  # seconds between two looks at a lock that another process holds
_SAY_EVERY = 60.0  # seconds between two lines about waiting
_SILENT = 8.0  # seconds of silence after which the log says that a stage still runs: it may be importing, say
# -P: a file of the project must not stand in for a module of the same name that DVC imports.
_DVC = (sys.executable, "-P", "-m", "dvc", "--wait-for-lock")


@dataclass(frozen=True)
class Outcome:
    """How one stage ended: it ran, its outputs were there (Cached), or DVC took them from its cache (Restored)."""

    stage: str
    name: Literal["Ran", "Cached", "Restored"]
    seconds: float
    files: int = 0  # that it has as outputs
    size: int = 0  # of these, in bytes


def stage_order(root: Path) -> list[str]:
    """The stages of the DVC project at `root` in the order in which `dvc repro` takes them.

    Raises InputError when DVC cannot read the project.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import get_active_graph, plan_repro

    dvc_locks.mend_lock_file(root)
    try:
        with contextlib.closing(Repo(str(root))) as repo:
            order = [stage for stage in plan_repro(get_active_graph(repo.index.graph)) if stage.cmd]
    except DvcException as error:
        raise InputError(f"{root}: DVC cannot read the pipeline: {' '.join(str(error).split())}") from error
    # `stage.addressing` depends on the working directory; this is the name as seen from the root.
    return [s.name if s.path_in_repo == "dvc.yaml" else f"{s.path_in_repo}:{s.name}" for s in order]


def dvc(root: Path, *arguments: str, log: Callable[[str], None] = print, grace: float = GRACE) -> list[str]:
    """Run any DVC command in the project at `root`, waiting for its lock, and return the lines that it printed.

    Raises StageFailed with DVC's last message.
    """
    ended = _run(root, arguments, _Patience(root, log), grace)
    if ended.code != 0:
        raise StageFailed(f"dvc {arguments[0]} ended with {ended.code}: {dvc_message(ended.lines)}")
    return ended.lines


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
    If another process works on the same files, it is waited for. Raises InputError (the stage found its input or
    parameters bad), Interrupted (it saved its state and stopped) or StageFailed (anything else, with its last line;
    all lines have gone to `log`).
    """
    began = time.monotonic()
    patience = _Patience(root, log)
    command = ["repro", "--single-item", stage, *(["--force"] if force else [])]
    while (ended := _run(root, command, patience, grace)).code != 0:
        if holders := dvc_locks.blockers(ended.lines):
            patience.wait_for(holders)
        elif dvc_locks.guard_was_busy(ended.lines):
            patience.wait_for([])
        elif dvc_locks.rwlock_is_unreadable(ended.lines) and dvc_locks.clear_unreadable(root):
            log("WARNING: removed .dvc/tmp/rwlock, which a process had left half-written")
        elif mended := dvc_locks.mend_lock_file(root):
            log(f"WARNING: {mended}")
        else:
            raise failure(stage, ended.code, ended.lines)
    outcome = classify(stage, ended.lines)
    return Outcome(stage, outcome, time.monotonic() - began, *outputs(root, stage))


def outputs(root: Path, stage: str) -> tuple[int, int]:
    """Number and total size in bytes of a stage's output files, as `dvc.lock` has them."""
    file, _, name = stage.rpartition(":")
    lock = (root / file).parent / "dvc.lock" if file else root / "dvc.lock"
    try:
        content = yaml.safe_load(lock.read_bytes())
    except FileNotFoundError:  # no stage of this file has outputs
        return 0, 0
    entries = content["stages"].get(name, {}).get("outs", [])
    return sum(entry.get("nfiles", 1) for entry in entries), sum(entry.get("size", 0) for entry in entries)


class _Patience:
    """Waits for DVC's locks, says for whom, and ends the waiting after `LOCK_LIMIT` with StageFailed."""

    def __init__(self, root: Path, log: Callable[[str], None]) -> None:
        self._root, self._log = root, log
        self._began = self._said = time.monotonic()
        self._heard = False  # that DVC has said something: then it has the repository's lock
        self._heard_at = self._logged_at = self._began

    def hear(self, line: str) -> None:
        """Pass on a line of DVC."""
        self._heard, self._heard_at = True, time.monotonic()
        self._logged_at = self._heard_at
        self._log(line)

    def watch(self, dvc: int) -> None:
        """Look whether DVC, the process with this id, is silent: it waits so for the repository's lock."""
        now = time.monotonic()
        if self._heard and now - self._logged_at >= _SILENT:
            self._logged_at = now
            self._log(f"still running, silent for {now - self._heard_at:.0f} s")
        if not self._heard and time.monotonic() - self._said >= _SAY_EVERY:
            holder = dvc_locks.repository_holder(self._root)
            if holder not in (None, dvc):
                self._waiting(f"process {holder}")

    def wait_for(self, holders: list[dvc_locks.Holder]) -> None:
        """Return when none of them holds a lock any more."""
        self._said = float("-inf")
        while True:
            time.sleep(_LOCK_EVERY)
            holders = [holder for holder in holders if dvc_locks.holds(self._root, holder)]
            self._waiting(", ".join(map(str, holders)) or "another process")
            if not holders:
                break
        self._heard, self._said = False, time.monotonic()

    def _waiting(self, holder: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY:
            self._said = now
            self._log(f"Waiting for {holder}, which works on the same files")
        if now - self._began > LOCK_LIMIT:
            raise StageFailed(f"waited {LOCK_LIMIT / 3600:g} h for {holder}, which holds DVC's lock of {self._root}")


def _run(root: Path, arguments: Sequence[str], patience: _Patience, grace: float) -> Ended:
    return run([*_DVC, *arguments], root, log=patience.hear, watch=patience.watch, grace=grace)


def _can_be_retried(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Bad input stays bad. A stage that was interrupted from elsewhere carries on; if this flow is, nothing returns."""
    return state.name != "BadInput"


@task(
    cache_policy=NO_CACHE,
    task_run_name="{name}",
    persist_result=False,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=list(RETRY_DELAYS),
    retry_condition_fn=_can_be_retried,
)
def stage(root: Path, name: str, force: bool = False) -> "State[Outcome]":
    """Reproduce the DVC stage `name`; the state is called Ran, Cached or Restored, or BadInput, Interrupted or Failed.

    Expected errors become states, not exceptions: their message is the last thing to read, not a traceback. Called
    directly, not submitted, it stays on the main thread, where an interruption reaches it.
    """
    with StageProgress(root, name) as shown:
        output = StageLog(get_run_logger().log, shown.advance)
        try:
            outcome = run_stage(root, name, force=force, log=output.line)
        except EXPECTED as error:
            return failed(error)
        finally:
            output.close()
        if outcome.name == "Ran":
            shown.ran()
    files = f"{outcome.files} file{'' if outcome.files == 1 else 's'}"
    message = f"{outcome.seconds:.1f} s, {files}, {human_size(outcome.size)}"
    return Completed(name=outcome.name, message=message, data=outcome)
