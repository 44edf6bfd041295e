"""What only the user who runs the stack may read: its directory, its logs, its passwords."""

import os
import pwd
import secrets
import shlex
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from flows.stack.settings import StackSettings, read_env

_TOKEN = 24  # bytes


def make_private(settings: StackSettings) -> None:
    """Let nobody else into the stack's directory, or into what this process makes from now on.

    Root's PostgreSQL runs as the user postgres, who may pass through.
    """
    os.umask(0o077)
    for directory in (settings.state, settings.directory, settings.logs):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for directory in (settings.directory, settings.logs):
        directory.chmod(0o700)
    for log in settings.logs.iterdir():
        log.chmod(0o600)
    if os.getuid() == 0:
        with suppress(KeyError):
            group = pwd.getpwnam("postgres").pw_gid
            for directory in (settings.state, settings.directory):
                if directory.stat().st_mode & 0o077 == 0:
                    os.chown(directory, -1, group)
                    directory.chmod(0o710)


def with_passwords(settings: StackSettings) -> StackSettings:
    """The settings with a password wherever neither `stack.env` nor the environment has one.

    They are made once and kept in `passwords.env`.
    """
    file = settings.directory / "passwords.env"
    kept = read_env(file) if file.exists() else {}
    made = {"POSTGRES_PASSWORD": _token(), "PREFECT_API_AUTH_STRING": _token()}
    if not settings.values.get("AWS_ENDPOINT_URL"):  # else that server's, if any
        made["AWS_SECRET_ACCESS_KEY"] = _token()
    given = {name: value for name, value in settings.values.items() if value}
    passwords = made | kept
    if passwords != kept:
        write_private(file, passwords)
    return replace(settings, values=settings.values | {name: passwords[name] for name in made} | given)


def write_private(path: Path, values: Mapping[str, str]) -> None:
    """Write lines NAME=VALUE, quoted for a shell where need be, that only this user can read."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.writelines(f"{name}={shlex.quote(value)}\n" for name, value in sorted(values.items()))
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)


def _token() -> str:
    return secrets.token_urlsafe(_TOKEN)
