"""No child outlives a run, at whatever moment it is ended."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.processes import run


class Ended(BaseException):
    """As Prefect raises it for SIGTERM."""


def test_an_interruption_while_a_child_is_being_started_does_not_leave_it_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    popen = subprocess.Popen

    def interrupted(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        process = popen(command, **options)
        if command[0] == "sleep":
            started.append(process.pid)
            signal.raise_signal(signal.SIGTERM)
        return process

    def end(number: int, frame: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        monkeypatch.setattr(subprocess, "Popen", interrupted)
        with pytest.raises(Ended):
            run(["sleep", "60"], tmp_path)
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
