"""PostgreSQL for the stack, from the binaries of this machine; a database each for MLflow and Prefect."""

import hashlib
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from darkroom.errors import StageFailed
from darkroom.files import digest_bytes, write_text
from flows.stack.settings import HOST, StackSettings

DATABASES = ("mlflow", "prefect")
_INSTALLED = Path("/usr/lib/postgresql")  # Debian keeps the servers of each version apart, and not on PATH


@dataclass(frozen=True)
class Postgres:
    """A server's binaries, the directory of its data and the user who runs it (None: this one)."""

    binaries: Path
    directory: Path
    user: str | None
    settings: StackSettings

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def command(self) -> list[str]:
        options = {"listen_addresses": HOST, "unix_socket_directories": "", "port": self.settings["POSTGRES_PORT"]}
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return [str(self.binaries / "postgres"), "-D", str(self.data), *settings]

    def uri(self, database: str, driver: str = "postgresql") -> str:
        """SQLAlchemy's URI of a database, with the password."""
        user, password = (quote(self.settings[f"POSTGRES_{name}"], safe="") for name in ("USER", "PASSWORD"))
        return f"{driver}://{user}:{password}@{HOST}:{self.settings.port('POSTGRES_PORT')}/{database}"

    def answers(self) -> bool:
        """Whether it takes connections."""
        ask = [str(self.binaries / "pg_isready"), "-q", "-t", "2", "-h", HOST, "-p", self.settings["POSTGRES_PORT"]]
        return subprocess.run(ask, check=False).returncode == 0

    def prepare(self) -> None:
        """Make the databases unless they are there; the password is the one of the settings, whatever it was.

        Raises StageFailed with what the server says.
        """
        if not self.data.is_dir():
            self._create()
        digest = digest_bytes(self.settings["POSTGRES_PASSWORD"].encode())
        marker = self.directory / "password.sha256"
        if not marker.exists() or marker.read_text() != digest:
            user, password = self.settings["POSTGRES_USER"], self.settings["POSTGRES_PASSWORD"]
            quoted = "\"{}\" PASSWORD '{}'".format(user.replace('"', '""'), password.replace("'", "''"))
            self._alone(self.data, f"ALTER ROLE {quoted};")
            write_text(marker, digest)

    def _create(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.user is not None:
            self._refuse_foreign()
            shutil.chown(self.directory, self.user, self.user)
        new = self.directory / "data.new"  # left by one that was interrupted
        shutil.rmtree(new, ignore_errors=True)
        with tempfile.NamedTemporaryFile("w", dir=self.directory, prefix="password-") as password:
            password.write(self.settings["POSTGRES_PASSWORD"])
            password.flush()
            if self.user is not None:
                shutil.chown(password.name, self.user)
            sign_in = ["-U", self.settings["POSTGRES_USER"], "-A", "scram-sha-256", "--pwfile", password.name]
            self._run("initdb", "-D", str(new), "-E", "UTF8", "--locale", "C", *sign_in)
        self._alone(new, *(f"CREATE DATABASE {name};" for name in DATABASES))
        new.rename(self.data)

    def _alone(self, data: Path, *statements: str) -> None:
        """Let the server do something before it listens: nobody else can come first. What fails is not logged."""
        text = "".join(f"{statement}\n\n" for statement in statements)
        silent = ["-c", "log_min_error_statement=panic"]
        self._run("postgres", "--single", "-j", *silent, "-D", str(data), "postgres", text=text)

    def _refuse_foreign(self) -> None:
        """Raise StageFailed for a directory that somebody else made: root must not give away what it leads to."""
        ours = {os.getuid(), pwd.getpwnam(self.user or "").pw_uid}
        if self.directory.is_symlink() or self.directory.stat().st_uid not in ours:
            raise StageFailed(f"{self.directory}: is another user's, or a link; remove it")

    def _run(self, program: str, *arguments: str, text: str = "") -> None:
        done = subprocess.run(
            [str(self.binaries / program), *arguments],
            cwd=self.directory,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user else None,
        )
        if done.returncode != 0 or "ERROR: " in done.stdout:
            said = " ".join(done.stdout.split())[-500:]
            raise StageFailed(f"{self.directory}: {program} failed: {said}")


def find_postgres(settings: StackSettings) -> Postgres | None:
    """PostgreSQL if its server is installed and can run here. A stack that began with SQLite stays with it."""
    if sqlite_file(settings, "prefect").exists():
        return None
    on_path = shutil.which("postgres")
    candidates = [Path(on_path).resolve().parent] if on_path else []
    candidates += sorted(_INSTALLED.glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    for binaries in candidates:
        if all((binaries / name).exists() for name in ("postgres", "initdb", "pg_isready")):
            return _as_user(settings, binaries)
    return None


def sqlite_file(settings: StackSettings, database: str) -> Path:
    """Where a database is without PostgreSQL."""
    return settings.directory / f"{database}.db"


def _as_user(settings: StackSettings, binaries: Path) -> Postgres | None:
    directory = settings.directory / "postgres"
    if os.getuid() != 0:
        return Postgres(binaries, directory, None, settings)
    # The server refuses to run as root.
    try:
        group = pwd.getpwnam("postgres").pw_gid
    except KeyError:
        return None
    key = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    outside = Path(tempfile.gettempdir()) / f"darkroom-postgres-{key}"
    moved = (outside / "data").is_dir() and not (directory / "data").is_dir()
    if moved or not all(_lets_through(parent, group) for parent in directory.parents if parent.exists()):
        directory = outside
    return Postgres(binaries, directory, "postgres", settings)


def _lets_through(directory: Path, group: int) -> bool:
    status = directory.stat()
    return bool(status.st_mode & 0o001 or (status.st_gid == group and status.st_mode & 0o010))
