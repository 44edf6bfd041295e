"""Kills a command at chosen file operations, runs it again, and compares what it leaves with an undisturbed run.

`moments` traces one run; `kill` ends a process of another at the given one. What is compared: every output's digest in
`dvc.lock`, the lock itself, and whatever a kind of kill names besides.
"""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from darkroom.files import digest_file

WARM = str(Path(__file__).parent / "warm")
ORPHANS = 10.0  # seconds after which no process of a killed command may be left


@dataclass(frozen=True)
class Kind:
    """A command, which of its processes to watch on which files, and whom to kill."""

    name: str
    command: Sequence[str]  # after `python`
    module: str  # the process that is watched: what it was started with after -m, a pattern
    path: str  # pattern of the paths whose operations count
    signal: str = "SIGKILL"
    victim: str | None = None  # the module of the process to kill; None: the one that is watched
    mends: bool = False  # the command may mend what is left, and end well


@dataclass(frozen=True)
class Moment:
    """Before operation `number` of a watched process; `how` a file that is being opened is left."""

    process: str
    number: int
    how: str = "before"


@dataclass
class Tally:
    """How the kills of one kind went."""

    kills: int = 0
    lost: int = 0  # outputs or state that differ
    orphans: int = 0
    sufficed: int = 0
    notes: list[str] = field(default_factory=list)

    def row(self, name: str) -> str:
        return f"{name:<34} {self.kills:>5} {self.lost:>9} {self.orphans:>8} {self.sufficed:>8} of {self.kills}"


HEAD = f"{'kind':<34} {'kills':>5} {'bits lost':>9} {'orphans':>8} {'same command':>13}"


def run(root: Path, command: Sequence[str], env: dict[str, str], asked: dict[str, object] | None) -> tuple[int, str]:
    """The exit code and the output of a command that leads a session of its own."""
    log = root.parent / f"{root.name}.log"
    (processes := root.parent / f"{root.name}.processes").unlink(missing_ok=True)
    path = os.pathsep.join([WARM, *filter(None, [env.get("PYTHONPATH")])])
    values = env | {"PYTHONPATH": path}
    if asked:
        values["TESTS_KILL"] = json.dumps(asked | {"processes": str(processes)})
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=root, env=values, stdout=out, stderr=out, start_new_session=True
        )
        code = process.wait(300)
    return code, log.read_text()


def moments(root: Path, kind: Kind, env: dict[str, str], number: int) -> list[Moment]:
    """Run the command undisturbed and spread `number` moments over its file operations."""
    trace = root.parent / f"{root.name}.trace"
    trace.unlink(missing_ok=True)
    code, said = run(root, kind.command, env, {"module": kind.module, "path": kind.path, "trace": str(trace)})
    assert code == 0, said
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    ways = [
        Moment(process, position, how)
        for process, position, event in events
        for how in (("before", "empty", "half") if event == "open" else ("before",))
    ]
    assert len(ways) >= min(number, 3), ways
    return [ways[index * len(ways) // number] for index in range(number)]


def kill(root: Path, kind: Kind, env: dict[str, str], moment: Moment) -> str:
    """Run the command and kill it at the moment; returns the operation. Fails if the moment does not come."""
    done, pid_file = root.parent / f"{root.name}.done", root.parent / f"{root.name}.pid"
    done.unlink(missing_ok=True)
    asked = {
        "module": kind.module,
        "path": kind.path,
        "at": [moment.process, moment.number],
        "how": moment.how,
        "done": str(done),
        "signal": kind.signal,
    }
    if kind.victim:
        asked |= {"pid_of": kind.victim, "pid_file": str(pid_file)}
    code, said = run(root, kind.command, env, asked)
    assert done.exists(), f"{kind.name}: operation {moment} did not come (exit code {code}):\n{said}"
    assert code != 0 or kind.mends, said
    event, _, name = done.read_text().partition(" ")
    return f"{moment.how} {event} {Path(name).name}"


def left_behind(root: Path, seconds: float = ORPHANS) -> list[psutil.Process]:
    """Processes at work in the project, once they have had their time to end; they are ended then."""
    deadline = time.monotonic() + seconds
    while (found := _at_work(root)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in found:
        os.kill(process.pid, signal.SIGKILL)
    return found


def _at_work(root: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(root):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def state(root: Path, *patterns: str) -> dict[str, str]:
    """Digests of what a run leaves: `dvc.lock`, and the files that match."""
    files = [root / "dvc.lock", *(file for pattern in patterns for file in root.glob(pattern))]
    return {str(file.relative_to(root)): digest_file(file) for file in files if file.is_file()}


def registry(root: Path) -> dict[str, str]:
    """What is registered and what serves, without times and run ids."""
    with contextlib.closing(sqlite3.connect(root / ".darkroom" / "mlflow.db")) as database:
        models = database.execute("SELECT name FROM registered_models ORDER BY name").fetchall()
        aliases = database.execute(
            "SELECT name, alias, version FROM registered_model_aliases ORDER BY alias"
        ).fetchall()
        versions = database.execute(
            "SELECT name, version, value FROM model_version_tags WHERE key = 'darkroom.weights' ORDER BY version"
        ).fetchall()
    return {"models": str(models), "aliases": str(aliases), "versions": str(versions)}


def half_made(root: Path) -> list[str]:
    """What a kill left beside the outputs, and the run after it did not remove."""
    return [str(path) for path in root.rglob("*.tmp") if not re.search(r"/\.(git|dvc)/", str(path))]
