"""From a version alone back to the project, with the real DVC: in a checkout, a fresh clone, an empty directory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from darkroom.cli import main
from darkroom.errors import InputError, StageFailed
from darkroom.files import write_bytes
from darkroom.registry import dvc_outputs
from darkroom.registry.checkout import checkout
from darkroom.registry.promotion import register
from darkroom.registry.tracking import connect
from darkroom.workspace import Workspace
from tests import forks, s3
from tests.integration.checkout_project import OUTPUTS, SECRET, STAGES, dvc, files_of, git, make_tracked
from tests.integration.registry_project import empty_database, set_params

__all__ = ["empty_database"]  # a fixture

Darkroom = Callable[..., tuple[int, str, str]]

CHAMPION = "models:/digits/1"
REMOTE = "s3://models/cache"
TRUSTING = ("--trust-remote", REMOTE)
NOT_BROUGHT = {"docs/index.md", "models/.gitignore", "reports/.gitignore", "reports/train/.gitignore"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> Iterator[Path]:
    """A project that registered version 1 and pushed its outputs; tests read it, and none changes it."""
    root = tmp_path_factory.mktemp("source") / "project"
    with pytest.MonkeyPatch.context() as patch, s3.server() as endpoint:
        for name in ("MLFLOW_TRACKING_URI", "DARKROOM_ARTIFACT_ROOT", "DARKROOM_STATE"):
            patch.delenv(name, raising=False)
        with s3.empty_bucket(endpoint, "models", patch):
            for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):  # DVC wants files to be files
                patch.setenv(name, str(tmp_path_factory.mktemp("aws") / "empty"))
                Path(os.environ[name]).touch()
            project = make_tracked(root, REMOTE)
            write_bytes(project.state / "mlflow.db", empty_database)
            register(project)
            dvc(root, "push")
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project.state / 'mlflow.db'}")
            yield root


@pytest.fixture
def later(source: Path, tmp_path: Path) -> Path:
    """The project after more work: other parameters and code, a new module, outputs of another training."""
    root = tmp_path / "later"
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(".darkroom"), symlinks=True)
    set_params(Workspace(root), "train", steps=50)
    (root / "src/darkroom/train.py").write_text("train = 2\n")
    (root / "src/darkroom/data/augment.py").write_text("new = 1\n")
    (root / "models/run.json").write_text("{}\n")
    dvc(root, "commit", "-q", "-f")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "later")
    return root


def nothing_to_do(root: Path) -> bool:
    said = dvc(root, "repro")
    return all(f"Stage '{stage}' didn't change, skipping" in said for stage in STAGES)


@pytest.fixture(autouse=True)
def quick_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout starts DVC four times."""
    monkeypatch.setattr(dvc_outputs, "subprocess", forks)


@pytest.fixture
def darkroom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Darkroom:
    """`darkroom(root, arguments…)`: the exit code of the command in that directory, and what it prints."""

    def run(root: Path, *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(root)
            with pytest.raises(SystemExit) as done:
                main(list(arguments))
        assert isinstance(done.value.code, int)
        return done.value.code, *capsys.readouterr()

    return run


def test_a_checkout_that_went_on_is_brought_back_from_its_own_cache(
    source: Path, later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing is fetched
    head, expected = git(later, "rev-parse", "HEAD"), files_of(source)
    (later / "docs/index.md").write_text("work that has nothing to do with it\n")
    done = checkout(Workspace(later), CHAMPION)
    assert set(done.written) == {"params.yaml", "dvc.lock", "src/darkroom/train.py"}
    assert done.removed == ["src/darkroom/data/augment.py"]
    assert (done.outputs, done.pending, done.dirty, done.remotes) == (OUTPUTS, {}, False, {})
    found = files_of(later)
    assert found.pop("docs/index.md") == b"work that has nothing to do with it\n"
    expected.pop("docs/index.md")
    assert found == expected
    assert git(later, "rev-parse", "HEAD") == head
    assert done.head == head.strip()
    assert nothing_to_do(later)
    again = checkout(Workspace(later), CHAMPION)
    assert (again.written, again.removed, again.pending) == ([], [], {})
    assert not (later / ".darkroom").exists()


def test_a_fresh_clone_gets_the_remote_and_everything_from_it(source: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(source), str(clone))
    command = [sys.executable, "-m", "darkroom", "checkout", CHAMPION, *TRUSTING]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "`dvc repro` has nothing to do"
    assert "DVC's remote 'storage' was added: s3://models/cache" in done.stdout
    assert files_of(clone) == files_of(source)
    assert git(clone, "status", "--porcelain") == ""
    assert (clone / ".dvc/config.local").stat().st_mode & 0o777 == 0o600
    assert nothing_to_do(clone)


def test_an_empty_directory_becomes_the_project_without_git(source: Path, tmp_path: Path, darkroom: Darkroom) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code, out, err = darkroom(empty, "checkout", CHAMPION, "--json", *TRUSTING)
    assert code == 0, err
    told = json.loads(out)
    assert "registered by" in told["notice"]
    assert (told["head"], told["pending"], told["outputs"], told["removed"]) == (None, {}, OUTPUTS, [])
    expected = {name: content for name, content in files_of(source).items() if name not in NOT_BROUGHT}
    assert len(expected) == len(files_of(source)) - len(NOT_BROUGHT)
    assert files_of(empty) == expected
    configured = (empty / ".dvc/config").read_text()
    assert "s3://models/cache" in configured
    assert "no_scm" in configured
    assert SECRET not in configured
    assert nothing_to_do(empty)


def test_a_version_from_a_dirty_tree_has_its_files_as_they_were(
    source: Path, later: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: bytes
) -> None:
    project = Workspace(later)
    (later / "models/run.json").write_bytes((source / "models/run.json").read_bytes())
    (later / "scripts/draw.py").write_text("never committed\n")
    dvc(later, "commit", "-q", "-f")
    dvc(later, "push", "-q")
    write_bytes(project.state / "mlflow.db", empty_database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project.state / 'mlflow.db'}")
    register(project)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = checkout(Workspace(empty), CHAMPION, trusted=[REMOTE])
    assert (done.dirty, done.pending) == (True, {})
    assert (empty / "scripts/draw.py").read_text() == "never committed\n"
    assert (empty / "src/darkroom/data/augment.py").exists()


def change_params(root: Path) -> str:
    set_params(Workspace(root), "train", steps=60)
    return "params.yaml"


def change_code(root: Path) -> str:
    (root / "src/darkroom/train.py").write_text("an idea\n")
    return "src/darkroom/train.py"


def add_code(root: Path) -> str:
    (root / "src/darkroom/data/idea.py").write_text("an idea\n")
    return "src/darkroom/data/idea.py"


def change_output(root: Path) -> str:
    path = root / "models/model.json"
    path.unlink()  # the cache may be linked to
    path.write_text("edited\n")
    return "models/model.json"


def test_work_that_exists_nowhere_else_is_named_and_kept(source: Path, later: Path) -> None:
    names = sorted(change(later) for change in (change_params, change_code, add_code, change_output))
    before = files_of(later)
    with pytest.raises(InputError, match=f"exist nowhere else: {', '.join(names)};"):
        checkout(Workspace(later), CHAMPION)
    assert files_of(later) == before
    done = checkout(Workspace(later), CHAMPION, force=True)
    assert done.pending == {}
    assert files_of(later) == files_of(source)


def test_an_output_that_was_edited_is_kept_though_the_lock_is_the_same(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "same"
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(".darkroom"), symlinks=True)
    name = change_output(root)
    with pytest.raises(InputError, match=f"exist nowhere else: {name};"):
        checkout(Workspace(root), CHAMPION)
    assert (root / name).read_text() == "edited\n"


def test_without_data_the_outputs_stay_and_the_next_checkout_brings_them(source: Path, later: Path) -> None:
    done = checkout(Workspace(later), CHAMPION, data=False)
    assert done.outputs is None
    assert (later / "models/run.json").read_text() == "{}\n"
    assert yaml.safe_load((later / "params.yaml").read_text())["train"]["steps"] == 40
    assert checkout(Workspace(later), CHAMPION).pending == {}
    assert files_of(later) == files_of(source)


@pytest.mark.parametrize("renames", [1, 3])
def test_a_checkout_that_was_killed_is_completed_by_the_same_command(
    source: Path, later: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    done, replace = 0, Path.replace

    def killed(self: Path, target: Path) -> Path:
        nonlocal done
        if "checkout" in self.parts:
            if done == renames:
                raise SystemExit(137)
            done += 1
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        if renames < 3:
            with pytest.raises(SystemExit):
                checkout(Workspace(later), CHAMPION)
        else:  # all files are in place, and the outputs are not yet
            patch.setattr("darkroom.registry.checkout.bring_outputs", lambda *_: sys.exit(137))
            with pytest.raises(SystemExit):
                checkout(Workspace(later), CHAMPION)
    assert checkout(Workspace(later), CHAMPION).pending == {}
    assert files_of(later) == files_of(source)


def test_raw_data_that_dvc_does_not_hold_is_what_stays_to_do(source: Path, later: Path, darkroom: Darkroom) -> None:
    (later / "data/raw/more.bin").write_bytes(b"of this machine")
    code, out, err = darkroom(later, "checkout", CHAMPION)
    assert code == 0, err
    assert "`dvc repro` would run prepare again" in out
    assert "prepare: changed deps: data/raw modified" in out
    assert (later / "data/prepared/dataset.json").read_bytes() == (source / "data/prepared/dataset.json").read_bytes()


def test_outputs_that_are_nowhere_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, darkroom: Darkroom
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = darkroom(empty, "checkout", CHAMPION, *TRUSTING)
    assert code == 1
    (line,) = err.splitlines()
    assert f"{OUTPUTS + 1} outputs are not in DVC's cache and remote 'storage' cannot be read" in line
    assert "models/ema.safetensors" in line


def test_a_cache_that_has_an_output_in_part_is_completed(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "part"
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(".darkroom"), symlinks=True)
    content = (root / "data/prepared/dataset.json").read_bytes()
    (cached,) = [path for path in (root / ".dvc/cache").rglob("*") if path.is_file() and path.read_bytes() == content]
    cached.unlink()
    shutil.rmtree(root / "data/prepared")
    assert checkout(Workspace(root), CHAMPION).pending == {}
    assert files_of(root) == files_of(source)


def test_a_remote_that_lacks_them_is_told_from_one_that_does_not_answer(source: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(source), str(clone))
    dvc(clone, "remote", "add", "--default", "storage", str(tmp_path / "nothing"))
    with pytest.raises(StageFailed, match="nor on remote 'storage'; `dvc push`") as error:
        checkout(Workspace(clone), CHAMPION, force=True)
    assert f"{OUTPUTS + 1} outputs" in str(error.value)


def test_a_directory_with_other_things_in_it_is_left_alone(source: Path, tmp_path: Path, darkroom: Darkroom) -> None:
    (tmp_path / "thesis.tex").write_text("years of work\n")
    code, _, err = darkroom(tmp_path, "checkout", CHAMPION)
    assert code == 2
    assert "neither a project nor empty: it holds thesis.tex; --force" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_outside_a_project_the_environment_has_to_name_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, darkroom: Darkroom
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, _, err = darkroom(tmp_path, "checkout", CHAMPION)
    assert code == 2
    assert "set MLFLOW_TRACKING_URI" in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def own(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of the source with a registry of its own to damage: the tags are copied, the artifacts shared."""
    root = tmp_path / "own"
    shutil.copytree(source, root, ignore=shutil.ignore_patterns("artifacts"), symlinks=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/.darkroom/mlflow.db")
    return Workspace(root)


def test_a_version_from_before_snapshots_says_so_until_it_is_registered_again(own: Workspace) -> None:
    connect(own).delete_model_version_tag("digits", "1", "darkroom.project")
    with pytest.raises(
        InputError, match=r"registered before versions kept their project; .* git checkout [0-9a-f]{40}"
    ):
        checkout(own, CHAMPION)
    assert not register(own).created
    assert checkout(own, CHAMPION).pending == {}


def test_a_snapshot_that_was_altered_is_not_unpacked(own: Workspace) -> None:
    connect(own).set_model_version_tag("digits", "1", "darkroom.project", "0" * 64)
    before = files_of(own.root)
    with pytest.raises(StageFailed, match="cannot be fetched"):
        checkout(own, CHAMPION, force=True)
    assert files_of(own.root) == before
