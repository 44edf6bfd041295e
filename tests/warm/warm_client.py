"""How `server.py` is asked for a process. It is on the path of every command of a `warm` test: few, quick imports."""

import array
import json
import os
import socket
from collections.abc import Sequence
from typing import BinaryIO

SIGKILL = 9


def request(
    connection: socket.socket,
    arguments: Sequence[str],
    directory: str,
    environment: dict[str, str],
    streams: tuple[int, int, int] = (0, 1, 2),
) -> tuple[int, BinaryIO]:
    """Ask for `python ARGUMENTS`; returns the process id, and what `ended` reads its end from."""
    content = json.dumps({"arguments": [*arguments], "directory": directory, "environment": environment}).encode()
    descriptors = array.array("i", streams)
    connection.sendmsg([len(content).to_bytes(8)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    connection.sendall(content)
    answers = connection.makefile("rb")
    return int(answers.readline()), answers


def ended(answers: BinaryIO) -> int:
    """Wait for the exit code, negative for a signal. A server that is gone has taken the process along."""
    return int(answers.readline() or -SIGKILL)


def connect(path: str) -> socket.socket:
    """Raises OSError if there is no server."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def run(path: str, arguments: Sequence[str]) -> None:
    """Become `python ARGUMENTS`; returns only if there is no server."""
    import signal

    try:
        connection = connect(path)
    except OSError:
        return
    pid, answers = request(connection, arguments, os.getcwd(), dict(os.environ))  # noqa: PTH109 (pathlib is slow)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: os.kill(pid, received))
    code = ended(answers)
    if code < 0:
        if code != -SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
