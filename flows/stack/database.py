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

    def create(self) -> None:
        """Make the databases unless they are there. Raises StageFailed with what the server says."""
        if self.data.is_dir():
            return
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
        # The server alone, without a network: nobody else can come first.
        statements = "".join(f"CREATE DATABASE {name};\n" for name in DATABASES)
        self._run("postgres", "--single", "-j", "-D", str(new), "postgres", text=statements.replace("\n", "\n\n"))
        new.rename(self.data)

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
        if done.returncode != 0:
            said = " ".join(done.stdout.split())[-500:]
            raise StageFailed(f"{self.directory}: {program} could not make the database: {said}")


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
        pwd.getpwnam("postgres")
    except KeyError:
        return None
    if not all(parent.stat().st_mode & 0o001 for parent in directory.parents if parent.exists()):
        key = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
        directory = Path(tempfile.gettempdir()) / f"darkroom-postgres-{key}"
    return Postgres(binaries, directory, "postgres", settings)
