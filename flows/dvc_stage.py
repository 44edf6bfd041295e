"""The one place that runs DVC: one stage per Prefect task, in a process group that never outlives the run.

DVC alone decides whether a stage has work to do, so tasks are never cached by Prefect. The first half of this file
knows nothing of Prefect; `stage` at its end is the task.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import takewhile
from pathlib import Path
from typing import Literal

import psutil
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from darkroom.errors import InputError, Interrupted, StageFailed

GRACE = 25.0  # seconds between SIGTERM and SIGKILL, in which a trainer saves; Prefect's worker kills the flow after 30

_EXITED = re.compile(r"failed to run: .*exited with (-?\d+)$")
_BUSY = "is busy, it is being blocked by"
_BUSY_WAIT = 2.0  # seconds
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

# Waits for a word from the flow. If the pipe closes without it, the flow was killed: then it ends the target itself.
_LEASH = """read -r _ && exit 0
kill -TERM "$1" 2>/dev/null || exit 0
for _ in $(seq "$2"); do sleep 1; kill -0 "$1" 2>/dev/null || exit 0; done
kill -KILL "$1" 2>/dev/null"""


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
    """The exit code and the output of one `dvc repro`, in a process group of its own that is gone afterwards."""
    # -P: a file of the project must not stand in for a module of the same name that DVC imports.
    command = [sys.executable, "-P", "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    process = subprocess.Popen(
        [*command, "--force"] if force else command,
        cwd=root,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    lines: list[str] = []
    # A thread reads on while the stage is being ended: a full pipe would block the trainer that is saving.
    reader = threading.Thread(target=_read, args=(process, lines, log), daemon=True)
    with leash(f"-{process.pid}", grace):
        try:
            reader.start()
            while process.poll() is None:
                reader.join(0.1)
        finally:
            end_group(process.pid, grace)
            process.wait()
            reader.join(5)
    return process.returncode, lines


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


def end_group(group: int, grace: float = GRACE) -> None:
    """End every process of a process group and return when none is left: SIGTERM, then SIGKILL after `grace` seconds.

    DVC dies first while the trainer still saves, so the group counts, not its leader. A second interruption during
    the wait kills at once.
    """
    if not _alive(group):
        return
    try:
        _signal(group, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while _alive(group) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        while _alive(group):
            _signal(group, signal.SIGKILL)
            time.sleep(0.02)


@contextlib.contextmanager
def leash(target: str, grace: float = GRACE) -> Iterator[None]:
    """Let `target` (a process id, or a process group's with a minus sign) die with this process, even after kill -9."""
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", _LEASH, "leash", target, str(int(grace))],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            watcher.communicate(b"done\n")


def _environment() -> dict[str, str]:
    """`python` in a stage's command comes from PATH: it has to be this interpreter's."""
    here = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    return os.environ | {"PATH": f"{here}{os.pathsep}{path}", "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}


def _read(process: "subprocess.Popen[bytes]", lines: list[str], log: Callable[[str], None]) -> None:
    """Pass on whole lines; of a progress bar, which rewrites its line with carriage returns, only the last state."""
    assert process.stdout is not None
    for raw in process.stdout:
        line = _ANSI.sub("", raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]).rstrip()
        lines.append(line)
        if line:
            log(line)


def _alive(group: int) -> bool:
    """Whether a process of the group still runs; one that is dead and only waits for its parent does not count."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


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
