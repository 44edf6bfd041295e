"""Child processes of a flow: their output line by line, and none of them outlives the run."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

GRACE = 25.0  # seconds between SIGTERM and SIGKILL, in which a trainer saves; Prefect's worker kills the flow after 30

_PARENT_EVERY = 1.0  # seconds between two looks
_following = False

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

# Waits for a word from the flow. If the pipe closes without it, the flow was killed: then it ends the target itself.
_LEASH = """read -r _ && exit 0
kill -TERM "$1" 2>/dev/null || exit 0
for _ in $(seq "$2"); do sleep 1; kill -0 "$1" 2>/dev/null || exit 0; done
kill -KILL "$1" 2>/dev/null"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, every line that it logged, and its standard output if kept apart."""

    code: int
    lines: list[str]
    answer: str


def run(
    command: Sequence[str],
    root: Path,
    *,
    log: Callable[[str], None] = print,
    apart: bool = False,
    grace: float = GRACE,
    watch: Callable[[int], None] = lambda pid: None,
) -> Ended:
    """Run a command in the project at `root`, in a process group of its own that is gone when this returns or raises.

    Each line goes to `log` as it comes. With `apart` that is true of standard error alone, and standard output is
    returned: for commands that print JSON. `watch` is called with the process id several times a second; what it raises
    ends the command, and so does what `log` raises.
    """
    lines: list[str] = []
    errors: list[Exception] = []
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(tempfile.TemporaryFile()) if apart else None
        process = None
        try:
            with _undisturbed():
                process = subprocess.Popen(
                    command,
                    cwd=root,
                    env=environment(root),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if answer is None else answer,
                    stderr=subprocess.STDOUT if answer is None else subprocess.PIPE,
                    start_new_session=True,
                )
                # A thread reads on while the group is being ended: a full pipe would block the trainer that is saving.
                reader = threading.Thread(target=_read, args=(process, lines, log, errors), daemon=True)
                reader.start()
                stack.enter_context(leash(f"-{process.pid}", grace))
            while process.poll() is None and not errors:
                reader.join(0.1)
                watch(process.pid)
        finally:
            if process is not None:
                end_group(process.pid, grace)
                process.wait()
                reader.join(5)
        if errors:
            raise errors[0]
        if answer is None:
            return Ended(process.returncode, lines, "")
        answer.seek(0)
        return Ended(process.returncode, lines, answer.read().decode(errors="replace"))


def environment(root: Path) -> dict[str, str]:
    """What a command in the project at `root` sees: this interpreter as `python`, and the project's own code first.

    `darkroom` in the environment is the checkout that was installed; a workspace at another commit has its own.
    """
    path = os.environ.get("PATH", os.defpath)
    values = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}",
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }
    if (root / "src" / "darkroom").is_dir():
        others = os.environ.get("PYTHONPATH")
        values["PYTHONPATH"] = os.pathsep.join([str(root / "src"), *([others] if others else [])])
    return os.environ | values


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


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold an interruption back until the block has ended: a child that is just being started would stay behind."""
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


def follow_parent() -> None:
    """End this process like SIGTERM does when the worker that started it is gone; without a worker, do nothing.

    A worker that is killed leaves its flow's process behind: it would go on beside the run that is started anew.
    """
    global _following
    if _following or "PREFECT__FLOW_RUN_ID" not in os.environ:
        return
    _following = True
    threading.Thread(target=_end_after, args=(os.getppid(),), name="follow-parent", daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)  # Prefect turns it into an exception on the main thread


def _read(
    process: "subprocess.Popen[bytes]", lines: list[str], log: Callable[[str], None], errors: list[Exception]
) -> None:
    """Pass on whole lines; of a progress bar, which rewrites its line with carriage returns, only the last state.

    Reads on after `log` has raised: a stage that is being ended must not block on a full pipe.
    """
    stream = process.stdout or process.stderr
    assert stream is not None
    for raw in stream:
        line = _ANSI.sub("", raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]).rstrip()
        lines.append(line)
        if line and not errors:
            try:
                log(line)
            except Exception as error:
                errors.append(error)


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
