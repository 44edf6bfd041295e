"""One command at a time changes the registry: in this checkout, and on all hosts that use the same server."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.errors import InputError, StageFailed
from darkroom.registry import recovery
from darkroom.registry.journal import Entry
from darkroom.registry.lease import POLL_SECONDS, Lease
from darkroom.registry.tracking import connect, current, tracking_uri, unavailable_is_one_line
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

_WAIT_SECONDS = 600.0

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def registry(workspace: Workspace) -> Iterator["MlflowClient"]:
    """A client for one command that changes the registry, after what others left behind has been settled.

    Waits for other commands, `DARKROOM_REGISTRY_WAIT` seconds at most (600). Raises StageFailed, naming the holder, if
    that was not enough, and RegistryUnavailable if the server does not answer.
    """
    with leased(workspace) as held:
        yield held.client


@dataclass(frozen=True)
class Held:
    """The registry, while it is this command's alone."""

    client: "MlflowClient"
    lease: Lease
    completed: list[Entry]  # what was interrupted, and had to be finished first


@contextlib.contextmanager
def leased(workspace: Workspace) -> Iterator[Held]:
    """`registry`, for commands that have to know that the lease is still theirs, and what was found."""
    name, seconds, uri = workspace.params().registry.name, wait_seconds(), tracking_uri(workspace)
    client = connect(workspace)
    with unavailable_is_one_line(uri), current(uri), alone_in_checkout(workspace.state / "registry.lock", seconds):
        lease = Lease.acquire(client, name, seconds)
        try:
            yield Held(client, lease, recovery.settle(client, workspace, name))
        finally:
            lease.release()


def wait_seconds() -> float:
    """`DARKROOM_REGISTRY_WAIT`. Raises InputError if it is no number of seconds."""
    text = os.environ.get("DARKROOM_REGISTRY_WAIT") or str(_WAIT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise InputError(f"DARKROOM_REGISTRY_WAIT = {text!r}: expected seconds, 0 or more")
    return seconds


@contextlib.contextmanager
def alone_in_checkout(path: Path, seconds: float) -> Iterator[None]:
    """Keep other commands of this checkout out, without asking the server."""
    path.parent.mkdir(parents=True, exist_ok=True)
    until, said = time.monotonic() + seconds, False
    with path.open("a+") as file:
        while not _locked(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() >= until:
                raise StageFailed(
                    f"{holder} is changing the registry from this checkout; waited {seconds:g} s for it "
                    "(DARKROOM_REGISTRY_WAIT); repeat this when it is done"
                )
            if not said:
                _logger.info("waiting for %s, which is changing the registry from this checkout", holder)
                said = True
            time.sleep(POLL_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
