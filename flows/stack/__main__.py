"""`python -m flows.stack [status | stop SERVICE | start SERVICE]`; without a word it runs the stack until Ctrl-C."""

import argparse
import contextlib
import fcntl
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from darkroom.errors import InputError, StageFailed
from darkroom.files import read_json
from darkroom.workspace import Workspace
from flows.stack.private import make_private, with_passwords, write_private
from flows.stack.services import Service, client_environment, services
from flows.stack.settings import HOST, StackSettings
from flows.stack.supervisor import Supervisor


def main(arguments: list[str]) -> int:
    """0 after a clean stop, or if all is well; 1 if a service does not start or is not well; 2 for bad settings."""
    parser = argparse.ArgumentParser(prog="python -m flows.stack", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["up", "status", "stop", "start"], default="up")
    parser.add_argument("service", nargs="?", help="for stop and start")
    given = parser.parse_args(arguments)
    try:
        settings = StackSettings.load(Workspace.find().root)
        if given.action == "up":
            return up(settings)
        if given.action == "status":
            return status(settings)
        return hold(settings, given.service, stopped=given.action == "stop")
    except (InputError, StageFailed) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def up(settings: StackSettings) -> int:
    """Run the stack until it is asked to stop."""
    make_private(settings)
    with _alone(settings.directory):
        settings = with_passwords(settings)
        write_private(settings.client_file, client_environment(settings))
        stack = services(settings)
        _check_ports(settings, stack)
        if not any(service.name == "postgres" for service in stack):
            _say("No PostgreSQL that can be used is installed: MLflow and Prefect keep SQLite files.")
        _say(f"Starting {', '.join(service.name for service in stack)}; logs in {settings.logs}")
        supervisor = Supervisor(stack, settings.root, settings.directory, _say)
        supervisor.run(lambda seconds: _say(_directions(settings, stack, seconds)))
        _say("Stopped.")
    return 0


def status(settings: StackSettings) -> int:
    """Print the condition of every service; 0 if all are well."""
    state = _running(settings)
    for name, found in state["services"].items():
        print(f"{name:<9} {found['condition']:<9} {found['shows']}")
    return 0 if all(found["condition"] in ("well", "done") for found in state["services"].values()) else 1


def hold(settings: StackSettings, service: str | None, *, stopped: bool) -> int:
    """Let the supervisor stop a service and leave it so, or start it again."""
    known = _running(settings)["services"]
    if service is None or service not in known:
        raise InputError(f"{service or 'no service'}: expected one of {', '.join(known)}")
    file = settings.directory / "stopped" / service
    if stopped:
        file.touch()
    else:
        file.unlink(missing_ok=True)
    return 0


def _running(settings: StackSettings) -> Any:
    try:
        with _alone(settings.directory):
            pass
    except StageFailed:
        return read_json(settings.directory / "running.json")
    raise StageFailed("The stack does not run: make stack")


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Raises StageFailed while the stack of this checkout runs."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"The stack of this checkout runs already, in {directory}: python -m flows.stack status"
            raise StageFailed(message) from None
        yield


def _check_ports(settings: StackSettings, stack: list[Service]) -> None:
    """Raises InputError for a port that something else listens on."""
    for service in stack:
        if service.port is not None:
            port = settings.port(service.port)
            with socket.socket() as probe:
                probe.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # as servers do; old connections do not count
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    raise InputError(
                        f"{service.name}: port {port} cannot be used ({os.strerror(error.errno or 0)}): "
                        f"set {service.port} to another, in the environment or in stack.env"
                    ) from error


def _directions(settings: StackSettings, stack: list[Service], seconds: float) -> str:
    return "\n".join(
        [
            f"All well after {seconds:.0f} s.",
            *(f"  {service.name:<9} {service.shows}" for service in stack),
            "",
            "In another terminal:",
            f"  set -a; . {shlex.quote(str(settings.client_file))}; set +a    # addresses, keys, passwords",
            "  prefect deployment run retrain/retrain                    # now instead of at night",
            f"  aws s3 cp --recursive images/ s3://{settings['S3_BUCKET']}/images/    # or any S3 client",
            "  python -m flows.stack status",
            "Prefect's pages ask for the value of PREFECT_API_AUTH_STRING in that file.",
            "",
            "Ctrl-C stops it all; a run that is under way saves first, and the next one carries on.",
        ]
    )


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
