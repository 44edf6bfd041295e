"""Runs registry commands, each list of them in a fork of this process, and kills itself where it is told to.

Importing MLflow and mapping its tables takes seconds and a fork nothing: this process does that once, in a project of
its own, and then reads requests as lines of JSON from stdin, a list of parts that run side by side. A part
`{"root": ..., "commands": [...], "kill": 3, "result": path}` runs the commands in the project at `root` and sends
SIGKILL to itself before its fourth changing call. The answer is a list of exit codes; what came out is in `result`.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from darkroom.registry import lease, promotion, recovery
from darkroom.registry.lock import registry
from darkroom.registry.tracking import connect
from darkroom.workspace import Workspace
from tests.integration.registry_calls import CHANGING, Calls
from tests.integration.registry_versions import add_version, pretend_to_prove


def run(workspace: Workspace, command: str) -> Any:
    """What a command returned, or the error that it ended with."""
    name, _, argument = command.partition(" ")
    try:
        if name == "add":
            return add_version(workspace, float(argument))
        if name == "promote":
            return dataclasses.asdict(promotion.promote(workspace, argument or None))
        if name == "rollback":
            return dataclasses.asdict(promotion.rollback(workspace, "sevens are mirrored"))
        if name == "history":
            return [dataclasses.asdict(decision) for decision in promotion.history(workspace)]
        if name == "disagreements":
            return recovery.disagreements(connect(workspace), "digits")
        if name == "sleep":
            return time.sleep(float(argument))
        assert name == "settle", command
        with registry(workspace):
            return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def serve(part: dict[str, Any]) -> int:
    """Carry out a part of a request, in a process of its own."""
    kill = part.get("kill")
    os.environ.update(part.get("environment", {}))
    with pytest.MonkeyPatch.context() as patch:
        pretend_to_prove(patch)
        for name, value in part.get("patch", {}).items():
            patch.setattr(lease, name, value)
        calls = Calls(patch, CHANGING, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == kill else None)
        returned = [run(Workspace(Path(part["root"])), command) for command in part["commands"]]
    Path(part["result"]).write_text(json.dumps({"returned": returned, "calls": calls.names}))
    return 0


def main(warm: Path) -> None:
    promotion.history(Workspace(warm))
    assert threading.active_count() == 1
    for line in sys.stdin:
        children = []
        for part in json.loads(line):
            if (pid := os.fork()) == 0:
                os._exit(serve(part))
            children.append(pid)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
