"""A version whose author means harm, checked out with the real DVC: none of it runs or writes elsewhere."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from darkroom.cli import main
from darkroom.errors import InputError, StageFailed
from darkroom.files import write_bytes, write_text
from darkroom.registry import dvc_outputs
from darkroom.registry.checkout import checkout
from darkroom.registry.promotion import register
from darkroom.registry.snapshot import fetch_snapshot, log_snapshot, pack
from darkroom.registry.tracking import connect
from darkroom.registry.versions import PROJECT_TAG, run_of
from darkroom.workspace import Workspace
from tests import forks
from tests.integration.checkout_project import OUTPUTS, dvc, files_of, make_tracked
from tests.integration.registry_project import empty_database

__all__ = ["empty_database"]  # a fixture

URI = "models:/digits/1"
Change = Callable[[dict[str, bytes]], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> Iterator[Path]:
    """A project that registered version 1; its remote is a directory beside it."""
    root = tmp_path_factory.mktemp("source") / "project"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DARKROOM_ARTIFACT_ROOT", "DARKROOM_STATE"):
            patch.delenv(name, raising=False)
        project = make_tracked(root, "s3://models/cache")
        dvc(root, "remote", "add", "--local", "--force", "--default", "storage", remote_of(root))
        write_bytes(project.state / "mlflow.db", empty_database)
        register(project)
        dvc(root, "push")
        yield root


@pytest.fixture
def place(tmp_path: Path) -> Path:
    empty = tmp_path / "empty"
    empty.mkdir()
    return empty


@pytest.fixture
def registry(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """`registry(change)`: a registry of its own whose version 1 has the files that `change` leaves of its project's."""
    monkeypatch.setattr(dvc_outputs, "subprocess", forks)
    shutil.copy(source / ".darkroom/mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")

    def altered(change: Change) -> None:
        client = connect(Workspace(source))
        version = client.get_model_version("digits", "1")
        run = run_of(version)
        files = fetch_snapshot(client, run, version.tags[PROJECT_TAG])
        change(files)
        client.set_model_version_tag("digits", "1", PROJECT_TAG, log_snapshot(client, run, pack(files)))

    return altered


def remote_of(source: Path) -> str:
    return str(source.parent / "remote")


def run(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as done:
        main(["checkout", URI, *arguments])
    assert isinstance(done.value.code, int)
    return done.value.code


def with_stage(files: dict[str, bytes], deps: list[str], outs: dict[str, str]) -> None:
    """A further stage in dvc.yaml and dvc.lock; `outs` have digests."""
    pipeline, lock = (yaml.safe_load(files[name]) for name in ("dvc.yaml", "dvc.lock"))
    pipeline["stages"]["more"] = {"cmd": "exit 1", "deps": deps, "outs": list(outs)}
    lock["stages"]["more"] = {
        "cmd": "exit 1",
        "deps": [{"path": path} for path in deps],
        "outs": [{"path": path, "hash": "md5", "md5": digest} for path, digest in outs.items()],
    }
    files["dvc.yaml"], files["dvc.lock"] = (yaml.safe_dump(content).encode() for content in (pipeline, lock))


def names_a_command(files: dict[str, bytes]) -> None:
    """DVC's S3 reads a file of the version, and that names a command which prints credentials."""
    with_stage(files, ["tools"], {})
    files["tools/aws"] = f"[default]\ncredential_process = touch {files['marker'].decode()}\n".encode()
    files[".dvc/config"] = b"[core]\nremote = s\n['remote \"s\"']\nurl = s3://bucket/x\nconfigpath = ../tools/aws\n"


def brings_an_environment(files: dict[str, bytes]) -> None:
    with_stage(files, [".venv"], {})
    files[".venv/lib/python3.11/site-packages/x.pth"] = b"import os\n"


def brings_what_python_imports_at_its_start(files: dict[str, bytes]) -> None:
    with_stage(files, ["src"], {})
    files["src/sitecustomize.py"] = b"import os\n"


def writes_outside(files: dict[str, bytes]) -> None:
    with_stage(files, [], {"../outside": hashlib.md5(b"x").hexdigest()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (names_a_command, "configpath"),
        (brings_an_environment, ".venv"),
        (brings_what_python_imports_at_its_start, "sitecustomize"),
        (writes_outside, "../outside"),
    ],
)
def test_a_version_that_would_run_or_write_elsewhere_is_refused_before_anything_is_written(
    place: Path,
    registry: Callable[[Change], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    message: str,
) -> None:
    marker = place.parent / "ran"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # with them nobody asks for others
        monkeypatch.delenv(name)

    def with_marker(files: dict[str, bytes]) -> None:
        files["marker"] = str(marker).encode()
        change(files)
        del files["marker"]

    registry(with_marker)
    assert run(place, monkeypatch, "--force", "--trust-remote", "s3://bucket/x") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(place.iterdir()) == []
    assert not marker.exists()


def test_a_remote_whose_listing_leads_elsewhere_is_not_followed(
    source: Path, place: Path, registry: Callable[[Change], None], tmp_path: Path
) -> None:
    evil = tmp_path / "far/remote"
    shutil.copytree(remote_of(source), evil)
    content, above = hashlib.md5(b"x").hexdigest(), "ee" + "/.." * 5 + "/by-digest"
    listing = json.dumps([{"md5": above, "relpath": "x"}, {"md5": content, "relpath": "../../by-name"}]).encode()
    digest = hashlib.md5(listing).hexdigest()
    write_bytes(evil / "files/md5" / digest[:2] / f"{digest[2:]}.dir", listing)
    write_bytes(evil / "files/md5" / content[:2] / content[2:], b"x")
    (evil / "files/md5/ee").mkdir(exist_ok=True)
    (tmp_path / "by-digest").write_text("x")  # that is where the path leads on the remote

    def change(files: dict[str, bytes]) -> None:
        with_stage(files, [], {"data/more": f"{digest}.dir"})
        files[".dvc/config"] = f"[core]\nremote = s\n['remote \"s\"']\nurl = {evil}\n".encode()

    registry(change)
    with pytest.raises(StageFailed, match="is none that DVC makes"):
        checkout(Workspace(place), URI, trusted=[str(evil)])
    assert not (place / "by-name").exists()
    assert not (place / "by-digest").exists()
    assert not (place / "data/more").exists()


def test_a_remote_that_nobody_named_is_asked_for(
    source: Path,
    place: Path,
    registry: Callable[[Change], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registry(lambda files: None)
    remote = remote_of(source)
    assert run(place, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"takes data from {remote}, which this project's own configuration does not name" in line
    assert f"--trust-remote '{remote}' agrees to that, --no-data leaves it" in line
    assert list(place.iterdir()) == []

    assert run(place, monkeypatch, "--no-data") == 0
    told = capsys.readouterr().out
    assert f"its data is also on {remote}; --trust-remote '{remote}' fetches from there" in told
    assert remote not in (place / ".dvc/config").read_text()
    assert not (place / "models/ema.safetensors").exists()

    asked = []

    def agrees(where: str) -> bool:
        asked.append(where)
        return True

    assert checkout(Workspace(place), URI, agrees=agrees).outputs == OUTPUTS
    assert asked == [remote]
    assert checkout(Workspace(place), URI).remotes == {}, "now it is the project's own"


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\n", 2), ("", 2), ("no\n", 2)])
def test_on_a_terminal_the_user_says_whether_to_fetch(
    source: Path,
    place: Path,
    registry: Callable[[Change], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    code: int,
) -> None:
    registry(lambda files: None)
    typed = os.pipe()
    os.write(typed[1], answer.encode())
    os.close(typed[1])
    with os.fdopen(typed[0]) as keyboard:
        monkeypatch.setattr(keyboard, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdin", keyboard)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        assert run(place, monkeypatch) == code
    assert f"takes data from {remote_of(source)}, which this project does not name. Fetch" in capsys.readouterr().err
    assert (place / "dvc.yaml").exists() == (code == 0)


def test_nothing_of_a_version_runs_and_it_is_told_first_what_will(
    source: Path, place: Path, registry: Callable[[Change], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = place.parent / "ran"
    touch = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n".encode()

    def change(files: dict[str, bytes]) -> None:
        for name in list(files):
            if name.endswith(".py"):
                files[name] = touch
        for name in ("src/darkroom/__init__.py", "src/darkroom/cli.py", "src/darkroom/registry/__init__.py"):
            files[name] = touch
        files["flows/__init__.py"], files["Makefile"] = touch, f"$(shell touch {marker})\n".encode()
        files["dvc.yaml"] = files["dvc.yaml"].replace(b"exit 1", f"touch {marker}".encode())
        files["dvc.lock"] = files["dvc.lock"].replace(b"exit 1", f"touch {marker}".encode())

    registry(change)
    told: list[str] = []

    def tell(notice: str) -> None:
        assert list(place.iterdir()) == []
        told.append(notice)

    monkeypatch.syspath_prepend(str(place / "src"))  # as where the project is installed as editable
    done = checkout(Workspace(place), URI, trusted=[remote_of(source)], tell=tell)
    assert done.outputs == OUTPUTS
    assert not marker.exists()
    assert told == [done.notice]
    assert (
        f"digits version 1 was registered by {done.registered_by} from commit {str(done.commit)[:12]}; " in done.notice
    )
    assert "the next `dvc repro`, `darkroom promote`, `make` target or flow in this directory does" in done.notice


def test_in_a_users_project_the_users_own_remote_of_that_name_is_used(
    source: Path, tmp_path: Path, registry: Callable[[Change], None]
) -> None:
    root = tmp_path / "own"
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(".darkroom"), symlinks=True)

    def change(files: dict[str, bytes]) -> None:
        files[".dvc/config"] = b"[core]\nremote = storage\n['remote \"storage\"']\nurl = s3://elsewhere\n"

    registry(change)
    before = files_of(root)
    assert checkout(Workspace(root), URI).remotes == {}
    assert files_of(root) == before
    write_text(root / "params.yaml", "mine: 1\n")
    with pytest.raises(InputError, match="exist nowhere else"):
        checkout(Workspace(root), URI)
