"""What the stack is told: `stack.env`, which `compose.yaml` reads too, under the environment."""

import os
from dataclasses import dataclass
from pathlib import Path

from darkroom.errors import InputError
from darkroom.workspace import Workspace

HOST = "127.0.0.1"


@dataclass(frozen=True)
class StackSettings:
    """Where the stack keeps its data, and the values of `stack.env` with the environment's over them."""

    root: Path
    state: Path  # of the project; the stack's own is in `directory`
    values: dict[str, str]

    @classmethod
    def load(cls, root: Path) -> "StackSettings":
        """Raises InputError for a file that is missing or not made of lines KEY=VALUE."""
        values, given = read_env(root / "stack.env"), dict(os.environ)
        own = f"http://{HOST}:{given.get('S3_PORT') or values.get('S3_PORT')}"
        if given.get("AWS_ENDPOINT_URL") == own:  # from `client.env`, which this shell has read
            del given["AWS_ENDPOINT_URL"]
        if given.get("AWS_ENDPOINT_URL"):  # another S3, with credentials of its own: a profile, a role
            values = {name: value for name, value in values.items() if not name.startswith("AWS_")}
        return cls(root, Workspace(root).state.resolve(), values | given)

    @property
    def directory(self) -> Path:
        return self.state / "stack"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def client_file(self) -> Path:
        """What a person's shell reads to use the stack."""
        return self.directory / "client.env"

    def __getitem__(self, name: str) -> str:
        if not self.values.get(name):
            raise InputError(f"{name} is not set: expected a value in stack.env or in the environment")
        return self.values[name]

    def port(self, name: str) -> int:
        """Raises InputError for what is no port."""
        value = self[name]
        if not (value.isdecimal() and 0 < int(value) < 65536):
            raise InputError(f"{name} = {value!r}: expected a port, 1 to 65535")
        return int(value)

    def url(self, name: str) -> str:
        """Where the service listens whose port has this name."""
        return f"http://{HOST}:{self.port(name)}"


def read_env(path: Path) -> dict[str, str]:
    """The variables of a file of lines KEY=VALUE; empty lines and lines that start with # say nothing."""
    if not path.is_file():
        raise InputError(f"{path}: not found; expected the stack's ports and names, one KEY=VALUE a line")
    values = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, equals, value = line.partition("=")
            if not equals or not name.isidentifier():
                raise InputError(f"{path}:{number}: expected KEY=VALUE, found {line!r}")
            values[name] = value
    return values
