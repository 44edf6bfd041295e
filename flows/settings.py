"""Where runs find things and what bounds them: from the environment, never from params.yaml."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from darkroom.errors import InputError
from darkroom.workspace import Workspace


@dataclass(frozen=True)
class Settings:
    """The environment of a flow run. Docs/operations.md lists the variables."""

    project: Path  # the checkout that flows run from
    state: Path  # shared by all workspaces: checkpoints, local databases, the workspaces themselves
    repository: str  # what workspaces are cloned from, and records are pushed to
    dvc_cache: Path  # shared by all workspaces
    gpu_limit: str | None  # name of the concurrency limit that a run takes a slot of while it computes
    webhook: str | None  # URL that is told of failures, refusals and promotions
    keep_workspaces: int  # of runs that failed, for a look at what they left
    keep_checkpoints: int  # of trainings, the newest ones

    @classmethod
    def from_environment(cls) -> "Settings":
        """Raises InputError for a value that makes no sense."""
        project = _project()
        return cls(
            project=project,
            state=Workspace(project).state.resolve(),
            repository=_repository(project),
            dvc_cache=_dvc_cache(project),
            gpu_limit=os.environ.get("DARKROOM_GPU_LIMIT") or None,
            webhook=os.environ.get("DARKROOM_WEBHOOK") or None,
            keep_workspaces=_count("DARKROOM_KEEP_WORKSPACES", 3),
            keep_checkpoints=_count("DARKROOM_KEEP_CHECKPOINTS", 3),
        )

    @property
    def workspaces(self) -> Path:
        return self.state / "workspaces"

    @property
    def raw(self) -> Path:
        """What was fetched from S3, by source; workspaces hold hard links to it."""
        return self.state / "raw"

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Let the environment say where the shared state is, whichever checkout asks: a workspace has none of its own.

        Library and commands find runs, models and checkpoints through it, so all runs in one process agree.
        """
        from darkroom.registry.tracking import artifact_root, tracking_uri

        project = Workspace(self.project)
        values = {
            "DARKROOM_PROJECT": str(self.project),
            "DARKROOM_STATE": str(self.state),
            "MLFLOW_TRACKING_URI": tracking_uri(project),
        }
        if (root := os.environ.get("DARKROOM_ARTIFACT_ROOT")) and "://" not in root:
            values["DARKROOM_ARTIFACT_ROOT"] = artifact_root(project) or root
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _project() -> Path:
    if given := os.environ.get("DARKROOM_PROJECT"):
        return Workspace.find(Path(given)).root
    return Workspace.find().root


def _repository(project: Path) -> str:
    """`DARKROOM_REPOSITORY`, of which a path is relative to the project, or the project itself."""
    given = os.environ.get("DARKROOM_REPOSITORY") or "."
    path = project / Path(given).expanduser()
    return str(path.resolve()) if path.is_dir() else given


def _dvc_cache(project: Path) -> Path:
    """`DARKROOM_DVC_CACHE`, or the cache that the project itself uses."""
    from darkroom.registry.dvc_config import read_config

    if given := os.environ.get("DARKROOM_DVC_CACHE"):
        return (project / given).resolve()
    directory = project / ".dvc"
    configured = (read_config(directory / name).get("cache", {}).get("dir") for name in ("config.local", "config"))
    return (directory / next(filter(None, configured), "cache")).resolve()


def _count(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not (value.isascii() and value.isdecimal()):
        raise InputError(f"{name} = {value!r}: expected a whole number, at least 0")
    return int(value)
