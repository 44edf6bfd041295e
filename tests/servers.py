"""Servers for tests, each a real one on a port of its own: PostgreSQL, and MLflow's tracking server."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PASSWORD = "a-database's-password"  # has to be quoted in a URI, as real ones have
_QUOTED = "a-database%27s-password"


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def postgres() -> Iterator["Postgres"]:
    """A PostgreSQL of its own that asks for a password. Skips the test where there is no `initdb`.

    The server refuses to run as root, so root runs it as the user postgres, in a directory that this user can enter.
    """
    initdb, pg_ctl = shutil.which("initdb"), shutil.which("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("no PostgreSQL server is installed: initdb and pg_ctl are not on PATH")
    user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    root = Path(tempfile.mkdtemp(prefix="darkroom-postgres-"))
    (root / "password").write_text(PASSWORD)
    if os.getuid() == 0:
        for path in (root, root / "password"):
            shutil.chown(path, user)
    server = Postgres(root, pg_ctl, user, free_port())
    try:
        signs_in = ("-U", "darkroom", "-A", "scram-sha-256", "--pwfile", "password")
        server.run(initdb, "-D", "data", "-E", "UTF8", "--no-sync", *signs_in)
        server.start()
        yield server
    finally:
        if (root / "data" / "postmaster.pid").exists():
            server.stop()
        shutil.rmtree(root)


@dataclass
class Postgres:
    """A database server in the directory `root`."""

    root: Path
    pg_ctl: str
    user: str
    port: int

    def uri(self, database: str = "postgres") -> str:
        """SQLAlchemy's URI of a database, with the password."""
        return f"postgresql://darkroom:{_QUOTED}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """The URI of a new, empty database."""
        import sqlalchemy

        engine = sqlalchemy.create_engine(self.uri(), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f'CREATE DATABASE "{database}"'))
        engine.dispose()
        return self.uri(database)

    def start(self) -> None:
        options = f"-p {self.port} -k {self.root} -c listen_addresses=127.0.0.1 -F"
        self.run(self.pg_ctl, "-D", "data", "-l", "log", "-o", options, "-w", "start")

    def stop(self) -> None:
        self.run(self.pg_ctl, "-D", "data", "-m", "immediate", "-w", "stop")

    def run(self, *command: str) -> None:
        as_user = {"user": self.user, "group": self.user, "extra_groups": []} if os.getuid() == 0 else {}
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        with (self.root / "output").open("w+") as output:  # a pipe would stay open in the server
            done = subprocess.run(command, cwd=self.root, env=environment, stdout=output, stderr=output, **as_user)
            output.seek(0)
            assert done.returncode == 0, output.read()


@dataclass
class TrackingServer:
    """`mlflow server` with a database and a place for artifacts; start and stop it as often as needed."""

    backend: str
    artifacts: str
    directory: Path
    app: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.directory / "server.log").read_text()

    def start(self) -> None:
        """Run it until it answers; a minute at most."""
        self.directory.mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.backend, "--artifacts-destination", self.artifacts]
        if self.app is not None:
            command += ["--app-name", self.app]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self.environment}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.1)

    def kill(self) -> None:
        """End it at once, with all of its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def tracking_server(server: TrackingServer) -> Iterator[TrackingServer]:
    """That server, answering."""
    try:
        server.start()
        yield server
    finally:
        server.kill()
