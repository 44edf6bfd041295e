"""Python commands in forks of a process that has imported already what takes them seconds: `warm/server.py`."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import TimeoutExpired

from filelock import FileLock

from tests.warm import warm_client

__all__ = ["TimeoutExpired", "environment", "run"]  # the first for code that gets this module instead of subprocess

_WARM = Path(__file__).parent / "warm"


def _server() -> Path:
    """The socket of the server, which the first that asks starts for all processes of this run of the tests."""
    shared = Path(os.environ["TESTS_SHARED"])
    socket, started = shared / "warm.socket", shared / "warm.started"
    with FileLock(shared / "warm.lock"):
        if not started.exists():
            with (shared / "warm.log").open("wb") as log:
                subprocess.Popen(
                    [sys.executable, str(_WARM / "server.py"), str(socket), os.environ["TESTS_OWNER"]],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            deadline = time.monotonic() + 120
            while not socket.exists():
                assert time.monotonic() < deadline, (shared / "warm.log").read_text()
                time.sleep(0.05)
            started.touch()
    return socket


def environment() -> dict[str, str]:
    """With these variables `python -m dvc` and what is in `darkroom` are forks too (`warm/sitecustomize.py`)."""
    return {"PYTHONPATH": str(_WARM), "TESTS_WARM": str(_server())}


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
    """`subprocess.run` for where the process itself is not what is tested. Only commands of this Python are forks."""
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
    with (
        warm_client.connect(str(_server())) as connection,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        Path(os.devnull).open() as nothing,
    ):
        streams = (nothing.fileno(), out.fileno(), (out if stderr == subprocess.STDOUT else err).fileno())
        variables = dict(os.environ if env is None else env)
        _, answers = warm_client.request(connection, command[1:], os.fspath(cwd), variables, streams)
        connection.settimeout(timeout)
        try:
            code = warm_client.ended(answers)
        except TimeoutError:  # the server ends the process when this connection is closed
            raise TimeoutExpired(command, timeout or 0) from None
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read())
    done = subprocess.CompletedProcess(command, code, *printed)
    if check:
        done.check_returncode()
    return done
