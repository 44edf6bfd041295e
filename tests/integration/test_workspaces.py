"""Workspaces on real git and DVC: what they contain, what is refused, and what is left of them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from darkroom.errors import InputError, StageFailed
from darkroom.workspace import Workspace
from flows import raw_data
from flows.preflight import problems_of_project
from flows.settings import Settings
from flows.workspaces import keep, prune, workspace
from tests.pipeline.project import change, dvc, outcomes
from tests.s3 import empty_bucket, server

REPOSITORY = Path(__file__).parents[2]
COPY = "import shutil; shutil.copytree('data/raw', 'copied')"


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(dvc_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    root = dvc_project(copier=(COPY, {"deps": ["data/raw"], "outs": ["copied"]}))
    shutil.copy(REPOSITORY / "params.yaml", root)
    (root / "data" / "raw").mkdir(parents=True)
    (root / "data" / "raw" / ".gitkeep").touch()
    with (root / ".gitignore").open("a") as ignored:
        ignored.write((REPOSITORY / ".gitignore").read_text())
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")
    monkeypatch.setenv("DARKROOM_PROJECT", str(root))
    return root


def left(project: Path) -> list[str]:
    directory = project / ".darkroom" / "workspaces"
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


@pytest.mark.parametrize("kind", ["branch", "tag", "commit", "short commit", "HEAD"])
@pytest.mark.parametrize("place", ["path", "url"])
def test_a_workspace_is_the_project_at_a_ref(
    project: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    before = git(project, "rev-parse", "HEAD")
    git(project, "branch", "topic/one")
    git(project, "tag", "-m", "annotated", "v1")
    if kind != "HEAD":
        (project / "later").write_text("1")
        git(project, "add", "later")
        git(project, "commit", "-qm", "later")
    (project / "uncommitted").write_text("1")
    ref = {"branch": "topic/one", "tag": "v1", "commit": before, "short commit": before[:8], "HEAD": "HEAD"}[kind]
    if place == "url":
        monkeypatch.setenv("DARKROOM_REPOSITORY", project.as_uri())
    with workspace("nightly", ref) as root:
        assert root == project / ".darkroom" / "workspaces" / "nightly"
        assert git(root, "rev-parse", "HEAD") == before
        assert not (root / "later").exists()
        assert not (root / "uncommitted").exists()
        assert git(root, "status", "--porcelain") == ""
        assert (root / "dvc.yaml").is_file()
    assert left(project) == []


@pytest.mark.parametrize("place", ["path", "url"])
def test_a_wrong_ref_is_refused_with_those_that_there_are(
    project: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    git(project, "branch", "topic/one")
    git(project, "branch", "retrain/of-last-night")
    git(project, "tag", "v1")
    repository = str(project)
    if place == "url":
        repository = project.as_uri()
        monkeypatch.setenv("DARKROOM_REPOSITORY", repository)
    with pytest.raises(InputError) as caught, workspace("nightly", "mian"):
        pass
    assert str(caught.value) == (
        f"git ref 'mian' is no branch, tag or commit of {repository}: it has the branches master, topic/one and the"
        " tags v1"
    )
    assert left(project) == []


@pytest.mark.parametrize("ref", ["", "--upload-pack=x", "a b", "a:b", "a..b", "-x"])
def test_what_git_would_take_for_something_else_is_refused(project: Path, ref: str) -> None:
    with pytest.raises(InputError, match="expected a branch, a tag or a commit"), workspace("nightly", ref):
        pass
    assert left(project) == []


def test_a_repository_that_is_not_there_is_refused_without_its_password(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_REPOSITORY", "/nowhere")
    with pytest.raises(InputError, match="DARKROOM_REPOSITORY = '/nowhere'"), workspace("nightly", "main"):
        pass
    monkeypatch.setenv("DARKROOM_REPOSITORY", "http://me:secret@127.0.0.1:9/it.git")
    with pytest.raises(StageFailed, match="git ls-remote: fatal: unable to access") as caught:
        workspace("nightly", "main").__enter__()
    assert "secret" not in str(caught.value)
    assert left(project) == []


def test_parameters_are_replaced_with_their_comments_kept(project: Path) -> None:
    with workspace("nightly", "HEAD", {"train.steps": 7, "train.model.channels": [16, 32]}) as root:
        params = Workspace(root).params()
        assert (params.train.steps, params.train.model.channels) == (7, [16, 32])
        changed = git(root, "diff", "--unified=0", "params.yaml").splitlines()[4:]
    assert [line for line in changed if not line.startswith("@@")] == [
        "-    channels: [32, 64]      # one entry per resolution: 8x8, 4x4",
        "+    channels: [16, 32]      # one entry per resolution: 8x8, 4x4",
        "-  steps: 1400",
        "+  steps: 7",
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"train.stesp": 7}, 'params.yaml: train.stesp = 7: unknown key; did you mean "steps"?'),
        ({"trian.steps": 7}, 'params.yaml: trian: unknown key; did you mean "train"?'),
        ({"train.steps": 0}, "params.yaml: train.steps = 0: expected at least 1"),
        ({"train.steps": "7"}, "params.yaml: train.steps = '7': expected a whole number"),
        ({"train.steps.of": 7}, "params.yaml: train.steps.of: train.steps is no group of parameters"),
    ],
)
def test_a_wrong_parameter_is_refused_and_nothing_left(project: Path, params: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught, workspace("nightly", "HEAD", params):
        pass
    assert str(caught.value) == message
    assert left(project) == []


def test_raw_data_and_cache_are_shared_and_copied_nowhere(project: Path) -> None:
    raw = project / "data" / "raw"
    (raw / "images").mkdir()
    (raw / "images" / "1.png").write_bytes(b"1")
    (raw / ".2.png.part").write_bytes(b"half")
    with workspace("first", "HEAD") as root:
        assert (root / "data/raw/images/1.png").stat().st_ino == (raw / "images" / "1.png").stat().st_ino
        assert not (root / "data/raw/.2.png.part").exists()
        assert outcomes(dvc(root, "repro")) == {"copier": "ran"}
        lock = (root / "dvc.lock").read_bytes()
        assert (root / ".dvc" / "config.local").stat().st_mode & 0o777 == 0o600
    with workspace("second", "HEAD") as root:
        assert outcomes(dvc(root, "repro")) == {"copier": "restored"}
        assert (root / "dvc.lock").read_bytes() == lock
        copied = (root / "copied/images/1.png").stat()
        assert copied.st_nlink > 1
    assert not list((project / ".dvc" / "cache").rglob("*config*"))
    assert (project / ".dvc" / "cache" / "files").is_dir()


def test_remotes_of_the_project_are_reached_from_the_workspace(project: Path, tmp_path: Path) -> None:
    dvc(project, "remote", "add", "-d", "shared", "../storage")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "remote")
    dvc(project, "remote", "add", "--local", "private", "s3://bucket/x")
    dvc(project, "remote", "modify", "--local", "private", "secret_access_key", "x y='1'")
    with workspace("nightly", "HEAD") as root:
        listed = dvc(root, "config", "--list").splitlines()
        assert f"remote.shared.url={project.parent / 'storage'}" in listed
        assert "remote.private.secret_access_key=x y='1'" in listed
        dvc(root, "repro")
        dvc(root, "push")
    assert list((project.parent / "storage" / "files").rglob("*.dir"))


def test_the_environment_names_the_shared_state_while_the_workspace_is_there(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from darkroom.registry.tracking import tracking_uri

    monkeypatch.setenv("DARKROOM_STATE", "state")
    with workspace("nightly", "HEAD") as root:
        assert Workspace(root).state == project / "state"
        assert tracking_uri(Workspace(root)) == f"sqlite:///{project}/state/mlflow.db"
    assert os.environ["DARKROOM_STATE"] == "state"
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_of_failed_runs_the_newest_workspaces_stay(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_KEEP_WORKSPACES", "2")
    for number in range(4):
        with workspace(f"kept-{number}", "HEAD") as root:
            keep(root, "a stage failed")
    assert left(project) == ["kept-2", "kept-3"]
    with pytest.raises(RuntimeError, match="a defect"), workspace("raised", "HEAD"):
        raise RuntimeError("a defect")
    assert left(project) == ["kept-3", "raised"]


def test_a_workspace_in_use_is_neither_pruned_nor_given_twice(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_KEEP_WORKSPACES", "0")
    with workspace("one", "HEAD") as root:
        with workspace("two", "HEAD"):
            assert left(project) == ["one", "two"]
        assert (root / "dvc.yaml").is_file()
        with pytest.raises(StageFailed, match="workspace one is in use"), workspace("one", "HEAD"):
            pass
        assert (root / "dvc.yaml").is_file()
    assert left(project) == []


def test_a_killed_run_leaves_nothing_that_the_next_one_stumbles_over(project: Path) -> None:
    source = """
import os, signal
from flows.workspaces import workspace
with workspace("nightly", "HEAD"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", source], cwd=project, env=environment)
        assert killed.returncode == -9
        assert left(project) == ["nightly"]
    (project / ".darkroom" / "workspaces" / ".removed-1" / "half").mkdir(parents=True)
    with workspace("nightly", "HEAD") as root:
        assert (root / "dvc.yaml").is_file()
        assert left(project) == ["nightly"]
    assert left(project) == []


def test_a_full_disk_while_it_is_made_leaves_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flows.raw_data.link", full)
    with pytest.raises(StageFailed, match="the workspace cannot be made: No space left"), workspace("nightly", "HEAD"):
        pass
    assert left(project) == []


def test_names_of_runs_are_made_names_of_directories(project: Path) -> None:
    for name in ("../../up", "a b", "ä", "x" * 300, "retrain/2026"):
        with workspace(name, "HEAD") as root:
            assert root.parent == project / ".darkroom" / "workspaces"
            assert not root.name.startswith(".")
            assert len(root.name) < 100


def test_checkpoints_of_old_trainings_go_and_those_in_use_stay(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from darkroom.training import checkpoints

    monkeypatch.setenv("DARKROOM_KEEP_CHECKPOINTS", "2")
    directory = project / ".darkroom" / "checkpoints"
    for age, name in enumerate(("new", "newer-but-idle", "idle", "in-use", "without-lock")):
        (directory / name).mkdir(parents=True)
        if name != "without-lock":
            (directory / name / "lock").touch()
        (directory / name / "step-000000001.safetensors").write_bytes(b"1")
        os.utime(directory / name, (1e9 - age, 1e9 - age))
    script = "import sys; from pathlib import Path; from darkroom.training.checkpoints import locked\n"
    script += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(directory / "in-use")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout
        assert trainer.stdout.readline() == b"held\n"
        os.utime(directory / "in-use", (1e9 - 3, 1e9 - 3))
        prune(Settings.from_environment())
        assert sorted(path.name for path in directory.iterdir()) == ["in-use", "new", "newer-but-idle"]
        with pytest.raises(StageFailed, match="already training"), checkpoints.locked(directory / "in-use"):
            pass
        trainer.communicate(b"")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with server() as url:
        yield url


def test_raw_data_of_s3_is_fetched_once_for_all_and_a_run_keeps_what_it_saw(
    project: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(project, "data", source="s3://images/new")
    git(project, "commit", "-qam", "from S3")
    settings = Settings.from_environment()
    with empty_bucket(endpoint, "images", monkeypatch) as client:
        for name in ("1", "2"):
            client.put_object(Bucket="images", Key=f"new/{name}.png", Body=name.encode())
        with workspace("first", "HEAD") as first:
            synced = raw_data.sync(settings, first)
            assert synced is not None
            assert (synced.files, synced.new) == (2, 2)
            seen = first / "data/raw/s3/images/new"
            client.put_object(Bucket="images", Key="new/2.png", Body=b"changed")
            client.delete_object(Bucket="images", Key="new/1.png")
            with workspace("second", "HEAD") as second:
                there = second / "data/raw/s3/images/new/1.png"
                assert there.stat().st_ino == (seen / "1.png").stat().st_ino
                synced = raw_data.sync(settings, second)
                assert synced is not None
                assert (synced.files, synced.new, synced.changed, synced.removed) == (1, 0, 1, 1)
                assert not there.exists()
                assert there.with_name("2.png").read_bytes() == b"changed"
            assert {path.name: path.read_bytes() for path in seen.iterdir()} == {"1.png": b"1", "2.png": b"2"}
        for number in range(3):
            change(project, "data", source=f"s3://images/new/{number}")
            git(project, "commit", "-qam", f"source {number}")
            client.put_object(Bucket="images", Key=f"new/{number}/1.png", Body=b"1")
            with workspace("other", "HEAD") as root:
                raw_data.sync(settings, root)
        assert len(list(settings.raw.iterdir())) == raw_data.KEEP


def test_a_bucket_that_is_not_there_is_bad_input(project: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(project, "data", source="s3://nowhere/new")
    git(project, "commit", "-qam", "from S3")
    with empty_bucket(endpoint, "images", monkeypatch), workspace("first", "HEAD") as root:
        with pytest.raises(InputError, match="no bucket 'nowhere'"):
            raw_data.sync(Settings.from_environment(), root)
        assert problems_of_project(root) == [f"s3://nowhere/new: no bucket 'nowhere' at {endpoint}"]
        dvc(root, "remote", "add", "-q", "-d", "storage", "s3://no-storage/x")
        assert problems_of_project(root)[1:] == [
            f"DVC remote 'storage', s3://no-storage/x: no bucket 'no-storage' at {endpoint}"
        ]


def test_a_server_that_does_not_answer_is_no_bad_input(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(project, "data", source="s3://images/new")
    git(project, "commit", "-qam", "from S3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with workspace("first", "HEAD") as root:
        assert problems_of_project(root) == []  # it may answer when the data is fetched
        with pytest.raises(StageFailed, match=r"cannot reach http://127\.0\.0\.1:9"):
            raw_data.sync(Settings.from_environment(), root)


def test_a_profile_that_this_machine_lacks_is_bad_input(project: Path) -> None:
    with workspace("first", "HEAD") as root:
        dvc(root, "remote", "add", "-q", "-d", "storage", "s3://storage/x")
        dvc(root, "remote", "modify", "-q", "storage", "profile", "nobody")
        assert problems_of_project(root) == [
            "DVC remote 'storage', s3://storage/x: The config profile (nobody) could not be found"
        ]


def test_raw_data_that_dvc_tracks_is_there_after_a_sync(project: Path) -> None:
    photos = Workspace(project).raw / "photos"
    photos.mkdir(parents=True)
    (photos / "1.png").write_bytes(b"1")
    dvc(project, "add", "data/raw/photos")
    git(project, "add", "--all")
    git(project, "commit", "-qm", "photos")
    with workspace("first", "HEAD") as root:
        photos = Workspace(root).raw / "photos"
        assert not photos.exists()
        raw_data.sync(Settings.from_environment(), root)
        assert (photos / "1.png").read_bytes() == b"1"
        shutil.rmtree(photos)
        dvc(root, "checkout", "--quiet", "--allow-missing")  # finds it by itself
        assert (photos / "1.png").read_bytes() == b"1"
        assert git(root, "status", "--porcelain") == ""
