"""Where runs find things and what bounds them: from the environment, never from params.yaml."""

import os
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
            repository=os.environ.get("DARKROOM_REPOSITORY") or str(project),
            dvc_cache=Path(os.environ.get("DARKROOM_DVC_CACHE") or project / ".dvc" / "cache").resolve(),
            gpu_limit=os.environ.get("DARKROOM_GPU_LIMIT") or None,
            webhook=os.environ.get("DARKROOM_WEBHOOK") or None,
            keep_workspaces=_count("DARKROOM_KEEP_WORKSPACES", 3),
            keep_checkpoints=_count("DARKROOM_KEEP_CHECKPOINTS", 3),
        )


def _project() -> Path:
    if given := os.environ.get("DARKROOM_PROJECT"):
        return Workspace.find(Path(given)).root
    return Workspace.find().root


def _count(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise InputError(f"{name} = {value!r}: expected a whole number, at least 0")
    return int(value)
