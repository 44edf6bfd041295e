"""What the flows' command lines share: checks before anything starts, one server, one exit code, one last line."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State

from darkroom.errors import InputError, StageFailed
from darkroom.registry.tracking import first_line, shown
from darkroom.workspace import Workspace
from flows.dvc_stage import stage_order
from flows.processes import leash
from flows.view import view

_EXIT_CODES = {"BadInput": 2, "NotReady": 2, "Interrupted": 75}


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m module`, for further arguments to be added."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument("--force", action="store_true", help="run every stage, also those that are up to date")
    return made


def run_flow(
    flow: Callable[[Workspace], State[Any]],
    report: Callable[[Workspace, State[Any]], str] = lambda workspace, state: "",
    *,
    title: str = "",
    parts: Sequence[str] = (),
) -> int:
    """Run `flow(workspace)` for the project here; print its report, or what went wrong last, and return the exit code.

    With a `title`, a terminal shows a view of the pipeline's stages and `parts` meanwhile, and logs go to a file.
    0 done; 1 failed; 2 bad input or parameters, found before a server starts where possible; 75 interrupted, and the
    same command carries on.
    """
    # Ended by SIGTERM like by Ctrl-C: stages are stopped, the server too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = None
    try:
        workspace = Workspace.find()
        workspace.params()
        shown = [*stage_order(workspace.root), *parts]
        with view(title, shown, workspace.state / "logs") if title else contextlib.nullcontext() as log, server():
            state = flow(workspace)
    except InputError as error:
        return _say_last(str(error), 2)
    except StageFailed as error:
        return _say_last(str(error), 1, log)
    except KeyboardInterrupt:
        return _say_last("Interrupted: nothing is left running; the same command carries on.", 75)
    if state.is_completed():
        print(report(workspace, state), end="", flush=True)
        return 0
    return _say_last(state.message or state.name or "failed", _EXIT_CODES.get(state.name or "", 1), log)


@contextlib.contextmanager
def server() -> Iterator[None]:
    """Start Prefect's own server, unless one is configured, so that it neither dies early nor stays behind.

    Ctrl-C in a terminal reaches every process of the foreground group. The server has to survive it until the run's
    end is recorded, so it is started from a thread that blocks SIGINT: a child inherits that. Raises StageFailed if no
    server answers.
    """
    errors: list[BaseException] = []

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with get_client(sync_client=True) as client:
                client.hello().raise_for_status()
        except Exception as error:
            errors.append(error)

    starter = threading.Thread(target=start, daemon=True)
    starter.start()
    while starter.is_alive():
        starter.join(0.1)
    if errors:
        where = os.environ.get("PREFECT_API_URL")
        what = (
            f"PREFECT_API_URL = {shown(where)}: no Prefect server answers there"
            if where
            else "no Prefect server starts"
        )
        raise StageFailed(f"{what}: {first_line(errors[0])}") from errors[0]
    with contextlib.ExitStack() as stack:
        for child in psutil.Process().children():
            if any("prefect.server" in word for word in child.cmdline()):
                stack.enter_context(leash(str(child.pid), grace=5))
        try:
            yield
        finally:  # that the server stops is not the last thing to read
            logging.getLogger("prefect").setLevel(logging.WARNING)


def _say_last(message: str, code: int, log: Path | None = None) -> int:
    sys.stdout.flush()
    print(message, *([f"The log: {log}"] if log else []), sep="\n", file=sys.stderr)
    return code
