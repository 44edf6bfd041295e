"""Python commands in forks of a process that has imported already what takes them seconds.

`run` stands in for `subprocess.run` where the process itself is not what is tested: the command gets its arguments,
directory, environment and output, and no state of the process that asks. What a command imports is imported for the
next one before its fork, but for the project's own packages: which of these a command runs is part of tests.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, BinaryIO

__all__ = ["TimeoutExpired", "run"]  # as code under test that gets this module instead of subprocess names them

_OURS = ("__main__", "__mp_main__", "darkroom", "flows", "tests")
# What commands other than DVC's import; the rest is learned from them.
_HEAVY = ("mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "pandas", "sqlalchemy.orm", "torch")
_lock = threading.Lock()
_channels: dict[int, BinaryIO] = {}  # by process: one that forks gets its own


def run(
    command: Sequence[str],
    *,
    cwd: Path | str,
    env: dict[str, str] | None = None,
    capture_output: bool = False,
    stdout: int | None = None,
    stderr: int | None = None,
    text: bool = True,
    timeout: float | None = None,
    check: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """What `subprocess.run` would return for a command of this Python; other commands are run by that."""
    if command[0] != sys.executable:
        return subprocess.run(
            command,
            cwd=cwd,
            env=env,
            capture_output=capture_output,
            stdout=stdout,
            stderr=stderr,
            text=text,
            timeout=timeout,
            check=check,
        )
    assert text
    with tempfile.TemporaryDirectory(prefix="darkroom-warm-") as directory, _lock:
        out, err = Path(directory) / "out", Path(directory) / "err"
        request = {
            "arguments": list(command[1:]),
            "cwd": os.fspath(cwd),
            "environment": dict(os.environ if env is None else env),
            "out": str(out),
            "err": str(out if stderr == subprocess.STDOUT else err),
        }
        code = _ask(request, list(command), timeout)
        printed = [path.read_text() if path.exists() else "" for path in (out, err)]
    done = subprocess.CompletedProcess(command, code, *printed)
    if check:
        done.check_returncode()
    return done


def _ask(request: dict[str, Any], command: list[str], timeout: float | None) -> int:
    channel = _channels.get(os.getpid()) or _start()
    channel.write(json.dumps(request).encode() + b"\n")
    channel.flush()
    process = int(channel.readline())
    killer = threading.Timer(timeout or 600, os.kill, (process, signal.SIGKILL))
    killer.start()
    try:
        code = int(channel.readline())
    finally:
        killer.cancel()
    if code == -signal.SIGKILL and timeout is not None:
        raise TimeoutExpired(command, timeout)
    return code


def _start() -> BinaryIO:
    ours, theirs = socket.socketpair()
    descriptor = str(theirs.fileno())
    process = subprocess.Popen([sys.executable, "-I", __file__, descriptor], cwd="/", pass_fds=[theirs.fileno()])
    theirs.close()
    channel = _channels[os.getpid()] = ours.makefile("rwb")
    ours.close()  # the file is left
    atexit.register(_stop, channel, process)
    return channel


def _stop(channel: BinaryIO, process: "subprocess.Popen[bytes]") -> None:
    channel.close()
    process.wait()


def _serve(channel: BinaryIO) -> None:
    """Until the other end is closed."""
    while line := channel.readline():
        request = json.loads(line)
        _learn(["dvc.cli", "dvc.repo"] if "dvc" in request["arguments"] else _HEAVY)
        known = set(sys.modules)
        reads, writes = os.pipe()
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = _execute(request)
                names = [name for name in sys.modules if name not in known and name.split(".")[0] not in _OURS]
                os.write(writes, "\n".join(names).encode()[:60_000])  # less than a pipe holds
            finally:
                os._exit(code)
        os.close(writes)
        channel.write(b"%d\n" % child)
        channel.flush()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(reads, "rb") as names:
            learned = names.read().decode().splitlines()
        channel.write(b"%d\n" % code)
        channel.flush()
        _learn(learned)


def _learn(names: Sequence[str]) -> None:
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _execute(request: dict[str, Any]) -> int:
    for path, target in ((request["out"], 1), (request["err"], 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    flags = request["arguments"]
    while flags[0] in ("-I", "-P", "-B"):  # as this process was started, or of no importance
        flags = flags[1:]
    kind, name, *arguments = flags if flags[0] in ("-m", "-c") else ["", *flags]
    sys.argv = [kind or name, *arguments]
    try:
        if kind == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(name, {"__name__": "__main__"})
        else:
            runpy.run_path(name, run_name="__main__")
        code: Any = 0
    except SystemExit as done:
        code = done.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return int(code or 0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])).makefile("rwb"))
