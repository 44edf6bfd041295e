"""What the stack keeps from other users of the machine: passwords that are made once, and the modes of its files."""

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from darkroom.files import digest_bytes
from flows.stack import database
from flows.stack.private import make_private, with_passwords, write_private
from flows.stack.settings import StackSettings, read_env
from tests.servers import free_port

MADE = {"POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_AUTH_STRING"}


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def settings(root: Path, **values: str) -> StackSettings:
    made = StackSettings(root, root / ".darkroom", values)
    make_private(made)
    return made


def test_passwords_are_made_once_kept_and_private(tmp_path: Path) -> None:
    first = with_passwords(settings(tmp_path))
    file = first.directory / "passwords.env"
    assert set(read_env(file)) == MADE
    assert mode(file) == 0o600
    values = [first[name] for name in MADE]
    assert len(set(values)) == 3
    assert all(len(value) >= 32 for value in values)
    content = file.read_bytes()
    assert with_passwords(settings(tmp_path)).values == first.values
    assert file.read_bytes() == content


def test_a_password_that_is_set_counts_and_is_not_written_down(tmp_path: Path) -> None:
    given = with_passwords(settings(tmp_path, POSTGRES_PASSWORD="theirs", PREFECT_API_AUTH_STRING=""))
    assert given["POSTGRES_PASSWORD"] == "theirs"
    assert given["PREFECT_API_AUTH_STRING"] == read_env(given.directory / "passwords.env")["PREFECT_API_AUTH_STRING"]
    assert "theirs" not in (given.directory / "passwords.env").read_text()


def test_what_a_shell_reads_comes_back_as_it_was(tmp_path: Path) -> None:
    write_private(tmp_path / "client.env", {"A": "a b'c$d", "B": "2"})
    assert mode(tmp_path / "client.env") == 0o600
    shown = subprocess.run(
        ["sh", "-c", 'set -a; . ./client.env; set +a; env | grep "^[AB]="'],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(shown.stdout.splitlines()) == ["A=a b'c$d", "B=2"]


def test_directories_and_logs_that_everybody_could_read_are_closed(tmp_path: Path) -> None:
    old = StackSettings(tmp_path, tmp_path / ".darkroom", {})
    old.logs.mkdir(parents=True)
    (old.logs / "worker.log").write_text("said\n")
    assert mode(old.directory) == 0o755
    make_private(old)
    assert mode(old.directory) & 0o007 == 0
    assert mode(old.directory) & 0o060 == 0, "PostgreSQL's user passes through, if any"
    assert mode(old.logs) == 0o700
    assert mode(old.logs / "worker.log") == 0o600
    (old.directory / "new").write_text("")
    assert mode(old.directory / "new") == 0o600


@pytest.mark.parametrize(
    ("inside", "outside", "entered", "expected"),
    [
        (False, False, True, "inside"),
        (False, False, False, "outside"),
        (False, True, True, "outside"),
        (True, True, True, "inside"),
        (True, False, True, "inside"),
    ],
)
def test_roots_database_is_where_its_user_can_enter_and_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool, outside: bool, entered: bool, expected: str
) -> None:
    made = StackSettings(tmp_path / "project", tmp_path / "project" / ".darkroom", {})
    elsewhere = tmp_path / "temporary"
    monkeypatch.setattr("os.getuid", lambda: 0)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(elsewhere))
    monkeypatch.setattr("pwd.getpwnam", lambda _: SimpleNamespace(pw_gid=4321))
    monkeypatch.setattr(database, "_lets_through", lambda parent, group: entered)
    places = {"inside": made.directory / "postgres"}
    key = digest_bytes(str(places["inside"]).encode())[:12]
    places["outside"] = elsewhere / f"darkroom-postgres-{key}"
    for name, there in (("inside", inside), ("outside", outside)):
        if there:
            (places[name] / "data").mkdir(parents=True)
    found = database._as_user(made, Path("/usr/bin"))
    assert found is not None
    assert found.directory == places[expected]


def test_a_database_that_was_made_with_another_password_takes_the_new_one(tmp_path: Path) -> None:
    """That of the first stacks was the same everywhere."""
    import psycopg2

    port = str(free_port())
    values = {"POSTGRES_USER": "dark-room", "POSTGRES_PASSWORD": "darkroom-local", "POSTGRES_PORT": port}
    root = Path(tempfile.mkdtemp(prefix="darkroom-"))
    root.chmod(0o755)
    try:
        old = database.find_postgres(StackSettings(root, root, values))
        if old is None:
            pytest.skip("no PostgreSQL server can be used here")
        old.prepare()
        (old.directory / "password.sha256").unlink()  # as it was before
        for password in ("o'ther\"$1", "third"):
            now = replace(old, settings=replace(old.settings, values=values | {"POSTGRES_PASSWORD": password}))
            now.prepare()
            user = {"user": now.user, "group": now.user, "extra_groups": []} if now.user else {}
            server = subprocess.Popen(now.command, cwd="/", env={"LC_ALL": "C"}, stderr=subprocess.DEVNULL, **user)
            try:
                deadline = time.monotonic() + 30
                while not now.answers():
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                psycopg2.connect(now.uri("mlflow")).close()
                with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
                    psycopg2.connect(old.uri("mlflow"))
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(20)
    finally:
        shutil.rmtree(root)
